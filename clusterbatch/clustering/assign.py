"""Nearest centroid by cosine: blocked GEMM with the maximum and its place taken while a block is still in cache.

Legend: N rows, K centroids, D dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

# Similarities of one block: few enough to stay in the last-level cache, enough that the product runs at full speed.
_BLOCK_BYTES = {"cpu": 4 * 2**20, "cuda": 2**30}
_MOST_ROWS = {"cpu": 2048, "cuda": 2**16}


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
        # How far columns are folded upon each other before the place of the maximum is looked for.
        self._fold = 16 if dtype == torch.bfloat16 and self.clusters >= 256 else 8
        padding = -self.clusters % self._fold
        columns = torch.from_numpy(np.array(centroids, dtype=np.float32)).to(self.device)
        # Repeats of the last centroid: a row that prefers one of them belongs to the last.
        self._centroids_DK = torch.cat([columns, columns[-1:].expand(padding, -1)]).to(dtype).T.contiguous()
        self._bias_K = None
        if bias is not None:
            padded = np.concatenate([bias, np.repeat(bias[-1:], padding)]).astype(np.float32)
            self._bias_K = torch.from_numpy(padded).to(self.device)

    @property
    def block_rows(self) -> int:
        row_bytes = self._centroids_DK.shape[1] * self.dtype.itemsize
        kind = self.device.type
        return max(128, min(_MOST_ROWS[kind], _BLOCK_BYTES[kind] // row_bytes))

    def __call__(self, vectors_ND: torch.Tensor | np.ndarray) -> Assignment:
        """The nearest centroid of each row; among equals the choice is deterministic, though not always the lowest."""
        if isinstance(vectors_ND, np.ndarray):
            vectors_ND = torch.from_numpy(vectors_ND)
        rows, block_rows = len(vectors_ND), self.block_rows
        labels = torch.empty(rows, dtype=torch.int64, device=self.device)
        cosine = torch.empty(rows, dtype=torch.float32, device=self.device)
        columns = self._centroids_DK.shape[1]
        buffer = torch.empty(min(rows, block_rows), columns, dtype=self.dtype, device=self.device)
        for start in range(0, rows, block_rows):
            block = vectors_ND[start : start + block_rows].to(self.device, self.dtype)
            similarity = torch.mm(block, self._centroids_DK, out=buffer[: len(block)])
            if self._bias_K is not None:
                similarity = similarity.float() + self._bias_K
            best, place = _maximum(similarity, self._fold)
            labels[start : start + len(block)] = place
            cosine[start : start + len(block)] = best
        if self._bias_K is not None:
            cosine -= self._bias_K[labels]
        return Assignment(labels.clamp_(max=self.clusters - 1).cpu(), cosine.cpu())

    def nearest(self, vectors_ND: np.ndarray, count: int) -> np.ndarray:
        """(N, count) int64: the centroids of highest similarity of each row, the highest first; for few centroids."""
        places = []
        for start in range(0, len(vectors_ND), self.block_rows):
            block = torch.from_numpy(vectors_ND[start : start + self.block_rows]).to(self.device, self.dtype)
            similarity = torch.mm(block, self._centroids_DK)[:, : self.clusters].float()
            if self._bias_K is not None:
                similarity += self._bias_K[: self.clusters]
            places.append(similarity.topk(count, dim=1).indices.cpu())
        return torch.cat(places).numpy() if places else np.empty((0, count), np.int64)


def _maximum(values: torch.Tensor, fold: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Row maxima of (n, columns), as float32, and their columns; columns a multiple of `fold`, a power of two.

    A maximum with its place is a scalar loop on CPUs, an elementwise maximum is vectorised: so halves are folded upon
    each other first; then the place is found among the columns that are left, and among those that were folded there.
    """
    comparable = values
    if values.dtype == torch.bfloat16 and values.device.type == "cpu":
        # Non-negative floats are ordered as their bits are; comparing integers needs no conversion.
        comparable = values.view(torch.int16)
    best, place = _folded_maximum(comparable, fold)
    if comparable is not values:
        if bool((best < 0).any()):
            best, place = _folded_maximum(values, fold)
        else:
            best = best.view(torch.bfloat16)
    return best.float(), place


def _folded_maximum(values: torch.Tensor, fold: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns = values.shape
    width = columns // fold
    folded = values
    while folded.shape[1] > width:
        half = folded.shape[1] // 2
        folded = torch.maximum(folded[:, :half], folded[:, half:])
    column = folded.max(dim=1).indices
    candidates = values.view(rows, fold, width)
    best, layer = candidates.gather(2, column.view(-1, 1, 1).expand(-1, fold, 1)).squeeze(2).max(dim=1)
    return best, layer * width + column
