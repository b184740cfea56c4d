"""Which pairs are held out as a test collection of the user's own, chosen without a pass of its own.

Documents are chosen at random inside each source: those with the smallest keyed hashes. Every unit of pass 1 keeps its
smallest, so the smallest of all are known when it ends, with the queries that ask for them. Held out are all pairs of a
chosen document, and all pairs of a query that asks for one: no held-out pair, no copy of it and no test query is
trained on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import numpy as np
import pyarrow as pa

from clusterbatch.corpus.docstrings import equal_shares
from clusterbatch.store.artifact import Artifact, Part
from clusterbatch.store.tables import read_parquet

# At most this share of a source is held out.
_LARGEST_SHARE = 0.1
# Sketches that are read, and then merged, at once: merging sorts all that was merged before.
_AT_ONCE = 16
_SEED = np.uint64(0x9E3779B97F4A7C15)
SPLITS = ("dev", "test")

SKETCH = pa.schema(
    [
        pa.field("source", pa.string()),
        pa.field("document_hash", pa.uint64()),
        pa.field("query_hash", pa.uint64()),
    ]
)


CHOSEN = pa.schema([pa.field("is_query", pa.bool_()), pa.field("hash", pa.uint64())])


@dataclass(frozen=True)
class HeldOut:
    """Hashes of the chosen documents and of the queries that ask for them in their source; sorted uint64."""

    documents: np.ndarray
    queries: np.ndarray

    def mask(self, pairs: pa.Table) -> np.ndarray:
        """(n,) bool: the pairs that are held out."""
        return np.isin(pairs["document_hash"].to_numpy(), self.documents) | self.judged(pairs)

    def judged(self, pairs: pa.Table) -> np.ndarray:
        """(n,) bool: the held-out pairs that become judgements. Those of a chosen document that another source has too
        do not: such a query may be trained on with other documents."""
        return np.isin(pairs["query_hash"].to_numpy(), self.queries)

    def to_table(self) -> pa.Table:
        """One row for each hash, in a table of `CHOSEN`."""
        is_query = np.repeat([False, True], [len(self.documents), len(self.queries)])
        return pa.table([is_query, np.concatenate([self.documents, self.queries])], schema=CHOSEN)

    @staticmethod
    def from_table(chosen: pa.Table) -> HeldOut:
        is_query, hashes = chosen["is_query"].to_numpy(), chosen["hash"].to_numpy()
        return HeldOut(hashes[~is_query], hashes[is_query])


NOTHING = HeldOut(np.empty(0, np.uint64), np.empty(0, np.uint64))


def sketch(pairs: pa.Table, most: int) -> pa.Table:
    """Of each source, the pairs of its `most` documents with the smallest keys; a table of `SKETCH`."""
    keys = _keys(pairs["document_hash"].to_numpy())
    sources = pairs["source"].combine_chunks().dictionary_encode()
    codes = sources.indices.to_numpy()
    # Distinct documents in the order of source, then key.
    order = np.lexsort((keys, codes))
    new = np.ones(len(order), bool)
    new[1:] = (keys[order][1:] != keys[order][:-1]) | (codes[order][1:] != codes[order][:-1])
    document = np.cumsum(new) - 1
    first_of_source = np.searchsorted(codes[order][new], np.arange(len(sources.dictionary)))
    rank = document - first_of_source[codes[order]]
    kept = np.sort(order[rank < most])
    return pairs.select(SKETCH.names).take(pa.array(kept)).cast(SKETCH)


def read_sketches(parts: Sequence[tuple[Artifact, Part]]) -> Iterator[pa.Table]:
    """The sketches that the units of pass 1 left, each in the artifact that it is named with."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        # A few at a time, so that what was read does not pile up.
        for start in range(0, len(parts), _AT_ONCE):
            placed = parts[start : start + _AT_ONCE]
            yield from pool.map(lambda item: read_parquet(item[0].folder, item[1]), placed)


def choose(sketches: Iterable[pa.Table], total: int) -> HeldOut:
    """About `total` documents, in equal shares of the sources (at least one of each that has two, at most a tenth).

    `sketches` were made with most = `total`.
    """
    merged, waiting = SKETCH.empty_table(), iter(sketches)
    while some := list(islice(waiting, _AT_ONCE)):
        merged = sketch(pa.concat_tables([merged, *some]), total)
    if not merged.num_rows:
        return NOTHING
    keys = _keys(merged["document_hash"].to_numpy())
    sources = np.array(merged["source"].to_pylist())
    of_source = {name: np.unique(keys[sources == name]) for name in sorted(set(sources.tolist()))}
    quotas = equal_shares({name: _largest(found, total) for name, found in of_source.items()}, total)
    chosen = np.zeros(len(keys), bool)
    for name, quota in quotas.items():
        chosen |= (sources == name) & np.isin(keys, of_source[name][:quota])
    documents = np.unique(merged["document_hash"].to_numpy()[chosen])
    queries = np.unique(merged["query_hash"].to_numpy()[chosen])
    return HeldOut(documents, queries)


def split_of(query_hash: int) -> str:
    """The collection that a held-out query belongs to."""
    return SPLITS[int(_keys(np.array([query_hash], np.uint64))[0] & np.uint64(1))]


def _largest(keys: np.ndarray, total: int) -> int:
    """How many documents a source may give, of which `keys` are the smallest `total` sorted keys (or all)."""
    count = float(len(keys))
    if len(keys) >= total:
        # The k-th smallest of n keys, uniform on [0, 2^64), is about k / n (Bar-Yossef et al. 2002).
        count = (total - 1) / (float(keys[total - 1]) / 2.0**64)
    return min(total, max(int(count * _LARGEST_SHARE), 1 if count >= 2 else 0))


def _keys(hashes: np.ndarray) -> np.ndarray:
    """SplitMix64 of each hash: an order that has nothing to do with buckets, which follow the hash itself."""
    with np.errstate(over="ignore"):
        mixed = hashes.astype(np.uint64) + _SEED
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return mixed ^ (mixed >> np.uint64(31))
