"""Input files, and slices of them of about equal size."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from clusterbatch.corpus.readers.formats import format_of_name

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

    @property
    def size(self) -> int:
        return self.end - self.start


def plan_units(files: Iterable[InputFile], unit_bytes: int, first_slice: int = 0) -> list[list[Slice]]:
    """Slices of at most `unit_bytes` where a format can be cut, small files together; the same files, the same plan."""
    units: list[list[Slice]] = []
    current: list[Slice] = []
    bytes_in_unit, number = 0, first_slice
    for file in files:
        for start, end in cut(file, unit_bytes, format_of_name(file.name).can_be_cut):
            if current and (bytes_in_unit + end - start > unit_bytes or len(current) >= _FILES_PER_UNIT):
                units.append(current)
                current, bytes_in_unit = [], 0
            current.append(Slice(number, file, start, end))
            bytes_in_unit += end - start
            number += 1
    return [*units, current] if current else units


def cut(file: InputFile, unit_bytes: int, can_be_cut: bool) -> Iterator[tuple[int, int]]:
    """Byte ranges [start, end) that cover a file; one where it cannot be cut."""
    step = unit_bytes if can_be_cut else max(1, file.size)
    for start in range(0, max(1, file.size), step):
        yield start, min(start + step, file.size)
