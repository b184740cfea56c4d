"""Parquet parts whose bytes are not those that were written: one line that names the file, or the right rows."""

from __future__ import annotations

import struct
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clusterbatch.errors import DataError
from clusterbatch.store import Artifact, Folder, Part
from clusterbatch.store.tables import parquet_columns, read_parquet, write_parquet

TABLE = pa.table(
    {
        "pair_id": [f"{row:032x}" for row in range(300)],
        "query": [f"query {row}" for row in range(300)],
        "hash": pa.array(range(300), pa.uint64()),
        "vector": pa.FixedSizeListArray.from_arrays(pa.array([float(row) for row in range(1200)], pa.float16()), 4),
    }
)


@pytest.fixture
def part(tmp_path: Path) -> tuple[Folder, Part, Path]:
    folder = Folder(str(tmp_path))
    written = write_parquet(Artifact(folder, "corpus"), "part", TABLE, 100)
    return folder, written, tmp_path / written.path


def footer(data: bytes) -> range:
    """Positions of a Parquet file's footer, with its length and the mark at the end."""
    (length,) = struct.unpack("<I", data[-8:-4])
    return range(len(data) - 8 - length, len(data))


def test_a_flipped_byte_anywhere_in_a_footer_is_one_line(part: tuple[Folder, Part, Path]) -> None:
    folder, written, file = part
    data = file.read_bytes()
    wanted = TABLE.select(["query", "vector"]).slice(100, 100)
    assert read_parquet(folder, written, ["query", "vector"], [1]).equals(wanted)
    earlier = written.model_copy(update={"details": {"row_groups": [100, 100, 100]}})
    refusals: list[str] = []
    for position in footer(data)[::3]:
        damaged = bytearray(data)
        damaged[position] ^= 0xFF if position % 2 else 0x01
        file.write_bytes(damaged)
        with pytest.raises(DataError, match=rf"{written.path}: damaged") as caught:
            read_parquet(folder, written)
        assert "\n" not in str(caught.value)
        # Some of a file, as later stages read it.
        with pytest.raises(DataError) as caught:
            read_parquet(folder, written, ["query", "vector"], [1])
        refusals.append(str(caught.value))
        # Of a part that an earlier version wrote, without a checksum: never other values, at most another type.
        with suppress(pa.ArrowNotImplementedError):
            try:
                rows = read_parquet(folder, earlier, ["query", "vector"], [1])
                assert rows.cast(wanted.schema).equals(wanted), position
            except DataError as error:
                refusals.append(str(error))
    assert len(refusals) > 100
    assert all(line.startswith(f"{folder.uri}/{written.path}: damaged") for line in refusals)
    assert not any("\n" in line for line in refusals)


def test_a_flipped_byte_in_a_page_is_noticed_by_its_checksum(part: tuple[Folder, Part, Path]) -> None:
    folder, written, file = part
    data = bytearray(file.read_bytes())
    data[len(data) // 3] ^= 0x20
    file.write_bytes(data)
    with pytest.raises(DataError, match="damaged"):
        read_parquet(folder, written, None, [0, 1, 2])


def test_names_of_columns_in_a_damaged_footer(part: tuple[Folder, Part, Path]) -> None:
    folder, written, file = part
    file.write_bytes(file.read_bytes()[:-10] + b"\0" * 10)
    with pytest.raises(DataError, match=f"{written.path}: damaged"):
        parquet_columns(folder, written.path)


def test_vectors_have_no_dictionary_and_texts_have_one(part: tuple[Folder, Part, Path]) -> None:
    folder, _, file = part
    table = TABLE.append_column("negatives", pa.array([["a", "b"]] * 300, pa.list_(pa.string())))
    written = write_parquet(Artifact(folder, "corpus"), "more", table)
    assert read_parquet(folder, written).equals(table)
    group = pq.read_metadata(file.parent / written.path).row_group(0)
    columns = {group.column(n).path_in_schema: group.column(n) for n in range(group.num_columns)}
    assert {name for name, column in columns.items() if column.has_dictionary_page} == {
        "pair_id",
        "query",
        "hash",
        "negatives.list.element",
    }
    # Every reader knows the plain encoding.
    assert set(columns["vector.list.element"].encodings) <= {"PLAIN", "RLE"}


def test_a_missing_part_is_named(part: tuple[Folder, Part, Path]) -> None:
    folder, written, file = part
    file.unlink()
    for columns in (None, ["query"]):
        with pytest.raises(DataError, match=f"{written.path}: missing"):
            read_parquet(folder, written, columns)
