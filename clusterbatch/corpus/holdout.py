"""The choice of the pairs that are held out as a test collection of the user's own, without a pass of its own.

Documents are chosen at random inside each source: those with the smallest keyed hashes. Every work item of pass 1
keeps its smallest, so the smallest of all are known when the pass ends, with the queries that ask for them. All pairs
of a chosen document, and all pairs of a query that asks for one, are held out: no held-out pair, no copy of it and no
test query is trained on. If rows say which document their text is a part of, documents are held out with all their
parts, as many as have about the wanted number of texts.

With `evaluate.holdout_by: query`, one query of each chosen document that has several is held out, with all its pairs;
the other queries still train the document.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa

from clusterbatch.corpus.docstrings import equal_shares
from clusterbatch.hashing import document_id_hashes
from clusterbatch.store.artifact import Artifact, Part
from clusterbatch.store.tables import read_parquet

# At most this share of a source is held out.
_LARGEST_SHARE = 0.1
# Sketches that are read, and then merged, at once: merging sorts all that was merged before.
_AT_ONCE = 16
# Documents of several texts that a sketch has of each source at least: fewer do not tell how many the source has.
_LEAST_DOCUMENTS = 32
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
# Further columns of a sketch: what texts are parts of; the texts, so that near copies of what is chosen can be found.
_WHOLE = pa.field("document_id_hash", pa.uint64())
_TEXTS = [pa.field("query", pa.string()), pa.field("document", pa.string())]
_NONE = np.empty(0, np.uint64)


@dataclass(frozen=True)
class HeldOut:
    """Hashes of the chosen documents' texts and of the queries that ask for them in their source; sorted uint64.

    By query, no documents: those of the chosen queries are trained on with other queries. wholes: hashes of source and
    id of the documents, if the texts are parts of some.
    """

    documents: np.ndarray
    queries: np.ndarray
    wholes: np.ndarray = field(default_factory=lambda: _NONE)

    @property
    def is_empty(self) -> bool:
        return not len(self.queries)

    @property
    def by_query(self) -> bool:
        return not self.is_empty and not len(self.documents)

    def mask(self, pairs: pa.Table) -> np.ndarray:
        """Return which pairs are held out, (n,) bool."""
        found = np.isin(pairs["document_hash"].to_numpy(), self.documents) | self.judged(pairs)
        if len(self.wholes):
            # Rows that are appended may be further parts.
            found |= np.isin(document_id_hashes(pairs["source"], pairs["document_id"]), self.wholes)
        return found

    def judged(self, pairs: pa.Table) -> np.ndarray:
        """Return which held-out pairs become judgements, (n,) bool.

        If another source has a chosen document too, its pairs do not: their queries may be trained on with other
        documents.
        """
        return np.isin(pairs["query_hash"].to_numpy(), self.queries)

    def to_table(self) -> pa.Table:
        """Return one row for each hash: is_query, hash and, if there are some, is_whole."""
        counts = [len(self.documents), len(self.queries), len(self.wholes)]
        columns = {
            "is_query": np.repeat([False, True, False], counts),
            "hash": np.concatenate([self.documents, self.queries, self.wholes]),
        }
        if len(self.wholes):
            columns["is_whole"] = np.repeat([False, False, True], counts)
        return pa.table(columns)

    @staticmethod
    def from_table(chosen: pa.Table) -> HeldOut:
        """Return what `to_table` was called on."""
        is_query, hashes = chosen["is_query"].to_numpy(), chosen["hash"].to_numpy()
        is_whole = np.zeros(len(hashes), bool)
        if "is_whole" in chosen.column_names:
            is_whole = chosen["is_whole"].to_numpy()
        return HeldOut(hashes[~is_query & ~is_whole], hashes[is_query], hashes[is_whole])


NOTHING = HeldOut(_NONE, _NONE)


def sketch_schema(texts: bool, by: HoldoutBy, document_ids: bool) -> pa.Schema:
    """Return the schema of a sketch, with texts or without; document_ids: whether the corpus has them."""
    whole = [_WHOLE] if document_ids and by == "document" else []
    return pa.schema([*SKETCH, *whole, *(_TEXTS if texts else [])])


def sketch(pairs: pa.Table, most: int, schema: pa.Schema = SKETCH) -> pa.Table:
    """Return of each source the pairs of its documents with the smallest keys that have `most` texts, by `schema`.

    Texts are documents by themselves unless the schema names what they are parts of.
    """
    if _WHOLE.name in schema.names and _WHOLE.name not in pairs.column_names:
        whole = document_id_hashes(pairs["source"], pairs["document_id"])
        pairs = pairs.append_column(_WHOLE, pa.array(whole, pa.uint64()))
    ranks = _ranks(_source_codes(pairs)[0], _keys_of(pairs), pairs["document_hash"].to_numpy())
    kept = np.flatnonzero((ranks.texts_before < most) | (ranks.document < _least_documents(pairs)))
    return pairs.select(schema.names).take(pa.array(kept)).cast(schema)


def sketched(total: int, by: HoldoutBy) -> int:
    """Return how many texts of a source a sketch needs so that about `total` can be chosen."""
    return total * _CANDIDATES if by == "query" else total


def read_sketches(parts: Sequence[tuple[Artifact, Part]], schema: pa.Schema = SKETCH) -> Iterator[pa.Table]:
    """Yield the sketches that the items of pass 1 left, each in the artifact that it is named with, by `schema`."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        # A few at a time, so that what was read does not pile up.
        for start in range(0, len(parts), _AT_ONCE):
            placed = parts[start : start + _AT_ONCE]
            yield from pool.map(lambda item: read_parquet(item[0].folder, item[1], schema.names), placed)


def choose(sketches: Iterable[pa.Table], total: int, by: HoldoutBy = "document") -> HeldOut:
    """Choose documents of about `total` texts, in equal shares of the sources (at most a tenth, at least one of two).

    By query, of documents with several queries the first of these by its key. `sketches` were made with most =
    `sketched(total, by)`.
    """
    merged: pa.Table | None = None
    waiting: list[pa.Table] = []
    most = sketched(total, by)

    def merge() -> pa.Table:
        tables = waiting if merged is None else [merged, *waiting]
        return sketch(pa.concat_tables(tables), most, tables[0].schema)

    for some in sketches:
        waiting.append(some)
        # Not before they are as many as those merged: with many sources nearly all rows stay, and would be sorted again
        # with every few that come.
        rows = 0 if merged is None else merged.num_rows
        if len(waiting) >= _AT_ONCE and sum(each.num_rows for each in waiting) >= rows:
            merged, waiting = merge(), []
    if waiting:
        merged = merge()
    if merged is None or not merged.num_rows:
        return NOTHING
    codes, names = _source_codes(merged)
    documents, queries = (merged[name].to_numpy() for name in ("document_hash", "query_hash"))
    keys = _keys_of(merged)
    ranks = _ranks(codes, keys, documents)
    available = np.minimum(_available(codes, keys, ranks, len(names), most, _least_documents(merged)), total)
    used = np.arange(len(codes))
    if by == "query":
        used = _first_of_several(codes, keys, _keys(queries))
        ranks = _ranks(codes[used], keys[used], documents[used])
        available = np.minimum(available, np.bincount(codes[used], minlength=len(names)))
    quotas = equal_shares(dict(zip(names, available.tolist(), strict=True)), total)
    quota = np.array([quotas[name] for name in names])[codes[used]]
    # A document with more texts than its source may give is the only one.
    chosen = used[(ranks.texts <= quota) | ((ranks.document == 0) & (quota > 0))]
    if by == "query":
        return HeldOut(_NONE, np.unique(queries[chosen]))
    wholes = merged[_WHOLE.name].to_numpy()[chosen] if _WHOLE.name in merged.column_names else _NONE
    return HeldOut(np.unique(documents[chosen]), np.unique(queries[chosen]), np.unique(wholes))


def split_of(query_hash: int) -> str:
    """Return the collection that a held-out query belongs to."""
    return SPLITS[int(_keys(np.array([query_hash], np.uint64))[0] & np.uint64(1))]


def _source_codes(pairs: pa.Table) -> tuple[np.ndarray, list[str]]:
    """Return a number for each row's source, (n,), and the names by number."""
    sources = pairs["source"].combine_chunks().dictionary_encode()
    return sources.indices.to_numpy(), sources.dictionary.to_pylist()


def _keys_of(pairs: pa.Table) -> np.ndarray:
    """Return the keys of the documents that rows are from, (n,) uint64."""
    name = _WHOLE.name if _WHOLE.name in pairs.column_names else "document_hash"
    return _keys(pairs[name].to_numpy())


def _least_documents(pairs: pa.Table) -> int:
    return _LEAST_DOCUMENTS if _WHOLE.name in pairs.column_names else 0


class _Ranks(NamedTuple):
    """Places of rows among those of their source, by the keys of their documents: (n,) int64 each.

    document: how many documents come before the row's; texts_before, texts: how many texts, without and with its own.
    """

    document: np.ndarray
    texts_before: np.ndarray
    texts: np.ndarray


def _ranks(codes: np.ndarray, keys: np.ndarray, texts: np.ndarray) -> _Ranks:
    """Rank rows. codes: (n,) numbers of sources; keys: (n,) uint64, one for a document; texts: (n,) uint64 hashes."""
    order = np.lexsort((texts, keys, codes))
    codes, keys, texts = codes[order], keys[order], texts[order]
    is_new_source, is_new_document, is_new_text = np.ones((3, len(order)), bool)
    is_new_source[1:] = codes[1:] != codes[:-1]
    is_new_document[1:] = is_new_source[1:] | (keys[1:] != keys[:-1])
    is_new_text[1:] = is_new_document[1:] | (texts[1:] != texts[:-1])
    source, document, text = (np.cumsum(is_new) - 1 for is_new in (is_new_source, is_new_document, is_new_text))
    # Texts before each document, and after the last.
    edges = np.append(text[is_new_document], text[-1:] + 1)
    before = text[is_new_source][source]
    ranks = np.empty((3, len(order)), np.int64)
    ranks[:, order] = (
        document - document[is_new_source][source],
        edges[document] - before,
        edges[document + 1] - before,
    )
    return _Ranks(*ranks)


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


def _available(codes: np.ndarray, keys: np.ndarray, ranks: _Ranks, sources: int, total: int, least: int) -> np.ndarray:
    """Return how many texts each source may give, (sources,) int64.

    The rows are those of a source's documents with its first `total` texts, and of `least` documents, or all.
    """
    texts, documents, largest_key = np.zeros(sources, np.int64), np.zeros(sources, np.int64), np.zeros(sources)
    np.maximum.at(texts, codes, ranks.texts)
    np.maximum.at(documents, codes, ranks.document + 1)
    np.maximum.at(largest_key, codes, keys.astype(np.float64))
    # The k-th smallest of n keys, uniform on [0, 2^64), is about k / n (Bar-Yossef et al. 2002).
    estimated = (documents - 1) / (np.maximum(largest_key, 1.0) / 2.0**64)
    estimated = np.where((texts >= total) & (documents >= least), estimated, documents)
    share = (estimated * (texts / documents) * _LARGEST_SHARE).astype(np.int64)
    return np.where(estimated >= 2, np.maximum(share, 1), 0)


def _keys(hashes: np.ndarray) -> np.ndarray:
    """Return SplitMix64 of each hash: an order that has nothing to do with buckets, which follow the hash itself."""
    with np.errstate(over="ignore"):
        mixed = hashes.astype(np.uint64) + _SEED
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return mixed ^ (mixed >> np.uint64(31))
