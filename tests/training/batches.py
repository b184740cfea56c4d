"""Batches of pairs alone: without weights, hard negatives or stored vectors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from clusterbatch.batches.loader import SliceBatch
from clusterbatch.encoder.tokens import Tokens


def plain_batch(
    step: int, queries: Tokens, documents: Tokens, number: np.ndarray | None = None, slices: Sequence[int] | None = None
) -> SliceBatch:
    """Return one rank's slice of a global batch; no text is repeated.

    number: (n,) of the slice's pairs, all different in the batch (None: from 0); slices: rows of each rank's slice
    (None: this one is all).
    """
    hashes = np.arange(len(queries)) if number is None else number
    return SliceBatch(
        step=step,
        epoch=0,
        query_tokens=queries,
        document_tokens=documents,
        query_hash=hashes.astype(np.uint64),
        document_hash=hashes.astype(np.uint64),
        weight=None,
        negative_tokens=None,
        negative_counts=None,
        query_vector=None,
        document_vector=None,
        slice_rows=np.asarray([len(queries)] if slices is None else slices),
        composition=None,  # type: ignore[arg-type]
    )
