"""The sample's pairs: parsed, never imported; too little left out; nothing twice; nothing held out is trained on."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from clusterbatch.cli import main
from clusterbatch.config import DOCSTRINGS, RunConfig
from clusterbatch.corpus import docstrings
from clusterbatch.corpus import docstrings as sample
from clusterbatch.corpus.docstrings import MinedPair, docstring_pairs, equal_shares, mine, split_docstring, write_sample
from clusterbatch.corpus.ingest import ingest
from clusterbatch.corpus.normalise import normalise, pair_id, text_hash
from clusterbatch.errors import UsageError
from clusterbatch.store import Folder


@pytest.mark.parametrize(
    ("docstring", "pair"),
    [
        ("Says what\nit does.\n\nAnd how.\n\nAt length.", ("Says what it does.", "And how.\n\nAt length.")),
        ("Only a summary, no body.", None),
        ("Three words only.\n\nA body that would do.", None),
        ("Said twice in a row.\n\nsaid  TWICE in a row.", None),
        ("\n\n", None),
        ("Broken text here: \ud800.\n\nA body.", None),
    ],
)
def test_a_docstring_is_summary_and_body_or_nothing(docstring: str, pair: tuple[str, str] | None) -> None:
    assert split_docstring(docstring) == pair


def test_code_is_parsed_and_not_run() -> None:
    code = b'''"""Describes the whole module.\n\nIn a body."""
raise SystemExit
class One:
    """Describes a class here.\n\n    Its body."""
    def method(self):
        """Describes a method here.\n\n        Its body."""
if True:
    async def function():
        """Describes a function here.\n\n        Its body."""
'''
    assert [summary for summary, _ in docstring_pairs(code)] == [
        "Describes the whole module.",
        "Describes a class here.",
        "Describes a method here.",
        "Describes a function here.",
    ]
    assert list(docstring_pairs(b"def broken(:")) == []


def test_shares_are_equal_where_there_is_enough() -> None:
    assert equal_shares({"a": 5, "b": 100, "c": 100}, 65) == {"a": 5, "b": 30, "c": 30}
    assert equal_shares({"a": 5, "b": 7}, 100) == {"a": 5, "b": 7}
    assert sum(equal_shares({"a": 9, "b": 9, "c": 9}, 10).values()) == 10


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three packages, of which one repeats another's docstrings."""
    found: dict[str, list[str]] = {}
    for package, size in (("large", 90), ("small", 20), ("copy", 20)):
        for number in range(size):
            about = "small" if package == "copy" else package
            path = tmp_path / "site" / package / f"module{number}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f'"""Summary of module {number} in {about}.\n\nThe body of {number} in {about}."""\n')
            found.setdefault(package, []).append(str(path))
    monkeypatch.setattr(docstrings, "_largest_packages", lambda: found)
    monkeypatch.setattr(docstrings, "_LEAST_SOURCES", 2)


def test_pairs_are_distinct_balanced_and_repeatable(packages: None, monkeypatch: pytest.MonkeyPatch) -> None:
    # Threads, as starting processes takes seconds each time; the next test has processes, which alone are initialized.
    monkeypatch.setattr(docstrings, "ProcessPoolExecutor", lambda workers, context, **_: ThreadPoolExecutor(workers))
    pairs = mine(60, seed=0)
    assert len(pairs) == 50
    by_source = {source: sum(pair.source == source for pair in pairs) for source in ("large", "small", "copy")}
    # At most half from one source; of two copies one stays, in the package whose name comes first.
    assert by_source == {"large": 30, "small": 0, "copy": 20}
    assert len({pair.query for pair in pairs}) == len({pair.document for pair in pairs}) == 50
    assert mine(60, seed=0) == pairs
    assert mine(60, seed=1) != pairs


def test_what_is_held_out_is_not_trained_on(packages: None, tmp_path: Path) -> None:
    summary = write_sample(Folder(str(tmp_path / "sample")), 60, 0)
    files = sorted((tmp_path / "sample/pairs").glob("*.parquet"))
    rows = [row for file in files for row in pq.read_table(file).to_pylist()]
    collection = tmp_path / "sample/collection"
    queries = {row["_id"]: row["text"] for row in map(json.loads, (collection / "queries.jsonl").open())}
    documents = {row["_id"]: row["text"] for row in map(json.loads, (collection / "corpus.jsonl").open())}
    judged = [line.split("\t") for line in (collection / "qrels/test.tsv").read_text().splitlines()[1:]]
    assert (summary.pairs, summary.queries, summary.documents) == (len(rows), len(queries), len(documents))
    assert len(rows) + len(queries) == len(documents) == 50
    assert {query for query, _, _ in judged} == set(queries)
    assert set(queries.values()).isdisjoint(row["query"] for row in rows)
    assert {documents[document] for _, document, _ in judged}.isdisjoint(row["document"] for row in rows)
    assert {row["document"] for row in rows} < set(documents.values())


def test_the_same_text_for_a_reader_is_the_same_text() -> None:
    assert normalise("  Ｃａｆé\u3000 ﬁne\n") == "café fine"
    assert text_hash("Straße  A") == text_hash("strasse a")
    assert text_hash("one") != text_hash("two")
    assert pair_id("s", "a", "b") != pair_id("s", "ab", "") != pair_id("sa", "b", "")
    assert len(pair_id("s", "a", "b")) == 32


def test_force_replaces_a_sample_of_another_size_and_mines_only_then(
    tmp_path: Path, in_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    mined: list[int] = []

    def mine(pairs: int, seed: int) -> list[MinedPair]:
        mined.append(pairs)
        return [MinedPair("package", f"summary {number}", f"body {number}") for number in range(pairs)]

    monkeypatch.setattr(sample, "mine", mine)

    def config(pairs: int) -> RunConfig:
        settings = {"paths": [DOCSTRINGS], "sample_pairs": pairs}
        return RunConfig.model_validate(
            {"workspace": str(tmp_path / "ws"), "corpus": settings, "evaluate": {"holdout": 0}}
        )

    # One pair in fifteen is the test collection's.
    assert ingest(config(150)).counts.written == 140
    with pytest.raises(UsageError, match="--force"):
        ingest(config(300))
    assert ingest(config(300), force=True).counts.written == 280
    assert ingest(config(300), force=True).counts.written == 280
    assert mined == [150, 300]


def test_a_sample_that_is_replaced_leaves_no_package_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def sample_of(package: str, seed: int) -> set[str]:
        found = [MinedPair(package, f"summary {number}", f"body {number}") for number in range(30)]
        monkeypatch.setattr(sample, "mine", lambda pairs, seed: found)
        settings = {"paths": [DOCSTRINGS], "sample_seed": seed}
        config = RunConfig.model_validate({"workspace": str(tmp_path), "corpus": settings})
        return set(sample.ensure_sample(config, force=True).details["sources"])

    assert sample_of("removed", 0) == {"removed"}
    (tmp_path / "sample" / "mine.txt").write_text("not of the sample")
    assert sample_of("installed", 1) == {"installed"}
    assert [path.name for path in (tmp_path / "sample" / "pairs").iterdir()] == ["installed.parquet"]
    assert (tmp_path / "sample" / "mine.txt").exists()


def test_a_sample_is_not_mined_for_a_place_that_cannot_have_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def mine(*arguments: object) -> None:
        raise AssertionError("mined before the place was looked at")

    monkeypatch.setattr(sample, "mine", mine)
    own = tmp_path / "data/pairs/numpy.parquet"
    own.parent.mkdir(parents=True)
    own.write_bytes(b"of the user")
    assert main(["sample", str(tmp_path / "data")]) == 2
    assert f"there are files in {tmp_path}/data/pairs" in capsys.readouterr().err
    assert own.read_bytes() == b"of the user"
    assert main(["sample", str(own / "below")]) == 4
    assert "cannot be written" in capsys.readouterr().err


def test_two_samples_do_not_become_one(packages: None, tmp_path: Path) -> None:
    assert main(["sample", str(tmp_path / "sample"), "--pairs", "100"]) == 0
    first = sorted(path.name for path in (tmp_path / "sample").rglob("*"))
    assert "_writable" not in first
    assert main(["sample", str(tmp_path / "sample"), "--pairs", "100", "--seed", "1"]) == 2
    assert sorted(path.name for path in (tmp_path / "sample").rglob("*")) == first
