"""Rank 0 reads for all: the others begin where it does, with its tensors, and learn that it could not."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from clusterbatch.encoder.load import load_encoder
from clusterbatch.errors import DataError
from clusterbatch.store import Artifact
from clusterbatch.training import worker
from clusterbatch.training.checkpoint import Checkpoints
from clusterbatch.training.collectives import World
from clusterbatch.training.resume import Start, resume
from clusterbatch.training.step import TrainingStep
from clusterbatch.training.worker import TrainingJob
from tests.training.small_run import small_config, small_job, train_on_rank, train_until_asked_to_stop, write_clusters
from tests.training.worlds import run_world


def _resumed(world: World, model: str, folder: str) -> tuple[int, float, float, float]:
    """First step, and sums of parameters and moments, of a start that only rank 0 can read."""
    config = small_config(Path(folder), train={"model": model})
    training = TrainingStep(load_encoder(model, "backbone"), config.train, 40, world)

    def read() -> Start:
        assert world.rank == 0
        parameters, moments = training.blank()
        return Start(
            7,
            9,
            (
                {name: torch.full_like(value, 0.5) for name, value in parameters.items()},
                {name: torch.full_like(value, 0.25) for name, value in moments.items()},
            ),
        )

    first_step = resume(training, read)
    parameters, moments = training.state()
    elements = sum(value.numel() for value in parameters.values())
    counts = {float(state["step"]) for state in training.optimizer._adamw.state.values()}
    return (
        first_step,
        float(sum(value.double().sum() for value in parameters.values())) / elements,
        float(sum(value.double().sum() for value in moments.values())) / elements / 2,
        counts.pop() if len(counts) == 1 else -1.0,
    )


def test_all_ranks_begin_as_the_first_one_read(tmp_path: Path) -> None:
    model = small_config(tmp_path).train.model
    assert run_world(3, _resumed, model, str(tmp_path)) == [(7, 0.5, 0.25, 9.0)] * 3


def _refused(world: World, model: str, folder: str) -> str:
    config = small_config(Path(folder), train={"model": model})
    training = TrainingStep(load_encoder(model, "backbone"), config.train, 40, world)

    def read() -> Start:
        raise DataError("damaged")

    try:
        resume(training, read)
    except (DataError, RuntimeError) as error:
        return str(error)
    return "went on"


def test_what_the_first_cannot_read_is_told_to_all(tmp_path: Path) -> None:
    model = small_config(tmp_path).train.model
    assert run_world(2, _refused, model, str(tmp_path)) == ["damaged", "rank 0 could not read the checkpoint"]


def test_a_fresh_run_begins_at_its_first_step(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    training = TrainingStep(load_encoder(config.train.model, "backbone"), config.train, 40, World())
    assert resume(training, lambda: Start(0, 0, None)) == 0
    assert not any(moment.any() for moment in training.state()[1].values())


def _stopped_while_storage_is_slow(world: World, job: TrainingJob) -> tuple[str, bool]:
    """What the loop says, and whether the checkpoint was whole when this rank heard of it."""
    write = Checkpoints._write

    def slow(self: Checkpoints, *arguments: Any) -> None:
        time.sleep(1.5)
        write(self, *arguments)

    with mock.patch.object(Checkpoints, "_write", slow):
        said = train_until_asked_to_stop(world, job, 3)
        latest = job.checkpoints.latest()
    return said, latest is not None and latest.manifest.step == 3


def test_no_rank_leaves_before_the_checkpoint_of_a_stop_is_written(tmp_path: Path) -> None:
    config = small_config(tmp_path, train={"checkpoint_every": 100})
    write_clusters(config)
    found = run_world(2, _stopped_while_storage_is_slow, small_job(config))
    assert found == [("stopped after step 3, as asked; its checkpoint is written", True)] * 2


def test_a_damaged_checkpoint_names_its_file(tmp_path: Path) -> None:
    config = small_config(tmp_path, train={"steps": 4, "checkpoint_every": 2})
    write_clusters(config)
    job = small_job(config)
    assert run_world(1, train_until_asked_to_stop, job, 3) == [
        "stopped after step 3, as asked; its checkpoint is written"
    ]
    latest = job.checkpoints.latest()
    assert latest is not None
    path = latest.manifest.parts[0].path
    latest.folder.write(path, b"cut off")
    with pytest.raises(DataError, match=path):
        train_on_rank(World(), job)


@pytest.mark.parametrize("ending", ["a score", "a stop"])
def test_no_rank_waits_in_a_collective_for_storage_that_is_slow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    """A checkpoint that cannot be left out comes while the one before is still being written."""
    asked = threading.Event()

    def wait_until(self: World, is_ready: Callable[[], bool], device: torch.device) -> None:
        asked.set()
        while not is_ready():
            time.sleep(0.01)

    write = Artifact.write_part

    def slow(self: Artifact, *arguments: Any, **details: Any) -> Any:
        assert self.kind != "checkpoint" or asked.wait(20), "rank 0 alone waits"
        return write(self, *arguments, **details)

    monkeypatch.setattr(World, "wait_until", wait_until)
    monkeypatch.setattr(Artifact, "write_part", slow)
    monkeypatch.setattr(worker.Validation, "__init__", lambda self, *arguments: None)
    monkeypatch.setattr(worker.Validation, "measure", lambda self, encoder: 0.5)
    scored = {"evaluate_path": str(tmp_path), "evaluate_every": 2} if ending == "a score" else {}
    config = small_config(tmp_path, train={"steps": 6, "checkpoint_every": 1, "collective_timeout": 0.1, **scored})
    write_clusters(config)
    job = small_job(config)
    if scored:
        train_on_rank(World(), job)
    else:
        assert "stopped after step 2" in train_until_asked_to_stop(World(), job, 2)
    assert asked.is_set()
