"""Chooses the reader of a file by its name and its first bytes, and gives library errors one voice."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO

import pyarrow as pa

from clusterbatch.config import CorpusConfig, StorageConfig
from clusterbatch.corpus.formats import Format, agree, agree_inside
from clusterbatch.corpus.inputs import InputFile, Slice
from clusterbatch.corpus.readers.delimited import read_delimited
from clusterbatch.corpus.readers.jsonl import read_json_lines
from clusterbatch.corpus.readers.parquet import read_parquet_slice
from clusterbatch.corpus.readers.text import decompressed, detect_encoding
from clusterbatch.corpus.rows import BrokenFileError, Chunk
from clusterbatch.store.filesystem import Folder

_HEAD = 64 * 2**10
# Text may hold a stray NUL; binary data has one here.
_MOST_TELLING = 1024


def read_slice(piece: Slice, config: CorpusConfig, storage: StorageConfig) -> Iterator[Chunk]:
    """The rows of one slice, in order, in chunks of a few megabytes.

    Raises BrokenFileError where the file or the rest of it cannot be read: truncated, not what its name says, or
    without the columns that the configuration names.
    """
    with opened(piece.file, storage) as (opening, file):
        format = opening.format
        if format.kind == "parquet":
            yield from read_parquet_slice(file, piece, config.columns)
            return
        encoding = config.encoding or detect_encoding(opening.head)
        if format.kind == "jsonl":
            # A compressed file is one slice, whose bytes are not those of the text.
            yield from read_json_lines(file, None if format.compression else piece, config.columns, encoding)
        elif format.kind in ("csv", "tsv"):
            if b"\0" in opening.head[:_MOST_TELLING] and not encoding.startswith(("utf-16", "utf-32")):
                raise BrokenFileError("not what its name says: binary data, not text")
            yield from read_delimited(file, config.columns, encoding, tabs=format.kind == "tsv")
        else:
            raise BrokenFileError("unknown format; expected Parquet, JSON Lines, CSV or TSV")


@dataclass(frozen=True)
class Opening:
    """What the beginning of a file tells: its format, and the first bytes of its (decompressed) content."""

    format: Format
    head: bytes


@contextmanager
def opened(file: InputFile, storage: StorageConfig) -> Iterator[tuple[Opening, BinaryIO]]:
    """A file's content, decompressed. What libraries raise inside the block becomes BrokenFileError.

    Raises BrokenFileError where the file is empty or not what its name says.
    """
    if file.size == 0:
        raise BrokenFileError("empty file")
    folder = Folder(posixpath.dirname(file.uri), storage)
    try:
        opening = _opening(folder, file.name)
        with folder.open(file.name) as stored:
            yield opening, decompressed(stored, opening.format.compression)
    # The names in a damaged footer may not be text.
    except (pa.ArrowException, OSError, EOFError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the storage, not the file
        text = str(error).strip()
        raise BrokenFileError(text.splitlines()[0] if text else type(error).__name__) from error


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
