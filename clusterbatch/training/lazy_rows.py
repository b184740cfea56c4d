"""AdamW over a table of which a step touches few rows, at the price of those rows.

A row without a gradient still moves under AdamW: its moments decay, the decaying first moment moves it, and its
weights decay. Nobody reads it until a batch needs it, so all steps that it has missed are made up for at once, just
before. With p, m and v as its last gradient, in step s, left them, and for the steps c = s+1 .. t after it,

    p_t = D(s, t) p - m * sum over c of  w_c / (sqrt(v) + e_c)
    w_c = D(c, t) rate_c sqrt(1 - beta2^c) / (1 - beta1^c) * (beta1 / sqrt(beta2))^(c - s)
    e_c = epsilon sqrt(1 - beta2^c) / sqrt(beta2)^(c - s)
    D(c, t) = product over the steps after c, up to t, of (1 - rate * weight_decay)

w falls by a tenth each step, so in float32 the first _TERMS terms are the whole sum. e hardly varies over them: two
points that share the first four moments of the weights (Gauss's rule) give the sum within 2e-5 of it if v is 0, and
within float32's rounding as soon as gradients are above epsilon. Only in a run's first steps does e vary; those update
all rows. So the weights are AdamW's up to rounding.

Steps made up for in two goes have other last bits than in one. So that a resumed run has the same bits, nothing but a
batch moves a row: whoever reads the table between batches gets a copy, and a checkpoint holds the rows as their last
gradients left them, too.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8

# Steps of a run that update all rows.
_DENSE_STEPS = 100
_TERMS = 256
# Rows that are made up for at a time: their temporary values stay in a core's cache.
_CHUNK_ROWS = 256


class LazyRows:
    """A table (V, d) on the CPU and its moments, of the same shape.

    updated: (V,) int64, the number of AdamW steps after which row, moments and weights, was last brought up to date.
    rates: (steps,) learning rate of each step of the run.
    """

    def __init__(self, table: nn.Parameter, rates: np.ndarray, weight_decay: float) -> None:
        self.table = table
        self.first_moment, self.second_moment = torch.zeros_like(table), torch.zeros_like(table)
        self.updated = torch.zeros(len(table), dtype=torch.int64)
        self._weight_decay = weight_decay
        self._rates = rates
        # Logarithm of the decay of all steps before each.
        self._log_decay = np.concatenate([[0.0], np.cumsum(np.log1p(-rates * weight_decay))])

    def load(
        self, first: Tensor, second: Tensor, updated: Tensor | None, weights: Tensor | None, steps_done: int
    ) -> None:
        """Copy moments, counts (None: all rows have seen `steps_done` steps) and weights (None: they stay)."""
        self.first_moment.copy_(first)
        self.second_moment.copy_(second)
        if updated is None:
            self.updated.fill_(steps_done)
        else:
            self.updated.copy_(updated)
        if weights is not None:
            self.table.detach().copy_(weights)

    def is_up_to_date(self, count: int) -> bool:
        """Return whether all rows have seen `count` AdamW steps."""
        return bool((self.updated == count).all())

    def rows_to_update(self, touched: Tensor | None, count: int) -> Tensor | None:
        """Return the rows that AdamW step `count` (from 0) updates if it touches the given ones; None: all."""
        return None if count < _DENSE_STEPS else touched

    def catch_up(self, rows: Tensor | None, count: int, step: int) -> None:
        """Bring distinct `rows`, None for all, to the state after `count` AdamW steps, that is before `step`."""
        stale = self._stale(rows, count)
        for chunk in stale.split(_CHUNK_ROWS) if len(stale) else ():
            caught_up = self._caught_up(chunk, count, step)
            for tensor, values in zip(self._tensors, caught_up, strict=True):
                tensor.index_copy_(0, chunk, values)
        self.updated[stale] = count

    def current(self, count: int, step: int) -> Tensor:
        """Return a copy of the table after `count` AdamW steps, that is before `step`."""
        table, stale = self.table.detach().clone(), self._stale(None, count)
        for chunk in stale.split(_CHUNK_ROWS) if len(stale) else ():
            table.index_copy_(0, chunk, self._caught_up(chunk, count, step)[0])
        return table

    def update(self, rows: Tensor | None, count: int, rate: float) -> None:
        """Take AdamW step number `count` (from 0) with the gradient of `rows`, None for all, which are up to date."""
        gradient = self.table.grad
        assert gradient is not None
        tensors = self._tensors
        if rows is None:
            _adamw_(tensors, gradient, count, rate, self._weight_decay)
            self.updated.fill_(count + 1)
            return
        for chunk in rows.split(_CHUNK_ROWS):
            taken = [tensor.index_select(0, chunk) for tensor in tensors]
            _adamw_(taken, gradient.index_select(0, chunk), count, rate, self._weight_decay)
            for tensor, values in zip(tensors, taken, strict=True):
                tensor.index_copy_(0, chunk, values)
        self.updated[rows] = count + 1

    @property
    def _tensors(self) -> list[Tensor]:
        return [self.table.detach(), self.first_moment, self.second_moment]

    def _stale(self, rows: Tensor | None, count: int) -> Tensor:
        if rows is None:
            return (self.updated < count).nonzero().squeeze(1)
        return rows[self.updated[rows] < count]

    def _caught_up(self, rows: Tensor, count: int, step: int) -> list[Tensor]:
        """Return (weights, first moment, second moment) of `rows` after `count` AdamW steps."""
        updated, which = np.unique(self.updated[rows].numpy(), return_inverse=True)
        coefficients = self._coefficients(updated, count, step)
        # (rows, 1) float32 each.
        decay, weight, point, other_weight, other_point, decay1, decay2 = (
            torch.from_numpy(values.astype(np.float32)[which, None]) for values in coefficients
        )
        weights, first, second = (tensor.index_select(0, rows) for tensor in self._tensors)
        root = second.sqrt()
        move = weight / (root + point)
        move += other_weight / root.add_(other_point)
        weights.mul_(decay).sub_(move.mul_(first))
        return [weights, first.mul_(decay1), second.mul_(decay2)]

    def _coefficients(self, updated: np.ndarray, count: int, step: int) -> list[np.ndarray]:
        """Return, for each of `updated`, (U,): D, two weights each with its point, decay of first and second moment.

        All (U,) float64; the steps (updated, count] are made up for.
        """
        steps_before = count - step
        assert updated.min() >= steps_before, "a row was not brought up to date at the end of the run before"
        missed = (count - updated)[:, None]
        age = np.arange(1, min(_TERMS, int(missed.max())) + 1)
        number = np.minimum(updated[:, None] + age, count)
        correction = np.sqrt(1 - BETA2**number)
        log_decay = self._log_decay[number - steps_before]
        decay_after = np.exp(self._log_decay[step] - log_decay)
        rate = self._rates[number - steps_before - 1]
        weight = decay_after * rate * correction / (1 - BETA1**number) * (BETA1 / BETA2**0.5) ** age
        weight[age > missed] = 0.0
        point = EPSILON * correction / BETA2 ** (age / 2)
        decay = np.exp(self._log_decay[step] - self._log_decay[updated - steps_before])
        missed = missed[:, 0].astype(np.float64)
        return [decay, *_two_points(weight, point), BETA1**missed, BETA2**missed]


def _adamw_(tensors: list[Tensor], gradient: Tensor, count: int, rate: float, weight_decay: float) -> None:
    """Take a step of torch's fused AdamW on [weights, first moment, second moment], after `count` others, in place."""
    weights, first, second = tensors
    adamw(
        [weights],
        [gradient],
        [first],
        [second],
        [],
        [torch.tensor(float(count), device=weights.device)],
        fused=True,
        amsgrad=False,
        beta1=BETA1,
        beta2=BETA2,
        lr=rate,
        weight_decay=weight_decay,
        eps=EPSILON,
        maximize=False,
    )


def _two_points(weight: np.ndarray, point: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return (weight, point, weight, point), (U,) each: Gauss's rule of two points for the sums over the last axis.

    weight, point: (U, terms); weights are at least 0. A row of zero weights gives weights of zero.
    """
    total = weight.sum(1, keepdims=True)
    share = weight / np.where(total > 0, total, 1.0)
    mean = (share * point).sum(1, keepdims=True)
    deviation = (point - mean) / EPSILON
    spread = np.sqrt((share * deviation**2).sum(1))
    # Otherwise it is a single point, or points that rounding cannot tell apart.
    spreads = spread > 1e-9
    skew = np.where(spreads, (share * deviation**3).sum(1) / np.where(spreads, spread, 1.0) ** 3, 0.0)
    root = np.sqrt(4 + skew**2)
    total, mean = total[:, 0], np.where(total > 0, mean, EPSILON)[:, 0]
    scale = EPSILON * np.where(spreads, spread, 0.0) / 2
    upper, lower = (1 - skew / root) / 2, (1 + skew / root) / 2
    return total * upper, mean + scale * (skew + root), total * lower, mean + scale * (skew - root)
