"""Scores of pairs and of their negatives: the same rule in all formats, and a reason for each row that has no such."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clusterbatch.config import CorpusConfig, load_config
from clusterbatch.errors import UsageError
from tests.corpus.reading import Outcome, read

COLUMNS = {"negatives": ["neg"], "score": "s", "negative_scores": ["ns"], "document_id": "book"}
NAN = float("nan")
# (score, negatives, their scores, document) and the reason, None for a row that is taken.
ROWS: list[tuple[Any, Any, Any, Any, str | None]] = [
    (0.5, ["a", "b"], [0.25, -2], "x", None),
    (None, ["a"], None, "x", None),
    (7, ["a", "", "b"], [1, 2, None], "x", None),
    (-1.5, None, None, "x", None),
    (-1.5, [], [], "x", None),
    (NAN, ["a"], [1.0], "x", "score: not a finite number"),
    (float("inf"), ["a"], [1.0], "x", "score: not a finite number"),
    (1e39, ["a"], [1.0], "x", "score: not a finite number"),
    (0.5, ["a"], [NAN], "x", "negative_scores: not a finite number"),
    (0.5, ["a", "b"], [0.5, float("-inf")], "x", "negative_scores: not a finite number"),
    (0.5, ["a", "b"], [0.5], "x", "negative_scores: 1 for 2 negatives"),
    (0.5, ["a"], [0.5, 0.5], "x", "negative_scores: 2 for 1 negatives"),
    (0.5, None, [0.5], "x", "negative_scores: 1 for 0 negatives"),
    (0.5, ["a"], [0.5], None, "document_id: null or empty"),
]
TAKEN = [
    (0.5, ["a", "b"], [0.25, -2.0]),
    (None, ["a"], [None]),
    (7.0, ["a", "b"], [1.0, None]),
    (-1.5, [], []),
    (-1.5, [], []),
]


def _records() -> list[dict[str, Any]]:
    return [
        {"query": f"q{row}", "document": "d", "s": score, "neg": texts, "ns": scores, "book": book}
        for row, (score, texts, scores, book, _) in enumerate(ROWS)
    ]


def _write(folder: Path, name: str) -> Path:
    path, rows = folder / name, _records()
    if name == "x.jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif name in ("x.csv", "x.tsv"):
        with path.open("w", newline="") as file:
            writer = csv.writer(file, delimiter="," if name == "x.csv" else "\t", quoting=csv.QUOTE_MINIMAL)
            writer.writerow(rows[0])
            for row in rows:
                cells = [json.dumps(cell) if isinstance(cell, list) else cell for cell in row.values()]
                writer.writerow(["" if cell is None else cell for cell in cells])
    else:
        types = {"neg": pa.list_(pa.string()), "ns": pa.list_(pa.float64()), "s": pa.float64()}
        table = pa.table({key: pa.array([row[key] for row in rows], types.get(key)) for key in rows[0]})
        if name == "x.parquet":
            pq.write_table(table, path)
        else:
            with pa.ipc.new_file(path, table.schema) as writer:
                writer.write_table(table)
    return path


@pytest.mark.parametrize("name", ["x.jsonl", "x.csv", "x.tsv", "x.parquet", "x.arrow"])
def test_scores_follow_one_rule_in_all_formats(tmp_path: Path, name: str) -> None:
    outcome = read(_write(tmp_path, name), columns=COLUMNS, tsv_quotes=True)
    assert outcome.broken is None
    found = [(row["score"], row["negatives"], row["negative_scores"]) for row in outcome.rows]
    assert found == [(score, texts, scores) for score, texts, scores in TAKEN]
    wanted = {row: reason for row, (*_, reason) in enumerate(ROWS) if reason}
    reasons = {reject.row: reject.reason for reject in outcome.rejects}
    assert reasons.keys() == wanted.keys()
    for row, reason in wanted.items():
        key, _, rest = reason.partition(": ")
        # Where the value is at hand, the reason shows it.
        assert reasons[row].startswith(f"{key}: ")
        assert reasons[row].endswith(rest.removeprefix("not a "))
    assert len(outcome.rows) + len(outcome.rejects) == len(ROWS)


def test_what_is_no_number_is_a_reason_per_row(tmp_path: Path) -> None:
    given = [("high", 1), (True, 1), (0.5, "no"), (0.5, ["x"]), (0.5, {"a": 1}), ("0.5", "[1.5]")]
    rows = [{"query": f"q{n}", "document": "d", "s": s, "neg": ["a"], "ns": ns} for n, (s, ns) in enumerate(given)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {"negatives": ["neg"], "score": "s", "negative_scores": ["ns"]}
    outcome = read(tmp_path / "x.jsonl", columns=columns)
    assert {reject.row: reject.reason for reject in outcome.rejects} == {
        0: "score: 'high' is not a number",
        1: "score: True is not a number",
        2: "negative_scores: 'no' is not a number",
        3: "negative_scores: 'x' is not a number",
        4: "negative_scores: {'a': 1} is not a number",
    }
    assert [(row["score"], row["negative_scores"]) for row in outcome.rows] == [(0.5, [1.5])]
    # In a file with types the column itself says so.
    pq.write_table(pa.table({"query": ["q"], "document": ["d"], "s": ["high"]}), tmp_path / "x.parquet")
    broken = read(tmp_path / "x.parquet", columns={"score": "s"}).broken
    assert broken is not None
    assert broken.startswith("column s is string, expected a number")


@pytest.mark.parametrize("name", ["x.jsonl", "x.parquet"])
def test_several_columns_of_negatives_have_scores_in_their_order(tmp_path: Path, name: str) -> None:
    rows = [
        {"query": "a", "document": "d", "n1": "one", "n2": "two", "s1": 0.25, "s2": 0.5},
        {"query": "b", "document": "d", "n1": "one", "n2": None, "s1": 0.25, "s2": None},
        {"query": "c", "document": "d", "n1": "one", "n2": "two", "s1": None, "s2": 0.5},
    ]

    def found() -> Outcome:
        return read(tmp_path / name, columns={"negatives": ["n1", "n2"], "negative_scores": ["s1", "s2"]})

    if name == "x.jsonl":
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / name)
    assert [row["negatives"] for row in found().rows] == [["one", "two"], ["one"], ["one", "two"]]
    assert [row["negative_scores"] for row in found().rows] == [[0.25, 0.5], [0.25], [None, 0.5]]


@pytest.mark.parametrize("name", ["x.jsonl", "x.parquet"])
def test_a_negative_counts_once_however_often_it_is_given(tmp_path: Path, name: str) -> None:
    rows = [
        {"query": "a", "document": "d", "n": ["One  two", "three", "one two", "ONE TWO"], "s": [0.25, 0.5, 0.75, None]},
        {"query": "b", "document": "d", "n": ["three", "three"], "s": [None, None]},
        {"query": "c", "document": "d", "n": ["three"], "s": [0.5]},
        {"query": "d", "document": "d", "n": [], "s": []},
        {"query": "e", "document": "d", "n": ["three", "four"], "s": [0.125, 1.0]},
    ]
    if name == "x.jsonl":
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / name)
    expected = [["One  two", "three"], ["three"], ["three"], [], ["three", "four"]]
    outcome = read(tmp_path / name, columns={"negatives": ["n"], "negative_scores": ["s"]})
    assert [row["negatives"] for row in outcome.rows] == expected
    assert [row["negative_scores"] for row in outcome.rows] == [[0.25, 0.5], [None], [0.5], [], [0.125, 1.0]]
    outcome = read(tmp_path / name, columns={"negatives": ["n"]})
    assert [row["negatives"] for row in outcome.rows] == expected


def test_scores_need_negatives_and_thresholds_need_scores() -> None:
    with pytest.raises(ValueError, match="negative_scores are those of negatives"):
        CorpusConfig.model_validate({"columns": {"negative_scores": "ns"}})
    with pytest.raises(UsageError, match=r"train\.filter needs corpus\.columns\.score"):
        load_config(None, ["workspace=/none", "train.filter.min_score=0.5"])
    with pytest.raises(UsageError, match=r"train\.filter needs corpus\.columns\.score"):
        load_config(None, ["workspace=/none", "train.filter.sources={a: {min_score: 1}}"])
    with pytest.raises(UsageError, match=r"min_margin needs corpus\.columns\.negative_scores"):
        load_config(None, ["workspace=/none", "corpus.columns.score=s", "train.filter.min_margin=0.5"])


def test_new_columns_leave_old_fingerprints_alone() -> None:
    identity = CorpusConfig().columns.identity()
    assert not {"score", "negative_scores"} & identity.keys()
