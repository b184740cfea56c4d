"""What a run of an arm costs: its own training, and what it needs of the stages that the arms share. No Ray."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clusterbatch.config import RunConfig
from clusterbatch.config.compare import PricesConfig
from clusterbatch.store import Manifest
from clusterbatch.store.traffic import Traffic
from clusterbatch.store.workspace import Workspace


@dataclass(frozen=True)
class Cost:
    """Of one run of an arm with the shared stages that it needs: worker hours (a core's or a GPU's) and their price.

    seconds: of its training alone; shared_seconds: of all workers of embedding, mining and clustering, 0 where the arm
    needs none of them; training_price: what of the price is the training's; traffic: what the run and those stages
    asked of storage; device: `cpu` or `cuda`, what it trained on.
    """

    seconds: float
    shared_seconds: float
    hours: float
    price: float
    training_price: float
    traffic: Traffic
    device: str


def shared_costs(
    config: RunConfig, data: RunConfig, layouts: Mapping[str, RunConfig], clusters: Mapping[str, Manifest]
) -> dict[str, Any]:
    """What the shared stages took, as the details of a comparison's manifest keep it.

    worker_seconds, traffic: of `embed`, and of `mine` and `cluster` by layout; embed_device: None where it was left to
    the machine. data: `config` with the sample, if there is one, in place of its corpus and embeddings; clusters: of
    every layout.
    """
    embedded = paid = Workspace(data).embeddings().versions()
    share = 1.0
    if config.reuse.embeddings and config.compare.sample:
        # The vectors of a sample come with its rows: it has its share of what those of the whole corpus took.
        paid, share = Workspace(config).embeddings().versions(), config.compare.sample
    mined = {name: Workspace(layout).mined().require() for name, layout in layouts.items() if layout.mine.is_on}
    return {
        "worker_seconds": {
            "embed": share * sum(worker_seconds(each, config.embed.workers) for each in paid),
            "mine": {name: _mining_seconds(made, layouts[name].mine.workers) for name, made in mined.items()},
            "cluster": {name: worker_seconds(made, layouts[name].cluster.workers) for name, made in clusters.items()},
        },
        "traffic": {
            "embed": sum((each.traffic for each in embedded), Traffic()).model_dump(),
            "mine": {name: made.traffic.model_dump() for name, made in mined.items()},
            "cluster": {name: made.traffic.model_dump() for name, made in clusters.items()},
        },
        "embed_device": _device(paid[-1]),
    }


def worker_seconds(made: Manifest, workers: int) -> float:
    """Of all workers of a stage, in whichever session they worked.

    At least the wall time of the last session: what is done beside the units (a surrogate is fitted, say) keeps one
    worker busy. Manifests that know no seconds of workers: that wall time, by all `workers` of the stage; the
    embeddings' know how many made them.
    """
    if made.worker_seconds is None:
        return made.seconds * int(made.config.get("workers", workers))
    return max(made.worker_seconds, made.seconds)


def cost_of(config: RunConfig, details: Mapping[str, Any], name: str, trials: Sequence[Mapping[str, Any]]) -> Cost:
    """Of one of the `trials`, all of the arm `name`; details: of the comparison's manifest.

    Mining asks for no GPU, and embeddings may say what they were made on. Else the shared stages are priced as if they
    had run on what the arm trained on.
    """
    arm, prices, device = details["arms"][name], config.compare.prices, str(trials[0]["device"])
    layout, spent, asked = arm["layout"], _shared_seconds(config, details), details["traffic"]
    # (seconds, device, traffic) of each stage that it needs.
    needed: list[tuple[float, str, Mapping[str, int]]] = []
    if arm["uses_embeddings"]:
        needed.append((spent["embed"], details.get("embed_device") or device, asked["embed"]))
    if layout in spent["mine"]:
        needed.append((spent["mine"][layout], "cpu", asked["mine"][layout]))
    if arm["uses_clusters"]:
        needed.append((spent["cluster"][layout], device, asked["cluster"][layout]))
    training = float(np.mean([trial["seconds_training"] for trial in trials]))
    own = _mean_traffic([Traffic(**trial["traffic"]) for trial in trials])
    training_price = _price(prices, training, device, own)
    shared = sum(seconds for seconds, _, _ in needed)
    return Cost(
        seconds=training,
        shared_seconds=shared,
        hours=(training + shared) / 3600,
        price=training_price + sum(_price(prices, seconds, on, Traffic(**traffic)) for seconds, on, traffic in needed),
        training_price=training_price,
        traffic=sum((Traffic(**traffic) for _, _, traffic in needed), own),
        device=device,
    )


def extra_cost(own: Cost, other: Cost) -> float:
    """What `own` costs beyond `other`, as a share of that: by price; where nothing has one, by worker hours."""
    one, reference = (own.price, other.price) if other.price else (own.hours, other.hours)
    return one / reference - 1 if reference else math.inf


def _mining_seconds(made: Manifest, workers: int) -> float:
    # Its units are those of the search; rows are gathered for it before, by all workers.
    return max(made.worker_seconds or 0.0, made.seconds * workers)


def _device(made: Manifest) -> str | None:
    device = str(made.config.get("device", "auto"))
    return None if device == "auto" else device.partition(":")[0]


def _shared_seconds(config: RunConfig, details: Mapping[str, Any]) -> Mapping[str, Any]:
    """`worker_seconds`; of comparisons that know none, wall times by all workers, and nothing of mining."""
    if "worker_seconds" in details:
        found: Mapping[str, Any] = details["worker_seconds"]
        return found
    wall = details["seconds"]
    clustered = {layout: seconds * config.cluster.workers for layout, seconds in wall["cluster"].items()}
    return {"embed": wall["embed"] * config.embed.workers, "mine": {}, "cluster": clustered}


def _mean_traffic(each: Sequence[Traffic]) -> Traffic:
    return Traffic(**{key: round(np.mean([getattr(one, key) for one in each])) for key in Traffic.model_fields})


def _price(prices: PricesConfig, seconds: float, device: str, traffic: Traffic) -> float:
    hourly = prices.gpu_hour if device == "cuda" else prices.cpu_hour
    storage = traffic.reads / 1e6 * prices.million_reads + traffic.writes / 1e6 * prices.million_writes
    return seconds / 3600 * hourly + storage + traffic.bytes_read / 2**30 * prices.gibibyte_read
