"""Values of all types that writers leave: taken, or refused with the column's name; the same rule in all formats."""

from __future__ import annotations

import csv
import gzip
import json
import uuid
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from clusterbatch.corpus.normalise import normalise
from clusterbatch.corpus.readers import parquet
from tests.corpus import type_table
from tests.corpus.reading import read


def write(path: Path, **columns: Any) -> Path:
    pq.write_table(pa.table({"query": ["q"], "document": ["d"]} | columns), path)
    return path


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_page_says_which_types_are_taken() -> None:
    assert type_table.block() in type_table.README.read_text(), "run python -m tests.corpus.type_table"


def test_identifiers_and_labels_are_written_as_people_write_them(tmp_path: Path) -> None:
    key = uuid.UUID(int=7)
    ids = pa.ExtensionArray.from_storage(pa.uuid(), pa.array([key.bytes, None], pa.binary(16)))
    groups = pa.array([Decimal("12.000"), Decimal("0.500")], pa.decimal128(18, 3))
    file = write(tmp_path / "x.parquet", query=["a", "b"], document=["c", "d"], id=ids, group=groups)
    rows = read(file, columns={"pair_id": "id", "group": "group"}).rows
    assert rows[0]["pair_id"] == str(key)
    assert rows[1]["pair_id"]
    assert [row["group"] for row in rows] == ["12", "0.500"]


def test_an_empty_identifier_or_label_says_nothing_in_all_formats(tmp_path: Path) -> None:
    cells = ["", None, "named"]
    rows = [{"query": f"q{n}", "document": "d", "id": cell, "g": cell} for n, cell in enumerate(cells)]
    table = {name: [row[name] for row in rows] for name in rows[0]}
    write_lines(tmp_path / "x.jsonl", rows)
    write(tmp_path / "x.parquet", **table)
    write(tmp_path / "dictionary.parquet", **table | {"id": pa.array(cells).dictionary_encode()})
    with (tmp_path / "x.csv").open("w", newline="") as file:
        csv.writer(file).writerows([list(rows[0]), *(row.values() for row in rows)])
    for name in ("x.jsonl", "x.csv", "x.parquet", "dictionary.parquet"):
        found = read(tmp_path / name, source="s", columns={"pair_id": "id", "group": "g"}).rows
        assert [row["group"] for row in found] == [None, None, "named"], name
        # Otherwise an id is computed.
        assert [len(row["pair_id"]) for row in found] == [32, 32, len("named")], name


@pytest.mark.parametrize("kind", [pa.int64(), pa.uint64(), pa.decimal128(20, 2), pa.float64()])
def test_weights_of_any_size_are_rounded_alike(tmp_path: Path, kind: pa.DataType) -> None:
    weights = [2**24 + 1, 2**53 + 1, 7]
    values = pa.array([Decimal(weight) for weight in weights]).cast(kind, safe=False)
    write(tmp_path / "x.parquet", query=["a", "b", "c"], document=["d"] * 3, w=values)
    write_lines(tmp_path / "x.jsonl", [{"query": f"q{w}", "document": "d", "w": w} for w in weights])
    for name in ("x.parquet", "x.jsonl"):
        found = [row["weight"] for row in read(tmp_path / name, columns={"weight": "w"}).rows]
        assert found == [float(np.float32(weight)) for weight in weights]


@pytest.mark.parametrize("listed", [pa.list_, pa.large_list, pa.list_view, lambda kind: pa.list_(kind, 2)])
@pytest.mark.parametrize("kind", [pa.int8(), pa.uint64(), pa.float16(), pa.float64(), pa.decimal128(6, 2)])
def test_vectors_of_any_numbers(tmp_path: Path, listed: Any, kind: pa.DataType) -> None:
    cast = Decimal if pa.types.is_decimal(kind) else np.float16 if pa.types.is_float16(kind) else int
    values = [None if row is None else [cast(number) for number in row] for row in ([3, 4], None, [0, 5])]
    columns = {"query": ["a", "b", "c"], "document": ["d", "e", "f"], "v": pa.array(values, listed(kind))}
    outcome = read(write(tmp_path / "x.parquet", **columns), columns={"vector": "v"})
    assert outcome.broken is None
    assert [row["query"] for row in outcome.rows] == ["a", "c"]
    np.testing.assert_allclose([row["document_vector"] for row in outcome.rows], [[0.6, 0.8], [0.0, 1.0]], atol=1e-3)
    assert [(reject.row, reject.reason) for reject in outcome.rejects] == [(1, "vector: null or empty")]


def test_negatives_follow_one_rule_in_all_formats(tmp_path: Path) -> None:
    cells: list[Any] = [["one", "", None, " \t"], [], None, "alone", '["two", null, "three"]', "[not JSON", ""]
    expected = [["one"], [], [], ["alone"], ["two", "three"], ["[not JSON"], []]
    rows: list[dict[str, Any]] = [{"query": f"q {n}", "document": "d", "neg": cell} for n, cell in enumerate(cells)]
    texts = [json.dumps(cell) if isinstance(cell, list) else cell for cell in cells]
    common = {name: [row[name] for row in rows] for name in ("query", "document")}
    write_lines(tmp_path / "x.jsonl", rows)
    write(tmp_path / "texts.parquet", **common, neg=texts)
    write(tmp_path / "dictionary.parquet", **common, neg=pa.array(texts).dictionary_encode())
    with (tmp_path / "x.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [list(rows[0]), *([*list(row.values())[:2], t] for row, t in zip(rows, texts, strict=True))]
        )
    for name in ("x.jsonl", "texts.parquet", "dictionary.parquet", "x.csv"):
        outcome = read(tmp_path / name, columns={"negatives": ["neg"]})
        assert [row["negatives"] for row in outcome.rows] == expected, name
    lists = [cell if isinstance(cell, list) or cell is None else [cell] for cell in cells]
    for kind in (pa.list_, pa.list_view):
        write(tmp_path / "lists.parquet", **common, neg=pa.array(lists, kind(pa.string())))
        found = [row["negatives"] for row in read(tmp_path / "lists.parquet", columns={"negatives": ["neg"]}).rows]
        assert found[:4] == expected[:4]


def test_several_documents_are_a_pair_each(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"query": "a", "document": ["one", "two", "three"], "negatives": ["no"]},
        {"query": "b", "document": [], "negatives": []},
        {"query": "c", "document": ["four", None, " "], "negatives": None},
    ]
    write_lines(tmp_path / "x.jsonl", rows)
    for name, kind in [("a", pa.list_), ("b", pa.large_list), ("c", pa.list_view)]:
        documents = pa.array([row["document"] for row in rows], kind(pa.string()))
        negatives = pa.array([row["negatives"] for row in rows], pa.list_(pa.string()))
        write(tmp_path / f"{name}.parquet", query=["a", "b", "c"], document=documents, negatives=negatives)
    for name in ("x.jsonl", "a.parquet", "b.parquet", "c.parquet"):
        outcome = read(tmp_path / name, columns={"negatives": ["negatives"]})
        assert outcome.pairs == [("a", "one"), ("a", "two"), ("a", "three"), ("c", "four")], name
        assert [row["negatives"] for row in outcome.rows] == [["no"]] * 3 + [[]]
        assert [(reject.row, reject.reason) for reject in outcome.rejects] == [
            (1, "document: null"),
            (2, "document: null"),
            (2, "document: empty or whitespace"),
        ]
    write_lines(tmp_path / "v.jsonl", [{"query": "a", "document": ["one", "two"], "v": [1, 2]}])
    [reject] = read(tmp_path / "v.jsonl", columns={"vector": "v"}).rejects
    assert reject.reason == "document: several texts cannot share one vector"


@pytest.mark.parametrize(
    ("columns", "config", "reason"),
    [
        ({"v": [["a"]]}, {"columns": {"vector": "v"}}, "column v is list<element: string>, expected a list of numbers"),
        (
            {"neg": [[1]]},
            {"columns": {"negatives": "neg"}},
            "column neg is list<element: int64>, expected text or list",
        ),
        ({"w": ["a"]}, {"columns": {"weight": "w"}}, "column w is string, expected a number"),
        ({"source": [{"a": 1}]}, {}, "column source is struct<a: int64>, expected text; corpus.source gives all rows"),
    ],
)
def test_a_column_of_another_type_is_named(tmp_path: Path, columns: Any, config: Any, reason: str) -> None:
    outcome = read(write(tmp_path / "x.parquet", **columns), **config)
    assert outcome.broken is not None
    assert outcome.broken.startswith(reason)


def test_a_column_that_stands_twice_is_named(tmp_path: Path) -> None:
    for names, broken in [
        (["query", "document", "query"], "column query occurs twice in the file"),
        # One that is not read does not matter.
        (["query", "document", "more", "more"], None),
    ]:
        table = pa.Table.from_arrays([pa.array(["a"])] * len(names), names=names)
        pq.write_table(table, tmp_path / "x.parquet")
        assert read(tmp_path / "x.parquet").broken == broken


def test_the_source_of_all_rows_replaces_a_column_of_any_type(tmp_path: Path) -> None:
    write(tmp_path / "x.parquet", source=[{"site": "a"}])
    write_lines(tmp_path / "x.jsonl", [{"query": "q", "document": "d", "source": {"site": "a"}}])
    for name in ("x.parquet", "x.jsonl"):
        for columns in ({}, {"source": "source"}):
            assert [row["source"] for row in read(tmp_path / name, source="mine", columns=columns).rows] == ["mine"]


def test_an_encrypted_file_is_called_so(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_bytes(b"PARE" + b"\0" * 100 + b"PARE")
    assert read(tmp_path / "x.parquet").broken == "an encrypted Parquet file; it must be decrypted first"


def test_compressed_files_of_several_pieces(tmp_path: Path) -> None:
    rows = [f'{{"query": "q {n}", "document": "d {n}"}}\n'.encode() for n in range(3000)]
    first, second = b"".join(rows[:1500]), b"".join(rows[1500:])
    skippable = b"\x5a\x2a\x4d\x18" + (8).to_bytes(4, "little") + b"anything"
    compress = zstandard.ZstdCompressor().compress
    content = {
        "padded.jsonl.gz": gzip.compress(first + second) + b"\0" * 512,
        "short-padding.jsonl.gz": gzip.compress(first + second) + b"\0",
        "members.jsonl.gz": gzip.compress(first) + gzip.compress(second) + b"\0" * 1024,
        "frames.jsonl.zst": skippable + compress(first) + skippable + compress(second) + skippable,
        "plain.jsonl.zst": compress(first) + compress(second),
    }
    for name, data in content.items():
        (tmp_path / name).write_bytes(data)
        outcome = read(tmp_path / name)
        assert (outcome.broken, len(outcome.rows)) == (None, 3000), name


def test_rows_are_read_by_their_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "_CHUNK_BYTES", 2**20)
    texts = [f"{n} " + "x" * 20_000 for n in range(400)]
    table = pa.table({"query": [f"q {n}" for n in range(400)], "document": texts, "unread": texts})
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=400, use_dictionary=False, compression="none")
    sizes = []
    original = parquet._chunk

    def seen(batch: pa.RecordBatch, *arguments: Any) -> Any:
        sizes.append(batch.nbytes)
        return original(batch, *arguments)

    monkeypatch.setattr(parquet, "_chunk", seen)
    assert [row["query"] for row in read(tmp_path / "x.parquet").rows] == [f"q {n}" for n in range(400)]
    assert len(sizes) > 4
    assert max(sizes) < 2 * 2**20


def test_letters_are_the_same_text_in_upper_and_lower_case() -> None:
    letters = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    # The dotless i is a letter of its own, whose capital is that of the other i.
    assert [each for each in letters if normalise(each) != normalise(each.upper()) and each != "ı"] == []
    assert normalise("πρωΐ") == normalise("πρωΐ".upper()) == "πρωι\u0308\u0301"
