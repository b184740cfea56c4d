"""`compare`: arms x seeds over one embedded corpus, the same steps and the same test queries for all.

Every trial is one process that trains and measures (trial.py); trials run side by side on Ray and leave a receipt each,
so an interrupted comparison continues where it stopped. Gradients do not depend on the number of workers, so what one
process finds holds for many.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import cast

import numpy as np
import pyarrow.compute as pc

from clusterbatch.batches.curriculum import Plan
from clusterbatch.config import RunConfig, fingerprint, with_changes
from clusterbatch.corpus.ingest import ingest
from clusterbatch.embedding.char_ngrams import SURROGATES
from clusterbatch.embedding.stage import embed
from clusterbatch.encoder.limits import check_limits, evaluation_limits
from clusterbatch.encoder.resolve import model_fingerprint, resolve_model
from clusterbatch.errors import OtherWorkError, UsageError, about
from clusterbatch.evaluation.checks import check_text_limits
from clusterbatch.evaluation.collection import Collection
from clusterbatch.evaluation.metrics import parse_metric
from clusterbatch.evaluation.stage import configured_collections
from clusterbatch.experiments.compare.arms import Arm, arms_of, check_arms, clustered_layout, with_phases
from clusterbatch.experiments.compare.breakdown import SEGMENTS, query_segments
from clusterbatch.experiments.compare.budget import choose_sample, choose_steps
from clusterbatch.experiments.compare.costs import shared_costs
from clusterbatch.experiments.compare.hardness import hardness, match, spaced
from clusterbatch.experiments.compare.plan import plan_comparison
from clusterbatch.experiments.compare.sample import sample_corpus, sample_home
from clusterbatch.experiments.compare.trial import Setting, Trials, TrialWorker, comparison_folder, is_for_tuning
from clusterbatch.log import say
from clusterbatch.runtime import Pass, Pool, WorkItem, lasting_session, ray_session
from clusterbatch.runtime.resources import gpus_for
from clusterbatch.scoring.stage import score
from clusterbatch.scoring.teacher import check_teacher
from clusterbatch.shards.reader import ShardReader
from clusterbatch.shards.stage import cluster
from clusterbatch.store import Artifact, Manifest, Receipt, Stopwatch
from clusterbatch.store.details import ArmDetails, ComparisonDetails, TrialDetails
from clusterbatch.store.tables import read_parquet, write_parquet
from clusterbatch.store.workspace import Workspace
from clusterbatch.training.checks import check_negatives
from clusterbatch.training.worker import open_plan

# Steps whose batches are compared between arms.
_COMPARED_STEPS = 4
_PURITY_STEPS = 50


def comparison_artifact(config: RunConfig) -> Artifact:
    return Artifact(Workspace(config).root.child(*comparison_folder(config).split("/"), "trials"), "comparison")


def compare(config: RunConfig, *, force: bool = False) -> Manifest:
    """Run what is missing of the comparison and commit it.

    Manifest.details: `trials` by number, what each trial's receipt says; `main`, the numbers of those that the verdict
    rests on; `steps`; `arms` by name, {strategy, pairs a step, mean purity, hardness, layout, what it uses}; `chosen`
    learning rate and temperature by arm; `swept`, whether they were chosen here; costs.shared_costs; `collections`.
    Parts: every trial's scores, and `segments`, the cluster that each query is nearest to.
    """
    watch, budget = Stopwatch(), config.compare.budget
    metrics = [parse_metric(name).name for name in (config.compare.decide.metric, *config.evaluate.metrics)]
    check_arms(config)
    check_teacher(config)
    _check_limits(config)
    with lasting_session():
        if config.reuse.corpus is None:
            ingest(config)
        collections = configured_collections(config)
        _check_halves(config, collections)
        config = choose_sample(config, watch.seconds, force=force)
        say(f"compare: {plan_comparison(config).sentence()}")
        if config.compare.sample:
            sample_corpus(config, config.compare.sample, config.compare.sample_by)
        data = with_sample(config)
        # The vectors of a sample come with its rows.
        reused = config.reuse.embeddings and not config.compare.sample
        embeddings = Workspace(config).embeddings().require() if reused else embed(data)
        arms, layouts = arms_of(data)
        layouts = kept_layouts(data, layouts)
        clusters = {name: made_or_replaced(cluster, layout, force=force) for name, layout in layouts.items()}
        scored = {arm.layout: None for arm in arms if arm.uses_scores}
        scores = {name: made_or_replaced(score, layouts[name], force=force) for name in scored}
        arms = match(arms, layouts)
        plans = {arm.name: open_plan(arm.config, *_clusters(layouts[arm.layout])) for arm in arms}
        readers = {name: ShardReader(Workspace(layout).clusters()) for name, layout in layouts.items()}
        config = choose_steps(config, arms, plans, readers, watch.seconds)
        steps = _steps(config, plans[config.compare.reference])
        arms = [with_phases(arm, steps) for arm in arms]
        plans = {arm.name: open_plan(arm.config, *_clusters(layouts[arm.layout])) for arm in arms}
        for arm in arms:
            check_negatives(arm.config, *_clusters(layouts[arm.layout]), plans[arm.name].index)
        alike = same_batches(arms, plans, steps)
        _say_same_batches(alike)
        reference = plans[config.compare.reference]
        if steps < reference.steps_per_epoch:
            say(
                f"compare: {steps:,} steps are {steps / reference.steps_per_epoch:.2g} of an epoch, too few for a "
                f"verdict; {reference.steps_per_epoch:,} would do (compare.budget, compare.sample, compare.steps)",
                level="warning",
            )
        identity = fingerprint(
            "comparison",
            config.compare,
            config.evaluate,
            config.embed.batch_tokens,
            [[arm.name, arm.config.train, plans[arm.name].fingerprint] for arm in arms],
            sorted({model_fingerprint(resolve_model(arm.config.train.model, config.storage)) for arm in arms}),
            {collection.name: collection.identity() for collection in collections},
            steps,
            *([{name: made.fingerprint for name, made in scores.items()}] if scores else []),
        )
        artifact = comparison_artifact(config)
        if artifact.is_done(identity) and not force:
            return artifact.require()
        done = artifact.begin(identity, force)
        if force:
            Artifact(Workspace(config).root.child(*comparison_folder(config).split("/"), "runs"), "trials").remove()
        trials = Trials(config, arms, layouts, steps, identity)
        with ray_session(config.ray):
            done = _run(config, trials.sweep(), artifact, identity, collections, metrics, done)
            chosen = {arm.name: _best_setting(config, artifact, trials, arm, done) for arm in arms}
            main = trials.main(chosen)
            done = _run(config, main, artifact, identity, collections, metrics, done)
        shown = clustered_layout(arms)
        segments = query_segments(data, Workspace(layouts[shown]).clusters(), collections) if shown else None
    if budget is not None and watch.seconds > budget:
        say(f"compare: took {watch.seconds / 60:.1f} minutes, budget {budget / 60:.1f}", level="warning")
    return artifact.commit(
        identity,
        done.values(),
        config={"compare": config.compare.identity(), "evaluate": config.evaluate.identity()},
        inputs={"embeddings": embeddings.fingerprint, **{name: each.fingerprint for name, each in clusters.items()}},
        seconds=watch.seconds,
        details=ComparisonDetails(
            trials={
                str(number): {**cast(TrialDetails, receipt.details), "traffic": receipt.traffic.model_dump()}
                for number, receipt in sorted(done.items())
            },
            main=[item.number for item in main],
            steps=steps,
            arms={
                arm.name: ArmDetails(
                    stratify=arm.config.batches.stratify,
                    batch=arm.config.batches.size,
                    steps_per_epoch=plans[arm.name].steps_per_epoch,
                    purity=_purity(plans[arm.name], steps),
                    hardness=hardness(arm.config, layouts[arm.layout], steps),
                    clusters_per_batch=arm.config.batches.clusters_per_batch,
                    layout=arm.layout,
                    uses_embeddings=arm.uses_embeddings,
                    uses_clusters=arm.uses_clusters,
                    uses_scores=arm.uses_scores,
                    changes=dict(arm.changes),
                )
                for arm in arms
            },
            chosen={name: {"learning_rate": rate, "temperature": heat} for name, (rate, heat) in chosen.items()},
            swept=bool(trials.sweep()),
            **shared_costs(config, data, layouts, clusters, scores),
            collections=[collection.name for collection in collections],
            same_batches=alike,
        ),
        extra_parts=[write_parquet(artifact, SEGMENTS, segments, content=SEGMENTS)] if segments else [],
    )


def made_or_replaced(stage: Callable[..., Manifest], layout: RunConfig, *, force: bool) -> Manifest:
    """Run a stage of a layout. force: what it made of another sample or version of the corpus is replaced."""
    try:
        return stage(layout)
    except OtherWorkError:
        if not force:
            raise
    return stage(layout, force=True)


def with_sample(config: RunConfig) -> RunConfig:
    """Return `config` with the sample, if there is one, in place of its corpus and embeddings."""
    if not config.compare.sample:
        return config
    home = sample_home(config, config.compare.sample, config.compare.sample_by)
    return with_changes(config, {"reuse.corpus": home, "reuse.embeddings": home})


def kept_layouts(config: RunConfig, layouts: Mapping[str, RunConfig]) -> dict[str, RunConfig]:
    """Return the layouts of a sample where an earlier version made them, if they are still there; others as they are.

    That was beside those of the whole corpus, which could replace them.
    """
    found = {}
    for name, layout in layouts.items():
        earlier = with_changes(layout, {"workspace": f"{config.workspace}/compare/layouts/{name}"})
        made = Workspace(earlier).clusters().manifest() if earlier != layout else None
        is_kept = made is not None and made.inputs["corpus"] == Workspace(layout).corpus.require().fingerprint
        found[name] = earlier if is_kept else layout
    return found


def _check_limits(config: RunConfig) -> None:
    """Raise UsageError if a prompt leaves no room for text in embedding, training or a search of test queries."""
    check_text_limits([config, *(arm.config for arm in arms_of(config)[0])])
    if config.embed.model not in SURROGATES:
        # The clusters that test queries are nearest to are found with the surrogate's own prompt.
        prompts = {"query": prompt} if (prompt := config.embed.query_prompt) is not None else {}
        limits = [limit for limit in evaluation_limits(config, prompts) if limit.side == "query"]
        with about("embed.model"):
            check_limits(config.embed.model, config.storage, limits)


def _check_halves(config: RunConfig, collections: Sequence[Collection]) -> None:
    """Raise UsageError if a sweep would have no query of a collection to choose by, or none for the verdict."""
    compare = config.compare
    if max(1, len(compare.learning_rates)) * max(1, len(compare.temperatures)) == 1:
        return
    for collection in collections:
        queries = list(collection.read_judgements())
        if len({is_for_tuning(query) for query in queries}) < 2:
            raise UsageError(
                f"compare.learning_rates, compare.temperatures: a sweep chooses on one half of the queries and judges "
                f"on the other, but all of the {len(queries)} of {collection.name} are in the same; leave it out of "
                "evaluate.path, or give one value of each"
            )


def _clusters(layout: RunConfig) -> tuple[Artifact, Manifest]:
    artifact = Workspace(layout).clusters()
    return artifact, artifact.require()


def _steps(config: RunConfig, plan: Plan) -> int:
    steps = config.compare.steps or config.train.steps or plan.steps_of(config.train.epochs or 1)
    return steps * config.compare.steps_of_each


def _run(
    config: RunConfig,
    items: Sequence[WorkItem],
    artifact: Artifact,
    identity: str,
    collections: Sequence[Collection],
    metrics: Sequence[str],
    done: dict[int, Receipt],
) -> dict[int, Receipt]:
    """Return `done` with the receipts of `items`."""
    if not items:
        return done
    arguments = {
        "collections": list(collections),
        "metrics": list(dict.fromkeys(metrics)),
        "points": config.compare.points,
    }
    workers = config.compare.workers
    pool = Pool(workers, gpus=gpus_for(config.train.device, workers))
    trials = Pass("compare", artifact, identity, TrialWorker, arguments, pool, "steps")
    receipts = trials.run(items, done=done)
    return {**done, **{receipt.unit: receipt for receipt in receipts}}


def _best_setting(config: RunConfig, artifact: Artifact, trials: Trials, arm: Arm, done: dict[int, Receipt]) -> Setting:
    """Return the setting with the best mean of the deciding metric on the tuning half of the queries, first seed."""
    settings = trials.settings(arm)
    if len(settings) == 1:
        return settings[0]
    chooses = config.compare.reference if config.compare.sweep == "baseline" else arm.name
    items = [item for item in trials.sweep() if item.payload.arm == chooses]
    metric = parse_metric(config.compare.decide.metric).name
    values = [_tuning_mean(artifact, done[item.number], metric) for item in items]
    return settings[int(np.argmax(values))]


def _tuning_mean(artifact: Artifact, receipt: Receipt, metric: str) -> float:
    """Return the mean over collections of the mean over their tuning queries."""
    table = read_parquet(artifact.folder, receipt.parts[0])
    table = table.filter(pc.equal(table["metric"], metric))
    table = table.filter([is_for_tuning(query) for query in table["query_id"].to_pylist()])
    means = table.group_by("collection").aggregate([("value", "mean")])["value_mean"]
    return float(np.mean(means.to_numpy()))


def same_batches(arms: Sequence[Arm], plans: Mapping[str, Plan], steps: int) -> list[list[str]]:
    """Return the names of arms that train alike, two or more together.

    Super-batches of 16 and of 64 batches, for example, are the same if no source has more.
    """
    alike: dict[str, list[str]] = {}
    for arm in arms:
        batches = [plans[arm.name].batch(step) for step in spaced(steps, _COMPARED_STEPS)]
        rows = [sorted(zip(batch.piece.tolist(), batch.row.tolist(), strict=True)) for batch in batches]
        alike.setdefault(fingerprint("training", arm.layout, arm.config.train, rows), []).append(arm.name)
    return [names for names in alike.values() if len(names) > 1]


def _say_same_batches(alike: Sequence[Sequence[str]]) -> None:
    for first, *others in alike:
        say(
            f"compare: {', '.join(others)}: the same batches as {first}, so the same figures; this data, or this "
            "sample of it, is too small to tell them apart (compare.sample, batches.size)",
            level="warning",
        )


def _purity(plan: Plan, steps: int) -> float:
    """Return the mean share of a batch from its main cluster, over evenly spaced steps of the run."""
    return float(np.mean([plan.batch(step).purity for step in spaced(steps, _PURITY_STEPS)]))
