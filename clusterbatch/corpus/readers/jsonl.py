"""JSON Lines: one object a line, read by byte ranges so that a large file is many units of work."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, BinaryIO

from clusterbatch.config import ColumnsConfig, CorpusConfig
from clusterbatch.corpus.inputs import Slice
from clusterbatch.corpus.readers.records import ChunkBuilder, RowError, text_value
from clusterbatch.corpus.rows import BrokenFileError, Chunk, input_names

_LONGEST_LINE = 64 * 2**20


def read_json_lines(file: BinaryIO, piece: Slice, config: CorpusConfig) -> Iterator[Chunk]:
    """Rows of the lines that begin in the slice; positions count from the slice's first line."""
    builder = ChunkBuilder()
    extract = _Extractor(config.columns)
    for row, line in enumerate(_lines(file, piece)):
        try:
            builder.add(row, extract(_decode(line)))
        except RowError as error:
            builder.reject(row, str(error), line.decode("utf-8", "backslashreplace"))
        if builder.is_full:
            yield builder.take()
    if not builder.is_empty:
        yield builder.take()


def _lines(file: BinaryIO, piece: Slice) -> Iterator[bytes]:
    if piece.start:
        # The line that begins before the slice belongs to the slice before.
        file.seek(piece.start - 1)
        position = piece.start - 1 + len(file.readline(_LONGEST_LINE))
    else:
        position = 0
    while position < piece.end:
        line = file.readline(_LONGEST_LINE)
        if not line:
            return
        if len(line) >= _LONGEST_LINE:
            raise BrokenFileError(f"a line of more than {_LONGEST_LINE >> 20} MiB at byte {position}")
        if position == 0:
            line = line.removeprefix(b"\xef\xbb\xbf")
        position += len(line)
        yield line.rstrip(b"\r\n")


def _decode(line: bytes) -> dict[str, Any]:
    if not line.strip():
        raise RowError("empty line")
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RowError(f"invalid UTF-8 at byte {error.start} of the line") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise RowError(f"not JSON: {getattr(error, 'msg', 'nested too deeply')}") from None
    if not isinstance(value, dict):
        raise RowError(f"not a JSON object: {type(value).__name__}")
    return value


class _Extractor:
    """Canonical values of one JSON object."""

    def __init__(self, columns: ColumnsConfig) -> None:
        self._names = input_names(columns)
        self._negatives = columns.negatives
        self._source_is_offered = "source" not in columns.model_fields_set

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name, given in self._names.items():
            if given in record:
                values[name] = text_value(name, record[given])
            elif not (name == "source" and self._source_is_offered):
                raise RowError(f"{name}: no key {given!r}")
        if self._negatives:
            values["negatives"] = self._merge(record)
        return values

    def _merge(self, record: dict[str, Any]) -> list[str]:
        merged: list[str] = []
        for given in self._negatives:
            value = record.get(given)
            texts = value if isinstance(value, list) else [value]
            for text in texts:
                if not (text is None or isinstance(text, str)):
                    raise RowError(f"negatives: {type(text).__name__} instead of text in {given!r}")
                if text is not None:
                    merged.append(text)
        return merged
