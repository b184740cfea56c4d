"""Storage requests and objects of passes over sources: they follow the bytes, not the number of sources."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from clusterbatch.clustering import measure_drift as drifting
from clusterbatch.clustering.warm_start import Previous
from clusterbatch.config import RunConfig, with_changes
from clusterbatch.embedding.vectors import tasks
from clusterbatch.experiments.predict import stage as predicting
from clusterbatch.experiments.tune import stage as tuning
from clusterbatch.search.mine import mine
from clusterbatch.shards.stage import cluster
from clusterbatch.store import folder as storage
from clusterbatch.store.workspace import Workspace
from tests.clustering.embedded import embedded_workspace

pytestmark = pytest.mark.usefixtures("in_process")

ROWS, TASKS, FEW, MANY = 1024, 8, 2, 32
SETTINGS = {
    "cluster": {"mean_size": 16, "run_rows": 16, "device": "cpu"},
    "batches": {"size": 64},
    "predict": {"sizes": [16]},
    "mine": {"negatives": 0},
    "tune": {"candidates": {"cluster.mean_size": [16, 32]}},
}


def kmeans(config: RunConfig) -> object:
    return cluster(config)


def groups(config: RunConfig) -> object:
    return cluster(with_changes(config, {"cluster.column": "group"}))


def communities(config: RunConfig) -> object:
    pytest.importorskip("pymetis")
    return cluster(with_changes(config, {"cluster.method": "communities", "cluster.neighbour_ranks": [1, 9]}))


def mining(config: RunConfig) -> object:
    return mine(with_changes(config, {"mine": {"negatives": 1, "first": 1, "last": 9}}))


def drift(config: RunConfig) -> object:
    folder = Workspace(config).root.child("drift")
    return drifting.measure_drift(config, 0, Previous.of(config, 0), folder)


def next_generation(config: RunConfig) -> object:
    return cluster(config, generation=1, previous=Previous.of(config, 0, keep=0.5), vectors=0)


def frozen(config: RunConfig) -> object:
    return cluster(config, generation=2, previous=Previous.of(config, 0, frozen=True), vectors=0)


def prediction(config: RunConfig) -> object:
    return predicting.predict(config)


def ranking(config: RunConfig) -> object:
    return tuning._ranked(config, force=False)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[int, RunConfig]:
    """The same rows in as many parts, of few sources or of many."""
    folder = tmp_path_factory.mktemp("sources")
    return {
        sources: embedded_workspace(
            str(folder / str(sources)),
            {f"site-{number:03d}": ROWS // sources for number in range(sources)},
            row_group_rows=ROWS // TASKS,
            parts=TASKS,
            spread=1.0,
            optional=["group"],
            settings=SETTINGS,
        )
        for sources in (FEW, MANY)
    }


@pytest.mark.parametrize(
    "work", [kmeans, drift, next_generation, frozen, groups, communities, mining, prediction, ranking]
)
def test_requests_do_not_grow_with_the_sources(
    made: dict[int, RunConfig], tmp_path: Path, work: Callable[[RunConfig], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predicting, "ingest", lambda config: None)
    # The vectors of the new space are those that are stored: a model would take most of the time.
    monkeypatch.setattr(drifting, "tasks", lambda corpus, _: tasks(corpus, Workspace(config).embeddings().require()))
    asked = {"reads": 0, "writes": 0}

    def count(*, reads: int = 0, writes: int = 0, **_: int) -> None:
        asked["reads"] += reads
        asked["writes"] += writes

    found = []
    for given in made.values():
        config = given
        if work in (drift, next_generation, frozen):
            cluster(config)
        elif work in (groups, communities):
            own = {"workspace": str(tmp_path / Path(given.workspace).name)}
            config = with_changes(given, {"reuse": {"corpus": given.workspace, "embeddings": given.workspace}, **own})
        with monkeypatch.context() as patch:
            patch.setattr(storage, "count", count)
            asked.update(reads=0, writes=0)
            work(config)
        found.append(dict(asked))
    few, many = found
    # Each source less than a request for every fourth part, or an object for every fourth source.
    assert many["reads"] < few["reads"] + (MANY - FEW) * TASKS / 4
    assert many["writes"] < few["writes"] + (MANY - FEW) / 4


def test_requests_grow_with_the_rows_and_no_faster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row groups and buckets both grow eight times: were each row group asked for each bucket, requests would 64."""
    asked = {"reads": 0, "writes": 0}

    def count(*, reads: int = 0, writes: int = 0, **_: int) -> None:
        asked["reads"] += reads
        asked["writes"] += writes

    monkeypatch.setattr(storage, "count", count)
    found = []
    for rows in (ROWS, 8 * ROWS):
        config = embedded_workspace(
            str(tmp_path / str(rows)),
            {f"site-{number}": rows // 8 for number in range(8)},
            row_group_rows=32,
            parts=4,
            spread=1.0,
            settings={"cluster": {"mean_size": 32, "run_rows": 16, "device": "cpu", "shard_bytes": 2**16}},
        )
        asked.update(reads=0, writes=0)
        cluster(config)
        found.append(dict(asked))
    few, many = found
    assert many["reads"] <= 8 * few["reads"]
    assert many["writes"] <= 8 * few["writes"]
