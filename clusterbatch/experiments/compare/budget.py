"""Budget of a comparison: the share of the corpus, then the steps and the points on the curves that fit a given time.

The machine is timed on a little of the same work, twice: before the corpus is embedded, to choose the sample unless
`compare.sample` gives it, and when clusters exist, to choose the steps by the time that is left. Decisions are stored,
so that an interrupted comparison resumes with the same; another comparison, and one that is forced, decides again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch

from clusterbatch.batches.curriculum import Plan
from clusterbatch.batches.loader import SliceLoader
from clusterbatch.batches.negatives import NegativeChoice
from clusterbatch.config import RunConfig, fingerprint, with_changes
from clusterbatch.corpus.row_groups import row_groups_of
from clusterbatch.embedding.char_ngrams import SURROGATES
from clusterbatch.embedding.embedder import UnitEmbedder
from clusterbatch.encoder.devices import visible_device
from clusterbatch.encoder.load import drop_padding
from clusterbatch.evaluation.measure import LoadedCollection
from clusterbatch.evaluation.metrics import parse_metric
from clusterbatch.evaluation.models import measuring_dtype
from clusterbatch.evaluation.stage import configured_collections
from clusterbatch.experiments.compare.arms import Arm
from clusterbatch.experiments.compare.plan import ComparisonPlan, plan_comparison, runs_of_arms
from clusterbatch.experiments.compare.trial import starting_encoder
from clusterbatch.log import say
from clusterbatch.shards.reader import ShardReader
from clusterbatch.store.details import given_dimensions
from clusterbatch.store.workspace import Workspace
from clusterbatch.training.collectives import World
from clusterbatch.training.step import TrainingStep

# Share of the time left for embedding, and share of the time left after it for trials. Estimates miss the rest: runs
# side by side share the memory's bandwidth, and the report takes time.
_EMBEDDING, _TRIALS = 0.4, 0.75
_TIMED_ROWS, _TIMED_STEPS = 256, 10
_LEAST_STEPS = 20
_MOST_POINTS = 5


def decided(config: RunConfig) -> RunConfig:
    """Return `config` with the decisions of its budget so far; itself if it has none, or nothing is decided."""
    root = Workspace(config).root
    # Steps are kept by the sample that they were decided for, which may have been decided before.
    for _ in ("sample", "steps"):
        if config.compare.budget is not None and root.exists(_name(config)):
            config = with_changes(config, root.read_json(_name(config)))
    return config


def choose_sample(config: RunConfig, spent: float, *, force: bool = False) -> RunConfig:
    """Return `config` with compare.sample set so that embedding and an epoch of every run fit; spent: seconds so far.

    Needs the ingested corpus. Without a budget, and if a sample is given, nothing is changed. force: what has been
    decided before, here and in `choose_steps`, does not count.
    """
    if force and config.compare.budget is not None:
        _forget(config)
    if config.compare.budget is None or config.compare.sample is not None or decided(config) is not config:
        return decided(config)
    rows = Workspace(config).corpus.require().counts.written
    left = max(0.0, config.compare.budget - spent)
    embedding = 0.0 if config.reuse.embeddings else _seconds_a_row(config)
    return _decide(config, {"compare.sample": _share(config, plan_comparison(config), rows, left, embedding)})


def planned(config: RunConfig) -> RunConfig:
    """Return `config` with what its budget will be turned into, by the scale model: nothing is timed or stored.

    What has been decided stands. Without a budget nothing is changed.
    """
    known = decided(config)
    budget = known.compare.budget
    if budget is None:
        return known
    plan = plan_comparison(known)
    if known is config and config.compare.sample is None:
        share = _share(config, plan, max(1, plan.corpus_rows), max(0.0, budget - plan.ingest_seconds), plan.row_seconds)
        known = with_changes(config, {"compare.sample": share})
        plan = plan_comparison(known)
    each = _TRIALS * (budget - plan.shared_seconds) * known.compare.workers / plan.runs - plan.measure_seconds
    epoch = math.ceil(plan.rows / config.batches.size)
    return with_changes(
        known, _length(known, each, plan.measure_seconds, plan.pair_seconds * config.batches.size, epoch)
    )


def _share(config: RunConfig, plan: ComparisonPlan, rows: int, left: float, embedding: float) -> float | None:
    """Return the share of `rows` that is embedded and trained on in the seconds that are left; None for all.

    embedding: seconds a row, by all workers together, 0 if there is nothing to embed.
    """
    share = min(1.0, _EMBEDDING * left / (rows * embedding)) if embedding else 1.0
    if config.compare.steps is None and config.train.steps is None:
        # A smaller sample before fewer steps: what is trained for less than an epoch gives no verdict.
        workers = config.compare.workers
        epochs = (config.train.epochs or 1) * config.compare.steps_of_each
        a_row = embedding + plan.runs * epochs * plan.pair_seconds / workers
        measuring = plan.runs * 2 * plan.measure_seconds / workers
        share = min(share, max(0.0, _TRIALS * left - measuring) / (rows * a_row))
    # A sample of less would say nothing about the corpus, whatever the time.
    share = max(share, min(1.0, _LEAST_STEPS * config.batches.size / rows))
    return float(f"{share:.4g}") if share < 1 else None


def choose_steps(
    config: RunConfig,
    arms: Sequence[Arm],
    plans: Mapping[str, Plan],
    readers: Mapping[str, ShardReader],
    spent: float,
) -> RunConfig:
    """Return `config` with compare.steps and compare.points set so that all trials end in time.

    Needs every arm's clusters. spent: seconds of the budget that are gone; plans, readers: by the arm's name and by its
    layout's.
    """
    compare = config.compare
    if compare.budget is None or decided(config).compare.budget is None:
        return decided(config)
    runs_of, runs = runs_of_arms(compare), sum(runs_of_arms(compare).values())
    with _one_thread():
        starting, measuring = _timed_measurement(config)
        seconds = {arm.name: _seconds_a_step(arm.config, plans[arm.name], readers[arm.layout]) for arm in arms}
    step = sum(runs_of[name] * seconds[name] for name in seconds) / runs
    each = _TRIALS * (compare.budget - spent) * compare.workers / runs - starting
    changes = _length(config, each, measuring, step, plans[compare.reference].steps_per_epoch)
    steps, points = changes["compare.steps"], changes["compare.points"]
    trial = starting + points * measuring + steps * compare.steps_of_each * step
    needed = spent + trial * runs / (_TRIALS * compare.workers)
    if needed > compare.budget:
        say(
            f"compare.budget: {compare.budget / 60:.1f} minutes do not suffice for {steps} steps a run; expect about "
            f"{needed / 60:.1f}",
            level="warning",
        )
    return _decide(config, changes)


def _length(config: RunConfig, seconds: float, measuring: float, step: float, epoch: int) -> dict[str, Any]:
    """Return the changes that take the place of a budget: steps and points that fit, the least if nothing does, and
    never more than are asked for.

    seconds: of a run, without its start; measuring, step: seconds of a point and of a step; epoch: steps of one.
    """
    compare = config.compare
    # Half of a trial may go into measuring; at least the end is measured.
    points = int(min(_MOST_POINTS, max(1, seconds / 2 / max(measuring, 1e-6))))
    wanted = compare.steps or config.train.steps or (config.train.epochs or 1) * epoch
    # Of each that is chosen a long comparison makes several, and those have to fit.
    affordable = (seconds - points * measuring) / step / compare.steps_of_each
    least = math.ceil(_LEAST_STEPS / compare.steps_of_each)
    # A budget makes no run longer than it would be without.
    steps = int(min(wanted, max(least, affordable)))
    points = min(points, steps * compare.steps_of_each)
    return {"compare.budget": None, "compare.steps": steps, "compare.points": points}


def _decide(config: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """Store decisions beside earlier ones."""
    root, name = Workspace(config).root, _name(config)
    before = root.read_json(name) if root.exists(name) else {}
    root.write_json(name, {**before, **changes})
    return with_changes(config, changes)


def _forget(config: RunConfig) -> None:
    """Remove decisions, those for the sample that was decided too."""
    root, name = Workspace(config).root, _name(config)
    if root.exists(name):
        chosen = {"compare.sample": root.read_json(name).get("compare.sample", config.compare.sample)}
        root.remove(_name(with_changes(config, chosen)))
        root.remove(name)


def _name(config: RunConfig) -> str:
    """Return the name of the file of decisions, by all settings of the trials and of their duration."""
    # Points are always decided, whatever was configured.
    asked = config.compare.model_copy(update={"points": 1})
    key = fingerprint("budget", asked, config.embed, config.batches, config.train, config.evaluate)
    return f"compare/budget-{config.compare.budget:g}-{key}.json"


def _seconds_a_row(config: RunConfig) -> float:
    """Return the seconds of embedding a row, by all workers together; 0 if no model does it."""
    corpus = Workspace(config).corpus.require()
    if given_dimensions(corpus) is not None or config.embed.model in SURROGATES:
        return 0.0
    unit = next(unit for unit in row_groups_of(corpus) if unit.rows)
    rows = np.arange(min(_TIMED_ROWS, unit.rows))
    with _one_thread():
        embedder = UnitEmbedder(config, device=str(visible_device(config.embed.device)))
        # The first call sets kernels up.
        embedder.embed(unit, rows=rows[:8])
        seconds = _seconds(lambda: embedder.embed(unit, rows=rows))
    return seconds / len(rows) / config.embed.workers


def _timed_measurement(config: RunConfig) -> tuple[float, float]:
    """Return the seconds of loading a model and measuring everything once, and of one more point on the curve."""
    settings = config.evaluate
    deciding = parse_metric(config.compare.decide.metric)
    metrics = [deciding, *map(parse_metric, settings.metrics)]
    loaded = [
        LoadedCollection(collection, settings.max_query_tokens, settings.max_document_tokens)
        for collection in configured_collections(config)
    ]
    start = time.perf_counter()
    model = starting_encoder(config, visible_device(config.train.device))
    drop_padding(model, measuring_dtype(config, model))
    starting, measuring = time.perf_counter() - start, 0.0
    for collection in loaded:
        measure = partial(collection.measure, model, batch_tokens=config.embed.batch_tokens)
        # The first time also tokenises; a worker does that once for all its trials.
        measure(metrics=[deciding], top_k=deciding.cutoff or settings.top_k)
        measuring += _seconds(partial(measure, metrics=[deciding], top_k=deciding.cutoff or settings.top_k))
        starting += _seconds(partial(measure, metrics=metrics, top_k=settings.top_k))
    return starting, measuring


def _seconds_a_step(config: RunConfig, plan: Plan, reader: ShardReader) -> float:
    """Return the seconds of a training step, by one process."""
    encoder = starting_encoder(config, visible_device(config.train.device))
    training = TrainingStep(encoder, config.train, _TIMED_STEPS, World())
    vectors = config.train.mask.surrogate_margin is not None
    negatives = NegativeChoice.of(config.train, plan.index)
    loader = SliceLoader(
        plan, reader, 0, 1, 0, _TIMED_STEPS, vectors=vectors, images=encoder.images, negatives=negatives
    )
    batches = iter(loader)
    # The first steps set kernels up and fill caches of what was read.
    for _ in range(_TIMED_STEPS // 2):
        training.run(next(batches))
    start = time.perf_counter()
    for batch in batches:
        training.run(batch)
    return (time.perf_counter() - start) / (_TIMED_STEPS - _TIMED_STEPS // 2)


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute with one thread, as a worker does if several share a machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
