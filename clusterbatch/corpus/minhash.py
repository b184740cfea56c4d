"""Near copies of texts, by MinHash over word triples (character 5-grams if words are not separated).

Method: MinHash, Broder 1997; locality-sensitive hashing in bands, Leskovec, Rajaraman and Ullman, chapter 3.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from clusterbatch.corpus.images import is_data_uri
from clusterbatch.corpus.normalise import normalise

if TYPE_CHECKING:
    from datasketch import MinHash, MinHashLSH

PERMUTATIONS = 64
_WORDS = 3
_CHARACTERS = 5
# Words longer than this on average are text without spaces.
_LONGEST_WORDS = 20
_OF_THREAD = threading.local()


def signature(text: str, kind: bytes = b"") -> np.ndarray:
    """Return (PERMUTATIONS,) uint64; the share of equal entries of two estimates the texts' Jaccard similarity.

    Texts of one `kind` have nothing in common with those of another. The minimum of two signatures, entry by entry, is
    that of both texts together.
    """
    sketch = _empty()
    # Texts of test collections may hold halves of characters.
    shingles = (shingle.encode("utf-8", "surrogatepass") for shingle in _shingles(normalise(text)))
    sketch.update_batch([kind + shingle for shingle in shingles])
    return np.array(sketch.hashvalues, np.uint64)


def bands(threshold: float) -> list[slice]:
    """Return pieces of a signature; texts at least that similar nearly always have one of them in common."""
    index = _lsh(threshold)
    return [slice(band * index.r, (band + 1) * index.r) for band in range(index.b)]


def _lsh(threshold: float) -> MinHashLSH:
    from datasketch import MinHashLSH

    # Better too many candidates than too few: they are compared afterwards.
    return MinHashLSH(threshold=threshold, num_perm=PERMUTATIONS, weights=(0.1, 0.9))


class NearIndex:
    """Signatures to compare with, (n, PERMUTATIONS); `threshold` is the Jaccard similarity of near copies."""

    def __init__(self, signatures: np.ndarray, threshold: float) -> None:
        self._signatures, self._threshold = signatures, threshold
        self._bands = bands(threshold)
        # Of each band: the signatures that hold a value there.
        self._rows: list[dict[bytes, list[int]]] = [{} for _ in self._bands]
        for rows, band in zip(self._rows, self._bands, strict=True):
            for row, key in enumerate(_keys(signatures, band)):
                rows.setdefault(key, []).append(row)

    def near(self, texts: Sequence[str]) -> np.ndarray:
        """Return which texts are near copies of one of the index, (m,) bool."""
        values = np.array([signature(text) for text in texts], np.uint64).reshape(len(texts), PERMUTATIONS)
        candidates: list[set[int]] = [set() for _ in texts]
        for rows, band in zip(self._rows, self._bands, strict=True):
            for of_text, key in zip(candidates, _keys(values, band), strict=True):
                of_text.update(rows.get(key, ()))
        return np.fromiter(map(self._is_near, values, candidates), bool, len(texts))

    def _is_near(self, values: np.ndarray, candidates: set[int]) -> bool:
        if not candidates:
            return False
        equal = self._signatures[list(candidates)] == values
        return bool(equal.mean(axis=1).max() >= self._threshold)


def _keys(signatures: np.ndarray, band: slice) -> list[bytes]:
    """Return what each of (n, PERMUTATIONS) signatures holds in a band."""
    held = np.ascontiguousarray(signatures[:, band])
    return [row.tobytes() for row in held]


def _shingles(text: str) -> set[str]:
    if is_data_uri(text):
        # The letters of encoded images say nothing about similarity: only the same bytes are near.
        return {text}
    words = text.split()
    if len(text) > _LONGEST_WORDS * len(words):
        return {text[start : start + _CHARACTERS] for start in range(max(1, len(text) - _CHARACTERS + 1))}
    return {" ".join(words[start : start + _WORDS]) for start in range(max(1, len(words) - _WORDS + 1))}


def _hash(data: bytes) -> int:
    return xxhash.xxh3_64_intdigest(data) & 0xFFFFFFFF


def _empty() -> MinHash:
    """Return this thread's sketch, emptied: making one, or a copy, takes longer than using it for a text."""
    sketch: MinHash | None = getattr(_OF_THREAD, "sketch", None)
    if sketch is None:
        # Imported here, as it loads half of SciPy, which workers that compare nothing do not need.
        from datasketch import MinHash

        sketch = _OF_THREAD.sketch = MinHash(num_perm=PERMUTATIONS, hashfunc=_hash)
    sketch.clear()
    return sketch
