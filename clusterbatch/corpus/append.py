"""New versions of a corpus: which inputs are new, which rows are dropped, which pairs the corpus has already.

One pass reads ids, sources and hashes of every part of the earlier version. Rows that are dropped are listed next to
their part, in the new version; the others meet the new rows, bucketed by document, if their document is also among the
new ones. If near duplicates are set aside, all pairs are compared again, by their texts.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clusterbatch.config import RunConfig
from clusterbatch.corpus.beir import PairCollection, collection_in
from clusterbatch.corpus.decontaminate import SIGNATURES, Contamination
from clusterbatch.corpus.find_inputs import Inputs
from clusterbatch.corpus.holdout import NOTHING, HeldOut
from clusterbatch.corpus.inputs import InputFile
from clusterbatch.corpus.near_duplicates import write_entries
from clusterbatch.corpus.read import DROPPED, Sorting
from clusterbatch.corpus.row_groups import RowGroup, live_rows, read_row_group, row_groups_of
from clusterbatch.corpus.write_holdout import HOLDOUT
from clusterbatch.errors import DataError, UsageError
from clusterbatch.runtime import Result, WorkItem
from clusterbatch.store.artifact import Artifact, Counts, Manifest, Part, Receipt
from clusterbatch.store.details import CorpusDetails, details_of, given_dimensions
from clusterbatch.store.folder import Folder
from clusterbatch.store.growing import GrowingArtifact
from clusterbatch.store.shuffle import read_bucket, write_buckets
from clusterbatch.store.tables import read_parquet, write_parquet

# Roles of parts: hashes of pairs that the corpus has already, the files that a version was made of, and the hashes of
# what is held out. Lists of dropped rows have `DROPPED` as their role.
KNOWN, FILES, CHOSEN = "known", "files", "held out"
# Keys of `corpus` that may differ from version to version; all others decide what is a valid pair, or its columns.
_FREE = ("paths", "source", "split", "on_error", "encoding", "sample_pairs", "sample_seed")
_FILES_SCHEMA = pa.schema({"uri": pa.string(), "size": pa.int64(), "version": pa.string()})
_PAIR = ["document_hash", "query_hash"]
# Bits of the filter for each of the new documents, and at most: 128 MiB. Its false positives cost reading.
_BITS_EACH, _MOST_BITS = 32, 30
# Bytes of earlier pairs that are compared with the new ones at once.
_NEAR_BYTES = 32 * 2**20


@dataclass(frozen=True)
class Dropping:
    """The rows to drop: those whose pair_id is in one of `files`, one a line, and those of whole sources."""

    files: Sequence[str]
    sources: Sequence[str]
    folder: Folder

    @cached_property
    def _ids(self) -> pa.Array:
        lines = [line for file in self.files for line in _lines(Folder(file, self.folder.storage))]
        return pa.array(lines, pa.string()).unique()

    def mask(self, rows: pa.Table) -> np.ndarray:
        """Return which rows are dropped, (n,) bool; `rows` have pair_id and source."""
        named = pc.is_in(rows["pair_id"], self._ids).to_numpy()
        return named | pc.is_in(rows["source"], pa.array(self.sources, pa.string())).to_numpy()


@dataclass(frozen=True)
class Growth:
    """base: the newest version of `corpus`; dropping: the rows that the next one drops."""

    corpus: GrowingArtifact
    base: Manifest
    dropping: Dropping

    @property
    def dimensions(self) -> int | None:
        """Length of the vectors that came with the rows."""
        return given_dimensions(self.base)

    @cached_property
    def held_out(self) -> HeldOut:
        """Return what the corpus holds out."""
        parts = [part for part in self.base.parts if part.details.get("role") == CHOSEN]
        return HeldOut.from_table(read_parquet(self.corpus.folder, parts[0])) if parts else NOTHING

    def held_out_texts(self, threshold: float) -> Contamination | None:
        """Return the texts that new rows must not be near to; None if the corpus keeps none."""
        parts = [part for part in self.base.parts if part.details.get("role") == SIGNATURES]
        return Contamination(self.corpus, tuple(parts), threshold) if parts else None

    @property
    def collection(self) -> PairCollection:
        """The held-out collection. Raises DataError if its files are gone."""
        folder = self.corpus.folder.child(HOLDOUT)
        found = collection_in(folder, 0, None)
        if found is None:
            raise DataError(
                f"{folder.uri}: no longer has the held-out collection, which new rows are compared with; "
                "ingest --force makes the corpus from scratch"
            )
        return found


def lacks_signatures(config: RunConfig, corpus: Manifest) -> bool:
    """Return whether a corpus was made by a version that left near copies of its held-out texts in."""
    roles = {part.details.get("role") for part in corpus.parts if "versions/" not in part.path}
    return config.corpus.decontaminate == "near" and CHOSEN in roles and SIGNATURES not in roles


class DocumentFilter:
    """A Bloom filter (1970) of the new rows' documents, so that few other earlier pairs have to be compared."""

    def __init__(self, hashes: Iterable[np.ndarray], documents: int) -> None:
        bits = min(_MOST_BITS, max(6, int(_BITS_EACH * documents).bit_length()))
        self._shift = np.uint64(64 - bits)
        self._set = np.zeros(2 ** (bits - 3), np.uint8)
        for some in hashes:
            place = self._places(some)
            np.bitwise_or.at(self._set, place >> np.uint64(3), _bit(place))

    def may_have(self, hashes: np.ndarray) -> np.ndarray:
        """Return (n,) bool: True for all hashes in the filter, and for few others."""
        place = self._places(hashes)
        return (self._set[place >> np.uint64(3)] & _bit(place)) != 0

    def _places(self, hashes: np.ndarray) -> np.ndarray:
        # The high bits: buckets follow the low ones.
        return hashes.astype(np.uint64) >> self._shift


class KnownWorker:
    """Read one part of the corpus; its item's payload is the part's row groups.

    version: the one that is being made, for the lists of dropped rows; hashes: parts of pass 1, of new documents.
    """

    def __init__(
        self,
        corpus: Artifact,
        version: Artifact,
        dropping: Dropping,
        hashes: Sequence[tuple[Artifact, Part]],
        sorting: Sorting,
    ) -> None:
        self._corpus, self._version = corpus, version
        self._dropping, self._sorting = dropping, sorting
        found = (read_parquet(place.folder, part)["document_hash"].to_numpy() for place, part in hashes)
        self._new = DocumentFilter(found, sum(part.rows for _, part in hashes))

    def process(self, item: WorkItem, output: Artifact) -> Result:
        near = self._sorting.near_threshold
        texts = [] if near is None else ["query", "document"]
        dropped, known = [np.empty(0, np.int64)], []
        waiting: list[pa.Table] = []
        parts: list[Part] = []
        counts: list[int] = []
        sources: Counter[str] = Counter()
        for group in item.payload:
            rows = read_row_group(self._corpus, group, ["pair_id", "source", *_PAIR, *texts])
            drop, live = self._dropping.mask(rows), live_rows(self._corpus, group)
            sources.update(rows["source"].filter(pa.array(drop)).to_pylist())
            # The list of a version holds what earlier ones dropped as well.
            before = np.setdiff1d(np.arange(group.stored), live)
            dropped.append(group.first + np.union1d(before, live[drop]))
            counts.append(len(dropped[-1]))
            kept = rows.filter(pa.array(~drop))
            known.append(kept.select(_PAIR).filter(pa.array(self._new.may_have(kept["document_hash"].to_numpy()))))
            if near is not None:
                # Before all new rows: their slices are numbered from 0.
                kept = kept.append_column("slice", pa.array(np.full(len(kept), group.number - 2**40)))
                kept = kept.append_column("position", pa.array(np.arange(len(kept))))
                waiting.append(kept)
                # Entries take far more memory than their pairs: they are not made of a whole part at once.
                if group is item.payload[-1] or sum(table.nbytes for table in waiting) >= _NEAR_BYTES:
                    pairs = pa.concat_tables(waiting)
                    parts += write_entries(output, item.number, pairs, near, self._sorting.near_buckets)
                    waiting = []
        pairs = pa.concat_tables(known)
        buckets = (pairs["document_hash"].to_numpy() % np.uint64(self._sorting.buckets)).astype(np.int64)
        parts.append(write_buckets(output, item.number, pairs, buckets, self._sorting.buckets, role=KNOWN))
        details: dict[str, Any] = {"dropped": dict(sources), "part": item.payload[0].path}
        if sources:
            table = pa.table({"row": np.concatenate(dropped)})
            part = write_parquet(self._version, f"deleted/part-{item.number:06d}", table, role=DROPPED)
            details |= {"list": part.model_dump(mode="json"), "rows": counts}
        return Result(parts, Counts(read=item.rows, written=item.rows), details)


@dataclass(frozen=True)
class Known:
    """Pairs that the corpus has already, by bucket of their documents."""

    artifact: Artifact
    parts: tuple[Part, ...]

    def mask(self, bucket: int, pairs: pa.Table) -> np.ndarray:
        """Return which pairs of a bucket the corpus has already, (n,) bool."""
        found = read_bucket(self.artifact, self.parts, bucket)
        if found is None:
            return np.zeros(pairs.num_rows, bool)
        return np.isin(_hashes(pairs), _hashes(found))


def part_items(manifest: Manifest) -> list[WorkItem]:
    """Return one work item for each part with pairs."""
    by_part: dict[str, list[RowGroup]] = {}
    for group in row_groups_of(manifest):
        by_part.setdefault(group.path, []).append(group)
    return [
        WorkItem(number, sum(group.rows for group in groups), groups) for number, groups in enumerate(by_part.values())
    ]


def without_dropped(manifest: Manifest, receipts: Sequence[Receipt], path_of: Callable[[str], str]) -> Manifest:
    """Return the manifest of an earlier version as the next one continues it: dropped rows are set aside as deleted.

    path_of: maps the path of a list of dropped rows in the version to its path in the corpus.
    """
    parts = {part.path: part for part in manifest.parts}
    dropped = Counter[str]()
    for receipt in receipts:
        dropped.update(receipt.details["dropped"])
        if "list" in receipt.details:
            part = parts[receipt.details["part"]]
            listed = {"deleted": path_of(receipt.details["list"]["path"]), "deleted_rows": receipt.details["rows"]}
            parts[part.path] = part.model_copy(update={"details": {**part.details, **listed}})
    counts = manifest.counts.model_copy(update={"written": manifest.counts.written - dropped.total()})
    aside = Counts(set_aside={DROPPED: dropped.total()}) if dropped else Counts()
    details = details_of(manifest, CorpusDetails)
    sources = Counter(details["sources"])
    sources.subtract(dropped)
    changed: CorpusDetails = {**details, "sources": dict(+sources)}
    return manifest.model_copy(
        update={
            "parts": list(parts.values()),
            "counts": counts + aside,
            "details": changed,
        }
    )


def dropped_lists(receipts: Sequence[Receipt]) -> list[Part]:
    """Return the parts that list dropped rows."""
    return [Part(**receipt.details["list"]) for receipt in receipts if "list" in receipt.details]


def _hashes(pairs: pa.Table) -> np.ndarray:
    """Return both hashes of each pair as one value, (n,)."""
    return np.rec.fromarrays([pairs[name].to_numpy() for name in _PAIR])


def _bit(place: np.ndarray) -> np.ndarray:
    return (np.uint64(1) << (place & np.uint64(7))).astype(np.uint8)


def _lines(file: Folder) -> list[str]:
    folder, _, name = file.uri.rpartition("/")
    try:
        # With a byte order mark, as Windows programs write it, the first pair_id would be none of the corpus.
        text = Folder(folder, file.storage).read(name).decode("utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"corpus.delete: {file.uri}: no longer exists") from None
    except UnicodeDecodeError:
        raise DataError(f"corpus.delete: {file.uri}: not UTF-8; expected pair_ids, one a line") from None
    return [line.strip() for line in text.splitlines() if line.strip()]


def new_inputs(inputs: Inputs, read: set[tuple[str, int, str]]) -> Inputs:
    """Return the files that were not read, or have changed since; collections as a whole."""
    collections = [
        collection
        for collection in inputs.collections
        if any(not _is_read(file, read) for files in collection.files.values() for file in files)
    ]
    return replace(inputs, files=[file for file in inputs.files if not _is_read(file, read)], collections=collections)


def files_read(corpus: GrowingArtifact, manifest: Manifest) -> set[tuple[str, int, str]]:
    """Return (uri, size, version) of all files that a corpus was made of."""
    parts = [part for part in manifest.parts if part.details.get("role") == FILES]
    rows = [row for part in parts for row in read_parquet(corpus.folder, part).to_pylist()]
    return {(row["uri"], row["size"], row["version"]) for row in rows}


def write_files(artifact: Artifact, files: Iterable[InputFile]) -> Part:
    """Write the list that `files_read` reads."""
    rows = [{"uri": file.uri, "size": file.size, "version": file.version} for file in files]
    return write_parquet(artifact, "files", pa.Table.from_pylist(rows, schema=_FILES_SCHEMA), role=FILES)


def changed_rules(config: RunConfig, base: Manifest, tests: str) -> list[str]:
    """Return which rules for rows differ from those of the corpus, as text: keys of `corpus`, and the test collections.

    tests: fingerprint of the test collections that the corpus must not contain.
    """
    before, now = base.config, config.corpus.identity()
    keys = [key for key in type(config.corpus).model_fields if key not in _FREE and now.get(key) != before.get(key)]
    changed = [f"corpus.{key} is another than the corpus was made with ({before.get(key)})" for key in keys]
    if details_of(base, CorpusDetails).get("tests", tests) != tests:
        changed.append("the collections of evaluate.path, which the corpus must not contain, have changed")
    return changed


def changed_reading(config: RunConfig, base: Manifest) -> list[str]:
    """Return "key was VALUE, is VALUE" for keys of `corpus` that may differ between a corpus and what is appended."""
    before, now = base.config, config.corpus.identity()
    return [
        f"corpus.{key} was {json.dumps(before.get(key))}, is {json.dumps(now.get(key))}"
        for key in _FREE
        if key != "paths" and now.get(key) != before.get(key)
    ]


def check_same_rules(config: RunConfig, base: Manifest, tests: str) -> None:
    """Raise UsageError if the corpus was made with other rules for rows; arguments as for `changed_rules`."""
    if "tests" not in details_of(base, CorpusDetails):
        raise UsageError(
            "ingest --append: this corpus does not say what it was made of (an older version wrote it); ingest it from "
            "scratch"
        )
    changed = changed_rules(config, base, tests)
    if changed:
        raise UsageError(f"ingest --append: {changed[0]}; ingest it from scratch (--force)")


def _is_read(file: InputFile, read: set[tuple[str, int, str]]) -> bool:
    return (file.uri, file.size, file.version) in read
