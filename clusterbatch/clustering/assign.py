"""Nearest centroid by cosine: blocked GEMM with the maximum and its place taken while a block is still in cache.

Legend: N rows, K centroids, D dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Rows of one block: its similarities (256 x K) stay in the core's second-level cache for K up to about a thousand.
_BLOCK_ROWS = 256
# Columns are folded this many times before the place of the maximum is looked for.
_FOLD = 8


@dataclass(frozen=True)
class Assignment:
    """labels: (N,) int64; cosine: (N,) float32, similarity to that centroid."""

    labels: torch.Tensor
    cosine: torch.Tensor


class Assigner:
    """Centroids laid out once for many calls.

    With dtype bfloat16 products and the comparison are in bfloat16 (twice the speed where the CPU has it; two centroids
    closer than about 0.4 % are confused), with float32 both are exact to float32 rounding.
    """

    def __init__(self, centroids: torch.Tensor, dtype: torch.dtype = torch.float32) -> None:
        self.clusters = len(centroids)
        self.dtype = dtype
        padding = -self.clusters % _FOLD
        # Repeats of the last centroid: a row that prefers one of them belongs to the last.
        padded = torch.cat([centroids, centroids[-1:].expand(padding, -1)])
        self._centroids_DK = padded.to(dtype).T.contiguous()

    def __call__(self, vectors_ND: torch.Tensor) -> Assignment:
        """The nearest centroid of each row; among equals the choice is deterministic, though not always the lowest."""
        rows, columns = len(vectors_ND), self._centroids_DK.shape[1]
        labels = torch.empty(rows, dtype=torch.int64, device=vectors_ND.device)
        cosine = torch.empty(rows, dtype=torch.float32, device=vectors_ND.device)
        buffer = torch.empty(min(rows, _BLOCK_ROWS), columns, dtype=self.dtype, device=vectors_ND.device)
        for start in range(0, rows, _BLOCK_ROWS):
            block = vectors_ND[start : start + _BLOCK_ROWS].to(self.dtype)
            similarity = torch.mm(block, self._centroids_DK, out=buffer[: len(block)])
            best, place = _maximum(similarity)
            labels[start : start + len(block)] = place
            cosine[start : start + len(block)] = best
        return Assignment(labels.clamp_(max=self.clusters - 1), cosine)


def _maximum(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Row maxima of (n, columns) and their columns, columns a multiple of `_FOLD`.

    A maximum with its place is a scalar loop on CPUs, an elementwise maximum is vectorised: so halves are folded upon
    each other first, the place is found among an eighth of the columns, then among the eight that were folded there.
    """
    rows, columns = values.shape
    folded = values
    while folded.shape[1] > columns // _FOLD:
        half = folded.shape[1] // 2
        folded = torch.maximum(folded[:, :half], folded[:, half:])
    column = folded.max(dim=1).indices
    candidates = values.view(rows, _FOLD, columns // _FOLD)
    best, fold = candidates.gather(2, column.view(-1, 1, 1).expand(-1, _FOLD, 1)).squeeze(2).max(dim=1)
    return best.float(), fold * (columns // _FOLD) + column
