"""The same vectors and gradients as torch's own bag, empty texts and repeated tokens included."""

from __future__ import annotations

import torch
from torch import nn

from clusterbatch.training.prepare_model import TokenMean


def test_equals_torchs_embedding_bag() -> None:
    torch.manual_seed(0)
    ids = torch.tensor([3, 3, 7, 0, 19, 3, 7])
    offsets = torch.tensor([0, 3, 3, 4])
    weight = torch.randn(20, 5, dtype=torch.float64)
    upstream = torch.randn(4, 5, dtype=torch.float64)
    results = []
    for wrap in (lambda bag: bag, TokenMean):
        bag = wrap(nn.EmbeddingBag.from_pretrained(weight.clone(), freeze=False, mode="mean"))
        vectors = bag(ids, offsets)
        vectors.backward(upstream)
        gradient = bag.weight.grad
        results.append((vectors.detach(), gradient.to_dense() if gradient.is_sparse else gradient))
    torch.testing.assert_close(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-12, atol=1e-15)


def test_adds_to_a_dense_gradient_in_place() -> None:
    bag = TokenMean(nn.EmbeddingBag(10, 2, mode="mean"))
    bag.weight.grad = view = torch.ones(10, 2)
    for _ in range(2):
        bag(torch.tensor([4, 4, 2]), torch.tensor([0, 2])).sum().backward()
    assert bag.weight.grad is view
    assert view[:, 0].tolist() == [1.0, 1.0, 3.0, 1.0, 3.0, 1.0, 1.0, 1.0, 1.0, 1.0]


def test_shares_the_parameter() -> None:
    bag = nn.EmbeddingBag(4, 2, mode="mean")
    assert TokenMean(bag).weight is bag.weight
