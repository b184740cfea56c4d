"""What a budget is turned into, on a machine whose speed is made up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from clusterbatch.config import RunConfig, load_config, with_changes
from clusterbatch.encoder.model import Encoder
from clusterbatch.experiments.compare import budget
from clusterbatch.experiments.compare import stage as compare
from clusterbatch.experiments.compare.arms import Arm
from clusterbatch.experiments.compare.budget import choose_sample, choose_steps, decided, planned
from clusterbatch.experiments.compare.plan import ComparisonPlan
from clusterbatch.experiments.compare.sample import sample_home
from clusterbatch.store import Counts, Receipt
from clusterbatch.store.workspace import Workspace

ROWS, BUDGET, ARMS, SEEDS = 100_000, 600.0, 2, 3
SECONDS_A_ROW, STARTING, MEASURING, SECONDS_A_STEP = 0.01, 2.0, 1.0, 0.05


class Plan:
    steps_per_epoch = 10_000


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    monkeypatch.setattr(budget, "_seconds_a_row", lambda config: SECONDS_A_ROW)
    monkeypatch.setattr(budget, "_timed_measurement", lambda config: (STARTING, MEASURING))
    monkeypatch.setattr(budget, "_seconds_a_step", lambda *_: SECONDS_A_STEP)
    monkeypatch.setattr(budget, "plan_comparison", lambda config: made_up(1e-6))
    overrides = [f"workspace={tmp_path}", "compare.arms=[random,cluster]", f"compare.budget={BUDGET}"]
    config = load_config(None, overrides)
    counts = Counts(read=ROWS, written=ROWS)
    receipt = Receipt(unit=0, fingerprint="corpus", counts=counts)
    Workspace(config).corpus.commit("corpus", [receipt], config={}, inputs={}, seconds=0.0, details={})
    return config


def made_up(pair_seconds: float) -> ComparisonPlan:
    return ComparisonPlan(ROWS, ROWS, ARMS, SEEDS, ARMS * SEEDS, 1, 1.0, 1.0, pair_seconds, MEASURING)


def steps(config: RunConfig, spent: float) -> RunConfig:
    arms = [Arm(name, config, "layout") for name in config.compare.arms]
    plans = dict.fromkeys(config.compare.arms, Plan())
    return choose_steps(config, arms, plans, {"layout": None}, spent)


def test_the_sample_and_the_trials_fit_what_is_left(config: RunConfig):
    sampled = choose_sample(config, spent=100.0)
    embedding = sampled.compare.sample * ROWS * SECONDS_A_ROW
    assert 0.2 * BUDGET < embedding < 0.5 * BUDGET
    chosen = steps(sampled, spent=300.0)
    trial = STARTING + chosen.compare.points * MEASURING + chosen.compare.steps * SECONDS_A_STEP
    running = trial * ARMS * SEEDS / config.compare.workers
    # Most of the time that is left is used, and some remains for what estimates miss.
    assert 0.6 * (BUDGET - 300) < running < 0.8 * (BUDGET - 300)
    assert chosen.compare.budget is None


def test_a_smaller_sample_comes_before_fewer_steps(config: RunConfig, monkeypatch: pytest.MonkeyPatch):
    pair_seconds = 0.02
    monkeypatch.setattr(budget, "plan_comparison", lambda config: made_up(pair_seconds))
    sampled = choose_sample(config, spent=100.0)
    rows = sampled.compare.sample * ROWS
    # An epoch of every run fits beside the embedding of the sample, and the time is used.
    training = rows * pair_seconds * ARMS * SEEDS / config.compare.workers
    total = rows * SECONDS_A_ROW + training
    assert 0.5 * (BUDGET - 100) < total < 0.8 * (BUDGET - 100)
    # Who asks for steps has chosen himself.
    own = with_changes(config, {"compare.steps": 50})
    assert choose_sample(own, spent=100.0).compare.sample > 2 * sampled.compare.sample


def test_a_given_sample_is_kept_and_its_steps_fit(config: RunConfig):
    own = with_changes(config, {"compare.sample": 0.5})
    sampled = choose_sample(own, spent=100.0)
    assert sampled.compare.sample == 0.5
    chosen = steps(sampled, spent=300.0)
    assert (chosen.compare.sample, chosen.compare.budget) == (0.5, None)
    assert chosen.compare.steps < Plan.steps_per_epoch
    assert steps(choose_sample(own, spent=1.0), spent=2.0).compare == chosen.compare
    assert decided(own).compare == chosen.compare
    # Neither another sample nor one that is to be chosen has its steps.
    for other in (with_changes(config, {"compare.sample": 0.25}), config):
        assert decided(other) is other
    again = steps(choose_sample(own, spent=1.0, force=True), spent=400.0)
    assert (again.compare.sample, again.compare.steps < chosen.compare.steps) == (0.5, True)


def test_decisions_of_earlier_versions_stand(config: RunConfig):
    # They kept the steps beside the sample.
    decisions = {"compare.sample": 0.25, "compare.budget": None, "compare.steps": 30, "compare.points": 2}
    Workspace(config).root.write_json(budget._name(config), decisions)
    compare = steps(choose_sample(config, spent=1.0), spent=2.0).compare
    assert (compare.sample, compare.steps, compare.points) == (0.25, 30, 2)
    assert decided(config).compare == compare


def test_a_budget_that_cannot_be_kept_is_said_as_soon_as_it_is_known(
    config: RunConfig, caplog: pytest.LogCaptureFixture
):
    chosen = steps(choose_sample(config, spent=100.0), spent=BUDGET - 5)
    assert chosen.compare.steps == 20
    assert "do not suffice" in caplog.text


def test_the_steps_of_a_long_comparison_fit_too(config: RunConfig):
    long = with_changes(config, {"compare.long": True})
    chosen = steps(choose_sample(long, spent=100.0), spent=300.0)
    plain = steps(choose_sample(config, spent=100.0), spent=300.0)
    # As many are made in all.
    made = compare._steps(chosen, Plan())  # type: ignore[arg-type]
    assert plain.compare.steps - 3 < made <= plain.compare.steps
    # And no fewer than a run needs to say anything.
    late = steps(choose_sample(with_changes(long, {"compare.seeds": 2}), spent=100.0), spent=2 * BUDGET)
    assert 20 <= compare._steps(late, Plan()) < 23  # type: ignore[arg-type]


def test_what_was_decided_stands_when_an_interrupted_comparison_goes_on(config: RunConfig):
    sampled = choose_sample(config, spent=100.0)
    assert choose_sample(config, spent=500.0).compare == sampled.compare
    chosen = steps(sampled, spent=300.0)
    assert steps(choose_sample(config, spent=1.0), spent=2.0).compare == chosen.compare
    assert decided(config).compare == chosen.compare


@pytest.mark.parametrize(
    "changes",
    [
        {"compare.arms": ["random", "source"]},
        {"compare.seeds": 5},
        {"compare.steps": 30},
        {"compare.learning_rates": [0.01, 0.02]},
        {"train.model": "another"},
        {"train.steps": 30},
        {"batches.size": 64},
        {"compare.budget": BUDGET + 60},
    ],
)
def test_what_was_decided_is_not_for_another_comparison(config: RunConfig, changes: dict[str, Any]):
    chosen = steps(choose_sample(config, spent=100.0), spent=300.0)
    other = with_changes(config, changes)
    assert decided(other) is other
    again = steps(choose_sample(other, spent=100.0), spent=300.0)
    assert again.compare.budget is None
    assert (again.compare.arms, again.compare.seeds) == (other.compare.arms, other.compare.seeds)
    # Each has its own.
    assert decided(other).compare == again.compare
    assert decided(config).compare == chosen.compare


def test_steps_that_are_asked_for_later_are_not_those_of_before(config: RunConfig):
    assert steps(choose_sample(config, spent=100.0), spent=300.0).compare.steps > 30
    asked = with_changes(config, {"compare.steps": 30})
    assert steps(choose_sample(asked, spent=100.0), spent=300.0).compare.steps == 30


def test_force_decides_anew(config: RunConfig):
    first = choose_sample(config, spent=100.0)
    steps(first, spent=300.0)
    again = choose_sample(config, spent=400.0, force=True)
    assert again.compare.sample < first.compare.sample
    chosen = steps(again, spent=500.0)
    assert decided(config).compare == chosen.compare
    assert chosen.compare.sample == again.compare.sample


def test_what_is_timed_is_measured_behind_the_prompts_of_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen = []

    class Collection:
        def __init__(self, *_: Any) -> None: ...

        def measure(self, encoder: Encoder, **_: Any) -> None:
            seen.append(encoder.prompts["query"])

    monkeypatch.setattr(budget, "configured_collections", lambda config: [None])
    monkeypatch.setattr(budget, "LoadedCollection", Collection)
    budget._timed_measurement(load_config(None, [f"workspace={tmp_path}", "train.prompts.query=ask"]))
    assert set(seen) == {"ask"}


@pytest.mark.parametrize("asked", [1, 5, 30])
@pytest.mark.parametrize("spent", [0.0, 2 * BUDGET])
def test_no_more_is_done_than_was_asked_for(config: RunConfig, asked: int, spent: float):
    assert planned(with_changes(config, {"compare.steps": asked})).compare.steps == asked
    chosen = steps(with_changes(config, {"compare.steps": asked}), spent).compare.steps
    assert chosen == (asked if spent == 0.0 else min(asked, 20))
    assert steps(with_changes(config, {"train.steps": asked}), spent).compare.steps == chosen


@pytest.mark.parametrize("sweep", ["each", "baseline"])
def test_a_sweep_of_the_baseline_is_not_counted_for_all_arms(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, sweep: str
):
    seconds = {"random": SECONDS_A_STEP, "cluster": 3 * SECONDS_A_STEP}
    monkeypatch.setattr(budget, "_seconds_a_step", lambda config, plan, reader: seconds[config.batches.stratify])
    rates = {"compare.learning_rates": [1e-3, 2e-3, 4e-3], "compare.temperatures": [0.02, 0.05]}
    swept = with_changes(config, {**rates, "compare.sweep": sweep})
    arms = [Arm(name, with_changes(swept, {"batches.stratify": name}), "layout") for name in seconds]
    chosen = choose_steps(swept, arms, dict.fromkeys(seconds, Plan()), {"layout": None}, 300.0).compare
    trainings = {"random": SEEDS + 6, "cluster": SEEDS + (6 if sweep == "each" else 0)}
    running = sum(
        runs * (STARTING + chosen.points * MEASURING + chosen.steps * seconds[name]) for name, runs in trainings.items()
    )
    running /= swept.compare.workers
    assert 0.7 * (BUDGET - 300) < running < 0.76 * (BUDGET - 300)


def test_too_little_time_still_gives_a_whole_comparison(config: RunConfig):
    sampled = choose_sample(config, spent=BUDGET)
    assert sampled.compare.sample * ROWS >= config.batches.size
    chosen = steps(sampled, spent=2 * BUDGET)
    assert chosen.compare.points == 1
    assert chosen.compare.steps >= 20


def test_a_huge_corpus_has_a_small_sample_of_its_own(config: RunConfig, tmp_path: Path):
    huge = with_changes(config, {"workspace": f"{tmp_path}/huge"})
    receipt = Receipt(unit=0, fingerprint="corpus", counts=Counts(read=10**9, written=10**9))
    Workspace(huge).corpus.commit("corpus", [receipt], config={}, inputs={}, seconds=0.0, details={})
    assert 5000 < choose_sample(huge, spent=0.0).compare.sample * 10**9 < 50_000
    tiny = [sample_home(config, share, "uniform") for share in (1e-5, 2e-5, 1.2e-4, 1.4e-4)]
    assert len(set(tiny)) == 4
    assert sample_home(config, 0.25, "uniform").endswith("/uniform-0.2500")
