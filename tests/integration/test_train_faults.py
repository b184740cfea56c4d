"""Workers of the stage `train` are killed or told to go while it runs; it goes on by itself, to the same weights."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from clusterbatch.config import RunConfig, with_changes
from clusterbatch.errors import DataError, InfrastructureError, UsageError
from clusterbatch.runtime import executor
from clusterbatch.store.artifact import Manifest
from clusterbatch.store.workspace import Workspace
from clusterbatch.training.metrics import read_metrics
from clusterbatch.training.stage import train
from clusterbatch.training.worker import TrainingJob
from tests.in_process import run_in_process
from tests.training.small_run import model_weights, same_bits, small_config, write_clusters

_STEPS = 120
_SECONDS = 400


def _config(tmp_path: Path, name: str, workers: int = 2, steps: int = _STEPS) -> RunConfig:
    config = small_config(
        tmp_path,
        workspace=str(tmp_path / name),
        train={"steps": steps, "workers": workers, "trackers": ["tensorboard"], "cpus_per_worker": 0.5},
    )
    write_clusters(config)
    return config


def _job(config: RunConfig) -> TrainingJob:
    return TrainingJob(config, 0, _STEPS, config.train.model, "")


def _workers() -> list[psutil.Process]:
    """Training workers of this test's own Ray or of its own processes, no other's on this machine."""
    found = psutil.Process().children(recursive=True)
    on_ray = [process for process in found if "RayTrainWorker" in _title(process)]
    servers = [process for process in found if "fork_server" in _title(process)]
    return on_ray or [worker for server in servers for worker in server.children()]


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


class _Disturber(threading.Thread):
    """Sends a signal to one worker once the checkpoint of a step is whole, and waits until that worker is gone.

    signals: (step, signal), one after the other. steps: for each, those of the last whole checkpoint when it was sent
    and when the worker had ended.
    """

    def __init__(self, config: RunConfig, signals: list[tuple[int, int]]) -> None:
        super().__init__(daemon=True)
        self._checkpoints, self._signals = _job(config).checkpoints, signals
        self.steps: list[tuple[int, int]] = []
        self.start()

    def run(self) -> None:
        for step, number in self._signals:
            deadline = time.monotonic() + _SECONDS
            while (before := self._latest()) < step or not _workers():
                assert time.monotonic() < deadline
                time.sleep(0.05)
            worker = _workers()[-1]
            os.kill(worker.pid, number)
            worker.wait(_SECONDS)
            self.steps.append((before, self._latest()))

    def _latest(self) -> int:
        latest = self._checkpoints.latest()
        return latest.manifest.step if latest is not None else 0


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """One worker, in this process."""
    config = _config(tmp_path_factory.mktemp("finished"), "workspace", workers=1, steps=12)
    with pytest.MonkeyPatch.context() as patch:
        run_in_process(patch)
        train(config)
    return config


def _lines_of_metrics(config: RunConfig, manifest: Manifest) -> int:
    [metrics] = [part for part in manifest.parts if part.path.startswith("metrics")]
    return len(Workspace(config).train().read_part(metrics).splitlines())


def _on_this_machine(config: RunConfig) -> RunConfig:
    return with_changes(config, {"ray.mode": "local", "ray.num_cpus": 2})


@pytest.mark.slow
def test_a_lost_local_worker_is_replaced_and_nothing_else_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Tests before this one may have left a session open for others to join.
    monkeypatch.setattr(executor, "_current", None)
    undisturbed, config = (_on_this_machine(_config(tmp_path, name)) for name in ("undisturbed", "disturbed"))
    train(undisturbed)
    disturber = _Disturber(config, [(30, signal.SIGKILL)])
    manifest = train(config)
    disturber.join()
    assert 30 <= disturber.steps[0][0] < _STEPS
    assert same_bits(model_weights(_job(undisturbed)), model_weights(_job(config)))
    assert _lines_of_metrics(config, manifest) == _STEPS


@pytest.mark.slow
def test_local_workers_that_are_lost_too_often_fail_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor, "_current", None)
    config = with_changes(_on_this_machine(_config(tmp_path, "lost")), {"train.failures": 0})
    disturber = _Disturber(config, [(10, signal.SIGKILL)])
    with pytest.raises(InfrastructureError, match=r"^train: a worker was lost|^train: .*(closed|reset|gloo)"):
        train(config)
    disturber.join()


@pytest.mark.slow
def test_lost_workers_are_replaced_and_nothing_else_changes(tmp_path: Path, ray_local: None) -> None:
    undisturbed, config = _config(tmp_path, "undisturbed"), _config(tmp_path, "disturbed")
    # In processes of this machine, and on Ray: the same weights.
    train(_on_this_machine(undisturbed))
    disturber = _Disturber(config, [(30, signal.SIGKILL), (70, signal.SIGTERM)])
    manifest = train(config)
    disturber.join()
    _, (before, after) = disturber.steps
    # Told to go, a worker finishes its step and leaves a checkpoint of it.
    assert after > before
    assert same_bits(model_weights(_job(undisturbed)), model_weights(_job(config)))
    assert _lines_of_metrics(config, manifest) == _STEPS
    names = Workspace(config).train().folder.list("tensorboard")
    # Three attempts, three event files.
    assert len(names) == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "said"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
@pytest.mark.parametrize("send", [os.kill, os.killpg], ids=["process", "group"])
@pytest.mark.parametrize("mode", ["cluster", "local", "in-process"])
def test_an_interrupted_run_says_so_and_leaves_a_checkpoint_of_its_last_step(
    tmp_path: Path, number: int, code: int, said: str, mode: str, send: Callable[[int, int], None]
) -> None:
    """Whoever stops it: `kill` signals the process, a terminal and `timeout` all of its group."""
    config = with_changes(
        small_config(tmp_path, train={"steps": 5000, "workers": 1, "cpus_per_worker": 0.5, "checkpoint_every": 10}),
        {"ray.mode": mode},
    )
    write_clusters(config)
    path = tmp_path / "run.yaml"
    path.write_text(config.model_dump_json())
    process = subprocess.Popen(
        [sys.executable, "-m", "clusterbatch.cli", "train", str(path)],
        stderr=subprocess.PIPE,
        text=True,
        # A shell ignores the interrupt for what it starts in the background, and so would all that comes of it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        start_new_session=True,
    )
    checkpoints = _job(config).checkpoints
    deadline = time.monotonic() + _SECONDS
    while checkpoints.latest() is None:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.1)
    send(process.pid, number)
    _, errors = process.communicate(timeout=_SECONDS)
    assert process.returncode == code, errors
    lines = errors.splitlines()
    assert lines[-1] == f"clusterbatch: {said}; the same command continues where this one stopped"
    latest = checkpoints.latest()
    assert latest is not None
    step = latest.manifest.step
    # Told to stop, the worker finished its step: no later one is in the metrics.
    assert lines[-2] == f"train: stopped after {step:,} of 5,000 steps, with a checkpoint"
    assert [json.loads(line)["step"] for line in read_metrics(_job(config).folder).splitlines()] == list(range(step))


def test_a_finished_run_is_not_run_again_and_another_configuration_does_not_replace_it(finished: RunConfig) -> None:
    before = Workspace(finished).train().require()
    # Neither Ray nor a worker: nothing is replaced here.
    assert train(finished) == before
    other = finished.model_copy(update={"train": finished.train.model_copy(update={"learning_rate": 1e-4})})
    with pytest.raises(UsageError, match="another"):
        train(other)


def test_the_model_loads_in_sentence_transformers_and_has_a_card(finished: RunConfig) -> None:
    from sentence_transformers import SentenceTransformer

    folder = Workspace(finished).model.path()
    assert SentenceTransformer(folder, device="cpu").encode(["word1 word2"]).shape == (1, 32)
    card = Path(folder, "README.md").read_text()
    assert "830 (query, document) pairs of 2 sources" in card
    assert "12 steps of 32 pairs" in card


@pytest.fixture(
    params=["local", pytest.param("cluster", marks=[pytest.mark.slow, pytest.mark.xdist_group("ray_local")])]
)
def several(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """Keys for several workers on two cores, in processes of this machine or on Ray."""
    if request.param == "local":
        # Tests before this one may have left a session open for others to join.
        monkeypatch.setattr(executor, "_current", None)
    else:
        request.getfixturevalue("ray_local")
    return {"ray.mode": request.param, "ray.num_cpus": 2}


def test_a_damaged_shard_is_named_at_once_and_not_retried(tmp_path: Path, several: dict[str, object]) -> None:
    config = with_changes(_config(tmp_path, "damaged"), several)
    clusters = Workspace(config).clusters()
    part = next(part for part in clusters.require().parts if part.details.get("content") == "training")
    clusters.folder.write(part.path, bytes(part.bytes))
    with pytest.raises(DataError, match=part.path):
        train(config)


def test_an_elastic_run_takes_the_workers_that_there_is_room_for(tmp_path: Path, several: dict[str, object]) -> None:
    config = small_config(tmp_path, train={"steps": 3, "workers": [1, 4], "cpus_per_worker": 0.9})
    config = with_changes(config, several)
    write_clusters(config)
    train(config)
    latest = _job(config).checkpoints.latest()
    assert latest is not None
    assert latest.manifest.world_size == 2
