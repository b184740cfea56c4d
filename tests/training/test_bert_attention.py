"""Attention within packed texts on CPUs: its results and gradients against float64 autograd, text by text."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from clusterbatch.training.bert_attention import attend, attend_backward

# Texts of each length: some are computed by torch's kernel, others, in bfloat16, by products with the scores in memory.
_RUNS = [(16, 40), (3, 33), (2, 32), (40, 16), (1, 1)]
_TOKENS = sum(texts * length for texts, length in _RUNS)
# Rows behind the last text.
_REST = 7
_HEADS, _WIDTH = 2, 64


def _drawn(seed: int, width: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(_TOKENS + _REST, width, generator=generator).to(dtype)


def _found(dtype: torch.dtype, dropout: float = 0.0) -> tuple[Tensor, Tensor]:
    projected, gradient = _drawn(0, 3 * _WIDTH, dtype), _drawn(1, _WIDTH, dtype)
    attended, logarithms = attend(projected, _RUNS, _HEADS, dropout, 5)
    return attended, attend_backward(gradient, projected, attended, logarithms, _RUNS, _HEADS, dropout, 5)


def _expected(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    projected = _drawn(0, 3 * _WIDTH, dtype).double().requires_grad_()
    pieces = []
    for text in projected[:_TOKENS].split([length for texts, length in _RUNS for _ in range(texts)]):
        # heads, L, d of a head
        query, key, value = text.view(len(text), 3, _HEADS, -1).permute(1, 2, 0, 3)
        weights = torch.softmax(query @ key.transpose(1, 2) / (_WIDTH / _HEADS) ** 0.5, -1)
        pieces.append((weights @ value).transpose(0, 1).flatten(1))
    attended = torch.cat(pieces)
    attended.backward(_drawn(1, _WIDTH, dtype)[:_TOKENS].double())
    assert projected.grad is not None
    return attended.detach(), projected.grad[:_TOKENS]


def _error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_results_and_gradients_equal_float64_autograd(dtype: torch.dtype, tolerance: float) -> None:
    for found, expected in zip(_found(dtype), _expected(dtype), strict=True):
        assert found.dtype == dtype
        start = 0
        for texts, length in _RUNS:
            rows = slice(start, start := start + texts * length)
            assert _error(found[rows], expected[rows]) < tolerance, (texts, length)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_no_text_are_zero(dtype: torch.dtype, dropout: float) -> None:
    for found in _found(dtype, dropout):
        assert not found[_TOKENS:].any()
        assert found[:_TOKENS].any(dim=1).all()


def test_both_types_drop_the_same() -> None:
    for found, expected in zip(_found(torch.bfloat16, 0.3), _found(torch.float32, 0.3), strict=True):
        assert _error(found, expected) < 2e-2
