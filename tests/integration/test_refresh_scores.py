"""Rounds of refresh with a teacher: its scores are of the clusters that each round trains on."""

from __future__ import annotations

from pathlib import Path

import pytest

from clusterbatch.config import RunConfig
from clusterbatch.errors import ClusterbatchError
from clusterbatch.pipeline.refresh import CALL, refresh
from clusterbatch.pipeline.run import run_stage, stages_of
from clusterbatch.store.workspace import Workspace
from tests.encoder.models import make_static
from tests.in_process import OVERRIDES, run_in_process
from tests.integration.subjects import subjects_config

_ROUNDS = ["refresh.rounds=2", "refresh.every_steps=6", "refresh.sample=256", "refresh.margin=1.0", "train.steps=6"]
# A teacher of random vectors takes much for an answer.
_MASK = ["train.mask.teacher_margin=0.0", "score.nearest=20", "train.teacher_kl=0.1"]


def _config(folder: Path, *words: str) -> RunConfig:
    teacher = make_static(["what", "about"], folder / "teacher")
    return subjects_config(folder, [*OVERRIDES, *_ROUNDS, *_MASK, f"score.teacher={teacher}", *words])


def test_every_round_scores_its_own_clusters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_in_process(monkeypatch)
    config = _config(tmp_path)
    assert "score" in [stage.name for stage in stages_of(config)]
    made = refresh(config)
    workspace = Workspace(config)
    assert [record.generation for record in made] == [1, 2]
    for generation in range(3):
        clusters, scores = workspace.clusters(generation).require(), workspace.scores(generation).require()
        assert scores.inputs["clusters"] == clusters.fingerprint
        assert scores.counts.written == clusters.counts.written
        assert workspace.train(generation).require().inputs["scores"] == scores.fingerprint
    assert all("score" in record.seconds for record in made)
    fingerprints = {workspace.scores(generation).require().fingerprint for generation in range(3)}
    assert len(fingerprints) == 3


def test_a_round_on_earlier_clusters_takes_their_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_in_process(monkeypatch)
    config = _config(tmp_path, "refresh.rounds=1", "refresh.when=drift > 0.999")
    [record] = refresh(config)
    workspace = Workspace(config)
    assert record.clusters == 0
    assert workspace.scores(1).manifest() is None
    assert workspace.train(1).require().inputs["scores"] == workspace.scores().require().fingerprint


def test_a_teacher_that_cannot_score_is_named_before_a_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_in_process(monkeypatch)
    config = _config(tmp_path, "refresh.rounds=1")
    for stage in stages_of(config):
        run_stage(stage, config)
    teacher = tmp_path / "teacher"
    (teacher / "model.safetensors").write_bytes((teacher / "model.safetensors").read_bytes()[:200])
    with pytest.raises(ClusterbatchError, match=r"^score\.teacher: "):
        refresh(config)
    assert Workspace(config).embeddings(1).manifest() is None
    assert not Workspace(config).root.exists(CALL)
