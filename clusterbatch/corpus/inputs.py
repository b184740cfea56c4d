"""From `corpus.paths` to the files that are read, and to slices of about equal size."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from clusterbatch.config import StorageConfig
from clusterbatch.corpus.formats import format_of_name
from clusterbatch.errors import UsageError
from clusterbatch.store.filesystem import Folder, normalise_uri

_GLOB = re.compile(r"[*?\[]")
# Hugging Face and Spark number the shards of one data set; the data set is the source, not the shard.
_SHARD_NUMBER = re.compile(r"[-_.]?(part[-_])?\d{4,}([-_]of[-_]\d{4,})?$")
_FILES_PER_UNIT = 256


@dataclass(frozen=True)
class InputFile:
    """One file of the corpus. `version` changes when its content does (S3: ETag; local: time of the last change)."""

    uri: str
    size: int
    version: str

    @property
    def name(self) -> str:
        return posixpath.basename(self.uri)

    @property
    def source(self) -> str:
        """What the rows are called where nothing else names their source."""
        stem = self.name.split(".", 1)[0] or self.name
        return _SHARD_NUMBER.sub("", stem) or stem


@dataclass(frozen=True)
class Slice:
    """Bytes [start, end) of a file; a reader takes the rows (JSON Lines) or row groups (Parquet) that begin there."""

    number: int
    file: InputFile
    start: int
    end: int


def find_inputs(paths: Sequence[str], storage: StorageConfig) -> list[InputFile]:
    """The files of all paths: a file, a folder (files with a known extension, hidden ones left out) or a glob.

    Each file once, in the order of `paths`, then by name. Raises UsageError where a path leads to nothing.
    """
    found: dict[str, InputFile] = {}
    for path in paths:
        files = list(_files_of(path, storage))
        if not files:
            raise UsageError(f"corpus.paths: {path}: no such file, or no file there that could be read as pairs")
        for file in files:
            found.setdefault(file.uri, file)
    return list(found.values())


def plan_units(files: Iterable[InputFile], unit_bytes: int) -> list[list[Slice]]:
    """Slices of at most `unit_bytes` where a format can be cut, small files together; the same files, the same plan."""
    units: list[list[Slice]] = []
    current: list[Slice] = []
    bytes_in_unit = number = 0
    for file in files:
        step = unit_bytes if format_of_name(file.name).can_be_cut else max(1, file.size)
        for start in range(0, max(1, file.size), step):
            end = min(start + step, file.size)
            if current and (bytes_in_unit + end - start > unit_bytes or len(current) >= _FILES_PER_UNIT):
                units.append(current)
                current, bytes_in_unit = [], 0
            current.append(Slice(number, file, start, end))
            bytes_in_unit += end - start
            number += 1
    return [*units, current] if current else units


def _files_of(path: str, storage: StorageConfig) -> Iterable[InputFile]:
    uri = normalise_uri(path)
    if _GLOB.search(uri):
        fixed, pattern = _split_glob(uri)
        folder = Folder(fixed, storage)
        entries = folder.find(pattern)
    else:
        parent, _, name = uri.rpartition("/")
        # A bucket has no parent to look into.
        is_bucket = parent in ("s3:/", "s3:")
        folder = Folder(uri if is_bucket else parent or "/", storage)
        entries = [] if is_bucket else [entry for entry in folder.find(name) if entry.name == name]
        if not entries:
            folder = Folder(uri, storage)
            entries = [entry for entry in folder.find() if _is_wanted(entry.name)]
    base = folder.uri.rstrip("/")
    return (InputFile(f"{base}/{entry.name}", entry.size, entry.version) for entry in entries)


def _split_glob(uri: str) -> tuple[str, str]:
    parts = uri.split("/")
    first = next(index for index, part in enumerate(parts) if _GLOB.search(part))
    return "/".join(parts[:first]) or "/", "/".join(parts[first:])


def _is_wanted(name: str) -> bool:
    hidden = any(part.startswith((".", "_")) for part in name.split("/"))
    return not hidden and format_of_name(name).is_known
