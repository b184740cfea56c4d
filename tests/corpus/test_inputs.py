"""Paths: what they lead to, what is skipped, and what files and folders say about the source of their rows."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clusterbatch.config import CorpusConfig, StorageConfig
from clusterbatch.corpus.find_inputs import Inputs, find_inputs
from clusterbatch.corpus.ingest import ingest
from clusterbatch.corpus.inputs import InputFile, source_of, with_sources
from clusterbatch.errors import DataError, UsageError
from tests.corpus.reading import read
from tests.corpus.test_ingest import configuration, corpus_rows, rejects, write_lines

PAIR = {"query": "a question", "document": "an answer"}
UUID = "1b9d6bcd-bbfd-4b2d-9b5d-ab8dfbbd4bed"
HASH = "8be4b0dbd3a8a8ba"


def found(*paths: Path | str) -> Inputs:
    return find_inputs(CorpusConfig(), [str(path) for path in paths], StorageConfig())


def names(inputs: Inputs, folder: Path) -> list[str]:
    return [os.path.relpath(file.uri, folder) for file in inputs.files]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        # Spark, with and without committers that add a task's id; Hive; Flink
        (f"wiki/part-00000-{UUID}-c000.snappy.parquet", "wiki"),
        (f"wiki/part-00000-{UUID}.c000.snappy.parquet", "wiki"),
        (f"wiki/part-00000-tid-7284763218-{UUID}-0-1-c000.snappy.parquet", "wiki"),
        ("wiki/part-r-00000.gz.parquet", "wiki"),
        ("wiki/part-00000", "wiki"),
        ("wiki/000000_0", "wiki"),
        (f"wiki/part-{UUID}-0-0.parquet", "wiki"),
        # Hugging Face: data sets, their Parquet branch, shards with a hash
        ("hub/data/train-00000-of-00002.parquet", "train"),
        (f"hub/data/train-00000-of-00002-{HASH}.parquet", "train"),
        ("wiki/default/train/0000.parquet", "wiki"),
        ("wiki/c4-train.00000-of-01024.json.gz", "c4-train"),
        # DuckDB, pyarrow, pandas, Dask, polars, Ray
        ("wiki/data_0.parquet", "wiki"),
        ("wiki/part-0.parquet", "wiki"),
        (f"wiki/{UUID.replace('-', '')}-0.parquet", "wiki"),
        ("wiki/part.0.parquet", "wiki"),
        ("wiki/00000000.parquet", "wiki"),
        (f"wiki/{UUID.replace('-', '')}_000000_000000.parquet", "wiki"),
        ("wiki/12_000000_000000.parquet", "wiki"),
        # BigQuery, Snowflake, Redshift, Iceberg
        ("out/pairs-000000000000.parquet", "pairs"),
        ("wiki/000000000000.json.gz", "wiki"),
        ("wiki/data_01a2b3c4-0000-1234-0000-000100020003_012_0_0.snappy.parquet", "wiki"),
        ("wiki/data_0_0_0.csv.gz", "wiki"),
        ("wiki/0000_part_00.parquet", "wiki"),
        (f"wiki/00000-0-{UUID}-00001.parquet", "wiki"),
        # Names of one's own
        (f"x/wiki_{UUID}.parquet", "wiki"),
        ("x/wiki_0001.jsonl", "wiki"),
        ("x/faq-part-00003.jsonl", "faq"),
        ("x/wiki_2023.jsonl", "wiki_2023"),
        ("x/wiki-20231101.parquet", "wiki-20231101"),
        ("x/2024.jsonl", "2024"),
        ("x/faq.v2.jsonl", "faq"),
        ("x/site-3.jsonl", "site-3"),
        ("x/v2.jsonl", "v2"),
        ("x/a1b2c3.jsonl", "a1b2c3"),
        ("x/data.jsonl", "data"),
        ("x/train.jsonl", "train"),
        ("x/no_extension", "no_extension"),
        # Hive layout
        ("pairs/lang=en/data_0.parquet", "lang=en"),
        ("pairs/year=2024/month=01/part-0.parquet", "year=2024/month=01"),
        ("pairs/lang=en/faq.parquet", "faq"),
    ],
)
def test_the_source_is_the_data_set_not_its_shard(path: str, source: str) -> None:
    for root in ("/somewhere/", "s3://bucket/"):
        assert source_of(root + path) == source


def test_a_bucket_is_a_name_too() -> None:
    assert source_of("s3://wiki/part-00000.parquet") == "wiki"


def test_numbers_that_could_be_years_are_shards_among_other_shards() -> None:
    def sources(numbers: Any) -> list[str]:
        files = [InputFile(f"/x/wiki_{number:04d}.jsonl", 1, "") for number in numbers]
        return sorted({file.source for file in with_sources(files)})

    assert sources([2023, 2024]) == ["wiki_2023", "wiki_2024"]
    assert sources(range(2100)) == ["wiki"]


def test_keys_of_folders_are_columns(tmp_path: Path, in_process: None) -> None:
    for source, language in [("a", "en"), ("b", "de"), ("c%2Fd", "__HIVE_DEFAULT_PARTITION__")]:
        folder = tmp_path / f"in/source={source}/lang={language}"
        folder.mkdir(parents=True)
        pq.write_table(pa.table({"query": [f"q {source}"], "document": ["d"]}), folder / "part-0.parquet")
        write_lines(folder / "more.jsonl", [{"query": f"j {source}", "document": "d"}, {**PAIR, "source": "own"}])
        (folder / "cells.csv").write_text(f"query,document\nc {source},d\n")
    config = configuration(tmp_path, [tmp_path / "in"], columns={"group": "lang"})
    manifest = ingest(config)
    rows = {(row["query"], row["source"], row["group"]) for row in corpus_rows(config, manifest)}
    assert rows == {
        *((f"{kind} a", "a", "en") for kind in "qjc"),
        *((f"{kind} b", "b", "de") for kind in "qjc"),
        *((f"{kind} c%2Fd", "c/d", None) for kind in "qjc"),
        ("a question", "own", "en"),
    }
    # Weights, too; what cannot be one is refused.
    (tmp_path / "weight=2").mkdir()
    pq.write_table(pa.table({"query": ["x"], "document": ["x"]}), tmp_path / "weight=2/x.parquet")
    assert read(tmp_path / "weight=2/x.parquet", columns={"weight": "weight"}).rows[0]["weight"] == 2.0
    shutil.move(tmp_path / "weight=2", tmp_path / "weight=much")
    assert "weight" in str(read(tmp_path / "weight=much/x.parquet", columns={"weight": "weight"}).broken)


@pytest.mark.parametrize("name", ["br[1].jsonl", "what?.jsonl", "st*r.jsonl", "[a-c]"])
def test_what_exists_is_taken_by_its_name(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "in [old]?"
    write_lines(folder / name, [PAIR])
    write_lines(folder / "br1.jsonl", [PAIR])
    assert names(found(folder / name), folder) == [name]
    # As a folder, and as a folder with a pattern behind it.
    assert set(names(found(folder), folder)) >= {"br1.jsonl"}
    assert set(names(found(folder / "*1.jsonl"), folder)) == {"br1.jsonl"}
    assert set(names(found(f"{tmp_path}/in*/br1.jsonl"), folder)) == {"br1.jsonl"}
    assert set(names(found(f"{tmp_path}/in [[]old]?/br1.jsonl"), folder)) == {"br1.jsonl"}


@pytest.mark.parametrize("path", ["br[1]/there.jsonl", "br[1]/*.jsonl", "what?/deeper/there.jsonl", "none[1]/a.jsonl"])
def test_what_is_missing_below_a_folder_with_such_a_name_is_no_such_file(tmp_path: Path, path: str) -> None:
    for name in ("br[1]", "what?/deeper"):
        (tmp_path / name).mkdir(parents=True)
    with pytest.raises(UsageError, match=r"corpus\.paths: .*: no such file"):
        find_inputs(CorpusConfig(), [str(tmp_path / path)], StorageConfig())


def test_a_pattern_still_is_one(tmp_path: Path) -> None:
    for name in ("br1.jsonl", "br2.jsonl", "b.csv"):
        write_lines(tmp_path / name, [PAIR])
    assert names(found(tmp_path / "br[1].jsonl"), tmp_path) == ["br1.jsonl"]
    assert names(found(tmp_path / "br?.jsonl"), tmp_path) == ["br1.jsonl", "br2.jsonl"]
    with pytest.raises(UsageError, match=r"corpus\.paths: .*\[3\]\.jsonl: no such file"):
        found(tmp_path / "br[3].jsonl")


def test_what_is_skipped_is_named(tmp_path: Path, in_process: None, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("pairs.jsonl", "more.jsonl.bz2", "README.md", "_SUCCESS", ".pairs.jsonl.crc", "_temporary/x.jsonl"):
        write_lines(tmp_path / "in" / name, [PAIR])
    inputs = found(tmp_path / "in")
    assert names(inputs, tmp_path / "in") == ["pairs.jsonl"]
    assert sorted(os.path.basename(name) for name, _ in inputs.skipped) == ["README.md", "more.jsonl.bz2"]
    ingest(configuration(tmp_path, [tmp_path / "in"]))
    said = capsys.readouterr().err
    assert "2 files skipped, not .parquet" in said
    assert "more.jsonl.bz2" in said
    assert "_SUCCESS" not in said
    # The sources are printed, too.
    assert "1 source: pairs 1" in said


@pytest.mark.parametrize(
    ("name", "kind"), [("_delta_log/00000000000000000000.json", "Delta"), ("metadata/v1.metadata.json", "Iceberg")]
)
def test_a_table_that_lists_its_own_files_is_refused_with_what_to_do(tmp_path: Path, name: str, kind: str) -> None:
    write_lines(tmp_path / "in/table/data/part-0.jsonl", [PAIR])
    assert found(tmp_path / "in/table")
    write_lines(tmp_path / "in/table" / name, [{}])
    for path in (tmp_path / "in/table", tmp_path / "in"):
        with pytest.raises(UsageError, match=rf"in/table is a table of {kind}, .* export it as Parquet"):
            found(path)
    # Whoever names files wants them.
    assert len(found(tmp_path / "in/table/data/part-0.jsonl").files) == 1


def collection(folder: Path) -> None:
    write_lines(folder / "corpus.jsonl", [{"_id": "d", "text": f"the answer of {folder.name}"}])
    write_lines(folder / "queries.jsonl", [{"_id": "q", "text": f"the question of {folder.name}"}])
    write_lines(folder / "qrels/train.tsv", ["query-id\tcorpus-id\tscore", "q\td\t1"])


def test_collections_inside_a_folder_are_collections(tmp_path: Path, in_process: None) -> None:
    for name in ("nq", "fiqa"):
        collection(tmp_path / "in" / name)
    write_lines(tmp_path / "in/faq.jsonl", [PAIR])
    config = configuration(tmp_path, [tmp_path / "in"])
    manifest = ingest(config)
    assert manifest.details["sources"] == {"faq": 1, "fiqa": 1, "nq": 1}
    assert manifest.counts.rejected == 0


def test_keys_of_objects_are_kept_as_they_are() -> None:
    for key in ("a//b.jsonl", "a/b?x.jsonl", "/b.jsonl"):
        folder, name = InputFile(f"s3://bucket/{key}", 1, "").place(StorageConfig())
        assert folder.path(name) == f"bucket/{key}"


def test_json_lines_without_the_negatives_that_are_named(tmp_path: Path, in_process: None) -> None:
    rows: list[Any] = [{"query": f"q {n}", "document": "d"} for n in range(300)]
    write_lines(tmp_path / "in/none.jsonl", rows)
    # In one row of many slices.
    write_lines(tmp_path / "in/few.jsonl", [*rows, {**PAIR, "neg": ["no"]}])
    options: dict[str, Any] = {"columns": {"negatives": ["neg"]}, "unit_bytes": 4096}
    with pytest.raises(DataError, match=r"none\.jsonl: no column neg in any row"):
        ingest(configuration(tmp_path, [tmp_path / "in"], **options))
    manifest = ingest(configuration(tmp_path / "2", [tmp_path / "in/few.jsonl"], **options))
    assert manifest.counts.written == 301
    config = configuration(tmp_path / "3", [tmp_path / "in"], on_error="reject", **options)
    assert any("no column neg" in reason for reason in ingest(config).details["rejects"])


def test_rows_of_several_documents_are_conserved(tmp_path: Path, in_process: None) -> None:
    rows: list[Any] = [
        {"query": f"question {n}", "document": [f"answer {n} {k}" for k in range(3)]} for n in range(200)
    ]
    rows[150] = "no json"
    rows.append({"query": "twice", "document": ["same", "SAME", "other"]})
    write_lines(tmp_path / "in.jsonl", rows)
    config = configuration(tmp_path, [tmp_path / "in.jsonl"], unit_bytes=4096, near_duplicates="set_aside")
    manifest = ingest(config)
    assert len(corpus_rows(config, manifest)) == manifest.counts.written
    assert manifest.counts.read == 199 * 3 + 1 + 3
    # Positions are those of rows, not of pairs.
    assert sorted((row["row"], row["reason"].split(":")[0]) for row in rejects(config, manifest)) == [
        (150, "not JSON"),
        (200, "duplicate pair"),
    ]
    assert manifest.details["sources"] == {"in": manifest.counts.written}
