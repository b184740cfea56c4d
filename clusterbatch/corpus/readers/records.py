"""What the readers of text formats share: values of one row at a time become Arrow columns in chunks."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from clusterbatch.config import ColumnsConfig
from clusterbatch.corpus.rows import COLUMN_TYPES, TEXT_COLUMNS, Chunk, Reject, input_names, shown
from clusterbatch.schema import VECTORS

_CHUNK_ROWS = 8192
_CHUNK_CHARACTERS = 8 * 2**20


class RowError(Exception):
    """This row cannot be taken; the message is the reason."""


class Extractor:
    """The canonical values of one record, a mapping from the input's column names."""

    def __init__(self, columns: ColumnsConfig) -> None:
        self._names = input_names(columns)
        self._negatives = columns.negatives
        self._source_is_offered = columns.source is None

    def __call__(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Raises RowError where a column is missing or of another type."""
        values: dict[str, Any] = {}
        for name, given in self._names.items():
            if given in record:
                values[name] = _canonical_value(name, record[given])
            elif not (name == "source" and self._source_is_offered):
                raise RowError(f"{name}: no column {given!r}")
        if self._negatives:
            values["negatives"] = self._merge(record)
        return values

    def _merge(self, record: Mapping[str, Any]) -> list[str]:
        merged: list[str] = []
        for given in self._negatives:
            value = record.get(given)
            for text in value if isinstance(value, list) else [value]:
                if not (text is None or isinstance(text, str)):
                    raise RowError(f"negatives: {type(text).__name__} instead of text in {given!r}")
                if text:
                    merged.append(text)
        return merged


class ChunkBuilder:
    """Collects rows until a chunk is full."""

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        self._rows: list[int] = []
        self._values: list[dict[str, Any]] = []
        self._rejects: list[Reject] = []
        self._characters = 0

    def add(self, row: int, values: dict[str, Any]) -> None:
        """Raises RowError where a text is not Unicode (lone surrogates, from bytes or escapes)."""
        for name, value in values.items():
            for text in value if isinstance(value, list) else [value]:
                if isinstance(text, str):
                    check_unicode(name, text)
                    self._characters += len(text)
        self._rows.append(row)
        self._values.append(values)

    def reject(self, row: int, reason: str, content: Any) -> None:
        self._rejects.append(Reject(row, reason, shown(content)))

    @property
    def is_full(self) -> bool:
        return len(self._rows) + len(self._rejects) >= _CHUNK_ROWS or self._characters >= _CHUNK_CHARACTERS

    @property
    def is_empty(self) -> bool:
        return not self._rows and not self._rejects

    def take(self) -> Chunk:
        names = [name for name in COLUMN_TYPES if any(name in values for values in self._values)]
        columns = {name: pa.array([values.get(name) for values in self._values], COLUMN_TYPES[name]) for name in names}
        chunk = Chunk(np.array(self._rows, np.int64), columns, self._rejects)
        self._start()
        return chunk


def _canonical_value(name: str, value: Any) -> str | float | list[float] | None:
    # A CSV field cannot say null; an empty identifier or label says nothing.
    if value is None or (value == "" and name not in TEXT_COLUMNS):
        return None
    if name in VECTORS:
        return _vector(value)
    if name == "weight":
        return _weight(value)
    if isinstance(value, str):
        return value
    # Numbers are common as identifiers and labels, and unambiguous there; as a text they are a mistake.
    if name in ("pair_id", "source", "group") and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise RowError(f"{name}: {type(value).__name__} instead of text")


def _weight(value: Any) -> float:
    try:
        weight = float(value)
    except (TypeError, ValueError):
        raise RowError(f"weight: {value!r} is not a number") from None
    except OverflowError:
        raise RowError("weight: an integer that is too large") from None
    if not math.isfinite(weight) or weight < 0:
        raise RowError(f"weight: {value!r} is not a finite number of at least 0")
    return weight


def _vector(value: Any) -> list[float]:
    try:
        # CSV has no lists; JSON's notation is what tools write there.
        numbers = json.loads(value) if isinstance(value, str) else value
        return [float(number) for number in numbers]
    except (TypeError, ValueError, RecursionError):
        raise RowError(f"vector: {type(value).__name__} instead of a list of numbers") from None
    except OverflowError:
        raise RowError("vector: an integer that is too large") from None


def check_unicode(name: str, text: str) -> None:
    """Raises RowError where a text has lone surrogates, which no column can hold."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise RowError(f"{name}: invalid bytes for this encoding (UTF-8 unless corpus.encoding says so)") from None
