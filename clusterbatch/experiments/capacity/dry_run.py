"""`--dry-run` and jobs/plan_capacity.py: the estimate of a run, as a table or as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from clusterbatch.config import RunConfig, with_changes
from clusterbatch.config.compare import PricesConfig
from clusterbatch.console import standard_output
from clusterbatch.errors import UsageError
from clusterbatch.experiments.capacity.calibrate import GPUS, load, on_gpu
from clusterbatch.experiments.capacity.scale_model import CapacityModel, StageEstimate
from clusterbatch.experiments.capacity.workload import model_of
from clusterbatch.json_text import json_text
from clusterbatch.reporting.page import amount


def dry_run(
    config: RunConfig,
    *,
    stages: list[str] | None = None,
    gpu: str | None = None,
    gpu_hour: float | None = None,
    coefficients: str | None = None,
    as_json: bool = False,
    **known: Any,
) -> None:
    """Print the estimate of `stages` (all of them by default), with costs if `compare.prices` has any.

    gpu_hour: in place of `compare.prices.gpu_hour`. known: fields of capacity.Workload. Raises UsageError if `stages`
    has `score` and no teacher is named.
    """
    if not config.score.is_on and "score" in (stages or ()):
        raise UsageError("score: set score.teacher")
    if gpu_hour is not None:
        config = with_changes(config, {"compare.prices.gpu_hour": gpu_hour})
    model, prices = model_of(config, **known), config.compare.prices
    measured = load(coefficients)
    if gpu is not None:
        measured = on_gpu(measured, GPUS[gpu], model.surrogate, model.trained)
    estimates = [
        estimate
        for estimate in model.estimate(measured, prices, on_gpu=gpu is not None)
        if stages is None or estimate.stage in stages
    ]
    if as_json:
        workload = {**asdict(model.workload), "steps": model.steps, "clusters": round(model.clusters)}
        print(json_text({"workload": workload, "stages": [asdict(estimate) for estimate in estimates]}))
        return
    machine = measured.machine if gpu is None else f"{gpu} GPUs (assumed)"
    standard_output().print(_table(model, estimates, prices, machine))


def _table(model: CapacityModel, estimates: list[StageEstimate], prices: PricesConfig, machine: str) -> Table:
    table = Table(
        title=f"Nothing is run. {model.workload.rows:,} pairs of {model.workload.characters:,.0f} characters, "
        f"{model.clusters:,.0f} clusters, {model.steps:,} steps; coefficients: {machine}",
        show_footer=True,
        box=SIMPLE,
        padding=(0, 1, 0, 0),
    )
    total_bytes = sum(estimate.stored_bytes for estimate in estimates)
    columns = [
        ("stage", "all", lambda e: e.stage),
        ("workers", "", lambda e: f"{e.workers:,}"),
        ("time", duration(sum(e.seconds for e in estimates)), lambda e: duration(e.seconds)),
        ("worker hours", amount(sum(e.worker_hours for e in estimates)), lambda e: amount(e.worker_hours)),
        ("GPU hours", amount(sum(e.gpu_hours for e in estimates)), lambda e: amount(e.gpu_hours)),
        (prices.currency, f"{sum(e.cost or 0 for e in estimates):,.2f}", lambda e: f"{e.cost or 0:,.2f}"),
        ("worker", "", lambda e: size(e.worker_bytes)),
        ("driver", "", lambda e: size(e.driver_bytes)),
        ("objects", f"{sum(e.objects for e in estimates):,}", lambda e: f"{e.objects:,}"),
        ("stored", size(total_bytes), lambda e: size(e.stored_bytes)),
        ("PUT", f"{sum(e.puts for e in estimates):,}", lambda e: f"{e.puts:,}"),
        ("GET", f"{sum(e.gets for e in estimates):,}", lambda e: f"{e.gets:,}"),
    ]
    absent = set() if prices.known else {prices.currency}
    absent |= set() if any(e.gpu_hours for e in estimates) else {"GPU hours"}
    columns = [column for column in columns if column[0] not in absent]
    for title, footer, _ in columns:
        # In a narrow terminal figures break rather than lose their last digits.
        table.add_column(title, footer=footer, justify="left" if title == "stage" else "right", overflow="fold")
    for estimate in estimates:
        table.add_row(*(show(estimate) for _, _, show in columns))
    monthly = total_bytes / 1e12 * (prices.terabyte_month or 0.0)
    storage = f"Storage: {monthly:,.2f} {prices.currency} a month. " if prices.terabyte_month else ""
    unpriced = "" if prices.known else " No prices are configured (compare.prices)."
    table.caption = f"{storage}worker, driver: memory.{unpriced}"
    return table


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


def size(amount: float) -> str:
    return f"{amount / 2**20:,.0f} MiB" if amount < 2**30 else f"{amount / 2**30:,.1f} GiB"
