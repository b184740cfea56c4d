"""Does `predict` agree with real gains? A finished comparison's gains, source by source, against what was predicted.

    python -m tests.benchmarks.bench_predict CONFIG.yaml [--collection mix_dev] [--rows 80000] [key=value ...]

CONFIG is that of a comparison; a finished one is only read, and nothing is trained. The prediction is made anew, into a
temporary workspace, from the corpus and the vectors that the comparison had. The queries of one in-domain collection
are told apart in two ways: by the source that their ids name, and by the source of the cluster that is nearest to them.
What is predicted for a segment of queries is the mean over its queries of what is predicted for the nearest source.

JSON lines: each segment's predicted and measured gain; the rank correlation over segments with its interval, beside how
much of the measured differences is more than noise; and leave-one-source-out: whether a small table of what `predict`
measures, learned on the others, foretells the gain, and the best arm, of the segment left out.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from clusterbatch.config import RunConfig, load_config, with_changes
from clusterbatch.experiments.compare.breakdown import clusters_of_queries
from clusterbatch.experiments.compare.results import Comparison, read_comparison
from clusterbatch.experiments.compare.stage import compare, comparison_artifact
from clusterbatch.experiments.compare.statistics import Spread, difference
from clusterbatch.experiments.predict.stage import predict
from clusterbatch.pipeline.report import LEAST_QUERIES, segments_of
from tests.benchmarks.figures import emit
from tests.benchmarks.ranks import agreement, leave_one_out, left_out

FEATURES = ("gain", "diversity", "hardness", "false negatives", "duplicates", "log rows")


def features_of(source: Mapping[str, Any]) -> list[float]:
    """Return the FEATURES of one source of a prediction: all that is known before training."""
    own = source["source"]
    rows = float(np.log(source["rows"]))
    known = [source["diversity"], own["hardness"], own["false_negatives"], source["duplicates"], rows]
    return [source["gain"], *known]


@dataclass(frozen=True)
class Segment:
    """Some queries of the collection. chosen: (Q,) bool; features: (F,) means over them of their sources' features."""

    name: str
    chosen: np.ndarray
    features: np.ndarray


def segments(names: np.ndarray, nearest: np.ndarray, predicted: Mapping[str, Any]) -> list[Segment]:
    """Those with enough queries. names: (Q,) their segments, '' for none; nearest: (Q,) their sources."""
    of_source = {name: features_of(source) for name, source in predicted.items()}
    found = []
    for name in sorted(set(names.tolist()) - {""}):
        chosen = names == name
        if chosen.sum() >= LEAST_QUERIES:
            features = np.mean([of_source[source] for source in nearest[chosen].tolist()], axis=0)
            found.append(Segment(name, chosen, features))
    return found


def gain(comparison: Comparison, collection: str, arm: str, baseline: str, chosen: np.ndarray) -> Spread:
    own, its = (comparison.scores[name][collection, comparison.metric] for name in (arm, baseline))
    return difference([own[:, chosen]], [its[:, chosen]])


def report_pair(
    comparison: Comparison, collection: str, found: list[Segment], arm: str, baseline: str, by: str
) -> None:
    """One arm against one baseline over the segments."""
    spreads = [gain(comparison, collection, arm, baseline, segment.chosen) for segment in found]
    features = np.stack([segment.features for segment in found])
    measured = np.array([spread.mean for spread in spreads])
    for segment, spread in zip(found, spreads, strict=True):
        low, high = spread.interval(comparison.confidence)
        emit(
            "predict, gain of a source",
            spread.mean,
            comparison.metric,
            case=f"{segment.name} (by {by}): {arm} - {baseline}",
            low=low,
            high=high,
            queries=int(segment.chosen.sum()),
            **{name: float(value) for name, value in zip(FEATURES, segment.features, strict=True)},
        )
    case = f"by {by}: {arm} - {baseline}"
    noise = float(np.mean([spread.error**2 for spread in spreads]))
    # Noise alone would give this much of the variance; near 0, nothing could agree with what was measured.
    real = max(0.0, 1 - noise / float(measured.var(ddof=1)))
    found_out = agreement(features[:, 0], measured)
    emit(
        "predict, rank correlation of predicted and measured gain",
        found_out.rho,
        "Spearman",
        case=case,
        low=found_out.low,
        high=found_out.high,
        p=found_out.p,
        sources=len(found),
        share_of_variance_beyond_noise=real,
    )
    out = leave_one_out(features, measured)
    emit(
        "predict, leave one source out",
        out.rho,
        "Spearman",
        case=case,
        chance=out.chance_mean,
        chance_high=out.chance_high,
        p=out.p,
        sources=len(found),
    )


def report_choice(comparison: Comparison, collection: str, found: list[Segment], by: str) -> None:
    """Which arm for the segment left out: the table's choice, the best arm of the others, and the best there is."""
    arms = [arm.name for arm in comparison.arms]
    reference = comparison.reference
    gains = np.array(
        [[gain(comparison, collection, arm, reference, segment.chosen).mean for arm in arms] for segment in found]
    )
    features = np.stack([segment.features for segment in found])
    rows = np.arange(len(found))
    chosen = left_out(features, gains).argmax(axis=1)
    usual = ((gains.sum(axis=0) - gains) / (len(found) - 1)).argmax(axis=1)
    emit(
        "predict, gain of the arm chosen for a source left out",
        float(gains[rows, chosen].mean()),
        comparison.metric,
        case=f"by {by}: by the table, against the arm that is best on the others",
        peer=float(gains[rows, usual].mean()),
        best_possible=float(gains.max(axis=1).mean()),
        right=float(np.mean(chosen == gains.argmax(axis=1))),
        usual_right=float(np.mean(usual == gains.argmax(axis=1))),
        chance=1 / len(arms),
        sources=len(found),
    )


def made_predictions(config: RunConfig, rows: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        changes = {"workspace": folder, "predict.rows": rows}
        return dict(predict(with_changes(config, changes))["sources"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--collection", default="mix_dev", help="whose queries are told apart by source")
    parser.add_argument("--rows", type=int, default=80_000, help="that the prediction samples")
    options = parser.parse_args()
    config = load_config(options.config, options.overrides)
    artifact = comparison_artifact(config)
    manifest = artifact.manifest() or compare(config)
    comparison = read_comparison(config, artifact, manifest)
    name = options.collection
    clusters = clusters_of_queries(comparison, artifact, manifest).get(name)
    if clusters is None:
        parser.error(f"{name}: the comparison has no clusters that queries could be nearest to")
    nearest = np.array([cluster.rpartition(" ")[0] for cluster in clusters.tolist()])
    predicted = made_predictions(config, options.rows)
    by_id = segments_of(comparison.queries[name], config.report.segment_pattern)
    baselines = [arm.name for arm in comparison.arms if arm.name in ("source", comparison.reference)]
    clustered = [arm.name for arm in comparison.candidates if arm.name not in baselines]
    for by, names in (("id", by_id), ("nearest source", nearest)):
        found = segments(names, nearest, predicted)
        if len(found) < 4:
            continue
        for arm, baseline in itertools.product(clustered, baselines):
            report_pair(comparison, name, found, arm, baseline, by)
        report_choice(comparison, name, found, by)


if __name__ == "__main__":
    main()
