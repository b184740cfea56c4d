"""Arrow tables as parts of an artifact: Parquet for people and other tools, with a checksum on every page."""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clusterbatch.errors import DataError, first_line
from clusterbatch.store.artifact import Artifact, Part
from clusterbatch.store.checksum import checksum
from clusterbatch.store.folder import Folder

# Bytes read at once if only some columns or row groups are wanted.
_BLOCK = 2**20
# Errors that reading damaged bytes may raise; names of columns in a damaged footer may not even be text.
_DAMAGE = (pa.ArrowException, OSError, UnicodeDecodeError)


def vector_column(values: np.ndarray) -> pa.FixedSizeListArray:
    """Return (rows, dimensions) as a column of fixed-size lists; contiguous memory is shared, not copied."""
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(values).reshape(-1)), values.shape[1])


def vector_values(column: pa.ChunkedArray | pa.FixedSizeListArray) -> np.ndarray:
    """Return the (rows, dimensions) values of a column of fixed-size lists, in its own number type."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), column.type.list_size)


def parquet_bytes(table: pa.Table, row_group_rows: int | None = None) -> pa.Buffer:
    """A Parquet file in memory, zstd, each page with a checksum; one row group unless `row_group_rows` says more."""
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        compression="zstd",
        row_group_size=row_group_rows or max(1, table.num_rows),
        write_page_checksum=True,
        use_dictionary=_with_dictionary(table.schema),
    )
    return sink.getvalue()


def _with_dictionary(schema: pa.Schema) -> bool | list[str]:
    """Return the columns that are written with a dictionary; not those of vectors, whose numbers hardly repeat.

    Vectors are then in Parquet's plain encoding, which every reader knows; its byte streams (BYTE_STREAM_SPLIT) are 8 %
    smaller, but not every reader takes them for float16 (findings/duckdb_float16_byte_stream_split.sh).
    """
    others = [field for field in schema if not pa.types.is_fixed_size_list(field.type)]
    if len(others) == len(schema):
        return True
    return [f"{field.name}.list.element" if pa.types.is_list(field.type) else field.name for field in others]


@dataclass(frozen=True)
class Footer:
    """Bytes [start, end) of a Parquet part, to its end, and their checksum: pages have their own, the footer has none.

    Without it a flipped byte may turn a column into one of another type.
    """

    start: int
    end: int
    checksum: str

    @staticmethod
    def of(part: Part) -> Footer | None:
        """Return the footer of a part; None if an earlier version wrote it, which kept no checksum."""
        kept = part.details.get("footer")
        return None if kept is None else Footer(kept[0], part.bytes, kept[1])

    def read(self, folder: Folder, path: str) -> pq.FileMetaData:
        """Return what the footer says. Raises pa.ArrowInvalid if the bytes are not those that were written."""
        data = folder.read(path, self.start, self.end)
        if checksum(data) != self.checksum:
            raise pa.ArrowInvalid("its footer is not the one that was written")
        return pq.read_metadata(io.BytesIO(data))


def write_parquet(
    artifact: Artifact, stem: str, table: pa.Table, row_group_rows: int | None = None, **details: Any
) -> Part:
    """Write `table` as one Parquet part.

    `details` gains the rows of each row group, so readers need no footer, and place and checksum of the footer.
    """
    data = memoryview(parquet_bytes(table, row_group_rows))
    size = row_group_rows or max(1, table.num_rows)
    groups = [min(size, table.num_rows - start) for start in range(0, table.num_rows, size)]
    # The footer ends with its own length and four letters.
    start = len(data) - 8 - struct.unpack("<I", data[-8:-4])[0]
    footer = [start, checksum(data[start:])]
    return artifact.write_part(stem, "parquet", data, table.num_rows, row_groups=groups, footer=footer, **details)


def read_parquet(
    folder: Folder,
    part: Part | str,
    columns: Sequence[str] | None = None,
    row_groups: Sequence[int] | None = None,
    footer: Footer | None = None,
) -> pa.Table:
    """Columns and row groups of a Parquet part, or of the file of that name.

    A part that is read whole is verified by its checksum, any other read by the checksums of its pages and of its
    footer, which is the part's or `footer`. Raises DataError that names the file when it is missing or damaged.
    """
    if isinstance(part, Part) and columns is None and row_groups is None:
        with pq.ParquetFile(io.BytesIO(Artifact(folder, "part").read_part(part))) as file:
            return file.read()
    path, footer = (part.path, Footer.of(part)) if isinstance(part, Part) else (part, footer)
    try:
        try:
            return _read(folder, path, columns, row_groups, footer)
        except _DAMAGE:
            # Once more: the bytes may have been damaged in transit only.
            return _read(folder, path, columns, row_groups, footer)
    except FileNotFoundError:
        raise DataError(f"{folder.uri}/{path}: missing, but named in the manifest") from None
    except _DAMAGE as error:
        raise _damaged(folder, path, error) from error


def _read(
    folder: Folder,
    path: str,
    columns: Sequence[str] | None,
    row_groups: Sequence[int] | None,
    footer: Footer | None,
) -> pa.Table:
    metadata = None if footer is None else footer.read(folder, path)
    # Whole-file reads in one request are cheaper than seeks as long as all of it is wanted.
    whole = columns is None and row_groups is None
    source: Any = io.BytesIO(folder.read(path)) if whole else folder.open(path, _BLOCK)
    with source, pq.ParquetFile(source, metadata=metadata, page_checksum_verification=True) as file:
        groups = list(range(file.num_row_groups)) if row_groups is None else list(row_groups)
        table = file.read_row_groups(groups, columns=None if columns is None else list(columns))
    missing = set(columns or ()) - set(table.column_names)
    if missing:
        # Parquet leaves out unknown columns; here these can only come from a footer that is not the one written.
        raise pa.ArrowInvalid(f"no column {', '.join(sorted(missing))}")
    return table


def parquet_columns(folder: Folder, path: str) -> list[str]:
    """Names of the columns of a Parquet part, from its footer."""
    try:
        with folder.open(path, _BLOCK) as file:
            return list(pq.read_schema(file).names)
    except FileNotFoundError:
        raise DataError(f"{folder.uri}/{path}: missing, but named in the manifest") from None
    except _DAMAGE as error:
        raise _damaged(folder, path, error) from error


def _damaged(folder: Folder, path: str, error: BaseException) -> DataError:
    return DataError(f"{folder.uri}/{path}: damaged, cannot be read ({first_line(error)})")
