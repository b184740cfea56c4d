"""Plan of a comparison before it starts: rows, steps, epochs, and roughly how long it will take. Nothing is run."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace

from clusterbatch.config import RunConfig, with_changes
from clusterbatch.config.compare import CompareConfig
from clusterbatch.experiments.capacity.calibrate import load
from clusterbatch.experiments.capacity.workload import model_of
from clusterbatch.experiments.compare.arms import arms_of


@dataclass(frozen=True)
class ComparisonPlan:
    """rows: of the sample; runs: trainings of all arms, seeds and settings; minutes: by the scale model, rough.

    pair_seconds: of one worker to train on a pair; measure_seconds: of one worker to measure a model once; row_seconds:
    of all workers to embed a row, 0 if embeddings are reused; ingest_seconds, shared_seconds: of ingest, and of all
    that comes before the runs.
    """

    rows: int
    corpus_rows: int
    arms: int
    seeds: int
    runs: int
    steps: int
    epochs: float
    minutes: float
    pair_seconds: float
    measure_seconds: float
    row_seconds: float = 0.0
    ingest_seconds: float = 0.0
    shared_seconds: float = 0.0

    def sentence(self) -> str:
        """Return the plan on one line."""
        return (
            f"{self.rows:,} of {self.corpus_rows:,} rows; {self.arms} arms, {self.seeds} seeds: {self.runs} runs of "
            f"{self.steps:,} steps ({self.epochs:.2g} epochs); about {max(1, round(self.minutes)):,} minutes"
        )

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def at_size(config: RunConfig, size: int) -> RunConfig:
    """Return the configuration of the comparison at one size of `compare.batch_sizes`."""
    return with_changes(config, {"batches.size": size})


def runs_of_arms(compare: CompareConfig) -> dict[str, int]:
    """Return how often each arm is trained, by its name: with every seed, and with every setting if it is swept."""
    settings = max(1, len(compare.learning_rates)) * max(1, len(compare.temperatures))
    sweep = settings if settings > 1 else 0
    swept = compare.arms if compare.sweep == "each" else (compare.reference,)
    return {name: compare.seeds + (sweep if name in swept else 0) for name in compare.arms}


def plan_comparison(config: RunConfig) -> ComparisonPlan:
    """Return the plan, from the corpus if it is made, otherwise from its files.

    Times are those of the scale model with the coefficients that come with the package: for another machine they are
    an order of magnitude. Raises UsageError as loading the corpus' paths does.
    """
    compare, rates = config.compare, load()
    whole = model_of(config)
    rows = round(whole.workload.rows * (compare.sample or 1.0))
    model = replace(whole, workload=replace(whole.workload, rows=rows))
    arms, layouts = arms_of(config)
    asked = compare.steps or config.train.steps or math.ceil((config.train.epochs or 1) * rows / config.batches.size)
    steps = asked * compare.steps_of_each
    runs = sum(runs_of_arms(compare).values())
    training = replace(model, config=with_changes(config, {"train.steps": max(1, steps), "train.epochs": None}))
    pairs = max(1, steps) * config.batches.size
    pair_seconds = training.work("train") / rates.rate[training.rate_name("train")] / pairs
    # The stage measures two models.
    measure_seconds = model.work("evaluate") / rates.rate[model.rate_name("evaluate")] / 2
    each = pairs * pair_seconds + (compare.points + 1) * measure_seconds
    ingest = whole.seconds("ingest", rates) if config.reuse.corpus is None else 0.0
    row = embed = 0.0
    if config.reuse.embeddings is None:
        embed = model.seconds("embed", rates)
        row = whole.work("embed") / rates.rate[whole.rate_name("embed")] / whole.workers("embed")
        row /= max(1, whole.workload.rows)
    shared = ingest + embed + len(layouts) * model.seconds("cluster", rates)
    seconds = shared + runs * each / compare.workers
    epochs = pairs / rows if rows else 0.0
    return ComparisonPlan(
        rows,
        whole.workload.rows,
        len(arms),
        compare.seeds,
        runs,
        steps,
        epochs,
        seconds / 60,
        pair_seconds,
        measure_seconds,
        row,
        ingest,
        shared,
    )
