"""Surrogate that needs no model: TF-IDF of character n-grams, reduced by a truncated SVD fitted to the corpus.

For languages and notations that no available model was trained on. Texts are similar if they look alike; it knows no
synonyms. Method: latent semantic analysis, Deerwester 1990, on hashed n-grams.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from safetensors.numpy import load, save
from scipy import sparse

from clusterbatch.config.stages import CHARACTER_NGRAMS

DIMENSIONS = 128
# Hashed n-grams share this many columns: bounded memory for any script, and nothing to gather over a corpus.
COLUMNS = 2**16
_NGRAMS = (2, 4)
# About the length of a token in English, so that `embed.max_tokens` means the same here.
_CHARACTERS_PER_TOKEN = 4
# Rows whose n-grams are in memory at once.
_CHUNK = 512

# Pairs that the SVD is fitted to. More makes it slower, hardly better: it has 128 directions to find.
SAMPLE_PAIRS = 8192


class Surrogate(Protocol):
    """Stand-in for an embedding model: fitted to a sample of the corpus, stored as bytes, loaded by each worker."""

    @property
    def dimensions(self) -> int: ...

    @staticmethod
    def fit(texts: Sequence[str], max_tokens: int | None) -> Surrogate:
        """Fit to texts; the same texts give the same surrogate. Texts are cut at about four characters per token."""
        ...

    def encode(self, texts: Sequence[str], max_tokens: int | None) -> np.ndarray:
        """Return (N, dimensions) float32 unit vectors, also of empty texts."""
        ...

    def to_bytes(self) -> bytes: ...

    @staticmethod
    def from_bytes(data: bytes) -> Surrogate:
        """Load. Must not run anything that the bytes contain: they come from storage."""
        ...


class NgramSurrogate:
    """Latent semantic analysis of n-grams.

    idf: (columns,) float32; components: (dimensions, columns) float32 right singular vectors.
    """

    def __init__(self, idf: np.ndarray, components: np.ndarray) -> None:
        self._idf = idf
        self._components = components

    @property
    def dimensions(self) -> int:
        return len(self._components)

    @staticmethod
    def fit(texts: Sequence[str], max_tokens: int | None, seed: int = 0) -> NgramSurrogate:
        """Fit to a sample of the corpus' texts; few texts give few dimensions."""
        from sklearn.decomposition import TruncatedSVD

        counts = _counts(texts, max_tokens)
        document_frequency = np.bincount(counts.indices, minlength=COLUMNS)
        idf = np.log((1 + len(texts)) / (1 + document_frequency)).astype(np.float32) + 1
        weighted = _weighted(counts, idf)
        # Empty texts and repeats leave fewer directions than rows; the SVD needs at least two of each.
        dimensions = max(2, min(DIMENSIONS, len(texts) - 1))
        svd = TruncatedSVD(dimensions, n_iter=3, random_state=seed).fit(weighted)
        return NgramSurrogate(idf, np.ascontiguousarray(svd.components_, dtype=np.float32))

    def encode(self, texts: Sequence[str], max_tokens: int | None) -> np.ndarray:
        """Return (N, dimensions) float32 unit vectors; a text without any n-gram has a fixed one."""
        vectors = np.empty((len(texts), self.dimensions), np.float32)
        for start in range(0, len(texts), _CHUNK):
            counts = _counts(texts[start : start + _CHUNK], max_tokens)
            vectors[start : start + _CHUNK] = _weighted(counts, self._idf) @ self._components.T
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        fixed = np.float32(self.dimensions**-0.5)
        return np.where(norms > 1e-12, vectors / np.maximum(norms, 1e-12), fixed)

    def to_bytes(self) -> bytes:
        """Return safetensors, which hold numbers and nothing that could run."""
        return save({"idf": self._idf, "components": self._components})

    @staticmethod
    def from_bytes(data: bytes) -> NgramSurrogate:
        arrays = load(data)
        return NgramSurrogate(arrays["idf"], arrays["components"])


def _counts(texts: Sequence[str], max_tokens: int | None) -> sparse.csr_matrix:
    """Return (N, columns) float32 counts of hashed n-grams in each text, cut to the length that is embedded."""
    from sklearn.feature_extraction.text import HashingVectorizer

    end = None if max_tokens is None else max_tokens * _CHARACTERS_PER_TOKEN
    vectorizer = HashingVectorizer(
        analyzer="char_wb", ngram_range=_NGRAMS, n_features=COLUMNS, alternate_sign=False, norm=None, dtype=np.float32
    )
    return vectorizer.transform([text[:end] for text in texts])


def _weighted(counts: sparse.csr_matrix, idf: np.ndarray) -> sparse.csr_matrix:
    """Return (1 + log tf) idf, rows of length 1."""
    weighted = counts.copy()
    weighted.data = (1 + np.log(weighted.data)) * idf[weighted.indices]
    norms = np.sqrt(np.asarray(weighted.multiply(weighted).sum(axis=1)).ravel())
    return sparse.diags(1 / np.maximum(norms, 1e-12)).astype(np.float32) @ weighted


# By their names in `embed.model`.
SURROGATES: dict[str, type[Surrogate]] = {CHARACTER_NGRAMS: NgramSurrogate}
