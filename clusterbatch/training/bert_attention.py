"""Attention within packed texts on CPUs, forward and backward, one call for all neighbours of one length.

T tokens, H heads, d the width of all heads together; query, key and value stand side by side, (T, 3 d).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

# Scores of all heads that are in memory at once: few enough to stay in a cache.
_SCORES = 2**20
# Tokens of a text, and of a run, from which oneDNN's products are faster than torch's kernel; those of a new shape are
# compiled first.
_LEAST_LENGTH, _LEAST_TOKENS = 32, 512


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

    Rows behind those of the runs belong to no text; they and their gradients are zero.
    """
    attended_TD = projected_TE.new_empty(len(projected_TE), projected_TE.shape[1] // 3)
    logarithms = [torch.empty(0)]
    drop = _Dropout(dropout, seed)
    for rows, length in _rows(runs):
        if _by_kernel(projected_TE, rows, length, dropout):
            attended, logarithm = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                *_three(projected_TE[rows], length, heads).float()
            )
            _heads(attended_TD[rows], length, heads).copy_(attended)
            logarithms.append(logarithm.flatten())
            continue
        for block in _blocks(rows, length, heads):
            query, key, value = _three(projected_TE[block], length, heads).flatten(1, 2)
            (weights,) = drop(_softmax(query, key))
            into = _heads(attended_TD[block], length, heads)
            into.copy_(torch.bmm(weights, value).view_as(into))
    attended_TD[_tokens(runs) :] = 0
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
    found_TE, first = torch.empty_like(projected_TE), 0
    drop = _Dropout(dropout, seed)
    for rows, length in _rows(runs):
        if _by_kernel(projected_TE, rows, length, dropout):
            count = (rows.stop - rows.start) // length
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
            continue
        for block in _blocks(rows, length, heads):
            query, key, value = _three(projected_TE[block], length, heads).flatten(1, 2)
            gradient = _heads(gradient_TD[block], length, heads).flatten(0, 1)
            weights = _softmax(query, key)
            kept, of_weights = drop(weights, torch.bmm(gradient, value.transpose(1, 2)))
            of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
            into = _three(found_TE[block], length, heads)
            into[0].copy_(_scaled(of_scores, key, key.shape[-1]).view_as(into[0]))
            into[1].copy_(_scaled(of_scores.transpose(1, 2), query, query.shape[-1]).view_as(into[1]))
            into[2].copy_(torch.bmm(kept.transpose(1, 2), gradient).view_as(into[2]))
    found_TE[_tokens(runs) :] = 0
    return found_TE


def _by_kernel(projected_TE: Tensor, rows: slice, length: int, dropout: float) -> bool:
    """Return whether torch's kernel computes the attention of texts of one length, in float32.

    It drops nothing, and its products are small ones. In bfloat16 its backward pass takes several times as long as in
    float32; oneDNN's products with the scores in memory are faster than either if there are enough texts.
    """
    few = length < _LEAST_LENGTH or rows.stop - rows.start < _LEAST_TOKENS
    return not dropout and (few or projected_TE.dtype == torch.float32)


class _Dropout:
    """Drops the same of every call's first tensor, in the order of the calls, as another with its seed."""

    def __init__(self, share: float, seed: int) -> None:
        self._share, self._generator = share, torch.Generator().manual_seed(seed)

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return tensors of one shape without the same elements, the others scaled."""
        if not self._share:
            return tensors
        dropped, factor = draw_dropout(tensors[0].shape, self._share, self._generator)
        return tuple(tensor.masked_fill(dropped, 0.0).mul_(factor) for tensor in tensors)


def _tokens(runs: Sequence[tuple[int, int]]) -> int:
    return sum(texts * length for texts, length in runs)


def _rows(runs: Sequence[tuple[int, int]]) -> Iterator[tuple[slice, int]]:
    """Yield the rows and the length of the texts of each run."""
    start = 0
    for texts, length in runs:
        yield slice(start, start := start + texts * length), length


def _blocks(rows: slice, length: int, heads: int) -> Iterator[slice]:
    """Yield the rows of whole texts of one length, as many at once as may have their scores in memory."""
    step = length * max(1, _SCORES // (heads * length**2))
    for start in range(rows.start, rows.stop, step):
        yield slice(start, min(start + step, rows.stop))


def _softmax(query: Tensor, key: Tensor) -> Tensor:
    return torch.softmax(_scaled(query, key.transpose(1, 2), query.shape[-1]), -1)


def _scaled(left: Tensor, right: Tensor, width: int) -> Tensor:
    """Return the product with the scale of attention."""
    found = left.new_empty(len(left), left.shape[1], right.shape[2])
    return torch.baddbmm(found, left, right, beta=0, alpha=width**-0.5, out=found)


def _three(rows_TE: Tensor, length: int, heads: int) -> Tensor:
    """Return the view (3, N, heads, L, d of a head) of query, key and value side by side."""
    return rows_TE.view(-1, length, 3, heads, rows_TE.shape[1] // (3 * heads)).permute(2, 0, 3, 1, 4)


def _heads(rows_TD: Tensor, length: int, heads: int) -> Tensor:
    """Return the view (N, heads, L, d of a head) of the rows of texts of one length."""
    return rows_TD.view(-1, length, heads, rows_TD.shape[1] // heads).transpose(1, 2)
