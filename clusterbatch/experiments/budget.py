"""What fits into a given time: how much of the corpus, how many steps, how many points on the curves.

The machine is timed on a little of the very work: embedding, a training step, a measurement. What is decided is written
down, so that an interrupted comparison goes on with the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

from clusterbatch.config import RunConfig, with_changes
from clusterbatch.corpus.units import corpus_units, read_unit
from clusterbatch.encoder.hardware import resolve_device
from clusterbatch.encoder.model import load_encoder
from clusterbatch.encoder.resolve import resolve_model
from clusterbatch.evaluation.measure import LoadedCollection
from clusterbatch.evaluation.metrics import parse_metric
from clusterbatch.evaluation.stage import configured_collections
from clusterbatch.store.workspace import Workspace

# Shares of the budget; the rest is for starting workers, clustering, and what the estimate misses.
_EMBEDDING, _TRIALS = 0.3, 0.45
_TIMED_ROWS = 256
_LEAST_STEPS = 20
_MOST_POINTS = 5


def fit_budget(config: RunConfig) -> RunConfig:
    """`config` with compare.sample, compare.steps and compare.points set so that the comparison takes about
    compare.budget seconds. Needs the ingested corpus."""
    assert config.compare.budget is not None
    root = Workspace(config).root
    name = f"compare/budget-{config.compare.budget:g}.json"
    if root.exists(name):
        return with_changes(config, root.read_json(name))
    changes = _decide(config, *_timings(config))
    root.write_json(name, changes)
    return with_changes(config, changes)


def _decide(config: RunConfig, embedding: float, step: float, measuring: float) -> dict[str, Any]:
    """embedding: seconds a row of all workers together; step, measuring: seconds of one process."""
    compare = config.compare
    assert compare.budget is not None
    rows = Workspace(config).corpus.require().counts.written
    share = min(1.0, _EMBEDDING * compare.budget / (embedding * rows)) if not config.reuse.embeddings else 1.0
    settings = max(1, len(compare.learning_rates)) * max(1, len(compare.temperatures))
    trials = len(compare.arms) * (compare.seeds + (settings if settings > 1 else 0))
    each = _TRIALS * compare.budget * compare.workers / trials
    # Half of a trial may go into measuring; at least the end is measured.
    points = int(min(_MOST_POINTS, max(1, each / 2 / measuring)))
    wanted = config.train.steps or max(1, round(share * rows / config.batches.size)) * (config.train.epochs or 1)
    steps = int(max(_LEAST_STEPS, min(wanted, (each - points * measuring) / step)))
    return {
        "compare.budget": None,
        "compare.sample": round(share, 4) if share < 1 else None,
        "compare.steps": steps,
        "compare.points": min(points, steps),
    }


def _timings(config: RunConfig) -> tuple[float, float, float]:
    """Seconds of embedding a row, of a training step, and of measuring all collections once."""
    workspace = Workspace(config)
    corpus = workspace.corpus.require()
    table = read_unit(workspace.corpus, corpus_units(corpus)[0], ["query", "document"]).slice(0, _TIMED_ROWS)
    queries, documents = table["query"].to_pylist(), table["document"].to_pylist()
    surrogate = load_encoder(
        resolve_model(config.embed.model, config.storage), device=resolve_device(config.embed.device)
    )
    texts = surrogate.tokenizer.encode(queries + documents, config.embed.max_tokens)
    embedding = _seconds(lambda: surrogate.encode(texts, config.embed.batch_tokens)) / len(queries)
    model = load_encoder(
        resolve_model(config.train.model, config.storage),
        config.train.encoder,
        device=resolve_device(config.train.device),
    )
    tokens = model.tokenizer.encode(queries + documents, config.train.max_document_tokens)
    forward = _seconds(lambda: model.encode(tokens, config.embed.batch_tokens)) / len(queries)
    metrics = [parse_metric(config.compare.decide.metric)]
    settings = config.evaluate
    measuring = 0.0
    for collection in configured_collections(config):
        loaded = LoadedCollection(collection, settings.max_query_tokens, settings.max_document_tokens)
        measure = partial(loaded.measure, model, metrics, settings.top_k, config.embed.batch_tokens)
        # The first time also tokenises; trials do that once for all their points.
        measure()
        measuring += _seconds(measure)
    # Backward twice the forward; a static encoder's step is mostly its optimizer, which touches all weights.
    optimizer = 3e-9 * sum(weight.numel() for weight in model.parameters())
    return embedding / config.embed.workers, 3 * forward * config.batches.size + optimizer, measuring


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
