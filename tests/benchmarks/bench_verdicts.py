"""How often are verdicts wrong? Simulated comparisons in which the truth is known: `python -m
tests.benchmarks.bench_verdicts [--comparisons N]`.

Nothing is trained: scores are drawn as those of retrieval are. Most queries do not change between two arms, a few
change much; seeds shift whole runs, and every query under every seed once more. Arms gain nothing, less than
`min_gain`, just that, or more. A comparison is wrong if it says "pays" of any arm that gains less than `min_gain`, or
"does not pay" of any arm that gains as much. Both shares are promised to be at most .05 of 2,000 comparisons.

JSON lines: both shares over all comparisons and by seeds, arms and true gain, beside the share that was decided.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from clusterbatch.config.compare import DecideConfig
from clusterbatch.experiments.compare.statistics import Verdict, decide, difference
from tests.benchmarks.figures import emit

RULE = DecideConfig()
# True gains over the baseline, in shares of min_gain.
_GAINS = (0.0, 0.5, 0.99, 1.0, 1.5, 3.0)


@dataclass(frozen=True)
class Simulated:
    """One comparison: the true gain of each arm and the verdict on it."""

    seeds: int
    gains: list[float]
    verdicts: list[Verdict]

    @property
    def false_pays(self) -> bool:
        return any(
            verdict.outcome == "pays" and gain < RULE.min_gain
            for gain, verdict in zip(self.gains, self.verdicts, strict=True)
        )

    @property
    def false_does_not_pay(self) -> bool:
        return any(
            verdict.outcome == "does not pay" and gain >= RULE.min_gain
            for gain, verdict in zip(self.gains, self.verdicts, strict=True)
        )

    @property
    def decided(self) -> bool:
        return any(verdict.outcome != "cannot tell yet" for verdict in self.verdicts)


def simulate(random: np.random.Generator) -> Simulated:
    """Draw a comparison of random shape; all arms gain the same or nothing."""
    seeds, arms = int(random.choice([2, 3, 5])), int(random.choice([1, 3, 6]))
    queries = random.choice([30, 100, 400, 1500], size=int(random.choice([1, 2, 4])))
    gain = RULE.min_gain * float(random.choice(_GAINS))
    gains = [gain if random.random() < 0.5 else 0.0 for _ in range(arms - 1)] + [gain]
    seed_noise, touched = random.choice([0.0005, 0.002, 0.006]), random.choice([0.1, 0.3, 0.8])
    baseline = _runs(random, queries, seeds, 0.0, seed_noise, touched)
    verdicts = []
    for each in gains:
        own = _runs(random, queries, seeds, each, seed_noise, touched)
        verdicts.append(decide(difference(own, baseline), 0.0, arms, RULE))
    return Simulated(seeds, gains, verdicts)


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


def report(simulated: list[Simulated], case: str, chosen: Callable[[Simulated], bool]) -> None:
    those = [each for each in simulated if chosen(each)]
    decided = float(np.mean([each.decided for each in those]))
    for name, wrong in (
        ("verdicts, false pays", [each.false_pays for each in those]),
        ("verdicts, false does not pay", [each.false_does_not_pay for each in those]),
    ):
        emit(
            name,
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
    for seeds in (2, 3, 5):
        report(simulated, f"{seeds} seeds", lambda each, seeds=seeds: each.seeds == seeds)
    for arms in (1, 3, 6):
        report(simulated, f"{arms} arms", lambda each, arms=arms: len(each.gains) == arms)
    for share in _GAINS:
        gain = RULE.min_gain * share
        report(simulated, f"true gain {gain:g}", lambda each, gain=gain: each.gains[-1] == gain)


if __name__ == "__main__":
    main()
