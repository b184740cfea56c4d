"""Whoever embeds finds the device that the configuration names: workers ask for GPUs, and the driver does without."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import torch

from clusterbatch.config import RunConfig, with_changes
from clusterbatch.embedding import embedder
from clusterbatch.encoder.devices import resolve_device, visible_device
from clusterbatch.encoder.load import load_encoder
from clusterbatch.errors import UsageError
from clusterbatch.evaluation.stage import configured_collections
from clusterbatch.experiments.compare import budget
from clusterbatch.experiments.compare.breakdown import query_segments
from clusterbatch.experiments.predict.stage import predict
from clusterbatch.pipeline.refresh import refresh
from clusterbatch.pipeline.run import STAGES, run_stage
from clusterbatch.runtime import InProcessExecutor, WorkItem, executor
from clusterbatch.runtime.work import Work
from clusterbatch.store import Receipt
from clusterbatch.store.workspace import Workspace
from tests.in_process import OVERRIDES
from tests.integration.subjects import subjects_config

_WORDS = [*OVERRIDES, "embed.device=cuda", "embed.dtype=float32", "embed.workers=1", "cluster.surrogate=none"]
_WORDS += ["train.steps=2", "refresh.rounds=1", "refresh.every_steps=2", "refresh.sample=256", "predict.sizes=[16,32]"]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """GPUs that a worker of each pass asks for, by the pass' title, on a cluster whose driver sees none.

    As Ray does it, a worker sees a GPU where it has asked for one; the weights lie in memory all the same.
    """
    found: dict[str, float] = {}

    class Cluster(InProcessExecutor):
        def resources(self) -> Mapping[str, float]:
            return {"CPU": 8.0, "GPU": 1.0}

        def run(self, work: Work, items: Sequence[WorkItem]) -> Iterator[Receipt]:
            found[work.title] = work.pool.gpus
            with monkeypatch.context() as patch:
                patch.setattr("torch.cuda.is_available", lambda: bool(work.pool.gpus))
                yield from super().run(work, items)

    monkeypatch.setattr(executor, "_current", Cluster(reverse=True))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(
        embedder, "load_encoder", lambda folder, device, **options: load_encoder(folder, device="cpu", **options)
    )
    return found


def _with_stages(config: RunConfig, *names: str) -> None:
    for stage in STAGES:
        if stage.name in names:
            run_stage(stage, config)


def _wanting(asked: dict[str, float]) -> set[str]:
    return {title for title, gpus in asked.items() if gpus}


def test_passes_that_embed_ask_for_what_the_stage_asks(tmp_path: Path, asked: dict[str, float]) -> None:
    config = subjects_config(tmp_path, [*_WORDS, "embed.persist=false", "mine.negatives=1"])
    predict(config)
    assert _wanting(asked) == {"predict: sample"}
    asked.clear()
    _with_stages(config, "embed", "cluster")
    assert _wanting(asked) == {"mine: gather", "sample", "assign"}
    assert {"embed: trial", "fit", "shards", "mine: search"} <= set(asked)


def test_passes_that_read_vectors_ask_for_none(tmp_path: Path, asked: dict[str, float]) -> None:
    config = subjects_config(tmp_path, [*_WORDS, "mine.negatives=1"])
    _with_stages(config, "ingest", "embed")
    assert _wanting(asked) == {"embed"}
    asked.clear()
    predict(config)
    _with_stages(config, "cluster")
    assert {"predict: sample", "sample", "mine: gather"} <= set(asked)
    assert not _wanting(asked)


def test_a_round_of_refresh_and_what_is_timed_in_the_driver(tmp_path: Path, asked: dict[str, float]) -> None:
    # Queries are compared with the vectors that the shards keep.
    config = subjects_config(tmp_path, [word for word in _WORDS if word != "cluster.surrogate=none"])
    _with_stages(config, *(stage.name for stage in STAGES))
    asked.clear()
    # Vectors of then were computed on a CPU, say; those of now are not.
    [record] = refresh(config)
    assert record.reindex_seconds >= 0
    assert _wanting(asked) == {"drift sample", "embed"}
    clusters = Workspace(config).clusters()
    assert query_segments(config, clusters, configured_collections(config)).num_rows == 40
    on_gpus = with_changes(config, {"train.device": "cuda"})
    assert budget._seconds_a_row(on_gpus) > 0
    assert min(budget._timed_measurement(on_gpus)) > 0


def test_a_gpu_is_used_where_it_is_visible_and_only_left_out_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert visible_device("cuda") == visible_device("auto") == visible_device("cpu") == torch.device("cpu")
    with pytest.raises(UsageError, match="no GPU is visible"):
        resolve_device("cuda")
    with pytest.raises(UsageError, match="expected auto"):
        visible_device("gpu")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert visible_device("cuda:1") == torch.device("cuda:1")
    assert visible_device("cpu") == torch.device("cpu")
