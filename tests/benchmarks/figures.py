"""How a benchmark says a figure: one JSON line, the same keys everywhere, judged by the promise of that name."""

from __future__ import annotations

import json
import os
import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tests.benchmarks.promises import PROMISES

_VERSIONS = ("clusterbatch", "torch", "numpy", "ray", "sentence-transformers", "faiss-cpu", "scikit-learn")


def emit(
    figure: str, value: float, unit: str = "", *, case: str = "", peer: float | None = None, **details: Any
) -> None:
    """Prints `figure`: ours (`value`), the peer's, and ratio = value / peer; `case` tells rows of one figure apart.

    `promise` and `kept` follow from PROMISES. `details` are for people: rounds, sizes, and what else was seen.
    """
    ratio = value / peer if peer else None
    promise = PROMISES.get(figure)
    line: dict[str, Any] = {
        "figure": figure,
        "case": case,
        "value": value,
        "unit": unit,
        "peer": peer,
        "ratio": ratio,
        "promise": str(promise) if promise else None,
        "kept": promise.kept(value, ratio) if promise else None,
        **details,
    }
    rounded = {key: float(f"{entry:.5g}") if isinstance(entry, float) else entry for key, entry in line.items()}
    print(json.dumps({**rounded, "machine": machine()}), flush=True)


@cache
def machine() -> dict[str, Any]:
    """What the figures were measured on: processor, cores, memory in GiB, GPU, versions."""
    import torch

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "cpu": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": _installed(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _installed() -> dict[str, str]:
    found = {}
    for name in _VERSIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
