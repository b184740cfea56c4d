"""`clusterbatch refresh` is killed (SIGKILL) at ten random moments; it comes to the undisturbed model."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from clusterbatch.pipeline.rounds import rounds
from clusterbatch.store.workspace import Workspace, live_generation
from tests.integration.faults.harness import files
from tests.integration.subjects import subjects_config

pytestmark = pytest.mark.faults

_KILLS = 10
_SECONDS = 600
# What has just been committed is not all that a kill may hit.
_SECONDS_AFTER = 1.5
_SETTINGS = [
    "refresh.rounds=2",
    "refresh.every_steps=40",
    "refresh.sample=256",
    "refresh.margin=1.0",
    "train.steps=20",
    "train.checkpoint_every=5",
    "train.deterministic=true",
    "train.workers=2",
    "train.trackers=[]",
    "ray.num_cpus=2",
]


def _start(file: Path, workspace: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "clusterbatch.cli", "refresh", str(file), f"workspace={workspace}", "--json"]
    # A group of its own: what Ray has started goes with it.
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def _finished(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=_SECONDS)
    assert process.returncode == 0, err
    return out


def _commits(workspace: str) -> set[str]:
    """Receipts, manifests and records that are there."""
    return {path.relative_to(workspace).as_posix() for path in files(Path(workspace)) if path.suffix == ".json"}


def _watch(process: subprocess.Popen[str], workspace: str, seen: set[str], until: float = math.inf) -> bool:
    """Adds to `seen` what is committed, until that is `until` (True) or the process has ended (False)."""
    started = time.monotonic()
    while len(seen) < until:
        # Asked first: what was committed before the end is seen.
        ended = process.poll() is not None
        seen |= _commits(workspace)
        if ended:
            return False
        assert time.monotonic() - started < _SECONDS, "hangs"
        time.sleep(0.02)
    return True


def test_killed_at_ten_random_moments(tmp_path: Path) -> None:
    config = subjects_config(tmp_path, _SETTINGS)
    file = tmp_path / "run.yaml"
    file.write_text(config.model_dump_json())
    # One first generation for both; its own kills are other tests'.
    first = [sys.executable, "-m", "clusterbatch.cli", "run", str(file)]
    subprocess.run(first, check=True, capture_output=True, timeout=_SECONDS)
    disturbed = str(tmp_path / "disturbed")
    shutil.copytree(config.workspace, disturbed)

    before = _commits(disturbed)
    begun = time.monotonic()
    process = _start(file, config.workspace)
    all_commits = set(before)
    _watch(process, config.workspace, all_commits)
    undisturbed = json.loads(_finished(process))
    whole = time.monotonic() - begun
    commits = len(all_commits - before)

    # One at random in each equal share of the commits, so that every stage of both rounds has its own.
    numbers, share = random.Random(7), 0.9 * commits / _KILLS
    seen, kills, begun = set(before), 0, time.monotonic()
    for kill in range(_KILLS):
        process = _start(file, disturbed)
        # Something new at least: a driver that is killed while it starts has done nothing.
        moment = max(len(before) + share * (kill + numbers.random()), len(seen) + 1)
        if not _watch(process, disturbed, seen, moment):
            break
        time.sleep(numbers.uniform(0, _SECONDS_AFTER))
        if process.poll() is not None:
            break
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        seen |= _commits(disturbed)
        kills += 1
    else:
        process = _start(file, disturbed)
    found = json.loads(_finished(process))
    print(
        f"{kills} kills over {commits} commits; {time.monotonic() - begun:.0f} s with {kills + 1} starts, "
        f"{whole:.0f} s undisturbed with one"
    )

    assert kills >= 8
    assert found["live_generation"] == undisturbed["live_generation"] == 2
    one, other = (Workspace(config.model_copy(update={"workspace": uri})) for uri in (config.workspace, disturbed))
    assert [record.own_value for record in rounds(one)] == [record.own_value for record in rounds(other)]
    assert live_generation(other) == 2
    for generation in (1, 2):
        weights = [place.trained_model(generation).read("model.safetensors") for place in (one, other)]
        assert weights[0] == weights[1]
