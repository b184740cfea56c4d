"""Semantic duplicates of a cluster against brute force, and what the stage and the batches make of them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from clusterbatch.batches.loader import SliceLoader
from clusterbatch.config import DuplicatesConfig, RunConfig, load_config, with_changes
from clusterbatch.embedding.vectors import vector_column
from clusterbatch.errors import UsageError
from clusterbatch.reporting.cluster_views import near_pairs
from clusterbatch.runtime import InProcessExecutor, executor
from clusterbatch.shards import semantic_duplicates
from clusterbatch.shards.reader import ShardReader
from clusterbatch.shards.semantic_duplicates import DUPLICATES, dropped_rows, find_duplicates, near_rows
from clusterbatch.shards.shuffle_reduce import OUTLIERS
from clusterbatch.shards.stage import cluster
from clusterbatch.store.tables import read_parquet
from clusterbatch.store.workspace import Workspace
from clusterbatch.training.worker import open_plan
from tests.clustering.embedded import embedded_workspace
from tests.integration.test_cluster_stage import all_runs, text_rows

SOURCES = {"forum": 700, "wiki": 400, "tiny": 20}
THRESHOLD, DROPPING = 0.98, 0.97
SETTINGS = {
    "cluster": {"mean_size": 90, "run_rows": 16, "device": "cpu", "shard_bytes": 2**17},
    "batches": {"size": 8},
    "train": {"encoder": "static"},
}


def _vectors(rows: int, seed: int, spread: float = 0.12) -> tuple[np.ndarray, np.ndarray]:
    """Return queries and documents around a few directions, with some equal ones."""
    random = np.random.default_rng(seed)
    sides = []
    for _ in range(2):
        means = random.standard_normal((max(2, rows // 7), 12))
        side = means[random.integers(0, len(means), rows)] + spread * random.standard_normal((rows, 12))
        side[random.integers(0, rows, rows // 8)] = side[0]
        sides.append((side / np.linalg.norm(side, axis=1, keepdims=True)).astype(np.float32))
    return sides[0], sides[1]


def _groups(near: np.ndarray) -> list[int]:
    """Return the first row of each row's connected component, by flooding."""
    first = [-1] * len(near)
    for start in range(len(near)):
        if first[start] >= 0:
            continue
        waiting = [start]
        while waiting:
            row = waiting.pop()
            if first[row] < 0:
                first[row] = start
                waiting += [other for other in range(len(near)) if near[row, other] and first[other] < 0]
    return first


@pytest.mark.parametrize("rows", [1, 2, 60, 251])
@pytest.mark.parametrize("tile", [(7, 11), (512, 4096)])
def test_near_rows_are_those_of_all_pairs(monkeypatch: pytest.MonkeyPatch, rows: int, tile: tuple[int, int]) -> None:
    monkeypatch.setattr(semantic_duplicates, "_ROWS", tile[0])
    monkeypatch.setattr(semantic_duplicates, "_COLUMNS", tile[1])
    monkeypatch.setattr(semantic_duplicates, "_MOST_LINKS", 20)
    query, document = _vectors(rows, seed=rows)
    of_query, of_document = query.astype(float) @ query.T, document.astype(float) @ document.T
    for threshold in (0.9, 0.97, 1.0):
        least = threshold - 1e-5
        near = np.maximum(of_query, of_document) >= least
        found = near_rows(query, document, threshold, examples=4)
        assert found.group.tolist() == _groups(near)
        pairs = np.argwhere(np.triu(near, 1))
        assert found.pairs == len(pairs)
        lowest = sorted(np.maximum(of_query, of_document)[tuple(pairs.T)])[:4]
        np.testing.assert_allclose(found.lowest[:, 0], lowest, atol=1e-6)
        ranks = [found.group[:row].tolist().count(group) for row, group in enumerate(found.group.tolist())]
        assert found.rank.tolist() == ranks
        # To be dropped: near in both to an earlier row that stays.
        both, stays = np.minimum(of_query, of_document) >= least, []
        wanted = []
        for row in range(rows):
            before = [other for other in stays if both[row, other]]
            wanted.append(before[0] if before else row)
            stays += [] if before else [row]
        assert dropped_rows(query, document, threshold).group.tolist() == wanted
    if rows > 2:
        assert 1 < len(set(found.group.tolist())) < rows


def _clustered(folder: Path, action: str = "mask", *, workers: int = 2, **more: Any) -> RunConfig:
    settings = {
        **SETTINGS,
        "cluster": {
            **SETTINGS["cluster"],
            "duplicates": {"threshold": DROPPING if action == "drop" else THRESHOLD, "action": action},
            "workers": workers,
            **more,
        },
    }
    config = embedded_workspace(str(folder), SOURCES, spread=0.2, settings=settings)
    cluster(config)
    return config


def _near_in_both(config: RunConfig) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Return pair_ids in shard order and cosines (N, N) of queries and documents, as stored in the embeddings."""
    embeddings = Workspace(config).embeddings()
    table = pa.concat_tables([read_parquet(embeddings.folder, part) for part in embeddings.require().parts])
    names, sides = table["pair_id"].to_pylist(), []
    for side in ("query", "document"):
        values = np.array(table[f"{side}_vector"].to_pylist(), float)
        values /= np.linalg.norm(values, axis=1, keepdims=True)
        sides.append(values @ values.T)
    return names, sides[0], sides[1]


@pytest.mark.usefixtures("in_process")
def test_groups_of_the_shards_are_those_of_brute_force(tmp_path: Path) -> None:
    config = _clustered(tmp_path)
    artifact = Workspace(config).clusters()
    manifest, reader = artifact.require(), ShardReader(artifact)
    names = text_rows(artifact)["pair_id"].to_pylist()
    group = all_runs(reader)["duplicate_group"].to_pylist()
    every, of_query, of_document = _near_in_both(config)
    place = {name: number for number, name in enumerate(every)}
    cosine = np.maximum(of_query, of_document)
    index, start, counts = reader.index, 0, Counter()
    key = [(int(source), int(number)) for source, number in zip(index.source, index.cluster, strict=True)]
    assert len(set(key)) == len(key), "no cluster in several pieces"
    for entry, rows in enumerate(index.rows.tolist()):
        here = [place[name] for name in names[start : start + rows]]
        wanted = _groups(cosine[np.ix_(here, here)] >= THRESHOLD - 1e-5)
        found = group[start : start + rows]
        assert [found.index(each) for each in found] == wanted
        sizes = Counter(wanted)
        source = index.sources[index.source[entry]]
        counts[source, "groups"] += sum(size > 1 for size in sizes.values())
        counts[source, "rows"] += sum(size for size in sizes.values() if size > 1)
        start += rows
    for source, found in manifest.details["duplicates"].items():
        assert (found["groups"], found["rows"]) == (counts[source, "groups"], counts[source, "rows"])
        assert found["dropped"] == 0
    assert counts["forum", "rows"] > 50
    assert manifest.counts.written == sum(SOURCES.values())
    # Listed with examples that are what they say.
    part = next(part for part in manifest.parts if part.details.get("content") == DUPLICATES)
    examples = read_parquet(artifact.folder, part).to_pylist()
    assert {row["source"] for row in examples} == {name for name in SOURCES if counts[name, "groups"]}
    assert {row["source"] for row in near_pairs(artifact, manifest)} == {row["source"] for row in examples}
    for row in examples:
        one, other = place[row["pair_id"]], place[row["other_pair_id"]]
        assert one != other
        assert row["query_cosine"] == pytest.approx(of_query[one, other], abs=1e-3)
        assert row["document_cosine"] == pytest.approx(of_document[one, other], abs=1e-3)
        assert max(row["query_cosine"], row["document_cosine"]) >= THRESHOLD - 1e-4


@pytest.mark.usefixtures("in_process")
def test_dropped_rows_are_set_aside_counted_and_kept(tmp_path: Path) -> None:
    config = _clustered(tmp_path, "drop")
    artifact = Workspace(config).clusters()
    manifest = artifact.require()
    aside = manifest.counts.set_aside["semantic duplicate"]
    assert aside == sum(found["dropped"] for found in manifest.details["duplicates"].values()) > 0
    assert manifest.counts.written == sum(SOURCES.values()) - aside
    parts = [part for part in manifest.parts if part.details.get("content") == OUTLIERS]
    dropped = [name for part in parts for name in read_parquet(artifact.folder, part)["pair_id"].to_pylist()]
    kept = text_rows(artifact)["pair_id"].to_pylist()
    assert len(dropped) == aside
    assert sorted(dropped + kept) == [f"{number:06d}" for number in range(sum(SOURCES.values()))]
    every, of_query, of_document = _near_in_both(config)
    place = {name: number for number, name in enumerate(every)}
    near = np.minimum(of_query, of_document) >= DROPPING - 1e-4
    stay = [place[name] for name in kept]
    assert all(near[place[name], stay].any() for name in dropped)
    assert "duplicate_group" not in ShardReader(artifact).schema.names


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("stratify", ["cluster", "source", "random"])
def test_rows_apart_meet_only_in_what_does_not_fill_a_batch(tmp_path: Path, stratify: str) -> None:
    config = with_changes(_clustered(tmp_path, "apart"), {"batches.stratify": stratify})
    artifact = Workspace(config).clusters()
    plan, reader = open_plan(config, artifact, artifact.require()), ShardReader(artifact)
    index = reader.index
    assert set(np.unique(index.layer)) > {0, 1}
    mixed = 0
    for epoch in range(2):
        seen: Counter[tuple[int, int]] = Counter()
        for step in range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch):
            batch = plan.batch(step)
            (read,) = SliceLoader(plan, reader, 0, 1, step, step + 1)
            layers = {int(layer) for layer in index.layer[batch.stratum.pieces]}
            repeats = len(read) - len(set(read.duplicate_group.tolist()))
            if len(layers) == 1 and not batch.repeated:
                assert not repeats
            mixed += repeats
            taken = len(batch) - batch.repeated
            seen.update(zip(batch.piece[:taken].tolist(), batch.row[:taken].tolist(), strict=True))
        assert set(seen.values()) == {1}
        assert len(seen) == sum(SOURCES.values())
    if stratify == "cluster":
        assert mixed < _meetings(tmp_path / "mask")


def _meetings(folder: Path) -> int:
    """Return how many rows of two epochs share a batch with an earlier one of their group, if nothing is kept apart."""
    config = _clustered(folder)
    artifact = Workspace(config).clusters()
    plan, reader = open_plan(config, artifact, artifact.require()), ShardReader(artifact)
    return sum(
        len(batch) - len(set(batch.duplicate_group.tolist()))
        for batch in SliceLoader(plan, reader, 0, 1, 0, 2 * plan.steps_per_epoch)
    )


@pytest.mark.parametrize("action", ["mask", "apart", "drop"])
def test_the_result_does_not_depend_on_workers_or_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, action: str
) -> None:
    checksums = []
    for reverse in (False, True):
        monkeypatch.setattr(executor, "_current", InProcessExecutor(reverse=reverse))
        config = _clustered(tmp_path / str(reverse), action, workers=1 + 2 * reverse)
        manifest = Workspace(config).clusters().require()
        checksums.append([part.checksum for part in manifest.parts])
    assert checksums[0] == checksums[1]


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("action", ["apart", "drop"])
def test_an_action_without_a_threshold_is_refused(action: str) -> None:
    with pytest.raises(UsageError, match=f"cluster.duplicates: action: {action} needs a threshold"):
        load_config(None, ["workspace=w", "corpus.paths=[a]", f"cluster.duplicates.action={action}"])


def test_clusters_are_needed_and_the_default_changes_nothing(tmp_path: Path) -> None:
    config = embedded_workspace(str(tmp_path), {"forum": 60}, settings=SETTINGS)
    changes = {"cluster.duplicates.threshold": 0.9, "batches.stratify": "source"}
    with pytest.raises(UsageError, match=r"cluster\.duplicates are those of a cluster, and batches\.stratify: source"):
        cluster(with_changes(config, changes))
    assert "duplicates" not in config.cluster.identity()
    assert "semantic_duplicates" not in config.train.mask.identity()
    manifest = cluster(config)
    assert "duplicates" not in manifest.details
    assert not any(part.details.get("content") == DUPLICATES for part in manifest.parts)


def test_examples_come_from_more_text_than_an_offset_reaches() -> None:
    """A bucket of 2.4 GB of text, in pieces as sorting leaves it; zeros take no memory."""
    zeros, bytes_of_piece = np.zeros(600 * 2**20, np.uint8), 600 * 2**20
    offsets = pa.py_buffer(np.array([0, bytes_of_piece - 3, bytes_of_piece], np.int32))
    text = pa.chunked_array([pa.Array.from_buffers(pa.string(), 2, [None, offsets, pa.py_buffer(zeros)])] * 4)
    vectors = np.eye(8, dtype=np.float32)
    vectors[7] = vectors[5]
    table = pa.table(
        {
            "cluster": np.zeros(8, np.int64),
            "part": np.zeros(8, np.int64),
            "pair_id": [f"p{row}" for row in range(8)],
            "query": text,
            "document": text,
            "query_vector": vector_column(vectors),
            "document_vector": vector_column(vectors),
        }
    )
    found = find_duplicates(table, lambda cluster: "forum", DuplicatesConfig(threshold=0.9, action="drop"))
    assert found.rank.tolist() == [0, 0, 0, 0, 0, 0, 0, 1]
    (example,) = found.examples
    assert (example["pair_id"], example["other_pair_id"], example["query"]) == ("p5", "p7", "\0\0\0")
