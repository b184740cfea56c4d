"""The table of corpus/README.md that says which types of values each column takes, by trying each.

`python -m tests.corpus.type_table` writes it into the page.
"""

from __future__ import annotations

import csv
import datetime
import io
import itertools
import json
import tempfile
import uuid
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.corpus.reading import Outcome, read

README = Path(__file__).parents[2] / "clusterbatch" / "corpus" / "README.md"
BEGIN, END = "<!-- begin: types of values (python -m tests.corpus.type_table) -->", "<!-- end: types of values -->"

# The column of the input that holds the value, and the configuration under which it is read.
ROLES: dict[str, dict[str, Any]] = {
    "`query`": {},
    "`document`": {},
    "`source`, `pair_id`, `group`": {"columns": {"group": "value"}},
    "`negatives`": {"columns": {"negatives": ["value"]}},
    "`weight`": {"columns": {"weight": "value"}},
    "`vector`": {"columns": {"vector": "value"}},
}
_TENSOR = pa.fixed_shape_tensor(pa.float32(), [2])
_UUID = uuid.UUID(int=7)


def _lists(kind: pa.DataType, values: list[Any]) -> list[pa.Array]:
    """A list of one row in every kind of list."""
    kinds = [pa.list_(kind), pa.large_list(kind), pa.list_(kind, 2), pa.list_view(kind)]
    return [pa.array([values], one) for one in kinds]


# By name: arrays of one row, all of which must fare alike.
PARQUET: dict[str, list[pa.Array]] = {
    "string, large string, string view, dictionary": [
        pa.array(["text"], pa.string()),
        pa.array(["text"], pa.large_string()),
        pa.array(["text"], pa.string_view()),
        pa.array(["text"]).dictionary_encode(),
    ],
    "binary, if UTF-8": [pa.array([b"text"], pa.binary()), pa.array([b"text"], pa.large_binary())],
    "JSON": [pa.ExtensionArray.from_storage(pa.json_(), pa.array(["text"]))],
    "null": [pa.nulls(1)],
    "integer": [pa.array([3], kind) for kind in (pa.int8(), pa.int64(), pa.uint64())],
    "decimal": [pa.array([Decimal("3.00")], kind) for kind in (pa.decimal128(18, 3), pa.decimal256(40, 2))],
    "float": [pa.array([3.0], kind) for kind in (pa.float16(), pa.float32(), pa.float64())],
    "boolean": [pa.array([True])],
    "UUID": [pa.ExtensionArray.from_storage(pa.uuid(), pa.array([_UUID.bytes], pa.binary(16)))],
    "date, timestamp": [pa.array([datetime.date(2024, 1, 1)]), pa.array([datetime.datetime(2024, 1, 1)])],
    "passage (struct of `text`, `title`)": [
        pa.array([{"docid": "1", "title": "b", "text": "a"}]),
        pa.array([{"text": "a"}]),
        pa.array([{"text": "a"}], pa.struct({"text": pa.large_string()})),
    ],
    "other struct": [pa.array([{"passage": "a"}]), pa.array([{"text": 1}])],
    "list of passages": _lists(pa.struct({"text": pa.string()}), [{"text": "one"}, {"text": "two"}]),
    "list of strings": _lists(pa.string(), ["one", "two"]),
    "list of integers": _lists(pa.int8(), [3, 4]),
    "list of decimals": _lists(pa.decimal128(4, 1), [Decimal("3.5"), Decimal("4.0")]),
    "list of floats, tensor": [
        *_lists(pa.float64(), [0.5, 1.5]),
        pa.ExtensionArray.from_storage(_TENSOR, pa.array([[0.5, 1.5]], pa.list_(pa.float32(), 2))),
    ],
}
JSON_LINES: dict[str, list[Any]] = {
    "string": ["text"],
    "null": [None],
    "integer": [3],
    "float": [3.5],
    "boolean": [True],
    "passage (object of `text`, `title`)": [{"title": "b", "text": "a"}, {"text": "a", "docid": 1}],
    "other object": [{"passage": "a"}, {"text": 1}, {"title": "a"}],
    "list of passages": [[{"text": "one"}, {"text": "two"}]],
    "list of strings": [["one", "two"]],
    "list of numbers": [[3, 4.5]],
    "list in JSON's notation": ['["one", "two"]'],
}
CELLS: dict[str, list[str]] = {
    "text": ["text"],
    "nothing": [""],
    "number": ["3", "3.5"],
    "list of strings in JSON's notation": ['["one", "two"]'],
    "list of numbers in JSON's notation": ["[3, 4.5]"],
}


def verdict(outcome: Outcome, role: str) -> str:
    """What became of the one row of a file."""
    if outcome.broken:
        return "file refused"
    if outcome.rejects:
        return "row rejected"
    if len(outcome.rows) > 1:
        return "a pair each"
    found = outcome.rows[0].get({"`negatives`": "negatives", "`weight`": "weight"}.get(role, "group"))
    if "group" in role or role == "`negatives`":
        return "none" if not found else "a negative each" if role == "`negatives`" and len(found) > 1 else "yes"
    return "1" if role == "`weight`" and outcome.rows[0]["weight"] == 1.0 else "yes"


def _named(role: str) -> str:
    return role.strip("`") if role in ("`query`", "`document`") else "value"


def _parquet(array: pa.Array, role: str) -> bytes:
    columns: dict[str, pa.Array] = {"query": pa.array(["a query"]), "document": pa.array(["a document"])}
    sink = io.BytesIO()
    pq.write_table(pa.table(columns | {_named(role): array}), sink)
    return sink.getvalue()


def _arrow_file(array: pa.Array, role: str) -> bytes:
    return _arrow(array, role, pa.ipc.new_file)


def _arrow_stream(array: pa.Array, role: str) -> bytes:
    return _arrow(array, role, pa.ipc.new_stream)


def _arrow(array: pa.Array, role: str, new: Callable[..., Any]) -> bytes:
    table = pa.table({"query": pa.array(["a query"]), "document": pa.array(["a document"])} | {_named(role): array})
    sink = io.BytesIO()
    with new(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def _line(value: Any, role: str) -> bytes:
    return json.dumps({"query": "a query", "document": "a document", _named(role): value}).encode()


def _cells(value: str, role: str) -> bytes:
    row = {"query": "a query", "document": "a document", _named(role): value}
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerows([list(row), list(row.values())])
    return text.getvalue().encode()


def _tab_cells(value: str, role: str) -> bytes:
    row = {"query": "a query", "document": "a document", _named(role): value}
    return f"{chr(9).join(row)}\n{chr(9).join(row.values())}\n".encode()


def _verdicts(folder: Path, makers: dict[str, Callable[[Any, str], bytes]], values: list[Any]) -> list[str]:
    """Return the outcome of values, which must be the same in all formats of `makers`, by file name."""
    found = []
    for role, config in ROLES.items():
        outcomes = set()
        for (name, make), value in itertools.product(makers.items(), values):
            file = folder / name
            file.write_bytes(make(value, role))
            outcomes.add(verdict(read(file, **config), role))
        assert len(outcomes) == 1, (list(makers), values, role, outcomes)
        found += outcomes
    return found


def table() -> str:
    """The table as Markdown."""
    formats: list[tuple[str, dict[str, Callable[[Any, str], bytes]], dict[str, list[Any]]]] = [
        ("Parquet, Arrow", {"x.parquet": _parquet, "x.arrow": _arrow_file, "y.arrow": _arrow_stream}, PARQUET),
        ("JSON Lines", {"x.jsonl": _line}, JSON_LINES),
        ("CSV, TSV", {"x.csv": _cells, "x.tsv": _tab_cells}, CELLS),
    ]
    lines = ["| format | type | " + " | ".join(ROLES) + " |", "|---|---|" + "---|" * len(ROLES)]
    with tempfile.TemporaryDirectory() as folder:
        for name, makers, kinds in formats:
            for kind, values in kinds.items():
                cells = _verdicts(Path(folder), makers, values)
                lines.append(f"| {name} | {kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def block() -> str:
    """The part of the page between the marks, with them."""
    return f"{BEGIN}\n{table()}\n{END}"


if __name__ == "__main__":
    page = README.read_text()
    start, end = page.index(BEGIN), page.index(END) + len(END)
    README.write_text(page[:start] + block() + page[end:])
