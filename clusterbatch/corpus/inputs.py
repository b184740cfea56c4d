"""Input files, what their paths say about their rows, and slices of them of about equal size."""

from __future__ import annotations

import posixpath
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from urllib.parse import unquote

from clusterbatch.config import StorageConfig
from clusterbatch.corpus.readers.formats import format_of_name
from clusterbatch.store.folder import Folder

_FILES_PER_UNIT = 256
# Names that writers give to the files of one data set: Hugging Face (train-00000-of-00002, with a hash behind it or
# without), Spark (part-00000-UUID-c000, tid and other letters before the number), BigQuery (000000000000), Ray
# (UUID_000000_000000), pyarrow and DuckDB (part-0, data_0), Snowflake (data_0_0_0).
_UUID = r"[0-9a-f]{8}-?[0-9a-f]{4}-?[0-9a-f]{4}-?[0-9a-f]{4}-?[0-9a-f]{12}"
_SHARD_OF = re.compile(r"[-_.]?\d{4,}[-_]of[-_]\d{4,}([-_][0-9a-f]{8,})?$", re.IGNORECASE)
_WRITER_ID = re.compile(rf"[-_.]?{_UUID}([-_.].*)?$", re.IGNORECASE)
# Parts of names that writers give: these words, numbers (also with a letter: c000), long hexadecimal numbers.
_WRITER_WORDS = {"part", "data", "shard", "chunk", "block", "tmp", "of", "r", "m", "tid"}
_WRITER_NUMBER = re.compile(r"c?\d+|[0-9a-f]{16,}", re.IGNORECASE)
_NUMBER = re.compile(r"[-_.]?(part[-_])?(\d{4,})$", re.IGNORECASE)
_YEAR_OR_DATE = re.compile(r"(19|20)\d\d((0[1-9]|1[0-2])([0-2]\d|3[01])?)?$")
# Folders whose names say which part of a data set they hold, not which data set.
_SPLITS = {"default", "data", "train", "test", "validation", "valid", "dev", "parquet", "json", "jsonl", "csv", "tsv"}
# The name of a null in Hive and tools that follow it.
_HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"


@dataclass(frozen=True)
class InputFile:
    """One file of the corpus. `version` changes when its content does (S3: ETag; local: time of the last change).

    named: the source of rows that name none, if it depends on the files beside this one.
    """

    uri: str
    size: int
    version: str
    named: str | None = None

    @property
    def name(self) -> str:
        return posixpath.basename(self.uri)

    @property
    def source(self) -> str:
        """The source of rows that name none: the file's name without what writers number their files by.

        If nothing is left of the name, it is the folder's, or its keys and values in a hive layout (`lang=en`).
        """
        return self.named or source_of(self.uri)

    @cached_property
    def keys(self) -> dict[str, str | None]:
        """Columns that folders in hive layout (`key=value`) give to all rows of the file."""
        pairs = [segment.split("=", 1) for segment in self.uri.split("/")[:-1] if _is_key(segment)]
        return {key: None if value == _HIVE_NULL else unquote(value) for key, value in pairs}

    def place(self, storage: StorageConfig) -> tuple[Folder, str]:
        """Return the folder to open the file from, and its name there; object keys are kept as they are."""
        if self.uri.startswith("s3://"):
            bucket, _, key = self.uri.removeprefix("s3://").partition("/")
            return Folder(f"s3://{bucket}", storage), key
        return Folder(posixpath.dirname(self.uri), storage), self.name


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


def source_of(uri: str, *, years_are_numbers: bool = False) -> str:
    """Return the source that a file's path names.

    years_are_numbers: a number at the end of the name is a shard's even if it could be a year or a date.
    """
    name = posixpath.basename(uri)
    stem = name.split(".", 1)[0] or name
    # Dots are separators in `part.0.parquet` and `shard.00001.jsonl`, but not in `faq.v2.jsonl`.
    whole = name[: -len(_extension(name))] if _extension(name) else name
    if _is_writers_name(whole):
        return _folder_name(uri) or stem
    short = _SHARD_OF.sub("", stem)
    if short == stem:
        short = _WRITER_ID.sub("", stem)
        number = _NUMBER.search(short)
        if number and (years_are_numbers or not _is_date(number[2])):
            short = short[: number.start()]
    return short or _folder_name(uri) or stem


def with_sources(files: Sequence[InputFile]) -> list[InputFile]:
    """Return the files with the sources that they name together.

    Numbers at the end of names that look like years (`wiki_2023`) stay, unless files with the same name beside them
    have numbers that do not (`wiki_0000` to `wiki_2500`).
    """
    numbered: defaultdict[tuple[str, str], set[str]] = defaultdict(set)
    for file in files:
        number = _NUMBER.search(file.name.split(".", 1)[0])
        if number:
            numbered[posixpath.dirname(file.uri), file.name[: number.start()]].add(number[2])
    shards = {place for place, numbers in numbered.items() if not all(map(_is_date, numbers))}
    found = []
    for file in files:
        number = _NUMBER.search(file.name.split(".", 1)[0])
        place = (posixpath.dirname(file.uri), file.name[: number.start()] if number else "")
        source = source_of(file.uri, years_are_numbers=place in shards)
        found.append(replace(file, named=source))
    return found


def plan_units(files: Iterable[InputFile], unit_bytes: int, first_slice: int = 0) -> list[list[Slice]]:
    """Return slices of at most `unit_bytes` if a format can be cut, small files together; same files, same plan."""
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
    """Yield byte ranges [start, end) that cover a file; one if it cannot be cut."""
    step = unit_bytes if can_be_cut else max(1, file.size)
    for start in range(0, max(1, file.size), step):
        yield start, min(start + step, file.size)


def _folder_name(uri: str) -> str:
    """Return a name from the folders of a file: their hive keys, otherwise the nearest that does not name a split."""
    path = uri.removeprefix("s3://") if uri.startswith("s3://") else uri
    folders = [segment for segment in path.split("/")[:-1] if segment]
    keys = [segment for segment in folders if _is_key(segment)]
    if keys:
        return "/".join(unquote(key) for key in keys)
    named = [segment for segment in folders if segment.lower() not in _SPLITS]
    return (named or folders or [""])[-1]


def _extension(name: str) -> str:
    """Return what of a name says its format and compression (`.jsonl.gz`, `.snappy.parquet`), with the dot."""
    found = re.search(
        r"((\.(snappy|gz|gzip|zstd|zst|lz4|brotli|c000))*\.[a-z]{2,8})?(\.(gz|gzip|zst|zstd))?$", name.lower()
    )
    return found[0] if found else ""


def _is_writers_name(name: str) -> bool:
    """Return whether a name consists of what writers call and number the files of a data set by."""
    if _is_date(name):
        return False
    words = [word for word in re.split(r"[-_.]", re.sub(_UUID, "0", name, flags=re.IGNORECASE)) if word]
    numbers = [word for word in words if _WRITER_NUMBER.fullmatch(word)]
    return bool(numbers) and all(word in numbers or word.lower() in _WRITER_WORDS for word in words)


def _is_key(segment: str) -> bool:
    key, mark, _ = segment.partition("=")
    return bool(key and mark)


def _is_date(number: str) -> bool:
    return bool(_YEAR_OR_DATE.fullmatch(number))
