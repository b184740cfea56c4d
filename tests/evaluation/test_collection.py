from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clusterbatch.corpus.judgements import is_header, parse_judgement
from clusterbatch.errors import DataError
from clusterbatch.evaluation import collection as collection_module
from clusterbatch.evaluation.collection import Collection, open_collections
from clusterbatch.store import Folder

TEXTS = {"d1": "cats purr", "d2": "x" * 200_000, "d3": "line\u2028separator and 日本語", "d4": ""}


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(unit_bytes=st.integers(1, 300_000))
def test_ranges_of_any_size_give_every_document_once(tmp_path_factory, unit_bytes):
    folder = tmp_path_factory.mktemp("collection")
    lines = [json.dumps({"_id": key, "text": text}, ensure_ascii=False) for key, text in TEXTS.items()]
    # The last line has no line end, as many writers leave it.
    (folder / "corpus.jsonl").write_text("\n".join(lines), encoding="utf-8")
    collection = Collection("c", Folder(str(folder)))
    # Tiny units over a big line would be thousands of reads; the cut positions near the small lines matter.
    unit_bytes = max(unit_bytes, 97)
    read = [collection.read_documents(start, end) for start, end in collection.document_ranges(unit_bytes)]
    found = {key: text for ids, texts in read for key, text in zip(ids, texts, strict=True)}
    assert sum(len(ids) for ids, _ in read) == len(TEXTS)
    assert found == TEXTS


def test_title_and_text_are_joined_by_a_space(write_collection):
    collection = write_collection("c", {"a": "body", "b": "alone"}, {}, {}, titles={"a": "Title"})
    assert collection.read_documents(0, collection.documents_bytes()) == (["a", "b"], ["Title body", "alone"])


def test_a_file_without_line_ends_is_not_read_to_its_end(write_collection, monkeypatch: pytest.MonkeyPatch, tmp_path):
    collection = write_collection("c", {"a": "x"}, {}, {})
    (tmp_path / "c" / "corpus.jsonl").write_bytes(b" " * 2**22)
    monkeypatch.setattr(collection_module, "_LONGEST_LINE", 2**20)
    with pytest.raises(DataError, match=r"corpus\.jsonl byte 0: no line end, not JSON Lines"):
        collection.read_documents(0, 1000)


def test_an_image_that_is_null_is_none(write_collection, tmp_path: Path):
    collection = write_collection("c", {"a": "x"}, {}, {})
    (tmp_path / "c" / "corpus.jsonl").write_text('{"_id": "a", "title": "T", "text": "x", "image": null}\n')
    assert collection.read_documents(0, collection.documents_bytes()) == (["a"], ["T x"])


def test_only_judged_queries_are_read_in_the_order_of_the_judgements(write_collection):
    collection = write_collection(
        "c", {"a": "x"}, {"q1": "one", "q2": "two", "q3": "three"}, {"q3": {"a": 2}, "q1": {"a": 0}}
    )
    judgements = collection.read_judgements()
    assert judgements == {"q3": {"a": 2}, "q1": {"a": 0}}
    assert list(collection.read_queries(judgements).items()) == [("q3", "three"), ("q1", "one")]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\nq1\ta\thigh\n", r"test\.tsv line 2: expected query-id"),
        ("qrels/test.tsv", "q1\ta\t1001\n", "line 1: grade 1001 is beyond 1,000"),
        ("qrels/test.tsv", "q1\ta\tnan\n", "line 1: expected query-id"),
        ("qrels/test.tsv", "q1\ta\t0.123\n", "grades with more than 2 decimals"),
        ("qrels/test.tsv", "q1 Q0 a 1 12.5 tag\n", "line 1: expected query-id"),
        ("qrels/test.tsv", "q1\ta\t1\nq1\ta\t2\n", r"line 2: query q1 and document a judged twice"),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\n", "no judgements"),
        ("qrels/test.tsv", "q9\ta\t1\n", "1 judged queries have no text here, the first is q9"),
        ("queries.jsonl", '{"_id": "q1", "text": "x"}\n{"_id": "q1", "text": "y"}\n', "query id q1 occurs twice"),
        ("corpus.jsonl", '{"_id": "a", "text": "x"}\n{"_id": "b"\n', r"corpus\.jsonl byte 26: not valid JSON"),
        pytest.param("corpus.jsonl", "[" * 100_000, r"corpus\.jsonl byte 0: not valid JSON", id="nested too deeply"),
        ("corpus.jsonl", '{"_id": "a"}\n', "byte 0: expected an object with _id and text"),
        ("corpus.jsonl", '{"_id": "a b", "text": "x"}\n', "must not be empty or hold white space"),
        ("corpus.jsonl", '{"_id": "a", "text": "x"}\n{"_id": "a", "text": "x"}\n', "a document id occurs twice"),
    ],
)
def test_damage_is_one_line_that_says_where(write_collection, tmp_path: Path, file, content, message):
    collection = write_collection("c", {"a": "x"}, {"q1": "one"}, {"q1": {"a": 1}})
    (tmp_path / "c" / file).write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        read_all(collection)
    assert "\n" not in str(caught.value)


def read_all(collection: Collection) -> None:
    collection.read_queries(collection.read_judgements())
    collection.read_documents(0, collection.documents_bytes())


def test_a_missing_collection_is_named(tmp_path: Path):
    with pytest.raises(DataError, match=r"nowhere: no collection here \(corpus\.jsonl is missing\)"):
        Collection("nowhere", Folder(str(tmp_path / "nowhere"))).identity()


def test_identity_notices_a_changed_judgement(write_collection, tmp_path: Path):
    collection = write_collection("c", {"a": "x"}, {"q1": "one"}, {"q1": {"a": 1}})
    before = collection.identity()
    assert collection.identity() == before
    (tmp_path / "c" / "qrels" / "test.tsv").write_text("q1\ta\t2\n")
    assert collection.identity() != before


def test_equal_folder_names_get_their_parents(tmp_path: Path):
    folders = [Folder(str(tmp_path / parent / "dev")) for parent in ("one", "two")] + [Folder(str(tmp_path / "other"))]
    assert [collection.name for collection in open_collections(folders)] == ["one/dev", "two/dev", "other"]


@pytest.mark.parametrize(
    "lines",
    [
        "query-id\tcorpus-id\tscore\nq1\ta\t1\nq1\tb\t0\n",
        "q1\t0\ta\t1\nq1\t0\tb\t0\n",
        "q1 Q0 a 1\nq1 Q0 b 0\n",
        "topic\titer\tdocno\trel\nq1\t0\ta\t1\nq1\t0\tb\t0\n",
        "q1\ta\t1.0\r\nq1\tb\t0.0\r\n",
    ],
    ids=["BEIR", "TREC", "TREC with spaces", "TREC with a header", "decimals"],
)
def test_judgements_of_all_forms_mean_the_same(lines: str, write_collection, tmp_path: Path):
    collection = write_collection("c", {"a": "x", "b": "y"}, {"q1": "one"}, {"q1": {"a": 1}})
    (tmp_path / "c" / "qrels" / "test.tsv").write_bytes(lines.encode())
    assert collection.read_judgements() == {"q1": {"a": 1, "b": 0}}
    # Pairs of a corpus are read from the same files.
    read = [parse_judgement(line) for line in lines.splitlines() if not is_header(line)]
    assert [(query, document) for query, document, grade in read if grade > 0] == [("q1", "a")]


def test_a_query_has_a_bounded_number_of_judgements(write_collection, monkeypatch: pytest.MonkeyPatch):
    documents = dict.fromkeys("abc", "x")
    read = write_collection("c", documents, {"q1": "one"}, {"q1": dict.fromkeys(documents, 1)}).read_judgements
    monkeypatch.setattr(collection_module, "_MOST_JUDGED", 3)
    assert len(read()["q1"]) == 3
    monkeypatch.setattr(collection_module, "_MOST_JUDGED", 2)
    with pytest.raises(DataError, match="query q1 has more than 2 judgements"):
        read()


def test_grades_that_are_fractions_keep_their_ratios(write_collection, tmp_path: Path):
    collection = write_collection("c", {"a": "x", "b": "y"}, {"q1": "one"}, {"q1": {"a": 1}})
    (tmp_path / "c" / "qrels" / "test.tsv").write_text("q1\ta\t0.1\nq1\tb\t1\nq2\ta\t0\n")
    assert collection.read_judgements() == {"q1": {"a": 1, "b": 10}, "q2": {"a": 0}}
