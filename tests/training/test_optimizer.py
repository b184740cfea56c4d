"""Rows of a table that are updated lazily end where torch's own AdamW over the whole table takes them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from clusterbatch.config import TrainConfig
from clusterbatch.encoder.load import load_encoder
from clusterbatch.encoder.tokens import Tokens
from clusterbatch.training import lazy_rows
from clusterbatch.training.collectives import World
from clusterbatch.training.optimizer import Optimizer
from clusterbatch.training.step import TrainingStep
from tests.training.batches import plain_batch
from tests.training.small_run import VOCABULARY, tiny_model
from tests.training.worlds import run_world

_CONFIG = TrainConfig(weight_decay=0.05, warmup=0.1, schedule="cosine")
_STEPS, _ROWS, _RATE = 400, 60, 5e-3


def _table() -> nn.Parameter:
    return nn.Parameter(torch.randn(_ROWS, 8, generator=torch.Generator().manual_seed(0)))


def _gradient(step: int) -> tuple[Tensor, Tensor]:
    """Rows and their gradients, some of them tiny or zero; the last rows are touched rarely, one only once."""
    random = np.random.default_rng([3, step])
    wanted = random.random(_ROWS) < np.geomspace(0.5, 0.01, _ROWS)
    wanted[-1] = step == 120
    rows = torch.from_numpy(np.flatnonzero(wanted))
    scale = 10.0 ** random.integers(-9, 0, (len(rows), 1))
    values = scale * random.standard_normal((len(rows), 8)) * (random.random((len(rows), 8)) < 0.9)
    return rows, torch.from_numpy(values).float()


class _Run:
    """An optimizer over one table, and what it does in a step."""

    def __init__(self, *, lazy: bool = True) -> None:
        self.table = _table()
        self.table.grad = torch.zeros_like(self.table)
        tables = ["table"] if lazy else []
        self.optimizer = Optimizer({"table": self.table}, _CONFIG, _STEPS, _RATE, tables)

    def steps(self, first: int, end: int) -> None:
        for step in range(first, end):
            rows, values = _gradient(step)
            self.optimizer.catch_up(step, rows)
            assert self.table.grad is not None
            self.table.grad.zero_()
            self.table.grad[rows] = values
            self.optimizer.step(step)

    def weights(self, step: int) -> Tensor:
        return self.optimizer.current(step).get("table", self.table.detach())


def _reference(steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weights and moments of torch's AdamW over all rows, in float64."""
    table = nn.Parameter(_table().detach().double())
    adamw = torch.optim.AdamW([table], weight_decay=_CONFIG.weight_decay)
    rates = Optimizer({"table": _table()}, _CONFIG, _STEPS, _RATE)
    for step in range(steps):
        rows, values = _gradient(step)
        table.grad = torch.zeros_like(table)
        table.grad[rows] = values.double()
        adamw.param_groups[0]["lr"] = rates.learning_rate(step)
        adamw.step()
    state = adamw.state[table]
    return table.detach(), state["exp_avg"], state["exp_avg_sq"]


@pytest.mark.parametrize("steps", [90, 130, 399, _STEPS])
def test_rows_updated_lazily_are_those_of_adamw(steps: int) -> None:
    lazy, dense = _Run(), _Run(lazy=False)
    lazy.steps(0, steps)
    dense.steps(0, steps)
    wanted, _, _ = _reference(steps)
    rounding = (dense.table.detach() - wanted).abs().max()
    error = (lazy.weights(steps) - wanted).abs().max()
    assert error < max(2 * float(rounding), 1e-6)
    assert torch.isfinite(lazy.table).all()


def test_all_rows_are_up_to_date_after_the_last_step() -> None:
    run = _Run()
    run.steps(0, _STEPS)
    weights, first, second = _reference(_STEPS)
    assert run.optimizer.current(_STEPS) == {}
    saved = run.optimizer.saved_state()
    assert set(saved) == {"exp_avg/table", "exp_avg_sq/table"}
    torch.testing.assert_close(run.table.detach(), weights.float(), rtol=0, atol=1e-5)
    torch.testing.assert_close(saved["exp_avg/table"], first.float(), rtol=1e-4, atol=1e-12)
    torch.testing.assert_close(saved["exp_avg_sq/table"], second.float(), rtol=1e-4, atol=1e-20)


def test_most_rows_wait_between_steps() -> None:
    """So that the tests above can fail."""
    run = _Run()
    run.steps(0, 150)
    assert (run.optimizer.state()["updated/table"] < 150).sum() > _ROWS / 2


@pytest.mark.parametrize("at", [40, 101, 150, 333])
def test_a_saved_state_continues_with_the_same_bits(at: int) -> None:
    undisturbed, saved = _Run(), _Run()
    undisturbed.steps(0, _STEPS)
    saved.steps(0, at)
    weights, state = saved.weights(at), saved.optimizer.saved_state()
    resumed = _Run()
    with torch.no_grad():
        resumed.table.copy_(weights)
    resumed.optimizer.load(state, at)
    resumed.steps(at, _STEPS)
    assert torch.equal(resumed.table, undisturbed.table)
    for name, moment in undisturbed.optimizer.state().items():
        assert torch.equal(resumed.optimizer.state()[name], moment)


@pytest.mark.parametrize("at", [150, 333])
def test_a_saved_state_continues_on_a_device_that_updates_all_rows(at: int) -> None:
    """As when a run that began on a CPU is resumed on a GPU: `train.device` may change in between."""
    dense, saved = _Run(lazy=False), _Run()
    dense.steps(0, at + 20)
    saved.steps(0, at)
    resumed = _Run(lazy=False)
    with torch.no_grad():
        resumed.table.copy_(saved.weights(at))
    resumed.optimizer.load(saved.optimizer.saved_state(), at)
    resumed.steps(at, at + 20)
    torch.testing.assert_close(resumed.table.detach(), dense.table.detach(), rtol=0, atol=5e-6)
    state = resumed.optimizer.state()
    for name, moment in dense.optimizer.state().items():
        torch.testing.assert_close(state[name], moment, rtol=1e-4, atol=1e-12)


def test_a_later_run_continues_the_count_of_an_earlier_one() -> None:
    """The second generation has its own schedule, and begins with moments that have seen 400 steps."""
    first = _Run()
    first.steps(0, _STEPS)
    lazy, dense = _Run(), _Run(lazy=False)
    for run in (lazy, dense):
        with torch.no_grad():
            run.table.copy_(first.table)
        run.optimizer.load(first.optimizer.saved_state(), _STEPS)
        run.steps(0, 60)
    torch.testing.assert_close(lazy.weights(60), dense.table.detach(), rtol=0, atol=5e-6)


@pytest.mark.parametrize("updated", [100, 1000, 50_000])
@pytest.mark.parametrize("missed", [1, 2, 3, 17, 100, 700])
def test_two_points_stand_for_all_missed_steps(updated: int, missed: int) -> None:
    beta1, beta2, epsilon = 0.9, 0.999, 1e-8
    rates = np.linspace(1e-3, 5e-3, missed)
    step = np.arange(1, missed + 1)
    decay_after = np.append(np.cumprod((1 - rates * 0.01)[::-1])[::-1][1:], 1.0)
    correction = np.sqrt(1 - beta2 ** (updated + step)), 1 - beta1 ** (updated + step)
    rows = lazy_rows.LazyRows(nn.Parameter(torch.zeros(1, 1)), rates, 0.01)
    found = rows._coefficients(np.array([updated]), updated + missed, missed)
    for root in [0.0, *10.0 ** np.arange(-12.0, 0.0)]:
        moves = decay_after * rates / correction[1] * beta1**step
        moves /= root * beta2 ** (step / 2) / correction[0] + epsilon
        ours = found[1] / (root + found[2]) + found[3] / (root + found[4])
        assert ours[0] == pytest.approx(moves.sum(), rel=2e-5 if updated == 100 else 2e-7)
    assert found[0][0] == pytest.approx(np.prod(1 - rates * 0.01))


def _trained(world: World, model: str, dense_steps: int) -> tuple[np.ndarray, int]:
    """Weights of a static encoder after 30 steps of ragged slices, and how many rows then wait for an update."""
    lazy_rows._DENSE_STEPS = dense_steps
    config = TrainConfig(encoder="static", learning_rate=1e-2, learn_temperature=True, clip_norm=0.5)
    training = TrainingStep(load_encoder(model, "static"), config, 31, world)
    random = np.random.default_rng(7)
    for step in range(30):
        texts = [random.integers(5, VOCABULARY, random.integers(2, 5)) for _ in range(20)]
        bounds = np.linspace(0, 10, world.size + 1).astype(int)
        own = slice(bounds[world.rank], bounds[world.rank + 1])
        number = np.arange(10, dtype=np.uint64)[own]
        training.run(
            plain_batch(
                step,
                *(Tokens.from_lists(part[own], np.uint8) for part in (texts[:10], texts[10:])),
                number,
                np.diff(bounds),
            )
        )
    waiting = int((training.optimizer.state()["updated/encoder.backbone.weight"] < 30).sum())
    with training.current_weights(30):
        return training.encoder.backbone.weight.detach().numpy().copy(), waiting


def test_weights_do_not_depend_on_the_world_nor_on_laziness(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "tiny")
    try:
        ((wanted, none_waits),) = run_world(1, _trained, model, 1000)
        assert none_waits == 0
        for size in (1, 2, 4):
            results = run_world(size, _trained, model, 5)
            for weights, waiting in results:
                assert waiting > VOCABULARY / 4
                assert np.array_equal(weights, results[0][0])
                np.testing.assert_allclose(weights, wanted, rtol=0, atol=3e-5)
    finally:
        lazy_rows._DENSE_STEPS = 100
