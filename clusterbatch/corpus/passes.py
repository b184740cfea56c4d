"""The passes of ingest over storage: join what has to be joined, read, compare, write."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from clusterbatch.config import RunConfig, fingerprint
from clusterbatch.corpus.append import KNOWN, Growth, Known, KnownWorker, part_items
from clusterbatch.corpus.beir import CollectionSlice, PairCollection, Role, plan_collections
from clusterbatch.corpus.decontaminate import (
    Contamination,
    HeldOutTextsWorker,
    TestTextsWorker,
    plan_held_out_texts,
    plan_test_texts,
)
from clusterbatch.corpus.find_inputs import Inputs
from clusterbatch.corpus.holdout import HeldOut, choose, read_sketches, sketch_schema
from clusterbatch.corpus.inputs import Slice, plan_units
from clusterbatch.corpus.join import DocumentWorker, QueryWorker, ScatterWorker
from clusterbatch.corpus.near_duplicates import ENTRIES, NearDuplicates, NearPairsWorker
from clusterbatch.corpus.read import HASHES, REJECTS, SKETCHES, ReadWorker, bucket_count, read_bytes, sorting
from clusterbatch.corpus.row_groups import PAIRS
from clusterbatch.corpus.rows import NOTHING, broken_files, files_without_columns
from clusterbatch.corpus.write import Exclusions, Origins, Rejected, WriteWorker
from clusterbatch.corpus.write_holdout import CollectionWorker
from clusterbatch.errors import DataError
from clusterbatch.runtime import Pass, Pool, WorkItem
from clusterbatch.store.artifact import EXCHANGE, Artifact, Part, Receipt
from clusterbatch.store.details import CorpusDetails, details_of
from clusterbatch.store.shuffle import bucket_rows

# Raised if items of the passes change or leave something else: a run that was cut off and is resumed with another
# version of this code starts its passes from scratch.
_PASSES = 5
_LEAST_UNIT_BYTES = 2**12


@dataclass
class IngestPasses:
    """The state of one run of ingest, and its passes; they leave their parts below `artifact`/_exchange.

    tests: the collections of evaluate.path; growth: the corpus that `artifact`, a version of it, continues;
    input_bytes: of the inputs, with what they refer to.
    """

    config: RunConfig
    identity: str
    artifact: Artifact
    inputs: Inputs
    tests: list[PairCollection]
    input_bytes: int
    growth: Growth | None = None

    def __post_init__(self) -> None:
        self.exchange = self.artifact.folder.child(EXCHANGE)
        self._rows = Artifact(self.exchange.child("rows"), "corpus buckets")
        self._leftovers = Artifact(self.exchange.child("leftovers"), "held-out texts")
        self._paired = Artifact(self.exchange.child("paired"), "corpus buckets")
        self._earlier = Artifact(self.exchange.child("known"), "known pairs")
        # Of every pass that reads input: receipts, and the artifact their parts are in.
        self._read: list[tuple[Artifact, list[Receipt]]] = []
        known_bytes = details_of(self.growth.base, CorpusDetails)["input_bytes"] if self.growth else None
        self._sorting = sorting(self.config, self.input_bytes, known_bytes)
        self._first_slice = 0
        self._broken = NOTHING
        self.known: list[Receipt] = []

    @property
    def rows_read(self) -> int:
        """Rows of the input: those that arrive at the last pass, and those that left on the way.

        The unreadable rest of a file counts as one.
        """
        return self._broken.num_rows + sum(
            receipt.counts.read if place in (self._rows, self._paired) else receipt.counts.rejected + _aside(receipt)
            for place, receipts in self._read
            for receipt in receipts
        )

    @property
    def cut(self) -> int:
        """Texts that were cut."""
        return sum(receipt.details.get("cut", 0) for _, receipts in self._read for receipt in receipts)

    @property
    def dimensions(self) -> int | None:
        """The most common length of the vectors that came with the rows; None if there are none."""
        if self.growth:
            return self.growth.dimensions
        found: Counter[str] = Counter()
        for _, receipts in self._read:
            for receipt in receipts:
                found.update(receipt.details.get("dimensions", {}))
        return int(min(found, key=lambda length: (-found[length], int(length)))) if found else None

    def join(self) -> None:
        """Make pairs of the collections: their judgements get their documents, then their queries."""
        if not self.inputs.collections:
            return
        corpus = self.config.corpus
        files = [file for item in self.inputs.collections for files in item.files.values() for file in files]
        buckets = bucket_count(sum(file.size for file in files), corpus.part_bytes)
        planned = plan_collections(self.inputs.collections, corpus.unit_bytes, 0)
        self._first_slice = len(planned)
        scattered = Artifact(self.exchange.child("scattered"), "texts by id")
        joined = Artifact(self.exchange.child("joined"), "judgements with documents")
        receipts = self._run(
            "ingest: scatter",
            _items(planned),
            ScatterWorker,
            scattered,
            {
                "buckets": buckets,
                "encoding": corpus.encoding or "utf-8",
                "flush_bytes": self._sorting.flush_bytes,
            },
            "bytes",
        )
        by_role: dict[Role, list[Part]] = {
            role: _parts(receipts, role) for role in ("documents", "queries", "judgements")
        }
        found = self._run(
            "ingest: join documents",
            _bucket_items(buckets),
            DocumentWorker,
            joined,
            {"scattered": scattered, "parts": by_role, "buckets": buckets},
            "buckets",
        )
        pairs = self._run(
            "ingest: join queries",
            _bucket_items(buckets),
            QueryWorker,
            self._paired,
            {
                "scattered": scattered,
                "joined": joined,
                "config": corpus,
                "queries": by_role["queries"],
                "found": _parts(found, "found"),
                "sorting": self._sorting,
            },
            "buckets",
        )
        self._read += [(scattered, receipts), (joined, found), (self._paired, pairs)]

    def read(self) -> None:
        """Read the pairs of the other files."""
        unit_bytes = read_bytes(self.input_bytes, self.config.corpus.unit_bytes)
        # What files refer to is read as well.
        unit_bytes = max(_LEAST_UNIT_BYTES, unit_bytes * self.inputs.bytes // max(1, self.input_bytes))
        planned = plan_units(self.inputs.files, unit_bytes, self._first_slice)
        arguments = {"config": self.config.corpus, "sorting": self._sorting}
        receipts = self._run("ingest: read", _items(planned), ReadWorker, self._rows, arguments, "bytes")
        self._read.append((self._rows, receipts))
        lacking = files_without_columns(receipts)
        if lacking and self.config.corpus.on_error == "fail":
            _, file, reason = lacking[0]
            raise DataError(f"{file}: {reason}")
        self._broken = broken_files(receipts, lacking)

    def look_up(self) -> None:
        """Find what a growing corpus has already, and drop rows."""
        if self.growth is None:
            return
        arguments = {
            "corpus": self.growth.corpus,
            "version": self.artifact,
            "dropping": self.growth.dropping,
            "hashes": self._placed(HASHES),
            "sorting": self._sorting,
        }
        items = part_items(self.growth.base)
        self.known = self._run("ingest: known pairs", items, KnownWorker, self._earlier, arguments, "rows")

    def write(self, done: dict[int, Receipt]) -> list[Receipt]:
        """Write the corpus itself, bucket by bucket, and in a last item what was rejected on the way."""
        rejects = self._placed(REJECTS)
        rows = np.zeros(self._sorting.buckets, np.int64)
        for place, receipts in self._read:
            parts = _parts(receipts, PAIRS)
            rows += bucket_rows(place, parts) if parts else 0
        items = [WorkItem(bucket, int(count), "bucket") for bucket, count in enumerate(rows)]
        aside = sum((Counter(receipt.counts.set_aside) for _, all in self._read for receipt in all), Counter[str]())
        gathered = sum(part.rows for _, part in rejects) + self._broken.num_rows
        items.append(WorkItem(len(rows), gathered, Rejected(tuple(rejects), self._broken, dict(aside))))
        arguments = {
            "config": self.config.corpus,
            "pairs": self._placed(PAIRS),
            "origins": Origins.of_receipts(receipt for _, receipts in self._read for receipt in receipts),
            "dimensions": self.dimensions,
            "exclusions": Exclusions(
                held_out=self.held_out,
                held_out_texts=self.held_out_texts,
                contamination=self._contamination(),
                near_duplicates=self._near_duplicates(),
                leftovers=None if self.growth else self._leftovers,
                known=Known(self._earlier, tuple(_parts(self.known, KNOWN))) if self.growth else None,
            ),
        }
        writing = Pass("ingest: write", self.artifact, self.identity, WriteWorker, arguments, self._pool)
        return writing.run(items, done=done)

    def collect(self, receipts: Sequence[Receipt]) -> list[Part]:
        """Write the held-out collection from what the buckets left of it; return no parts if nothing is held out."""
        left = [Part.model_validate_json(text) for receipt in receipts for text in receipt.details.get("leftovers", [])]
        if not any(part.rows for part in left if part.details["role"] == "held"):
            return []
        arguments = {
            "corpus": self.artifact,
            "leftovers": self._leftovers,
            "documents": [part for part in left if part.details["role"] == "documents"],
            "held_out": [part for part in left if part.details["role"] == "held"],
            "images": self.config.corpus.columns.images,
        }
        title = "ingest: hold out"
        collecting = Pass(title, None, self.identity, CollectionWorker, arguments, self._pool, temporary=True)
        [receipt] = collecting.run([WorkItem(0, sum(part.rows for part in left), None)])
        return receipt.parts

    @cached_property
    def held_out(self) -> HeldOut:
        """The pairs that the corpus holds out already, otherwise those chosen from the candidates of pass 1."""
        if self.growth:
            return self.growth.held_out
        total, by = self._sorting.held_out, self._sorting.held_out_by
        schema = sketch_schema(False, by, self._sorting.document_ids)
        found = choose(read_sketches(self._placed(SKETCHES), schema), total, by)
        if total and by == "query" and found.is_empty:
            raise DataError(
                "evaluate.holdout_by: query needs documents with two different queries, and no source has one; "
                "hold out by document"
            )
        return found

    @cached_property
    def held_out_texts(self) -> Contamination | None:
        """Signatures of what is held out; None if near copies of it may be trained on, or nothing is held out."""
        if not (self._sorting.texts_held_out and not self.held_out.is_empty):
            return None
        threshold = self.config.corpus.near_threshold
        if self.growth:
            kept = self.growth.held_out_texts(threshold)
            return self._test_texts([self.growth.collection], "held-out", threshold) if kept is None else kept
        output = Artifact(self.exchange.child("held-out"), "held-out texts")
        items = plan_held_out_texts(self._placed(SKETCHES))
        arguments = {"held_out": self.held_out}
        receipts = self._run("ingest: held-out texts", items, HeldOutTextsWorker, output, arguments, "parts")
        return Contamination(output, tuple(part for receipt in receipts for part in receipt.parts), threshold)

    def _contamination(self) -> Contamination | None:
        """Return hashes and signatures of the test texts; None if nothing is to be compared."""
        corpus = self.config.corpus
        if not self.tests or corpus.decontaminate == "off":
            return None
        return self._test_texts(self.tests, "tests", corpus.near_threshold if corpus.decontaminate == "near" else None)

    def _test_texts(self, tests: Sequence[PairCollection], name: str, threshold: float | None) -> Contamination:
        """Write hashes and signatures of what collections judge."""
        output = Artifact(self.exchange.child(name), "test texts")
        items = plan_test_texts(tests, self.config.corpus.unit_bytes)
        arguments = {"collections": tests, "storage": self.config.storage}
        receipts = self._run("ingest: test texts", items, TestTextsWorker, output, arguments, "bytes")
        return Contamination(output, tuple(part for receipt in receipts for part in receipt.parts), threshold)

    def _near_duplicates(self) -> NearDuplicates | None:
        """Find pairs that are near an earlier one; None if they may stay."""
        threshold = self._sorting.near_threshold
        if threshold is None:
            return None
        output = Artifact(self.exchange.child("near"), "near duplicates")
        receipts = self._run(
            "ingest: compare near pairs",
            _bucket_items(self._sorting.near_buckets),
            NearPairsWorker,
            output,
            {
                "parts": [*((self._earlier, part) for part in _parts(self.known, ENTRIES)), *self._placed(ENTRIES)],
                "threshold": threshold,
                "buckets": self._sorting.buckets,
                "dimensions": self.dimensions,
            },
            "buckets",
        )
        return NearDuplicates(output, tuple(part for receipt in receipts for part in receipt.parts))

    def _placed(self, role: str) -> list[tuple[Artifact, Part]]:
        """Return the parts of a role that the passes over the input have left."""
        return [(place, part) for place, receipts in self._read for part in _parts(receipts, role)]

    @property
    def _pool(self) -> Pool:
        return Pool(self.config.corpus.workers)

    def _run(
        self,
        title: str,
        items: Sequence[WorkItem],
        worker: type,
        output: Artifact,
        arguments: Mapping[str, Any],
        measured_in: str,
    ) -> list[Receipt]:
        """Run a pass whose output goes with the exchange."""
        identity = fingerprint("passes", _PASSES, self.identity)
        temporary = Pass(title, output, identity, worker, arguments, self._pool, measured_in, temporary=True)
        # The remains of other work that was cut off are useless.
        return temporary.run(items, force=True)


def _aside(receipt: Receipt) -> int:
    return sum(receipt.counts.set_aside.values())


def _items(planned: Sequence[Sequence[Slice] | Sequence[CollectionSlice]]) -> list[WorkItem]:
    return [WorkItem(number, sum(item.size for item in slices), list(slices)) for number, slices in enumerate(planned)]


def _bucket_items(buckets: int) -> list[WorkItem]:
    return [WorkItem(bucket, 1, None) for bucket in range(buckets)]


def _parts(receipts: Sequence[Receipt], role: str) -> list[Part]:
    return [part for receipt in receipts for part in receipt.parts if part.details["role"] == role]
