"""Whether the cluster can hold a pool of workers: at once, after its autoscaler has started nodes, or never."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import ray

from clusterbatch.errors import InfrastructureError
from clusterbatch.log import say
from clusterbatch.runtime.session import startup_timeout

_SECONDS_BETWEEN_LOOKS = 2.0

# What one worker asks for, by Ray's names.
Bundle = dict[str, float]


@dataclass(frozen=True)
class Pool:
    """A fixed number of workers and what each asks of the cluster. Pools that scale by themselves tend not to."""

    workers: int
    # Below one core by default: on a small machine two workers must leave a sliver for reading and training.
    cpus: float = 0.9
    gpus: float = 0.0

    @property
    def bundle(self) -> Bundle:
        return {name: amount for name, amount in (("CPU", self.cpus), ("GPU", self.gpus)) if amount}


def device_for(device: str) -> str:
    """What `device` means on this cluster: auto is cuda where any of its nodes has a GPU, and cpu elsewhere.

    The driver need not see a GPU: a head node seldom has one.
    """
    if device != "auto":
        return device
    if ray.cluster_resources().get("GPU", 0) > 0:
        return "cuda"
    if startup_timeout() > 0:
        _say_auto_is_cpu()
    return "cpu"


@cache
def _say_auto_is_cpu() -> None:
    """Once a process: on a cluster that starts nodes when asked, GPUs that nobody asks for never come."""
    say("no node with a GPU is up: auto means cpu; set *.device=cuda to have them started", level="warning")


def gpus_for(device: str, workers: int, each: float | None = None) -> float:
    """GPUs that each of `workers` asks for: `each`, else one; where there are fewer GPUs than workers, they share them.

    Ray shows a worker the GPUs it asked for and no others, so what auto means to the worker follows from this.
    """
    if not device_for(device).startswith("cuda"):
        return 0.0
    if each is not None:
        return each
    # None yet on a cluster that starts nodes when asked.
    gpus = int(ray.cluster_resources().get("GPU", 0)) or workers
    return 1 / math.ceil(workers / gpus)


def check_resources(title: str, workers: int, pool: Pool) -> None:
    """As `check_bundles`, for so many workers of one pool."""
    check_bundles(title, [pool.bundle] * workers)


def check_bundles(title: str, bundles: Sequence[Bundle]) -> None:
    """Raises InfrastructureError where the cluster could never start these workers at once: they would wait for ever.

    With ray.startup_timeout the cluster's autoscaler is asked for the nodes first, and has so long to start them. The
    workers themselves keep the nodes from then on, so the request is withdrawn, and idle nodes go when they have ended.
    """
    if ray.util.client.ray.is_connected():
        return
    deadline = time.monotonic() + startup_timeout()
    asked = False
    try:
        while (shortage := _shortage(bundles)) is not None:
            if time.monotonic() >= deadline:
                raise InfrastructureError(f"{title}: {shortage}")
            if not asked:
                asked = True
                # Only where something is short: it costs each process some tenths of a second.
                from ray.autoscaler.sdk import request_resources

                say(f"{title}: {shortage}; waiting for nodes")
                request_resources(bundles=list(bundles))
            time.sleep(_SECONDS_BETWEEN_LOOKS)
    finally:
        if asked:
            request_resources(bundles=[])


def _shortage(bundles: Sequence[Bundle]) -> str | None:
    """What is missing, in words; None where all workers find a place on the nodes that are there."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for bundle in bundles:
        for name, amount in bundle.items():
            if not any(node.get(name, 0) >= amount for node in nodes):
                return f"a worker needs {amount:g} {name}, no node of the cluster has that"
    places = _places(bundles, nodes)
    if places == len(bundles):
        return None
    kinds = Counter(" and ".join(f"{amount:g} {name}" for name, amount in bundle.items()) for bundle in bundles)
    wanted = " beside ".join(f"{workers} workers of {kind} each" for kind, workers in kinds.items())
    return f"{wanted}, the cluster has room for {places}; ask for fewer workers"


def _places(bundles: Sequence[Bundle], nodes: Sequence[Bundle]) -> int:
    """How many of the bundles find a place, each on the first node that has what it wants.

    The largest first: those that want GPUs, which few nodes have, then those that want many CPUs.
    """
    free = [dict(node) for node in nodes]
    places = 0
    for bundle in sorted(bundles, key=lambda bundle: (bundle.get("GPU", 0), bundle.get("CPU", 0)), reverse=True):
        # Shares of a CPU or a GPU that add up to a whole one may do so only nearly.
        fits = (node for node in free if all(node.get(name, 0) >= amount - 1e-9 for name, amount in bundle.items()))
        node = next(fits, None)
        if node is not None:
            places += 1
            for name, amount in bundle.items():
                node[name] -= amount
    return places
