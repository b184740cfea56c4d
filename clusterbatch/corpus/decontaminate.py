"""Removal of test queries and their answers from training: exact copies by hash, near copies by MinHash.

The texts compared with are the queries of `evaluate.path` and the documents judged relevant to them; without
`evaluate.path`, the texts of what is held out. A test collection's other documents may be trained on: they only
surround the answers.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from clusterbatch.config import StorageConfig
from clusterbatch.corpus.beir import CollectionSlice, PairCollection
from clusterbatch.corpus.holdout import HeldOut
from clusterbatch.corpus.images import ImageError, load_image
from clusterbatch.corpus.inputs import Slice, cut
from clusterbatch.corpus.join import parsed_lines
from clusterbatch.corpus.minhash import PERMUTATIONS, NearIndex, signatures
from clusterbatch.corpus.normalise import text_hash
from clusterbatch.corpus.readers.dispatch import opened
from clusterbatch.corpus.rows import BrokenFileError, Reject
from clusterbatch.errors import DataError
from clusterbatch.runtime import Result, WorkItem
from clusterbatch.store.artifact import Artifact, Counts, Part
from clusterbatch.store.folder import Folder
from clusterbatch.store.tables import read_parquet, vector_column, write_parquet

EXACT = "copy of a test text"
NEAR = "near copy of a test text"
NEAR_HELD_OUT = "near copy of a held-out text"
# The role of the part of a corpus with the signatures of what is held out.
SIGNATURES = "held-out signatures"
# Parts with candidates that one work item reads.
_SKETCHES_PER_ITEM = 32

TEST_TEXTS = pa.schema(
    [
        pa.field("is_query", pa.bool_()),
        pa.field("hash", pa.uint64()),
        pa.field("signature", pa.list_(pa.uint64(), PERMUTATIONS)),
    ]
)


class TestTextsWorker:
    """Read one slice of a test collection's queries or documents; write hash and signature of the judged ones."""

    def __init__(self, collections: Sequence[PairCollection], storage: StorageConfig) -> None:
        self._storage = storage
        self._judged = _judged_ids(collections, storage)

    def process(self, item: WorkItem, output: Artifact) -> Result:
        piece: CollectionSlice = item.payload
        lines = _values(piece, self._storage)
        judged = (values for values in lines if f"{piece.role} {values['id']}" in self._judged)
        folder = Folder(posixpath.dirname(piece.piece.file.uri), self._storage)
        texts = {(piece.role == "queries", text_hash(text)): text for text in _texts(judged, folder)}
        part = write_parquet(output, f"unit-{item.number:08d}", _with_signatures(texts))
        return Result([part], Counts(read=part.rows, written=part.rows))


class HeldOutTextsWorker:
    """Read candidates to be held out; write hash and signature of the texts of those that were chosen."""

    def __init__(self, held_out: HeldOut) -> None:
        self._held_out = held_out

    def process(self, item: WorkItem, output: Artifact) -> Result:
        texts: dict[tuple[bool, int], str] = {}
        for artifact, part in item.payload:
            candidates = read_parquet(artifact.folder, part)
            for name, chosen in (("query", self._held_out.queries), ("document", self._held_out.documents)):
                found = candidates.filter(pa.array(np.isin(candidates[f"{name}_hash"].to_numpy(), chosen)))
                for key, text in zip(found[f"{name}_hash"].to_pylist(), found[name].to_pylist(), strict=True):
                    texts.setdefault((name == "query", key), text)
        part = write_parquet(output, f"unit-{item.number:08d}", _with_signatures(texts))
        return Result([part], Counts(read=part.rows, written=part.rows))


@dataclass(frozen=True)
class Contamination:
    """Stored test texts, and the similarity from which texts count as near copies (None: only exact ones do)."""

    artifact: Artifact
    parts: tuple[Part, ...]
    threshold: float | None

    def load(self) -> TestTexts:
        """Read the test texts' hashes and signatures."""
        tables = [read_parquet(self.artifact.folder, part) for part in self.parts]
        return TestTexts(pa.concat_tables(tables), self.threshold)


class TestTexts:
    """The test texts in memory: a few thousand hashes and signatures."""

    def __init__(self, table: pa.Table, threshold: float | None) -> None:
        is_query = table["is_query"].to_numpy()
        hashes = table["hash"].to_numpy()
        self._hashes = {"query": np.unique(hashes[is_query]), "document": np.unique(hashes[~is_query])}
        self._near: dict[str, NearIndex] = {}
        if threshold is not None:
            values = table["signature"].combine_chunks().flatten().to_numpy().reshape(-1, PERMUTATIONS)
            self._near["query"] = NearIndex(values[is_query], threshold)
            self._near["document"] = NearIndex(values[~is_query], threshold)

    def exact(self, pairs: pa.Table) -> np.ndarray:
        """Return which pairs have a test query as query or its answer as document, (n,) bool."""
        found = np.zeros(pairs.num_rows, bool)
        for name, hashes in self._hashes.items():
            found |= np.isin(pairs[f"{name}_hash"].to_numpy(), hashes)
        return found

    def near(self, pairs: pa.Table) -> np.ndarray:
        """Return which pairs have nearly such a query or document, (n,) bool; none if only exact copies count."""
        found = np.zeros(pairs.num_rows, bool)
        for name, index in self._near.items():
            texts = pairs[name].combine_chunks().dictionary_encode()
            is_near = index.near(texts.dictionary.to_pylist())
            found |= is_near[texts.indices.to_numpy()]
        return found


def plan_test_texts(collections: Sequence[PairCollection], unit_bytes: int) -> list[WorkItem]:
    """Return one work item for each slice of the queries and documents."""
    pieces = [
        CollectionSlice(collection.number, role, collection.name, Slice(0, file, start, end))
        for collection in collections
        for role in ("queries", "documents")
        for file in collection.files[role]
        for start, end in cut(file, unit_bytes, can_be_cut=file.name.endswith((".jsonl", ".tsv")))
    ]
    return [WorkItem(number, piece.size, piece) for number, piece in enumerate(pieces)]


def plan_held_out_texts(sketches: Sequence[tuple[Artifact, Part]]) -> list[WorkItem]:
    """Return work items that read the candidates of a few parts each."""
    starts = range(0, len(sketches), _SKETCHES_PER_ITEM)
    some = [sketches[start : start + _SKETCHES_PER_ITEM] for start in starts]
    return [WorkItem(number, len(parts), list(parts)) for number, parts in enumerate(some)]


def distinct_texts(contamination: Contamination) -> pa.Table:
    """Return the rows of all parts in a table of `TEST_TEXTS`, each text once, ordered by kind and hash."""
    tables = [read_parquet(contamination.artifact.folder, part) for part in contamination.parts]
    table = pa.concat_tables([TEST_TEXTS.empty_table(), *tables])
    table = table.sort_by([("is_query", "ascending"), ("hash", "ascending")])
    keys = np.rec.fromarrays([table["is_query"].to_numpy(), table["hash"].to_numpy()])
    return table.take(pa.array(np.unique(keys, return_index=True)[1]))


def _with_signatures(texts: Mapping[tuple[bool, int], str]) -> pa.Table:
    """Return a table of `TEST_TEXTS` for texts by (whether they are queries, hash)."""
    columns = {
        "is_query": [is_query for is_query, _ in texts],
        "hash": pa.array([key for _, key in texts], pa.uint64()),
        "signature": vector_column(signatures(list(texts.values()))),
    }
    return pa.table(columns, schema=TEST_TEXTS)


def _judged_ids(collections: Sequence[PairCollection], storage: StorageConfig) -> set[str]:
    """Return role and id of the judged queries and of the documents that are relevant to them."""
    ids: set[str] = set()
    for collection in collections:
        for file in collection.files["judgements"]:
            piece = CollectionSlice(collection.number, "judgements", collection.name, Slice(0, file, 0, file.size))
            for values in _values(piece, storage):
                ids |= {f"documents {values['id']}", f"queries {values['query_id']}"}
    return ids


def _texts(items: Iterable[Mapping[str, str]], base: Folder) -> Iterator[str]:
    """Yield texts and fetched images; evaluation says what is wrong with images that cannot be taken."""
    for item in items:
        if "image" in item:
            with suppress(ImageError):
                yield load_image(item["image"], base)
        else:
            yield item["text"]


def _values(piece: CollectionSlice, storage: StorageConfig) -> Iterator[dict[str, str]]:
    """Yield the lines that can be read; evaluation says what is wrong with the others."""
    try:
        with opened(piece.piece.file, storage) as (_, file):
            for values in parsed_lines(file, piece):
                if values is not None and not isinstance(values, Reject):
                    yield values
    except BrokenFileError as error:
        raise DataError(f"{piece.piece.file.uri}: {error}") from error
