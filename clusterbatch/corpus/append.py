"""What a new version of a corpus goes on from: its rows, its input files, what it holds out; and what is new.

What a growing corpus has already: a pass over its earlier versions that drops rows and finds repetitions.

Of every part, ids, sources and hashes are read. Rows that are to go are listed beside their part, in the new version;
of the others, those whose document also comes in with the new rows meet them, bucketed by document. With near
duplicates set aside, all of them are compared again, by their texts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clusterbatch.config import RunConfig
from clusterbatch.corpus.find_inputs import Inputs
from clusterbatch.corpus.holdout import NOTHING, HeldOut
from clusterbatch.corpus.inputs import InputFile
from clusterbatch.corpus.near_duplicates import ENTRIES, entries
from clusterbatch.corpus.read import DROPPED, Sorting
from clusterbatch.corpus.row_groups import RowGroup, live_rows, read_row_group, row_groups_of
from clusterbatch.errors import DataError, UsageError
from clusterbatch.runtime import Unit
from clusterbatch.store.artifact import Artifact, Counts, Manifest, Part, Receipt, Stopwatch
from clusterbatch.store.folder import Folder
from clusterbatch.store.shuffle import read_bucket, write_buckets
from clusterbatch.store.tables import read_parquet, write_parquet
from clusterbatch.store.versions import GrowingArtifact

# The role of parts with hashes of pairs that are there already; lists of dropped rows have `DROPPED` as theirs.
KNOWN = "known"

_PAIR = ["document_hash", "query_hash"]
# Bits of the filter for each of the new documents, and at most: 128 MiB. What it lets through too much costs reading.
_BITS_EACH, _MOST_BITS = 32, 30


@dataclass(frozen=True)
class Dropping:
    """Which rows go: those of pair_ids in files, one a line, and those of whole sources."""

    files: Sequence[str]
    sources: Sequence[str]
    folder: Folder

    @cached_property
    def _ids(self) -> pa.Array:
        lines = [line for file in self.files for line in _lines(Folder(file, self.folder.storage))]
        return pa.array(lines, pa.string()).unique()

    def mask(self, rows: pa.Table) -> np.ndarray:
        """(n,) bool of rows with pair_id and source."""
        named = pc.is_in(rows["pair_id"], self._ids).to_numpy()
        return named | pc.is_in(rows["source"], pa.array(self.sources, pa.string())).to_numpy()


class DocumentFilter:
    """Tells of most documents that do not come with the new rows that they do not; one bit a document (Bloom 1970)."""

    def __init__(self, hashes: Iterable[np.ndarray], documents: int) -> None:
        bits = min(_MOST_BITS, max(6, int(_BITS_EACH * documents).bit_length()))
        self._shift = np.uint64(64 - bits)
        self._set = np.zeros(2 ** (bits - 3), np.uint8)
        for some in hashes:
            place = self._places(some)
            np.bitwise_or.at(self._set, place >> np.uint64(3), _bit(place))

    def may_have(self, hashes: np.ndarray) -> np.ndarray:
        """(n,) bool; True for all that come, and for few others."""
        place = self._places(hashes)
        return (self._set[place >> np.uint64(3)] & _bit(place)) != 0

    def _places(self, hashes: np.ndarray) -> np.ndarray:
        # The high bits: buckets follow the low ones.
        return hashes.astype(np.uint64) >> self._shift


class KnownWorker:
    """Reads one part of the corpus; its unit's payload is the part's units.

    output: the version that is being made, for the lists of dropped rows; hashes: parts of pass 1, of new documents.
    """

    def __init__(
        self,
        artifact: Artifact,
        fingerprint: str,
        corpus: Artifact,
        output: Artifact,
        dropping: Dropping,
        hashes: Sequence[tuple[Artifact, Part]],
        sorting: Sorting,
    ) -> None:
        self._artifact, self._fingerprint = artifact, fingerprint
        self._corpus, self._output = corpus, output
        self._dropping, self._sorting = dropping, sorting
        found = (read_parquet(place.folder, part)["document_hash"].to_numpy() for place, part in hashes)
        self._new = DocumentFilter(found, sum(part.rows for _, part in hashes))

    def process(self, unit: Unit) -> Receipt:
        watch = Stopwatch()
        near = self._sorting.near_threshold
        texts = [] if near is None else ["query", "document"]
        dropped, known, compared = [np.empty(0, np.int64)], [], []
        counts: list[int] = []
        sources: Counter[str] = Counter()
        for item in unit.payload:
            rows = read_row_group(self._corpus, item, ["pair_id", "source", *_PAIR, *texts])
            gone, live = self._dropping.mask(rows), live_rows(self._corpus, item)
            sources.update(rows["source"].filter(pa.array(gone)).to_pylist())
            # The list of a version holds what earlier ones dropped as well.
            before = np.setdiff1d(np.arange(item.stored), live)
            dropped.append(item.first + np.union1d(before, live[gone]))
            counts.append(len(dropped[-1]))
            stays = rows.filter(pa.array(~gone))
            known.append(stays.select(_PAIR).filter(pa.array(self._new.may_have(stays["document_hash"].to_numpy()))))
            if near is not None:
                # Before all new rows: their slices are numbered from 0.
                stays = stays.append_column("slice", pa.array(np.full(len(stays), item.number - 2**40)))
                compared.append(stays.append_column("position", pa.array(np.arange(len(stays)))))
        parts = [self._known(unit.number, pa.concat_tables(known))]
        if near is not None:
            parts.append(self._entries(unit.number, pa.concat_tables(compared), near))
        details: dict[str, Any] = {"gone": dict(sources)}
        if sources:
            table = pa.table({"row": np.concatenate(dropped)})
            part = write_parquet(self._output, f"deleted/part-{unit.number:06d}", table, role=DROPPED)
            details |= {"list": part.model_dump(mode="json"), "rows": counts}
        receipt = Receipt(
            unit=unit.number,
            fingerprint=self._fingerprint,
            parts=parts,
            counts=Counts(read=unit.rows, written=unit.rows),
            seconds=watch.seconds,
            details={**details, "part": unit.payload[0].path},
        )
        self._artifact.write_receipt(receipt)
        return receipt

    def _known(self, unit: int, pairs: pa.Table) -> Part:
        count = self._sorting.buckets
        buckets = (pairs["document_hash"].to_numpy() % np.uint64(count)).astype(np.int64)
        return write_buckets(self._artifact, unit, pairs, buckets, count, role=KNOWN)

    def _entries(self, unit: int, pairs: pa.Table, threshold: float) -> Part:
        table, count = entries(pairs, threshold), self._sorting.near_buckets
        buckets = (table["band"].to_numpy() % np.uint64(count)).astype(np.int64)
        return write_buckets(self._artifact, unit, table, buckets, count, role=ENTRIES)


@dataclass(frozen=True)
class Known:
    """Pairs that the corpus has already, by bucket of their documents."""

    artifact: Artifact
    parts: tuple[Part, ...]

    def mask(self, bucket: int, pairs: pa.Table) -> np.ndarray:
        """(n,) bool: the pairs of a bucket that are there already."""
        found = read_bucket(self.artifact, self.parts, bucket)
        if found is None:
            return np.zeros(pairs.num_rows, bool)
        return np.isin(_hashes(pairs), _hashes(found))


def part_units(manifest: Manifest) -> list[Unit]:
    """One unit for each part with pairs."""
    by_part: dict[str, list[RowGroup]] = {}
    for unit in row_groups_of(manifest):
        by_part.setdefault(unit.path, []).append(unit)
    return [Unit(number, sum(unit.rows for unit in units), units) for number, units in enumerate(by_part.values())]


def without_dropped(manifest: Manifest, receipts: Sequence[Receipt], path_of: Callable[[str], str]) -> Manifest:
    """The manifest of an earlier version as the next one goes on from it: dropped rows are set aside as deleted.

    path_of: from the path of a list of dropped rows in the version to its path in the corpus.
    """
    parts = {part.path: part for part in manifest.parts}
    gone = Counter[str]()
    for receipt in receipts:
        gone.update(receipt.details["gone"])
        if "list" in receipt.details:
            part = parts[receipt.details["part"]]
            listed = {"deleted": path_of(receipt.details["list"]["path"]), "deleted_rows": receipt.details["rows"]}
            parts[part.path] = part.model_copy(update={"details": {**part.details, **listed}})
    counts = manifest.counts.model_copy(update={"written": manifest.counts.written - gone.total()})
    aside = Counts(set_aside={DROPPED: gone.total()}) if gone else Counts()
    sources = Counter(manifest.details["sources"])
    sources.subtract(gone)
    return manifest.model_copy(
        update={
            "parts": list(parts.values()),
            "counts": counts + aside,
            "details": {**manifest.details, "sources": dict(+sources)},
        }
    )


def dropped_lists(receipts: Sequence[Receipt]) -> list[Part]:
    return [Part(**receipt.details["list"]) for receipt in receipts if "list" in receipt.details]


def _hashes(pairs: pa.Table) -> np.ndarray:
    """(n,) of both hashes as one value each."""
    return np.rec.fromarrays([pairs[name].to_numpy() for name in _PAIR])


def _bit(place: np.ndarray) -> np.ndarray:
    return (np.uint64(1) << (place & np.uint64(7))).astype(np.uint8)


def _lines(file: Folder) -> list[str]:
    folder, _, name = file.uri.rpartition("/")
    try:
        text = Folder(folder, file.storage).read(name).decode()
    except FileNotFoundError:
        raise DataError(f"corpus.delete: {file.uri}: not there any more") from None
    except UnicodeDecodeError:
        raise DataError(f"corpus.delete: {file.uri}: not UTF-8; expected pair_ids, one a line") from None
    return [line.strip() for line in text.splitlines() if line.strip()]


# Roles of parts: the files that a version was made of, and the hashes of what is held out.
FILES, CHOSEN = "files", "held out"
# Keys of `corpus` that may differ from version to version; all others decide what is a valid pair, or its columns.
_FREE = ("paths", "source", "split", "on_error", "encoding", "sample_pairs", "sample_seed")
_FILES_SCHEMA = pa.schema({"uri": pa.string(), "size": pa.int64(), "version": pa.string()})


@dataclass(frozen=True)
class Growth:
    """base: the newest version of `corpus`; dropping: the rows that the next one has no more."""

    corpus: GrowingArtifact
    base: Manifest
    dropping: Dropping

    @property
    def dimensions(self) -> int | None:
        """Of the vectors that came with the rows."""
        found: int | None = self.base.details.get("dimensions")
        return found

    @cached_property
    def held_out(self) -> HeldOut:
        parts = [part for part in self.base.parts if part.details.get("role") == CHOSEN]
        return HeldOut.from_table(read_parquet(self.corpus.folder, parts[0])) if parts else NOTHING


def new_inputs(inputs: Inputs, read: set[tuple[str, int, str]]) -> Inputs:
    """The files that are not among those that were read, or have changed since; collections as a whole."""
    collections = [
        collection
        for collection in inputs.collections
        if any(not _is_read(file, read) for files in collection.files.values() for file in files)
    ]
    return Inputs([file for file in inputs.files if not _is_read(file, read)], collections)


def files_read(corpus: GrowingArtifact, manifest: Manifest) -> set[tuple[str, int, str]]:
    """(uri, size, version) of all files that a corpus was made of."""
    parts = [part for part in manifest.parts if part.details.get("role") == FILES]
    rows = [row for part in parts for row in read_parquet(corpus.folder, part).to_pylist()]
    return {(row["uri"], row["size"], row["version"]) for row in rows}


def write_files(artifact: Artifact, files: Iterable[InputFile]) -> Part:
    rows = [{"uri": file.uri, "size": file.size, "version": file.version} for file in files]
    return write_parquet(artifact, "files", pa.Table.from_pylist(rows, schema=_FILES_SCHEMA), role=FILES)


def check_same_rules(config: RunConfig, base: Manifest, tests: str) -> None:
    """Raises UsageError where rows would be taken by other rules than those of the corpus.

    tests: fingerprint of the test collections that the corpus must not contain.
    """
    if "tests" not in base.details:
        raise UsageError("ingest --append: this corpus does not say what it was made of (an older one); ingest it anew")
    before, now = base.config, config.corpus.identity()
    changed = [key for key in now if key not in _FREE and now[key] != before.get(key)]
    if changed:
        raise UsageError(f"ingest --append: corpus.{changed[0]} is another than the corpus was made with")
    if base.details["tests"] != tests:
        raise UsageError(
            "ingest --append: the collections of evaluate.path, which the corpus must not contain, have changed since "
            "it was made; ingest it anew (--force)"
        )


def _is_read(file: InputFile, read: set[tuple[str, int, str]]) -> bool:
    return (file.uri, file.size, file.version) in read
