"""Whole or not there; damaged is said; only superseded checkpoints go, and never the best one."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from clusterbatch.errors import DataError, InfrastructureError
from clusterbatch.store import Artifact, Folder, Part
from clusterbatch.store.artifact import MANIFEST
from clusterbatch.training import checkpoint as checkpoint_module
from clusterbatch.training.checkpoint import CheckpointManifest, Checkpoints


def _manifest(step: int, score: float | None = None) -> CheckpointManifest:
    return CheckpointManifest(
        step=step,
        run_fingerprint="run",
        plan_fingerprint="plan",
        epoch=0,
        world_size=2,
        seed=0,
        parts=[],
        score=score,
    )


def _save(checkpoints: Checkpoints, step: int, score: float | None = None) -> dict[str, torch.Tensor]:
    parameters = {"a": torch.full((3, 2), float(step)), "b": torch.arange(4.0)}
    moments = {"exp_avg/a": torch.full((3, 2), -float(step))}
    checkpoints.save(_manifest(step, score), parameters, moments)
    return parameters


def test_comes_back_as_saved_and_not_as_trained_on(tmp_path: Path) -> None:
    checkpoints = Checkpoints(Folder(str(tmp_path)), keep=2)
    parameters = _save(checkpoints, 7)
    # Training goes on while the files are written.
    parameters["a"].zero_()
    checkpoints.wait()
    latest = checkpoints.latest()
    assert latest is not None
    assert latest.manifest.step == 7
    loaded, moments = latest.load()
    assert torch.equal(loaded["a"], torch.full((3, 2), 7.0))
    assert torch.equal(moments["exp_avg/a"], torch.full((3, 2), -7.0))


def test_an_attempt_that_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a disk that is full before the last file: the next attempt needs the room."""
    checkpoints = Checkpoints(Folder(str(tmp_path)), keep=2)
    write = Artifact.write_part

    def full(self: Artifact, name: str, *arguments: Any, **details: Any) -> Part:
        if name == "moments":
            raise InfrastructureError("No space left on device")
        return write(self, name, *arguments, **details)

    monkeypatch.setattr(Artifact, "write_part", full)
    _save(checkpoints, 10)
    with pytest.raises(InfrastructureError, match="No space"):
        checkpoints.wait()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_without_its_manifest_a_checkpoint_is_not_there(tmp_path: Path) -> None:
    checkpoints = Checkpoints(Folder(str(tmp_path)), keep=2)
    for step in (10, 20):
        _save(checkpoints, step)
    checkpoints.wait()
    checkpoints.folder.remove(f"step={20:08d}/{MANIFEST}")
    latest = checkpoints.latest()
    assert latest is not None
    assert latest.manifest.step == 10


def test_damage_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    checkpoints = Checkpoints(Folder(str(tmp_path)), keep=2)
    _save(checkpoints, 10)
    checkpoints.wait()
    latest = checkpoints.latest()
    assert latest is not None
    path = latest.manifest.parts[0].path
    data = bytearray(latest.folder.read(path))
    data[-1] ^= 1
    latest.folder.write(path, bytes(data))
    with pytest.raises(DataError, match=path):
        latest.load()


def test_the_newest_are_kept_and_the_best_one_too(tmp_path: Path) -> None:
    checkpoints = Checkpoints(Folder(str(tmp_path)), keep=2)
    for step, score in ((1, 0.1), (2, 0.9), (3, None), (4, 0.5), (5, 0.4)):
        _save(checkpoints, step, score)
    checkpoints.wait()
    assert [checkpoint.manifest.step for checkpoint in checkpoints.whole()] == [2, 4, 5]
    assert len(Folder(str(tmp_path)).list()) == 3


def test_what_crashes_left_half_written_goes_with_the_next_whole_one(tmp_path: Path) -> None:
    """Each takes as much room as a whole one; if the clock decides, its step never gets another."""
    checkpoints = Checkpoints(Folder(str(tmp_path)), keep=2)
    for step in (10, 20, 30, 40):
        _save(checkpoints, step)
        checkpoints.wait()
        if step in (20, 40):
            checkpoints.folder.remove(f"step={step:08d}/{MANIFEST}")
    (tmp_path / "step=00000015-mine").mkdir()
    _save(checkpoints, 35)
    checkpoints.wait()
    # That of step 40 may be the work of another attempt, which writes its manifest yet.
    assert sorted(checkpoints.folder.list()) == [
        "step=00000015-mine",
        "step=00000030",
        "step=00000035",
        "step=00000040",
    ]
    assert [checkpoint.manifest.step for checkpoint in checkpoints.whole()] == [30, 35]


def test_many_tensors_go_into_files_of_bounded_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_module, "_FILE_BYTES", 40)
    checkpoints = Checkpoints(Folder(str(tmp_path)), keep=1)
    _save(checkpoints, 3)
    checkpoints.wait()
    latest = checkpoints.latest()
    assert latest is not None
    assert [part.rows for part in latest.manifest.parts] == [2, 1]
    monkeypatch.setattr(checkpoint_module, "_FILE_BYTES", 30)
    _save(checkpoints, 4)
    checkpoints.wait()
    latest = checkpoints.latest()
    assert latest is not None
    assert [part.rows for part in latest.manifest.parts] == [1, 1, 1]
    assert set(latest.load()[0]) == set(latest.parameters()) == {"a", "b"}


def test_what_goes_wrong_behind_the_back_is_raised_at_the_next_occasion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(Folder(str(tmp_path)), keep=1)

    def full(self: Folder, name: str, data: bytes) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(Folder, "write", full)
    _save(checkpoints, 1)
    with pytest.raises(OSError, match="no space"):
        checkpoints.wait()
    assert checkpoints.latest() is None


def test_nothing_in_a_checkpoint_needs_pickle(tmp_path: Path) -> None:
    checkpoints = Checkpoints(Folder(str(tmp_path)), keep=1)
    _save(checkpoints, 1)
    checkpoints.wait()
    names = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert names == {".safetensors", ".json"}


def test_it_is_free_once_the_files_are_written_and_does_not_wait_longer_than_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(Folder(str(tmp_path)), keep=1)
    assert checkpoints.is_free()
    may_write = threading.Event()
    write = Folder.write

    def slow(self: Folder, name: str, data: bytes) -> None:
        assert may_write.wait(60)
        write(self, name, data)

    monkeypatch.setattr(Folder, "write", slow)
    _save(checkpoints, 1)
    assert not checkpoints.is_free(within=0.05)
    may_write.set()
    assert checkpoints.is_free(within=60)
    assert checkpoints.latest() is not None
