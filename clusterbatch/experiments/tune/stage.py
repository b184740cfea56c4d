"""`tune`: chooses settings by a cheap ranking and short runs, and writes down the choice with its reasons.

Successive halving (Jamieson and Talwalkar 2016): many candidates are trained a little, the best of them longer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from clusterbatch.batches.curriculum import Plan
from clusterbatch.clustering.cells import mean_size
from clusterbatch.config import RunConfig, fingerprint, shown_configuration, with_changes
from clusterbatch.corpus.ingest import ingest
from clusterbatch.embedding.stage import embed
from clusterbatch.encoder.resolve import model_fingerprint, resolve_model
from clusterbatch.errors import UsageError
from clusterbatch.evaluation.checks import check_text_limits
from clusterbatch.evaluation.metrics import parse_metric
from clusterbatch.evaluation.stage import configured_collections
from clusterbatch.experiments.compare.arms import Arm, arms_of
from clusterbatch.experiments.compare.stage import made_or_replaced
from clusterbatch.experiments.compare.trial import Trial, TrialWorker
from clusterbatch.experiments.predict.stage import draw_sample, read_sample, sample_tables
from clusterbatch.experiments.tune.rank import SourceSample, rank_score
from clusterbatch.runtime import Pass, Pool, WorkItem, lasting_session, ray_session
from clusterbatch.runtime.resources import gpus_for
from clusterbatch.scoring.stage import score
from clusterbatch.scoring.teacher import check_teacher
from clusterbatch.shards.stage import cluster
from clusterbatch.store import Artifact, Stopwatch
from clusterbatch.store.workspace import Workspace
from clusterbatch.training.worker import open_plan

CHOSEN, RESULT = "tune/chosen.yaml", "tune/result.json"


def rung_sizes(candidates: int, rungs: int, reduction: int) -> list[int]:
    """Return the candidates that each rung trains: all, then 1 / reduction of the last, rounded up, at least one."""
    sizes = [candidates]
    while len(sizes) < rungs and sizes[-1] > 1:
        sizes.append(-(-sizes[-1] // reduction))
    return sizes


def rung_steps(steps: int, rungs: int, reduction: int) -> list[int]:
    """Return the steps of each rung; the last one trains all of them."""
    return [max(1, round(steps / reduction ** (rungs - 1 - rung))) for rung in range(rungs)]


def best(values: Sequence[float], count: int) -> list[int]:
    """Return the positions of the `count` largest values, best first; of equal ones the earlier is better."""
    return np.argsort(-np.asarray(values), kind="stable")[:count].tolist()


def tune(config: RunConfig, *, force: bool = False) -> dict[str, Any]:
    """Choose settings and return the content of `tune/result.json`; `tune/chosen.yaml` is the configuration to use.

    candidates: by name {changes, rank, rungs: [{steps, value, seconds}]}, best first; chosen: a name; why: a sentence.
    Finished runs are not repeated. Raises UsageError for an impossible candidate before any work.
    """
    watch = Stopwatch()
    metric = parse_metric(config.tune.metric).name
    # An impossible candidate must not be found only after the corpus is embedded.
    check_text_limits([with_changes(config, changes) for changes in config.tune.combinations])
    check_teacher(config)
    with lasting_session():
        if config.reuse.corpus is None:
            ingest(config)
        if config.reuse.embeddings is None:
            embed(config)
        ranked = _ranked(config, force)
        names = list(ranked)[: config.tune.keep]
        arms = _arms(config, {name: ranked[name]["changes"] for name in names})
        runs = _Runs(config, arms, metric, force)
        sizes = rung_sizes(len(names), config.tune.rungs, config.tune.reduction)
        for size, steps in zip(sizes, rung_steps(runs.steps, len(sizes), config.tune.reduction), strict=True):
            names = names[:size]
            found = runs.rung(names, steps)
            for name in names:
                ranked[name]["rungs"].append(found[name])
            names = [names[place] for place in best([found[name]["value"] for name in names], size)]
    order = sorted(ranked, key=lambda name: _standing(ranked[name]), reverse=True)
    chosen = with_changes(config, ranked[order[0]]["changes"])
    result = {
        "chosen": order[0],
        "why": _why(order, ranked, metric),
        "metric": metric,
        "candidates": {name: ranked[name] for name in order},
        "seconds": round(watch.seconds, 1),
    }
    root = Workspace(config).root
    root.write(CHOSEN, shown_configuration(chosen).encode())
    root.write_json(RESULT, result)
    return result


def _standing(candidate: Mapping[str, Any]) -> tuple[int, float, float]:
    """Return a sort key, larger is better: rungs it was kept for, its value in the last, its rank by the sample."""
    rungs = candidate["rungs"]
    return len(rungs), rungs[-1]["value"] if rungs else 0.0, candidate["rank"]


def name_of(changes: Mapping[str, Any]) -> str:
    """Return a short name that is fit for a folder: the last words of the keys and their values."""
    words = [f"{key.rsplit('.', 1)[-1]}={'none' if value is None else value}" for key, value in changes.items()]
    return "_".join(words).replace("/", "-")


def _ranked(config: RunConfig, force: bool) -> dict[str, dict[str, Any]]:
    """Return all candidates, the most promising first."""
    artifact, parts, groups = draw_sample(config, force)
    sources = []
    for table, rows in zip(sample_tables(config, artifact, parts, groups), groups.rows.tolist(), strict=True):
        table = table.take(np.random.default_rng(0).permutation(table.num_rows))
        sources.append(SourceSample(table, read_sample(table), rows))
    candidates: dict[str, dict[str, Any]] = {}
    for changes in config.tune.combinations:
        rank = rank_score(with_changes(config, changes), sources)
        candidates[name_of(changes)] = {"changes": changes, "rank": round(rank, 5), "rungs": []}
    return dict(sorted(candidates.items(), key=lambda entry: -float(entry[1]["rank"])))


def _arms(config: RunConfig, candidates: Mapping[str, dict[str, Any]]) -> tuple[list[Arm], dict[str, RunConfig]]:
    """Return candidates as arms of a comparison: the same data, and one set of clusters for all that can share it."""
    numbered = {
        f"candidate-{number}": _with_cluster_size(config, changes) for number, changes in enumerate(candidates.values())
    }
    arms, layouts = arms_of(with_changes(config, {"compare.arms": numbered, "compare.baseline": None}))
    named = [Arm(name, arm.config, arm.layout) for name, arm in zip(candidates, arms, strict=True)]
    return named, layouts


def _with_cluster_size(config: RunConfig, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the changes with the cluster size that they lead to; arms would all have that of one `batches.size`."""
    changed = with_changes(config, changes)
    if changed.cluster.clusters is not None:
        return dict(changes)
    return {**changes, "cluster.mean_size": mean_size(changed)}


class _Runs:
    """Training and measurement of candidates; the runs of a rung work side by side on Ray."""

    def __init__(
        self, config: RunConfig, arms: tuple[list[Arm], dict[str, RunConfig]], metric: str, force: bool
    ) -> None:
        self._config, self._metric, self._force = config, metric, force
        self._arms = {arm.name: arm for arm in arms[0]}
        self._layouts = arms[1]
        for layout in self._layouts.values():
            made_or_replaced(cluster, layout, force=force)
        for name in {arm.layout: None for arm in arms[0] if arm.uses_scores}:
            made_or_replaced(score, self._layouts[name], force=force)
        self._collections = configured_collections(config)
        if not self._collections:
            raise UsageError("evaluate.path: tune needs a development collection")
        self.steps = config.tune.steps or config.train.steps or self._steps_of_epochs(arms[0][0])
        self._identities = {arm.name: self._identity(arm) for arm in arms[0]}

    def rung(self, names: list[str], steps: int) -> dict[str, dict[str, Any]]:
        """Return by name {steps, value, seconds}: the mean over collections and seeds, and seconds of one training.

        steps: of a candidate with the configured `batches.size`; others make as many pairs.
        """
        seeds = self._config.tune.seeds
        own_steps = {name: self._own_steps(name, steps) for name in names}
        identity = fingerprint(
            "tune",
            steps,
            # Runs are numbered by candidate and seed: with others a number means another run.
            [self._identities[name] for name in names],
            seeds,
            self._config.evaluate,
            self._config.embed.batch_tokens,
            [each.identity() for each in self._collections],
            self._metric,
            # Absent if all are alike: finished runs of earlier versions then stay finished.
            *([list(own_steps.values())] if set(own_steps.values()) != {steps} else []),
        )
        artifact = Artifact(Workspace(self._config).root.child("tune", f"runs-{steps}"), "runs of tune")
        done = artifact.begin(identity, self._force)
        items = [
            WorkItem(number, own_steps[name], self._trial(name, seed, steps, identity))
            for number, (name, seed) in enumerate((name, seed) for name in names for seed in range(seeds))
        ]
        arguments = {
            "collections": self._collections,
            "metrics": [self._metric],
            "points": 1,
        }
        workers = self._config.tune.workers
        with ray_session(self._config.ray):
            pool = Pool(workers, gpus=gpus_for(self._config.train.device, workers))
            receipts = Pass("tune", artifact, identity, TrialWorker, arguments, pool, "steps").run(items, done=done)
        found = {}
        for name in names:
            own = [receipt.details for receipt in receipts if receipt.details["arm"] == name]
            made = own_steps[name]
            values = [point["value"] for details in own for point in details["curve"] if point["step"] == made]
            seconds = float(np.mean([details["seconds_training"] for details in own]))
            found[name] = {"steps": made, "value": float(np.mean(values)), "seconds": round(seconds, 2)}
        return found

    def _steps_of_epochs(self, arm: Arm) -> int:
        """Return the steps of `train.epochs` at the configured `batches.size`, by the plan of an arm."""
        steps = self._plan(arm).steps_of(self._config.train.epochs or 1)
        return max(1, round(steps * arm.config.batches.size / self._config.batches.size))

    def _own_steps(self, name: str, steps: int) -> int:
        """Return the steps in which a candidate makes as many pairs as `steps` of the configured `batches.size`."""
        return max(1, round(steps * self._config.batches.size / self._arms[name].config.batches.size))

    def _plan(self, arm: Arm) -> Plan:
        artifact = Workspace(self._layouts[arm.layout]).clusters()
        return open_plan(arm.config, artifact, artifact.require())

    def _identity(self, arm: Arm) -> str:
        """Return the identity of a candidate's runs but for steps and seed; the plan's has the clusters in it."""
        model = model_fingerprint(resolve_model(arm.config.train.model, self._config.storage))
        return fingerprint("candidate", arm.name, arm.config.train, self._plan(arm).fingerprint, model)

    def _trial(self, name: str, seed: int, steps: int, identity: str) -> Trial:
        arm = self._arms[name]
        config = with_changes(
            arm.config,
            {
                # Named by its configuration: an interrupted run of another one must not be resumed.
                "workspace": f"{self._config.workspace}/tune/runs-{steps}/{identity}/{name}.seed={seed}",
                "reuse.clusters": self._layouts[arm.layout].workspace,
                "train.seed": seed,
                "batches.seed": seed,
            },
        )
        own = self._own_steps(name, steps)
        return Trial(f"{name}.seed={seed}", name, seed, own, config, fingerprint("trial", identity, name, seed))


def _why(order: list[str], ranked: Mapping[str, Mapping[str, Any]], metric: str) -> str:
    winner = ranked[order[0]]
    last = winner["rungs"][-1]
    rivals = [name for name in order[1:] if len(ranked[name]["rungs"]) == len(winner["rungs"])]
    text = f"{metric} {last['value']:.4f} after {last['steps']} steps"
    if rivals:
        text += f", against {ranked[rivals[0]]['rungs'][-1]['value']:.4f} of {rivals[0]}"
    trained = sum(bool(each["rungs"]) for each in ranked.values())
    place = 1 + sorted(ranked, key=lambda name: -ranked[name]["rank"]).index(order[0])
    return f"{text}; {trained} of {len(ranked)} candidates were trained, the sample had ranked it {place}"
