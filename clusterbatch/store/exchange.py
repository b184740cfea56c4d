"""A shuffle through storage: rows of many units meet in buckets, and a crash costs units, not the pass.

Map side: each unit writes one file whose rows are sorted by bucket, one Arrow IPC message per bucket, and keeps the
byte offsets in its receipt. Reduce side: a bucket reads its byte range of every unit's file. Memory is one unit, then
one bucket; nothing goes through an object store that could fill up. Rows of a bucket come in unit order, inside a unit
in their own order, so the result does not depend on the schedule.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa

from clusterbatch.errors import DataError
from clusterbatch.store.artifact import Artifact, Part
from clusterbatch.store.checksum import DamagedError, checksum64, read_verified

_READERS = 8


def write_buckets(
    artifact: Artifact, unit: int, table: pa.Table, bucket_of_row: np.ndarray, buckets: int, **details: Any
) -> Part:
    """Writes the rows of one unit, grouped by bucket.

    `bucket_of_row` is (rows,) integers in [0, buckets). The part's details carry `offsets` (buckets + 1 byte positions)
    and `checksums` (one per bucket, 0 where the bucket is empty).
    """
    bucket_of_row = np.asarray(bucket_of_row)
    assert len(bucket_of_row) == table.num_rows
    assert table.num_rows == 0 or (bucket_of_row.min() >= 0 and bucket_of_row.max() < buckets)
    order = np.argsort(bucket_of_row, kind="stable")
    counts = np.bincount(bucket_of_row, minlength=buckets)
    sorted_table = table.take(pa.array(order)).combine_chunks() if table.num_rows else table
    sink = pa.BufferOutputStream()
    offsets, checksums, start = [0], [], 0
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    for rows in counts.tolist():
        if rows:
            message = _one_message(sorted_table.slice(start, rows), options)
            sink.write(message)
            checksums.append(checksum64(memoryview(message)))
            start += rows
        else:
            checksums.append(0)
        offsets.append(sink.tell())
    data = memoryview(sink.getvalue())
    return artifact.write_part(
        f"unit-{unit:08d}", "arrows", data, table.num_rows, offsets=offsets, checksums=checksums, **details
    )


def read_bucket(artifact: Artifact, parts: Sequence[Part], bucket: int) -> pa.Table | None:
    """The rows of one bucket over all parts, in the order of `parts`; None where it has none.

    Raises DataError that names the part when bytes are missing or damaged.
    """
    wanted = [part for part in parts if part.details["offsets"][bucket + 1] > part.details["offsets"][bucket]]
    with ThreadPoolExecutor(_READERS) as pool:
        tables = list(pool.map(lambda part: _read_piece(artifact, part, bucket), wanted))
    return pa.concat_tables(tables, promote_options="permissive") if tables else None


def iterate_bucket(artifact: Artifact, parts: Sequence[Part], bucket: int) -> Iterator[pa.Table]:
    """The same rows piece by piece, for buckets that should not be in memory at once."""
    for part in parts:
        if part.details["offsets"][bucket + 1] > part.details["offsets"][bucket]:
            yield _read_piece(artifact, part, bucket)


def _one_message(table: pa.Table, options: pa.ipc.IpcWriteOptions) -> pa.Buffer:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=options) as writer:
        writer.write_table(table)
    return sink.getvalue()


def _read_piece(artifact: Artifact, part: Part, bucket: int) -> pa.Table:
    start, end = part.details["offsets"][bucket : bucket + 2]
    place = f"{artifact.folder.uri}/{part.path}"
    expected = part.details["checksums"][bucket]
    try:
        data = read_verified(
            lambda: artifact.folder.read(part.path, start, end),
            lambda data: len(data) == end - start and checksum64(data) == expected,
        )
    except FileNotFoundError:
        raise DataError(f"{place}: missing, but named in a receipt") from None
    except DamagedError:
        raise DataError(f"{place}: damaged between bytes {start} and {end} (checksum differs)") from None
    return pa.ipc.open_stream(data).read_all()
