"""The passes of ingest over storage: join what has to be joined, read, write."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from clusterbatch.config import RunConfig
from clusterbatch.corpus.collecting import CollectionWorker
from clusterbatch.corpus.collections import CollectionSlice, PairCollection, Role, plan_collections
from clusterbatch.corpus.decontamination import Contamination, TestTextsWorker, plan_test_texts
from clusterbatch.corpus.finding import Inputs
from clusterbatch.corpus.growth import Growth
from clusterbatch.corpus.holdout import HeldOut, choose
from clusterbatch.corpus.inputs import Slice, plan_units
from clusterbatch.corpus.joining import DocumentWorker, QueryWorker, ScatterWorker
from clusterbatch.corpus.known import KNOWN, Known, KnownWorker, part_units
from clusterbatch.corpus.near_pairs import ENTRIES, NearDuplicates, NearPairsWorker
from clusterbatch.corpus.origins import Origins
from clusterbatch.corpus.reading import ReadWorker
from clusterbatch.corpus.sink import HASHES, REJECTS, SKETCH, Sorting
from clusterbatch.corpus.sizing import bucket_count, held_out_documents, near_bucket_count
from clusterbatch.corpus.units import PAIRS
from clusterbatch.corpus.writing import Exclusions, Rejected, WriteWorker
from clusterbatch.runtime import Pool, Unit, run_units
from clusterbatch.store.artifact import Artifact, Part, Receipt
from clusterbatch.store.exchange import bucket_rows
from clusterbatch.store.tables import read_parquet
from clusterbatch.store.traffic import Traffic, carry_over


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
        self._first_slice = 0
        self.known: list[Receipt] = []

    @property
    def rows_read(self) -> int:
        """Rows of the input: those that arrive at the last pass, and those that left on the way."""
        return sum(
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
        common = {"fingerprint": self.identity, "buckets": buckets}
        receipts = self._run("ingest: scatter", _units(planned), ScatterWorker, scattered, {**common}, "bytes")
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
                "fingerprint": self.identity,
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
        planned = plan_units(self.inputs.files, self.config.corpus.unit_bytes, self._first_slice)
        arguments = {"fingerprint": self.identity, "config": self.config.corpus, "sorting": self._sorting}
        receipts = self._run("ingest: read", _units(planned), ReadWorker, self._rows, arguments, "bytes")
        self._read.append((self._rows, receipts))

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
                "fingerprint": self.identity,
                "corpus": self.growth.corpus,
                "output": self.artifact,
                "dropping": self.growth.dropping,
                "hashes": [(place, part) for place, receipts in self._read for part in _parts(receipts, HASHES)],
                "sorting": self._sorting,
            },
            "rows",
        )

    def write(self, done: dict[int, Receipt]) -> list[Receipt]:
        """The corpus itself, bucket by bucket, and in a last unit what was rejected on the way."""
        pairs = [(place, part) for place, receipts in self._read for part in _parts(receipts, PAIRS)]
        rejects = [(place, part) for place, receipts in self._read for part in _parts(receipts, REJECTS)]
        rows = np.zeros(self._buckets, np.int64)
        for place, receipts in self._read:
            parts = _parts(receipts, PAIRS)
            rows += bucket_rows(place, parts) if parts else 0
        units = [Unit(bucket, int(count), "bucket") for bucket, count in enumerate(rows)]
        aside = sum((Counter(receipt.counts.set_aside) for _, all in self._read for receipt in all), Counter[str]())
        units.append(Unit(len(rows), sum(part.rows for _, part in rejects), Rejected(tuple(rejects), dict(aside))))
        arguments = {
            "artifact": self.artifact,
            "fingerprint": self.identity,
            "config": self.config.corpus,
            "pairs": pairs,
            "origins": Origins.of_receipts(receipt for _, receipts in self._read for receipt in receipts),
            "dimensions": self.dimensions,
            "exclusions": Exclusions(
                self.held_out,
                self._contamination(),
                self._near_duplicates(),
                None if self.growth else self._leftovers,
                self._known() if self.growth else None,
                tuple(self.config.corpus.drop_sources),
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
        parts = [(place, part) for place, receipts in self._read for part in _parts(receipts, SKETCH)]
        return choose((read_parquet(place.folder, part) for place, part in parts), self._held_out)

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
            {"fingerprint": self.identity, "collections": self.tests},
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
                "fingerprint": self.identity,
                "parts": [*self._known_entries(), *self._entries()],
                "threshold": threshold,
                "buckets": self._buckets,
            },
            "buckets",
        )
        return NearDuplicates(place, tuple(part for receipt in receipts for part in receipt.parts))

    def _entries(self) -> list[tuple[Artifact, Part]]:
        return [(place, part) for place, receipts in self._read for part in _parts(receipts, ENTRIES)]

    def _known_entries(self) -> list[tuple[Artifact, Part]]:
        return [(self._there, part) for part in _parts(self.known, ENTRIES)]

    @property
    def _held_out(self) -> int:
        return 0 if self.growth else held_out_documents(self.config)

    @property
    def _sorting(self) -> Sorting:
        corpus = self.config.corpus
        wanted = corpus.near_duplicates == "set_aside"
        # Pairs that are there already are compared as well.
        known = bucket_count(self.growth.base.details["input_bytes"], corpus.part_bytes) if self.growth else 0
        return Sorting(
            buckets=self._buckets,
            held_out=self._held_out,
            near_threshold=corpus.near_threshold if wanted else None,
            near_buckets=near_bucket_count(self._buckets + known),
            hashes=self.growth is not None,
        )

    @property
    def _buckets(self) -> int:
        return bucket_count(sum(file.size for file in self.inputs), self.config.corpus.part_bytes)

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
        receipts = run_units(
            title,
            units,
            worker,
            {"artifact": artifact, **arguments},
            self._pool,
            # What other work that was cut off has left is of no use to anybody.
            done=artifact.begin(self.identity, force=True),
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
