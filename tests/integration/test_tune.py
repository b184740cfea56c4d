"""A whole tuning on a small corpus: ranked, halved, resumed, and written down; and a prediction on the same."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from clusterbatch.cli import main
from clusterbatch.config import RunConfig, load_config, with_changes
from clusterbatch.errors import UsageError
from clusterbatch.experiments.compare import report, trial
from clusterbatch.experiments.compare import stage as compare
from clusterbatch.experiments.predict import stage as predict
from clusterbatch.experiments.tune import stage as tune
from clusterbatch.pipeline.run import STAGES, run_stage
from clusterbatch.store.workspace import Workspace
from tests.in_process import OVERRIDES, run_in_process
from tests.integration.subjects import SUBJECTS, subjects_config

_CANDIDATES = (
    "tune.candidates={cluster.mean_size: [40, 80], batches.stratify: [cluster, source], train.temperature: [0.05, 0.1]}"
)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    with pytest.MonkeyPatch.context() as patch:
        run_in_process(patch)
        words = [*OVERRIDES, _CANDIDATES, "tune.keep=4", "tune.steps=6", "tune.reduction=2", "predict.rows=256"]
        config = subjects_config(tmp_path_factory.mktemp("tune"), words)
        for stage in STAGES[:2]:
            run_stage(stage, config)
    return config


pytestmark = pytest.mark.usefixtures("in_process")


def test_the_best_of_the_ranking_run_and_the_choice_is_written(config: RunConfig) -> None:
    found = tune.tune(config)
    rows = list(found["candidates"].values())
    assert len(rows) == 8
    assert [len(row["rungs"]) for row in rows] == [2, 2, 1, 1, 0, 0, 0, 0]
    assert {row["rungs"][0]["steps"] for row in rows[:4]} == {3}
    assert {row["rungs"][1]["steps"] for row in rows[:2]} == {6}
    # Those that ran are those that the sample ranked best, and the chosen one is the best of the last rung.
    assert min(row["rank"] for row in rows[:4]) >= max(row["rank"] for row in rows[4:])
    assert rows[0]["rungs"][1]["value"] >= rows[1]["rungs"][1]["value"]
    chosen = load_config(f"{config.workspace}/{tune.CHOSEN}")
    changes = rows[0]["changes"]
    assert chosen.cluster.mean_size == changes["cluster.mean_size"]
    assert chosen.train.temperature == changes["train.temperature"]
    # Again: no run is done twice.
    again = tune.tune(config)
    assert {**again, "seconds": 0} == {**found, "seconds": 0}


def _rung(config: RunConfig) -> dict[str, Any]:
    """Short runs of two candidates, apart from those of a whole tuning."""
    changed = with_changes(config, {"tune.candidates": {"train.temperature": [0.05, 0.1]}})
    candidates = {tune.name_of(changes): changes for changes in changed.tune.combinations}
    runs = tune._Runs(changed, tune._arms(changed, candidates), "NDCG@10", force=False)
    return runs.rung(list(candidates), 2)


@pytest.mark.parametrize(
    "changes",
    [
        {"batches.size": 16},
        {"batches.random_share": 0.5},
        {"tune.seeds": 2},
        {"evaluate.max_document_tokens": 4},
        {"evaluate.ignore_identical_ids": False},
    ],
)
def test_runs_of_another_configuration_are_not_gone_on_with(config: RunConfig, changes: dict[str, Any]) -> None:
    found = _rung(config)
    assert _rung(config) == found
    with pytest.raises(UsageError, match="another configuration"):
        _rung(with_changes(config, changes))


def test_candidates_with_other_batches_train_on_as_many_pairs(config: RunConfig, tmp_path: Path) -> None:
    words = {
        "workspace": str(tmp_path),
        "reuse.corpus": config.workspace,
        "reuse.embeddings": config.workspace,
        "tune.candidates": {"batches.size": [32, 16, 64]},
        "tune.keep": 3,
        "tune.rungs": 1,
    }
    changed = with_changes(config, words)
    rows = tune.tune(with_changes(changed, {"tune.steps": 4}))["candidates"].values()
    assert {row["changes"]["batches.size"]: row["rungs"][0]["steps"] for row in rows} == {16: 8, 32: 4, 64: 2}
    # Without steps, all have an epoch, whichever the sample ranks first, but for rows that fill up the last batches.
    for sizes in ([16, 64], [64, 16]):
        epoch = with_changes(
            changed, {"tune.steps": None, "train.epochs": 1, "tune.candidates": {"batches.size": sizes}}
        )
        candidates = {tune.name_of(changes): {"changes": changes} for changes in epoch.tune.combinations}
        arms = tune._arms(epoch, {name: each["changes"] for name, each in candidates.items()})
        assert tune._Runs(epoch, arms, "NDCG@10", force=False).steps in (10, 12)


def test_runs_of_other_weights_are_not_gone_on_with(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    _rung(config)
    monkeypatch.setattr(tune, "model_fingerprint", lambda folder: "of other files in the same folder")
    with pytest.raises(UsageError, match="another configuration"):
        _rung(config)


def test_a_run_that_was_cut_off_is_not_gone_on_with_in_another_configuration(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(config.workspace, tmp_path / "ws", ignore=shutil.ignore_patterns("tune"))
    own = config.model_copy(update={"workspace": str(tmp_path / "ws")})

    def cut_off(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    # Its checkpoints are there, its receipt is not.
    with monkeypatch.context() as patch:
        patch.setattr(trial.TrialWorker, "_measure", cut_off)
        with pytest.raises(KeyboardInterrupt):
            _rung(with_changes(own, {"train.learning_rate": 0.02}))
    assert set(_rung(own)) == {"temperature=0.05", "temperature=0.1"}


def test_the_prediction_names_every_source(config: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    file = Path(config.workspace).parent / "run.yaml"
    file.write_text(config.model_dump_json())
    assert main(["predict", str(file), "predict.sizes=[40,80]"]) == 0
    printed = capsys.readouterr().out
    found = Workspace(config).root.read_json(predict.PREDICTION)
    assert set(found["sources"]) == set(SUBJECTS)
    for name, source in found["sources"].items():
        assert source["rows"] == source["sampled"] == 160
        assert source["clusters"]
        assert source["why"]
        assert name in printed
    assert found["answer"].split(":")[0] in printed.replace("\n", " ")
    assert found["mixed"]["hardness"] < min(source["source"]["hardness"] for source in found["sources"].values())


def test_mined_arms_stand_in_a_comparison(config: RunConfig, tmp_path: Path) -> None:
    words = ["compare.arms=[random,random-mined,cluster-consistent,tas,tas-b]", "compare.seeds=1", "compare.steps=3"]
    words += ["compare.points=1", "mine.first=1", "mine.last=8"]
    compared = subjects_config(tmp_path, [*OVERRIDES, *words])
    manifest = compare.compare(compared)
    arms = manifest.details["arms"]
    # Mined rows need shards of their own, and they have a price.
    assert arms["random-mined"]["layout"] != arms["random"]["layout"]
    assert arms["random-mined"]["uses_embeddings"]
    assert not arms["random"]["uses_embeddings"]
    assert {row["arm"] for row in manifest.details["trials"].values()} == {"untrained", *arms} - {"untrained"}


def test_a_tuning_leaves_the_clusters_of_a_compared_sample(tmp_path: Path) -> None:
    words = ["compare.arms=[random,cluster]", "compare.seeds=1", "compare.steps=3", "compare.points=1"]
    words += ["compare.sample=0.5", "compare.sample_by=uniform", "tune.steps=2", "tune.rungs=1", "predict.rows=256"]
    words += ["tune.candidates={train.temperature: [0.05, 0.1]}"]
    config = subjects_config(tmp_path, [*OVERRIDES, *words])
    compared = compare.compare(config)
    shown = report._views(compare.with_sample(config), compared)
    tune.tune(config)
    # Neither has replaced what the other reads.
    assert compare.compare(config) == compared
    assert report._views(compare.with_sample(config), compared) == shown
    tune.tune(config)

    # Earlier versions kept a sample's clusters in the other place: they are still read there.
    whole = Path(config.workspace) / "compare" / "layouts"
    [sampled] = (Path(config.workspace) / "compare" / "samples").glob("*/layouts")
    shutil.rmtree(whole)
    sampled.rename(whole)
    assert compare.compare(config) == compared
    assert not sampled.exists()
    assert report._views(compare.with_sample(config), compared) == shown


def test_candidates_with_a_teacher_have_its_scores(config: RunConfig, tmp_path: Path) -> None:
    words = {
        "workspace": str(tmp_path),
        "reuse.corpus": config.workspace,
        "reuse.embeddings": config.workspace,
        "score.teacher": config.embed.model,
        "tune.candidates": {"train.teacher_kl": [0.0, 0.5]},
        "tune.rungs": 1,
        "tune.steps": 2,
    }
    rows = tune.tune(with_changes(config, words))["candidates"]
    assert [len(row["rungs"]) for row in rows.values()] == [1, 1]
