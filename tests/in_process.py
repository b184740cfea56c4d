"""The in-process executor for tests, whatever the configuration says.

The work is the same; starting processes is what takes most of the time of a small run.
"""

from __future__ import annotations

import pytest

from clusterbatch.runtime import InProcessExecutor, executor

# With these no stage prepares elsewhere, or asks what the machine has.
OVERRIDES = [
    "embed.device=cpu",
    "embed.tokenizers=0",
    "cluster.device=cpu",
    "train.device=cpu",
    "evaluate.device=cpu",
    "train.trackers=[]",
]


def run_in_process(patch: pytest.MonkeyPatch) -> None:
    """Run every stage in this process from now on, items last first, as no result may depend on their order."""
    patch.setattr(executor, "_current", InProcessExecutor(reverse=True))


# For a process of its own: `python -c DRIVER STAGE CONFIG.json PASS UNITS` ends by its own hand, as a lost machine
# would, when so many units of a pass are whole.
DRIVER = """
import importlib, os, signal, sys
import pytest
from clusterbatch.config import RunConfig
from clusterbatch.runtime import metrics
from tests.in_process import run_in_process

run_in_process(pytest.MonkeyPatch())
_, stage, config, title, units = sys.argv
seen = 0

def counting(of_pass, receipt, waiting):
    global seen
    seen += of_pass == title
    if seen == int(units):
        os.kill(os.getpid(), signal.SIGKILL)

metrics.unit_finished = counting
room = {"embed": "embedding", "cluster": "shards"}[stage]
function = getattr(importlib.import_module(f"clusterbatch.{room}.stage"), stage)
function(RunConfig.model_validate_json(open(config).read()))
"""
