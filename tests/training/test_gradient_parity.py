"""Traps 1, 2 and 3: a factor of W, the second direction's shape, gathered order with hard negatives."""

from __future__ import annotations

import pytest

from tests.training.parity import Parity, parity_table


@pytest.fixture(scope="module")
def table() -> list[Parity]:
    return parity_table()


def test_every_case_is_there(table: list[Parity]) -> None:
    assert len({(row.ranks, row.backward, row.data, row.directions) for row in table}) == 3 * 2 * 3 * 2


def test_losses_of_all_ranks_add_up_to_the_reference(table: list[Parity]) -> None:
    assert max(row.loss_error for row in table) < 1e-12


def test_gradients_equal_float64_autograd_of_one_process(table: list[Parity]) -> None:
    assert max(row.gradient_error for row in table) < 1e-12
