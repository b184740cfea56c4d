"""Computed twice or kept: the same vectors and the same gradients, to the last bit, dropout included."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from clusterbatch.encoder.tokens import Tokens
from clusterbatch.training.grad_cache import CachedEmbedding, RandomKey


class _Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(50, 8)
        self.layer = nn.Linear(8, 8)
        self.calls = 0

    def forward(self, tokens: Tokens) -> Tensor:
        self.calls += 1
        ids = torch.from_numpy(tokens.values.astype(np.int64))
        row = torch.from_numpy(np.repeat(np.arange(len(tokens)), tokens.lengths))
        summed = torch.zeros(len(tokens), 8).index_add(0, row, self.table(ids))
        return self.layer(nn.functional.dropout(torch.relu(summed), 0.3, training=True))


def _tokens() -> Tokens:
    random = np.random.default_rng(0)
    return Tokens.from_lists([random.integers(0, 50, random.integers(1, 12)).tolist() for _ in range(40)])


_KEY = RandomKey(1, 2, 0)


def _run(activation_bytes: int, key: RandomKey = _KEY) -> tuple[Tensor, list[Tensor], _Encoder, float]:
    encoder = _Encoder()
    embedding = CachedEmbedding(encoder, _tokens(), key, micro_batch_tokens=64, activation_bytes=activation_bytes)
    embedding.vectors.square().sum().sin().backward()
    embedding.backward()
    gradients = [parameter.grad.clone() for parameter in encoder.parameters()]
    return embedding.vectors.detach(), gradients, encoder, embedding.kept_share


@pytest.mark.parametrize("activation_bytes", [0, 10_000])
def test_recomputed_equals_kept_bit_for_bit(activation_bytes: int) -> None:
    kept_vectors, kept_gradients, _, all_kept = _run(2**30)
    vectors, gradients, _, share = _run(activation_bytes)
    assert all_kept == 1.0
    assert share == 0.0 if activation_bytes == 0 else 0.0 < share < 1.0
    assert torch.equal(vectors, kept_vectors)
    assert all(torch.equal(one, other) for one, other in zip(gradients, kept_gradients, strict=True))


def test_what_fits_is_computed_once_and_the_rest_twice() -> None:
    _, _, kept, _ = _run(2**30)
    _, _, cached, _ = _run(0)
    assert cached.calls == 2 * kept.calls


def test_rows_come_back_in_the_order_of_the_input() -> None:
    encoder, tokens = _Encoder(), _tokens()
    encoder.forward = lambda tokens: encoder.table(
        torch.from_numpy(tokens.values[tokens.offsets[:-1]].astype(np.int64))
    )
    embedding = CachedEmbedding(encoder, tokens, RandomKey(0, 0, 0), micro_batch_tokens=64, activation_bytes=0)
    firsts = torch.from_numpy(tokens.values[tokens.offsets[:-1]].astype(np.int64))
    assert torch.equal(embedding.vectors, encoder.table(firsts))


@pytest.mark.parametrize("other", [RandomKey(2, 2, 0), RandomKey(1, 3, 0), RandomKey(1, 2, 1)])
def test_seed_step_and_rank_each_change_what_dropout_drops(other: RandomKey) -> None:
    assert not torch.equal(_run(0)[0], _run(0, other)[0])


class _LeanEncoder(_Encoder):
    """Can keep its input alone and compute the rest again."""

    def __init__(self) -> None:
        super().__init__()
        self.lean_calls = 0

    def keeping_less(self, tokens: Tokens) -> Tensor:
        self.lean_calls += 1
        anchor = torch.ones((), requires_grad=True)
        return torch.utils.checkpoint.checkpoint(lambda one: self(tokens) * one, anchor, use_reentrant=False)


@pytest.mark.parametrize("activation_bytes", [0, 10_000, 2**30])
def test_less_is_kept_only_if_not_everything_fits(activation_bytes: int) -> None:
    kept_vectors, kept_gradients, _, _ = _run(2**30)
    encoder = _LeanEncoder()
    embedding = CachedEmbedding(
        encoder,
        _tokens(),
        _KEY,
        micro_batch_tokens=64,
        activation_bytes=activation_bytes,
        encode_keeping_less=encoder.keeping_less,
    )
    embedding.vectors.square().sum().sin().backward()
    embedding.backward()
    assert (encoder.lean_calls > 1) == (activation_bytes == 10_000)
    # All but the first, which was measured, keep next to nothing.
    assert embedding.kept_share == float(activation_bytes > 0)
    assert torch.equal(embedding.vectors, kept_vectors)
    gradients = [parameter.grad for parameter in encoder.parameters()]
    assert all(torch.equal(one, other) for one, other in zip(gradients, kept_gradients, strict=True))


def test_padding_counts_only_if_there_is_any() -> None:
    def computed(padded: bool) -> int:
        return CachedEmbedding(
            _Encoder(), _tokens(), _KEY, micro_batch_tokens=64, activation_bytes=0, padded=padded
        ).padded_tokens

    assert computed(padded=False) == int(_tokens().lengths.sum()) < computed(padded=True)
