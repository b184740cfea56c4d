"""`clusterbatch refresh` is killed (SIGKILL) at ten random moments of its time; it comes to the undisturbed model."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from clusterbatch.store.publishing import live_generation
from clusterbatch.store.rounds import rounds
from clusterbatch.store.workspace import Workspace
from tests.integration.subjects import subjects_config

pytestmark = pytest.mark.faults

_KILLS = 10
_SECONDS = 600
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


def test_killed_at_ten_random_moments(tmp_path: Path) -> None:
    config = subjects_config(tmp_path, _SETTINGS)
    file = tmp_path / "run.yaml"
    file.write_text(config.model_dump_json())
    # One first generation for both; its own kills are other tests'.
    first = [sys.executable, "-m", "clusterbatch.cli", "run", str(file)]
    subprocess.run(first, check=True, capture_output=True, timeout=_SECONDS)
    disturbed = str(tmp_path / "disturbed")
    shutil.copytree(config.workspace, disturbed)

    begun = time.monotonic()
    undisturbed = json.loads(_finished(_start(file, config.workspace)))
    whole = time.monotonic() - begun

    moments = random.Random(7)
    kills = 0
    for _ in range(_KILLS):
        process = _start(file, disturbed)
        try:
            # It starts anew each time: moments count from where Ray is up, about a third of the way.
            process.wait(moments.uniform(0.2, 1.0) * whole)
            break
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            kills += 1
    else:
        process = _start(file, disturbed)
    found = json.loads(_finished(process))

    assert kills >= 3
    assert found["live_generation"] == undisturbed["live_generation"] == 2
    one, other = (Workspace(config.model_copy(update={"workspace": uri})) for uri in (config.workspace, disturbed))
    assert [record.own_value for record in rounds(one)] == [record.own_value for record in rounds(other)]
    assert live_generation(other) == 2
    for generation in (1, 2):
        weights = [place.trained_model(generation).read("model.safetensors") for place in (one, other)]
        assert weights[0] == weights[1]
