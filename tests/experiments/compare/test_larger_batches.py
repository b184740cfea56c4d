"""Larger random batches beside an arm: made-up qualities at known sizes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from clusterbatch.experiments.compare.costs import Cost
from clusterbatch.experiments.compare.larger_batches import catch_up
from clusterbatch.experiments.compare.results import ArmResult, Comparison
from clusterbatch.experiments.compare.wording import larger_batches
from clusterbatch.store.traffic import Traffic
from tests.experiments.compare.made_up import made_up_comparison


def with_sizes(quality: dict[int, float], cluster: float, hours: float = 0.04) -> Comparison:
    """Random arms of sizes with their mean qualities, and one of clusters; hours grow with the size from 0.01 at 64."""
    comparison = made_up_comparison({"cluster": 0.0, **{f"random-{size}": 0.0 for size in quality}})

    def arm(name: str, mean: float, batch: int, spent: float, changes: dict[str, object]) -> ArmResult:
        found = comparison.arm(name)
        cost = Cost(60.0, 0.0, spent, 0.0, spent, spent, Traffic(), "cpu")
        spread = replace(found.spread, mean=mean)
        return replace(found, spread=spread, batch=batch, cost=cost, changes=changes)

    random = [
        arm(f"random-{size}", mean, size, 0.01 * size / 64, {"batches.stratify": "random", "batches.size": size})
        for size, mean in quality.items()
    ]
    arms = [*random, arm("cluster", cluster, 64, hours, {"batches.stratify": "cluster"})]
    return replace(comparison, arms=arms, reference="random-64")


def test_between_two_sizes_quality_is_a_line_over_the_logarithm():
    comparison = with_sizes({64: 0.40, 256: 0.44, 1024: 0.46}, cluster=0.42)
    found = catch_up(comparison, comparison.arm("cluster"))
    assert found.size == pytest.approx(128)
    # 0.04 hours are those of 256 pairs.
    assert found.same_compute == pytest.approx(0.44)
    assert "about 128 pairs" in larger_batches(comparison, "en")[0]


def test_a_smaller_batch_that_took_longer_keeps_its_own_quality():
    comparison = with_sizes({64: 0.40, 256: 0.44, 1024: 0.46}, cluster=0.42, hours=0.02)
    cost = comparison.arm("random-64").cost
    # A busy machine: .16, .04 and .01 hours.
    hours = {"random-64": 0.16, "random-1024": 0.01}
    arms = [
        replace(arm, cost=replace(cost, hours=hours[arm.name])) if arm.name in hours else arm for arm in comparison.arms
    ]
    found = catch_up(replace(comparison, arms=arms), comparison.arm("cluster"))
    assert found.same_compute == pytest.approx(0.45)


def test_nothing_is_said_beyond_the_sizes_that_were_tried():
    comparison = with_sizes({64: 0.40, 256: 0.44}, cluster=0.47, hours=1.0)
    found = catch_up(comparison, comparison.arm("cluster"))
    assert (found.size, found.same_compute) == (None, None)
    assert "up to 256 pairs" in larger_batches(comparison, "en")[0]
    assert catch_up(comparison, comparison.arm("random-256")) is None
    assert catch_up(with_sizes({64: 0.4}, cluster=0.47), comparison.arm("cluster")) is None


def test_an_arm_that_is_no_better_is_caught_up_with_at_once():
    comparison = with_sizes({64: 0.40, 256: 0.44}, cluster=0.39)
    assert catch_up(comparison, comparison.arm("cluster")).size == 64
    masked = {**comparison.arm("random-64").changes, "train.mask.surrogate_margin": -0.05}
    arms = [replace(arm, changes=masked) if arm.name == "random-64" else arm for arm in comparison.arms]
    assert catch_up(replace(comparison, arms=arms), comparison.arm("cluster")) is None
