"""Commands without any session around them: each opens its own before it asks what there is to run on."""

from __future__ import annotations

from pathlib import Path

import pytest

from clusterbatch.experiments.compare.stage import compare
from clusterbatch.experiments.predict.stage import predict
from clusterbatch.experiments.tune.stage import tune
from clusterbatch.pipeline.refresh import refresh
from clusterbatch.pipeline.run import STAGES, run_stage
from clusterbatch.runtime import executor
from clusterbatch.runtime.executor import installed_executor
from clusterbatch.search.mine import mine
from clusterbatch.store.workspace import Workspace, live_generation
from tests.integration.subjects import subjects_config

# Devices are left at `auto`, so that every stage asks the executor.
_SMALL = [
    "ray.mode=in-process",
    "embed.persist=false",
    "mine.negatives=1",
    "predict.rows=256",
    "train.steps=4",
    "refresh.every_steps=2",
    "refresh.sample=256",
    "refresh.margin=1.0",
    "tune.candidates={train.temperature: [0.05, 0.1]}",
    "tune.steps=2",
    "tune.keep=2",
    "compare.steps=2",
    "compare.seeds=1",
    "compare.points=1",
    "compare.arms=[source, cluster]",
]


def test_every_command_opens_its_own_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = subjects_config(tmp_path, _SMALL)
    # Tests before this one may have left a session open for others to join.
    monkeypatch.setattr(executor, "_current", None)
    for stage in STAGES:
        run_stage(stage, config)
        assert installed_executor() is None
    # Called by itself, when everything before is whole: no stage leaves a session that it could use.
    refresh(config)
    assert live_generation(Workspace(config)) == 1
    assert mine(config, force=True).counts.read > 0
    for command in (predict, tune, compare):
        command(config)  # type: ignore[operator]
        assert installed_executor() is None
