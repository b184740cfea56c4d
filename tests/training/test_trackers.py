from __future__ import annotations

import importlib.machinery
import sys
import types
from pathlib import Path
from unittest.mock import MagicMock

import pytest

from clusterbatch.errors import InfrastructureError, UsageError
from clusterbatch.store import Folder
from clusterbatch.training.collectives import World
from clusterbatch.training.metrics import check_trackers, figures_of, open_trackers
from tests.training.small_run import model_weights, small_config, small_job, train_on_rank, write_clusters


def _scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, round(event.value, 3)) for event in events.Scalars(name)]


def test_tensorboard_shows_each_step_once_after_a_crash(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    first = open_trackers(["tensorboard"], folder, "run", 0, {})
    for step in range(4):
        first.add(step, {"loss": step / 10})
    first.flush()
    # Steps 4 and 5 come after the last checkpoint, and then the process is gone.
    for step in (4, 5):
        first.add(step, {"loss": 9.0})
    second = open_trackers(["tensorboard"], folder, "run", 4, {})
    for step in (4, 5):
        second.add(step, {"loss": step / 10})
    second.flush()
    second.close()
    assert _scalars(tmp_path / "tensorboard", "loss") == [(step, step / 10) for step in range(6)]


def test_mlflow_goes_on_under_the_same_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = MagicMock()
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    fake.search_runs.return_value = []
    tracker = open_trackers(["mlflow"], Folder(str(tmp_path)), "abc", 0, {"train": {"seed": 1}})
    tracker.add(3, {"loss": 1.5})
    tracker.close()
    assert fake.start_run.call_args.kwargs == {"run_id": None, "tags": {"run": "abc"}}
    fake.log_metrics.assert_called_once_with({"loss": 1.5}, step=3)
    fake.end_run.assert_called_once_with()

    fake.search_runs.return_value = [types.SimpleNamespace(info=types.SimpleNamespace(run_id="id of abc"))]
    open_trackers(["mlflow"], Folder(str(tmp_path)), "abc", 4, {})
    assert fake.start_run.call_args.kwargs["run_id"] == "id of abc"
    assert fake.log_params.call_count == 1


def test_weights_and_biases_resumes_by_id(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = MagicMock()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    tracker = open_trackers(["wandb"], Folder(str(tmp_path)), "abc", 0, {})
    tracker.add(3, {"loss": 1.5})
    tracker.close()
    assert fake.init.call_args.kwargs["id"] == "abc"
    assert fake.init.call_args.kwargs["resume"] == "allow"
    fake.init.return_value.log.assert_called_once_with({"loss": 1.5}, step=3)


class Down(Exception):
    pass


@pytest.mark.parametrize("call", ["log_metrics", "end_run"])
def test_a_server_that_is_down_ends_no_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], call: str
) -> None:
    """Nor is the model left unwritten that a run of days has trained."""
    fake = MagicMock()
    # Other packages ask whether it is installed.
    fake.__spec__ = importlib.machinery.ModuleSpec("mlflow", None)
    getattr(fake, call).side_effect = Down("500 Server Error")
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    config = small_config(tmp_path, train={"steps": 3, "trackers": ["tensorboard", "mlflow"]})
    write_clusters(config)
    job = small_job(config)
    train_on_rank(World(), job)
    assert model_weights(job)
    assert [step for step, _ in _scalars(tmp_path / "workspace/generation=000/train/tensorboard", "loss")] == [0, 1, 2]
    assert fake.log_metrics.call_count == (1 if call == "log_metrics" else 3)
    assert capsys.readouterr().err.count("mlflow failed and gets no more figures (500 Server Error)") == 1


def test_a_server_that_is_not_there_is_one_clear_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = MagicMock()
    fake.search_runs.side_effect = Down("connection refused")
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    with pytest.raises(InfrastructureError, match=r"train\.trackers: mlflow cannot be opened \(connection refused\)"):
        open_trackers(["mlflow"], Folder(str(tmp_path)), "abc", 0, {})


def test_a_missing_package_is_one_clear_line() -> None:
    with pytest.raises(UsageError, match="the package no_such_tracker is not installed"):
        check_trackers(["tensorboard", "no_such_tracker"])


def test_only_numbers_are_figures() -> None:
    assert figures_of({"step": 3, "loss": 1, "mfu": None, "stratum": "a", "purity": 0.5}) == {
        "loss": 1.0,
        "purity": 0.5,
    }
