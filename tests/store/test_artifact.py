"""Artifacts are whole or not there; what is damaged is noticed; rows are conserved."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clusterbatch.errors import DataError, UsageError
from clusterbatch.store import Artifact, Counts, Folder, Receipt, shuffle
from clusterbatch.store.shuffle import (
    bucket_rows,
    bundle_buckets,
    iterate_buckets,
    read_bucket,
    read_buckets,
    write_buckets,
)
from clusterbatch.store.tables import read_parquet, write_parquet
from clusterbatch.store.traffic import since_last

TABLE = pa.table({"number": np.arange(5000), "text": [f"text {number}" for number in range(5000)]})


def artifact(folder: Path) -> Artifact:
    return Artifact(Folder(str(folder)), "corpus")


def commit(it: Artifact, fingerprint: str = "one") -> None:
    # Its name comes before the manifest's: nothing may depend on the order of names.
    part = write_parquet(it, "data-0", TABLE, 1000)
    receipt = Receipt(unit=0, fingerprint=fingerprint, parts=[part], counts=Counts(read=5000, written=5000))
    it.write_receipt(receipt)
    it.commit(fingerprint, [receipt], config={}, inputs={}, seconds=0.0)


def test_nothing_is_there_before_the_manifest(tmp_path: Path) -> None:
    it = artifact(tmp_path)
    part = write_parquet(it, "part-0", TABLE)
    it.write_receipt(Receipt(unit=3, fingerprint="one", parts=[part], counts=Counts(read=5000, written=5000)))
    assert it.manifest() is None
    with pytest.raises(DataError, match="run that stage first"):
        it.require()
    assert list(it.begin("one")) == [3]


def test_another_fingerprint_is_refused_unless_forced(tmp_path: Path) -> None:
    it = artifact(tmp_path)
    commit(it)
    assert it.is_done("one")
    with pytest.raises(UsageError, match="--force"):
        it.begin("two")
    assert it.is_done("one")
    assert it.begin("two", force=True) == {}
    assert it.manifest() is None


def test_files_of_others_among_receipts_are_neither_read_nor_removed(tmp_path: Path) -> None:
    it = artifact(tmp_path)
    it.write_receipt(Receipt(unit=3, fingerprint="one"))
    for name in ("notes.txt", "mine.json", "00000004.json.bak"):
        it.folder.write(f"_receipts/{name}", b"mine")
    assert list(it.begin("one")) == [3]
    commit(it)
    assert it.folder.list("_receipts") == ["00000004.json.bak", "mine.json", "notes.txt"]
    it.folder.write("_receipts/00000004.json", b"mine")
    with pytest.raises(DataError, match=r"_receipts/00000004\.json: damaged, not a receipt"):
        it.begin("two", force=True)
    assert it.folder.read("_receipts/00000004.json") == b"mine"


def test_a_removal_that_is_cut_off_leaves_nothing_that_looks_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Folder.remove
    for removals in range(1, 6):
        it = artifact(tmp_path / str(removals))
        inner = Artifact(it.folder.child("_exchange", "rows"), "rows")
        for each in (it, inner):
            commit(each)
            inner.write_receipt(Receipt(unit=1, fingerprint="one", parts=[inner.write_part("a", "bin", b"x", 1)]))
        left = removals

        def remove(folder: Folder, name: str = "") -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise InterruptedError
            original(folder, name)

        with monkeypatch.context() as patch:
            patch.setattr(Folder, "remove", remove)
            with pytest.raises(InterruptedError):
                it.remove()
        for each in (it, inner):
            named = [part.path for receipt in each._receipts() for part in receipt.parts]
            named += [part.path for part in each.parts_listed() or []]
            assert all(each.folder.exists(path) for path in named)


def test_a_lost_row_fails_the_commit(tmp_path: Path) -> None:
    lost = Receipt(unit=0, fingerprint="one", counts=Counts(read=3, written=1, rejected=1))
    with pytest.raises(DataError, match="3 rows read but 2 accounted for"):
        artifact(tmp_path).commit("one", [lost], config={}, inputs={}, seconds=0.0)


def test_seconds_of_workers_are_those_of_all_sessions(tmp_path: Path) -> None:
    it = artifact(tmp_path)
    for unit, seconds in enumerate((40.0, 50.0)):
        it.write_receipt(Receipt(unit=unit, fingerprint="one", seconds=seconds))
    # Another session finds these done, and makes the last.
    done = it.begin("one")
    last = Receipt(unit=2, fingerprint="one", seconds=4.0)
    manifest = it.commit("one", [*done.values(), last], config={}, inputs={}, seconds=4.5)
    assert (it.require().seconds, it.require().worker_seconds) == (4.5, 94.0)
    # A manifest of before such seconds were kept.
    before = manifest.model_dump(mode="json", exclude={"worker_seconds"})
    it.folder.write_json("manifest.json", before)
    assert it.require().worker_seconds is None


@pytest.mark.parametrize("position", [4, 2000, -1])
def test_a_flipped_byte_is_noticed(tmp_path: Path, position: int) -> None:
    it = artifact(tmp_path)
    commit(it)
    part = it.require().parts[0]
    file = tmp_path / part.path
    data = bytearray(file.read_bytes())
    data[position] ^= 0x40
    file.write_bytes(data)
    with pytest.raises(DataError, match=r"data-0.*damaged"):
        it.read_part(part)


def test_a_flipped_byte_in_a_page_is_noticed_or_changes_nothing(tmp_path: Path) -> None:
    it = artifact(tmp_path)
    commit(it)
    file = tmp_path / it.require().parts[0].path
    whole = file.read_bytes()
    noticed = 0
    # Pages and their headers; headers carry statistics that no row comes from.
    for position in range(4, 12_000, 499):
        data = bytearray(whole)
        data[position] ^= 0x40
        file.write_bytes(data)
        try:
            assert read_parquet(it.folder, file.name, ["number", "text"], [0, 1, 2, 3, 4]) == TABLE
        except DataError as error:
            noticed += f"{file.name}: damaged" in str(error)
    assert noticed > 20


def test_rows_meet_in_buckets_in_their_order(tmp_path: Path) -> None:
    it = artifact(tmp_path)
    buckets = np.arange(5000) % 7
    parts = [write_buckets(it, unit, TABLE.slice(unit * 2500, 2500), buckets[:2500], 8) for unit in (0, 1)]
    for bucket in range(7):
        rows = read_bucket(it, parts, bucket)
        assert rows is not None
        first = np.flatnonzero(buckets[:2500] == bucket)
        assert rows["number"].to_pylist() == [*first, *(first + 2500)]
    assert read_bucket(it, parts, 7) is None


def test_buckets_that_follow_one_another_are_read_together(tmp_path: Path) -> None:
    it = artifact(tmp_path)
    random = np.random.default_rng(0)
    # More buckets than a reading of places has, some without rows in one part or in all.
    buckets = random.integers(0, 300, 5000) // 2 * 2
    parts = [write_buckets(it, unit, TABLE.slice(unit * 2500, 2500), buckets[:2500], 301) for unit in (0, 1)]
    single = [read_bucket(it, parts, bucket) for bucket in range(301)]
    for first, end in ((0, 1), (3, 90), (63, 65), (0, 301), (299, 301), (300, 301)):
        since_last()
        assert read_buckets(it, parts, range(first, end)) == single[first:end]
        # Their places and their rows, whatever their number.
        assert since_last().reads <= 2 * len(parts)


def test_a_damaged_bucket_is_named_among_those_read_together(tmp_path: Path) -> None:
    it = artifact(tmp_path)
    part = write_buckets(it, 0, TABLE, np.arange(5000) // 100, 50)
    file = tmp_path / part.path
    data = bytearray(file.read_bytes())
    start = int(np.frombuffer(data[-50 * 32 :], "<u8")[4 * 30])
    data[start + 50] ^= 0x40
    file.write_bytes(data)
    with pytest.raises(DataError, match=rf"{part.path}: damaged in bucket 30 "):
        read_buckets(it, [part], range(20, 40))


@pytest.mark.parametrize(
    ("position", "damaged"), [(100, 0), (-96, 0), (-80, 0), (-64, 1), (-56, 1), (-48, 1), (-33, 1)]
)
def test_a_damaged_bucket_names_its_part(tmp_path: Path, position: int, damaged: int) -> None:
    """In its rows, and in each number of its entry in the table behind them; the other bucket stays readable."""
    it = artifact(tmp_path)
    part = write_buckets(it, 0, TABLE, np.arange(5000) // 2500, 3)
    file = tmp_path / part.path
    data = bytearray(file.read_bytes())
    data[position] ^= 0x40
    file.write_bytes(data)
    with pytest.raises(DataError, match=rf"{part.path}: damaged in bucket {damaged}"):
        read_bucket(it, [part], damaged)
    assert read_bucket(it, [part], 1 - damaged) == TABLE.slice(2500 * (1 - damaged), 2500)


def test_where_buckets_lie_is_read_for_many_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    it = artifact(tmp_path)
    bucket = np.arange(5000) % 50
    parts = [write_buckets(it, unit, TABLE, bucket, 50) for unit in range(3)]
    since_last()
    for number in range(50):
        found = read_bucket(it, parts, number)
        assert found is not None
        assert found["number"].to_pylist() == 3 * list(range(number, 5000, 50))
    assert since_last().reads == 3 * (50 + 1)
    # What was damaged on its way is not kept.
    other = write_buckets(it, 3, TABLE, bucket, 50)
    original, reads = Folder.read, 0

    def read(folder: Folder, name: str, start: int | None = None, end: int | None = None) -> bytes:
        nonlocal reads
        reads += 1
        data = original(folder, name, start, end)
        return bytes([data[0] ^ 0x40]) + data[1:] if reads == 1 else data

    monkeypatch.setattr(Folder, "read", read)
    found = read_bucket(it, [other], 0)
    assert found is not None
    assert found["number"].to_pylist() == list(range(0, 5000, 50))


def test_rows_of_buckets_are_counted_without_reading_them(tmp_path: Path) -> None:
    it = artifact(tmp_path)
    bucket = np.random.default_rng(0).integers(0, 40, 5000)
    parts = [
        write_buckets(it, unit, TABLE.slice(start, 500), bucket[start : start + 500], 50)
        for unit, start in enumerate(range(0, 5000, 500))
    ]
    parts.append(write_buckets(it, 10, TABLE.slice(0, 0), bucket[:0], 50))
    assert bucket_rows(it, parts).tolist() == np.bincount(bucket, minlength=50).tolist()
    # What the driver keeps of a unit does not grow with the number of buckets.
    assert all(len(part.model_dump_json()) < 250 for part in parts)
    (tmp_path / parts[3].path).unlink()
    with pytest.raises(DataError, match=r"unit-00000003.*missing"):
        bucket_rows(it, parts)


@given(st.lists(st.integers(0, 300), min_size=1, max_size=400), st.booleans())
def test_buckets_are_bundled_by_bytes(megabytes: list[int], large: bool) -> None:
    sizes = np.array(megabytes, float) * (2**20 if large else 2**10)
    limit = min(shuffle.BUNDLE_BYTES, max(2**24, sizes.sum() / 64))
    bundles = bundle_buckets(sizes)
    assert [bucket for bundle in bundles for bucket in bundle] == list(range(len(sizes)))
    for bundle in bundles:
        # What one process reads together fits its memory.
        assert len(bundle) == 1 or sizes[bundle.start : bundle.stop].sum() <= limit + 1e-6
    # Neighbours that would have fitted together are together.
    for one, other in pairwise(bundles):
        assert sizes[one.start : one.stop].sum() + sizes[other.start] > limit


def test_buckets_that_are_read_together_are_those_read_one_by_one(tmp_path, monkeypatch) -> None:
    it = Artifact(Folder(str(tmp_path)), "rows")
    buckets = np.arange(TABLE.num_rows) % 40
    parts = [
        write_buckets(it, unit, TABLE.slice(unit, 900), buckets[unit : unit + 900] // 2 * 2, 40) for unit in range(3)
    ]
    single = [read_bucket(it, parts, bucket) for bucket in range(40)]
    for least in (0, 2**24):
        monkeypatch.setattr(shuffle, "_LEAST_BYTES", least)
        assert list(iterate_buckets(it, parts, np.ones(40))) == single
