"""`refresh`: rounds of re-embedding, re-clustering and further training; each may become the live model.

A round is decided once and written down (which generation it continues from, whether it clusters again), then made by
the ordinary stages under the next generation's number. So a call that was killed continues where it stopped, and to the
same result. The live model changes last, and only to one that the test collections find no worse.

Super-batches have no clusters and no drift: a round divides them by new vectors, or by those of the round before.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from functools import partial
from typing import Any

from clusterbatch.clustering.measure_drift import measure_drift
from clusterbatch.clustering.warm_start import Previous
from clusterbatch.config import RunConfig, fingerprint, with_changes
from clusterbatch.corpus.row_groups import read_row_group, row_groups_of
from clusterbatch.embedding.char_ngrams import SURROGATES
from clusterbatch.embedding.stage import is_embedded
from clusterbatch.encoder.devices import inference_dtype, visible_device
from clusterbatch.encoder.load import load_encoder
from clusterbatch.encoder.resolve import resolve_model
from clusterbatch.errors import DataError, UsageError
from clusterbatch.evaluation.checks import check_models, check_text_limits
from clusterbatch.evaluation.metrics import parse_metric
from clusterbatch.evaluation.models import AFTER
from clusterbatch.evaluation.stage import evaluate
from clusterbatch.log import say
from clusterbatch.pipeline.refresh_clusters import Builder, new_clusters, wanted
from clusterbatch.pipeline.rounds import (
    SAMPLE,
    Round,
    discard_generation,
    next_generation,
    read_round,
    rollback_target,
    rounds,
    settle,
    write_round,
)
from clusterbatch.pipeline.run import SCORE, Stage, is_trained, run_stage, stages_of
from clusterbatch.runtime import lasting_session, ray_session
from clusterbatch.scoring.teacher import check_teacher
from clusterbatch.store import Artifact, Manifest
from clusterbatch.store.details import EvaluationDetails, TrainDetails, details_of
from clusterbatch.store.workspace import Workspace, live_generation, publish
from clusterbatch.training.stage import train
from clusterbatch.training.worker import Continuation

# A call that has not ended: the last generation that it is to make.
CALL = "refresh.json"
# Seeds of generations lie so far apart that no user's seeds meet them.
_SEED_STRIDE = 1_000_003
_SEEDS = 2**63
_TIMED_DOCUMENTS = 256
# Keys of `evaluate` that no value of a metric depends on; what the collections hold is among the inputs.
_NOT_IN_VALUES = ("path", "holdout", "models", "metrics", "unit_bytes")


def refresh(config: RunConfig, *, force: bool = False) -> list[Round]:
    """Make `refresh.rounds` more generations, or those that are left of an interrupted call; return all rounds.

    Runs the first generation's stages before if they have never run, and waits in the end for clusters that are built
    for the next call. Raises UsageError before any work if the metric that decides is not measured or a prompt leaves
    no room for text, and what `check_models` and `check_teacher` raise.
    """
    _check(config)
    workspace = Workspace(config)
    with lasting_session():
        settle(workspace)
        if not is_trained(workspace):
            for stage in stages_of(config):
                run_stage(stage, config, force=force)
        last = _last_generation(config, workspace)
        # Opened once: two threads must not both start it.
        with ray_session(config.ray) if config.refresh.asynchronous else nullcontext():
            builder = Builder(workspace, partial(_build, config, workspace)) if config.refresh.asynchronous else None
            while (generation := next_generation(workspace)) <= last:
                _round(config, workspace, generation, force, builder)
            if builder is not None:
                builder.finish(generation)
    workspace.root.remove(CALL)
    return rounds(workspace)


def rollback(config: RunConfig) -> tuple[int, int]:
    """Make the model live that was live before; return (the generation that was live, the one that is).

    The next refresh continues from there; a round that was under way is decided again. Raises UsageError if there is
    no generation to return to.
    """
    workspace = Workspace(config)
    settle(workspace)
    live, target = live_generation(workspace), rollback_target(workspace)
    record = read_round(workspace, live) if live else None
    if live is not None and record is not None and record.promoted is None:
        # An older version copied the model before it wrote that the round is over.
        publish(workspace, record.base)
        discard_generation(workspace, live, keep_record=False)
        return live, record.base
    if live is None or target is None:
        raise UsageError(f"{workspace.root.uri}: the live model is the first; there is none to roll back to")
    if workspace.train(target).manifest() is None:
        raise UsageError(f"{workspace.trained_model(target).uri}: removed, so there is no model to roll back to")
    if record is not None:
        # Before the model: a rollback that is cut off between the two is then finished, not taken a step further.
        write_round(workspace, record.model_copy(update={"rolled_back": True}))
    publish(workspace, target)
    return live, target


def _check(config: RunConfig) -> None:
    metric = parse_metric(config.refresh.metric).name
    if metric not in [parse_metric(name).name for name in config.evaluate.metrics]:
        raise UsageError(f"refresh.metric: {metric} decides, but evaluate.metrics does not have it")
    if AFTER not in config.evaluate.models:
        raise UsageError(f"evaluate.models: refresh needs '{AFTER}' among them, to decide which model is better")
    batches = config.batches.phases[-1]
    if batches.super_batch > 1:
        if config.refresh.when not in ("always", "never"):
            raise UsageError(
                f"refresh.when: {config.refresh.when} is measured of clusters, which super-batches do without; take "
                "always or never"
            )
        if config.refresh.keep_fraction:
            raise UsageError(
                "refresh.keep_fraction: there are no clusters that rows could stay in, batches.super_batch is "
                f"{batches.super_batch}"
            )
    elif batches.stratify != "cluster":
        raise UsageError(
            "batches.stratify: refresh makes new clusters, or new vectors for super-batches (batches.super_batch); "
            f"these batches are by {batches.stratify}"
        )
    if config.cluster.method != "kmeans":
        raise UsageError(
            "cluster.method: refresh continues from centroids, which communities do not follow; take kmeans"
        )
    # The stages themselves would find out only after the corpus has been embedded and clustered, or a round trained.
    check_models(config)
    check_teacher(config)
    workspace = Workspace(config)
    live = live_generation(workspace)
    start = config.train.model
    # An unfinished `run --force` has removed the live model: it is trained again before the first round.
    if live is not None and workspace.train(live).manifest() is not None:
        start = workspace.trained_model(live).uri
    models = {"train.model": start, "embed.model": config.refresh.surrogate or start}
    check_text_limits([with_changes(config, models)])


def _last_generation(config: RunConfig, workspace: Workspace) -> int:
    """Return the last generation of this call, or of one that was interrupted."""
    if workspace.root.exists(CALL):
        last = int(workspace.root.read_json(CALL)["last"])
        say(f"refresh   continues the call that was to end with generation {last}")
        return last
    last = next_generation(workspace) + config.refresh.rounds - 1
    workspace.root.write_json(CALL, {"last": last})
    return last


def _round(config: RunConfig, workspace: Workspace, generation: int, force: bool, builder: Builder | None) -> None:
    record, live = read_round(workspace, generation), live_generation(workspace) or 0
    if record is not None and live not in (record.base, generation):
        say(f"refresh   generation {generation} is begun again: generation {live} is live, not {record.base}")
        discard_generation(workspace, generation, keep_record=False)
        record = None
    base = record.base if record else live
    changed = _config_of(config, workspace, base, generation)
    if record is None:
        record = _decide(changed, workspace, base, generation, builder)
        write_round(workspace, record)
        Artifact(workspace.refresh(generation), "drift").remove(SAMPLE)
    # A round that was decided before builds were asked for makes its own clusters.
    if builder is not None and record.clusters != generation:
        builder.begin(generation, base)
    made: dict[str, Manifest] = {}
    if record.clusters == generation:
        made |= new_clusters(changed, workspace, _clusters_of(workspace, base), generation, force, record.extended)
    if config.score.is_on and "score" not in made:
        # Those of clusters of an earlier call may be missing.
        made["score"] = run_stage(SCORE, changed, generation=record.clusters)
    continued = Continuation(base, record.clusters, config.refresh.every_steps)
    training = Stage("train", partial(train, continued=continued), Workspace.train)
    made["train"] = run_stage(training, changed, generation=generation, force=force)
    measuring = Stage("evaluate", evaluate, Workspace.evaluation)
    made["evaluate"] = run_stage(measuring, config, generation=generation, force=force)
    record = _judged(config, workspace, record, made)
    write_round(workspace, record)
    if record.promoted:
        publish(workspace, generation)
    say(f"refresh   {describe(record)}", **record.model_dump(exclude={"drift", "seconds"}))


def _build(config: RunConfig, workspace: Workspace, generation: int, base: int) -> dict[str, Any]:
    """Make new clusters beside a round if the drift says that they pay; the work of a `Builder`."""
    changed = _config_of(config, workspace, base, generation)
    figures = _drift(changed, workspace, base, generation)
    clusters = _clusters_of(workspace, base)
    again, extended = wanted(changed, workspace, clusters, figures)
    if again or extended:
        new_clusters(changed, workspace, clusters, generation, False, extended)
    Artifact(workspace.refresh(generation), "drift").remove(SAMPLE)
    return figures


def _config_of(config: RunConfig, workspace: Workspace, base: int, generation: int) -> RunConfig:
    """Return the configuration of a generation's stages.

    The live model embeds, no batch order is repeated, and a curriculum is over.
    """
    last_phase = config.batches.curriculum[-1].changes if config.batches.curriculum else {}
    return with_changes(
        config,
        {
            **{f"batches.{key}": value for key, value in last_phase.items()},
            "batches.curriculum": [],
            "embed.model": config.refresh.surrogate or workspace.trained_model(base).uri,
            "batches.seed": (config.batches.seed + _SEED_STRIDE * generation) % _SEEDS,
            "train.seed": (config.train.seed + _SEED_STRIDE * generation) % _SEEDS,
        },
    )


def _clusters_of(workspace: Workspace, generation: int) -> int:
    """Return the generation whose clusters a generation trained on."""
    record = read_round(workspace, generation)
    return record.clusters if record else 0


def _drift(config: RunConfig, workspace: Workspace, base: int, generation: int) -> dict[str, Any]:
    """Return the figures of the sample, which stays until what they decide is written down; none without clusters."""
    if config.batches.phases[-1].super_batch > 1:
        return {}
    previous = Previous.of(config, _clusters_of(workspace, base))
    embedded = is_embedded(config, previous.vectors)
    if config.embed.model in SURROGATES and not embedded:
        raise UsageError(
            f"refresh.surrogate: {config.embed.model} is fitted to a corpus by embedding all of it; take a model, or "
            f"embed generation {generation - 1} with it first"
        )
    vectors = previous.vectors if embedded else generation
    return measure_drift(config, vectors, previous, workspace.refresh(generation).child(SAMPLE))


def _decide(config: RunConfig, workspace: Workspace, base: int, generation: int, builder: Builder | None) -> Round:
    """On which clusters the round trains: its own, those of its base, or the newest that were built meanwhile."""
    before = _clusters_of(workspace, base)
    record = Round(generation=generation, base=base, clusters=before, when=config.refresh.when, drift={})
    if builder is not None:
        found = builder.newest(generation)
        if found is None or found[0] <= before:
            return record
        built, figures = found
        meanwhile = sum(each.steps for each in rounds(workspace) if each.generation >= built)
        changes = {"clusters": built, "drift": figures, "steps_meanwhile": meanwhile, "reclustered": True}
        say(
            f"refresh   generation {generation} trains on the clusters of generation {built}, built while {meanwhile} "
            "steps were trained"
        )
        return record.model_copy(update=changes)
    figures = _drift(config, workspace, base, generation)
    again, extended = wanted(config, workspace, before, figures)
    again_made, kept = ("clusters again", "clusters") if figures else ("divides batches by new vectors", "vectors")
    what = again_made if again else f"keeps the {kept} of generation {before}"
    if extended:
        what += f", with the rows of version {workspace.corpus.require().version} of the corpus,"
    measured = ""
    if figures:
        measured = (
            f": drift {figures['drift']:.3f}, adjusted mutual information {figures['mutual_information']:.3f}, "
            f"hardness {figures['hardness']:+.4f}"
        )
    say(f"refresh   generation {generation} {what} (refresh.when: {config.refresh.when}){measured}", **figures)
    clusters = generation if again or extended else before
    changes = {"clusters": clusters, "drift": figures, "reclustered": again, "extended": extended}
    return record.model_copy(update=changes)


def _judged(config: RunConfig, workspace: Workspace, record: Round, made: dict[str, Manifest]) -> Round:
    """The finished record: is the new model no worse than the live one, and than the best of those before it?"""
    metric = parse_metric(config.refresh.metric).name
    measured, measured_on = workspace.evaluation(record.base).manifest(), _measured_on(made["evaluate"], metric)
    if measured is None or not _has(measured, metric) or _measured_on(measured, metric) != measured_on:
        # Other collections or settings than then: the live model has to be measured as the new one was.
        measured = evaluate(config, generation=record.base, force=True)
    live, own = (mean_value(manifest, metric) for manifest in (measured, made["evaluate"]))
    best, before = live, read_round(workspace, record.base)
    if before is not None and before.best_value is not None and before.measured_on == measured_on:
        best = max(live, before.best_value)
    documents = config.refresh.production_documents
    if documents is None:
        documents = workspace.corpus.require().counts.written
    steps = int(details_of(made["train"], TrainDetails)["steps"])
    return record.model_copy(
        update={
            "steps": steps,
            "pairs": steps * config.batches.size,
            "metric": metric,
            "live_value": live,
            "own_value": own,
            "margin": config.refresh.margin,
            "best_value": max(best, own),
            "measured_on": measured_on,
            "promoted": own >= best - config.refresh.margin,
            "seconds": {
                "drift": record.drift.get("seconds", 0.0),
                **{name: each.seconds for name, each in made.items()},
            },
            "reindex_documents": documents,
            "reindex_seconds": round(documents * _document_seconds(config, workspace, record.generation), 1),
        }
    )


def _measured_on(manifest: Manifest, metric: str) -> str:
    """Equal where two evaluations' values of the metric may be compared: the same collections, measured alike."""
    settings = {key: value for key, value in manifest.config["evaluate"].items() if key not in _NOT_IN_VALUES}
    return fingerprint("refresh", metric, manifest.inputs, settings)


def mean_value(manifest: Manifest, metric: str) -> float:
    """Mean over an evaluation's collections of the trained model's metric."""
    values = [
        row["value"]
        for row in details_of(manifest, EvaluationDetails)["table"]
        if (row["model"], row["metric"]) == (AFTER, metric)
    ]
    return sum(values) / len(values)


def _has(manifest: Manifest, metric: str) -> bool:
    return any(
        (row["model"], row["metric"]) == (AFTER, metric) for row in details_of(manifest, EvaluationDetails)["table"]
    )


def _document_seconds(config: RunConfig, workspace: Workspace, generation: int) -> float:
    """Seconds in which one process embeds a document with a generation's model, timed on some of the corpus."""
    units = [unit for unit in row_groups_of(workspace.corpus.require()) if unit.rows]
    if not units:
        raise DataError(f"{workspace.corpus.folder.uri}: the corpus has no rows")
    texts = read_row_group(workspace.corpus, units[0], ["document"])["document"].slice(0, _TIMED_DOCUMENTS).to_pylist()
    folder = resolve_model(workspace.trained_model(generation).uri, config.storage)
    # As evaluations embed.
    device = visible_device(config.embed.device)
    dtype = inference_dtype(config.evaluate.dtype, device)
    encoder = load_encoder(folder, dtype=dtype, device=device, packed=True)
    begun = time.perf_counter()
    tokens = encoder.prepare(texts, config.evaluate.max_document_tokens, encoder.prompts["document"])
    encoder.encode(tokens, config.embed.batch_tokens)
    return (time.perf_counter() - begun) / len(texts)


def describe(record: Round) -> str:
    """One sentence for people."""
    assert record.live_value is not None
    assert record.own_value is not None
    verdict = "goes live" if record.promoted else f"does not go live, generation {record.base} stays"
    return (
        f"generation {record.generation} {verdict}: {record.metric} {record.own_value:.4f} against "
        f"{record.live_value:.4f} (margin {record.margin:g}), {record.steps} steps, "
        f"{sum(record.seconds.values()):.1f} s; re-indexing {record.reindex_documents:,} documents would take about "
        f"{record.reindex_seconds:,.0f} s of one process"
    )
