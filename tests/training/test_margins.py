"""Margin-MSE where it is easy to see what it must be; its gradients over ranks are in test_gradient_parity.py."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from clusterbatch.config import load_config
from clusterbatch.errors import UsageError
from clusterbatch.training.margin_mse import TeacherMargins, margin_mse

TEMPERATURE = 0.05


@pytest.fixture
def vectors() -> tuple[torch.Tensor, ...]:
    """Three rows, with two, no and one negatives."""
    torch.manual_seed(0)
    return tuple(normalize(torch.randn(3, 6, dtype=torch.float64), dim=1) for _ in range(3))


def _student(query: torch.Tensor, document: torch.Tensor, negative: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    return (query[row] * document[row]).sum(1) - (query[row] * negative).sum(1)


def test_nothing_is_lost_by_a_model_that_agrees_with_its_teacher(vectors) -> None:
    row, weight = torch.tensor([0, 0, 2]), torch.full((3,), 1 / 3)
    margin = _student(*vectors, row)
    assert float(margin_mse(*vectors, TeacherMargins(row, margin), weight, TEMPERATURE)) == pytest.approx(0, abs=1e-20)
    # One temperature off, in one of a row's two negatives.
    margin[1] += TEMPERATURE
    assert float(margin_mse(*vectors, TeacherMargins(row, margin), weight, TEMPERATURE)) == pytest.approx(1 / 6)


def test_what_nobody_scored_counts_nothing(vectors) -> None:
    query, document, negative = (vector.requires_grad_() for vector in vectors)
    row, weight = torch.tensor([0, 0, 2]), torch.tensor([0.5, 0.2, 0.3])
    nan = torch.tensor([0.1, torch.nan, torch.nan])
    loss = margin_mse(query, document, negative, TeacherMargins(row, nan), weight, TEMPERATURE)
    loss.backward()
    alone = margin_mse(query, document, negative[:1], TeacherMargins(row[:1], nan[:1]), weight, TEMPERATURE)
    assert loss.item() == alone.item() > 0
    assert torch.isfinite(query.grad).all()
    assert not negative.grad[1:].any()
    none = TeacherMargins(row, torch.full((3,), torch.nan))
    assert float(margin_mse(query, document, negative, none, weight, TEMPERATURE)) == 0


def test_it_needs_margins_and_margins_need_negatives() -> None:
    with pytest.raises(UsageError, match=r"train\.margin_mse needs mine\.margins"):
        load_config(None, ["workspace=/none", "mine.negatives=1", "train.margin_mse=0.5"])
    with pytest.raises(UsageError, match="margins are those of negatives"):
        load_config(None, ["workspace=/none", "mine.margins=true"])
