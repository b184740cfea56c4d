"""Results of a finished comparison: scores by arm, gains with intervals, verdicts, curves and costs. No Ray."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from clusterbatch.config import RunConfig
from clusterbatch.config.compare import DecideConfig
from clusterbatch.errors import UsageError
from clusterbatch.evaluation.metrics import parse_metric
from clusterbatch.experiments.compare.costs import Cost, cost_of, extra_cost
from clusterbatch.experiments.compare.statistics import (
    Outcome,
    Spread,
    Training,
    Verdict,
    decide,
    difference,
    holm,
    joint_level,
    mean_spread,
    randomisation_p,
    still_rises,
)
from clusterbatch.experiments.compare.trial import is_for_tuning
from clusterbatch.store import Artifact, Manifest
from clusterbatch.store.details import ComparisonDetails, TrialDetails, details_of
from clusterbatch.store.tables import read_parquet

# An arm that costs less than this share more is no dearer: seconds of training scatter.
_DEARER = 0.25

# (S, Q) scores by (collection, metric).
Scores = dict[tuple[str, str], np.ndarray]


@dataclass(frozen=True)
class ArmResult:
    """One arm over all seeds. `gain`, `verdict` and p values are against the baseline, None for itself.

    training: how long it trained, and whether its curve still rises at the end.

    hardness: of its batches, by the surrogate (hardness.py); None where its shards keep no vectors.
    curve: (P, S) deciding metric (mean over collections) at the comparison's `steps`.
    """

    name: str
    spread: Spread
    gain: Spread | None
    verdict: Verdict | None
    p_randomisation: float | None
    p_corrected: float | None
    by_collection: Mapping[str, Spread]
    curve: np.ndarray
    training: Training
    losses: Sequence[Sequence[float]]
    stratify: str
    pairs: int
    batch: int
    purity: float
    hardness: float | None
    setting: Mapping[str, float]
    changes: Mapping[str, Any]
    cost: Cost


@dataclass(frozen=True)
class Comparison:
    """`steps`: (P,) where the curves have points, 0 first. `untrained`: the deciding metric before any step.

    same_batches: names of arms that trained on the same batches, two or more together.
    """

    metric: str
    reference: str
    collections: list[str]
    steps: np.ndarray
    untrained: float
    arms: list[ArmResult]
    scores: dict[str, Scores]
    queries: dict[str, list[str]]
    swept: bool
    rule: DecideConfig
    same_batches: Sequence[Sequence[str]] = ()

    def arm(self, name: str) -> ArmResult:
        return next(arm for arm in self.arms if arm.name == name)

    @property
    def confidence(self) -> float:
        return self.rule.confidence

    @property
    def baseline(self) -> ArmResult:
        return self.arm(self.reference)

    @property
    def others(self) -> list[ArmResult]:
        """The arms that are measured against the baseline."""
        return [arm for arm in self.arms if arm.name != self.reference]

    @property
    def candidates(self) -> list[ArmResult]:
        """The arms that the question is about: of clusters, of the user's groups or of super-batches, if there are any.

        Random ones are there to explain, or as another way to spend money.
        """
        clustered = [arm for arm in self.others if arm.stratify in ("cluster", "group") or _has_super_batches(arm)]
        return clustered or [arm for arm in self.others if not arm.stratify.startswith("random")] or self.others

    @property
    def best(self) -> ArmResult:
        """The candidate with the highest mean of those that pay.

        If none does, of those that are not decided yet, for one of them may; otherwise of all.
        """

        def of(outcome: Outcome) -> list[ArmResult]:
            return [arm for arm in self.candidates if arm.verdict and arm.verdict.outcome == outcome]

        return max(of("pays") or of("cannot tell yet") or self.candidates, key=lambda arm: arm.spread.mean)

    @property
    def decisive(self) -> ArmResult:
        """The arm that the answer is about: the cheapest candidate that pays and over which the best does not."""
        best = self.best
        if best.verdict is None or best.verdict.outcome != "pays":
            return best
        for arm in sorted(self.candidates, key=lambda arm: extra_cost(arm.cost, best.cost)):
            if extra_cost(best.cost, arm.cost) < _DEARER:
                break
            if arm.verdict and arm.verdict.outcome == "pays" and self.over(best, arm).outcome != "pays":
                return arm
        return best

    @property
    def cheaper(self) -> ArmResult | None:
        """Another arm that pays and over which the decisive one does not pay once more, for example of source batches.

        Embedding and clustering a corpus must earn their price over batches that need neither.
        """
        decisive, candidates = self.decisive, {arm.name for arm in self.candidates}
        if decisive.verdict is None or decisive.verdict.outcome != "pays":
            return None
        for arm in sorted(self.others, key=lambda arm: extra_cost(arm.cost, decisive.cost)):
            if arm.name in candidates or extra_cost(decisive.cost, arm.cost) < _DEARER:
                continue
            if arm.verdict and arm.verdict.outcome == "pays" and self.over(decisive, arm).outcome != "pays":
                return arm
        return None

    def over(self, arm: ArmResult, other: ArmResult) -> Verdict:
        """Return whether `arm` pays over `other`, by the same rule and queries as over the baseline."""
        own, others = (
            [self.scores[name][each, self.metric] for each in self.collections] for name in (arm.name, other.name)
        )
        return decide(
            difference(own, others),
            extra_cost(arm.cost, other.cost),
            len(self.others),
            self.rule,
            arm.training.beside(other.training),
        )

    @property
    def simultaneous(self) -> float:
        """Level of each arm's interval that makes all of them together hold with `confidence`."""
        return joint_level(self.confidence, len(self.others))

    def joint(self, intervals: int) -> float:
        """Return the level of each of so many intervals of every arm that makes all of them hold with `confidence`.

        For intervals of one arm, too: which arm is looked at has been chosen by its results.
        """
        return joint_level(self.confidence, intervals * len(self.others))


def read_comparison(config: RunConfig, artifact: Artifact, manifest: Manifest) -> Comparison:
    """Analyse a committed comparison; of swept settings only the queries that did not choose them count.

    Raises UsageError if `config` names an arm that was not compared.
    """
    compare, details = config.compare, details_of(manifest, ComparisonDetails)
    unknown = [name for name in (*compare.arms, compare.reference) if name not in details["arms"]]
    if unknown:
        raise UsageError(f"compare.arms: {unknown[0]} was not compared here, only {', '.join(details['arms'])}")
    metric = parse_metric(compare.decide.metric).name
    collections = details["collections"]
    trials = [details["trials"][str(number)] for number in details["main"]]
    trained = [trial for trial in trials if trial["steps"]]
    scores, queries = _read_scores(artifact, manifest, trained, details["swept"])
    of_arm = {name: [trial for trial in trained if trial["arm"] == name] for name in details["arms"]}
    untrained = _point(next(trial for trial in trials if not trial["steps"])["curve"], 0, metric)
    steps = sorted({point["step"] for trial in trained for point in trial["curve"]})
    costs = {name: cost_of(config, details, name, of_arm[name]) for name in of_arm}

    def deciding(name: str) -> list[np.ndarray]:
        return [scores[name][collection, metric] for collection in collections]

    others = [name for name in of_arm if name != compare.reference]
    reference = deciding(compare.reference)
    gains = {name: difference(deciding(name), reference) for name in others}
    randomised = {name: randomisation_p(deciding(name), reference) for name in others}
    corrected = dict(zip(others, holm([_p_value(gains[name]) for name in others]), strict=True))
    curves = {
        name: np.array(
            [[untrained] * len(own)] + [[_point(trial["curve"], step, metric) for trial in own] for step in steps]
        )
        for name, own in of_arm.items()
    }
    training = {
        name: Training(
            details["steps"] / max(1, details["arms"][name]["steps_per_epoch"]),
            still_rises(np.array([0, *steps]), curve.mean(1), compare.decide.min_gain),
        )
        for name, curve in curves.items()
    }

    def verdict(name: str) -> Verdict:
        extra = extra_cost(costs[name], costs[compare.reference])
        trained = training[name].beside(training[compare.reference])
        return decide(gains[name], extra, len(others), compare.decide, trained)

    results = [
        ArmResult(
            name=name,
            spread=mean_spread(deciding(name)),
            gain=gains.get(name),
            verdict=verdict(name) if name in gains else None,
            p_randomisation=randomised.get(name),
            p_corrected=corrected.get(name),
            by_collection={
                collection: difference([own], [its])
                for collection, own, its in zip(collections, deciding(name), reference, strict=True)
            },
            curve=curves[name],
            training=training[name],
            losses=own[0]["losses"],
            stratify=details["arms"][name]["stratify"],
            pairs=details["steps"] * details["arms"][name]["batch"],
            batch=details["arms"][name]["batch"],
            purity=details["arms"][name]["purity"],
            hardness=details["arms"][name]["hardness"],
            setting=details["chosen"][name],
            changes=details["arms"][name]["changes"],
            cost=costs[name],
        )
        for name, own in of_arm.items()
    ]
    return Comparison(
        metric=metric,
        reference=compare.reference,
        collections=collections,
        steps=np.array([0, *steps]),
        untrained=untrained,
        arms=results,
        scores=scores,
        queries=queries,
        swept=details["swept"],
        rule=compare.decide,
        same_batches=details.get("same_batches", ()),
    )


def _read_scores(
    artifact: Artifact, manifest: Manifest, trials: Sequence[TrialDetails], swept: bool
) -> tuple[dict[str, Scores], dict[str, list[str]]]:
    """Scores by arm, seeds in order, and the query ids by collection."""
    parts = {part.details["trial"]: part for part in manifest.parts if "trial" in part.details}
    stacked: dict[str, dict[tuple[str, str], list[np.ndarray]]] = {}
    queries: dict[str, list[str]] = {}
    for trial in sorted(trials, key=lambda trial: trial["seed"]):
        table = read_parquet(artifact.folder, parts[trial["trial"]])
        if swept:
            table = table.filter([not is_for_tuning(query) for query in table["query_id"].to_pylist()])
        values = table["value"].to_numpy()
        for (collection, metric), rows in _groups(table).items():
            stacked.setdefault(trial["arm"], {}).setdefault((collection, metric), []).append(values[rows])
            if collection not in queries:
                queries[collection] = table["query_id"].take(pa.array(rows)).to_pylist()
    return {arm: {key: np.stack(values) for key, values in keys.items()} for arm, keys in stacked.items()}, queries


def _groups(table: pa.Table) -> dict[tuple[str, str], list[int]]:
    """Rows by (collection, metric)."""
    rows: dict[tuple[str, str], list[int]] = {}
    for row, key in enumerate(zip(table["collection"].to_pylist(), table["metric"].to_pylist(), strict=True)):
        rows.setdefault(key, []).append(row)
    return rows


def _point(curve: Sequence[Mapping[str, Any]], step: int, metric: str) -> float:
    """Mean over collections at one step."""
    return float(np.mean([point["value"] for point in curve if point["step"] == step and point["metric"] == metric]))


def _p_value(gain: Spread) -> float:
    value = gain.p_value()
    return 1.0 if math.isnan(value) else value


def _has_super_batches(arm: ArmResult) -> bool:
    """Return whether the arm itself asks for super-batches, for all steps or for a phase of them."""
    phases = [{"super_batch": arm.changes.get("batches.super_batch", 1)}, *arm.changes.get("batches.curriculum", [])]
    return any((phase.get("super_batch") or 1) > 1 for phase in phases)
