"""Refresh of a corpus that has grown: new rows are embedded and join the clusters there are, or clusters are anew."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from clusterbatch.clustering.model import StoredParts, read_fits, stored_fits
from clusterbatch.config import RunConfig, with_changes
from clusterbatch.corpus.ingest import ingest
from clusterbatch.errors import UsageError
from clusterbatch.pipeline.inspect_workspace import inspect_workspace
from clusterbatch.pipeline.refresh import refresh
from clusterbatch.pipeline.rounds import needed_generations
from clusterbatch.pipeline.run import STAGES, run_stage
from clusterbatch.shards.stage import cluster
from clusterbatch.store.workspace import Workspace
from tests.in_process import OVERRIDES, run_in_process
from tests.integration.subjects import SUBJECTS, copy_workspace, subjects_config
from tests.integration.test_cluster_stage import text_rows

_ROUNDS = ["refresh.rounds=1", "refresh.every_steps=3", "refresh.sample=256", "refresh.margin=1.0", "train.steps=3"]


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run over 320 pairs, whose corpus has then got 39 more (and one that it had) and lost one. Not to be changed."""
    folder = tmp_path_factory.mktemp("grown")
    words = [*OVERRIDES, *_ROUNDS, "embed.model=char-ngrams", "train.workers=1"]
    config = subjects_config(folder, words)
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    terms = SUBJECTS["sailing"].split()
    more = [
        {"query": f"{terms[n % 10]} news {n}", "document": f"today {terms[n % 10]} and {n}", "source": "sailing"}
        for n in range(39)
    ]
    (folder / "more.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*more, rows[0]]))
    with pytest.MonkeyPatch.context() as patch:
        run_in_process(patch)
        for stage in STAGES:
            run_stage(stage, config)
        (folder / "gone.txt").write_text(next(iter(_centroids(config, 0))) + "\n")
        paths = [*config.corpus.paths, str(folder / "more.jsonl")]
        config = with_changes(config, {"corpus.paths": paths, "corpus.delete": [str(folder / "gone.txt")]})
        assert ingest(config, append=True).version == 2
    return config


@pytest.fixture
def config(grown: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """A copy of it that a test may change."""
    run_in_process(monkeypatch)
    return copy_workspace(grown, tmp_path)


def _centroids(config: RunConfig, generation: int) -> dict[str, tuple[str, int]]:
    """(source, centroid) by pair_id."""
    rows = text_rows(Workspace(config).clusters(generation)).select(["pair_id", "source", "centroid"])
    return {row["pair_id"]: (row["source"], row["centroid"]) for row in rows.to_pylist()}


def _fitted(config: RunConfig, generation: int) -> dict[str, np.ndarray]:
    clusters = Workspace(config).clusters(generation)
    parts = [part for part in clusters.require().parts if part.details.get("content") == "centroids"]
    fits = read_fits(StoredParts(clusters, parts), stored_fits(parts))
    return {details["group"]: np.array(table["centroid"].to_pylist()) for details, table in fits}


def test_new_rows_join_the_clusters_there_are(config: RunConfig) -> None:
    workspace = Workspace(config)
    before, centroids = _centroids(config, 0), _fitted(config, 0)
    with pytest.raises(UsageError, match="embed"):
        cluster(config)
    [record] = refresh(with_changes(config, {"refresh.when": "drift > 0.999"}))
    assert (record.reclustered, record.extended, record.clusters) == (False, True, 1)
    embeddings = workspace.embeddings().require()
    assert (embeddings.version, embeddings.details["rows"]) == (2, 39)
    assert workspace.embeddings(1).manifest() is None
    found, manifest = _centroids(config, 1), workspace.clusters(1).require()
    assert manifest.counts.written == len(found) == 320 + 39 - 1
    assert manifest.details["vectors"] == 0
    # Every old row is where it was, for the centroids are those there were; the new ones are of their source.
    assert all(found[pair] == before[pair] for pair in found if pair in before)
    assert len(set(before) - set(found)) == 1
    assert {found[pair][0] for pair in set(found) - set(before)} == {"sailing"}
    now = _fitted(config, 1)
    assert now.keys() == centroids.keys()
    assert all(np.array_equal(now[group], centroids[group]) for group in now)
    assert workspace.train(1).require().inputs["clusters"] == manifest.fingerprint
    assert needed_generations(workspace) == {0, 1}
    # The clusters of the first generation stay as they are; the next round has nothing to add.
    with pytest.raises(UsageError, match="clusterbatch refresh"):
        cluster(config)
    [_, record] = refresh(with_changes(config, {"refresh.when": "never"}))
    assert (record.clusters, record.extended) == (1, False)
    versions = {row["stage"]: row.get("versions") for row in inspect_workspace(config) if not row["generation"]}
    assert [(each["version"], each["written"], each["deleted"]) for each in versions["ingest"] or []] == [
        (1, 320, 0),
        (2, 358, 1),
    ]
    assert [each["written"] for each in versions["embed"] or []] == [320, 359]


def test_clusters_built_beside_one_call_bring_new_rows_to_the_next(config: RunConfig) -> None:
    workspace, each = Workspace(config), with_changes(config, {"refresh.asynchronous": True})
    refresh(each)
    assert workspace.train(1).require().inputs["clusters"] == workspace.clusters(0).require().fingerprint
    refresh(each)
    taken = workspace.clusters(1).require()
    assert workspace.train(2).require().inputs["clusters"] == taken.fingerprint
    assert taken.counts.written == len(_centroids(config, 1)) == 358


def test_a_fixed_surrogate_embeds_new_rows_alone(config: RunConfig) -> None:
    workspace = Workspace(config)
    [record] = refresh(with_changes(config, {"refresh.surrogate": "char-ngrams"}))
    assert (record.reclustered, record.clusters) == (True, 1)
    assert workspace.embeddings().require().details["rows"] == 39
    assert workspace.embeddings(1).manifest() is None
    assert len(_centroids(config, 1)) == 358


def test_the_live_model_embeds_the_whole_corpus_as_it_is_now(config: RunConfig) -> None:
    workspace = Workspace(config)
    [record] = refresh(config)
    assert (record.reclustered, record.extended) == (True, False)
    assert workspace.embeddings().require().version == 1
    assert workspace.embeddings(1).require().counts.written == 358
    assert len(_centroids(config, 1)) == 358
