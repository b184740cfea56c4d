"""Artifacts: directories that are whole when they have a manifest.

A stage cuts its work into fixed units. Each finished unit leaves its parts (files under unique names) and, last, a
receipt that names them. When every unit has a receipt, the manifest is written: only then does the artifact exist for
readers. After a crash the receipts say which units need not be done again.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any

from pydantic import AliasChoices, BaseModel, Field, ValidationError

from clusterbatch.errors import DataError, OtherWorkError, UsageError
from clusterbatch.store.checksum import DamagedError, checksum, read_verified
from clusterbatch.store.entry import Entry, is_own_name, own_name
from clusterbatch.store.folder import Folder
from clusterbatch.store.provenance import software_versions
from clusterbatch.store.traffic import Traffic, since_last

MANIFEST = "manifest.json"
RECEIPTS = "_receipts"
# Artifacts of passes that a stage no longer needs when it is whole.
EXCHANGE = "_exchange"
FORMAT = 1
_RECEIPT = re.compile(rf"(?:(?P<inside>.*)/)?{RECEIPTS}/\d{{8,}}\.json", re.DOTALL)
# Files that no manifest names and that have names of their own: metrics of steps, and the records of Ray Train.
_OWN = re.compile(
    r"(?:.*/)?(?:metrics/steps-\d{10}\.jsonl|_ray/[0-9a-f]{16}/(?:\.validate_storage_marker|checkpoint_manager_snapshot\.json))",
    re.DOTALL,
)
# A checkpoint that somebody has copied to keep it.
_COPIED = re.compile(r"(?:.*/)?checkpoints/(?!step=\d{8}/)", re.DOTALL)


class Counts(BaseModel):
    """Rows of a unit or a stage. Conserved: read = written + rejected + all that was set aside, by reason."""

    read: int = 0
    written: int = 0
    rejected: int = 0
    set_aside: dict[str, int] = {}

    def __add__(self, other: Counts) -> Counts:
        reasons = {**self.set_aside}
        for reason, rows in other.set_aside.items():
            reasons[reason] = reasons.get(reason, 0) + rows
        return Counts(
            read=self.read + other.read,
            written=self.written + other.written,
            rejected=self.rejected + other.rejected,
            set_aside=reasons,
        )

    def check(self, what: str) -> None:
        """Raise DataError if a row is unaccounted for."""
        accounted = self.written + self.rejected + sum(self.set_aside.values())
        if self.read != accounted:
            raise DataError(
                f"{what}: {self.read} rows read but {accounted} accounted for (written {self.written}, "
                f"rejected {self.rejected}, set aside {self.set_aside or 0})"
            )


class Part(BaseModel):
    """One file of an artifact; `path` is relative to the artifact's folder, `details` is the stage's own."""

    path: str
    rows: int
    bytes: int
    checksum: str
    details: dict[str, Any] = {}


class Receipt(BaseModel):
    """Record of one finished unit of work. traffic: the unit's requests to storage, set when the receipt is written."""

    unit: int
    fingerprint: str
    parts: list[Part] = []
    counts: Counts = Counts()
    seconds: float = 0.0
    traffic: Traffic = Traffic()
    details: dict[str, Any] = {}


class Manifest(BaseModel):
    """Description of an artifact, written last: with it the artifact is whole."""

    format: int = FORMAT
    kind: str
    fingerprint: str
    created: str
    # Wall time of the session that wrote it; and of all units in whichever session, by all workers (None: not known).
    seconds: float
    worker_seconds: float | None = None
    counts: Counts
    parts: list[Part]
    config: dict[str, Any] = {}
    inputs: dict[str, str] = {}
    software: dict[str, str] = {}
    # Requests and bytes of all units, and of the driver since the artifact before.
    traffic: Traffic = Traffic()
    details: dict[str, Any] = {}
    # Fingerprints of the versions that this one extends (store.growing), oldest first.
    earlier: list[str] = []

    @property
    def version(self) -> int:
        return len(self.earlier) + 1

    @property
    def lineage(self) -> list[str]:
        """Fingerprints of this version and those before it, oldest first."""
        return [*self.earlier, self.fingerprint]


class _Listing(BaseModel):
    """Fingerprint and parts, as in manifests of artifacts and of checkpoints."""

    fingerprint: str = Field(validation_alias=AliasChoices("fingerprint", "run_fingerprint"))
    parts: list[Part]


class Artifact:
    """A directory under construction or finished; `kind` is what it holds ('corpus', 'embeddings', ...).

    reused: the configuration key that names the other workspace to which it belongs: it is read, and never written.
    Other people's files in the directory stay when the artifact is replaced or removed.
    """

    def __init__(self, folder: Folder, kind: str, reused: str | None = None) -> None:
        self.folder = folder
        self.kind = kind
        self.reused = reused

    def manifest(self) -> Manifest | None:
        """Return the manifest, None if the artifact is not whole. Raises DataError if it is damaged."""
        try:
            data = self.folder.read(MANIFEST)
        except FileNotFoundError:
            return None
        try:
            manifest = Manifest.model_validate_json(data)
        except ValidationError:
            raise DataError(f"{self.folder.uri}/{MANIFEST}: damaged, not a manifest") from None
        if manifest.format > FORMAT:
            raise DataError(f"{self.folder.uri}: written by a newer version (format {manifest.format})")
        return manifest

    def require(self) -> Manifest:
        """Return the manifest of a finished artifact; raises DataError if the stage that makes it has not finished."""
        manifest = self.manifest()
        if manifest is None:
            raise DataError(f"{self.folder.uri}: no finished {self.kind} here (no {MANIFEST}); run that stage first")
        return manifest

    def check_parts(self, manifest: Manifest) -> None:
        """Raise DataError if a file that the manifest names is missing or has lost bytes, before anything reads it.

        One look at the folder's listing; contents are verified when they are read.
        """
        sizes = {entry.name: entry.size for entry in self.folder.find(linked_folders=True)} if manifest.parts else {}
        damaged = [part for part in manifest.parts if sizes.get(part.path) != part.bytes]
        if not damaged:
            return
        first, others = damaged[0], len(damaged) - 1
        found = sizes.get(first.path)
        what = "missing, but named" if found is None else f"{found:,} bytes, not the {first.bytes:,}"
        more = f", and {others:,} more of {len(manifest.parts):,} files" if others else ""
        raise DataError(
            f"{self.folder.uri}/{first.path}: {what} in the manifest{more}; put it back, or make the {self.kind} again "
            "with --force"
        )

    def is_done(self, fingerprint: str) -> bool:
        manifest = self.manifest()
        return manifest is not None and manifest.fingerprint == fingerprint

    def begin(self, fingerprint: str, force: bool = False) -> dict[int, Receipt]:
        """Prepare for writing; return the receipts of finished units, by unit number.

        Raises UsageError if the folder holds the work of another configuration, unless `force`: then that work is
        removed; and in any case if it belongs to another workspace.
        """
        if self.reused:
            raise UsageError(
                f"{self.reused}: {self.folder.uri} is read, not written, and was not finished with this configuration "
                f"and these inputs; make it in its own workspace, or run without {self.reused}"
            )
        manifest = self.manifest()
        receipts = self._receipts()
        foreign = manifest is not None and manifest.fingerprint != fingerprint
        foreign = foreign or any(receipt.fingerprint != fingerprint for receipt in receipts)
        if foreign and not force:
            raise OtherWorkError(
                f"{self.folder.uri}: holds {self.kind} made with another configuration or other inputs; "
                "choose another workspace, or pass --force to replace them"
            )
        if foreign or (manifest is not None and force):
            self.remove()
            return {}
        return {receipt.unit: receipt for receipt in receipts}

    def write_part(self, stem: str, extension: str, data: bytes | memoryview, rows: int, **details: Any) -> Part:
        """Write one file under a name that no other attempt uses, and describe it."""
        name = own_name(stem, extension)
        self.folder.write(name, data)
        return Part(path=name, rows=rows, bytes=len(data), checksum=checksum(data), details=details)

    def read_part(self, part: Part) -> bytes:
        """Return all bytes of a part; raises DataError if they are not those that were written."""
        try:
            return read_verified(
                lambda: self.folder.read(part.path),
                lambda data: len(data) == part.bytes and checksum(data) == part.checksum,
            )
        except FileNotFoundError:
            raise DataError(f"{self.folder.uri}/{part.path}: missing, but named in the manifest") from None
        except DamagedError:
            raise DataError(f"{self.folder.uri}/{part.path}: damaged (checksum differs from the manifest's)") from None

    def write_receipt(self, receipt: Receipt) -> None:
        """Write the receipt, the last act of its unit. Raises DataError if a row is unaccounted for."""
        receipt.counts.check(f"{self.folder.uri} unit {receipt.unit}")
        receipt.traffic = since_last()
        self.folder.write(f"{RECEIPTS}/{receipt.unit:08d}.json", receipt.model_dump_json().encode())

    def commit(
        self,
        fingerprint: str,
        receipts: Iterable[Receipt],
        *,
        config: dict[str, Any],
        inputs: dict[str, str],
        seconds: float,
        passes_seconds: float = 0.0,
        details: Mapping[str, Any] | None = None,
        extra_parts: Iterable[Part] = (),
    ) -> Manifest:
        """Check that no row is lost, write the manifest, then remove the receipts.

        `seconds` is the wall time of this session's work; what earlier, interrupted sessions spent is in the receipts.
        `passes_seconds` is that of the workers of earlier passes, which are not kept.
        """
        ordered = sorted(receipts, key=lambda receipt: receipt.unit)
        counts = sum((receipt.counts for receipt in ordered), Counts())
        counts.check(self.folder.uri)
        made = Manifest(
            kind=self.kind,
            fingerprint=fingerprint,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            seconds=round(seconds, 3),
            worker_seconds=round(passes_seconds + sum(receipt.seconds for receipt in ordered), 3),
            counts=counts,
            parts=[*(part for receipt in ordered for part in receipt.parts), *extra_parts],
            config=config,
            inputs=inputs,
            software=software_versions(),
            traffic=sum((receipt.traffic for receipt in ordered), since_last()),
            details=dict(details or {}),
        )
        manifest = self._completed(made)
        self.folder.write(MANIFEST, manifest.model_dump_json(indent=1).encode())
        self.remove_receipts()
        return manifest

    def own_files(self, below: str = "") -> list[Entry]:
        """Return the files in the artifact's folder that this product has written, sorted by name.

        These are named by a manifest or a receipt, or have a name that only this product gives; in whichever subfolder
        they are, files of others may be beside them. An artifact inside this one, or a version of it, counts as a part
        of it. below: only those in this subfolder.
        """
        entries = {entry.name: entry for entry in self.folder.find()}
        own = {name for name in entries if is_own_name(name) or _OWN.fullmatch(name)}
        for name in entries:
            inside, _, base = name.rpartition("/")
            if base == MANIFEST and (parts := self.parts_listed(inside)) is not None:
                # A version names its parts from the folder of the whole, other artifacts from their own.
                own |= {name, *(part.path for part in parts), *(f"{inside}/{part.path}" for part in parts)}
        names = [name for name in entries if _RECEIPT.fullmatch(name)]
        with ThreadPoolExecutor(16) as pool:
            for name, receipt in zip(names, pool.map(self._receipt, names), strict=True):
                if receipt is not None:
                    outer = name[: -len(f"{RECEIPTS}/{name.rpartition('/')[2]}")]
                    own |= {name, *(f"{outer}{part.path}" for part in receipt.parts)}
        own = {name for name in own if name.startswith(f"{below}/" if below else "") and not _COPIED.match(name)}
        return [entry for name, entry in sorted(entries.items()) if name in own]

    def remove(self, below: str = "") -> None:
        """Remove the artifact, finished or begun, or what it has in the subfolder `below`. Files of others stay."""
        own = [entry.name for entry in self.own_files(below)]
        # Manifests go first, then receipts: what is half removed must not look whole, or done in part.
        for name in self._manifest_names():
            if name in own:
                self.folder.remove(name)
        place = self.folder.child(below) if below else self.folder
        place.remove_files(name[len(f"{below}/") if below else 0 :] for name in sorted(own, key=_order_of_removal))

    def remove_receipts(self) -> None:
        """Remove the receipts of units, which a manifest replaces."""
        names = self.folder.list(RECEIPTS)
        self.folder.child(RECEIPTS).remove_files(name for name in names if _RECEIPT.fullmatch(f"{RECEIPTS}/{name}"))

    def parts_listed(self, inside: str = "") -> list[Part] | None:
        """Return the parts that the manifest of a folder inside this one lists; None if it is something else."""
        try:
            data = self.folder.read(f"{inside}/{MANIFEST}" if inside else MANIFEST)
            return _Listing.model_validate_json(data).parts
        except (FileNotFoundError, ValidationError):
            return None

    def _manifest_names(self) -> list[str]:
        """Return the manifests in the order in which they must be removed."""
        return [MANIFEST]

    def _receipt(self, name: str) -> Receipt | None:
        """Return the receipt in a file; None if it is something else."""
        try:
            return Receipt.model_validate_json(self.folder.read(name))
        except (FileNotFoundError, ValidationError):
            return None

    def _completed(self, manifest: Manifest) -> Manifest:
        """Return the manifest to write, given one that describes this session's work."""
        return manifest

    def _receipts(self) -> list[Receipt]:
        names = [f"{RECEIPTS}/{name}" for name in self.folder.list(RECEIPTS)]
        names = [name for name in names if _RECEIPT.fullmatch(name)]
        if not names:
            return []
        with ThreadPoolExecutor(16) as pool:
            found = dict(zip(names, pool.map(self._receipt, names), strict=True))
        for name, receipt in found.items():
            if receipt is None and self.folder.exists(name):
                raise DataError(f"{self.folder.uri}/{name}: damaged, not a receipt; move it away")
        return [receipt for receipt in found.values() if receipt is not None]


def _order_of_removal(name: str) -> tuple[int, str]:
    return (0 if name.endswith(MANIFEST) else 1 if _RECEIPT.fullmatch(name) else 2), name


class Stopwatch:
    """Measure seconds since construction."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start
