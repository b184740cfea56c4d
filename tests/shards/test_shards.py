"""Any run of any cluster can be read by itself, comes back as it was written, and damage is noticed."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from clusterbatch.errors import DataError
from clusterbatch.shards import reader as reader_module
from clusterbatch.shards.layout import TRAINING
from clusterbatch.shards.reader import VECTORS, RunTables, ShardReader
from clusterbatch.store import Folder
from tests.clustering.synthetic import build_shards

SIZES = {"a": [100, 7, 333, 16], "b": [1, 900], "c": [64]}


@pytest.fixture
def shards(tmp_path: Path):
    return build_shards(Folder(str(tmp_path)), SIZES)


def test_every_run_comes_back_as_written(shards) -> None:
    artifact, written = shards
    reader = ShardReader(artifact)
    index = reader.index
    assert index.total_rows == sum(map(sum, SIZES.values()))
    assert len(set(index.shard.tolist())) > 1
    for entry in range(len(index)):
        runs = index.first_run[entry] + np.arange(-(-index.rows[entry] // index.run_rows))
        batches = reader.read_runs(int(index.shard[entry]), runs, vectors=True)
        assert [batch.num_rows for batch in batches[:-1]] == [index.run_rows] * (len(runs) - 1)
        expected = written[index.sources[index.source[entry]], int(index.cluster[entry])]
        got = pa.Table.from_batches(batches)
        assert got.schema.names == [*reader.schema.names, "query_vector", "document_vector"]
        assert got.select(expected.column_names).to_pylist() == expected.to_pylist()


@pytest.mark.parametrize("one_by_one", [True, False], ids=["local", "object storage"])
def test_separate_runs_come_in_the_order_asked_and_cost_their_bytes(
    shards, one_by_one: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact, _ = shards
    reader = pickle.loads(pickle.dumps(ShardReader(artifact)))
    read_all = reader_module._read_all
    monkeypatch.setattr(reader_module, "_read_all", lambda reads, **_: read_all(reads, one_by_one=one_by_one))
    wanted = np.array([0, 1, 5, 8, 9])
    alone = [reader.read_runs(0, np.array([run]), vectors=True)[0] for run in wanted]
    together = reader.read_runs(0, wanted, vectors=True)
    assert all(one.equals(other) for one, other in zip(alone, together, strict=True))
    training = next(p for p in artifact.require().parts if p.details.get("content") == TRAINING)
    every = np.arange(len(reader._tables.get(0, TRAINING).checksums))
    assert reader.run_bytes(0, every).sum() == training.bytes


def test_a_flipped_byte_is_an_error_that_names_the_shard(shards) -> None:
    artifact, _ = shards
    part = next(p for p in artifact.require().parts if p.details.get("content") == TRAINING and p.details["shard"] == 1)
    data = bytearray(artifact.folder.read(part.path))
    data[len(data) // 2] ^= 1
    artifact.folder.write(part.path, bytes(data))
    reader = ShardReader(artifact)
    runs = np.arange(len(reader._tables.get(1, TRAINING).checksums))
    with pytest.raises(DataError, match=r"shard 1, run \d+ is damaged"):
        reader.read_runs(1, runs)
    assert len(reader.read_runs(0, np.array([0]))) == 1


def test_vectors_that_were_left_out_are_refused_in_one_line(tmp_path: Path) -> None:
    artifact, _ = build_shards(Folder(str(tmp_path)), {"a": [20]}, dimensions=None)
    with pytest.raises(DataError, match="without the surrogate's vectors"):
        ShardReader(artifact).read_runs(0, np.array([0]), vectors=True)


def test_tables_of_runs_are_bounded_in_memory(shards) -> None:
    artifact, _ = shards
    reader = ShardReader(artifact)
    shard_numbers = np.unique(reader.index.shard).tolist()
    expected = [reader.read_runs(shard, np.array([0]), vectors=True)[0] for shard in shard_numbers]
    largest = max(
        reader._tables.get(shard, content).bytes for shard in shard_numbers for content in (TRAINING, VECTORS)
    )
    reads: list[int] = []
    small = RunTables(lambda shard: reads.append(shard) or reader._read_table(shard), limit=2 * largest)
    reader._tables = small
    for _ in range(2):
        found = [reader.read_runs(shard, np.array([0]), vectors=True)[0] for shard in shard_numbers]
        assert all(one.equals(other) for one, other in zip(found, expected, strict=True))
        assert sum(table.bytes for table in small._tables.values()) == small._bytes <= 2 * largest
    # What was dropped is read again; what was used just now is not.
    assert len(reads) > 2 * len(shard_numbers)
    before = len(reads)
    reader.read_runs(shard_numbers[-1], np.array([0]), vectors=True)
    assert len(reads) == before
