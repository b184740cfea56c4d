"""Rounds of refresh on a small corpus: what they make, when they promote, how they go on after being cut off."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load

from clusterbatch.cli import main
from clusterbatch.config import RunConfig, with_changes
from clusterbatch.errors import UsageError
from clusterbatch.pipeline import refresh as module
from clusterbatch.pipeline.refresh import refresh, rollback
from clusterbatch.pipeline.rounds import read_round, rounds
from clusterbatch.pipeline.run import STAGES, run_stage
from clusterbatch.store.workspace import Workspace, live_generation
from tests.in_process import OVERRIDES, run_in_process
from tests.integration.subjects import copy_workspace, subjects_config

_ROUNDS = ["refresh.rounds=2", "refresh.every_steps=6", "refresh.sample=256", "refresh.margin=1.0", "train.steps=6"]
_EXACT = ["train.deterministic=true", "train.workers=1", "cluster.surrogate=none", "train.checkpoint_every=2"]


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A workspace with its first generation."""
    with pytest.MonkeyPatch.context() as patch:
        run_in_process(patch)
        config = subjects_config(tmp_path_factory.mktemp("first"), [*OVERRIDES, *_ROUNDS, *_EXACT])
        for stage in STAGES:
            run_stage(stage, config)
    return config


@pytest.fixture(scope="module")
def refreshed(first: RunConfig) -> RunConfig:
    """Another, after two rounds that nothing has disturbed. Not to be changed."""
    copy = f"{first.workspace}-refreshed"
    shutil.copytree(first.workspace, copy)
    config = first.model_copy(update={"workspace": copy})
    with pytest.MonkeyPatch.context() as patch:
        run_in_process(patch)
        refresh(config)
    return config


@pytest.fixture
def config(first: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """A copy of it that a test may change."""
    run_in_process(monkeypatch)
    return copy_workspace(first, tmp_path)


def _weights(workspace: Workspace, generation: int) -> np.ndarray:
    return load(workspace.trained_model(generation).read("model.safetensors"))["embedding.weight"]


def _live_weights(workspace: Workspace) -> np.ndarray:
    return load(workspace.model.read("model.safetensors"))["embedding.weight"]


def test_rounds_make_generations_each_from_the_one_before(refreshed: RunConfig) -> None:
    workspace = Workspace(refreshed)
    pairs = workspace.corpus.require().counts.written
    found = rounds(workspace)
    assert [(record.generation, record.base, record.reclustered) for record in found] == [(1, 0, True), (2, 1, True)]
    for record in found:
        number = record.generation
        assert workspace.clusters(number).require().counts.written == pairs
        # The live model embeds: a static encoder's vectors are not the surrogate's.
        assert (
            workspace.embeddings(number).require().details["model"] != workspace.embeddings().require().details["model"]
        )
        train = workspace.train(number).require()
        assert (train.details["steps"], train.details["steps_before"]) == (6, 6 * number)
        assert train.inputs["clusters"] == workspace.clusters(number).require().fingerprint
        assert not np.array_equal(_weights(workspace, number), _weights(workspace, number - 1))
        assert record.promoted
        assert set(record.seconds) == {"drift", "embed", "cluster", "train", "evaluate"}
        assert record.reindex_documents == pairs
        assert 0 <= record.drift["drift"] <= 1
    # The first model knows nothing of the surrogate's space, so rows do move.
    assert found[0].drift["moved"] > 0
    assert live_generation(workspace) == 2
    assert np.array_equal(_live_weights(workspace), _weights(workspace, 2))
    # Each generation has batches of its own.
    plans = {workspace.train(number).require().config["batches"]["seed"] for number in range(3)}
    assert len(plans) == 3
    # One call made two; the next makes two more of its own.
    assert not workspace.root.exists(module.CALL)


def test_going_on_keeps_the_moments_of_the_checkpoint(config: RunConfig) -> None:
    workspace = Workspace(config)
    refresh(with_changes(config, {"refresh.rounds": 1, "refresh.every_steps": 1}))
    warm = _weights(workspace, 1) - _weights(workspace, 0)
    shutil.rmtree(f"{config.workspace}/generation=000/train/checkpoints")
    shutil.rmtree(f"{config.workspace}/generation=001/train")
    workspace.refresh(1).remove()
    workspace.model.write_json("generation.json", {"generation": 0})
    refresh(with_changes(config, {"refresh.rounds": 1, "refresh.every_steps": 1}))
    cold = _weights(workspace, 1) - _weights(workspace, 0)
    # Decay apart, a first step moves only the words of its own batch; moments still move those of the steps before.
    assert np.count_nonzero(np.abs(warm) > 1e-4) > 1.1 * np.count_nonzero(np.abs(cold) > 1e-4) > 0


def test_what_does_not_pay_is_not_clustered_again(config: RunConfig) -> None:
    workspace = Workspace(config)
    [record] = refresh(with_changes(config, {"refresh.rounds": 1, "refresh.when": "drift > 0.999"}))
    assert not record.reclustered
    assert record.clusters == 0
    assert workspace.embeddings(1).manifest() is None
    assert workspace.clusters(1).manifest() is None
    train = workspace.train(1).require()
    assert train.inputs["clusters"] == workspace.clusters(0).require().fingerprint
    # Nothing of the sample is left, and what decided can be read.
    assert workspace.refresh(1).list() == ["round.json"]


def test_a_worse_model_does_not_go_live_and_the_next_round_begins_before_it(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = Workspace(config)
    values = iter([0.5, 0.4, 0.5, 0.46])
    monkeypatch.setattr(module, "mean_value", lambda manifest, metric: next(values))
    before = _live_weights(workspace)
    found = refresh(with_changes(config, {"refresh.margin": 0.05, "refresh.when": "never"}))
    assert [record.promoted for record in found] == [False, True]
    assert [record.base for record in found] == [0, 0]
    assert live_generation(workspace) == 2
    assert not np.array_equal(_live_weights(workspace), before)
    assert rollback(config) == (2, 0)
    assert np.array_equal(_live_weights(workspace), before)
    assert read_round(workspace, 2).rolled_back  # type: ignore[union-attr]
    with pytest.raises(UsageError, match="none to roll back to"):
        rollback(config)


def test_losses_within_the_margin_do_not_add_up(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    # Of the live model and the new one, round by round.
    values = iter([0.5, 0.47, 0.47, 0.44])
    monkeypatch.setattr(module, "mean_value", lambda manifest, metric: next(values))
    found = refresh(with_changes(config, {"refresh.margin": 0.05, "refresh.when": "never"}))
    assert [record.promoted for record in found] == [True, False]
    assert [record.best_value for record in found] == [0.5, 0.5]
    assert live_generation(Workspace(config)) == 1


class _Killed(BaseException):
    pass


def test_a_round_that_is_cut_off_anywhere_comes_to_the_same_end(
    config: RunConfig, refreshed: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    # After every write of the workspace that a stage, the decision or the publishing makes, in steps.
    cuts = _cut_after_writes(monkeypatch, every=11)
    calls = 0
    while True:
        calls += 1
        try:
            found = refresh(config)
            break
        except _Killed:
            # Whatever it was doing, the live model is whole.
            assert live_generation(Workspace(config)) in (0, 1, 2)
            assert len(_live_weights(Workspace(config)))
    assert calls - 1 == len(cuts) > 5
    monkeypatch.undo()
    for number in (1, 2):
        assert np.array_equal(_weights(Workspace(config), number), _weights(Workspace(refreshed), number))
    assert [record.own_value for record in found] == [record.own_value for record in rounds(Workspace(refreshed))]
    assert live_generation(Workspace(config)) == 2


def _cut_after_writes(monkeypatch: pytest.MonkeyPatch, every: int) -> list[str]:
    """Raises after every so many writes, each time some more, so that later places are reached; names of the last."""
    from clusterbatch.store.folder import Folder

    original = Folder.write
    cuts: list[str] = []
    state = {"left": every}

    def write(self: Folder, name: str, data: Any) -> None:
        original(self, name, data)
        state["left"] -= 1
        if state["left"] == 0:
            cuts.append(name)
            state["left"] = every + 2 * len(cuts)
            raise _Killed(name)

    monkeypatch.setattr(Folder, "write", write)
    return cuts


def test_the_command_prints_rounds_and_the_report_shows_them(
    config: RunConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = Path(config.workspace).parent / "run.yaml"
    file.write_text(config.model_dump_json())
    assert main(["refresh", str(file), "refresh.rounds=1", "refresh.when=never", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["live_generation"] == 1
    summary = json.loads((Path(config.workspace) / "metrics.json").read_text())
    assert summary["refresh"] == printed["refresh"]
    assert {row["generation"] for row in summary["quality"]} == {0, 1}
    assert "Generations" in Path(printed["report"]).read_text()
    assert main(["refresh", str(file), "--rollback"]) == 0
    assert "generation 0 is live again" in capsys.readouterr().err


def test_what_cannot_be_refreshed_is_said_at_once(config: RunConfig) -> None:
    for changes, message in (
        ({"evaluate.metrics": ["MRR@10"]}, "refresh.metric"),
        ({"evaluate.models": ["before"]}, "evaluate.models"),
        ({"batches.stratify": "source"}, "batches.stratify"),
    ):
        with pytest.raises(UsageError, match=message):
            refresh(with_changes(config, changes))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["evaluate.max_query_tokens=3"], r"evaluate\.max_query_tokens"),
        (["train.max_document_tokens=3"], r"train\.max_document_tokens"),
        (["evaluate.models=[after,/nowhere/at/all]"], r"evaluate\.models: .*/nowhere/at/all"),
    ],
)
@pytest.mark.parametrize("trained", [True, False])
def test_what_a_round_would_refuse_in_the_end_is_refused_before_it(
    config: RunConfig, tmp_path: Path, words: list[str], message: str, trained: bool
) -> None:
    prompts = ["train.prompts.query=what is said about this", "train.prompts.document=the following text says"]
    workspace = config.workspace if trained else f"{tmp_path}/none"
    given = config.model_copy(update={"workspace": workspace})
    changes = {word.partition("=")[0]: yaml.safe_load(word.partition("=")[2]) for word in [*prompts, *words]}
    before = _files(tmp_path)
    with pytest.raises(UsageError, match=message):
        refresh(with_changes(given, changes))
    assert _files(tmp_path) == before


def _files(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*"))


@pytest.mark.parametrize(
    ("changes", "measured_anew"),
    [
        ({"evaluate.max_query_tokens": 2}, True),
        ({"evaluate.max_document_tokens": 8}, True),
        ({"evaluate.ignore_identical_ids": False}, True),
        ({"evaluate.metrics": ["NDCG@10", "MRR@10"], "evaluate.models": ["after"], "evaluate.unit_bytes": 2048}, False),
    ],
)
def test_models_are_compared_where_they_were_measured_alike(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], measured_anew: bool
) -> None:
    # Of the live model and the new one, round by round.
    values = iter([0.5, 0.47, 0.47, 0.44])
    monkeypatch.setattr(module, "mean_value", lambda manifest, metric: next(values))
    once = with_changes(config, {"refresh.rounds": 1, "refresh.margin": 0.05, "refresh.when": "never"})
    refresh(once)
    changed = with_changes(once, changes)
    found = refresh(changed)
    live = Workspace(config).evaluation(1).require()
    assert (live.config["evaluate"] == changed.evaluate.identity()) == measured_anew
    # The best of before holds only where it was measured in the same way.
    assert found[1].best_value == (0.47 if measured_anew else 0.5)
    assert found[1].promoted == measured_anew
