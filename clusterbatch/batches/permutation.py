"""Keyed permutations: position -> position, computed on demand, so that a plan needs no shuffled list in memory."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from clusterbatch.hashing import mix

# Up to this size a permutation is a cached table; above, a Feistel network, whose quality needs halves of some bits.
_TABLE_SIZE = 4096
_ROUNDS = 6
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def combine_key(*parts: int) -> int:
    """Return one 64-bit key of several integers; the order matters."""
    key = np.zeros(1, np.uint64)
    with np.errstate(over="ignore"):
        for part in parts:
            key = mix(key * _GOLDEN + np.uint64(part & 0xFFFFFFFFFFFFFFFF) + _GOLDEN)
    return int(key[0])


def permute(positions: np.ndarray, size: int, *key: int) -> np.ndarray:
    """Return where a pseudo-random permutation of [0, size) sends `positions`.

    positions: (n,) integers in [0, size). Returns (n,) int64. Time is O(n) whatever the size (for size <= 4096 a table
    is made once per key): a Feistel network over the next even power of two, walked along its cycle until it falls
    inside (Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains").
    """
    positions = np.asarray(positions, dtype=np.int64)
    if size <= _TABLE_SIZE:
        return _table(size, combine_key(*key))[positions]
    half = np.uint64(((size - 1).bit_length() + 1) // 2)
    round_keys = mix(np.arange(1, _ROUNDS + 1, dtype=np.uint64) * _GOLDEN ^ np.uint64(combine_key(*key)))
    result = _feistel(positions.astype(np.uint64), half, round_keys)
    outside = np.flatnonzero(result >= size)
    while len(outside):
        result[outside] = _feistel(result[outside], half, round_keys)
        outside = outside[result[outside] >= size]
    return result.astype(np.int64)


def draws(count: int, key: int) -> np.ndarray:
    """Return (count,) uint64, pseudo-random and uniform: the first outputs of SplitMix64 seeded with `key`."""
    with np.errstate(over="ignore"):
        return mix(np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN + np.uint64(key))


@lru_cache(maxsize=1024)
def _table(size: int, key: int) -> np.ndarray:
    return np.argsort(draws(size, key), kind="stable")


def _feistel(values: np.ndarray, half: np.uint64, round_keys: np.ndarray) -> np.ndarray:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = values >> half, values & mask
    for key in round_keys:
        left, right = right, left ^ (mix(right ^ key) & mask)
    return (left << half) | right
