"""Where rows go: buckets, cells, packing order, bounds; and how stored vectors and names come out."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clusterbatch.clustering.cells import apportion, first_level, second_level
from clusterbatch.clustering.features import projection
from clusterbatch.clustering.packing_order import merge_upward, packing_order
from clusterbatch.corpus.partitions import Partitions
from clusterbatch.embedding.vectors import SIDES, vector_column, vector_values
from clusterbatch.shards.bucket_plan import plan_buckets
from clusterbatch.shards.cluster_facts import count_terms, naming_terms
from clusterbatch.shards.layout import VectorEncoder, VectorFormat, squared_errors
from clusterbatch.shards.size_bounds import merge_small, split_large
from tests.clustering.embedded import blobs
from tests.clustering.test_assign import unit

RANDOM = np.random.default_rng(3)

sizes_lists = st.lists(st.lists(st.integers(0, 5000), min_size=1, max_size=30), min_size=1, max_size=5)


@settings(max_examples=60, deadline=None)
@given(groups=sizes_lists, shard_bytes=st.integers(200, 4000), outliers=st.sampled_from([0.0, 0.1]))
def test_buckets_follow_bytes_and_keep_clusters_in_order(
    groups: list[list[int]], shard_bytes: int, outliers: float
) -> None:
    plan = plan_buckets([np.array(group, float) for group in groups], shard_bytes, outliers)
    sizes = np.concatenate(groups)
    random = np.random.default_rng(0)
    cluster = np.repeat(np.arange(len(sizes)), 50)
    hashes = random.integers(0, 2**64, len(cluster), dtype=np.uint64)
    far = random.random(len(cluster)) < 0.2
    bucket = plan.of_rows(cluster, hashes, far)
    assert bucket.min() >= 0
    assert bucket.max() < max(plan.buckets, 1)
    if outliers and sizes.sum():
        assert np.all(bucket[far] >= plan.cluster_buckets)
        bucket, cluster, hashes = bucket[~far], cluster[~far], hashes[~far]
    order = np.lexsort((hashes, cluster))
    assert np.all(np.diff(bucket[order]) >= 0)
    for size, parts, first in zip(sizes, plan.pieces, plan.first, strict=True):
        assert size <= 1.25 * shard_bytes * parts
        if parts > 1:
            assert np.count_nonzero(plan.first == first) == 1
    filled = np.bincount(plan.first[plan.pieces == 1], sizes[plan.pieces == 1], minlength=1)
    assert filled.max() <= 1.25 * shard_bytes


@given(total=st.integers(1, 500), shares=st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_apportioned_clusters_sum_to_the_total(total: int, shares: list[float]) -> None:
    weights = np.array(shares) + 1e-3
    total = max(total, len(weights))
    found = apportion(total, weights)
    assert found.sum() == total
    assert found.min() >= 1
    assert np.all(np.abs(found - 1 - weights / weights.sum() * (total - len(weights))) < 1)


def test_cells_of_two_levels_want_the_sample_of_the_fine_clusters() -> None:
    groups = Partitions(["a", "b"], np.array([1_000_000, 500]), np.array([10_000, 1]))
    coarse = np.array([100, 0])
    first = first_level(groups, coarse, 256)
    assert first.clusters.tolist() == [100]
    assert first.share[0] == pytest.approx(100 * 256 / 1_000_000)
    second = second_level(groups, {0: np.full(100, 0.01)}, 64)
    assert second.clusters.sum() == 10_000
    np.testing.assert_allclose(second.share, 0.64)
    assert second.first_of_partition(2).tolist() == [0, -1]


def test_a_coarse_cluster_without_rows_does_not_decide_on_the_sample() -> None:
    groups = Partitions(["a"], np.array([100_000]), np.array([16]))
    cells = second_level(groups, {0: np.array([0.0, 0.25, 0.75])}, 64)
    np.testing.assert_allclose(cells.share, 16 * 64 / 100_000)
    assert cells.sampled[0] == 0
    assert cells.sampled.sum() == pytest.approx(16 * 64)


@pytest.mark.parametrize("count", [1, 2, 3, 40, 5000])
def test_the_packing_order_is_a_permutation_of_near_steps(count: int) -> None:
    centroids = unit(count, 6, 0)
    order = packing_order(centroids, np.ones(count))
    assert sorted(order.tolist()) == list(range(count))
    if count >= 40:
        steps = np.einsum("kd,kd->k", centroids[order[:-1]], centroids[order[1:]])
        shuffled = np.einsum("kd,kd->k", centroids[:-1], centroids[1:])
        assert steps.mean() > shuffled.mean() + 0.4


def test_a_fine_fit_merged_upward_finds_the_coarse_clusters() -> None:
    centroids, label = blobs(400, 8, 24, seed=0, spread=0.3)
    merged, coarse = merge_upward(centroids, np.ones(400), 8)
    assert coarse.shape == (8, 24)
    assert len(set(zip(label.tolist(), merged.tolist(), strict=True))) <= 9


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.integers(1, 100), min_size=1, max_size=25), groups=st.integers(1, 4), min_size=st.integers(1, 120)
)
def test_small_clusters_join_a_neighbour_of_their_group(rows: list[int], groups: int, min_size: int) -> None:
    sizes, group = np.array(rows), np.sort(np.arange(len(rows)) % groups)
    merged = merge_small(sizes, unit(len(rows), 4, 0), group, min_size)
    assert np.all(np.diff(merged) >= 0)
    assert np.all(np.diff(merged) <= 1)
    for number in np.unique(merged):
        members = merged == number
        assert len(set(group[members].tolist())) == 1
        total = sizes[members].sum()
        assert total >= min_size or total == sizes[group == group[members][0]].sum()
    assert np.all(np.bincount(merged)[merged[sizes >= min_size]] >= 1)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.integers(1, 100), min_size=1, max_size=25), groups=st.integers(1, 4), min_size=st.integers(1, 120)
)
def test_small_clusters_are_joined_smallest_first(rows: list[int], groups: int, min_size: int) -> None:
    sizes, group = np.array(rows), np.sort(np.arange(len(rows)) % groups)
    means = unit(len(rows), 4, 0)
    members = [[number] for number in range(len(rows))]

    def total(one: list[int]) -> int:
        return int(sizes[one].sum())

    def cosine(one: list[int], other: list[int]) -> float:
        sums = [sizes[each].astype(float) @ means[each] for each in (one, other)]
        return float(sums[0] @ sums[1] / np.prod([np.linalg.norm(each) for each in sums]))

    while True:
        pairs = [
            (place, other)
            for place in range(len(members))
            for other in (place - 1, place + 1)
            if 0 <= other < len(members)
            and group[members[other][0]] == group[members[place][0]]
            and total(members[place]) < min_size
        ]
        if not pairs:
            break
        chosen = min((total(members[place]), place) for place, _ in pairs)[1]
        other = max(pairs, key=lambda pair: (pair[0] == chosen, cosine(members[pair[0]], members[pair[1]])))[1]
        left, right = sorted((chosen, other))
        members[left] += members.pop(right)
    expected = np.repeat(np.arange(len(members)), [len(each) for each in members])
    np.testing.assert_array_equal(merge_small(sizes, means, group, min_size), expected)


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 400), max_size=st.integers(1, 120))
def test_large_clusters_are_split_into_equal_parts(rows: int, max_size: int) -> None:
    part = split_large(rows, max_size, lambda: unit(rows, 5, 1))
    counts = np.bincount(part)
    assert counts.max() <= max_size
    assert counts.max() - counts.min() <= 1 + np.log2(len(counts))
    assert len(counts) == -(-rows // max_size)


def test_a_split_keeps_what_is_alike_together() -> None:
    vectors, label = blobs(400, 2, 16, seed=1, spread=0.2)
    order = np.argsort(label, kind="stable")[: 2 * min(np.bincount(label))]
    half = np.bincount(label).min()
    chosen = np.concatenate([np.flatnonzero(label == 0)[:half], np.flatnonzero(label == 1)[:half]])
    part = split_large(len(order), half, lambda: vectors[chosen])
    assert len(set(zip(label[chosen].tolist(), part.tolist(), strict=True))) == 2


def stored(kind: str, dimensions: int, full: int = 64) -> tuple[VectorFormat, pa.Table, pa.RecordBatch]:
    table = pa.table(
        {
            f"{side}_vector": vector_column(blobs(500, 5, full, seed, 0.5)[0].astype(np.float16))
            for seed, side in enumerate(("query", "document"))
        }
    )
    layout = VectorFormat(dimensions, kind)  # type: ignore[arg-type]
    return layout, table, VectorEncoder(layout, seed=0).encode(table)


@pytest.mark.parametrize(
    ("kind", "dimensions", "limit"), [("float16", 64, 1e-6), ("int8", 64, 0.01), ("int8", 48, 0.2)]
)
def test_stored_vectors_keep_cosines_within_the_reported_error(kind: str, dimensions: int, limit: float) -> None:
    layout, table, batch = stored(kind, dimensions)
    assert batch.schema == layout.schema
    assert batch.nbytes == batch.num_rows * layout.row_bytes
    assert squared_errors(layout, batch, table).mean() ** 0.5 < limit


@pytest.mark.parametrize(("kind", "dimensions"), [("float16", 64), ("int8", 64), ("int8", 48)])
def test_vectors_are_stored_block_by_block(kind: str, dimensions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layout, table, whole = stored(kind, dimensions)
    of_whole = squared_errors(layout, whole, table)
    monkeypatch.setattr("clusterbatch.shards.layout._BLOCK_ROWS", 7)
    encoder = VectorEncoder(layout, seed=0)
    blocks = encoder.encode(table)
    if dimensions == 64:
        assert blocks.equals(whole)
    for block, column in zip(layout.decode(blocks), layout.decode(whole), strict=True):
        np.testing.assert_allclose(vector_values(block), vector_values(column), atol=2e-3)
    np.testing.assert_allclose(squared_errors(layout, blocks, table), of_whole, atol=1e-4)
    assert encoder.encode(table.slice(0, 0)).num_rows == 0
    assert len(squared_errors(layout, blocks.slice(0, 1), table.slice(0, 1))) == 0


def test_storing_vectors_takes_little_beside_them() -> None:
    vectors = vector_column(RANDOM.standard_normal((60_000, 64), np.float32).astype(np.float16))
    table = pa.table({f"{side}_vector": vectors for side in SIDES})
    layout = VectorFormat(64, "int8")
    tracemalloc.start()
    try:
        squared_errors(layout, VectorEncoder(layout, seed=0).encode(table), table)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # What is stored, half of the vectors' bytes, and float32 copies of some thousand rows.
    assert peak < 1.3 * table.nbytes


def test_projections_are_orthonormal_and_pca_keeps_more() -> None:
    vectors, _ = blobs(2000, 6, 40, seed=0, spread=0.5)
    kept = {}
    for reduction in ("pca", "random"):
        matrix = projection(vectors, 8, reduction, seed=1)  # type: ignore[arg-type]
        np.testing.assert_allclose(matrix.T @ matrix, np.eye(8), atol=1e-5)
        kept[reduction] = np.linalg.norm(vectors @ matrix, axis=1).mean()
    assert kept["pca"] > kept["random"]


def test_clusters_are_named_by_the_words_that_only_they_have() -> None:
    texts = [
        ["the quarterly revenue and profit", "revenue of the company"],
        ["the proteins of the cell", "company of proteins and enzymes"],
        ["日本語の文章を分類する", "文章の分類と検索"],
        ["12 34", "the of and"],
    ]
    terms, counts = count_terms(texts)
    named = naming_terms(terms, counts)
    assert named[0][0] == "revenue"
    assert named[1][0] == "proteins"
    assert {"文章", "分類"} <= set(named[2])
    assert named[3] == []
