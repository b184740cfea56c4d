"""The readers by format, chosen by a file's name and its first bytes; errors of libraries become one kind."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO

import pyarrow as pa

from clusterbatch.config import CorpusConfig, StorageConfig
from clusterbatch.corpus.inputs import InputFile, Slice
from clusterbatch.corpus.readers.delimited import read_delimited
from clusterbatch.corpus.readers.formats import Format, agree, agree_inside
from clusterbatch.corpus.readers.jsonl import read_json_lines
from clusterbatch.corpus.readers.parquet import read_arrow, read_parquet_slice
from clusterbatch.corpus.readers.text import decompressed, detect_encoding
from clusterbatch.corpus.rows import BrokenFileError, Chunk, InputColumns
from clusterbatch.errors import first_line
from clusterbatch.store.folder import Folder

_HEAD = 64 * 2**10
# Text may hold a stray NUL; binary data has one here.
_MOST_TELLING = 1024


def read_slice(piece: Slice, config: CorpusConfig, storage: StorageConfig) -> Iterator[Chunk]:
    """Yield the rows of one slice, in order, in chunks of a few megabytes.

    Raises BrokenFileError if the file or the rest of it cannot be read: truncated, not what its name says, or without
    the columns that the configuration names.
    """
    with opened(piece.file, storage) as (opening, file):
        reader = READERS.get(opening.format.kind or "")
        if reader is None:
            raise BrokenFileError(f"unknown format; expected {', '.join(READERS)}")
        columns = InputColumns.of(config, piece.file.keys)
        yield from reader(Reading(file, piece, columns, config.encoding, opening, config.tsv_quotes))


@dataclass(frozen=True)
class Reading:
    """Arguments of a reader. encoding: the one configured, if any; tsv_quotes: whether TSV has quoted fields."""

    file: BinaryIO
    piece: Slice
    columns: InputColumns
    encoding: str | None
    opening: Opening
    tsv_quotes: bool = False

    @property
    def text_encoding(self) -> str:
        """The encoding for readers of text."""
        return self.encoding or detect_encoding(self.opening.head)


def _parquet(reading: Reading) -> Iterator[Chunk]:
    return read_parquet_slice(reading.file, reading.piece, reading.columns)


def _arrow(reading: Reading) -> Iterator[Chunk]:
    return read_arrow(reading.file, reading.columns)


def _json_lines(reading: Reading) -> Iterator[Chunk]:
    # A compressed file is one slice, whose bytes are not those of the text.
    piece = None if reading.opening.format.compression else reading.piece
    return read_json_lines(reading.file, piece, reading.columns, reading.text_encoding)


def _delimited(reading: Reading) -> Iterator[Chunk]:
    encoding, opening = reading.text_encoding, reading.opening
    if b"\0" in opening.head[:_MOST_TELLING] and not encoding.startswith(("utf-16", "utf-32")):
        raise BrokenFileError("not what its name says: binary data, not text")
    tabs = opening.format.kind == "tsv"
    quotes = reading.tsv_quotes or not tabs
    return read_delimited(reading.file, reading.columns, encoding, tabs=tabs, quotes=quotes)


# By the kind that formats.EXTENSIONS gives a file.
READERS: dict[str, Callable[[Reading], Iterator[Chunk]]] = {
    "parquet": _parquet,
    "arrow": _arrow,
    "jsonl": _json_lines,
    "csv": _delimited,
    "tsv": _delimited,
}


@dataclass(frozen=True)
class Opening:
    """A file's format and the first bytes of its (decompressed) content."""

    format: Format
    head: bytes


@contextmanager
def opened(file: InputFile, storage: StorageConfig) -> Iterator[tuple[Opening, BinaryIO]]:
    """Open a file's content, decompressed. What libraries raise inside the block becomes BrokenFileError.

    Raises BrokenFileError if the file is empty or not what its name says.
    """
    if file.size == 0:
        raise BrokenFileError("empty file")
    folder, name = file.place(storage)
    try:
        opening = _opening(folder, name)
        with folder.open(name) as stored:
            yield opening, decompressed(stored, opening.format.compression)
    # The names in a damaged footer may not be text.
    except (pa.ArrowException, OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the storage, not the file
        raise BrokenFileError(first_line(error)) from error


def _opening(folder: Folder, name: str) -> Opening:
    with folder.open(name) as file:
        head = file.read(_HEAD)
        format, contradiction = agree(name, head)
        if format.compression and not contradiction:
            file.seek(0)
            head = decompressed(file, format.compression).read(_HEAD)
            format, contradiction = agree_inside(format, head)
    if contradiction:
        raise BrokenFileError(contradiction)
    return Opening(format, head)
