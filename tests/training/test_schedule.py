from __future__ import annotations

from itertools import pairwise

import pytest

from clusterbatch.training.optimizer import learning_rate_factor


def _curve(schedule: str, steps: int = 100, warmup: float = 0.1, decay: float = 0.2) -> list[float]:
    return [learning_rate_factor(schedule, step, steps, warmup, decay) for step in range(steps)]


@pytest.mark.parametrize("schedule", ["linear", "cosine", "wsd", "constant"])
def test_rises_linearly_to_the_peak_and_never_passes_it(schedule: str) -> None:
    curve = _curve(schedule)
    assert curve[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert max(curve) == 1.0
    assert min(curve) > 0.0


def test_linear_falls_to_nothing_in_equal_steps() -> None:
    curve = _curve("linear")
    assert curve[10] == 1.0
    assert [one - two for one, two in pairwise(curve[10:])] == pytest.approx([1 / 90] * 89)
    assert curve[-1] == pytest.approx(1 / 90)


def test_cosine_is_half_way_in_the_middle() -> None:
    curve = _curve("cosine")
    assert curve[55] == pytest.approx(0.5)
    assert curve[20] > _curve("linear")[20]


def test_wsd_is_stable_until_the_last_share() -> None:
    curve = _curve("wsd")
    assert set(curve[10:81]) == {1.0}
    assert curve[90] == pytest.approx(0.5)
    assert curve[99] == pytest.approx(1 / 20)


def test_without_warmup_the_first_step_is_the_peak() -> None:
    assert learning_rate_factor("linear", 0, 10, 0.0, 0.2) == 1.0
