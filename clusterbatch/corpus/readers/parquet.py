"""Parquet and Arrow files as data frame libraries, databases and Hugging Face's datasets write them."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator
from contextlib import suppress
from decimal import Decimal
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from clusterbatch.corpus.images import data_uri
from clusterbatch.corpus.inputs import Slice
from clusterbatch.corpus.readers.records import RowError, canonical_value, negatives_of, passage_text
from clusterbatch.corpus.rows import COLUMN_TYPES, BrokenFileError, Chunk, InputColumns, Reject, check_columns
from clusterbatch.errors import first_line
from clusterbatch.schema import VECTORS

_CHUNK_ROWS = 8192
# About how many bytes of texts are read at once; a row group may have rows of any size.
_CHUNK_BYTES = 32 * 2**20
# Decoding reads a column chunk in steps of this many bytes, not whole: row groups may be larger than memory.
_BUFFER = 2**20
# The first bytes of Arrow's file format; its stream format has none.
_FILE_MARK = b"ARROW1"
# Columns of labels, in which numbers are as good as texts.
_LABELS = ("pair_id", "source", "group", "document_id")
_EXPECTED = {
    "weight": "a number",
    "score": "a number",
    "negative_scores": "numbers or lists of numbers",
    **dict.fromkeys(VECTORS, "a list of numbers"),
    "negatives": "text or lists of texts",
}
_HINTS = {"source": "; corpus.source gives all rows one source"}


def read_parquet_slice(file: BinaryIO, piece: Slice, columns: InputColumns) -> Iterator[Chunk]:
    """Yield the rows of the row groups that begin in the slice: every row group is in exactly one slice.

    Positions count from the slice's first row.
    """
    parquet = pq.ParquetFile(file, buffer_size=_BUFFER, pre_buffer=False)
    names = _checked(parquet.schema_arrow, columns)
    row = 0
    wanted = _wanted(names, columns)
    for number in range(parquet.num_row_groups):
        group = parquet.metadata.row_group(number)
        if piece.start <= _first_byte(group) < piece.end:
            rows = _rows_at_once(group, wanted)
            for batch in parquet.iter_batches(rows, row_groups=[number], columns=wanted):
                yield _chunk(batch, row, names, columns)
                row += batch.num_rows


def read_arrow(file: BinaryIO, columns: InputColumns) -> Iterator[Chunk]:
    """Yield the rows of a file in Arrow's file format (also called Feather) or its stream format."""
    is_file = file.read(len(_FILE_MARK)) == _FILE_MARK
    file.seek(0)
    if is_file:
        reader = pa.ipc.open_file(file)
        batches: Iterable[pa.RecordBatch] = map(reader.get_batch, range(reader.num_record_batches))
    else:
        reader = batches = pa.ipc.open_stream(file)
    names = _checked(reader.schema, columns)
    row = 0
    for batch in batches:
        # Only the columns that are read: others may be twice there, or of types that cannot be sliced.
        chosen = batch.select(_wanted(names, columns))
        rows = max(1, min(_CHUNK_ROWS, chosen.num_rows * _CHUNK_BYTES // max(1, chosen.nbytes)))
        for start in range(0, chosen.num_rows, rows):
            piece = chosen.slice(start, rows)
            yield _chunk(piece, row, names, columns)
            row += piece.num_rows


def _checked(schema: pa.Schema, columns: InputColumns) -> dict[str, str]:
    """Return the columns of a file by canonical name. Raises BrokenFileError if one cannot be what it is to be."""
    check_columns(schema.names, columns)
    names = {name: given for name, given in columns.names.items() if given in schema.names}
    for name, given in names.items():
        if not (name in columns.images and _is_image(schema.field(given).type)):
            _check_type(name, given, schema.field(given).type, columns)
    for name, listed in (("negatives", columns.negatives), ("negative_scores", columns.negative_scores)):
        for given in listed:
            _check_type(name, given, schema.field(given).type, columns)
    return names


def _wanted(names: dict[str, str], columns: InputColumns) -> list[str]:
    """Return the columns that are read, by their names in the file."""
    return list(dict.fromkeys([*names.values(), *columns.negatives, *columns.negative_scores]))


def _first_byte(group: Any) -> int:
    column = group.column(0)
    return int(min(column.dictionary_page_offset or column.data_page_offset, column.data_page_offset))


def _rows_at_once(group: Any, wanted: list[str]) -> int:
    """Return how many rows of a row group are read at once, by the bytes that its metadata says."""
    columns = (group.column(number) for number in range(group.num_columns))
    size = sum(column.total_uncompressed_size for column in columns if column.path_in_schema.split(".")[0] in wanted)
    return max(1, min(_CHUNK_ROWS, group.num_rows * _CHUNK_BYTES // max(1, size)))


def _check_type(name: str, given: str, kind: pa.DataType, columns: InputColumns) -> None:
    """Raise BrokenFileError if a column cannot be what it is to be."""
    value = _value_type(kind)
    item = _value_type(value.value_type) if _is_list(value) else None
    if name in VECTORS:
        right = item is not None and _is_number(item)
    elif name in ("weight", "score"):
        right = _is_number(value) or pa.types.is_null(value)
    elif name == "negative_scores":
        right = _is_number(item or value) or pa.types.is_null(item or value)
    elif name == "negatives":
        right = _is_text(item or value) or _is_passage(item or value)
    elif name in _LABELS:
        right = _is_text(value) or pa.types.is_integer(value) or pa.types.is_decimal(value) or _is_uuid(value)
    else:
        several = name == "document" and name not in columns.images and not set(VECTORS) & set(columns.names)
        right = _is_text(value) or (several and item is not None and _is_text(item))
        right = right or (name == "document" and name not in columns.images and _is_passage(value))
        right = right or (several and item is not None and _is_passage(item))
    if not right:
        raise BrokenFileError(f"column {given} is {kind}, expected {_EXPECTED.get(name, 'text')}{_HINTS.get(name, '')}")


def _value_type(kind: pa.DataType) -> pa.DataType:
    """Return the type that is stored: of a dictionary, its values'; of an extension type, its storage's."""
    if isinstance(kind, pa.BaseExtensionType) and not _is_uuid(kind):
        return _value_type(kind.storage_type)
    if pa.types.is_run_end_encoded(kind):
        return _value_type(kind.value_type)
    return _value_type(kind.value_type) if pa.types.is_dictionary(kind) else kind


def _is_uuid(kind: pa.DataType) -> bool:
    return isinstance(kind, pa.UuidType) or (pa.types.is_fixed_size_binary(kind) and kind.byte_width == 16)


def _is_list(kind: pa.DataType) -> bool:
    tests = ("is_list", "is_large_list", "is_fixed_size_list", "is_list_view", "is_large_list_view")
    return any(getattr(pa.types, test)(kind) for test in tests)


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_decimal(kind)


def _is_passage(kind: pa.DataType) -> bool:
    """Return whether values are passages: struct<text, ...> with an optional title."""
    place = kind.get_field_index("text") if pa.types.is_struct(kind) else -1
    return place >= 0 and _is_text(_value_type(kind.field(place).type))


def _is_text(kind: pa.DataType) -> bool:
    tests = (
        "is_string",
        "is_large_string",
        "is_string_view",
        "is_binary",
        "is_large_binary",
        "is_binary_view",
        "is_null",
    )
    return any(getattr(pa.types, test)(kind) for test in tests)


def _chunk(batch: pa.RecordBatch, first: int, names: dict[str, str], settings: InputColumns) -> Chunk:
    columns: dict[str, pa.Array] = {}
    rejects: dict[int, Reject] = {}
    row_of_pair: np.ndarray | None = None

    def refuse(positions: list[int], reason: str) -> None:
        for position in positions:
            rejects.setdefault(position, Reject(first + position, reason))

    for name, given in names.items():
        array = batch.column(given)
        try:
            if name in settings.images:
                array = _addresses(array)
            array = _passages(_stored(array)) if name == "document" else _stored(array)
            if name == "document" and _is_list(array.type):
                row_of_pair, array = _pairs_of_rows(array)
            columns[name], invalid = _cast(array, name)
            if name in _LABELS:
                # An empty one says nothing, as in other formats.
                empty = pc.equal(columns[name], "")
                columns[name] = pc.if_else(empty, pa.scalar(None, pa.string()), columns[name])
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise BrokenFileError(f"column {given}: {first_line(error)}") from error
        if name == "document" and row_of_pair is not None:
            invalid = row_of_pair[invalid].tolist()
        refuse(invalid, f"{name}: invalid UTF-8")
    if settings.negatives:
        texts = {given: _passages(_stored(batch.column(given))) for given in settings.negatives}
        scores = {given: _stored(batch.column(given)) for given in settings.negative_scores}
        found, problems = merge_negatives(texts, scores)
        columns |= found
        for position, reason in problems.items():
            refuse([position], reason)
    for name, given in settings.names.items():
        if name not in names and given in settings.constants:
            columns[name] = _constant(name, settings.constants[given], batch.num_rows)
    keep = np.ones(batch.num_rows, bool)
    keep[list(rejects)] = False
    pairs = np.arange(batch.num_rows) if row_of_pair is None else row_of_pair
    if row_of_pair is not None:
        taken = pa.array(row_of_pair)
        columns = {name: array if name == "document" else array.take(taken) for name, array in columns.items()}
    if rejects:
        mask = pa.array(keep[pairs])
        columns = {name: array.filter(mask) for name, array in columns.items()}
    return Chunk(first + pairs[keep[pairs]], columns, list(rejects.values()))


def _pairs_of_rows(lists: pa.Array) -> tuple[np.ndarray, pa.Array]:
    """Return the row of each pair, (n,) int64, and its document; a list without documents is one null."""
    lists = lists.cast(pa.large_list(lists.type.value_type))
    lengths = lists.value_lengths().fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    rows = np.repeat(np.arange(len(lengths)), np.maximum(lengths, 1))
    places = np.zeros(len(rows), np.int64)
    filled = lengths[rows] > 0
    places[filled] = np.arange(filled.sum())
    return rows, lists.flatten().take(pa.array(places, mask=~filled))


def _constant(name: str, value: str | None, rows: int) -> pa.Array:
    """Return a column that the file's folders give. Raises BrokenFileError if it cannot be one."""
    try:
        return pa.array([canonical_value(name, value)] * rows, COLUMN_TYPES[name])
    except RowError as error:
        raise BrokenFileError(f"folder: {error}") from None


def _is_image(kind: pa.DataType) -> bool:
    """Return whether a column has encoded images as Hugging Face's data sets keep them: struct<bytes, path>."""
    return pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0


def _addresses(array: pa.Array) -> pa.Array:
    """Return images that are bytes as data URIs, not checked yet; texts are addresses already."""
    if pa.types.is_struct(array.type):
        has_path = array.type.get_field_index("path") >= 0
        paths = pc.struct_field(array, "path") if has_path else pa.nulls(len(array), pa.string())
        return pc.coalesce(_addresses(pc.struct_field(array, "bytes")), paths.cast(pa.string()))
    if pa.types.is_binary(array.type) or pa.types.is_large_binary(array.type):
        # The kind of image is found when it is opened.
        found = (None if data is None else data_uri(data, "encoded") for data in array.to_pylist())
        return pa.array(found, pa.string())
    return array


def _stored(array: pa.Array) -> pa.Array:
    """Return list views as lists, and the values of a dictionary, runs or an extension type, also inside lists."""
    if isinstance(array, pa.ExtensionArray) and not _is_uuid(array.type):
        return _stored(array.storage)
    if pa.types.is_dictionary(array.type):
        return _stored(array.dictionary_decode())
    if pa.types.is_run_end_encoded(array.type):
        return _stored(pc.run_end_decode(array))
    if pa.types.is_list_view(array.type) or pa.types.is_large_list_view(array.type):
        return _stored(_list_of_view(array))
    if _is_list(array.type) and array.type.value_type != _value_type(array.type.value_type):
        return _stored(array.cast(pa.large_list(_value_type(array.type.value_type))))
    return array


def _list_of_view(array: pa.Array) -> pa.Array:
    """Return a list view as a list. Arrow's cast loses the items of the last one (findings/arrow_list_view_cast.sh)."""
    lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy().astype(np.int64)
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]))
    return pa.LargeListArray.from_arrays(offsets, array.flatten(), mask=array.is_null())


def _passages(array: pa.Array) -> pa.Array:
    """Return title and text of passages, also inside lists; other arrays as they are."""
    if _is_passage(array.type):
        return pa.array([_passage(value) for value in array.to_pylist()], pa.string())
    if _is_list(array.type) and _is_passage(array.type.value_type):
        lists = (value and [_passage(item) for item in value] for value in array.to_pylist())
        return pa.array(lists, pa.list_(pa.string()))
    return array


def _passage(value: Any) -> str | None:
    text = passage_text(value)
    return text if isinstance(text, str) else None


def _cast(array: pa.Array, name: str) -> tuple[pa.Array, list[int]]:
    """Return `array` as the canonical column `name`, and the positions of texts that are not UTF-8 (null there)."""
    target = COLUMN_TYPES[name]
    if name in VECTORS:
        lists = array.cast(pa.large_list(array.type.value_type))
        numbers = _as_floats(lists.flatten())
        lengths = lists.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
        offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32), mask=None)
        return pa.ListArray.from_arrays(offsets, numbers, mask=lists.is_null()), []
    if name in ("weight", "score"):
        return _as_floats(array), []
    if _is_uuid(array.type):
        values = [_uuid_text(value) for value in array.to_pylist()]
        return pa.array(values, target), []
    if pa.types.is_decimal(array.type):
        return pa.array([_decimal_text(value) for value in array.to_pylist()], target), []
    if pa.types.is_integer(array.type):
        return array.cast(target), []
    # Parquet does not promise that its strings are UTF-8; the cast from bytes checks.
    binary = array.cast(pa.large_binary())
    with suppress(pa.ArrowInvalid):
        return binary.cast(target), []
    return _decode_each(binary)


def _as_floats(array: pa.Array) -> pa.Array:
    """Return numbers as float32; those that it cannot hold exactly are rounded, as in other formats."""
    if not pa.types.is_floating(array.type):
        array = array.cast(pa.float64(), safe=False)
    return array.cast(pa.float32(), safe=False)


def _uuid_text(value: uuid.UUID | bytes | None) -> str | None:
    return None if value is None else str(value if isinstance(value, uuid.UUID) else uuid.UUID(bytes=value))


def _decimal_text(value: Decimal | None) -> str | None:
    """Return a number as people write it: `12`, not `12.000`."""
    if value is None:
        return None
    return f"{value:f}".rstrip("0").rstrip(".") if value % 1 == 0 and "." in f"{value:f}" else f"{value:f}"


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


def merge_negatives(
    columns: dict[str, pa.Array], scores: dict[str, pa.Array] | None = None
) -> tuple[dict[str, pa.Array], dict[int, str]]:
    """Return one list<string> per row from columns of lists and of texts, by the name `negatives`, and why some cannot
    be taken, by position.

    Nulls and blank texts are left out; a text that is a list in JSON's notation is that list. If there are `scores`,
    `negative_scores` has one for each.
    """
    arrays = list(columns.values())
    if len(arrays) == 1 and _is_list(arrays[0].type) and not scores:
        with suppress(pa.ArrowInvalid, pa.ArrowNotImplementedError):
            lists = arrays[0].cast(pa.list_(pa.string()))
            texts = lists.flatten()
            blank = pc.any(pc.equal(pc.utf8_trim_whitespace(texts), "")).as_py()
            if not (lists.null_count or texts.null_count or blank):
                return {"negatives": lists}, {}
    problems: dict[int, str] = {}
    merged: list[tuple[list[str], list[float | None]]] = []
    cells = [zip(*(array.to_pylist() for array in given.values()), strict=True) for given in (columns, scores or {})]
    of_scores = cells[1] if scores else [()] * len(arrays[0])
    for position, (texts, judged) in enumerate(zip(cells[0], of_scores, strict=True)):
        try:
            row = dict(zip(columns, map(_decoded, texts), strict=True))
            merged.append(negatives_of(row, dict(zip(scores or {}, judged, strict=True))))
        except (UnicodeDecodeError, RowError) as error:
            problems[position] = str(error) if isinstance(error, RowError) else "negatives: invalid UTF-8"
            merged.append(([], []))
    found = {"negatives": pa.array([texts for texts, _ in merged], pa.list_(pa.string()))}
    if scores:
        found["negative_scores"] = pa.array([judged for _, judged in merged], pa.list_(pa.float32()))
    return found, problems


def _decoded(value: Any) -> Any:
    if isinstance(value, list):
        return [_decoded(item) for item in value]
    return value.decode() if isinstance(value, bytes) else value
