"""Nearest centroid by cosine: blocked GEMM with the maximum and its place taken while a block is still in cache.

Legend: N rows, K centroids, D dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

# Rows of one block: its similarities (256 x K) stay in the core's second-level cache for K up to about a thousand.
_BLOCK_ROWS = {"cpu": 256, "cuda": 16_384}
# Columns are folded to this share before the place of the maximum is looked for.
_FOLD = 8


@dataclass(frozen=True)
class Assignment:
    """labels: (N,) int64; cosine: (N,) float32, similarity to that centroid. Both on the CPU."""

    labels: torch.Tensor
    cosine: torch.Tensor


class Assigner:
    """Centroids (K, D) of unit length, laid out once for many calls.

    With dtype bfloat16 products and the comparison are in bfloat16 (twice the speed where the CPU has it; two centroids
    closer than about 0.4 % are confused), with float32 both are exact to float32 rounding.

    bias: (K,), added to each centroid's similarity before the choice; the cosine is reported without it.
    """

    def __init__(
        self,
        centroids: np.ndarray,
        bias: np.ndarray | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> None:
        self.clusters = len(centroids)
        self.dtype, self.device = dtype, torch.device(device)
        padding = -self.clusters % _FOLD
        columns = torch.from_numpy(np.array(centroids, dtype=np.float32)).to(self.device)
        # Repeats of the last centroid: a row that prefers one of them belongs to the last.
        self._centroids_DK = torch.cat([columns, columns[-1:].expand(padding, -1)]).to(dtype).T.contiguous()
        self._bias_K = None
        if bias is not None:
            padded = np.concatenate([bias, np.repeat(bias[-1:], padding)]).astype(np.float32)
            self._bias_K = torch.from_numpy(padded).to(self.device)

    def __call__(self, vectors_ND: torch.Tensor | np.ndarray) -> Assignment:
        """The nearest centroid of each row; among equals the choice is deterministic, though not always the lowest."""
        if isinstance(vectors_ND, np.ndarray):
            vectors_ND = torch.from_numpy(vectors_ND)
        rows, block_rows = len(vectors_ND), _BLOCK_ROWS[self.device.type]
        labels = torch.empty(rows, dtype=torch.int64, device=self.device)
        cosine = torch.empty(rows, dtype=torch.float32, device=self.device)
        columns = self._centroids_DK.shape[1]
        buffer = torch.empty(min(rows, block_rows), columns, dtype=self.dtype, device=self.device)
        for start in range(0, rows, block_rows):
            block = vectors_ND[start : start + block_rows].to(self.device, self.dtype)
            similarity = torch.mm(block, self._centroids_DK, out=buffer[: len(block)])
            if self._bias_K is not None:
                similarity = similarity.float() + self._bias_K
            best, place = _maximum(similarity)
            labels[start : start + len(block)] = place
            cosine[start : start + len(block)] = best
        if self._bias_K is not None:
            cosine -= self._bias_K[labels]
        return Assignment(labels.clamp_(max=self.clusters - 1).cpu(), cosine.cpu())


def _maximum(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Row maxima of (n, columns) and their columns, columns a multiple of `_FOLD`.

    A maximum with its place is a scalar loop on CPUs, an elementwise maximum is vectorised: so halves are folded upon
    each other first, the place is found among an eighth of the columns, then among the eight that were folded there.
    """
    rows, columns = values.shape
    width = columns // _FOLD
    folded = values
    while folded.shape[1] > width:
        half = folded.shape[1] // 2
        folded = torch.maximum(folded[:, :half], folded[:, half:])
    column = folded.max(dim=1).indices
    candidates = values.view(rows, _FOLD, width)
    best, fold = candidates.gather(2, column.view(-1, 1, 1).expand(-1, _FOLD, 1)).squeeze(2).max(dim=1)
    return best.float(), fold * width + column
