"""SIGTERM, as an orchestrator sends it: one line, an exit code of its own, and none of Ray's stacks."""

import signal
import subprocess
import sys

import pytest

_PROGRAM = """
import argparse, sys, time
from clusterbatch import cli
from clusterbatch.config import RayConfig
from clusterbatch.runtime import ray_session

def action(options):
    with ray_session(RayConfig(mode="cluster", num_cpus=1)):
        print("ready", flush=True)
        time.sleep(120)

cli._parse = lambda arguments: argparse.Namespace(action=action)
sys.exit(cli.main())
"""


@pytest.mark.slow
def test_a_terminated_run_says_so_in_one_line() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", _PROGRAM], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143
    assert errors.splitlines() == ["clusterbatch: terminated; the same command continues where this one stopped"]
