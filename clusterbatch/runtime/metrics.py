"""Metrics that a run gives to Ray's metrics agent, and through it to Prometheus: names, and who records them.

Prometheus sees each name with `ray_` in front, and counters with `_total` behind (`exported_name`). Dashboards, alert
rules and deploy/README.md use these names only; a test compares them.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from clusterbatch.store import retries
from clusterbatch.store.artifact import Receipt


@dataclass(frozen=True)
class Measure:
    """A metric of the cluster's own monitoring, without its name."""

    kind: Literal["counter", "gauge", "histogram"]
    description: str
    tags: tuple[str, ...] = ()
    # Upper bounds of a histogram's buckets.
    boundaries: tuple[float, ...] = ()


_UNIT_SECONDS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0)
_STEP_SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)

MEASURES: Mapping[str, Measure] = {
    "clusterbatch_rows": Measure(
        "counter", "Rows by outcome: read, written, rejected, set_aside", ("stage", "outcome")
    ),
    "clusterbatch_bytes_written": Measure("counter", "Bytes of finished parts", ("stage",)),
    "clusterbatch_units": Measure("counter", "Finished units of work", ("stage",)),
    "clusterbatch_units_waiting": Measure("gauge", "Units of work not finished yet", ("stage",)),
    "clusterbatch_unit_seconds": Measure("histogram", "A worker's time for one unit", ("stage",), _UNIT_SECONDS),
    "clusterbatch_storage_retries": Measure("counter", "Storage requests that were tried again"),
    "clusterbatch_training_step": Measure("gauge", "Number of the newest training step"),
    "clusterbatch_training_step_seconds": Measure("histogram", "Time of one training step", (), _STEP_SECONDS),
    "clusterbatch_training_data_wait_seconds": Measure("counter", "Time the first worker stood waiting for data"),
    "clusterbatch_training_pairs": Measure("counter", "Pairs trained on, over all workers"),
    "clusterbatch_training_tokens": Measure("counter", "Tokens trained on, over all workers, padding excluded"),
    "clusterbatch_training_loss": Measure("gauge", "Contrastive loss of the newest step"),
    "clusterbatch_training_accuracy": Measure("gauge", "Share of queries whose own document scores highest"),
    "clusterbatch_training_hardness": Measure("gauge", "Mean score of each query's hardest negative"),
    "clusterbatch_training_mask_rate": Measure("gauge", "Share of negatives left out of the loss"),
    "clusterbatch_training_purity": Measure("gauge", "Share of the batch from its main cluster"),
    "clusterbatch_training_gradient_norm": Measure("gauge", "Global norm of the gradient before clipping"),
    "clusterbatch_training_learning_rate": Measure("gauge", "Learning rate of the newest step"),
    "clusterbatch_training_memory_bytes": Measure("gauge", "The most memory that the first worker has held"),
}
# Gauges that are figures of a training line under the same name.
_TRAINING_GAUGES = (
    "step",
    "loss",
    "accuracy",
    "hardness",
    "mask_rate",
    "purity",
    "gradient_norm",
    "learning_rate",
    "memory_bytes",
)


def exported_name(name: str) -> str:
    """Name of the metric in Prometheus."""
    return f"ray_{name}_total" if MEASURES[name].kind == "counter" else f"ray_{name}"


def count_retries() -> None:
    """Count the repeated storage requests of this process from now on. Call it in each that reads or writes."""
    if _retried not in retries.observers:
        retries.observers.append(_retried)


def _retried() -> None:
    _add("clusterbatch_storage_retries", 1)


def pass_begun(stage: str, waiting: int) -> None:
    """Record that a pass has `waiting` units to do: one whose first unit never ends must be seen, too."""
    _set("clusterbatch_units_waiting", waiting, stage=stage)


def unit_finished(stage: str, receipt: Receipt, waiting: int) -> None:
    """Record a unit whose receipt has come back; `waiting` units of the stage are still to be done."""
    counts = receipt.counts
    outcomes = {
        "read": counts.read,
        "written": counts.written,
        "rejected": counts.rejected,
        "set_aside": sum(counts.set_aside.values()),
    }
    for outcome, rows in outcomes.items():
        _add("clusterbatch_rows", rows, stage=stage, outcome=outcome)
    _add("clusterbatch_bytes_written", sum(part.bytes for part in receipt.parts), stage=stage)
    _add("clusterbatch_units", 1, stage=stage)
    _set("clusterbatch_units_waiting", waiting, stage=stage)
    _observe("clusterbatch_unit_seconds", receipt.seconds, stage=stage)


def step_finished(line: Mapping[str, Any]) -> None:
    """Record a training step from its line of metrics.jsonl."""
    for name in _TRAINING_GAUGES:
        _set(f"clusterbatch_training_{name}", line[name])
    _add("clusterbatch_training_pairs", line["pairs"])
    _add("clusterbatch_training_tokens", line["tokens"])
    _add("clusterbatch_training_data_wait_seconds", line["data_wait"] * line["seconds"])
    _observe("clusterbatch_training_step_seconds", line["seconds"])


def _add(name: str, value: float, **tags: str) -> None:
    # Ray refuses to add nothing.
    if value > 0 and (instrument := _instrument(name)):
        instrument.inc(value, tags=tags)


def _set(name: str, value: float, **tags: str) -> None:
    if instrument := _instrument(name):
        instrument.set(value, tags=tags)


def _observe(name: str, value: float, **tags: str) -> None:
    # Ray's histograms refuse what is not a number.
    if math.isfinite(value) and (instrument := _instrument(name)):
        instrument.observe(value, tags=tags)


def _instrument(name: str) -> Any:
    """Return the instrument of that name; None without Ray, which alone gives metrics away."""
    # Without Ray it is not imported for this: that takes longer than a small pass.
    return _ray_instrument(name) if "ray" in sys.modules else None


@cache
def _ray_instrument(name: str) -> Any:
    """Return Ray's instrument of that name, one per process: a second one would start again from zero."""
    from ray.util.metrics import Counter, Gauge, Histogram

    measure = MEASURES[name]
    if measure.kind == "counter":
        return Counter(name, measure.description, measure.tags)
    if measure.kind == "gauge":
        return Gauge(name, measure.description, measure.tags)
    return Histogram(name, measure.description, list(measure.boundaries), measure.tags)
