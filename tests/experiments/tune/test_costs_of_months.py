"""Costs of a month of a refresh policy: worker hours, at the price of the configuration if there is one."""

from __future__ import annotations

from typing import Any

import pytest

from clusterbatch.config import RunConfig, load_config
from clusterbatch.errors import UsageError
from clusterbatch.experiments.tune.refresh_interval import _add_costs, _stages_on_gpu, _with_hours, tune_refresh

SECONDS = {"ingest": 360.0, "embed": 720.0, "cluster": 360.0, "train": 1800.0}


def _config(*words: str) -> RunConfig:
    workers = ["corpus.workers=1", "embed.workers=2", "cluster.workers=3", "train.workers=4"]
    return load_config(None, ["workspace=w", *workers, *words])


def _cost(config: RunConfig, row: dict[str, Any], on_gpu: bool) -> tuple[float, str]:
    priced = _with_hours(config, row, on_gpu)
    currency = _add_costs(config.compare.prices, [priced])
    return priced["cost"], currency


def test_a_month_of_an_earlier_version_costs_what_its_seconds_say() -> None:
    config = _config("compare.prices={cpu_hour: 2.0, gpu_hour: 100.0}")
    others = (720 * 2 + 360 * 3 + 1800 * 4) / 3600
    # Its own cost was made with prices of its time.
    earlier = {"month": 1, "seconds": SECONDS, "cost": 99.0}
    assert _cost(config, earlier, on_gpu=False) == (pytest.approx(2 * (0.1 + others)), "USD")
    # Ingest had no GPU.
    assert _cost(config, earlier, on_gpu=True)[0] == pytest.approx(0.2 + 100 * others)
    assert _cost(config, {**earlier, "worker_hours": 5.0}, on_gpu=True)[0] == pytest.approx(0.2 + 490)


def test_each_stage_of_a_month_has_the_price_of_what_it_ran_on() -> None:
    month = {"month": 1, "seconds": SECONDS, "worker_hours": 5.0, "gpu_hours": 2.0}
    assert _cost(_config("compare.prices={cpu_hour: 1.0, gpu_hour: 100.0}"), month, on_gpu=True)[0] == 3 + 200
    on_gpu = _stages_on_gpu(_config("embed.device=cuda", "cluster.device=cpu", "train.device=cuda:0"))
    assert on_gpu == {"drift", "embed", "train"}
    # Once one hour has a price, one without counts as nothing; a price that nothing has to pay is none.
    assert _cost(_config("compare.prices.gpu_hour=100"), month, on_gpu=True)[0] == 200
    cheap = {**month, "gpu_hours": 0.0}
    assert _cost(_config("compare.prices.gpu_hour=100"), cheap, on_gpu=False) == (5.0, "worker hours")
    assert _cost(_config(), month, on_gpu=True) == (5.0, "worker hours")


def test_months_without_scores_are_refused_to_a_teacher() -> None:
    arrivals = "[{paths: [a], queries: [a]}, {paths: [b], queries: [b]}]"
    words = [f"tune.stream={{arrivals: {arrivals}, refresh: [never, 1]}}", "refresh.every_steps=3", "evaluate.path=[c]"]
    config = load_config(None, ["workspace=w", "score.teacher=t", "train.teacher_kl=0.5", *words])
    with pytest.raises(UsageError, match=r"score\.teacher: tune\.stream"):
        tune_refresh(config)
