"""Cost of a run of an arm: its own training, and its need of the stages that the arms share. No Ray."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from clusterbatch.config import RunConfig
from clusterbatch.config.compare import PricesConfig
from clusterbatch.store import Manifest
from clusterbatch.store.details import ComparisonDetails, SharedCosts, StageSeconds, StageTraffic, TrialDetails
from clusterbatch.store.traffic import Traffic
from clusterbatch.store.workspace import Workspace


@dataclass(frozen=True)
class Cost:
    """Cost of one run of an arm with the shared stages that it needs.

    seconds: of its training alone; shared_seconds: of all workers of embedding, mining and clustering, 0 if the arm
    needs none of them; hours: worker hours (a core's or a GPU's) of both; gpu_hours: those of GPUs among them; price,
    and training_price, the training's share of it: None if nothing has a price; traffic: requests to storage and bytes
    of the run and those stages; device: `cpu` or `cuda`, of the training.
    """

    seconds: float
    shared_seconds: float
    hours: float
    gpu_hours: float
    price: float | None
    training_price: float | None
    traffic: Traffic
    device: str


def shared_costs(
    config: RunConfig,
    data: RunConfig,
    layouts: Mapping[str, RunConfig],
    clusters: Mapping[str, Manifest],
    scores: Mapping[str, Manifest],
) -> SharedCosts:
    """Return seconds and traffic of the shared stages, as the details of a comparison's manifest keep them.

    worker_seconds, traffic: of `embed`, and of `mine`, `cluster` and `score` by layout; embed_device: None if it was
    left to the machine. data: `config` with the sample, if there is one, in place of its corpus and embeddings;
    clusters: of every layout; scores: of those whose rows a teacher has scored.
    """
    embedded = paid = Workspace(data).embeddings().versions()
    share = 1.0
    if config.reuse.embeddings and config.compare.sample:
        # The vectors of a sample come with its rows: it has its share of what those of the whole corpus took.
        paid, share = Workspace(config).embeddings().versions(), config.compare.sample
    mined = {name: Workspace(layout).mined().require() for name, layout in layouts.items() if layout.mine.is_on}
    seconds: StageSeconds = {
        "embed": share * sum(worker_seconds(each, config.embed.workers) for each in paid),
        "mine": {name: _mining_seconds(made, layouts[name].mine.workers) for name, made in mined.items()},
        "cluster": {name: worker_seconds(made, layouts[name].cluster.workers) for name, made in clusters.items()},
    }
    traffic: StageTraffic = {
        "embed": sum((each.traffic for each in embedded), Traffic()).model_dump(),
        "mine": {name: made.traffic.model_dump() for name, made in mined.items()},
        "cluster": {name: made.traffic.model_dump() for name, made in clusters.items()},
    }
    if scores:
        seconds["score"] = {name: worker_seconds(made, layouts[name].score.workers) for name, made in scores.items()}
        traffic["score"] = {name: made.traffic.model_dump() for name, made in scores.items()}
    return {"worker_seconds": seconds, "traffic": traffic, "embed_device": _device(paid[-1])}


def worker_seconds(made: Manifest, workers: int) -> float:
    """Return the seconds of all workers of a stage, of all sessions.

    At least the wall time of the last session: work beside the items (fitting a surrogate, for example) keeps one
    worker busy. For manifests without seconds of workers: that wall time, times all `workers` of the stage, or the
    number of workers that the embeddings' manifest names.
    """
    if made.worker_seconds is None:
        return made.seconds * int(made.config.get("workers", workers))
    return max(made.worker_seconds, made.seconds)


def cost_of(config: RunConfig, details: ComparisonDetails, name: str, trials: Sequence[TrialDetails]) -> Cost:
    """Return the mean cost of the `trials`, all of the arm `name`; details: of the comparison's manifest.

    Mining needs no GPU, and embeddings may name their device. Otherwise the shared stages count as if they had run on
    the device that the arm trained on.
    """
    arm, prices, device = details["arms"][name], config.compare.prices, str(trials[0]["device"])
    layout, spent, asked = arm["layout"], _shared_seconds(config, details), details["traffic"]
    # (seconds, device, traffic) of each stage that it needs.
    needed: list[tuple[float, str, Mapping[str, int]]] = []
    if arm["uses_embeddings"]:
        needed.append((spent["embed"], details.get("embed_device") or device, asked["embed"]))
    if layout in spent["mine"]:
        needed.append((spent["mine"][layout], "cpu", asked["mine"][layout]))
    if arm["uses_clusters"] or arm.get("uses_scores"):
        needed.append((spent["cluster"][layout], device, asked["cluster"][layout]))
    if arm.get("uses_scores"):
        needed.append((spent["score"][layout], device, asked["score"][layout]))
    training = float(np.mean([trial["seconds_training"] for trial in trials]))
    own = _mean_traffic([Traffic(**trial["traffic"]) for trial in trials])
    shared = sum(seconds for seconds, _, _ in needed)
    all_of = [(training, device, own), *((seconds, on, Traffic(**traffic)) for seconds, on, traffic in needed)]
    each = [_price(prices, *part) for part in all_of] if prices.known else None
    return Cost(
        seconds=training,
        shared_seconds=shared,
        hours=(training + shared) / 3600,
        gpu_hours=sum(seconds for seconds, on, _ in all_of if on == "cuda") / 3600,
        price=sum(each) if each else None,
        training_price=each[0] if each else None,
        traffic=sum((Traffic(**traffic) for _, _, traffic in needed), own),
        device=device,
    )


def extra_cost(own: Cost, other: Cost) -> float:
    """Return the cost of `own` beyond `other`, as a share of that: by price, or by worker hours if it has none."""
    one, reference = (own.price, other.price) if own.price is not None and other.price else (own.hours, other.hours)
    return one / reference - 1 if reference else math.inf


def _mining_seconds(made: Manifest, workers: int) -> float:
    # Its units are those of the search; rows are gathered for it before, by all workers.
    return max(made.worker_seconds or 0.0, made.seconds * workers)


def _device(made: Manifest) -> str | None:
    device = str(made.config.get("device", "auto"))
    return None if device == "auto" else device.partition(":")[0]


def _shared_seconds(config: RunConfig, details: ComparisonDetails) -> StageSeconds:
    """Return `worker_seconds`; for comparisons without them, wall times by all workers, and nothing of mining."""
    if "worker_seconds" in details:
        return details["worker_seconds"]
    wall = details["seconds"]
    clustered = {layout: seconds * config.cluster.workers for layout, seconds in wall["cluster"].items()}
    return {"embed": wall["embed"] * config.embed.workers, "mine": {}, "cluster": clustered}


def _mean_traffic(each: Sequence[Traffic]) -> Traffic:
    return Traffic(**{key: round(np.mean([getattr(one, key) for one in each])) for key in Traffic.model_fields})


def _price(prices: PricesConfig, seconds: float, device: str, traffic: Traffic) -> float:
    return prices.of(
        seconds,
        gpu=device == "cuda",
        reads=traffic.reads,
        writes=traffic.writes,
        bytes_read=traffic.bytes_read,
    )
