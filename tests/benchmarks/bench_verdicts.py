"""How often are verdicts wrong? Simulated comparisons in which the truth is known: `python -m
tests.benchmarks.bench_verdicts [--comparisons N]`.

Nothing is trained: scores are drawn as those of retrieval are. Most queries do not change between two arms, a few
change much; seeds shift whole runs, and every query under every seed once more. Arms gain nothing, less than
`min_gain`, just that, or more, once training has shown what they can do. Until then their curves rise towards it, by
1 - exp(-epochs / pace), each arm at a pace of its own, and each point of a curve has noise; comparisons train for a
fraction of an epoch to several. A comparison is wrong if it says "pays" of any arm that in the end gains less than
`min_gain`, or "does not pay" of any arm that gains as much. Both shares are promised to be at most .05 of 2,000
comparisons.

JSON lines: both shares over all comparisons, by seeds, arms, true gain, epochs and pace, beside the share that was
decided; and over all if the rules on epochs and on rising curves were left out, which shows what they are for.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from clusterbatch.config.compare import DecideConfig
from clusterbatch.experiments.compare.statistics import Training, Verdict, decide, difference, still_rises
from tests.benchmarks.figures import emit

RULE = DecideConfig()
# True gains over the baseline, in shares of min_gain.
_GAINS = (0.0, 0.5, 0.99, 1.0, 1.5, 3.0)
_EPOCHS = (0.3, 1.0, 2.0, 4.0)
# Epochs in which an arm learns 63 % of what there is to learn.
_PACES = (0.1, 0.3, 0.6, 1.5)
# An arm's pace over the baseline's.
_SLOWER = (0.67, 1.0, 1.5)
_POINTS = 5
# Standard deviation of a point of one seed's curve.
_POINT_NOISE = 0.001


@dataclass(frozen=True)
class Simulated:
    """One comparison: the true gain of each arm, the verdict on it, and the one without the rules on training."""

    seeds: int
    epochs: float
    pace: float
    gains: list[float]
    verdicts: list[Verdict]
    hasty: list[Verdict]

    def false_pays(self, verdicts: Sequence[Verdict]) -> bool:
        return any(
            verdict.outcome == "pays" and gain < RULE.min_gain
            for gain, verdict in zip(self.gains, verdicts, strict=True)
        )

    def false_does_not_pay(self, verdicts: Sequence[Verdict]) -> bool:
        return any(
            verdict.outcome == "does not pay" and gain >= RULE.min_gain
            for gain, verdict in zip(self.gains, verdicts, strict=True)
        )


@dataclass(frozen=True)
class _Arm:
    """Scores (S, Q) of each collection at the end, and whether the mean curve still rises there."""

    scores: list[np.ndarray]
    rising: bool


def simulate(random: np.random.Generator) -> Simulated:
    """Draw a comparison of random shape; all arms gain the same or nothing."""
    seeds, arms = int(random.choice([2, 3, 5])), int(random.choice([1, 3, 6]))
    queries = random.choice([30, 100, 400, 1500], size=int(random.choice([1, 2, 4])))
    gain = RULE.min_gain * float(random.choice(_GAINS))
    gains = [gain if random.random() < 0.5 else 0.0 for _ in range(arms - 1)] + [gain]
    seed_noise, touched = random.choice([0.0005, 0.002, 0.006]), random.choice([0.1, 0.3, 0.8])
    epochs, pace = float(random.choice(_EPOCHS)), float(random.choice(_PACES))
    lift = float(random.choice([0.05, 0.15, 0.3]))

    def train(total: float, own_pace: float) -> _Arm:
        learned = total * (1 - np.exp(-epochs * np.arange(_POINTS + 1) / _POINTS / own_pace))
        scores = _runs(random, queries, seeds, learned[-1], seed_noise, touched)
        noise = _POINT_NOISE * random.standard_normal((_POINTS - 1, seeds)).mean(1)
        end = float(np.mean([each.mean() for each in scores]))
        # Seeds and queries shift whole curves, but not the untrained model.
        curve = np.concatenate([[0.0], learned[1:-1] + noise + end - learned[-1], [end]])
        return _Arm(scores, still_rises(np.arange(_POINTS + 1), curve, RULE.min_gain))

    baseline = train(lift, pace)
    verdicts, hasty = [], []
    for each in gains:
        arm = train(lift + each, pace * float(random.choice(_SLOWER)))
        found = difference(arm.scores, baseline.scores)
        hasty.append(decide(found, 0.0, arms, RULE))
        trained = Training(epochs, arm.rising or baseline.rising)
        verdicts.append(decide(found, 0.0, arms, RULE, trained) if trained.missing else hasty[-1])
    return Simulated(seeds, epochs, pace, gains, verdicts, hasty)


def _runs(
    random: np.random.Generator, queries: np.ndarray, seeds: int, gain: float, seed_noise: float, touched: float
) -> list[np.ndarray]:
    """Scores (S, Q) of each collection, but for what the arms have in common."""
    shift = seed_noise * random.standard_normal((seeds, 1))
    found = []
    for count in queries.tolist():
        # What a query gains beyond the mean: nothing for most, a rank or two for some.
        effect = 0.25 * random.standard_normal(count) * (random.random(count) < touched)
        found.append(gain + effect + shift + 0.02 * random.standard_normal((seeds, count)))
    return found


def report(simulated: list[Simulated], case: str, chosen: Callable[[Simulated], bool], hasty: bool = False) -> None:
    those = [(each, each.hasty if hasty else each.verdicts) for each in simulated if chosen(each)]
    decided = float(np.mean([any(v.outcome != "cannot tell yet" for v in verdicts) for _, verdicts in those]))
    without = " (without rules on training)" if hasty else ""
    for name, wrong in (
        ("verdicts, false pays", [each.false_pays(verdicts) for each, verdicts in those]),
        ("verdicts, false does not pay", [each.false_does_not_pay(verdicts) for each, verdicts in those]),
    ):
        emit(
            f"{name}{without}",
            float(np.mean(wrong)),
            "share of comparisons",
            case=case,
            comparisons=len(those),
            decided=decided,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comparisons", type=int, default=2_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    random = np.random.default_rng(options.seed)
    simulated = [simulate(random) for _ in range(options.comparisons)]
    report(simulated, "all", lambda each: True)
    report(simulated, "all", lambda each: True, hasty=True)
    for seeds in (2, 3, 5):
        report(simulated, f"{seeds} seeds", lambda each, seeds=seeds: each.seeds == seeds)
    for arms in (1, 3, 6):
        report(simulated, f"{arms} arms", lambda each, arms=arms: len(each.gains) == arms)
    for share in _GAINS:
        gain = RULE.min_gain * share
        report(simulated, f"true gain {gain:g}", lambda each, gain=gain: each.gains[-1] == gain)
    for epochs in _EPOCHS:
        report(simulated, f"{epochs:g} epochs", lambda each, epochs=epochs: each.epochs == epochs)
    for pace in _PACES:
        report(simulated, f"pace {pace:g} epochs", lambda each, pace=pace: each.pace == pace)


if __name__ == "__main__":
    main()
