"""Costs of a month of a refresh policy: worker hours, at the price of the configuration if there is one."""

from __future__ import annotations

import pytest

from clusterbatch.config import load_config
from clusterbatch.errors import UsageError
from clusterbatch.experiments.tune.refresh_interval import _with_cost, tune_refresh

SECONDS = {"ingest": 360.0, "embed": 720.0, "cluster": 360.0, "train": 1800.0}


def test_a_month_of_an_earlier_version_costs_what_its_seconds_say() -> None:
    words = ["workspace=w", "corpus.workers=1", "embed.workers=2", "cluster.workers=3", "train.workers=4"]
    config = load_config(None, words)
    hours = (360 * 1 + 720 * 2 + 360 * 3 + 1800 * 4) / 3600
    # Its own cost was made with prices of its time.
    earlier = {"month": 1, "seconds": SECONDS, "cost": 99.0}
    assert _with_cost(config, earlier, 2.0)["cost"] == pytest.approx(2 * hours)
    assert _with_cost(config, {**earlier, "worker_hours": 5.0}, 2.0)["cost"] == 10.0


def test_months_without_scores_are_refused_to_a_teacher() -> None:
    arrivals = "[{paths: [a], queries: [a]}, {paths: [b], queries: [b]}]"
    words = [f"tune.stream={{arrivals: {arrivals}, refresh: [never, 1]}}", "refresh.every_steps=3", "evaluate.path=[c]"]
    config = load_config(None, ["workspace=w", "score.teacher=t", "train.teacher_kl=0.5", *words])
    with pytest.raises(UsageError, match=r"score\.teacher: tune\.stream"):
        tune_refresh(config)
