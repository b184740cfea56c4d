"""What is held out is not trained on, and comes from every source; test texts and near copies are set aside."""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from clusterbatch.config import RunConfig
from clusterbatch.corpus.decontaminate import SIGNATURES
from clusterbatch.corpus.holdout import SKETCH, HoldoutBy, choose, sketch, sketch_schema, sketched
from clusterbatch.corpus.ingest import ingest
from clusterbatch.corpus.normalise import text_hash
from clusterbatch.errors import DataError
from clusterbatch.store import Manifest
from tests.corpus.test_ingest import corpus_rows, write_lines


def table(rows: list[tuple[str, int, int]]) -> pa.Table:
    sources, documents, queries = zip(*rows, strict=True)
    return pa.table(
        [pa.array(sources), pa.array(documents, pa.uint64()), pa.array(queries, pa.uint64())], schema=SKETCH
    )


@pytest.mark.parametrize("by", ["document", "query"])
def test_the_choice_does_not_depend_on_how_rows_are_cut_into_units(by: HoldoutBy) -> None:
    numbers = random.Random(0)
    rows = [(f"s{numbers.randrange(3)}", numbers.randrange(4000), numbers.randrange(900)) for _ in range(3000)]
    most = sketched(30, by)
    whole = choose([sketch(table(rows), most)], 30, by)
    assert len(whole.queries) >= 25
    for size in (7, 100, 1500):
        cut = choose([sketch(table(rows[start : start + size]), most) for start in range(0, 3000, size)], 30, by)
        np.testing.assert_array_equal(cut.documents, whole.documents)
        np.testing.assert_array_equal(cut.queries, whole.queries)
    if by == "document":
        asked = {query for _, document, query in rows if document in set(whole.documents.tolist())}
        assert set(whole.queries.tolist()) <= asked
    else:
        assert not len(whole.documents)


def _parts(rows: int) -> pa.Table:
    """Texts of books of 1 to 40 parts, in two sources; a text may be in several books, and has several queries."""
    numbers = random.Random(3)
    schema = sketch_schema(False, "document", document_ids=True)
    columns = [(f"s{numbers.randrange(2)}", numbers.randrange(rows // 10)) for _ in range(rows)]
    books = [min(numbers.randrange(1, 200), 120) * 1000 + text // 7 for _, text in columns]
    texts, queries = [text for _, text in columns], [numbers.randrange(rows) for _ in columns]
    arrays = [
        pa.array([name for name, _ in columns]),
        *(pa.array(each, pa.uint64()) for each in (texts, queries, books)),
    ]
    return pa.table(arrays, schema=schema)


def test_documents_of_several_texts_are_chosen_whole_however_rows_are_cut_into_units() -> None:
    rows, total = _parts(6000), 80
    whole = choose([sketch(rows, total, rows.schema)], total)
    books = rows["document_id_hash"].to_numpy()
    chosen = np.isin(books, whole.wholes)
    assert set(rows["source"].filter(pa.array(chosen)).to_pylist()) == {"s0", "s1"}
    texts = rows["document_hash"].to_numpy()
    np.testing.assert_array_equal(whole.documents, np.unique(texts[chosen]))
    np.testing.assert_array_equal(whole.queries, np.unique(rows["query_hash"].to_numpy()[chosen]))
    counted = len(np.unique(np.stack([texts, books])[:, chosen], axis=1).T)
    assert total / 2 <= counted <= total
    for size in (7, 100, 1500):
        pieces = [sketch(rows.slice(start, size), total, rows.schema) for start in range(0, rows.num_rows, size)]
        cut = choose(pieces, total)
        np.testing.assert_array_equal(cut.wholes, whole.wholes)
        np.testing.assert_array_equal(cut.documents, whole.documents)
        np.testing.assert_array_equal(cut.queries, whole.queries)
    assert max(len(piece) for piece in pieces) < 1500


def test_a_document_larger_than_its_source_may_give_is_held_out_alone() -> None:
    rows = table([("books", n, n) for n in range(300)])
    books = rows.append_column("document_id_hash", pa.array([n // 100 for n in range(300)], pa.uint64()))
    chosen = choose([sketch(books, 50, books.schema)], 50)
    assert len(chosen.wholes) == 1
    assert len(chosen.documents) == len(chosen.queries) == 100
    one = books.slice(0, 100)
    assert choose([sketch(one, 50, one.schema)], 50).is_empty


def test_shares_are_equal_and_small_sources_keep_most() -> None:
    rows = [("large", n, n) for n in range(1000)] + [("small", 10_000 + n, n) for n in range(20)] + [("one", 1, 1)]
    chosen = choose([sketch(table(rows), 50)], 50).documents
    assert 30 <= np.sum(chosen < 1000) <= 48
    assert np.sum(chosen >= 10_000) == 2


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Three sources; documents with several queries, queries with several documents, copies in other writing."""
    numbers = random.Random(1)
    for source, size in (("large", 800), ("middle", 200), ("small", 30)):
        rows: list[Any] = []
        for _ in range(size):
            query = f"{source} question {numbers.randrange(size)}"
            rows.append({"query": query, "document": f"{source} answer {numbers.randrange(size // 2)}"})
            rows.append({"query": query.upper(), "document": f"  {rows[-1]['document']}"})
        write_lines(tmp_path / f"in/{source}.jsonl", rows)
    return tmp_path / "in"


def test_held_out_pairs_are_apart_and_the_collection_holds_all_documents(
    tmp_path: Path, pairs: Path, in_process: None, capsys: pytest.CaptureFixture[str]
) -> None:
    config = RunConfig.model_validate(
        {
            "workspace": str(tmp_path / "ws"),
            "corpus": {"paths": [str(pairs)], "part_bytes": 2**16, "unit_bytes": 4096},
            "evaluate": {"holdout": 60},
        }
    )
    manifest = ingest(config)
    trained = corpus_rows(config, manifest)
    folder = tmp_path / "ws/corpus/holdout"
    documents = {row["_id"]: row["text"] for row in map(json.loads, (folder / "corpus.jsonl").open())}
    queries = {row["_id"]: row["text"] for row in map(json.loads, (folder / "queries.jsonl").open())}
    judged: dict[str, list[list[str]]] = {}
    for split in ("dev", "test"):
        header, *lines = (folder / f"qrels/{split}.tsv").read_text().splitlines()
        assert header == "query-id\tcorpus-id\tscore"
        judged[split] = [line.split("\t") for line in lines]
    held = {(queries[query], documents[document]) for lines in judged.values() for query, document, _ in lines}

    assert manifest.counts.set_aside["held out"] == len(held) > 60
    assert manifest.counts.read == manifest.counts.written + manifest.counts.rejected + len(held) == 2060
    assert {text_hash(query) for query, _ in held}.isdisjoint(row["query_hash"] for row in trained)
    assert {(text_hash(q), text_hash(d)) for q, d in held}.isdisjoint(
        (row["query_hash"], row["document_hash"]) for row in trained
    )
    assert {text_hash(text) for text in documents.values()} >= {row["document_hash"] for row in trained}
    assert {query.split()[0] for query, _ in held} == {"large", "middle", "small"}
    assert {row["source"] for row in trained} == {"large", "middle", "small"}
    assert {line[0] for line in judged["dev"]}.isdisjoint(line[0] for line in judged["test"])
    assert min(len(lines) for lines in judged.values()) > 10
    # All of it is named in the manifest.
    parts = {part.path: part for part in manifest.parts if part.details["role"] == "collection"}
    assert parts["holdout/corpus.jsonl"].rows == len(documents)
    assert len(parts) == 4
    # The line of progress counts what is written, not the one item that writes it.
    [shown] = [line for line in capsys.readouterr().err.splitlines() if re.match("ingest: hold out: .* in ", line)]
    assert int(shown.split()[3].replace(",", "")) >= len(documents)


def test_held_out_queries_ask_for_documents_that_others_train(tmp_path: Path, pairs: Path, in_process: None) -> None:
    config = RunConfig.model_validate(
        {
            "workspace": str(tmp_path / "ws"),
            "corpus": {"paths": [str(pairs)], "part_bytes": 2**16, "unit_bytes": 4096},
            "evaluate": {"holdout": 60, "holdout_by": "query"},
        }
    )
    manifest = ingest(config)
    trained = corpus_rows(config, manifest)
    folder = tmp_path / "ws/corpus/holdout"
    documents = {row["_id"]: row["text"] for row in map(json.loads, (folder / "corpus.jsonl").open())}
    queries = {row["_id"]: row["text"] for row in map(json.loads, (folder / "queries.jsonl").open())}
    lines = [line for split in ("dev", "test") for line in (folder / f"qrels/{split}.tsv").read_text().splitlines()[1:]]
    judged = {(queries[query], documents[document]) for query, document, _ in (line.split("\t") for line in lines)}
    assert {query.split()[0] for query, _ in judged} == {"large", "middle", "small"}
    assert 20 < len(queries) <= 60
    known = {row["document_hash"] for row in trained}
    assert {text_hash(text) for text in documents.values()} == known
    asked = {row["query_hash"] for row in trained}
    assert asked.isdisjoint(text_hash(query) for query in queries.values())
    # All pairs of a held-out query are judged, unless nothing else trains their document.
    everything = [json.loads(line) for file in sorted(pairs.iterdir()) for line in file.open()]
    answers = {(text_hash(row["query"]), text_hash(row["document"])) for row in everything}
    held = {text_hash(query) for query in queries.values()}
    assert {(text_hash(query), text_hash(document)) for query, document in judged} == {
        (query, document) for query, document in answers if query in held and document in known
    }
    assert manifest.counts.read == manifest.counts.written + manifest.counts.rejected + sum(
        manifest.counts.set_aside.values()
    )


def test_no_part_of_a_held_out_document_is_trained_on(tmp_path: Path, in_process: None) -> None:
    numbers = random.Random(5)

    def part(book: int, number: int) -> dict[str, str]:
        words = " ".join(f"word{numbers.randrange(5000)}" for _ in range(30))
        return {"query": f"what about {words[:40]}", "document": words, "book": f"book {book}", "n": str(number)}

    rows: list[Any] = [part(book, number) for book in range(80) for number in range(5)]
    # Books quote each other.
    rows += [{**rows[n], "query": f"{rows[n]['query']} too", "book": f"book {n % 80}"} for n in range(0, 400, 9)]
    write_lines(tmp_path / "in/one.jsonl", rows)
    config = RunConfig.model_validate(
        {
            "workspace": str(tmp_path / "ws"),
            "corpus": {
                "paths": [str(tmp_path / "in")],
                "unit_bytes": 4096,
                "source": "books",
                "columns": {"document_id": "book"},
            },
            "evaluate": {"holdout": 30},
        }
    )
    first = ingest(config)
    trained = {row["document_id"] for row in corpus_rows(config, first)}
    held = {f"book {book}" for book in range(80)} - trained
    collection = tmp_path / "ws/corpus/holdout"
    documents = {row["_id"]: row["text"] for row in map(json.loads, (collection / "corpus.jsonl").open())}
    lines = [line for split in ("dev", "test") for line in (collection / f"qrels/{split}.tsv").read_text().splitlines()]
    judged = {documents[line.split("\t")[1]] for line in lines if not line.startswith("query-id")}
    assert 3 <= len(held) <= 7
    assert judged == {row["document"] for row in rows if row["book"] in held}
    assert {row["document"] for row in corpus_rows(config, first)}.isdisjoint(judged)
    # Nor one that comes later.
    later = [part(int(name.split()[1]), 5) for name in [*sorted(held), *sorted(trained)[:4]]]
    write_lines(tmp_path / "in/two.jsonl", later)
    second = ingest(config, append=True)
    assert second.counts.written == first.counts.written + 4
    assert second.counts.set_aside["held out"] == first.counts.set_aside["held out"] + len(held)


def test_queries_cannot_be_held_out_if_each_document_has_one(tmp_path: Path, in_process: None) -> None:
    rows = [{"query": f"question {n}", "document": f"answer {n}"} for n in range(50)]
    config = RunConfig.model_validate(
        {
            "workspace": str(tmp_path / "ws"),
            "corpus": {"paths": [str(write_lines(tmp_path / "pairs.jsonl", rows))]},
            "evaluate": {"holdout_by": "query"},
        }
    )
    with pytest.raises(DataError, match="query needs documents with two different queries"):
        ingest(config)


def test_copies_and_near_copies_of_test_texts_are_set_aside(tmp_path: Path, in_process: None) -> None:
    numbers = random.Random(2)

    def text(words: int) -> str:
        return " ".join(f"word{numbers.randrange(5000)}" for _ in range(words))

    answers = [text(60) for _ in range(20)]
    folder = tmp_path / "test-collection"
    others = [text(60) for _ in range(10)]
    documents = [{"_id": f"d{n}", "text": answer} for n, answer in enumerate([*answers, *others])]
    write_lines(folder / "corpus.jsonl", documents)
    write_lines(folder / "queries.jsonl", [{"_id": f"q{n}", "text": f"test question number {n}"} for n in range(20)])
    write_lines(folder / "qrels/test.tsv", ["query-id\tcorpus-id\tscore", *(f"q{n}\td{n}\t1" for n in range(20))])
    rows = [
        {"query": "TEST question  number 3", "document": text(50)},
        {"query": "something else", "document": answers[4].upper()},
        {"query": "something more", "document": f"{answers[5]} and a little more"},
        {"query": "still more", "document": others[0]},
        {"query": "half of it", "document": " ".join(answers[6].split()[:30]) + " " + text(30)},
    ]
    file = write_lines(tmp_path / "pairs.jsonl", rows)

    def run(mode: str) -> tuple[dict[str, int], set[str]]:
        config = RunConfig.model_validate(
            {
                "workspace": str(tmp_path / mode),
                "corpus": {"paths": [str(file)], "decontaminate": mode},
                "evaluate": {"path": [str(folder)]},
            }
        )
        manifest = ingest(config)
        return manifest.counts.set_aside, {row["query"] for row in corpus_rows(config, manifest)}

    aside, trained = run("near")
    assert aside == {"copy of a test text": 2, "near copy of a test text": 1}
    # A document that only stands beside the answers may be trained on, and so may one that shares a half.
    assert trained == {"still more", "half of it"}
    aside, trained = run("exact")
    assert aside == {"copy of a test text": 2}
    aside, trained = run("off")
    assert aside == {}
    assert len(trained) == 5


def test_a_test_text_that_is_not_unicode_is_compared_like_others(tmp_path: Path, in_process: None) -> None:
    text = "a long enough text about the harbour and the boats that come home with their nets in the evening"
    folder = tmp_path / "test-collection"
    write_lines(folder / "corpus.jsonl", [f'{{"_id": "d", "text": "{text} \\ud83d"}}'])
    write_lines(folder / "queries.jsonl", [{"_id": "q", "text": "what about it"}])
    write_lines(folder / "qrels/test.tsv", ["q\td\t1"])
    rows = [{"query": "a question", "document": text}, {"query": "another question", "document": "another answer"}]
    config = RunConfig.model_validate(
        {
            "workspace": str(tmp_path / "ws"),
            "corpus": {"paths": [str(write_lines(tmp_path / "pairs.jsonl", rows))]},
            "evaluate": {"path": [str(folder)]},
        }
    )
    manifest = ingest(config)
    assert manifest.counts.set_aside == {"near copy of a test text": 1}
    assert [row["query"] for row in corpus_rows(config, manifest)] == ["another question"]


def test_a_corpus_without_a_source_is_that_of_the_other_files(tmp_path: Path, in_process: None) -> None:
    """Nothing is held out of the source, and none of its rows takes the place of another's."""
    numbers = random.Random(4)
    long = " ".join(f"word{numbers.randrange(5000)}" for _ in range(60))
    gone: list[Any] = [{"query": f"gone {n}", "document": f"an answer that is gone {n}"} for n in range(100)]
    stay: list[Any] = [{"query": f"stays {n}", "document": f"an answer that stays {n}"} for n in range(100)]
    near = {"query": f"who asks for {long}", "document": long}
    gone += [stay[7], near]
    stay.append({"query": f"{near['query']} now", "document": f"{long} now"})
    # Its rows come first.
    write_lines(tmp_path / "in/a-gone.jsonl", gone)
    write_lines(tmp_path / "in/stays.jsonl", stay)

    def outcome(paths: str, **corpus: Any) -> tuple[Any, dict[str, int], dict[str, str]]:
        workspace = tmp_path / f"ws-{len(corpus)}"
        config = RunConfig.model_validate(
            {
                "workspace": str(workspace),
                "corpus": {"paths": [f"{tmp_path}/in/{paths}"], "near_duplicates": "set_aside", **corpus},
                "evaluate": {"holdout": 20},
            }
        )
        manifest = ingest(config)
        rows = sorted((row["query"], row["document"], row["source"]) for row in corpus_rows(config, manifest))
        folder = workspace / "corpus/holdout"
        return rows, manifest.counts.set_aside, {path.name: path.read_text() for path in folder.rglob("*.*")}

    rows, aside, collection = outcome("stays.jsonl")
    assert aside["held out"] > 5
    dropped = outcome("*.jsonl", drop_sources=["a-gone"])
    assert dropped == (rows, {**aside, "deleted": 102}, collection)


def test_near_copies_of_held_out_texts_are_set_aside(tmp_path: Path, in_process: None) -> None:
    numbers = random.Random(5)

    def text(words: int) -> str:
        return " ".join(f"word{numbers.randrange(3000)}" for _ in range(words))

    rows: list[Any] = [{"query": text(25), "document": text(60), "source": "site"} for _ in range(150)]
    # Of every pair a copy with one more word in each text.
    copies = [{**row, "query": f"{row['query']} more", "document": f"{row['document']} more"} for row in rows]
    write_lines(tmp_path / "in/one.jsonl", [*rows, *copies])

    def run(mode: str, append: bool = False) -> tuple[RunConfig, dict[str, int], list[dict[str, Any]]]:
        config = RunConfig.model_validate(
            {
                "workspace": str(tmp_path / mode),
                "corpus": {"paths": [str(tmp_path / "in")], "decontaminate": mode},
                "evaluate": {"holdout": 30},
            }
        )
        manifest = ingest(config, append=append)
        return config, manifest.counts.set_aside, corpus_rows(config, manifest)

    def held_out(config: RunConfig) -> list[tuple[str, str]]:
        folder = Path(config.workspace) / "corpus/holdout"
        documents = {row["_id"]: row["text"] for row in map(json.loads, (folder / "corpus.jsonl").open())}
        queries = {row["_id"]: row["text"] for row in map(json.loads, (folder / "queries.jsonl").open())}
        lines = [
            line for split in ("dev", "test") for line in (folder / f"qrels/{split}.tsv").read_text().splitlines()[1:]
        ]
        return [(queries[line.split("\t")[0]], documents[line.split("\t")[1]]) for line in lines]

    def near(config: RunConfig, trained: list[dict[str, Any]]) -> int:
        texts = {name: {" ".join(row[name].split()[:20]) for row in trained} for name in ("query", "document")}
        return sum(
            " ".join(q.split()[:20]) in texts["query"] or " ".join(d.split()[:20]) in texts["document"]
            for q, d in held_out(config)
        )

    config, aside, trained = run("near")
    # Both of a pair of near copies may have been chosen.
    assert len(held_out(config)) == aside["held out"] > 15
    assert 15 < aside["near copy of a held-out text"] <= aside["held out"]
    assert near(config, trained) == 0
    exact, exact_aside, exact_trained = run("exact")
    assert set(exact_aside) == {"held out"}
    assert near(exact, exact_trained) > 15
    # What is appended is compared as well.
    query, document = held_out(config)[0]
    write_lines(
        tmp_path / "in/two.jsonl",
        [
            {"query": f"{query} again", "document": text(40), "source": "site"},
            {"query": text(20), "document": f"{document} again", "source": "site"},
            {"query": text(20), "document": text(40), "source": "site"},
        ],
    )
    _, after, grown = run("near", append=True)
    assert after["near copy of a held-out text"] == aside["near copy of a held-out text"] + 2
    assert len(grown) == len(trained) + 1


def test_near_copies_are_kept_out_of_a_corpus_that_was_made_without_signatures(
    tmp_path: Path, in_process: None, capsys: pytest.CaptureFixture[str]
) -> None:
    numbers = random.Random(6)

    def text(words: int) -> str:
        return " ".join(f"word{numbers.randrange(3000)}" for _ in range(words))

    def lines(name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (tmp_path / "ws/corpus/holdout" / name).read_text().splitlines()]

    write_lines(tmp_path / "in/one.jsonl", [{"query": text(25), "document": text(60)} for _ in range(200)])
    config = RunConfig.model_validate(
        {
            "workspace": str(tmp_path / "ws"),
            "corpus": {"paths": [str(tmp_path / "in")], "source": "site"},
            "evaluate": {"holdout": 20},
        }
    )
    ingest(config)
    assert "left near copies" not in capsys.readouterr().err
    # As earlier versions left it.
    path = tmp_path / "ws/corpus/manifest.json"
    manifest = json.loads(path.read_text())
    manifest["parts"] = [part for part in manifest["parts"] if part["details"].get("role") != SIGNATURES]
    path.write_text(json.dumps(manifest))
    [signatures] = (tmp_path / "ws/corpus").glob("heldout-signatures*")
    signatures.unlink()
    judged = {
        line.split("\t")[1]
        for split in ("dev", "test")
        for line in (tmp_path / f"ws/corpus/holdout/qrels/{split}.tsv").read_text().splitlines()[1:]
    }
    queries = [row["text"] for row in lines("queries.jsonl")]
    documents = [row["text"] for row in lines("corpus.jsonl") if row["_id"] in judged]
    others = [row["text"] for row in lines("corpus.jsonl") if row["_id"] not in judged]

    def append(name: str, number: int) -> Manifest:
        rows = [
            {"query": f"{queries[number]} more", "document": text(40)},
            {"query": text(25), "document": f"{documents[number]} more"},
            # A text that is only searched through may be trained on.
            {"query": text(25), "document": f"{others[number]} more"},
        ]
        write_lines(tmp_path / "in" / name, rows)
        return ingest(config, append=True)

    for number, name in enumerate(["two.jsonl", "three.jsonl"]):
        grown = append(name, number)
        assert grown.counts.set_aside["near copy of a held-out text"] == 2 * (number + 1)
        assert grown.counts.written == 200 - grown.counts.set_aside["held out"] + number + 1
        assert capsys.readouterr().err.count("was made by a version that left near copies of held-out texts") == 1
    # They are made once.
    [part] = (part.path for part in grown.parts if part.details.get("role") == SIGNATURES)
    assert part.startswith("versions/002/")
    shutil.rmtree(tmp_path / "ws/corpus/versions")
    manifest["parts"] = [part for part in manifest["parts"] if not part["path"].startswith("versions/")]
    path.write_text(json.dumps(manifest))
    shutil.rmtree(tmp_path / "ws/corpus/holdout")
    with pytest.raises(DataError, match=r"corpus/holdout: no longer has the held-out collection.*--force"):
        append("four.jsonl", 2)
