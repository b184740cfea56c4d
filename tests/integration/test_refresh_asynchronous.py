"""Rounds of refresh that train while clusters are built beside them, in one call and over several."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clusterbatch.config import RunConfig, with_changes
from clusterbatch.pipeline import refresh as module
from clusterbatch.pipeline.refresh import refresh
from clusterbatch.pipeline.refresh_clusters import BUILD
from clusterbatch.pipeline.rounds import write_round
from clusterbatch.pipeline.run import STAGES, run_stage
from clusterbatch.store.workspace import Workspace
from tests.in_process import OVERRIDES, run_in_process
from tests.integration.subjects import copy_workspace, subjects_config

_ROUNDS = ["refresh.every_steps=6", "refresh.sample=256", "refresh.margin=1.0", "train.steps=6", "train.workers=1"]


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A workspace with its first generation. Not to be changed."""
    with pytest.MonkeyPatch.context() as patch:
        run_in_process(patch)
        words = [*OVERRIDES, *_ROUNDS, "cluster.surrogate=none", "refresh.asynchronous=true"]
        config = subjects_config(tmp_path_factory.mktemp("first"), words)
        for stage in STAGES:
            run_stage(stage, config)
    return config


@pytest.fixture
def config(first: RunConfig, in_process: None, tmp_path: Path) -> RunConfig:
    """A copy of it that a test may change."""
    return copy_workspace(first, tmp_path)


def test_clusters_that_are_built_meanwhile_are_taken_by_the_next_round(
    config: RunConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace, original = Workspace(config), module.train
    built = threading.Event()
    tried = []

    def build(*arguments: Any) -> dict[str, Any]:
        tried.append(arguments[2])
        if len(tried) == 1:
            raise RuntimeError("no room")
        found = _build(*arguments)
        built.set()
        return found

    def train(changed: RunConfig, *, generation: int, **options: Any) -> Any:
        manifest = original(changed, generation=generation, **options)
        # The second round's steps end after the build, those of the first not.
        if generation == 2:
            assert built.wait(120)
        elif generation == 1:
            _wait_until(lambda: bool(tried))
        return manifest

    _build = module._build
    monkeypatch.setattr(module, "_build", build)
    monkeypatch.setattr(module, "train", train)
    found = refresh(with_changes(config, {"refresh.rounds": 3}))
    # The first build failed, the second was ready when round 3 began; every round was trained and measured.
    assert tried == [1, 2, 3]
    assert "no room" in capsys.readouterr().err
    assert [record.clusters for record in found] == [0, 0, 2]
    assert [record.steps_meanwhile for record in found] == [0, 0, 6]
    assert found[2].reclustered
    assert found[2].drift["drift"] >= 0
    assert all(record.promoted for record in found)
    assert workspace.train(3).require().inputs["clusters"] == workspace.clusters(2).require().fingerprint
    # What was decided is replayed, whatever has been built since; what was built is not built again.
    record = found[2].model_copy(update={"promoted": None})
    write_round(workspace, record.model_copy(update={"clusters": 0, "reclustered": False}))
    for made in ("train", "evaluation"):
        shutil.rmtree(f"{config.workspace}/generation=003/{made}")
    workspace.root.write_json(module.CALL, {"last": 3})
    again = refresh(config)
    assert tried == [1, 2, 3]
    assert again[2].clusters == 0
    assert workspace.train(3).require().inputs["clusters"] == workspace.clusters(0).require().fingerprint


def test_what_the_last_round_of_a_call_builds_is_for_the_next_call(config: RunConfig) -> None:
    workspace = Workspace(config)
    refresh(config)
    built = workspace.clusters(1).require().fingerprint
    # Cut off while it waited for the build: the same command makes that whole, and no round more.
    shutil.rmtree(f"{config.workspace}/generation=001/clusters")
    workspace.refresh(1).write_json(BUILD, {"base": 0, "done": False})
    workspace.root.write_json(module.CALL, {"last": 1})
    assert len(refresh(config)) == 1
    assert workspace.clusters(1).require().fingerprint == built
    found = refresh(config)
    assert [record.clusters for record in found] == [0, 1]
    assert found[1].steps_meanwhile == 6
    assert workspace.train(2).require().inputs["clusters"] == built
    assert workspace.clusters(2).manifest() is not None


def test_a_round_that_makes_its_own_clusters_has_no_build_beside_it(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = module.train

    def cut_off(*arguments: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "train", cut_off)
    with pytest.raises(KeyboardInterrupt):
        refresh(with_changes(config, {"refresh.asynchronous": False}))
    monkeypatch.setattr(module, "train", original)
    [record] = refresh(config)
    assert record.clusters == 1
    assert not Workspace(config).refresh(1).exists(BUILD)


def _wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
