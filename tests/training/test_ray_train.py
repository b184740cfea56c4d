"""The driver of training on Ray: whom an interrupt waits for, and what it shows."""

from __future__ import annotations

import signal
import threading
from pathlib import Path

import pytest
import ray

from clusterbatch.training import ray_train
from clusterbatch.training.ray_train import _fit_or_stop, _progress, _Status
from clusterbatch.training.worker import TrainingJob
from tests.training.small_run import small_config


class _Trainer:
    """Interrupts the driver; ends as soon as its workers are told to stop, if it has any."""

    def __init__(self, status: ray.actor.ActorHandle, *, has_workers: bool) -> None:
        self._status, self._has_workers = status, has_workers

    def fit(self) -> None:
        if self._has_workers:
            ray.get(self._status.begin.remote())
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        stopped = threading.Event()
        while not (self._has_workers and ray.get(self._status.is_stopping.remote())):
            stopped.wait(0.1)


@pytest.mark.usefixtures("ray_local")
@pytest.mark.parametrize("has_workers", [True, False])
def test_an_interrupt_waits_for_workers_that_have_begun_and_for_no_others(
    tmp_path: Path, has_workers: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_train, "_SECONDS_TO_STOP", 20)
    config = small_config(tmp_path)
    # Test processes of pytest-xdist ignore SIGINT.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    status = _Status.remote()  # type: ignore[attr-defined]
    ray.get(status.is_stopping.remote())
    try:
        with pytest.raises(KeyboardInterrupt):
            _fit_or_stop(_Trainer(status, has_workers=has_workers), TrainingJob(config, 0, 40, "", ""), status)  # type: ignore[arg-type]
    finally:
        signal.signal(signal.SIGINT, before)
    said = capsys.readouterr().err
    assert ("stopping when the step is done" in said) == has_workers
    assert "without a checkpoint" not in said


@pytest.mark.usefixtures("ray_local")
def test_a_step_that_teaches_nothing_is_named_however_soon_others_follow(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = _Status.remote()  # type: ignore[attr-defined]
    names = ["loss", "gradient_norm", "memory_bytes", "seconds", "tokens_per_second", "data_wait"]
    figures = dict.fromkeys(names, 1.0)
    with _progress(TrainingJob(small_config(tmp_path), 0, 3, "", ""), status):
        ray.get([status.show.remote({**figures, "mfu": None, "step": n, "mask_rate": n % 2}) for n in range(3)])
    said = capsys.readouterr().err
    assert "train: in step 1 the mask ignores 100% of the negatives" in said
    assert "train: 3 steps in" in said
