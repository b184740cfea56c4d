"""Pseudo-random numbers that follow from keys alone, the same on every machine."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import xxhash


def mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014): (n,) uint64 -> (n,) uint64, a bijection."""
    with np.errstate(over="ignore"):
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def row_hashes(pair_ids: pa.ChunkedArray, seed: int) -> np.ndarray:
    """(rows,) uint64: XXH3-64 of (seed, pair_id); the order of rows wherever arrival must not decide."""
    hash_of = xxhash.xxh3_64_intdigest
    return np.fromiter((hash_of(pair_id.encode(), seed) for pair_id in pair_ids.to_pylist()), np.uint64, len(pair_ids))


def first_of_each(hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of (n,) hashes that have a new one, in order, and for every row its position among those."""
    _, first, group = np.unique(hashes, return_index=True, return_inverse=True)
    order = np.argsort(first)
    position = np.empty(len(first), np.int64)
    position[order] = np.arange(len(first))
    return first[order], position[group]


def document_id_hashes(sources: pa.ChunkedArray, document_ids: pa.ChunkedArray) -> np.ndarray:
    """(rows,) uint64: XXH3-64 of (source, document_id); the same id in another source is another document."""
    hash_of, source_hash = xxhash.xxh3_64_intdigest, {}
    for source in sources.unique().to_pylist():
        source_hash[source] = hash_of(source.encode())
    rows = zip(sources.to_pylist(), document_ids.to_pylist(), strict=True)
    return np.fromiter((hash_of(name.encode(), source_hash[source]) for source, name in rows), np.uint64, len(sources))
