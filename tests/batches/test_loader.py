from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from clusterbatch.batches import BatchPlan, SliceLoader, row_reader
from clusterbatch.batches.row_reader import RowReader
from clusterbatch.config import BatchesConfig
from clusterbatch.encoder.tokens import Tokens
from clusterbatch.errors import DataError
from clusterbatch.shards.reader import ShardReader
from clusterbatch.store import Folder
from tests.clustering.synthetic import build_shards

SIZES = {"a": [100, 220, 64], "b": [300, 90]}


@pytest.mark.parametrize("stratify", ["random", "source", "cluster", "random_groups"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_slices_together_are_the_planned_rows(tmp_path: Path, stratify: str, world_size: int) -> None:
    artifact, written = build_shards(Folder(str(tmp_path)), SIZES)
    reader = ShardReader(artifact)
    plan = BatchPlan(reader.index, BatchesConfig(size=64, stratify=stratify))
    steps = plan.steps_per_epoch + 3
    loaders = [SliceLoader(plan, reader, rank, world_size, 0, steps, vectors=True) for rank in range(world_size)]
    compared = 0
    for step, slices in enumerate(zip(*loaders, strict=True)):
        batch = plan.batch(step)
        rows = [
            written[reader.index.sources[reader.index.source[piece]], int(reader.index.cluster[piece])].slice(row, 1)
            for piece, row in zip(batch.piece, batch.row.tolist(), strict=True)
        ]
        tokens = Tokens.concatenate([part.document_tokens for part in slices])
        assert [row["document_tokens"][0].as_py() for row in rows] == [tokens[i].tolist() for i in range(64)]
        hashes = np.concatenate([part.query_hash for part in slices])
        assert hashes.tolist() == [row["query_hash"][0].as_py() for row in rows]
        vectors = np.concatenate([part.query_vector for part in slices])
        assert np.array_equal(vectors, np.array([row["query_vector"][0].as_py() for row in rows], np.float16))
        for part in slices:
            assert part.step == step
            assert part.slice_rows.tolist() == [len(other) for other in slices]
        compared += 1
    assert compared == steps


def test_starts_anywhere_and_gives_the_same_batches(tmp_path: Path) -> None:
    artifact, _ = build_shards(Folder(str(tmp_path)), SIZES)
    reader = ShardReader(artifact)
    plan = BatchPlan(reader.index, BatchesConfig(size=64))
    whole = list(SliceLoader(plan, reader, 0, 2, 0, 20))
    tail = list(SliceLoader(plan, reader, 0, 2, 12, 20))
    assert [batch.step for batch in tail] == list(range(12, 20))
    for batch, same in zip(whole[12:], tail, strict=True):
        assert np.array_equal(batch.query_tokens.values, same.query_tokens.values)


def test_a_clustered_epoch_reads_little_more_than_its_rows(tmp_path: Path) -> None:
    artifact, _ = build_shards(Folder(str(tmp_path)), {"a": [640, 1280, 960, 700, 900]}, run_rows=16)
    reader = ShardReader(artifact)
    plan = BatchPlan(reader.index, BatchesConfig(size=128))
    loader = SliceLoader(plan, reader, 0, 1, 0, plan.steps_per_epoch)
    assert sum(len(batch) for batch in loader) >= reader.index.total_rows
    stored = sum(part.bytes for part in artifact.require().parts if part.details.get("content") == "training")
    assert stored <= loader.bytes_read <= 1.1 * stored


def test_single_rows_are_served_from_kept_runs(tmp_path: Path) -> None:
    artifact, _ = build_shards(Folder(str(tmp_path)), SIZES)
    reader = ShardReader(artifact)
    plan = BatchPlan(reader.index, BatchesConfig(size=64, stratify="random"))
    loader = SliceLoader(plan, reader, 0, 1, 0, 3 * plan.steps_per_epoch)
    for _ in loader:
        pass
    stored = sum(part.bytes for part in artifact.require().parts if part.details.get("content") == "training")
    assert loader.bytes_read <= stored, "a run was fetched twice although it was kept"


def test_more_workers_than_rows_give_empty_slices(tmp_path: Path) -> None:
    artifact, _ = build_shards(Folder(str(tmp_path)), {"a": [20]})
    reader = ShardReader(artifact)
    plan = BatchPlan(reader.index, BatchesConfig(size=2))
    (batch,) = SliceLoader(plan, reader, 2, 3, 0, 1)
    (empty,) = SliceLoader(plan, reader, 0, 3, 0, 1, vectors=True)
    assert (len(empty), len(batch)) == (0, 1)
    assert empty.query_vector.shape == (0, 8)
    assert empty.slice_rows.tolist() == [0, 1, 1]


def test_composition_says_what_the_global_batch_is_made_of(tmp_path: Path) -> None:
    artifact, _ = build_shards(Folder(str(tmp_path)), SIZES)
    reader = ShardReader(artifact)
    plan = BatchPlan(reader.index, BatchesConfig(size=64, clusters_per_batch=1))
    for slice_batch in SliceLoader(plan, reader, 1, 2, 0, plan.steps_per_epoch):
        batch, composition = plan.batch(slice_batch.step), slice_batch.composition
        assert composition.stratum == reader.index.sources[reader.index.source[batch.piece[0]]]
        assert composition.purity == max(np.bincount(batch.cluster)) / 64
        assert composition.packed == batch.packed.mean()


def test_little_memory_still_moves_on(tmp_path: Path) -> None:
    artifact, _ = build_shards(Folder(str(tmp_path)), SIZES)
    reader = ShardReader(artifact)
    plan = BatchPlan(reader.index, BatchesConfig(size=64, stratify="random"))
    loader = SliceLoader(plan, reader, 0, 1, 0, 10, prefetch_bytes=1, cache_bytes=1)
    assert len(list(loader)) == 10


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    artifact, _ = build_shards(Folder(str(tmp_path)), SIZES)
    reader = ShardReader(artifact)
    plan = BatchPlan(reader.index, BatchesConfig(size=64))
    part = next(part for part in artifact.require().parts if part.details.get("content") == "training")
    path = tmp_path / part.path
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(DataError, match=part.path):
        list(SliceLoader(plan, reader, 0, 1, 0, plan.steps_per_epoch))


def test_rows_come_from_more_bytes_than_an_offset_reaches() -> None:
    """Single rows of a few runs of large images: these are 600 MB each, of which a row is small."""

    class Images:
        """Five runs that share one buffer of zeros, of which only what is copied takes memory."""

        def read_runs(self, shard: int, runs: np.ndarray, **columns: bool) -> list[pa.RecordBatch]:
            return [self.run(number) for number in runs.tolist()]

        def run_bytes(self, shard: int, runs: np.ndarray, **columns: bool) -> np.ndarray:
            return np.zeros(len(runs), np.int64)

        def run(self, number: int) -> pa.RecordBatch:
            offsets = np.array([0, number + 1, 600 * 2**20], np.int32)
            image = pa.Array.from_buffers(pa.binary(), 2, [None, pa.py_buffer(offsets), pa.py_buffer(pixels)])
            return pa.record_batch({"image": image, "number": pa.array([10 * number, 10 * number + 1])})

    pixels = np.zeros(600 * 2**20, np.uint8)
    runs = np.array([3, 0, 4, 1, 2, 0])
    reader = RowReader(Images(), vectors=False, cache_bytes=None)  # type: ignore[arg-type]
    found = reader.read(np.zeros(6, int), runs, np.zeros(6, int))
    assert found["number"].to_pylist() == [30, 0, 40, 10, 20, 0]
    assert [len(image) for image in found["image"].to_pylist()] == [4, 1, 5, 2, 3, 1]


def test_rows_are_the_same_however_many_bytes_are_taken_from_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact, _ = build_shards(Folder(str(tmp_path)), SIZES)
    reader = ShardReader(artifact)
    index, random = reader.index, np.random.default_rng(0)
    piece = random.integers(0, len(index), 300)
    row = random.integers(0, index.rows[piece])
    run = index.first_run[piece] + row // index.run_rows
    rows = RowReader(reader, vectors=True, cache_bytes=None)
    whole = rows.read(index.shard[piece], run, row % index.run_rows)
    for limit in (1, 20_000, 100_000):
        monkeypatch.setattr(row_reader, "_PIECE_BYTES", limit)
        assert rows.read(index.shard[piece], run, row % index.run_rows).equals(whole)
