"""Near copies of texts, by MinHash over word triples (character 5-grams if words are not separated).

Method: MinHash, Broder 1997; locality-sensitive hashing in bands, Leskovec, Rajaraman and Ullman, chapter 3. The
permutations are datasketch's, and so are the signatures, but they are computed of many texts at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from clusterbatch.corpus.images import is_data_uri
from clusterbatch.corpus.normalise import normalise

if TYPE_CHECKING:
    from datasketch import MinHashLSH

PERMUTATIONS = 64
_WORDS = 3
_CHARACTERS = 5
# Words longer than this on average are text without spaces.
_LONGEST_WORDS = 20
# Characters of the texts whose signatures are computed at once: the hashes of their shingles stay in the cache.
_BATCH_CHARACTERS = 2**18


def signature(text: str, kind: bytes = b"") -> np.ndarray:
    """Return (PERMUTATIONS,) uint64; the share of equal entries of two estimates the texts' Jaccard similarity.

    Texts of one `kind` have nothing in common with those of another. The minimum of two signatures, entry by entry, is
    that of both texts together.
    """
    return signatures([text], kind)[0]


def signatures(texts: Sequence[str], kind: bytes = b"") -> np.ndarray:
    """Return the `signature` of each text, (n, PERMUTATIONS) uint64."""
    found = np.empty((len(texts), PERMUTATIONS), np.uint64)
    for first, batch in _batches(texts):
        normalised = [normalise(text) for text in batch]
        cuts = [_cut_of(text) for text in normalised]
        for cut in dict.fromkeys(cuts):
            places = [place for place, other in enumerate(cuts) if other is cut]
            found[first + np.array(places)] = _minima(*cut([normalised[place] for place in places]), kind)
    return found


def _batches(texts: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    """Yield the texts in batches, each with the position of its first."""
    batch: list[str] = []
    characters = 0
    for place, text in enumerate(texts):
        batch.append(text)
        characters += len(text)
        if characters >= _BATCH_CHARACTERS or place == len(texts) - 1:
            yield place + 1 - len(batch), batch
            batch, characters = [], 0


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
        # Of each band: the first entries that signatures hold there, in order, and the signatures that hold a value.
        self._heads = [np.unique(signatures[:, band.start]) for band in self._bands]
        self._rows: list[dict[bytes, list[int]]] = [{} for _ in self._bands]
        for rows, band in zip(self._rows, self._bands, strict=True):
            for row, key in enumerate(_keys(signatures, band)):
                rows.setdefault(key, []).append(row)

    def near(self, texts: Sequence[str]) -> np.ndarray:
        """Return which texts are near copies of one of the index, (m,) bool."""
        values = signatures(texts)
        candidates: dict[int, set[int]] = {}
        for rows, heads, band in zip(self._rows, self._heads, self._bands, strict=True):
            # Hardly any text has even the band's first entry in common with one of the index.
            places = np.flatnonzero(_among(heads, values[:, band.start]))
            for place, key in zip(places.tolist(), _keys(values[places], band), strict=True):
                candidates.setdefault(place, set()).update(rows.get(key, ()))
        found = np.zeros(len(texts), bool)
        for place, rivals in candidates.items():
            found[place] = self._is_near(values[place], rivals)
        return found

    def _is_near(self, values: np.ndarray, candidates: set[int]) -> bool:
        if not candidates:
            return False
        equal = self._signatures[list(candidates)] == values
        return bool(equal.mean(axis=1).max() >= self._threshold)


def _keys(signatures: np.ndarray, band: slice) -> list[bytes]:
    """Return what each of (n, PERMUTATIONS) signatures holds in a band."""
    held = np.ascontiguousarray(signatures[:, band])
    return [row.tobytes() for row in held]


def _among(ordered: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return which values are among `ordered`, (n,) bool."""
    if not len(ordered):
        return np.zeros(len(values), bool)
    return ordered[np.searchsorted(ordered, values).clip(max=len(ordered) - 1)] == values


# What a text is cut into: the bytes of some texts, (n,) first and last + 1 byte of each shingle, and (texts,) how many
# shingles each text has.
_Shingles = tuple[bytes, np.ndarray, np.ndarray, np.ndarray]


def _cut_of(text: str) -> Callable[[Sequence[str]], _Shingles]:
    """Return how a normalised text is cut into shingles."""
    if is_data_uri(text):
        return _whole
    return _into_characters if len(text) > _LONGEST_WORDS * (text.count(" ") + 1) else _into_words


def _whole(texts: Sequence[str]) -> _Shingles:
    # The letters of encoded images say nothing about similarity: only the same bytes are near.
    parts = [_encoded(text) for text in texts]
    ends = np.cumsum([len(part) for part in parts])
    return b"".join(parts), np.concatenate([[0], ends[:-1]]), ends, np.ones(len(texts), np.int64)


def _into_words(texts: Sequence[str]) -> _Shingles:
    data = _encoded(" ".join(texts))
    spaces = np.flatnonzero(np.frombuffer(data, np.uint8) == ord(" "))
    starts, ends = np.concatenate([[0], spaces + 1]), np.concatenate([spaces, [len(data)]])
    return data, *_windows(starts, ends, np.array([text.count(" ") + 1 for text in texts]), _WORDS)


def _into_characters(texts: Sequence[str]) -> _Shingles:
    data = _encoded("".join(texts))
    # All bytes of a character but the first begin with the bits 10.
    starts = np.flatnonzero(np.frombuffer(data, np.uint8) & 0xC0 != 0x80)
    ends = np.concatenate([starts[1:], [len(data)]])
    return data, *_windows(starts, ends, np.array([len(text) for text in texts]), _CHARACTERS)


def _encoded(text: str) -> bytes:
    # Texts of test collections may hold halves of characters.
    return text.encode("utf-8", "surrogatepass")


def _windows(
    starts: np.ndarray, ends: np.ndarray, counts: np.ndarray, width: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return starts, ends and number of each text's runs of `width` tokens; a text with fewer is one run.

    starts, ends: (n,) of all tokens; counts: (texts,) tokens of each text.
    """
    end = np.cumsum(counts)
    last = np.repeat(end - 1, counts)
    token = np.arange(len(starts))
    used = np.flatnonzero((token + width - 1 <= last) | (token == np.repeat(end - counts, counts)))
    return starts[used], ends[np.minimum(used + width - 1, last[used])], np.maximum(1, counts - width + 1)


def _minima(data: bytes, starts: np.ndarray, ends: np.ndarray, counts: np.ndarray, kind: bytes) -> np.ndarray:
    """Return the signatures (texts, PERMUTATIONS) uint32 of texts that are cut into shingles."""
    pieces = (data[start:end] for start, end in zip(starts.tolist(), ends.tolist(), strict=True))
    if kind:
        pieces = (kind + piece for piece in pieces)
    hashes = np.fromiter(map(xxhash.xxh3_64_intdigest, pieces), np.uint64, len(starts)).astype(np.uint32)
    _mix(hashes)
    factors, summands = _permutations()
    found = np.empty((len(counts), PERMUTATIONS), np.uint32)
    first, permuted = np.cumsum(counts) - counts, np.empty_like(hashes)
    for number in range(PERMUTATIONS):
        np.multiply(hashes, factors[number], out=permuted)
        np.add(permuted, summands[number], out=permuted)
        found[:, number] = np.minimum.reduceat(permuted, first)
    return found


def _mix(hashes: np.ndarray) -> None:
    """Apply MurmurHash3's finalizer to uint32 in place, as datasketch's scheme affine32 does before it permutes."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        hashes ^= hashes >> np.uint32(shift)
        hashes *= np.uint32(factor)
    hashes ^= hashes >> np.uint32(16)


@cache
def _permutations() -> tuple[np.ndarray, np.ndarray]:
    """Return factors and summands of the permutations modulo 2^32, (PERMUTATIONS,) uint32 each."""
    # Imported here, as it loads half of SciPy, which workers that compare nothing do not need.
    from datasketch import MinHash

    factors, summands = MinHash(num_perm=PERMUTATIONS, scheme="affine32").permutations
    return factors.astype(np.uint32), summands.astype(np.uint32)
