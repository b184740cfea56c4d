"""The mean of token embeddings with a backward pass that does not write a gradient for every token.

Torch's EmbeddingBag spreads the gradient of each text over its tokens (tokens x dimensions, 46 MB for a batch of 30,000
tokens) before it adds up by row. The same sum, turned round, is an embedding bag itself: the gradient of a table row is
the weighted sum of the gradients of the texts in which its token stands. That needs only the rows that are touched.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding_bag


class TokenMean(nn.EmbeddingBag):
    """nn.EmbeddingBag(mode="mean") whose table gets a sparse gradient of distinct rows. Shares the table of `bag`."""

    def __init__(self, bag: nn.EmbeddingBag) -> None:
        assert bag.mode == "mean"
        assert bag.padding_idx is None
        super().__init__(bag.num_embeddings, bag.embedding_dim, mode="mean", _weight=bag.weight.detach())
        # The same Parameter, so that whoever holds it sees it trained.
        self.weight = bag.weight

    def forward(self, input: Tensor, offsets: Tensor) -> Tensor:  # type: ignore[override]
        """input: (tokens,) ids of all texts; offsets: (texts,) where each begins; result (texts, dimensions)."""
        vectors: Tensor = _TokenMean.apply(self.weight, input, offsets)
        return vectors


class _TokenMean(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, weight: Tensor, ids: Tensor, offsets: Tensor) -> Tensor:
        context.save_for_backward(ids, offsets)
        context.rows = len(weight)
        return embedding_bag(ids, weight, offsets, mode="mean")

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        ids, offsets = context.saved_tensors
        gradient = gradients[0].contiguous()
        lengths = torch.diff(offsets, append=offsets.new_tensor([len(ids)]))
        text = torch.repeat_interleave(torch.arange(len(lengths), device=ids.device), lengths)
        share = lengths.clamp(min=1).to(gradient.dtype).reciprocal()
        # Tokens in the order of the table; stable, so that sums come out the same every time.
        order = torch.argsort(ids, stable=True)
        row, counts = torch.unique_consecutive(ids[order], return_counts=True)
        text = text[order]
        starts = torch.cumsum(counts, 0) - counts
        sums = embedding_bag(text, gradient, starts, mode="sum", per_sample_weights=share[text])
        size = (context.rows, gradient.shape[1])
        found = torch.sparse_coo_tensor(row[None], sums, size, is_coalesced=True, check_invariants=False)
        return found, None, None
