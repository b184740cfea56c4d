"""Chooses the reader of a file by its name and its first bytes, and gives library errors one voice."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator
from typing import BinaryIO

import pyarrow as pa

from clusterbatch.config import CorpusConfig, StorageConfig
from clusterbatch.corpus.formats import Format, agree, agree_inside
from clusterbatch.corpus.inputs import Slice
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
    if piece.file.size == 0:
        raise BrokenFileError("empty file")
    folder = Folder(posixpath.dirname(piece.file.uri), storage)
    try:
        format, head = _format(folder, piece.file.name)
        with folder.open(piece.file.name) as file:
            yield from _read(file, format, head, piece, config)
    except (pa.ArrowException, OSError, EOFError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the storage, not the file
        raise BrokenFileError(_first_line(error)) from error


def _format(folder: Folder, name: str) -> tuple[Format, bytes]:
    """The format of a file and the first bytes of its (decompressed) content."""
    with folder.open(name) as file:
        head = file.read(_HEAD)
        format, contradiction = agree(name, head)
        if format.compression and not contradiction:
            file.seek(0)
            head = decompressed(file, format.compression).read(_HEAD)
            format, contradiction = agree_inside(format, head)
    if contradiction:
        raise BrokenFileError(contradiction)
    return format, head


def _read(file: BinaryIO, format: Format, head: bytes, piece: Slice, config: CorpusConfig) -> Iterator[Chunk]:
    if format.kind == "parquet":
        yield from read_parquet_slice(file, piece, config.columns)
        return
    encoding = config.encoding or detect_encoding(head)
    if b"\0" in head[:_MOST_TELLING] and not encoding.startswith(("utf-16", "utf-32")):
        raise BrokenFileError("not what its name says: binary data, not text")
    stream = decompressed(file, format.compression)
    if format.kind == "jsonl":
        # A compressed file is one slice, whose bytes are not those of the text.
        yield from read_json_lines(stream, None if format.compression else piece, config.columns, encoding)
    elif format.kind in ("csv", "tsv"):
        yield from read_delimited(stream, config.columns, encoding, tabs=format.kind == "tsv")
    else:
        raise BrokenFileError("unknown format; expected Parquet, JSON Lines, CSV or TSV")


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
