"""Chooses the reader of a file by its name and its first bytes, and gives library errors one voice."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator

import pyarrow as pa

from clusterbatch.config import CorpusConfig, StorageConfig
from clusterbatch.corpus.formats import agree
from clusterbatch.corpus.inputs import Slice
from clusterbatch.corpus.readers.jsonl import read_json_lines
from clusterbatch.corpus.readers.parquet import read_parquet_slice
from clusterbatch.corpus.rows import BrokenFileError, Chunk
from clusterbatch.store.filesystem import Folder

_HEAD = 64 * 2**10


def read_slice(piece: Slice, config: CorpusConfig, storage: StorageConfig) -> Iterator[Chunk]:
    """The rows of one slice, in order, in chunks of a few megabytes.

    Raises BrokenFileError where the file or the rest of it cannot be read: truncated, not what its name says, or
    without the columns that the configuration names.
    """
    if piece.file.size == 0:
        raise BrokenFileError("empty file")
    folder = Folder(posixpath.dirname(piece.file.uri), storage)
    with folder.open(piece.file.name) as file:
        head = file.read(_HEAD)
        format, contradiction = agree(piece.file.name, head)
        if contradiction:
            raise BrokenFileError(contradiction)
        file.seek(0)
        try:
            if format.kind == "parquet" and format.compression is None:
                yield from read_parquet_slice(file, piece, config.columns)
            elif format.kind == "jsonl":
                yield from read_json_lines(file, piece, config)
            else:
                raise BrokenFileError("unknown format; expected Parquet or JSON Lines")
        except (pa.ArrowException, OSError, EOFError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # the storage, not the file
            raise BrokenFileError(_first_line(error)) from error


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
