"""Normalisation and hashes of texts: texts are normalised before hashing, never in what is trained on."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence

import numpy as np
import xxhash

from clusterbatch.corpus.images import is_data_uri

# A unit separator cannot be confused with the text around it, unlike a space or a newline.
_SEPARATOR = "\x1f"
# Greek letters with two marks are folded to three characters in lower case, but to two in upper case.
_COMPOSED = re.compile("[\u03ca\u03cb](?=[\u0300\u0301\u0342])")


def normalise(text: str) -> str:
    """Return the text in NFKC, casefolded, with single spaces and none at its ends; an image as it is."""
    if is_data_uri(text):
        return text
    folded = unicodedata.normalize("NFKC", text).casefold()
    if "\u03ca" in folded or "\u03cb" in folded:
        folded = _COMPOSED.sub(lambda found: unicodedata.normalize("NFD", found[0]), folded)
    # Besides spaces no white space is printable: of most texts there is nothing to split and join, which takes longest.
    if folded.isprintable() and "  " not in folded:
        return folded.strip(" ")
    return " ".join(folded.split())


def text_hash(text: str) -> int:
    """Return XXH3-64 of the normalised text, unsigned: equal for what a reader would call the same text."""
    return xxhash.xxh3_64_intdigest(normalise(text).encode("utf-8", "surrogatepass"))


def text_hashes(texts: Iterable[str], count: int) -> np.ndarray:
    """Return `text_hash` of each of `count` texts, (count,) uint64."""
    return np.fromiter((text_hash(text) for text in texts), np.uint64, count)


def pair_id(source: str, query: str, document: str) -> str:
    """Return 32 hex digits, XXH3-128 of source, query and document as they are: the same id in every run."""
    return xxhash.xxh3_128_hexdigest(_SEPARATOR.join((source, query, document)).encode("utf-8", "surrogatepass"))


def pair_ids(sources: Sequence[str], queries: Sequence[str], documents: Sequence[str]) -> list[str]:
    """Return the `pair_id` of each pair."""
    return [pair_id(*pair) for pair in zip(sources, queries, documents, strict=True)]


def keyed_hash(seed: int, text: str) -> int:
    """Return a 64-bit hash for choosing and ordering: independent of `text_hash`, another order for each seed."""
    return xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass"), seed=seed & (2**64 - 1))
