"""One benchmark in a process of its own: what it printed, or why it did not run."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from tests.benchmarks.catalogue import COMPARISON, DATA, GPU, NEEDS, WORKSPACE, Benchmark
from tests.data_folder import data_folder


class Given(NamedTuple):
    workspace: str | None = None
    comparison: str | None = None
    quick: bool = False


@dataclass
class Outcome:
    name: str
    command: str
    """To be copied; the words in braces are those of `missing`."""

    seconds: float = 0.0
    figures: list[dict[str, Any]] = field(default_factory=list)
    missing: str = ""
    failure: str = ""


def run(benchmark: Benchmark, given: Given) -> Outcome:
    """Runs it, unless what it needs is not there."""
    there = {
        DATA: data_folder(),
        WORKSPACE: given.workspace,
        COMPARISON: given.comparison,
        GPU: torch.cuda.is_available(),
    }
    words = benchmark.quick if given.quick else benchmark.full
    if benchmark.needs and not there[benchmark.needs]:
        return Outcome(benchmark.name, _command(benchmark.module, words), missing=NEEDS[benchmark.needs])
    words = words.format(workspace=given.workspace, comparison=given.comparison)
    outcome = Outcome(benchmark.name, _command(benchmark.module, words))
    start = time.perf_counter()
    command = [sys.executable, "-m", f"tests.benchmarks.{benchmark.module}", *shlex.split(words)]
    # What it says besides its figures goes to the terminal as it comes.
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    outcome.seconds = time.perf_counter() - start
    outcome.figures = figures_of(done.stdout)
    if done.returncode or not outcome.figures:
        outcome.failure = f"ended with {done.returncode} after {len(outcome.figures)} figures"
    return outcome


def figures_of(printed: str) -> list[dict[str, Any]]:
    """The lines that are figures; a stage under measurement may print others."""
    found = []
    for line in printed.splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and "figure" in entry:
            found.append(entry)
    return found


def _command(module: str, words: str) -> str:
    return f"python -m tests.benchmarks.{module} {words}".strip()
