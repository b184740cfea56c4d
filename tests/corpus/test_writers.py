"""Files as data frame libraries and databases write them; each test needs the library that writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.corpus.reading import Outcome, read

ROWS: dict[str, list[Any]] = {
    "query": ["what is a cluster", 'a "quoted" question', "クラスタとは"],
    "document": ["rows,\nnearest to\tone centroid", "6\" pipes; and 'more'", "一つの重心に最も近い行"],
    "neg": [["one"], ["two", "three"], []],
    "w": [1, 2, 3],
    "group": ["x", "y", "x"],
    "v": [[0.5, 1.0], [1.0, 0.0], [0.25, 0.25]],
}
COLUMNS = {"negatives": ["neg"], "weight": "w", "group": "group", "vector": "v"}


def check(outcome: Outcome, lists: bool = True) -> None:
    assert (outcome.broken, outcome.rejects) == (None, [])
    rows = sorted(outcome.rows, key=lambda row: ROWS["query"].index(row["query"]))
    for name, column in [("query", "query"), ("document", "document"), ("weight", "w"), ("group", "group")]:
        assert [row[name] for row in rows] == ROWS[column]
    if lists:
        assert [row["negatives"] for row in rows] == ROWS["neg"]
        assert all(len(row["document_vector"]) == 2 for row in rows)


@pytest.mark.parametrize("kind", ["object", "string", "category"])
def test_pandas(tmp_path: Path, kind: str) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(ROWS)
    frame["group"] = frame["group"].astype(kind)
    frame.to_parquet(tmp_path / "x.parquet")
    frame.to_json(tmp_path / "x.jsonl", orient="records", lines=True)
    for name in ("x.parquet", "x.jsonl"):
        check(read(tmp_path / name, columns=COLUMNS))
    plain = frame[["query", "document", "w", "group"]]
    columns = {"weight": "w", "group": "group"}
    plain.to_csv(tmp_path / "x.csv", index=False)
    check(read(tmp_path / "x.csv", columns=columns), lists=False)
    plain.to_csv(tmp_path / "x.tsv", sep="\t", index=False)
    check(read(tmp_path / "x.tsv", columns=columns, tsv_quotes=True), lists=False)
    plain.to_parquet(tmp_path / "parts", partition_cols=["group"])
    rows = [row for path in (tmp_path / "parts").rglob("*.parquet") for row in read(path, columns=columns).rows]
    assert {(row["query"], row["group"], row["source"]) for row in rows} == {
        (query, group, f"group={group}") for query, group in zip(ROWS["query"], ROWS["group"], strict=True)
    }


def test_polars(tmp_path: Path) -> None:
    polars = pytest.importorskip("polars")
    frame = polars.DataFrame(ROWS).with_columns(
        polars.col("v").cast(polars.Array(polars.Float32, 2)), polars.col("group").cast(polars.Categorical)
    )
    frame.write_parquet(tmp_path / "x.parquet")
    frame.write_ndjson(tmp_path / "x.jsonl")
    for name in ("x.parquet", "x.jsonl"):
        check(read(tmp_path / name, columns=COLUMNS))
    frame.select("query", "document", "w", "group").write_csv(tmp_path / "x.csv")
    check(read(tmp_path / "x.csv", columns={"weight": "w", "group": "group"}), lists=False)


def test_duckdb(tmp_path: Path) -> None:
    duckdb = pytest.importorskip("duckdb")
    connection = duckdb.connect()
    connection.execute(
        'create table pairs (query text, document text, neg text[], w decimal(18, 3), "group" text, v float[], id uuid)'
    )
    for row in zip(*ROWS.values(), strict=True):
        connection.execute("insert into pairs values (?, ?, ?, ?, ?, ?, uuid())", list(row))
    connection.execute(f"copy pairs to '{tmp_path}/x.parquet' (format parquet)")
    connection.execute(f"copy pairs to '{tmp_path}/x.jsonl' (format json)")
    for name in ("x.parquet", "x.jsonl"):
        outcome = read(tmp_path / name, columns={**COLUMNS, "pair_id": "id"})
        check(outcome)
        assert all(row["pair_id"].count("-") == 4 for row in outcome.rows)
    connection.execute(f"copy pairs to '{tmp_path}/hive' (format parquet, partition_by (\"group\"))")
    files = list((tmp_path / "hive").rglob("*.parquet"))
    rows = [row for path in files for row in read(path, columns=COLUMNS).rows]
    assert sorted(row["group"] for row in rows) == ["x", "x", "y"]
    assert {row["source"] for row in rows} == {"group=x", "group=y"}


def test_fastparquet(tmp_path: Path) -> None:
    fastparquet = pytest.importorskip("fastparquet")
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({name: ROWS[name] for name in ("query", "document", "w", "group")})
    fastparquet.write(str(tmp_path / "x.parquet"), frame)
    check(read(tmp_path / "x.parquet", columns={"weight": "w", "group": "group"}), lists=False)
