"""Ragged collectives, and gradients in one fixed layout."""

from __future__ import annotations

import time

import numpy as np
import torch
from torch import nn

from clusterbatch.training.collectives import FlatGradients, World
from tests.training.worlds import run_world

_COUNTS = [3, 0, 5]


def _gather_nothing(world: World) -> tuple[tuple[int, ...], bool]:
    rows = torch.zeros(0, 2, requires_grad=True)
    gathered = world.gather_differentiable(rows, [0, 0])
    # As in a loss whose columns are documents and, here, no hard negatives.
    columns = torch.cat([torch.ones(1, 2, requires_grad=True), gathered])
    columns.sum().backward()
    return tuple(gathered.shape), rows.grad is not None and rows.grad.shape == (0, 2)


def test_a_batch_in_which_nobody_has_a_hard_negative_is_gathered_too() -> None:
    assert run_world(2, _gather_nothing) == [((0, 2), True)] * 2


def _wait_and_copy(world: World) -> tuple[float, list[float], int]:
    begun, asked = time.monotonic(), 0

    def is_ready() -> bool:
        nonlocal asked
        asked += 1
        return world.rank != 1 or time.monotonic() - begun > 1.0

    world.wait_until(is_ready, torch.device("cpu"))
    seconds = time.monotonic() - begun
    tensors = [torch.full((2,), float(world.rank)), torch.full((1,), 10.0 + world.rank)]
    world.copy_from_first_(tensors)
    return seconds, torch.cat(tensors).tolist(), asked


def test_all_wait_for_the_last_in_many_short_looks_and_take_what_the_first_has() -> None:
    for seconds, copied, asked in run_world(3, _wait_and_copy):
        assert seconds > 0.9
        assert asked > 2
        assert copied == [0.0, 0.0, 10.0]


def _gather(world: World) -> tuple[list[list[float]], list[list[float]], list[int]]:
    count = _COUNTS[world.rank]
    rows = (100.0 * world.rank + torch.arange(2.0 * count).view(count, 2)).requires_grad_()
    gathered = world.gather_differentiable(rows, _COUNTS)
    # Every rank weights all rows with its own number + 1: their sum is what a row's owner must get.
    (gathered * (world.rank + 1)).sum().backward()
    assert torch.equal(world.gather(rows.detach(), _COUNTS), gathered)
    return gathered.tolist(), rows.grad.tolist(), world.counts(count, torch.device("cpu"))


def test_ragged_rows_come_in_rank_order_and_gradients_are_summed_without_a_factor() -> None:
    expected = [
        (100.0 * rank + torch.arange(2.0 * count)).view(count, 2).tolist() for rank, count in enumerate(_COUNTS)
    ]
    for rank, (gathered, gradient, counts) in enumerate(run_world(3, _gather)):
        assert gathered == [row for rows in expected for row in rows]
        assert gradient == [[6.0, 6.0]] * _COUNTS[rank]
        assert counts == _COUNTS


def _reduce(world: World, table_rows: int) -> tuple[list, list, int]:
    table, weight = nn.Parameter(torch.zeros(table_rows, 2)), nn.Parameter(torch.zeros(3))
    gradients = FlatGradients([table, weight], [table], world)
    touched = np.array([world.rank, world.rank + 1, world.rank])
    gradients.begin(touched)
    for row in touched:
        table.grad[row] += 1.0 + world.rank
    weight.grad += world.rank
    sent = 0
    original = World.sum_

    def counting(self: World, tensor: torch.Tensor) -> torch.Tensor:
        nonlocal sent
        sent += tensor.numel()
        return original(self, tensor)

    World.sum_ = counting  # type: ignore[method-assign]
    try:
        gradients.reduce()
    finally:
        World.sum_ = original  # type: ignore[method-assign]
    return table.grad[:4].tolist(), weight.grad.tolist(), sent


def test_only_touched_rows_of_a_table_are_sent_and_the_sum_is_the_same() -> None:
    for table_rows, elements in ((100, 3 * 2 + 3), (4, 4 * 2 + 3)):
        for table, weight, sent in run_world(2, _reduce, table_rows):
            assert table == [[2.0, 2.0], [5.0, 5.0], [2.0, 2.0], [0.0, 0.0]]
            assert weight == [1.0] * 3
            assert sent == elements


def test_clipping_scales_to_the_norm_and_reports_the_norm_before() -> None:
    weight = nn.Parameter(torch.zeros(2))
    gradients = FlatGradients([weight], [], World())
    weight.grad += torch.tensor([3.0, 4.0])
    assert float(gradients.clip(10.0)) == 5.0
    assert weight.grad.tolist() == [3.0, 4.0]
    assert float(gradients.clip(1.0)) == 5.0
    assert torch.allclose(weight.grad, torch.tensor([0.6, 0.8]))
