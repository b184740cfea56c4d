"""Devices and resources that workers ask for, by what the current executor has."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

from clusterbatch.log import say
from clusterbatch.runtime.executor import current_executor
from clusterbatch.runtime.work import Bundle, Pool


def device_for(device: str) -> str:
    """Return what `device` means here: auto is cuda if any node has a GPU, otherwise cpu.

    The driver need not see a GPU: a head node seldom has one.
    """
    if device != "auto":
        return device
    executor = current_executor()
    if executor.resources().get("GPU", 0) > 0:
        return "cuda"
    if executor.starts_nodes:
        _say_auto_is_cpu()
    return "cpu"


@cache
def _say_auto_is_cpu() -> None:
    """Warn once a process: on a cluster that starts nodes when asked, GPUs that nobody asks for never come."""
    say("no node with a GPU is up: auto means cpu; set *.device=cuda to have them started", level="warning")


def gpus_for(device: str, workers: int, each: float | None = None) -> float:
    """GPUs that each of `workers` asks for: `each`, otherwise one, or a share of one if GPUs are fewer.

    Ray shows a worker the GPUs it asked for and no others, so what auto means to the worker follows from this.
    """
    if not device_for(device).startswith("cuda"):
        return 0.0
    if each is not None:
        return each
    # None yet on a cluster that starts nodes when asked.
    gpus = int(current_executor().resources().get("GPU", 0)) or workers
    return 1 / math.ceil(workers / gpus)


def check_resources(title: str, workers: int, pool: Pool) -> None:
    """Check as `check_bundles` does, for this many workers of one pool."""
    check_bundles(title, [pool.bundle] * workers)


def check_bundles(title: str, bundles: Sequence[Bundle]) -> None:
    """Raise InfrastructureError if these workers could never run at once; wait for nodes that are being started."""
    current_executor().check_room(title, bundles)
