"""The loss by its definition, whatever the chunks; gradients against autograd are in test_gradient_parity."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from clusterbatch.config import TrainConfig
from clusterbatch.training import loss as loss_module
from clusterbatch.training.collectives import GatheredBatch, World
from clusterbatch.training.loss import ContrastiveLoss, info_nce
from clusterbatch.training.masks import IGNORED, NEGATIVE, POSITIVE, BatchFacts

_ROWS, _DIMENSIONS = 10, 6


def _vectors(seed: int, rows: int = _ROWS) -> Tensor:
    torch.manual_seed(seed)
    return normalize(torch.randn(rows, _DIMENSIONS, dtype=torch.float64), dim=1)


def _facts(rows: int = _ROWS) -> BatchFacts:
    return BatchFacts(torch.arange(rows), torch.arange(rows) + 1000)


def _loss(config: TrainConfig, query: Tensor, document: Tensor, **more: Tensor) -> tuple[Tensor, dict[str, float]]:
    rows = len(query)
    module = ContrastiveLoss(config).double()
    value, statistics = module(query, document, None, GatheredBatch(World(), _facts(rows), [rows], [0], **more))
    return value, {name: float(getattr(statistics, name)) for name in statistics.__dataclass_fields__}


def test_one_positive_each_is_plain_cross_entropy() -> None:
    query, document = _vectors(1), _vectors(2)
    value, _ = _loss(TrainConfig(temperature=0.1), query, document)
    assert value.item() == pytest.approx(cross_entropy(query @ document.T / 0.1, torch.arange(_ROWS)).item(), rel=1e-6)


def test_statistics_of_a_batch_whose_answers_are_known() -> None:
    document = torch.eye(4, dtype=torch.float64)
    # Rows 0 and 1 find their document, 2 and 3 find each other's.
    query = document[[0, 1, 3, 2]]
    _, statistics = _loss(TrainConfig(), query, document)
    assert statistics == {"rows": 4, "correct": 2, "hardest": 2.0, "ignored": 0, "considered": 12}


@pytest.mark.parametrize("rows_at_once", [1, 3, 10])
def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch, rows_at_once: int) -> None:
    config = TrainConfig(directions=["query_to_document", "document_to_query", "query_to_query"], matryoshka=[3, 6])

    def run() -> tuple[float, Tensor, Tensor]:
        query, document = _vectors(1).requires_grad_(), _vectors(2).requires_grad_()
        value, _ = _loss(config, query, document)
        value.backward()
        return value.item(), query.grad, document.grad

    whole = run()
    monkeypatch.setattr(loss_module, "_BLOCK_ELEMENTS", rows_at_once * 2 * _ROWS)
    chunked = run()
    assert chunked[0] == pytest.approx(whole[0], rel=1e-12)
    torch.testing.assert_close(chunked[1], whole[1], rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(chunked[2], whole[2], rtol=1e-10, atol=1e-14)


def test_the_score_matrix_never_exists_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "_BLOCK_ELEMENTS", 512)
    seen = []

    def relation(start: int, end: int, scores: Tensor) -> Tensor:
        seen.append(scores.numel())
        block = torch.full(scores.shape, NEGATIVE, dtype=torch.int8)
        block[torch.arange(end - start), torch.arange(start, end)] = POSITIVE
        return block

    rows = _vectors(1, 200)
    info_nce(rows, _vectors(2, 200), torch.tensor(20.0, dtype=torch.float64), torch.full((200,), 1 / 200), relation)
    assert sum(seen) == 200 * 200
    assert max(seen) <= 512


def test_several_positives_compete_with_negatives_only() -> None:
    """By the formula of the module's text, written out for one row."""
    row, columns = _vectors(1, 1), _vectors(2, 5)
    kinds = torch.tensor([[POSITIVE, NEGATIVE, POSITIVE, IGNORED, NEGATIVE]], dtype=torch.int8)
    scale = torch.tensor(7.0, dtype=torch.float64)
    value, _ = info_nce(row, columns, scale, torch.ones(1, dtype=torch.float64), lambda *_: kinds)
    weight = (row @ columns.T * 7.0).exp()[0].tolist()
    rest = weight[1] + weight[4]
    expected = -(math.log(weight[0] / (weight[0] + rest)) + math.log(weight[2] / (weight[2] + rest))) / 2
    assert value.item() == pytest.approx(expected, rel=1e-12)


def test_gradients_with_several_positives_and_the_temperature_are_those_of_the_formula() -> None:
    kinds = torch.tensor([[1, 0, 1, 2, 0], [0, 1, 0, 0, 2], [2, 2, 1, 2, 2]], dtype=torch.int8)
    torch.manual_seed(4)
    inputs = (
        torch.randn(3, _DIMENSIONS, dtype=torch.float64, requires_grad=True),
        torch.randn(5, _DIMENSIONS, dtype=torch.float64, requires_grad=True),
        torch.tensor(1.3, dtype=torch.float64, requires_grad=True),
    )
    weight = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    # gradcheck compares with finite differences; the last row has no negatives and must not give NaN.
    assert torch.autograd.gradcheck(lambda *given: info_nce(*given, weight, lambda *_: kinds)[0], inputs)


def test_rows_count_by_their_weights() -> None:
    query, document = _vectors(1), _vectors(2)
    weight = torch.arange(1.0, _ROWS + 1)
    value, _ = _loss(TrainConfig(temperature=0.1), query, document, weight_B=weight)
    each = cross_entropy(query @ document.T / 0.1, torch.arange(_ROWS), reduction="none")
    assert value.item() == pytest.approx(((each * weight).sum() / weight.sum()).item(), rel=1e-6)


def test_matryoshka_is_the_mean_over_truncated_and_renormalised_vectors() -> None:
    query, document = _vectors(1), _vectors(2)
    value, _ = _loss(TrainConfig(matryoshka=[2, 6]), query, document)
    parts = [
        _loss(TrainConfig(), normalize(query[:, :size], dim=1), normalize(document[:, :size], dim=1))[0]
        for size in (2, 6)
    ]
    assert value.item() == pytest.approx((parts[0] + parts[1]).item() / 2, rel=1e-12)


def test_a_learned_temperature_stays_above_a_hundredth_and_can_rise_from_there() -> None:
    module = ContrastiveLoss(TrainConfig(temperature=0.05, learn_temperature=True))
    assert module.temperature == pytest.approx(0.05)
    with torch.no_grad():
        module.log_scale.fill_(10.0)
    module.limit_temperature_()
    assert module.temperature == pytest.approx(0.01)
    # Unlike directions: a wrong answer scores above the right one, which a higher temperature mends.
    query, document = torch.eye(2), torch.eye(2).flip(0)
    facts = BatchFacts(torch.arange(2), torch.arange(2))
    loss, _ = module(query, document, None, GatheredBatch(World(), facts, [2], [0]))
    loss.backward()
    assert module.log_scale.grad is not None
    assert module.log_scale.grad > 0


def test_a_fixed_temperature_is_what_was_asked_for_and_a_learned_one_cannot_begin_below_its_limit() -> None:
    module = ContrastiveLoss(TrainConfig(temperature=0.002))
    module.limit_temperature_()
    assert module.temperature == pytest.approx(0.002)
    with pytest.raises(ValueError, match="temperature"):
        TrainConfig(temperature=0.002, learn_temperature=True)
