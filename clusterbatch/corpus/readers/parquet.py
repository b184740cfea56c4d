"""Parquet files, also as Hugging Face exports them: string, large string, dictionary and binary columns of text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from clusterbatch.config import ColumnsConfig
from clusterbatch.corpus.images import data_uri
from clusterbatch.corpus.inputs import Slice
from clusterbatch.corpus.rows import (
    COLUMN_TYPES,
    BrokenFileError,
    Chunk,
    Reject,
    check_columns,
    input_names,
)
from clusterbatch.schema import VECTORS

_CHUNK_ROWS = 8192
_IMAGE_CHUNK_ROWS = 128
# Decoding reads a column chunk in steps of this many bytes, not whole: row groups may be larger than memory.
_BUFFER = 2**20


def read_parquet_slice(file: BinaryIO, piece: Slice, columns: ColumnsConfig) -> Iterator[Chunk]:
    """Rows of the row groups that begin in the slice: every row group is in exactly one slice.

    Positions count from the slice's first row.
    """
    parquet = pq.ParquetFile(file, buffer_size=_BUFFER, pre_buffer=False)
    present = parquet.schema_arrow.names
    check_columns(present, columns)
    names = {name: given for name, given in input_names(columns).items() if given in present}
    for name, given in names.items():
        kind = parquet.schema_arrow.field(given).type
        if not (name in columns.images and _is_image(kind)):
            _check_type(name, given, kind)
    chunk_rows = _IMAGE_CHUNK_ROWS if columns.images else _CHUNK_ROWS
    row = 0
    wanted = list(dict.fromkeys([*names.values(), *columns.negatives]))
    for group in range(parquet.num_row_groups):
        if piece.start <= _first_byte(parquet.metadata.row_group(group)) < piece.end:
            for batch in parquet.iter_batches(chunk_rows, row_groups=[group], columns=wanted):
                yield _chunk(batch, row, names, columns)
                row += batch.num_rows


def _first_byte(group: Any) -> int:
    column = group.column(0)
    return int(min(column.dictionary_page_offset or column.data_page_offset, column.data_page_offset))


def _check_type(name: str, given: str, kind: pa.DataType) -> None:
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    if name in VECTORS:
        right = any(test(kind) for test in _LIST_TESTS) and pa.types.is_floating(kind.value_type)
    elif name == "weight":
        right = pa.types.is_floating(value) or pa.types.is_integer(value) or pa.types.is_null(value)
    else:
        right = any(test(value) for test in _TEXT_TESTS)
        if name in ("pair_id", "source", "group"):
            right = right or pa.types.is_integer(value)
    if not right:
        raise BrokenFileError(f"column {given} is {kind}, expected {_EXPECTED.get(name, 'text')}")


_EXPECTED = {"weight": "a number", **dict.fromkeys(VECTORS, "a list of numbers")}
_LIST_TESTS = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
_TEXT_TESTS = (
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_string_view,
    pa.types.is_binary,
    pa.types.is_large_binary,
    pa.types.is_null,
)


def _chunk(batch: pa.RecordBatch, first: int, names: dict[str, str], settings: ColumnsConfig) -> Chunk:
    columns: dict[str, pa.Array] = {}
    rejects: dict[int, Reject] = {}
    for name, given in names.items():
        given_array = batch.column(given)
        if name in settings.images:
            given_array = _addresses(given_array)
        array, invalid = _cast(given_array, COLUMN_TYPES[name])
        columns[name] = array
        for position in invalid:
            rejects.setdefault(position, Reject(first + position, f"{name}: invalid UTF-8"))
    if settings.negatives:
        columns["negatives"] = merge_negatives([batch.column(given) for given in settings.negatives])
    rows = np.arange(first, first + batch.num_rows, dtype=np.int64)
    if not rejects:
        return Chunk(rows, columns)
    keep = np.ones(batch.num_rows, bool)
    keep[list(rejects)] = False
    mask = pa.array(keep)
    return Chunk(rows[keep], {name: array.filter(mask) for name, array in columns.items()}, list(rejects.values()))


def _is_image(kind: pa.DataType) -> bool:
    """Encoded images as Hugging Face's data sets keep them: struct<bytes: binary, path: string>."""
    return pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0


def _addresses(array: pa.Array) -> pa.Array:
    """Images that are bytes as data URIs, not checked yet; texts are addresses already."""
    if pa.types.is_struct(array.type):
        has_path = array.type.get_field_index("path") >= 0
        paths = pc.struct_field(array, "path") if has_path else pa.nulls(len(array), pa.string())
        return pc.coalesce(_addresses(pc.struct_field(array, "bytes")), paths.cast(pa.string()))
    if pa.types.is_binary(array.type) or pa.types.is_large_binary(array.type):
        # Which kind of image it is shows when it is opened.
        found = (None if data is None else data_uri(data, "encoded") for data in array.to_pylist())
        return pa.array(found, pa.string())
    return array


def _cast(array: pa.Array, target: pa.DataType) -> tuple[pa.Array, list[int]]:
    """`array` as `target`, and the positions whose text is not UTF-8 (null there)."""
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if pa.types.is_list(target):
        return array.cast(target), []
    if not pa.types.is_string(target):
        return array.cast(target), []
    if pa.types.is_integer(array.type):
        return array.cast(target), []
    # Parquet does not promise that its strings are UTF-8; the cast from bytes checks.
    binary = array.cast(pa.large_binary())
    try:
        return binary.cast(target), []
    except pa.ArrowInvalid:
        return _decode_each(binary)


def _decode_each(binary: pa.Array) -> tuple[pa.Array, list[int]]:
    texts: list[str | None] = []
    invalid: list[int] = []
    for position, value in enumerate(binary.to_pylist()):
        try:
            texts.append(None if value is None else value.decode())
        except UnicodeDecodeError:
            texts.append(None)
            invalid.append(position)
    return pa.array(texts, pa.string()), invalid


def merge_negatives(arrays: list[pa.Array]) -> pa.Array:
    """One list<string> per row from list columns and columns of single texts; nulls inside are left out."""
    if len(arrays) == 1 and pa.types.is_list(arrays[0].type):
        lists = arrays[0].cast(pa.list_(pa.string()))
        if lists.null_count == 0 and lists.flatten().null_count == 0:
            return lists
    merged: list[list[str]] = [[] for _ in range(len(arrays[0]))]
    for array in arrays:
        for row, value in zip(merged, pc.cast(array, _nested_text(array.type)).to_pylist(), strict=True):
            row.extend(text for text in (value if isinstance(value, list) else [value]) if text is not None)
    return pa.array(merged, pa.list_(pa.string()))


def _nested_text(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return pa.list_(pa.string())
    return pa.string()
