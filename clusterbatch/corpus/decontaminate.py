"""Keeps test queries and their answers out of training: exact copies by hash, near copies by MinHash.

What is compared are the queries of `evaluate.path` and the documents judged relevant to them. A test collection's other
documents may well be trained on: they only stand beside the answers.
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
from clusterbatch.corpus.images import ImageError, load_image
from clusterbatch.corpus.inputs import Slice, cut
from clusterbatch.corpus.join import parsed_lines
from clusterbatch.corpus.minhash import PERMUTATIONS, NearIndex, signature
from clusterbatch.corpus.normalise import text_hash
from clusterbatch.corpus.readers.dispatch import opened
from clusterbatch.corpus.rows import BrokenFileError, Reject
from clusterbatch.errors import DataError
from clusterbatch.runtime import Unit
from clusterbatch.store.artifact import Artifact, Counts, Part, Receipt, Stopwatch
from clusterbatch.store.folder import Folder
from clusterbatch.store.tables import read_parquet, write_parquet

EXACT = "copy of a test text"
NEAR = "near copy of a test text"

_TEXTS = pa.schema(
    [
        pa.field("is_query", pa.bool_()),
        pa.field("hash", pa.uint64()),
        pa.field("signature", pa.list_(pa.uint64(), PERMUTATIONS)),
    ]
)


class TestTextsWorker:
    """Reads one slice of a test collection's queries or documents; leaves hash and signature of what is judged."""

    def __init__(self, artifact: Artifact, fingerprint: str, collections: Sequence[PairCollection]) -> None:
        self._artifact = artifact
        self._fingerprint = fingerprint
        self._judged = _judged_ids(collections, artifact.folder.storage)

    def process(self, unit: Unit) -> Receipt:
        stopwatch = Stopwatch()
        item: CollectionSlice = unit.payload
        is_query = item.role == "queries"
        lines = _values(item, self._artifact.folder.storage)
        judged = (values for values in lines if f"{item.role} {values['id']}" in self._judged)
        texts = list(_texts(judged, Folder(posixpath.dirname(item.piece.file.uri), self._artifact.folder.storage)))
        table = pa.table(
            {
                "is_query": [is_query] * len(texts),
                "hash": pa.array([text_hash(text) for text in texts], pa.uint64()),
                "signature": [signature(text) for text in texts],
            },
            schema=_TEXTS,
        )
        part = write_parquet(self._artifact, f"unit-{unit.number:08d}", table)
        receipt = Receipt(
            unit=unit.number,
            fingerprint=self._fingerprint,
            parts=[part],
            counts=Counts(read=len(texts), written=len(texts)),
            seconds=stopwatch.seconds,
        )
        self._artifact.write_receipt(receipt)
        return receipt


@dataclass(frozen=True)
class Contamination:
    """Where the test texts are, and from which similarity on texts count as near copies (None: only exact ones)."""

    artifact: Artifact
    parts: tuple[Part, ...]
    threshold: float | None

    def load(self) -> TestTexts:
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
        """(n,) bool: pairs whose query is a test query or whose document answers one."""
        found = np.zeros(pairs.num_rows, bool)
        for name, hashes in self._hashes.items():
            found |= np.isin(pairs[f"{name}_hash"].to_numpy(), hashes)
        return found

    def near(self, pairs: pa.Table) -> np.ndarray:
        """(n,) bool: pairs whose query or document is nearly one; all False where only exact copies count."""
        found = np.zeros(pairs.num_rows, bool)
        for name, index in self._near.items():
            texts = pairs[name].combine_chunks().dictionary_encode()
            is_near = np.array([index.has_near(text) for text in texts.dictionary.to_pylist()], bool)
            found |= is_near[texts.indices.to_numpy()]
        return found


def plan_test_texts(collections: Sequence[PairCollection], unit_bytes: int) -> list[Unit]:
    """One unit for each slice of the queries and documents."""
    items = [
        CollectionSlice(collection.number, role, collection.name, Slice(0, file, start, end))
        for collection in collections
        for role in ("queries", "documents")
        for file in collection.files[role]
        for start, end in cut(file, unit_bytes, can_be_cut=file.name.endswith((".jsonl", ".tsv")))
    ]
    return [Unit(number, item.size, item) for number, item in enumerate(items)]


def _judged_ids(collections: Sequence[PairCollection], storage: StorageConfig) -> set[str]:
    """Role and id of the judged queries and of the documents that are relevant to them."""
    ids: set[str] = set()
    for collection in collections:
        for file in collection.files["judgements"]:
            item = CollectionSlice(collection.number, "judgements", collection.name, Slice(0, file, 0, file.size))
            for values in _values(item, storage):
                ids |= {f"documents {values['id']}", f"queries {values['query_id']}"}
    return ids


def _texts(items: Iterable[Mapping[str, str]], base: Folder) -> Iterator[str]:
    """Images are fetched; of those that cannot be taken evaluation says what is wrong."""
    for item in items:
        if "image" in item:
            with suppress(ImageError):
                yield load_image(item["image"], base)
        else:
            yield item["text"]


def _values(item: CollectionSlice, storage: StorageConfig) -> Iterator[dict[str, str]]:
    """What can be read; evaluation says what is wrong with the rest."""
    try:
        with opened(item.piece.file, storage) as (_, file):
            for values in parsed_lines(file, item):
                if values is not None and not isinstance(values, Reject):
                    yield values
    except BrokenFileError as error:
        raise DataError(f"{item.piece.file.uri}: {error}") from error
