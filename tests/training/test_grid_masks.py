"""Masks of the study of batch sizes are those that training takes from a workspace with the same rows and clusters."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

pytest.importorskip("numba", reason="the study's trainer is compiled (pip install '.[bench]')")

from clusterbatch.batches.loader import SliceLoader
from clusterbatch.config import RunConfig, TrainConfig, with_changes
from clusterbatch.corpus.normalise import text_hash
from clusterbatch.encoder.sides import SIDES
from clusterbatch.encoder.tokens import Tokens
from clusterbatch.scoring.stage import score
from clusterbatch.scoring.teacher import EmbeddingTeacher
from clusterbatch.shards.index import LAYERS, ClusterIndex
from clusterbatch.shards.reader import ShardReader
from clusterbatch.shards.stage import cluster
from clusterbatch.store.tables import vector_values
from clusterbatch.store.workspace import Workspace
from clusterbatch.training.collectives import World, gather_batch
from clusterbatch.training.masks import NEGATIVE, Relation
from clusterbatch.training.worker import open_plan
from tests.benchmarks.grid_masks import MASKS, Known, duplicate_groups, kept, teacher_scores
from tests.benchmarks.static_trainer import Pairs
from tests.clustering.embedded import embedded_workspace
from tests.encoder.models import make_model
from tests.integration.test_cluster_stage import all_runs, text_rows

_NEAREST, _THRESHOLD, _BATCH = 5, 0.97, 32


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with random weights, whose scores spread enough for margins to matter."""
    return make_model("bert", tmp_path_factory.mktemp("teacher") / "model")


def _workspace(folder: Path, teacher: Path, action: str) -> RunConfig:
    settings = {
        "cluster": {
            "mean_size": 60,
            "run_rows": 16,
            "device": "cpu",
            "duplicates": {"threshold": _THRESHOLD, "action": action},
        },
        "score": {"teacher": str(teacher), "nearest": _NEAREST, "dtype": "float32", "device": "cpu"},
        "batches": {"size": _BATCH, "stratify": "cluster"},
    }
    config = embedded_workspace(str(folder), {"forum": 500, "wiki": 300}, settings=settings)
    cluster(config)
    score(config)
    return config


def _cells(index: ClusterIndex) -> np.ndarray:
    """Return (N,) a number for each cluster of each source; a cluster's pieces may differ in their layers."""
    return np.repeat(index.source.astype(np.int64) * 2**32 + index.cluster, index.rows)


def _pairs(runs: pa.Table) -> Pairs:
    tokens = Tokens.from_lists([[0]] * runs.num_rows, np.int32)
    hashes = [runs[f"{side}_hash"].to_numpy() for side in SIDES]
    vectors = [vector_values(runs[f"{side}_vector"]).astype(np.float32) for side in SIDES]
    return Pairs(tokens, tokens, *hashes, *vectors)


@pytest.mark.usefixtures("in_process")
def test_masks_of_the_study_are_those_of_training(tmp_path: Path, teacher: Path) -> None:
    config = _workspace(tmp_path, teacher, "mask")
    artifact, scores = Workspace(config).clusters(), Workspace(config).scores()
    reader = ShardReader(artifact, scores)
    runs, texts = all_runs(reader, vectors=True), text_rows(artifact)
    pairs, cells = _pairs(runs), _cells(reader.index)
    model = EmbeddingTeacher(str(teacher), config.score, torch.device("cpu"))
    text_of = dict(zip(texts["query"].to_pylist(), texts["document"].to_pylist(), strict=True))
    by_hash = {text_hash(query): (query, document) for query, document in text_of.items()}
    ordered = zip(*(by_hash[query] for query in pairs.query_hash.tolist()), strict=True)
    vectors = [
        model._encoder.encode(model._sides.tokens(list(of_side), side), 4096)
        for side, of_side in zip(SIDES, ordered, strict=True)
    ]
    known = Known(teacher_scores(pairs, cells, *vectors, _NEAREST), duplicate_groups(pairs, cells, _THRESHOLD)[0])
    row_of = {query: row for row, query in enumerate(pairs.query_hash.tolist())}
    masked = dict.fromkeys(MASKS, 0)
    for stratify in ("cluster", "random"):
        plan = open_plan(with_changes(config, {"batches.stratify": stratify}), artifact, artifact.require())
        for batch in SliceLoader(plan, reader, 0, 1, 0, 4, vectors=True):
            rows = np.array([row_of[query] for query in batch.query_hash.tolist()])
            for name, mask in MASKS.items():
                # What the mask does not read changes nothing.
                facts = gather_batch(batch, World(), torch.device("cpu"), TrainConfig(mask=mask)).facts
                every = slice(0, len(rows))
                relation = Relation(mask, facts).block(every, every, torch.zeros(len(rows), len(rows)))
                found = kept(pairs, rows, mask, known)
                assert np.array_equal(found, relation.numpy() == NEGATIVE)
                masked[name] += len(rows) ** 2 - int(found.sum())
    assert len(set(masked.values())) >= len(MASKS) - 1


@pytest.mark.usefixtures("in_process")
def test_layers_of_the_study_are_those_of_the_stage(tmp_path: Path, teacher: Path) -> None:
    reader = ShardReader(Workspace(_workspace(tmp_path, teacher, "apart")).clusters())
    runs, index = all_runs(reader, vectors=True), reader.index
    group, rank = duplicate_groups(_pairs(runs), _cells(index), _THRESHOLD)
    assert np.array_equal(runs["duplicate_group"].to_numpy()[group], runs["duplicate_group"].to_numpy())
    assert len(np.unique(group)) == len(set(runs["duplicate_group"].to_pylist())) < len(group)
    assert np.array_equal(rank.clip(max=LAYERS - 1), np.repeat(index.layer, index.rows))
