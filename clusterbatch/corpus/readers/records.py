"""Canonical values of one row, and chunks of rows as Arrow columns: shared by all readers."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from clusterbatch.corpus.rows import COLUMN_TYPES, TEXT_COLUMNS, Chunk, InputColumns, Reject, shown
from clusterbatch.schema import VECTORS

_CHUNK_ROWS = 8192
_CHUNK_CHARACTERS = 8 * 2**20


class RowError(Exception):
    """This row cannot be taken; the message is the reason."""


class Extractor:
    """Take the canonical values out of one record, a mapping from the input's column names.

    A record may lack a column that is not a text, as writers leave nulls out. absent: such columns that no record has
    had yet; None before the first record.
    """

    def __init__(self, columns: InputColumns) -> None:
        self._columns = columns
        self.absent: frozenset[str] | None = None

    def __call__(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Return the values by canonical name; a document may be a list of texts.

        Raises RowError if a column is missing or of another type.
        """
        columns = self._columns
        missing = frozenset(given for given in columns.left_out if given not in record)
        self.absent = missing if self.absent is None else self.absent & missing
        values: dict[str, Any] = {}
        for name, given in columns.names.items():
            if given in record:
                value = record[given]
            elif given in columns.constants:
                value = columns.constants[given]
            elif given in columns.offered:
                continue
            elif name not in TEXT_COLUMNS:
                value = None
            else:
                raise RowError(f"{name}: no column {given!r}")
            several = name == "document" and isinstance(value, list) and name not in columns.images
            values[name] = _documents(value, columns) if several else canonical_value(name, value)
        if columns.negatives:
            cells = {given: record.get(given) for given in columns.negatives}
            scores = {given: record.get(given) for given in columns.negative_scores}
            values["negatives"], judged = negatives_of(cells, scores)
            if scores:
                values["negative_scores"] = judged
        return values


def negatives_of(cells: Mapping[str, Any], scores: Mapping[str, Any]) -> tuple[list[str], list[float | None]]:
    """Return a row's negatives and the score of each, from cells by column; nulls and blank texts are left out.

    Raises RowError for a negative that is no text, a score that is no number, and if there are scores, but not as many
    as negatives.
    """
    texts = [text for column, value in cells.items() for text in _negative_texts(value, column)]
    judged = [score for value in scores.values() for score in _scores(value)]
    if len(cells) == 1 and next(iter(cells.values())) in (None, ""):
        texts = []
    if all(score is None for score in judged):
        judged = [None] * len(texts)
    if len(judged) != len(texts):
        raise RowError(f"negative_scores: {len(judged)} for {len(texts)} negatives")
    pairs = [(text, score) for text, score in zip(texts, judged, strict=True) if text and not text.isspace()]
    return [text for text, _ in pairs], [score for _, score in pairs]


def _negative_texts(value: Any, column: str) -> list[str | None]:
    """Return the negatives of a cell: a text or passage, a list of them, or such a list in JSON's notation."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        listed = _parsed(value)
        # CSV has no lists; JSON's notation is what tools write there.
        if isinstance(listed, list) and all(text is None or isinstance(text, str) for text in listed):
            value = listed
    texts: list[str | None] = []
    for item in value if isinstance(value, list) else [value]:
        text = passage_text(item)
        if not (text is None or isinstance(text, str)):
            raise RowError(f"negatives: {type(text).__name__} instead of text in {column!r}")
        texts.append(text)
    return texts


def _scores(value: Any) -> list[float | None]:
    """Return the scores of a cell: a number, a list of them, or such a list in JSON's notation."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = _parsed(value)
        if not isinstance(value, list):
            raise RowError("negative_scores: not a list of numbers")
    items = value if isinstance(value, list) else [value]
    return [None if item is None or item == "" else _score("negative_scores", item) for item in items]


class ChunkBuilder:
    """Collect rows until a chunk is full."""

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        self._rows: list[int] = []
        self._values: list[dict[str, Any]] = []
        self._rejects: list[Reject] = []
        self._characters = 0

    def add(self, row: int, values: dict[str, Any]) -> None:
        """Add a row; one with several documents becomes several pairs.

        Raises RowError if a text is not Unicode (lone surrogates, from bytes or escapes).
        """
        documents = values.get("document")
        pairs = [{**values, "document": text} for text in documents] if isinstance(documents, list) else [values]
        for name, value in values.items():
            for text in value if isinstance(value, list) else [value]:
                if isinstance(text, str):
                    check_unicode(name, text)
                    self._characters += len(text)
        self._rows += [row] * len(pairs)
        self._values += pairs

    def reject(self, row: int, reason: str, content: Any) -> None:
        """Add a row that is not taken."""
        self._rejects.append(Reject(row, reason, shown(content)))

    @property
    def is_full(self) -> bool:
        return len(self._rows) + len(self._rejects) >= _CHUNK_ROWS or self._characters >= _CHUNK_CHARACTERS

    @property
    def is_empty(self) -> bool:
        return not self._rows and not self._rejects

    def take(self, absent: frozenset[str] | None = None) -> Chunk:
        """Return the rows as a chunk and start the next one."""
        names = [name for name in COLUMN_TYPES if any(name in values for values in self._values)]
        columns = {name: pa.array([values.get(name) for values in self._values], COLUMN_TYPES[name]) for name in names}
        chunk = Chunk(np.array(self._rows, np.int64), columns, self._rejects, absent)
        self._start()
        return chunk


def passage_text(value: Any) -> Any:
    """Return title and text of a passage, an object as Tevatron and MIRACL write it; any other value as it is."""
    if isinstance(value, Mapping) and isinstance(value.get("text"), str):
        return f"{value.get('title') or ''} {value['text']}".strip()
    return value


def _documents(value: list[Any], columns: InputColumns) -> list[str | None]:
    """Return the texts of a list of documents; a list without any is one null."""
    if any(name in columns.names for name in VECTORS) and len(value) > 1:
        raise RowError("document: several texts cannot share one vector")
    return [canonical_value("document", text) for text in value] or [None]  # type: ignore[misc]


def canonical_value(name: str, value: Any) -> str | float | list[float] | None:
    """Return the value of a canonical column; an empty identifier or label is null. Raises RowError if it is none."""
    # A CSV field cannot say null; an empty identifier or label says nothing.
    if value is None or (value == "" and name not in TEXT_COLUMNS):
        return None
    if name in VECTORS:
        return _vector(value)
    if name == "weight":
        return _weight(value)
    if name == "score":
        return _score(name, value)
    if name == "document":
        value = passage_text(value)
    if isinstance(value, str):
        return value
    # Numbers are common as identifiers and labels, and unambiguous there; as a text they are a mistake.
    if name in ("pair_id", "source", "group", "document_id") and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise RowError(f"{name}: {type(value).__name__} instead of text")


def _weight(value: Any) -> float:
    weight = _number("weight", value)
    if not math.isfinite(weight) or weight < 0:
        raise RowError(f"weight: {value!r} is not a finite number of at least 0")
    return weight


def _score(name: str, value: Any) -> float:
    score = _number(name, value)
    # Beyond float32's range it would become infinite.
    if not abs(score) <= float(np.finfo(np.float32).max):
        raise RowError(f"{name}: {value!r} is not a finite number")
    return score


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool):
        raise RowError(f"{name}: {value!r} is not a number")
    try:
        return float(value)
    except (TypeError, ValueError):
        raise RowError(f"{name}: {value!r} is not a number") from None
    except OverflowError:
        raise RowError(f"{name}: an integer that is too large") from None


def _vector(value: Any) -> list[float]:
    # CSV has no lists; JSON's notation is what tools write there.
    numbers = _parsed(value) if isinstance(value, str) else value
    try:
        if any(isinstance(number, bool) for number in numbers):
            raise RowError("vector: bool instead of a number")
        return [float(number) for number in numbers]
    except (TypeError, ValueError):
        raise RowError(f"vector: {type(value).__name__} instead of a list of numbers") from None
    except OverflowError:
        raise RowError("vector: an integer that is too large") from None


def _parsed(text: str) -> Any:
    """Return what a JSON text says, None if it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def check_unicode(name: str, text: str) -> None:
    """Raise RowError if a text has lone surrogates, which no column can hold."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise RowError(f"{name}: invalid bytes for this encoding (UTF-8 unless corpus.encoding says so)") from None
