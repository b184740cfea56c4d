"""The driver of ingest, embed and cluster killed at random moments and started again: the artifacts are the same.

Moments are drawn over the units of work, so that they fall into every stage. What is done twice is counted.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import IO

import pytest

from clusterbatch.config import RunConfig
from clusterbatch.pipeline.run import STAGES
from clusterbatch.runtime import metrics
from clusterbatch.store.workspace import Workspace
from tests.corpus.test_ingest import write_lines
from tests.encoder.models import make_model
from tests.in_process import run_in_process

_ROOT = Path(__file__).parents[2]
_KILLED = STAGES[:3]
_WORKERS = 2
# Says which unit is finished, as soon as the driver knows it.
_PROGRAM = """
import sys
from clusterbatch.config import RunConfig
from clusterbatch.pipeline.run import STAGES
from clusterbatch.runtime import lasting_session, metrics

finished = metrics.unit_finished

def report(title, receipt, waiting):
    finished(title, receipt, waiting)
    print(title, receipt.unit, flush=True)

metrics.unit_finished = report
config = RunConfig.model_validate_json(sys.argv[1])
with lasting_session():
    for stage in STAGES[:3]:
        stage.function(config)
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs of eight sites with rejects and duplicates, and a tiny model."""
    folder, numbers = tmp_path_factory.mktemp("killed"), random.Random(0)
    for file in range(8):
        rows = [
            {"query": f"query {file} {row}", "document": " ".join(f"w{numbers.randrange(999)}" for _ in range(40))}
            for row in range(250)
        ]
        write_lines(folder / f"in/site-{file}.jsonl", [*rows, "no json", rows[0]])
    make_model("bert", folder / "model")
    return folder


@pytest.fixture(scope="module")
def undisturbed(inputs: Path) -> tuple[RunConfig, list[str]]:
    """A run that nothing happens to, without Ray, and its units in the order in which they finished."""
    config = configured(inputs, "undisturbed")
    units: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        run_in_process(patch)
        patch.setattr(metrics, "unit_finished", lambda title, receipt, waiting: units.append(f"{title} {receipt.unit}"))
        for stage in _KILLED:
            stage.function(config)
    assert len(units) == len(set(units)) > 60
    return config, units


@pytest.mark.parametrize("kills", [pytest.param(1, marks=pytest.mark.slow), pytest.param(10, marks=pytest.mark.faults)])
def test_a_killed_driver_goes_on_to_the_same_artifacts(
    inputs: Path, undisturbed: tuple[RunConfig, list[str]], kills: int
) -> None:
    wanted, all_units = undisturbed
    config = configured(inputs, f"killed-{kills}")
    # One at random in each equal share of the units, so that every stage has its own.
    numbers, share = random.Random(kills), (len(all_units) - kills * _WORKERS) / kills
    moments = [numbers.randrange(max(1, int(share * kill)), int(share * (kill + 1))) for kill in range(kills)]
    finished: Counter[str] = Counter()
    killed = 0
    for moment in moments:
        process = start(config)
        assert process.stdout is not None
        if not count_until(process.stdout, finished, moment):
            # Units that were done but not yet counted when a driver was killed have brought the end nearer.
            assert process.wait() == 0
            break
        # A group of its own, so that Ray's processes go with it.
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        count_until(process.stdout, finished, None)
        killed += 1
    assert killed >= min(kills, 8)
    process = start(config)
    assert process.stdout is not None
    count_until(process.stdout, finished, None)
    assert process.wait() == 0
    twice = finished.total() - len(finished)
    # What the workers were at when they died is lost as well; nobody has reported it.
    lost = killed * _WORKERS
    print(
        f"{killed} kills after {moments[:killed]} of {len(all_units)} units: {twice} units done twice, at most {lost} "
        f"lost half done, {(twice + lost) / len(all_units):.1%} of the work"
    )
    # A unit that was reported has left its receipt.
    assert twice == 0
    assert set(finished) <= set(all_units)
    assert content(config) == content(wanted)
    left = [path for path in Path(config.workspace).rglob("*") if path.name in ("_receipts", "_exchange")]
    assert not left


def configured(inputs: Path, name: str) -> RunConfig:
    return RunConfig.model_validate(
        {
            "workspace": str(inputs / name),
            "corpus": {
                "paths": [str(inputs / "in")],
                "unit_bytes": 20_000,
                "part_bytes": 2**17,
                "row_group_rows": 64,
                "workers": _WORKERS,
            },
            "embed": {
                "model": str(inputs / "model"),
                "max_tokens": 32,
                "workers": _WORKERS,
                "tokenizers": 0,
                "device": "cpu",
            },
            "cluster": {"mean_size": 60, "run_rows": 16, "shard_bytes": 2**16, "workers": _WORKERS, "device": "cpu"},
            "train": {"model": str(inputs / "model")},
            "evaluate": {"holdout": 200},
            "ray": {"num_cpus": 2, "object_store_memory": 100 * 2**20},
        }
    )


def start(config: RunConfig) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(_ROOT), "RAY_ADDRESS": ""}
    command = [sys.executable, "-c", _PROGRAM, config.model_dump_json()]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True)


def count_until(lines: IO[str], finished: Counter[str], moment: int | None) -> bool:
    """Counts units as they finish, until `moment` of them have (True) or the process has ended (False)."""
    while moment is None or len(finished) < moment:
        line = lines.readline()
        if not line:
            return False
        finished[line.strip()] += 1
    return True


def content(config: RunConfig) -> dict[str, list[tuple[str, int, str]]]:
    """Kind, rows and checksum of every part of the three artifacts; the parts are read and verified."""
    found = {}
    for stage in _KILLED:
        artifact = stage.artifact(Workspace(config), 0)
        parts = artifact.require().parts
        for part in parts:
            artifact.read_part(part)
        found[stage.name] = [(part.path.rsplit("-", 1)[0], part.rows, part.checksum) for part in parts]
    return found
