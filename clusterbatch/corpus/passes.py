"""The passes of ingest over storage: join what has to be joined, read, write."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from clusterbatch.config import RunConfig, fingerprint
from clusterbatch.corpus.append import KNOWN, Growth, Known, KnownWorker, part_units
from clusterbatch.corpus.beir import CollectionSlice, PairCollection, Role, plan_collections
from clusterbatch.corpus.decontaminate import Contamination, TestTextsWorker, plan_test_texts
from clusterbatch.corpus.find_inputs import Inputs
from clusterbatch.corpus.holdout import HeldOut, choose, read_sketches
from clusterbatch.corpus.inputs import Slice, plan_units
from clusterbatch.corpus.join import DocumentWorker, QueryWorker, ScatterWorker
from clusterbatch.corpus.near_duplicates import ENTRIES, NearDuplicates, NearPairsWorker
from clusterbatch.corpus.read import HASHES, REJECTS, SKETCH, ReadWorker, bucket_count, read_bytes, sorting
from clusterbatch.corpus.row_groups import PAIRS
from clusterbatch.corpus.rows import NOTHING, broken_files
from clusterbatch.corpus.write import Exclusions, Origins, Rejected, WriteWorker
from clusterbatch.corpus.write_holdout import CollectionWorker
from clusterbatch.runtime import Pool, Unit, run_units
from clusterbatch.store.artifact import Artifact, Part, Receipt
from clusterbatch.store.shuffle import bucket_rows
from clusterbatch.store.traffic import Traffic, carry_over

# Raised where units of the passes become others or leave something else: a run that was cut off and goes on with
# another version of this code begins its passes anew.
_PASSES = 2


@dataclass
class Passes:
    """What one run of ingest has read and written so far. The passes leave their parts below `artifact`/_exchange.

    growth: the corpus that `artifact`, a version of it, goes on from.
    """

    config: RunConfig
    identity: str
    artifact: Artifact
    inputs: Inputs
    # The collections of evaluate.path.
    tests: list[PairCollection]
    growth: Growth | None = None

    def __post_init__(self) -> None:
        self.exchange = self.artifact.folder.child("_exchange")
        self._rows = Artifact(self.exchange.child("rows"), "corpus buckets")
        self._leftovers = Artifact(self.exchange.child("leftovers"), "held-out texts")
        self._paired = Artifact(self.exchange.child("paired"), "corpus buckets")
        self._there = Artifact(self.exchange.child("known"), "known pairs")
        # Of every pass that reads input: receipts, and the artifact their parts are in.
        self._read: list[tuple[Artifact, list[Receipt]]] = []
        self._input_bytes = sum(file.size for file in self.inputs)
        known_bytes = self.growth.base.details["input_bytes"] if self.growth else None
        self._sorting = sorting(self.config, self._input_bytes, known_bytes)
        self._first_slice = 0
        self._broken = NOTHING
        self.known: list[Receipt] = []

    @property
    def rows_read(self) -> int:
        """Rows of the input: those that arrive at the last pass, and those that left on the way. What cannot be read of
        a file counts as one."""
        return self._broken.num_rows + sum(
            receipt.counts.read if place in (self._rows, self._paired) else receipt.counts.rejected + _aside(receipt)
            for place, receipts in self._read
            for receipt in receipts
        )

    @property
    def cut(self) -> int:
        return sum(receipt.details.get("cut", 0) for _, receipts in self._read for receipt in receipts)

    @property
    def dimensions(self) -> int | None:
        """Of the vectors that came with the rows: those that most rows have; None where there are none."""
        if self.growth:
            return self.growth.dimensions
        found: Counter[str] = Counter()
        for _, receipts in self._read:
            for receipt in receipts:
                found.update(receipt.details.get("dimensions", {}))
        return int(min(found, key=lambda length: (-found[length], int(length)))) if found else None

    def join(self) -> None:
        """Pairs of the collections: their judgements meet their documents, then their queries."""
        if not self.inputs.collections:
            return
        corpus = self.config.corpus
        files = [file for item in self.inputs.collections for files in item.files.values() for file in files]
        buckets = bucket_count(sum(file.size for file in files), corpus.part_bytes)
        planned = plan_collections(self.inputs.collections, corpus.unit_bytes, 0)
        self._first_slice = len(planned)
        scattered = Artifact(self.exchange.child("scattered"), "texts by id")
        joined = Artifact(self.exchange.child("joined"), "judgements with documents")
        common = {"buckets": buckets}
        receipts = self._run(
            "ingest: scatter",
            _units(planned),
            ScatterWorker,
            scattered,
            {**common, "encoding": corpus.encoding or "utf-8"},
            "bytes",
        )
        by_role: dict[Role, list[Part]] = {
            role: _parts(receipts, role) for role in ("documents", "queries", "judgements")
        }
        found = self._run(
            "ingest: join documents",
            [Unit(bucket, 1, None) for bucket in range(buckets)],
            DocumentWorker,
            joined,
            {**common, "scattered": scattered, "parts": by_role},
            "buckets",
        )
        pairs = self._run(
            "ingest: join queries",
            [Unit(bucket, 1, None) for bucket in range(buckets)],
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
        """Pairs of the other files."""
        unit_bytes = read_bytes(self._input_bytes, self.config.corpus.unit_bytes)
        planned = plan_units(self.inputs.files, unit_bytes, self._first_slice)
        arguments = {"config": self.config.corpus, "sorting": self._sorting}
        receipts = self._run("ingest: read", _units(planned), ReadWorker, self._rows, arguments, "bytes")
        self._read.append((self._rows, receipts))
        self._broken = broken_files(receipts)

    def look_up(self) -> None:
        """What the corpus has already, where it grows."""
        if self.growth is None:
            return
        self.known = self._run(
            "ingest: known pairs",
            part_units(self.growth.base),
            KnownWorker,
            self._there,
            {
                "corpus": self.growth.corpus,
                "output": self.artifact,
                "dropping": self.growth.dropping,
                "hashes": self._placed(HASHES),
                "sorting": self._sorting,
            },
            "rows",
        )

    def write(self, done: dict[int, Receipt]) -> list[Receipt]:
        """The corpus itself, bucket by bucket, and in a last unit what was rejected on the way."""
        rejects = self._placed(REJECTS)
        rows = np.zeros(self._sorting.buckets, np.int64)
        for place, receipts in self._read:
            parts = _parts(receipts, PAIRS)
            rows += bucket_rows(place, parts) if parts else 0
        units = [Unit(bucket, int(count), "bucket") for bucket, count in enumerate(rows)]
        aside = sum((Counter(receipt.counts.set_aside) for _, all in self._read for receipt in all), Counter[str]())
        gathered = sum(part.rows for _, part in rejects) + self._broken.num_rows
        units.append(Unit(len(rows), gathered, Rejected(tuple(rejects), self._broken, dict(aside))))
        arguments = {
            "artifact": self.artifact,
            "fingerprint": self.identity,
            "config": self.config.corpus,
            "pairs": self._placed(PAIRS),
            "origins": Origins.of_receipts(receipt for _, receipts in self._read for receipt in receipts),
            "dimensions": self.dimensions,
            "exclusions": Exclusions(
                self.held_out,
                self._contamination(),
                self._near_duplicates(),
                None if self.growth else self._leftovers,
                self._known() if self.growth else None,
            ),
        }
        return run_units("ingest: write", units, WriteWorker, arguments, self._pool, done=done)

    def collect(self, receipts: Sequence[Receipt]) -> list[Part]:
        """The held-out collection, from what the buckets left of it; no parts where nothing is held out."""
        left = [Part.model_validate_json(text) for receipt in receipts for text in receipt.details.get("leftovers", [])]
        if not any(part.rows for part in left if part.details["role"] == "held"):
            return []
        arguments = {
            "artifact": self.artifact,
            "leftovers": self._leftovers,
            "fingerprint": self.identity,
            "documents": [part for part in left if part.details["role"] == "documents"],
            "held": [part for part in left if part.details["role"] == "held"],
        }
        [receipt] = run_units("ingest: hold out", [Unit(0, 1, None)], CollectionWorker, arguments, self._pool)
        return receipt.parts

    @cached_property
    def held_out(self) -> HeldOut:
        """What the corpus holds out already, else what is chosen from the candidates that the units of pass 1 left."""
        if self.growth:
            return self.growth.held_out
        return choose(read_sketches(self._placed(SKETCH)), self._sorting.held_out)

    def _known(self) -> Known:
        return Known(self._there, tuple(_parts(self.known, KNOWN)))

    def _contamination(self) -> Contamination | None:
        """Hashes and signatures of the test texts; None where nothing is to be compared."""
        corpus = self.config.corpus
        if not self.tests or corpus.decontaminate == "off":
            return None
        place = Artifact(self.exchange.child("tests"), "test texts")
        receipts = self._run(
            "ingest: test texts",
            plan_test_texts(self.tests, corpus.unit_bytes),
            TestTextsWorker,
            place,
            {"collections": self.tests},
            "bytes",
        )
        threshold = corpus.near_threshold if corpus.decontaminate == "near" else None
        return Contamination(place, tuple(part for receipt in receipts for part in receipt.parts), threshold)

    def _near_duplicates(self) -> NearDuplicates | None:
        """Pairs that are near an earlier one; None where they may stay."""
        threshold = self._sorting.near_threshold
        if threshold is None:
            return None
        place = Artifact(self.exchange.child("near"), "near duplicates")
        receipts = self._run(
            "ingest: compare near pairs",
            [Unit(bucket, 1, None) for bucket in range(self._sorting.near_buckets)],
            NearPairsWorker,
            place,
            {
                "parts": [*((self._there, part) for part in _parts(self.known, ENTRIES)), *self._placed(ENTRIES)],
                "threshold": threshold,
                "buckets": self._sorting.buckets,
            },
            "buckets",
        )
        return NearDuplicates(place, tuple(part for receipt in receipts for part in receipt.parts))

    def _placed(self, role: str) -> list[tuple[Artifact, Part]]:
        """The parts of a role that the passes over the input have left."""
        return [(place, part) for place, receipts in self._read for part in _parts(receipts, role)]

    @property
    def _pool(self) -> Pool:
        return Pool(self.config.corpus.workers)

    def _run(
        self,
        title: str,
        units: Sequence[Unit],
        worker: type,
        artifact: Artifact,
        arguments: dict[str, Any],
        measured_in: str,
    ) -> list[Receipt]:
        identity = fingerprint("passes", _PASSES, self.identity)
        receipts = run_units(
            title,
            units,
            worker,
            {"artifact": artifact, "fingerprint": identity, **arguments},
            self._pool,
            # What other work that was cut off has left is of no use to anybody.
            done=artifact.begin(identity, force=True),
            measured_in=measured_in,
        )
        # These receipts go with the exchange; what their units asked of storage belongs to the corpus.
        carry_over(sum((receipt.traffic for receipt in receipts), Traffic()))
        return receipts


def _aside(receipt: Receipt) -> int:
    return sum(receipt.counts.set_aside.values())


def _units(planned: Sequence[Sequence[Slice] | Sequence[CollectionSlice]]) -> list[Unit]:
    return [Unit(number, sum(item.size for item in slices), list(slices)) for number, slices in enumerate(planned)]


def _parts(receipts: Sequence[Receipt], role: str) -> list[Part]:
    return [part for receipt in receipts for part in receipt.parts if part.details["role"] == role]
