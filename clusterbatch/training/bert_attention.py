"""Attention within packed texts on CPUs, forward and backward, one call for all neighbours of one length.

T tokens, H heads, d the width of all heads together; query, key and value stand side by side, (T, 3 d).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

# Scores of all heads that exist at once if attention drops some of them: few enough to stay in a cache.
_SCORES = 2**20


def runs(lengths: np.ndarray) -> list[tuple[int, int]]:
    """(texts, length) of each run of neighbours of one length: micro-batches come sorted, so there are few."""
    starts = np.concatenate([[0], np.flatnonzero(np.diff(lengths)) + 1, [len(lengths)]])
    return [(int(count), int(lengths[start])) for start, count in zip(starts[:-1], np.diff(starts), strict=True)]


def draw_dropout(shape: Sequence[int], share: float, generator: torch.Generator) -> tuple[Tensor, float]:
    """Return which elements are dropped, and the factor of the others; 16 bits are drawn for each."""
    count, level = int(np.prod(shape)), min(round(share * 2**16), 2**16 - 1)
    drawn = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None, generator=generator)
    dropped = drawn.view(torch.int16)[:count].view(*shape) < level - 2**15
    return dropped, 2**16 / (2**16 - level)


def attend(
    projected_TE: Tensor, runs: Sequence[tuple[int, int]], heads: int, dropout: float, seed: int
) -> tuple[Tensor, Tensor]:
    """Return (T, d) from query, key and value side by side, (T, 3 d); and the logarithms of the sums, if needed.

    The scores are float32, as those of torch's kernel are.
    """
    attended_TD = projected_TE.new_empty(len(projected_TE), projected_TE.shape[1] // 3)
    logarithms, start = [], 0
    if dropout:
        for rows, (query, key, value), dropped, factor in _blocks(projected_TE, runs, heads, dropout, seed):
            weights = _softmax(query, key).masked_fill_(dropped, 0.0)
            _heads(attended_TD[rows], query.shape[1], heads).copy_(
                torch.bmm(weights, value).mul_(factor).view(-1, heads, *query.shape[1:])
            )
        return attended_TD, projected_TE.new_empty(0)
    for count, length in runs:
        rows = slice(start, start := start + count * length)
        attended, logarithm = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *_three(projected_TE[rows], length, heads).float()
        )
        _heads(attended_TD[rows], length, heads).copy_(attended)
        logarithms.append(logarithm.flatten())
    return attended_TD, torch.cat(logarithms)


def attend_backward(
    gradient_TD: Tensor,
    projected_TE: Tensor,
    attended_TD: Tensor,
    kept_logarithms: Tensor,
    runs: Sequence[tuple[int, int]],
    heads: int,
    dropout: float,
    seed: int,
) -> Tensor:
    """Return the gradient (T, 3 d) of `projected` from that of what was attended to; the others as in `attend`."""
    found_TE, start, first = torch.empty_like(projected_TE), 0, 0
    if dropout:
        # For each token and head: the sum over its weights of weight times gradient.
        drawn_TH = (gradient_TD.float() * attended_TD.float()).unflatten(1, (heads, -1)).sum(-1)
        for rows, (query, key, value), dropped, factor in _blocks(projected_TE, runs, heads, dropout, seed):
            length, scale = query.shape[1], query.shape[-1] ** -0.5
            gradient = _heads(gradient_TD[rows], length, heads).float().flatten(0, 1)
            weights = _softmax(query, key)
            into = _three(found_TE[rows], length, heads)
            kept = weights.masked_fill(dropped, 0.0).mul_(factor)
            into[2].copy_(torch.bmm(kept.transpose(1, 2), gradient).view_as(into[2]))
            of_weights = torch.bmm(gradient, value.transpose(1, 2)).masked_fill_(dropped, 0.0).mul_(factor)
            drawn = drawn_TH[rows].view(-1, length, heads).transpose(1, 2).reshape(-1, length, 1)
            of_scores = of_weights.sub_(drawn).mul_(weights).mul_(scale)
            into[0].copy_(torch.bmm(of_scores, key).view_as(into[0]))
            into[1].copy_(torch.bmm(of_scores.transpose(1, 2), query).view_as(into[1]))
        return found_TE
    for count, length in runs:
        rows = slice(start, start := start + count * length)
        logarithms = kept_logarithms[first : first + count * heads * length].view(count, heads, length)
        first += logarithms.numel()
        gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            _heads(gradient_TD[rows], length, heads).float(),
            *_three(projected_TE[rows], length, heads).float(),
            _heads(attended_TD[rows], length, heads).float(),
            logarithms,
            0.0,
            False,
        )
        for into, gradient in zip(_three(found_TE[rows], length, heads), gradients, strict=True):
            into.copy_(gradient)
    return found_TE


def _blocks(
    projected_TE: Tensor, runs: Sequence[tuple[int, int]], heads: int, dropout: float, seed: int
) -> Iterator[tuple[slice, Tensor, Tensor, float]]:
    """Rows of some texts of one length, their query, key and value (3, texts x heads, L, d) in float32, and dropout."""
    generator, start = torch.Generator().manual_seed(seed), 0
    for texts, length in runs:
        step = max(1, _SCORES // (heads * length**2))
        for first in range(0, texts, step):
            rows = slice(start, start := start + min(step, texts - first) * length)
            parts = _three(projected_TE[rows], length, heads).float().flatten(1, 2)
            yield rows, parts, *draw_dropout((parts.shape[1], length, length), dropout, generator)


def _softmax(query: Tensor, key: Tensor) -> Tensor:
    scores = query.new_empty(len(query), query.shape[1], key.shape[1])
    scale = query.shape[-1] ** -0.5
    return torch.softmax(torch.baddbmm(scores, query, key.transpose(1, 2), beta=0, alpha=scale), -1)


def _three(rows_TE: Tensor, length: int, heads: int) -> Tensor:
    """Return the view (3, N, heads, L, d of a head) of query, key and value side by side."""
    return rows_TE.view(-1, length, 3, heads, rows_TE.shape[1] // (3 * heads)).permute(2, 0, 3, 1, 4)


def _heads(rows_TD: Tensor, length: int, heads: int) -> Tensor:
    """Return the view (N, heads, L, d of a head) of the rows of texts of one length."""
    return rows_TD.view(-1, length, heads, rows_TD.shape[1] // heads).transpose(1, 2)
