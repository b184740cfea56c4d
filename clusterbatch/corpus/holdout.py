"""The choice of the pairs that are held out as a test collection of the user's own, without a pass of its own.

Documents are chosen at random inside each source: those with the smallest keyed hashes. Every work item of pass 1
keeps its smallest, so the smallest of all are known when the pass ends, with the queries that ask for them. All pairs
of a chosen document, and all pairs of a query that asks for one, are held out: no held-out pair, no copy of it and no
test query is trained on.

With `evaluate.holdout_by: query`, one query of each chosen document that has several is held out, with all its pairs;
the other queries still train the document.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa

from clusterbatch.corpus.docstrings import equal_shares
from clusterbatch.store.artifact import Artifact, Part
from clusterbatch.store.tables import read_parquet

# At most this share of a source is held out.
_LARGEST_SHARE = 0.1
# Sketches that are read, and then merged, at once: merging sorts all that was merged before.
_AT_ONCE = 16
# Documents that a sketch has for each that is to be chosen by query: few may have several queries.
_CANDIDATES = 8
_SEED = np.uint64(0x9E3779B97F4A7C15)
SPLITS = ("dev", "test")

HoldoutBy = Literal["document", "query"]

SKETCH = pa.schema(
    [
        pa.field("source", pa.string()),
        pa.field("document_hash", pa.uint64()),
        pa.field("query_hash", pa.uint64()),
    ]
)
# A sketch that also carries the texts, so that near copies of what is chosen can be found.
SKETCH_WITH_TEXTS = pa.schema([*SKETCH, pa.field("query", pa.string()), pa.field("document", pa.string())])

CHOSEN = pa.schema([pa.field("is_query", pa.bool_()), pa.field("hash", pa.uint64())])


@dataclass(frozen=True)
class HeldOut:
    """Hashes of the chosen documents and of the queries that ask for them in their source; sorted uint64.

    By query, no documents: those of the chosen queries are trained on with other queries.
    """

    documents: np.ndarray
    queries: np.ndarray

    @property
    def is_empty(self) -> bool:
        return not len(self.queries)

    @property
    def by_query(self) -> bool:
        return not self.is_empty and not len(self.documents)

    def mask(self, pairs: pa.Table) -> np.ndarray:
        """Return which pairs are held out, (n,) bool."""
        return np.isin(pairs["document_hash"].to_numpy(), self.documents) | self.judged(pairs)

    def judged(self, pairs: pa.Table) -> np.ndarray:
        """Return which held-out pairs become judgements, (n,) bool.

        If another source has a chosen document too, its pairs do not: their queries may be trained on with other
        documents.
        """
        return np.isin(pairs["query_hash"].to_numpy(), self.queries)

    def to_table(self) -> pa.Table:
        """Return one row for each hash, in a table of `CHOSEN`."""
        is_query = np.repeat([False, True], [len(self.documents), len(self.queries)])
        return pa.table([is_query, np.concatenate([self.documents, self.queries])], schema=CHOSEN)

    @staticmethod
    def from_table(chosen: pa.Table) -> HeldOut:
        """Return what `to_table` was called on."""
        is_query, hashes = chosen["is_query"].to_numpy(), chosen["hash"].to_numpy()
        return HeldOut(hashes[~is_query], hashes[is_query])


NOTHING = HeldOut(np.empty(0, np.uint64), np.empty(0, np.uint64))


def sketch(pairs: pa.Table, most: int, schema: pa.Schema = SKETCH) -> pa.Table:
    """Return of each source the pairs of its `most` documents with the smallest keys, as a table of `schema`."""
    sources = pairs["source"].combine_chunks().dictionary_encode()
    ranks = _ranks(sources.indices.to_numpy(), _keys(pairs["document_hash"].to_numpy()))
    return pairs.select(schema.names).take(pa.array(np.flatnonzero(ranks < most))).cast(schema)


def sketched(total: int, by: HoldoutBy) -> int:
    """Return how many documents of a source a sketch needs so that about `total` can be chosen."""
    return total * _CANDIDATES if by == "query" else total


def read_sketches(parts: Sequence[tuple[Artifact, Part]]) -> Iterator[pa.Table]:
    """Yield the sketches that the items of pass 1 left, each in the artifact that it is named with, without texts."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        # A few at a time, so that what was read does not pile up.
        for start in range(0, len(parts), _AT_ONCE):
            placed = parts[start : start + _AT_ONCE]
            yield from pool.map(lambda item: read_parquet(item[0].folder, item[1], SKETCH.names), placed)


def choose(sketches: Iterable[pa.Table], total: int, by: HoldoutBy = "document") -> HeldOut:
    """Choose about `total` documents, in equal shares of the sources (at most a tenth, at least one of two).

    By query, of documents with several queries the first of these by its key. `sketches` were made with most =
    `sketched(total, by)`.
    """
    merged, most = SKETCH.empty_table(), sketched(total, by)
    waiting: list[pa.Table] = []
    for some in sketches:
        waiting.append(some)
        # Not before they are as many as those merged: with many sources nearly all rows stay, and would be sorted again
        # with every few that come.
        if len(waiting) >= _AT_ONCE and sum(each.num_rows for each in waiting) >= merged.num_rows:
            merged, waiting = sketch(pa.concat_tables([merged, *waiting]), most), []
    merged = sketch(pa.concat_tables([merged, *waiting]), most) if waiting else merged
    if not merged.num_rows:
        return NOTHING
    sources = merged["source"].combine_chunks().dictionary_encode()
    codes, names = sources.indices.to_numpy(), sources.dictionary.to_pylist()
    documents, queries = (merged[name].to_numpy() for name in ("document_hash", "query_hash"))
    keys = _keys(documents)
    ranks = _ranks(codes, keys)
    available = np.minimum(_available(codes, keys, ranks, len(names), most), total)
    if by == "query":
        first = _first_of_several(codes, keys, _keys(queries))
        codes, documents, queries = codes[first], documents[first], queries[first]
        ranks = _ranks(codes, keys[first])
        available = np.minimum(available, np.bincount(codes, minlength=len(names)))
    quotas = equal_shares(dict(zip(names, available.tolist(), strict=True)), total)
    chosen = ranks < np.array([quotas[name] for name in names])[codes]
    by_document = documents[chosen] if by == "document" else NOTHING.documents
    return HeldOut(np.unique(by_document), np.unique(queries[chosen]))


def split_of(query_hash: int) -> str:
    """Return the collection that a held-out query belongs to."""
    return SPLITS[int(_keys(np.array([query_hash], np.uint64))[0] & np.uint64(1))]


def _ranks(codes: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Return for each row the rank of its document among those of its source, by key: (n,) int64 from 0 on.

    codes: (n,) numbers of the sources, each of 0 to the largest at least once; keys: (n,) uint64, one for a document.
    """
    order = np.lexsort((keys, codes))
    codes, keys = codes[order], keys[order]
    is_new = np.ones(len(order), bool)
    is_new[1:] = (keys[1:] != keys[:-1]) | (codes[1:] != codes[:-1])
    document = np.cumsum(is_new) - 1
    first_of_source = np.searchsorted(codes[is_new], np.arange(codes[-1] + 1 if len(codes) else 0))
    ranks = np.empty(len(order), np.int64)
    ranks[order] = document - first_of_source[codes]
    return ranks


def _first_of_several(codes: np.ndarray, keys: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Return of each document with several queries the row whose query has the smallest key: (m,) int64.

    codes, keys: (n,) of `_ranks`; queries: (n,) uint64 keys.
    """
    order = np.lexsort((queries, keys, codes))
    codes, keys, queries = codes[order], keys[order], queries[order]
    is_new = np.ones(len(order) + 1, bool)
    is_new[1:-1] = (keys[1:] != keys[:-1]) | (codes[1:] != codes[:-1])
    starts = np.flatnonzero(is_new)
    several = queries[starts[:-1]] != queries[starts[1:] - 1]
    return order[starts[:-1][several]]


def _available(codes: np.ndarray, keys: np.ndarray, ranks: np.ndarray, sources: int, total: int) -> np.ndarray:
    """Return how many documents each source may give; the rows are those of its `total` smallest keys, or all."""
    found = np.zeros(sources, np.int64)
    np.maximum.at(found, codes, ranks + 1)
    largest_key = np.zeros(sources)
    last = ranks == total - 1
    largest_key[codes[last]] = keys[last]
    # The k-th smallest of n keys, uniform on [0, 2^64), is about k / n (Bar-Yossef et al. 2002).
    estimated = np.where(found >= total, (total - 1) / (np.maximum(largest_key, 1.0) / 2.0**64), found)
    return np.maximum((estimated * _LARGEST_SHARE).astype(np.int64), estimated >= 2)


def _keys(hashes: np.ndarray) -> np.ndarray:
    """Return SplitMix64 of each hash: an order that has nothing to do with buckets, which follow the hash itself."""
    with np.errstate(over="ignore"):
        mixed = hashes.astype(np.uint64) + _SEED
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return mixed ^ (mixed >> np.uint64(31))
