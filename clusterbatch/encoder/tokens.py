"""Token ids of many texts as two flat arrays, so that no text costs a Python list.

Micro-batches by token budget: rows of like length go through the backbone together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np


def micro_batches(lengths: np.ndarray, budget: int, *, padded: bool = True) -> list[np.ndarray]:
    """Rows in micro-batches of at most `budget` tokens, longest rows first; padding counts if they are `padded`.

    `lengths` (N,) -> row numbers, each (n,) int64, every row exactly once; a row over the budget is a micro-batch of
    its own. A function of the lengths alone; ties keep input order. Longest first: what does not fit in memory fails at
    once, and allocators grow only once.
    """
    lengths = np.maximum(np.asarray(lengths, dtype=np.int64), 1)
    order = np.argsort(-lengths, kind="stable")
    ends = np.cumsum(lengths[order])
    batches, start = [], 0
    while start < len(order):
        if padded:
            # The first row is the longest, so it decides how many fit.
            rows = max(1, budget // int(lengths[order[start]]))
        else:
            done = int(ends[start] - lengths[order[start]])
            rows = max(1, int(np.searchsorted(ends, done + budget, side="right")) - start)
        batches.append(order[start : start + rows])
        start += rows
    return batches


if TYPE_CHECKING:
    # Imported where it is used: the encoder runs on a machine that has only torch and transformers.
    import pyarrow as pa


@dataclass(frozen=True)
class Tokens:
    """Ragged token ids of N texts.

    values: (sum of lengths,) integers; offsets: (N + 1,) int64, text i is values[offsets[i]:offsets[i + 1]].
    """

    values: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """(N,) int64."""
        return np.diff(self.offsets)

    @property
    def hashes(self) -> np.ndarray:
        """(N,) uint64 of the token ids: two texts with equal tokens are one text to the model."""
        import xxhash

        values = np.ascontiguousarray(self.values, dtype=np.uint32)
        bounds = self.offsets.tolist()
        hashes = (xxhash.xxh3_64_intdigest(values[start:end].data) for start, end in pairwise(bounds))
        return np.fromiter(hashes, np.uint64, len(self))

    def __getitem__(self, row: int) -> np.ndarray:
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    def take(self, rows: np.ndarray) -> Tokens:
        """The texts at `rows` (any order, repeats allowed)."""
        rows = np.asarray(rows, dtype=np.int64)
        lengths = self.lengths[rows]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        # Position j of the result comes from start-of-its-row + (j - start-in-result).
        source = np.repeat(self.offsets[rows] - offsets[:-1], lengths) + np.arange(offsets[-1])
        return Tokens(self.values[source], offsets)

    def slice(self, start: int, end: int) -> Tokens:
        offsets = self.offsets[start : end + 1]
        return Tokens(self.values[offsets[0] : offsets[-1]], offsets - offsets[0])

    @staticmethod
    def concatenate(parts: Sequence[Tokens]) -> Tokens:
        values = np.concatenate([part.values for part in parts])
        lengths = np.concatenate([part.lengths for part in parts])
        return Tokens(values, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))

    @staticmethod
    def from_lists(lists: Sequence[Sequence[int]] | Sequence[np.ndarray], dtype: np.dtype | type = np.int32) -> Tokens:
        lengths = np.fromiter((len(ids) for ids in lists), np.int64, len(lists))
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        values = np.empty(offsets[-1], dtype)
        for row, ids in enumerate(lists):
            values[offsets[row] : offsets[row + 1]] = ids
        return Tokens(values, offsets)

    @staticmethod
    def from_arrow(column: pa.ListArray | pa.ChunkedArray) -> Tokens:
        import pyarrow as pa

        if isinstance(column, pa.ChunkedArray):
            column = column.combine_chunks()
        offsets = column.offsets.to_numpy().astype(np.int64)
        values = column.values.to_numpy(zero_copy_only=False)[offsets[0] : offsets[-1]]
        return Tokens(values, offsets - offsets[0])

    def to_arrow(self, value_type: pa.DataType) -> pa.ListArray:
        import pyarrow as pa

        values = pa.array(self.values).cast(value_type)
        return pa.ListArray.from_arrays(pa.array(self.offsets.astype(np.int32)), values)
