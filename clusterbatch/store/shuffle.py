"""A shuffle through storage: rows of many units meet in buckets, and a crash costs units, not the pass.

Map side: each unit writes one file whose rows are sorted by bucket, one Arrow IPC stream per bucket, followed by a
table with the place of each bucket. Reduce side: a bucket looks itself up in every unit's table and reads its byte
range of every file. Memory is one unit, then one bucket: the tables, which grow as units times buckets, are on storage,
and a process keeps those that it has read last. Rows of a bucket come in unit order, inside a unit in their own
order, so the result does not depend on the schedule.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from clusterbatch.errors import DataError
from clusterbatch.store.artifact import Artifact, Part
from clusterbatch.store.checksum import DamagedError, read_verified
from clusterbatch.store.folder import Folder

_READERS = 8
# Entries of a part that are read together (2 KiB), and how many such readings are kept (16 MiB): workers take buckets
# in turn, so one that asks for a bucket soon asks for another a little behind it.
_ENTRIES, _KEPT = 64, 8192
# Readings that a range of buckets may need one by one.
_MOST_WINDOWS = 2
# Stored bytes of the buckets that are read together, at most and, if there are more, at least; and ranges of them, if
# they are large enough: all workers have something to do, and none much at the end.
BUNDLE_BYTES, _LEAST_BYTES, _BUNDLES = 2**27, 2**24, 64
# A bucket's entry in the table, little-endian unsigned 64-bit integers: first byte, byte after its last, rows, and
# XXH3-64 of the bytes followed by the three numbers before, so that a damaged entry is noticed as well.
_ENTRY = np.dtype([("start", "<u8"), ("end", "<u8"), ("rows", "<u8"), ("checksum", "<u8")])


def write_buckets(
    artifact: Artifact, unit: int, table: pa.Table, bucket_of_row: np.ndarray, buckets: int, **details: Any
) -> Part:
    """Write the rows of one unit, grouped by bucket.

    `bucket_of_row` is (rows,) integers in [0, buckets). The part's details carry `buckets` and, in `filled`, the range
    [first, last + 1) outside of which its buckets are empty.
    """
    bucket_of_row = np.asarray(bucket_of_row)
    assert len(bucket_of_row) == table.num_rows
    assert table.num_rows == 0 or (bucket_of_row.min() >= 0 and bucket_of_row.max() < buckets)
    order = pa.array(np.argsort(bucket_of_row, kind="stable"))
    table = table.combine_chunks()
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    entries = np.zeros(buckets, _ENTRY)
    entries["rows"] = np.bincount(bucket_of_row, minlength=buckets)
    first_row = 0
    for entry in entries:
        entry["start"] = sink.tell()
        rows, message = int(entry["rows"]), b""
        if rows:
            # Bucket by bucket: a sorted copy of the whole table would double what the unit takes.
            message = _one_stream(table.take(order.slice(first_row, rows)), options)
            sink.write(message)
            first_row += rows
        entry["end"] = sink.tell()
        entry["checksum"] = _checksum(message, entry)
    sink.write(entries.tobytes())
    data = memoryview(sink.getvalue())
    full = np.flatnonzero(entries["rows"])
    filled = [int(full[0]), int(full[-1]) + 1] if len(full) else [0, 0]
    return artifact.write_part(
        f"unit-{unit:08d}", "arrows", data, table.num_rows, buckets=buckets, filled=filled, **details
    )


def read_bucket(artifact: Artifact, parts: Sequence[Part], bucket: int) -> pa.Table | None:
    """The rows of one bucket over all parts, in the order of `parts`; None if it has none.

    Raises DataError that names the part when bytes are missing or damaged.
    """
    return read_buckets(artifact, parts, range(bucket, bucket + 1))[0]


def read_buckets(artifact: Artifact, parts: Sequence[Part], buckets: range) -> list[pa.Table | None]:
    """Return what `read_bucket` returns for each of `buckets`, which follow one another, by one range of each part.

    Raises DataError that names the part when bytes are missing or damaged.
    """
    with ThreadPoolExecutor(_READERS) as pool:
        of_parts = list(pool.map(lambda part: _read_pieces(artifact, part, buckets), _may_have(parts, buckets)))
    found: list[pa.Table | None] = []
    for pieces in zip(*of_parts, strict=True) if of_parts else [()] * len(buckets):
        tables = [table for table in pieces if table is not None]
        found.append(pa.concat_tables(tables, promote_options="permissive") if tables else None)
    return found


def bundle_buckets(sizes: np.ndarray, most: float = BUNDLE_BYTES) -> list[range]:
    """Return ranges of neighbouring buckets that are read together: all buckets, in order.

    Buckets of sources or clusters may be many and small, and every part has a piece of each: read one by one, requests
    would grow with the product of buckets and parts. sizes: (buckets,) stored bytes of each, about. A bucket of more
    than `most` bytes is a range by itself.
    """
    limit = min(most, max(_LEAST_BYTES, sizes.sum() / _BUNDLES))
    bundles: list[range] = []
    first, held = 0, 0.0
    for bucket, size in enumerate(sizes.tolist()):
        if bucket > first and held + size > limit:
            bundles.append(range(first, bucket))
            first, held = bucket, 0.0
        held += size
    return [*bundles, range(first, len(sizes))] if len(sizes) else []


def iterate_buckets(artifact: Artifact, parts: Sequence[Part], rows: np.ndarray) -> Iterator[pa.Table | None]:
    """Yield what `read_bucket` returns for every bucket, in order; small neighbours are read together.

    rows: (buckets,) of each, about.
    """
    stored = sum(part.bytes for part in parts)
    for bundle in bundle_buckets(stored * rows / max(1.0, rows.sum())):
        yield from read_buckets(artifact, parts, bundle)


def iterate_bucket(artifact: Artifact, parts: Sequence[Part], bucket: int) -> Iterator[pa.Table]:
    """The same rows piece by piece, for buckets that should not be in memory at once."""
    buckets = range(bucket, bucket + 1)
    for part in _may_have(parts, buckets):
        for table in _read_pieces(artifact, part, buckets):
            if table is not None:
                yield table


def bucket_rows(artifact: Artifact, parts: Sequence[Part]) -> np.ndarray:
    """(buckets,) int64: rows of each bucket over all parts, which have the same number of buckets.

    Raises DataError that names a part whose table is missing or damaged.
    """
    rows = np.zeros(parts[0].details["buckets"] if parts else 0, np.int64)
    with ThreadPoolExecutor(_READERS) as pool:
        # A few at a time, so that what was read does not pile up.
        for start in range(0, len(parts), _READERS):
            for entries in pool.map(lambda part: _read_table(artifact, part), parts[start : start + _READERS]):
                rows += entries["rows"].astype(np.int64)
    return rows


def _one_stream(table: pa.Table, options: pa.ipc.IpcWriteOptions) -> pa.Buffer:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=options) as writer:
        writer.write_table(table)
    return sink.getvalue()


def _checksum(data: bytes | memoryview, entry: np.void) -> int:
    digest = xxhash.xxh3_64(data)
    digest.update(entry.tobytes()[: -_ENTRY["checksum"].itemsize])
    return digest.intdigest()


def _may_have(parts: Sequence[Part], buckets: range) -> list[Part]:
    """Return the parts with a row in one of `buckets`, as far as they say."""
    filled = [(part, *part.details["filled"]) for part in parts]
    return [part for part, first, end in filled if first < buckets.stop and buckets.start < end]


def _read_pieces(artifact: Artifact, part: Part, buckets: range) -> list[pa.Table | None]:
    """The rows of each of `buckets` in one part; None for those without."""
    table_start = part.bytes - part.details["buckets"] * _ENTRY.itemsize
    entries = np.zeros(len(buckets), _ENTRY)
    pieces: list[memoryview] = []
    damaged = buckets.start

    def read() -> bytes:
        nonlocal entries
        entries = _entries_of(artifact.folder, part, table_start, buckets)
        start, end = int(entries["start"][0]), int(entries["end"][-1])
        return artifact.folder.read(part.path, start, end) if start < end <= table_start else b""

    def is_whole(data: bytes) -> bool:
        nonlocal pieces, damaged
        start = int(entries["start"][0])
        places = zip(entries["start"].tolist(), entries["end"].tolist(), strict=True)
        pieces = [memoryview(data)[max(0, first - start) : max(0, end - start)] for first, end in places]
        for bucket, piece, entry in zip(buckets, pieces, entries, strict=True):
            if _checksum(piece, entry) != entry["checksum"]:
                damaged = bucket
                break
        else:
            return True
        # It may be an entry that was damaged in transit.
        _some_entries.cache_clear()
        return False

    try:
        read_verified(read, is_whole)
    except FileNotFoundError:
        raise DataError(f"{artifact.folder.uri}/{part.path}: missing, but named in a receipt") from None
    except (DamagedError, ValueError, IndexError):
        raise DataError(f"{artifact.folder.uri}/{part.path}: damaged in bucket {damaged} (checksum differs)") from None
    return [
        pa.ipc.open_stream(piece).read_all() if rows else None
        for piece, rows in zip(pieces, entries["rows"].tolist(), strict=True)
    ]


def _entries_of(folder: Folder, part: Part, table_start: int, buckets: range) -> np.ndarray:
    """(len(buckets),) the entries of `buckets`, not checked. Raises IndexError if the part has fewer bytes."""
    windows = range(buckets.start // _ENTRIES, (buckets.stop - 1) // _ENTRIES + 1)
    size = _ENTRIES * _ENTRY.itemsize
    starts = [table_start + window * size for window in windows]
    if len(windows) > _MOST_WINDOWS:
        # Too many to keep: the rest of the table at once.
        end = min(part.bytes, starts[-1] + size)
        found = np.frombuffer(folder.read(part.path, starts[0], end), _ENTRY)
    else:
        read = [_some_entries(folder, part.path, start, min(part.bytes, start + size)) for start in starts]
        found = np.concatenate(read)
    first = buckets.start - windows.start * _ENTRIES
    found = found[first : first + len(buckets)]
    if len(found) < len(buckets):
        raise IndexError("the part's table is cut off")
    return found


# Parts never change: their names are used once.
@lru_cache(maxsize=_KEPT)
def _some_entries(folder: Folder, path: str, start: int, end: int) -> np.ndarray:
    """The entries in bytes [start, end) of a part, not checked."""
    return np.frombuffer(folder.read(path, start, end), _ENTRY)


def _read_table(artifact: Artifact, part: Part) -> np.ndarray:
    """(buckets,) entries of one part; their sum is checked here, each entry when its bucket is read."""
    start = part.bytes - part.details["buckets"] * _ENTRY.itemsize

    def is_whole(data: bytes) -> bool:
        return len(data) == part.bytes - start and np.frombuffer(data, _ENTRY)["rows"].sum() == part.rows

    try:
        return np.frombuffer(
            read_verified(lambda: artifact.folder.read(part.path, start, part.bytes), is_whole), _ENTRY
        )
    except FileNotFoundError:
        raise DataError(f"{artifact.folder.uri}/{part.path}: missing, but named in a receipt") from None
    except DamagedError:
        raise DataError(f"{artifact.folder.uri}/{part.path}: damaged, its table does not sum up") from None
