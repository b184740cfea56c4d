"""`tune` with `tune.stream`: a corpus arrives month by month; how often does it pay to refresh?

Every policy starts from the same first month (a copy of one workspace) and then trains the same number of steps a
month; policies differ in when new data are taken in and when the corpus is clustered again. Every month's model goes
live, so that all have trained alike, and is measured on old and on new data. A month is `ingest --append` and one round
of `refresh`, so an interrupted call resumes where it stopped; a finished policy leaves a receipt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clusterbatch.config import RunConfig, fingerprint, with_changes
from clusterbatch.config.compare import PricesConfig
from clusterbatch.config.experiments import Policy, StreamConfig
from clusterbatch.corpus.ingest import ingest
from clusterbatch.errors import UsageError
from clusterbatch.evaluation.checks import check_text_limits
from clusterbatch.evaluation.collection import Collection
from clusterbatch.evaluation.metrics import parse_metric
from clusterbatch.evaluation.models import AFTER
from clusterbatch.evaluation.results import read_scores
from clusterbatch.evaluation.stage import configured_collections
from clusterbatch.experiments.tune.intervals import months_of, recommend, summarise
from clusterbatch.pipeline.refresh import CALL, refresh
from clusterbatch.pipeline.report import segments_of
from clusterbatch.pipeline.rounds import discard_generation, rounds
from clusterbatch.pipeline.run import STAGES, run_stage
from clusterbatch.pipeline.summary import SUMMARY
from clusterbatch.runtime import lasting_session, ray_session
from clusterbatch.runtime.resources import device_for
from clusterbatch.store import Artifact, Folder, Receipt, Stopwatch
from clusterbatch.store.details import ClustersDetails, EmbeddingsDetails, StreamDetails, StreamRun, details_of
from clusterbatch.store.tables import read_parquet, write_parquet
from clusterbatch.store.workspace import Workspace, unpublish
from clusterbatch.training.driver import all_workers

RESULT = "tune/refresh.json"
_WORK = "work"
# Written when a copy is whole.
_COPIED = "copied.json"


def tune_refresh(config: RunConfig, *, force: bool = False) -> dict[str, Any]:
    """Follow all policies and return the content of `tune/refresh.json`; finished runs are not repeated.

    chosen, why: the recommended interval; policies: by name, the row of intervals.summarise and `months`, one row a
    month, means over the seeds: {month, old, new, cost, seconds by stage, steps, rows, embedded, reclustered, drift};
    currency: unit of all costs, `worker hours` if those have no price.

    Raises UsageError before any work if the configuration does not describe the months.
    """
    watch = Stopwatch()
    stream = config.tune.stream
    assert stream is not None
    _check(config)
    metric = parse_metric(config.tune.metric).name
    collections = configured_collections(config)
    arrival = _arrivals(config, stream, collections)
    identity = fingerprint(
        "refresh intervals",
        *(getattr(config, name) for name in ("corpus", "embed", "mine", "cluster", "batches", "train", "evaluate")),
        config.refresh.model_copy(update={"margin": 0.0, "rounds": 1, "when": "always"}),
        [stream, metric, config.tune.seeds],
        {collection.name: collection.identity() for collection in collections},
    )
    artifact = Artifact(Workspace(config).root.child("tune", "stream"), "refresh intervals")
    if force or not artifact.is_done(identity):
        done = artifact.begin(identity, force)
        with lasting_session():
            for seed in range(config.tune.seeds):
                numbered = enumerate(stream.policies, start=seed * len(stream.policies))
                pending = [(number, policy) for number, policy in numbered if number not in done]
                runs = _Runs(config, stream, seed, metric)
                # Named by their configuration: interrupted months of another one must not be resumed.
                work = artifact.folder.child(_WORK, identity, f"seed={seed}")
                first = runs.first(work) if pending else config
                for number, policy in pending:
                    receipt = Receipt(unit=number, fingerprint=identity)
                    done[number] = _followed(runs, first, policy, work, artifact, receipt)
        runs_of = [cast(StreamRun, receipt.details) for _, receipt in sorted(done.items())]
        artifact.commit(
            identity,
            done.values(),
            config={"tune": config.tune.identity(), "refresh": config.refresh.identity()},
            inputs={},
            seconds=watch.seconds,
            details=StreamDetails(runs=runs_of),
        )
        work = artifact.folder.child(_WORK)
        of_seeds = [work.child(name, seed) for name in work.list() for seed in work.child(name).list()]
        for of_seed in of_seeds:
            for name in of_seed.list():
                _discard(of_seed.child(name))
        # Of folders on disk the empty ones are left.
        work.remove_files([])
    result = _result(config, stream, artifact, arrival) | {"metric": metric}
    Workspace(config).root.write_json(RESULT, result)
    return result


def _check(config: RunConfig) -> None:
    if config.refresh.every_steps is None:
        raise UsageError("refresh.every_steps: tune.stream compares intervals at equal steps a month; say how many")
    if not config.evaluate.path:
        raise UsageError("evaluate.path: tune.stream needs a development collection with queries for every arrival")
    if config.reuse != type(config.reuse)():
        raise UsageError("reuse: tune.stream makes corpora of its own, it cannot take another workspace's")
    if config.needs_teacher:
        raise UsageError("score.teacher: tune.stream makes no scores; compare intervals without a teacher")
    if config.batches.largest_super_batch > 1:
        raise UsageError(
            "batches.super_batch: tune.stream compares when to cluster again, super-batches have no clusters"
        )
    if config.refresh.asynchronous:
        raise UsageError("refresh.asynchronous: a month of tune.stream is one round, with nothing to build beside it")
    check_text_limits([config])


def _arrivals(config: RunConfig, stream: StreamConfig, collections: Sequence[Collection]) -> np.ndarray:
    """Return (Q,) the month in which the answer to a judged query arrives, -1 for none; by collection and query."""
    month_of = {name: month for month, each in reversed([*enumerate(stream.arrivals)]) for name in each.queries}
    months = {}
    for collection in collections:
        queries = list(collection.read_judgements())
        segments = segments_of(queries, config.report.segment_pattern).tolist()
        for query, segment in zip(queries, segments, strict=True):
            months[collection.name, query] = month_of.get(collection.name, month_of.get(segment, -1))
    for month, each in enumerate(stream.arrivals):
        if month not in months.values():
            raise UsageError(f"tune.stream.arrivals.{month}.queries: no judged query is of {', '.join(each.queries)}")
    return np.array([month for _, month in sorted(months.items())])


class _Runs:
    """The months of one seed."""

    def __init__(self, config: RunConfig, stream: StreamConfig, seed: int, metric: str) -> None:
        self.stream, self.seed, self.metric = stream, seed, metric
        self._config = with_changes(
            config,
            {
                "tune.stream": None,
                "train.seed": config.train.seed + seed,
                "batches.seed": config.batches.seed + seed,
                "evaluate.metrics": [metric],
                "evaluate.models": [AFTER],
                "evaluate.mteb": [],
                "refresh.metric": metric,
                "refresh.rounds": 1,
                # Every month's model goes live.
                "refresh.margin": 1.0,
            },
        )

    def first(self, work: Folder) -> RunConfig:
        """Run the first month, the same for all policies."""
        config = self.month(work.child("first").uri, 0, "always")
        for stage in STAGES:
            run_stage(stage, config)
        return config

    def month(self, workspace: str, last: int, when: str) -> RunConfig:
        """Return the configuration of a month, with all that has arrived until month `last`."""
        paths = [path for each in self.stream.arrivals[: last + 1] for path in each.paths]
        return with_changes(self._config, {"workspace": workspace, "corpus.paths": paths, "refresh.when": when})


def _followed(
    runs: _Runs, first: RunConfig, policy: Policy, work: Folder, artifact: Artifact, receipt: Receipt
) -> Receipt:
    """Follow all months under one policy. Receipt.details: policy, seed, months; its part has every query's score."""
    home = work.child(f"policy={receipt.unit}")
    _copy(Folder(first.workspace, first.storage), home)
    last, config = 0, first
    for month in range(1, len(runs.stream.arrivals)):
        last = month if policy.takes_in(month) else last
        config = runs.month(home.uri, last, policy.when_in(month))
        # A call that was cut off may have ended its round without saying so: the next one then makes none.
        while sum(record.promoted is not None for record in rounds(Workspace(config))) < month:
            if policy.takes_in(month):
                ingest(config, append=True)
            refresh(config)
    with ray_session(config.ray):
        on_gpu = _stages_on_gpu(config)
        _, trainers = config.train.workers or all_workers("train" in on_gpu)
    receipt.parts = [write_parquet(artifact, f"scores-{receipt.unit:03d}", _scores(Workspace(config), runs.metric))]
    months = _months(config, policy, trainers, on_gpu)
    run = StreamRun(policy=policy.name, seed=runs.seed, on_gpu="train" in on_gpu, months=months)
    receipt.details = dict(run)
    artifact.write_receipt(receipt)
    _discard(home)
    return receipt


def _copy(source: Folder, target: Folder) -> None:
    """Copy a workspace once: later changes of the copy stay."""
    if target.exists(_COPIED):
        return
    for entry in source.find():
        target.write(entry.name, source.read(entry.name))
    target.write_json(_COPIED, {})


def _discard(home: Folder) -> None:
    """Remove the workspace of a policy, finished or not."""
    workspace = Workspace(RunConfig(workspace=home.uri, storage=home.storage))
    for generation in workspace.generations():
        discard_generation(workspace, generation, keep_record=False)
    unpublish(workspace)
    workspace.corpus.remove()
    workspace.sample.remove()
    home.remove_files([CALL, SUMMARY, _COPIED])


def _scores(workspace: Workspace, metric: str) -> pa.Table:
    """Return columns month, collection, query_id, value, sorted by these."""
    tables = []
    for record in rounds(workspace):
        evaluation = workspace.evaluation(record.generation)
        table = read_scores(evaluation, evaluation.require())
        table = table.filter(pc.equal(table["metric"], metric)).select(["collection", "query_id", "value"])
        tables.append(table.add_column(0, "month", pa.array([record.generation] * table.num_rows, pa.int32())))
    return pa.concat_tables(tables).sort_by([(name, "ascending") for name in ("month", "collection", "query_id")])


def _months(config: RunConfig, policy: Policy, trainers: int, on_gpu: Set[str]) -> list[dict[str, Any]]:
    """Return one row a month: its work, and the seconds and worker hours of that.

    trainers: workers that trained; on_gpu: stages whose workers had GPUs.
    """
    workspace, found = Workspace(config), []
    versions = workspace.corpus.versions()
    known = 1
    for record in rounds(workspace):
        clusters = workspace.clusters(record.clusters).require()
        corpus = clusters.inputs["corpus"]
        place = next(number for number, each in enumerate(versions, start=1) if each.fingerprint == corpus)
        # Every round measures the drift, but only some policies ask for it; and all are evaluated alike.
        seconds = {name: value for name, value in record.seconds.items() if name in ("embed", "cluster", "train")}
        seconds["ingest"] = sum(each.seconds for each in versions[known:place])
        if policy.measures_drift:
            seconds["drift"] = record.seconds["drift"]
        embedded = 0
        if record.clusters == record.generation:
            embeddings = workspace.embeddings(details_of(clusters, ClustersDetails)["vectors"]).versions()
            embedded = next(
                details_of(each, EmbeddingsDetails)["rows"] for each in embeddings if each.inputs["corpus"] == corpus
            )
        hours = _worker_hours(config, seconds, trainers)
        found.append(
            {
                "month": record.generation,
                "rows": clusters.counts.written,
                "embedded": embedded,
                "reclustered": record.reclustered,
                "drift": record.drift["drift"],
                "steps": record.steps,
                "seconds": {name: round(value, 2) for name, value in seconds.items()},
                "worker_hours": sum(hours.values()),
                "gpu_hours": sum(value for stage, value in hours.items() if stage in on_gpu),
            }
        )
        known = place
    return found


def _stages_on_gpu(config: RunConfig) -> set[str]:
    """Return the stages whose workers have GPUs in the current session; the drift is measured by those of `embed`."""
    embed, cluster, train = config.embed.device, config.cluster.device, config.train.device
    devices = {"drift": embed, "embed": embed, "cluster": cluster, "train": train}
    return {stage for stage, device in devices.items() if device_for(device).startswith("cuda")}


def _worker_hours(config: RunConfig, seconds: Mapping[str, float], trainers: int) -> dict[str, float]:
    """Return the hours of all workers by stage; seconds: by stage."""
    workers = {
        "ingest": config.corpus.workers,
        "drift": config.embed.workers,
        "embed": config.embed.workers,
        "cluster": config.cluster.workers,
        "train": trainers,
    }
    return {name: value * workers[name] / 3600 for name, value in seconds.items()}


def _with_hours(config: RunConfig, row: Mapping[str, Any], on_gpu: bool) -> dict[str, Any]:
    """Return a month's row with worker_hours and gpu_hours, which studies of earlier versions lack.

    These keep seconds, and a cost at the prices of their time. on_gpu: whether they trained on GPUs; all stages but
    ingest then count as if they had, as in `compare`.
    """
    _, trainers = config.train.workers or (1, 1)
    stages = _worker_hours(config, row["seconds"], trainers)
    hours = row.get("worker_hours", sum(stages.values()))
    return {"worker_hours": hours, "gpu_hours": hours - stages["ingest"] if on_gpu else 0.0, **row}


def _result(config: RunConfig, stream: StreamConfig, artifact: Artifact, arrival: np.ndarray) -> dict[str, Any]:
    manifest = artifact.require()
    runs = [
        [_with_hours(config, row, run.get("on_gpu", False)) for row in run["months"]]
        for run in details_of(manifest, StreamDetails)["runs"]
    ]
    currency = _add_costs(config.compare.prices, [row for run in runs for row in run])
    scores, costs, months = {}, {}, {}
    for position, policy in enumerate(stream.policies):
        units = range(position, len(manifest.parts), len(stream.policies))
        # (S, M, Q): seeds in order, as the parts are.
        scores[policy.name] = np.stack(
            [
                read_parquet(artifact.folder, manifest.parts[unit])["value"].to_numpy().reshape(-1, len(arrival))
                for unit in units
            ]
        )
        rows = [runs[unit] for unit in units]
        means = zip(months_of(scores[policy.name], arrival), zip(*rows, strict=True), strict=True)
        months[policy.name] = [{"old": old, "new": new, **_mean_row(of_month)} for (old, new), of_month in means]
        costs[policy.name] = float(np.mean([row["cost"] for row in months[policy.name]]))
    policies = summarise(scores, arrival, costs, config.compare.decide.confidence)
    chosen, why = recommend(policies, config.refresh.margin)
    found = {name: {**each, "months": months[name]} for name, each in policies.items()}
    return {"chosen": chosen, "why": why, "policies": found, "currency": currency}


def _add_costs(prices: PricesConfig, rows: Sequence[dict[str, Any]]) -> str:
    """Set `cost` of every month, and return its unit: the currency, or worker hours if these have no price."""
    priced = bool(prices.cpu_hour or (prices.gpu_hour and any(row["gpu_hours"] for row in rows)))
    for row in rows:
        hours, on_gpu = row["worker_hours"], row["gpu_hours"]
        money = prices.of(3600 * (hours - on_gpu), gpu=False) + prices.of(3600 * on_gpu, gpu=True)
        row["cost"] = money if priced else hours
    return prices.currency if priced else "worker hours"


def _mean_row(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the means of one month over the seeds; reclustered becomes the share of them."""
    found: dict[str, Any] = {"month": rows[0]["month"]} | {
        name: float(np.mean([row[name] for row in rows]))
        for name in ("rows", "embedded", "reclustered", "drift", "steps", "cost")
    }
    stages = rows[0]["seconds"]
    return {
        **found,
        "seconds": {stage: float(np.mean([row["seconds"].get(stage, 0.0) for row in rows])) for stage in stages},
    }
