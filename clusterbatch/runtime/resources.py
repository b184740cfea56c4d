"""Whether the cluster can hold a pool of workers: at once, after its autoscaler has started nodes, or never."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import ray

from clusterbatch.errors import InfrastructureError
from clusterbatch.log import say
from clusterbatch.runtime.session import startup_timeout

_SECONDS_BETWEEN_LOOKS = 2.0


@dataclass(frozen=True)
class Pool:
    """A fixed number of workers and what each asks of the cluster. Pools that scale by themselves tend not to."""

    workers: int
    # Below one core by default: on a small machine two workers must leave a sliver for reading and training.
    cpus: float = 0.9
    gpus: float = 0.0

    @property
    def bundle(self) -> dict[str, float]:
        """What one worker asks for, by Ray's names."""
        return {name: amount for name, amount in (("CPU", self.cpus), ("GPU", self.gpus)) if amount}


def device_for(device: str) -> str:
    """What `device` means on this cluster: auto is cuda where any of its nodes has a GPU, and cpu elsewhere.

    The driver need not see a GPU: a head node seldom has one.
    """
    if device != "auto":
        return device
    return "cuda" if ray.cluster_resources().get("GPU", 0) > 0 else "cpu"


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
    """Raises InfrastructureError where the cluster could never start `workers` of the pool (it would wait for ever).

    With ray.startup_timeout the cluster's autoscaler is asked for the nodes first, and has so long to start them. The
    workers themselves keep the nodes from then on, so the request is withdrawn, and idle nodes go when they have ended.
    """
    if ray.util.client.ray.is_connected():
        return
    deadline = time.monotonic() + startup_timeout()
    asked = False
    try:
        while (shortage := _shortage(workers, pool)) is not None:
            if time.monotonic() >= deadline:
                raise InfrastructureError(f"{title}: {shortage}")
            if not asked:
                asked = True
                # Only where something is short: it costs each process some tenths of a second.
                from ray.autoscaler.sdk import request_resources

                say(f"{title}: {shortage}; waiting for nodes")
                request_resources(bundles=[pool.bundle] * workers)
            time.sleep(_SECONDS_BETWEEN_LOOKS)
    finally:
        if asked:
            request_resources(bundles=[])


def _shortage(workers: int, pool: Pool) -> str | None:
    """What is missing, in words; None where all workers find a place on the nodes that are there."""
    bundle = pool.bundle
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for name, amount in bundle.items():
        if not any(node.get(name, 0) >= amount for node in nodes):
            return f"a worker needs {amount:g} {name}, no node of the cluster has that"
    places = sum(min(int(node.get(name, 0) / amount + 1e-9) for name, amount in bundle.items()) for node in nodes)
    if places >= workers:
        return None
    wanted = " and ".join(f"{amount:g} {name}" for name, amount in bundle.items())
    return f"{workers} workers of {wanted} each, the cluster has room for {places}; ask for fewer workers"
