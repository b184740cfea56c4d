"""Near copies of texts, by MinHash over word triples (character 5-grams if words are not separated).

Method: MinHash, Broder 1997; locality-sensitive hashing in bands, Leskovec, Rajaraman and Ullman, chapter 3.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
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


def signature(text: str, kind: bytes = b"") -> np.ndarray:
    """Return (PERMUTATIONS,) uint64; the share of equal entries of two estimates the texts' Jaccard similarity.

    Texts of one `kind` have nothing in common with those of another. The minimum of two signatures, entry by entry, is
    that of both texts together.
    """
    sketch = _empty().copy()
    # Texts of test collections may hold halves of characters.
    shingles = (shingle.encode("utf-8", "surrogatepass") for shingle in _shingles(normalise(text)))
    sketch.update_batch([kind + shingle for shingle in shingles])
    return np.asarray(sketch.hashvalues, np.uint64)


def bands(threshold: float) -> list[slice]:
    """Return pieces of a signature; texts at least that similar nearly always have one of them in common."""
    index = _lsh(threshold)
    return [slice(band * index.r, (band + 1) * index.r) for band in range(index.b)]


def _lsh(threshold: float) -> MinHashLSH:
    from datasketch import MinHashLSH

    # Better too many candidates than too few: they are compared afterwards.
    return MinHashLSH(threshold=threshold, num_perm=PERMUTATIONS, weights=(0.1, 0.9))


class NearIndex:
    """Signatures to compare with; `threshold` is the Jaccard similarity from which texts are near copies."""

    def __init__(self, signatures: Iterable[np.ndarray], threshold: float) -> None:
        self._threshold = threshold
        self._index = _lsh(threshold)
        self._signatures: list[np.ndarray] = []
        for number, values in enumerate(signatures):
            self._signatures.append(values)
            self._index.insert(number, _minhash(values))

    def has_near(self, text: str) -> bool:
        """Return whether a text is a near copy of one of the index."""
        values = signature(text)
        candidates = self._index.query(_minhash(values))
        return any(float(np.mean(self._signatures[number] == values)) >= self._threshold for number in candidates)


def _minhash(values: np.ndarray) -> MinHash:
    sketch = _empty().copy()
    sketch.hashvalues = np.asarray(values, np.uint64)
    return sketch


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


@cache
def _empty() -> MinHash:
    """Return an empty sketch, to be copied for each text: making permutations takes longer than using them."""
    # Imported here, as it loads half of SciPy, which workers that compare nothing do not need.
    from datasketch import MinHash

    return MinHash(num_perm=PERMUTATIONS, hashfunc=_hash)
