"""The whole ingest stage: inputs of every kind become one corpus, and every row is accounted for."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clusterbatch.config import RunConfig, with_changes
from clusterbatch.corpus import read as sizing
from clusterbatch.corpus.ingest import ingest
from clusterbatch.corpus.passes import IngestPasses
from clusterbatch.corpus.read import flush_bytes, read_bytes
from clusterbatch.corpus.row_groups import read_row_group, row_groups_of
from clusterbatch.errors import DataError, InfrastructureError, UsageError
from clusterbatch.runtime import Pass
from clusterbatch.store import Manifest
from clusterbatch.store.tables import read_parquet
from clusterbatch.store.workspace import Workspace


def configuration(tmp_path: Path, paths: list[Path], **corpus: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "workspace": str(tmp_path / "workspace"),
            "corpus": {"paths": [str(path) for path in paths], **corpus},
            "evaluate": {"holdout": 0},
        }
    )


def corpus_rows(config: RunConfig, manifest: Manifest) -> list[dict[str, Any]]:
    artifact = Workspace(config).corpus
    tables = [read_row_group(artifact, unit) for unit in row_groups_of(manifest)]
    return pa.concat_tables(tables).to_pylist()


def rejects(config: RunConfig, manifest: Manifest) -> list[dict[str, Any]]:
    folder = Workspace(config).corpus.folder
    paths = [part.path for part in manifest.parts if part.details["role"] == "rejects"]
    return [row for path in paths for row in read_parquet(folder, path).to_pylist()]


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def test_rows_of_many_files_are_conserved_and_placed_on_ray(tmp_path: Path, ray_local: None) -> None:
    for file in range(5):
        rows: list[Any] = [{"query": f"query {file} {row}", "document": f"document {row}"} for row in range(300)]
        rows[7] = "not json"
        rows[250] = {"query": "", "document": "nothing asked"}
        # The same pair as in the first file, but for case and spaces.
        rows[251] = {"query": "Query  0 5", "document": "DOCUMENT 5"}
        write_lines(tmp_path / f"in/site-{file}.jsonl", rows)
    config = configuration(tmp_path, [tmp_path / "in"], unit_bytes=4096, part_bytes=2**16, row_group_rows=64)
    manifest = ingest(config)
    found = corpus_rows(config, manifest)
    refused = rejects(config, manifest)
    assert manifest.counts.read == 1500
    assert manifest.counts.written == len(found) == 1485
    assert manifest.counts.rejected == len(refused) == 15
    assert Counter(row["reason"].split(":")[0] for row in refused) == {"not JSON": 5, "query": 5, "duplicate pair": 5}
    assert {(Path(row["file"]).name, row["row"]) for row in refused if "JSON" in row["reason"]} == {
        (f"site-{file}.jsonl", 7) for file in range(5)
    }
    assert {row["row"] for row in refused if row["reason"] == "duplicate pair"} == {251}
    assert manifest.details["sources"] == {f"site-{file}": 297 for file in range(5)}
    assert len({row["pair_id"] for row in found}) == 1485
    # The first of a duplicate pair stays, as it was written.
    assert [row["query"] for row in found if row["query"].lower().split() == ["query", "0", "5"]] == ["query 0 5"]
    assert list((tmp_path / "workspace/corpus").glob("_*")) == []
    assert ingest(config).created == manifest.created


@pytest.mark.parametrize("append", [False, True], ids=["first version", "next version"])
def test_a_file_that_is_replaced_while_it_is_read_is_found_out(
    tmp_path: Path, in_process: None, monkeypatch: pytest.MonkeyPatch, append: bool
) -> None:
    """Units read at different times would otherwise make a corpus that no state of the input has."""
    config = configuration(tmp_path, [tmp_path / "in"])
    if append:
        write_lines(tmp_path / "in/first.jsonl", [{"query": "first", "document": "of all"}])
        ingest(config)
    file = write_lines(tmp_path / "in/a.jsonl", [{"query": "old", "document": "old text"}])
    read = IngestPasses.read

    def replacing(passes: IngestPasses) -> None:
        read(passes)
        write_lines(file, [{"query": "new", "document": "another text"}])

    with monkeypatch.context() as patch:
        patch.setattr(IngestPasses, "read", replacing)
        with pytest.raises(InfrastructureError, match=rf"{file}: was replaced while it was read; ingest again"):
            ingest(config, append=append)
    assert {"old", "new"} & {row["query"] for row in corpus_rows(config, ingest(config, append=append))} == {"new"}


def test_a_beir_folder_is_joined(tmp_path: Path, in_process: None) -> None:
    folder = tmp_path / "nfcorpus"
    documents: list[Any] = [{"_id": f"d{n}", "title": f"Title {n}", "text": f"text {n}"} for n in range(200)]
    write_lines(folder / "corpus.jsonl", [*documents, {"_id": "d3", "text": "again"}, "{"])
    write_lines(folder / "queries.jsonl", [{"_id": f"q{n}", "text": f"query {n}"} for n in range(100)])
    judged = [f"q{n}\td{2 * n}\t1" for n in range(100)] + ["q1\td0\t0", "q1\tnowhere\t1", "unknown\td1\t2", "bad line"]
    write_lines(folder / "qrels/train.tsv", ["query-id\tcorpus-id\tscore", *judged])
    write_lines(folder / "qrels/test.tsv", ["query-id\tcorpus-id\tscore", "q5\td7\t1"])
    config = configuration(tmp_path, [folder], unit_bytes=4096, part_bytes=2**16)
    manifest = ingest(config)
    pairs = {(row["query"], row["document"], row["source"]) for row in corpus_rows(config, manifest)}
    assert pairs == {(f"query {n}", f"Title {2 * n} text {2 * n}", "nfcorpus") for n in range(100)}
    places = {(Path(row["file"]).name, row["row"], row["reason"]) for row in rejects(config, manifest)}
    assert places == {
        ("train.tsv", 101, "no document with this id"),
        ("train.tsv", 102, "no query with this id"),
        ("train.tsv", 103, "expected query id, document id and a grade"),
        ("corpus.jsonl", 200, "an id that occurs twice"),
        ("corpus.jsonl", 201, "not JSON: Expecting property name enclosed in double quotes"),
    }
    assert manifest.counts.set_aside == {"judged not relevant": 1}
    assert manifest.counts.read == 106


def test_texts_of_a_collection_that_are_not_unicode_are_rejected(tmp_path: Path, in_process: None) -> None:
    folder = tmp_path / "cut"
    write_lines(folder / "corpus.jsonl", [{"_id": f"d{n}", "text": f"text {n}"} for n in range(3)])
    with (folder / "corpus.jsonl").open("a") as file:
        file.write('{"_id": "d3", "text": "cut emoji \\ud83d"}\n{"_id": "\\udc00", "text": "a text"}\n')
    write_lines(folder / "queries.jsonl", [{"_id": f"q{n}", "text": f"query {n}"} for n in range(4)])
    write_lines(folder / "qrels/train.tsv", [f"q{n}\td{n}\t1" for n in range(4)])
    config = configuration(tmp_path, [folder])
    manifest = ingest(config)
    assert {row["query"] for row in corpus_rows(config, manifest)} == {"query 0", "query 1", "query 2"}
    refused = {(Path(row["file"]).name, row["row"]): row for row in rejects(config, manifest)}
    assert set(refused) == {("corpus.jsonl", 3), ("corpus.jsonl", 4), ("train.tsv", 3)}
    assert refused["corpus.jsonl", 3]["reason"].startswith("text: invalid")
    assert refused["corpus.jsonl", 4]["reason"].startswith("id: invalid")
    assert "cut emoji" in refused["corpus.jsonl", 3]["content"]


def test_links_are_read_like_what_they_lead_to(tmp_path: Path, in_process: None) -> None:
    """As a Hugging Face cache lays a snapshot out; and a collection of links, in a folder that is one."""
    blobs = tmp_path / "blobs"
    write_lines(blobs / "6f2a", [{"query": "a question", "document": "an answer"}])
    write_lines(blobs / "91bc", [{"query": "another question", "document": "another answer"}])
    write_lines(blobs / "d", [{"_id": "d", "text": "a text"}])
    write_lines(blobs / "q", [{"_id": "q", "text": "a query"}])
    write_lines(blobs / "judged/train.tsv", ["q\td\t1"])
    snapshot, collection = tmp_path / "snapshots/main/data", tmp_path / "collection"
    for folder, links in (
        (snapshot, {"train-00000.jsonl": "6f2a", "train-00001.jsonl": "91bc"}),
        (collection, {"corpus.jsonl": "d", "queries.jsonl": "q", "qrels": "judged"}),
    ):
        folder.mkdir(parents=True)
        for name, blob in links.items():
            (folder / name).symlink_to(blobs / blob)
    everything = {("a question", "train"), ("another question", "train"), ("a query", "collection")}
    for number, path in enumerate((tmp_path / "snapshots", snapshot / "*.jsonl")):
        config = configuration(tmp_path / f"{number}", [path, collection])
        assert {(row["query"], row["source"]) for row in corpus_rows(config, ingest(config))} == everything


def test_ms_marco_files_are_joined(tmp_path: Path, in_process: None) -> None:
    folder = tmp_path / "msmarco"
    write_lines(folder / "collection.tsv", [f'{n}\t"Passage {n} with a quote' for n in range(50)])
    write_lines(folder / "queries.train.tsv", [f"{n}\tquery {n}" for n in range(20)])
    write_lines(folder / "queries.dev.tsv", [f"{n}\tquery {n}" for n in range(20, 25)])
    write_lines(folder / "qrels.train.tsv", [f"{n} 0 {n + 10} 1" for n in range(20)])
    write_lines(folder / "qrels.dev.tsv", [f"{n} 0 {n + 10} 1" for n in range(20, 25)])
    config = configuration(tmp_path, [folder])
    pairs = {(row["query"], row["document"]) for row in corpus_rows(config, ingest(config))}
    assert pairs == {(f"query {n}", f'"Passage {n + 10} with a quote') for n in range(20)}
    config = configuration(tmp_path, [folder], split="dev")
    pairs = {(row["query"], row["document"]) for row in corpus_rows(config, ingest(config, force=True))}
    assert len(pairs) == 5


def test_a_collection_is_read_in_the_encoding_that_is_named(tmp_path: Path, in_process: None) -> None:
    folder = tmp_path / "old"
    for name, lines in {
        "corpus.jsonl": [json.dumps({"_id": "d1", "text": "埼玉県の県庁所在地"}, ensure_ascii=False)],
        "queries.jsonl": [json.dumps({"_id": "q1", "text": "埼玉県とは"}, ensure_ascii=False)],
        "qrels/train.tsv": ["query-id\tcorpus-id\tscore", "q1\td1\t1"],
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes("".join(f"{line}\n" for line in lines).encode("cp932"))
    config = configuration(tmp_path, [folder], encoding="shift_jis")
    found = [(row["query"], row["document"]) for row in corpus_rows(config, ingest(config))]
    assert found == [("埼玉県とは", "埼玉県の県庁所在地")]
    with pytest.raises(DataError, match="UTF-16"):
        ingest(configuration(tmp_path / "2", [folder], encoding="utf-16"))


def test_test_collections_that_are_not_there_are_refused(tmp_path: Path, in_process: None) -> None:
    file = write_lines(tmp_path / "pairs.jsonl", [{"query": "a question", "document": "an answer"}])
    folder = tmp_path / "tests"
    write_lines(folder / "corpus.jsonl", [{"_id": "d1", "text": "a text"}])
    write_lines(folder / "queries.jsonl", [{"_id": "q1", "text": "a query"}])

    def config(path: str, **evaluate: Any) -> RunConfig:
        return with_changes(configuration(tmp_path, [file]), {"evaluate": {"path": [path], **evaluate}})

    for path in (str(tmp_path / "nowhere"), str(folder)):
        with pytest.raises(UsageError, match=rf"evaluate\.path: {path} is not a collection"):
            ingest(config(path))
    write_lines(folder / "qrels/dev.tsv", ["q1\td1\t1"])
    with pytest.raises(UsageError, match=rf"evaluate\.split: {folder} has no judgements called test"):
        ingest(config(str(folder)))
    with pytest.raises(UsageError, match=rf"corpus\.split: {folder} has no judgements called train"):
        ingest(configuration(tmp_path, [folder], split="train"))
    assert ingest(config(str(folder), split="dev")).counts.written == 1


def test_a_broken_file_stops_or_is_rejected(tmp_path: Path, in_process: None) -> None:
    write_lines(tmp_path / "in/good.jsonl", [{"query": "a question", "document": "an answer"}])
    (tmp_path / "in/bad.parquet").write_bytes(b"PAR1 cut off")
    with pytest.raises(DataError, match=r"in/bad.parquet: .*corpus.on_error"):
        ingest(configuration(tmp_path, [tmp_path / "in"]))
    config = configuration(tmp_path, [tmp_path / "in"], on_error="reject")
    manifest = ingest(config, force=True)
    assert (manifest.counts.read, manifest.counts.written, manifest.counts.rejected) == (2, 1, 1)
    assert [(Path(row["file"]).name, row["row"]) for row in rejects(config, manifest)] == [("bad.parquet", None)]


def test_another_input_is_refused_without_force(tmp_path: Path, in_process: None) -> None:
    file = write_lines(tmp_path / "pairs.jsonl", [{"query": "a question", "document": "an answer"}])
    config = configuration(tmp_path, [file])
    ingest(config)
    other = config.model_copy(update={"corpus": config.corpus.model_copy(update={"source": "mine"})})
    with pytest.raises(UsageError, match=r'corpus\.source was null, is "mine".*--force'):
        ingest(other)
    write_lines(file, [{"query": "another question", "document": "an answer"}])
    with pytest.raises(UsageError, match=r"of other inputs.*--force"):
        ingest(config)
    assert [row["query"] for row in corpus_rows(config, ingest(config, force=True))] == ["another question"]


def test_nothing_to_read_is_one_clear_line(tmp_path: Path, in_process: None) -> None:
    with pytest.raises(UsageError, match="no such file"):
        ingest(configuration(tmp_path, [tmp_path / "nowhere"]))
    file = write_lines(tmp_path / "pairs.jsonl", [{"query": "", "document": "an answer"}])
    with pytest.raises(DataError, match=r"no valid pair in 1 files.*query: empty"):
        ingest(configuration(tmp_path, [file]))


def test_vectors_of_the_users_own_are_checked_and_kept(tmp_path: Path, in_process: None) -> None:
    rows: list[Any] = [
        {"query": f"query {n}", "document": f"document {n}", "embedding": [3.0 + n, 4.0, 0.0]} for n in range(20)
    ]
    bad = [[1.0, 2.0], [], None, [0.0, 0.0, 0.0], "no vector", [1.0, float("nan"), 0.0], [1.0, "a", 2.0]]
    for n, vector in enumerate(bad):
        rows.append({"query": f"bad {n}", "document": f"bad {n}", "embedding": vector})
    file = write_lines(tmp_path / "pairs.jsonl", rows)
    config = configuration(tmp_path, [file], columns={"vector": "embedding"})
    manifest = ingest(config)
    found = corpus_rows(config, manifest)
    assert manifest.details["dimensions"] == 3
    assert len(found) == 20
    [first] = [row for row in found if row["query"] == "query 0"]
    assert [round(float(value), 3) for value in first["document_vector"]] == [0.6, 0.8, 0.0]
    assert first["query_vector"] == first["document_vector"]
    reasons = {row["row"]: row["reason"] for row in rejects(config, manifest)}
    assert reasons == {
        20: "vector: of another length than the corpus' 3 numbers",
        21: "vector: null or empty",
        22: "vector: null or empty",
        23: "vector: zero, it has no direction",
        24: "vector: str instead of a list of numbers",
        25: "vector: not finite",
        26: "vector: list instead of a list of numbers",
    }


def test_vectors_in_parquet_files(tmp_path: Path, in_process: None) -> None:
    columns = {
        "query": ["query one", "query two"],
        "document": ["document one", "document two"],
        "asked": pa.array([[1.0, 0.0], [0.0, 2.0]], pa.list_(pa.float64(), 2)),
        "told": pa.array([[0.0, 1.0], [5.0, 0.0]], pa.large_list(pa.float16())),
    }
    pq.write_table(pa.table(columns), tmp_path / "pairs.parquet")
    config = configuration(tmp_path, [tmp_path / "pairs.parquet"], columns={"vector": "told", "query_vector": "asked"})
    found = sorted(corpus_rows(config, ingest(config)), key=lambda row: row["query"])
    assert [row["query_vector"] for row in found] == [[1.0, 0.0], [0.0, 1.0]]
    assert [row["document_vector"] for row in found] == [[0.0, 1.0], [1.0, 0.0]]


def test_a_large_input_is_read_in_fewer_units_and_gives_the_same_corpus(
    tmp_path: Path, in_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in range(3):
        rows: list[Any] = [{"query": f"query {row}", "document": f"document {row % 300} {file}"} for row in range(900)]
        rows[31] = "not json"
        write_lines(tmp_path / f"in/site-{file}.jsonl", rows)
    units: dict[str, int] = {}
    run = Pass.run

    def counting(self: Pass, items: Any, **options: Any) -> Any:
        units[self.title] = len(items)
        return run(self, items, **options)

    monkeypatch.setattr(Pass, "run", counting)

    def outcome(name: str) -> list[list[dict[str, Any]]]:
        config = configuration(tmp_path, [tmp_path / "in"], unit_bytes=4096, part_bytes=2**16, row_group_rows=64)
        config = config.model_copy(update={"workspace": str(tmp_path / name)})
        manifest = ingest(config)
        refused = sorted(rejects(config, manifest), key=lambda row: (row["file"], row["row"]))
        return [corpus_rows(config, manifest), refused]

    small = outcome("small")
    assert units["ingest: read"] > 30
    monkeypatch.setattr(sizing, "_MOST_PARTS", 4)
    assert outcome("large") == small
    assert units["ingest: read"] <= 6
    # Several parts of one unit.
    monkeypatch.setattr(sizing, "_LEAST_WAITING", 2**12)
    monkeypatch.setattr(sizing, "_MOST_WAITING", 2**12)
    assert outcome("bounded") == small


def test_parts_of_the_first_pass_are_few_as_far_as_memory_allows() -> None:
    unit, least, most = 32 * 2**20, 32 * 2**20, 256 * 2**20
    for gigabytes in (0.001, 1, 30):
        assert (read_bytes(int(gigabytes * 2**30), unit), flush_bytes(int(gigabytes * 2**30))) == (unit, least)
    for gigabytes in (60, 130, 300, 3000):
        size = gigabytes * 2**30
        assert size / read_bytes(size, unit) <= 4096
        # Where three bytes of text come of one of input.
        assert 3 * size / flush_bytes(size) <= 4097 or flush_bytes(size) == most


def test_an_ingest_without_a_valid_pair_is_not_in_the_way(tmp_path: Path, in_process: None) -> None:
    file = write_lines(tmp_path / "pairs.jsonl", [{"question": "a question", "answer": "an answer"}])
    with pytest.raises(DataError, match="no valid pair in 1 files, 1 rows rejected"):
        ingest(configuration(tmp_path, [file]))
    assert not list((tmp_path / "workspace/corpus").rglob("*.*"))
    config = configuration(tmp_path, [file], columns={"query": "question", "document": "answer"})
    assert ingest(config).counts.written == 1


@pytest.mark.parametrize(("document", "warns"), [("query", True), ("document", False)])
def test_a_query_that_is_its_document_is_warned_of(
    tmp_path: Path, document: str, warns: bool, in_process: None, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"query": f"question {n}", "document": f"question {n}" if n < 4 else f"answer {n}"} for n in range(20)]
    write_lines(tmp_path / "in.jsonl", rows)
    columns = {"query": "query", "document": document}
    corpus = {"paths": [str(tmp_path / "in.jsonl")], "columns": columns}
    ingest(RunConfig.model_validate({"workspace": str(tmp_path / "ws"), "corpus": corpus, "evaluate": {"holdout": 0}}))
    said = "in 20 of 20 pairs the query is its document" in capsys.readouterr().err
    assert said == warns
