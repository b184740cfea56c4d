"""Mined rows through the stage `cluster`: negatives reach the shards, inconsistent pairs are set aside and counted."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from clusterbatch.config import RunConfig
from clusterbatch.corpus.normalise import normalise
from clusterbatch.embedding import vectors
from clusterbatch.errors import InfrastructureError, UsageError
from clusterbatch.runtime import WorkItem
from clusterbatch.search import gather
from clusterbatch.search import mine as module
from clusterbatch.search.mine import LocalTexts, Mined, mine
from clusterbatch.search.negatives import with_negatives, without_given
from clusterbatch.shards.reader import ShardReader
from clusterbatch.shards.shuffle_reduce import OUTLIERS
from clusterbatch.shards.stage import cluster
from clusterbatch.store import Artifact, Part
from clusterbatch.store.tables import read_parquet
from clusterbatch.store.workspace import Workspace
from tests.clustering import embedded
from tests.clustering.embedded import embedded_workspace
from tests.integration.test_cluster_stage import all_runs, text_rows

SOURCES = {"forum": 500, "wiki": 300, "tiny": 12}
MINE = {"negatives": 2, "first": 1, "last": 20, "consistency": 3}


pytestmark = pytest.mark.usefixtures("in_process")


def _workspace(
    folder: Path, optional: Sequence[str] = (), row_group_rows: int = 256, **mine_settings: Any
) -> RunConfig:
    settings = {"mine": {**MINE, **mine_settings}, "cluster": {"mean_size": 80, "run_rows": 16, "device": "cpu"}}
    return embedded_workspace(
        str(folder), SOURCES, spread=1.2, optional=optional, row_group_rows=row_group_rows, settings=settings
    )


def _tasks(config: RunConfig) -> list[WorkItem]:
    return vectors.tasks(Workspace(config).corpus.require(), None)


def test_negatives_are_documents_of_the_source_that_do_not_answer(tmp_path: Path) -> None:
    config = _workspace(tmp_path, consistency=None)
    manifest = cluster(config)
    total = sum(SOURCES.values())
    assert manifest.counts.written == total
    rows = text_rows(Workspace(config).clusters()).to_pylist()
    assert len(rows) == total
    documents: dict[str, set[str]] = {}
    for row in rows:
        documents.setdefault(row["source"], set()).add(row["document"])
    for row in rows:
        assert len(row["negatives"]) <= 2
        assert row["document"] not in row["negatives"]
        assert set(row["negatives"]) <= documents[row["source"]]
    mined = Workspace(config).mined().require()
    assert sum(len(row["negatives"]) for row in rows) == mined.details["negatives"] > total
    # And as tokens, in the shards that training reads.
    column = all_runs(ShardReader(Workspace(config).clusters()))["negative_tokens"]
    assert pa.compute.sum(pa.compute.list_value_length(column)).as_py() == mined.details["negatives"]


def test_inconsistent_pairs_are_set_aside_and_counted(tmp_path: Path) -> None:
    config = _workspace(tmp_path, negatives=0)
    manifest = cluster(config)
    mined = Workspace(config).mined().require()
    aside = manifest.counts.set_aside["inconsistent"]
    assert 0 < aside == mined.details["inconsistent"] < sum(SOURCES.values())
    assert manifest.counts.written == sum(SOURCES.values()) - aside
    # They are kept, and they are those whose document is not among the three best.
    artifact = Workspace(config).clusters()
    parts = [part for part in artifact.require().parts if part.details.get("content") == OUTLIERS]
    left_out = {name for part in parts for name in read_parquet(artifact.folder, part.path)["pair_id"].to_pylist()}
    assert len(left_out) == aside
    assert not left_out & set(text_rows(artifact)["pair_id"].to_pylist())


def test_what_was_mined_does_not_depend_on_the_order_of_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for name, rows in (("one", 16_384), ("many", 100)):
        monkeypatch.setattr("clusterbatch.search.gather._BLOCK_ROWS", rows)
        config = _workspace(tmp_path / name)
        manifest = mine(config)
        assert mine(config).created == manifest.created
        mined = Mined.of(config, 0)
        found.append(pa.concat_tables([mined.rows_of(task) for task in _tasks(config)]))
    assert found[0].equals(found[1])
    assert np.all(np.diff(found[0]["unit"].to_numpy()) >= 0)


def test_what_was_mined_by_row_group_is_read_by_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An earlier version had a task for each row group; its results, finished or not, are still used."""
    found = []
    for name in ("now", "before"):
        config = _workspace(tmp_path / name, row_group_rows=32)
        with monkeypatch.context() as patch:
            if name == "before":
                patch.setattr(vectors, "task_rows", lambda rows: 1)
            mine(config)
            assert len({len(item.payload) for item in _tasks(config)}) == (1 if name == "before" else 2)
        mined = Mined.of(config, 0)
        found.append([mined.rows_of(task) for task in _tasks(config)])
        assert len(found[-1]) < mined.parts[0].details["buckets"] or name == "now"
    assert all(now.num_rows and now.equals(before) for now, before in zip(*found, strict=True))


def test_an_approximate_search_of_all_lists_mines_the_same(tmp_path: Path) -> None:
    found = []
    for name, settings in (("exact", {}), ("approximate", {"approximate_above": 100, "probes": 10**6})):
        config = _workspace(tmp_path / name, **settings)
        manifest = mine(config)
        mined = Mined.of(config, 0)
        rows = pa.concat_tables([mined.rows_of(task) for task in _tasks(config)])
        rank = np.minimum(rows["rank"].to_numpy(), MINE["last"])
        found.append(([part.rows for part in manifest.parts], rank.tolist(), rows["negatives"].to_pylist()))
    assert found[0] == found[1]


def test_given_negatives_stay_in_front(tmp_path: Path) -> None:
    config = _workspace(tmp_path, ["negatives"], consistency=None)
    cluster(config)
    for row in text_rows(Workspace(config).clusters()).to_pylist():
        given = int(row["pair_id"]) % 3 if int(row["pair_id"]) % 4 else 0
        assert [text.startswith("not ") for text in row["negatives"][:given]] == [True] * given
        assert not any(text.startswith("not ") for text in row["negatives"][given:])


@pytest.mark.parametrize("settings", [{}, {"approximate_above": 50, "probes": 10**6}])
def test_negatives_that_a_row_has_already_are_not_mined_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, int]
) -> None:
    """Stored twice, a negative weighs double in the loss; another document takes its place."""
    settings = {"consistency": None, "negatives": 3, "pick": "hardest", "margins": True, **settings}
    without = _workspace(tmp_path / "without", **settings)
    cluster(without)
    nearest = {row["pair_id"]: row["negatives"] for row in text_rows(Workspace(without).clusters()).to_pylist()}
    corpus_rows = embedded._rows

    def with_given(*arguments: Any) -> tuple[pa.Table, np.ndarray, np.ndarray]:
        """The second nearest document of most rows is among their negatives, spelt differently."""
        table, queries, documents = corpus_rows(*arguments)
        given = [
            None if row % 4 == 0 else ["not given", nearest[pair_id][1].upper()]
            for row, pair_id in enumerate(table["pair_id"].to_pylist())
        ]
        place = table.schema.get_field_index("negatives")
        return table.set_column(place, "negatives", pa.array(given, pa.list_(pa.string()))), queries, documents

    monkeypatch.setattr(embedded, "_rows", with_given)
    config = _workspace(tmp_path / "with", ["negatives"], **settings)
    cluster(config)
    rows = text_rows(Workspace(config).clusters()).to_pylist()
    assert len(rows) == sum(SOURCES.values())
    for row in rows:
        first = nearest[row["pair_id"]]
        if int(row["pair_id"]) % 4 == 0:
            assert row["negatives"] == first
            continue
        assert row["negatives"][:2] == ["not given", first[1].upper()]
        assert row["negatives"][2:4] == [first[0], first[2]]
        texts = [normalise(text) for text in row["negatives"]]
        assert len(set(texts)) == len(texts)
        # The smallest source has few documents.
        assert len(texts) == 5 or row["source"] == "tiny"
    runs = all_runs(ShardReader(Workspace(config).clusters()))
    lengths = [pa.compute.list_value_length(runs[name]) for name in ("negative_tokens", "negative_margins")]
    assert lengths[0].equals(lengths[1])


def test_negatives_of_an_earlier_mining_are_stored_once() -> None:
    rows = pa.table({"negatives": [["a", "b"], None, ["c"]]})
    lists = {"negatives": [["b", "d"], ["b"], ["c"]], "margins": [[0.5, 0.25], [1.0], [2.0]]}
    mined = pa.table({"rank": [0, 1, 2], **{name: pa.array(column) for name, column in lists.items()}})
    new = without_given(mined, rows)
    assert new["margins"].to_pylist() == [[0.25], [1.0], []]
    assert with_negatives(rows, new["negatives"])["negatives"].to_pylist() == [["a", "b", "d"], ["b"], ["c"]]
    assert without_given(mined, pa.table({"query": ["x"] * 3})).equals(mined)


def test_margins_are_those_of_the_vectors(tmp_path: Path) -> None:
    config = _workspace(tmp_path, ["negatives"], consistency=None, margins=True)
    cluster(config)
    artifact = Workspace(config).clusters()
    rows = text_rows(artifact).to_pylist()
    margins = all_runs(ShardReader(artifact), vectors=True)["negative_margins"].to_pylist()
    embeddings = Workspace(config).embeddings()
    vectors: dict[str, dict[str, np.ndarray]] = {}
    for part in embeddings.require().parts:
        for row in read_parquet(embeddings.folder, part.path).to_pylist():
            vectors[row["pair_id"]] = {side: np.array(row[f"{side}_vector"]) for side in ("query", "document")}
    # The same text stands in many rows, each with a vector of its own: the first row's is searched.
    first: dict[tuple[str, str], str] = {}
    for row in sorted(rows, key=lambda row: row["pair_id"]):
        first.setdefault((row["source"], row["document"]), row["pair_id"])
    mined = 0
    for row, found in zip(rows, margins, strict=True):
        assert len(found) == len(row["negatives"])
        own = vectors[row["pair_id"]]
        for text, margin in zip(row["negatives"], found, strict=True):
            if text.startswith("not "):
                assert np.isnan(margin)
                continue
            other = vectors[first[row["source"], text]]["document"]
            assert margin == pytest.approx(own["query"] @ own["document"] - own["query"] @ other, abs=1e-3)
            mined += 1
    assert mined == Workspace(config).mined().require().details["negatives"]


def test_nothing_asked_for_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"mine\.negatives or mine\.consistency"):
        mine(_workspace(tmp_path, negatives=0, consistency=None))


def test_texts_of_a_large_source_are_read_once_however_many_blocks_it_has(tmp_path: Path, monkeypatch) -> None:
    """Every block would read all texts of its source otherwise, in quadratic time: the search is approximate."""
    read: list[tuple[int, int]] = []
    original = module.iterate_bucket

    def counting(artifact: Artifact, parts: Sequence[Part], bucket: int) -> Iterator[pa.Table]:
        read.append((bucket, len(parts)))
        return original(artifact, parts, bucket)

    monkeypatch.setattr(module, "iterate_bucket", counting)
    found = []
    for rows_of_block in (10**6, 60):
        monkeypatch.setattr(gather, "_BLOCK_ROWS", rows_of_block)
        read.clear()
        config = _workspace(tmp_path / str(rows_of_block), approximate_above=100, row_group_rows=64)
        mine(config)
        mined = Mined.of(config, 0)
        found.append(pa.concat_tables([mined.rows_of(task) for task in _tasks(config)]))
        # Sources of one block are read together with their neighbours, larger ones once.
        assert sorted(bucket for bucket, _ in read) == ([] if rows_of_block > 1000 else [0, 2])
    assert len(mined.parts) > 10
    assert found[0].equals(found[1])


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(InfrastructureError, match=r"cannot keep the texts of a source in .*nowhere.* TMPDIR"):
        LocalTexts(iter([pa.table({"document": ["one"]})]))


@pytest.mark.parametrize("settings", [{}, {"approximate_above": 50, "probes": 10**6}])
def test_no_negative_is_a_part_of_the_query_s_own_document(tmp_path: Path, settings: dict[str, int]) -> None:
    # Few other books: what is nearest is mostly of the query's own.
    config = _workspace(tmp_path, ["document_id"], consistency=None, first=0, negatives=4, **settings)
    cluster(config)
    mined = Workspace(config).mined().require()
    assert mined.details["negatives"] > sum(SOURCES.values())
    corpus = Workspace(config).corpus
    rows = pa.concat_tables([read_parquet(corpus.folder, part) for part in corpus.require().parts]).to_pylist()
    # A text may be a part of several books.
    books: dict[tuple[str, str], set[str]] = {}
    of_pair = {row["pair_id"]: row["document_id"] for row in rows}
    for row in rows:
        books.setdefault((row["source"], row["document"]), set()).add(row["document_id"])
    assert any(len(several) > 1 for several in books.values())
    for row in text_rows(Workspace(config).clusters()).to_pylist():
        of_negatives = set().union(*(books[row["source"], text] for text in row["negatives"]))
        assert of_pair[row["pair_id"]] not in of_negatives
