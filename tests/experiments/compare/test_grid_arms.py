"""Batches of the study's arms: super-batches by its own vectors, and diverse batches."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

pytest.importorskip("numba", reason="the study's trainer is compiled (pip install '.[bench]')")

from clusterbatch.encoder.tokens import Tokens
from tests.benchmarks.grid_arms import EPOCHS, Arms, clusters_of, hardness
from tests.benchmarks.static_trainer import Corpus, Pairs

BATCH, TOPICS = 16, 24
# The last three are smaller than a batch, and share two batches.
ROWS = {"large": 500, "medium": 170, "small": 10, "smaller": 9, "tiny": 8}
SOURCE = np.repeat(list(ROWS), list(ROWS.values()))
ROW_COUNT = len(SOURCE)


@pytest.fixture(scope="module")
def arms(tmp_path_factory: pytest.TempPathFactory) -> Arms:
    """Pairs of a few topics; each has its own texts."""
    random, folder = np.random.default_rng(0), tmp_path_factory.mktemp("study")
    topics = random.standard_normal((TOPICS, 8))
    vectors = topics[random.integers(TOPICS, size=ROW_COUNT)] + 0.3 * random.standard_normal((2, ROW_COUNT, 8))
    vectors = (vectors / np.linalg.norm(vectors, axis=2, keepdims=True)).astype(np.float32)
    tokens, hashes = Tokens.from_lists([[0]] * ROW_COUNT, np.int32), np.arange(ROW_COUNT, dtype=np.uint64)
    corpus = Corpus("made-up", Pairs(tokens, tokens, hashes, hashes, *vectors), SOURCE, tokens, tokens, [])
    (folder / "read").mkdir()
    (folder / "read/made-up.pickle").write_bytes(pickle.dumps(corpus))
    return Arms(folder, "made-up")


def batches_of(arms: Arms, arm: str, seed: int = 0) -> np.ndarray:
    found = arms.batches(arm, BATCH, seed)
    assert found is not None
    return found


@pytest.mark.parametrize("arm", ["super-2x", "super-4x", "super-1024x", "diverse"])
def test_epochs_are_those_of_plain_batches(arms: Arms, arm: str) -> None:
    """As many steps, every row, no row twice in a batch, no batch of two sources that have batches of their own."""
    found = batches_of(arms, arm)
    assert found.shape == batches_of(arms, "source").shape
    of_batches = -(-np.array([ROWS["large"], ROWS["medium"], sum(list(ROWS.values())[2:])]) // BATCH)
    for epoch in np.split(found, EPOCHS):
        assert len(epoch) == of_batches.sum()
        assert set(epoch.ravel().tolist()) == set(range(ROW_COUNT))
        assert all(len(set(rows)) == BATCH for rows in epoch.tolist())
        whole = [set(SOURCE[rows].tolist()) for rows in epoch]
        assert [sum(names == {name} for names in whole) for name in ("large", "medium")] == of_batches[:2].tolist()
    drawn = [{frozenset(rows) for rows in epoch.tolist()} for epoch in np.split(found, EPOCHS)]
    assert len(drawn[0] & drawn[1]) < len(drawn[0]) / 10
    assert np.array_equal(found, batches_of(arms, arm))
    assert not np.array_equal(found, batches_of(arms, arm, seed=1))


def test_late_super_batches_follow_batches_of_sources(arms: Arms) -> None:
    found, plain, divided = (batches_of(arms, arm) for arm in ("super-late-4x", "source", "super-4x"))
    assert np.array_equal(np.split(found, EPOCHS)[0], np.split(plain, EPOCHS)[0])
    assert np.array_equal(np.split(found, EPOCHS)[1], np.split(divided, EPOCHS)[1])
    assert not np.array_equal(plain[0], divided[0])


def test_larger_super_batches_are_harder_and_diverse_batches_easier(arms: Arms) -> None:
    found = [
        np.mean([hardness(arms.corpus.pairs, batches_of(arms, arm, seed)) for seed in range(3)])
        for arm in ("diverse", "source", "super-2x", "super-4x")
    ]
    assert (np.diff(found) > 0.01).all()


def test_diverse_batches_take_its_share_of_every_cluster(arms: Arms) -> None:
    """Batches of a source differ by one row of a cluster, but for the rows that complete a batch."""
    labels = arms._labels_of_shares(BATCH)
    for name in ("large", "medium"):
        rows = np.flatnonzero(name == SOURCE)
        clusters, sizes = np.unique(labels[rows], return_counts=True)
        assert len(clusters) == BATCH
        batches = -(-len(rows) // BATCH)
        for batch in batches_of(arms, "diverse"):
            if not (SOURCE[batch] == name).all():
                continue
            counts = np.bincount(labels[batch], minlength=BATCH)
            least = sizes // batches
            assert (counts >= least).all()
            assert (counts - least - (sizes % batches > 0)).clip(min=0).sum() <= 1


def test_arms_that_a_corpus_has_too_few_rows_for(arms: Arms) -> None:
    assert ROW_COUNT / len(ROWS) < 2 * 8 * BATCH
    assert all(arms.batches(arm, BATCH, 0) is None for arm in ("cluster-8x", "random-groups-8x"))
    # A source that is smaller than a super-batch is one.
    for arm in ("random-groups-4x", "super-8x", "super-1024x"):
        assert arms.batches(arm, BATCH, 0) is not None


def test_super_batches_have_no_half(arms: Arms) -> None:
    with pytest.raises(ValueError, match="super-4x-half: super-batches exchange no rows"):
        arms.batches("super-4x-half", BATCH, 0)


def test_clusters_may_be_those_of_queries(arms: Arms) -> None:
    pairs, size = arms.corpus.pairs, 2 * BATCH
    for vectors, of in ((pairs.query_vector, "queries"), (pairs.document_vector, "own")):
        assert np.array_equal(arms.labels(size, of), clusters_of(arms.corpus, vectors, size))
    assert not np.array_equal(batches_of(arms, "cluster-2x"), batches_of(arms, "cluster-2x@queries"))


def test_super_batches_may_be_divided_by_other_vectors(arms: Arms) -> None:
    """By one side, or by both of a pretrained model, whose vectors are kept in the study's folder."""
    given = np.random.default_rng(1).standard_normal((ROW_COUNT, 4))
    given /= np.linalg.norm(given, axis=1, keepdims=True)
    kept = arms._folder / "minilm"
    kept.mkdir()
    for side in ("query", "document"):
        np.save(kept / f"made-up-{side}.npy", given.astype(np.float16))
    by_default = _crosswise(given, given, batches_of(arms, "super-4x"))
    assert _crosswise(given, given, batches_of(arms, "super-4x@minilm")) > by_default + 0.1
    by_trained = arms.batches("super-4x@trained", BATCH, 0, trained=lambda: (given, given))
    assert by_trained is not None
    assert _crosswise(given, given, by_trained) > by_default + 0.1
    pairs = arms.corpus.pairs
    queries, documents = pairs.query_vector, pairs.document_vector
    assert _crosswise(queries, queries, batches_of(arms, "super-4x@queries")) > _crosswise(
        queries, queries, batches_of(arms, "super-4x@documents")
    )
    assert _crosswise(documents, documents, batches_of(arms, "super-4x@documents")) > _crosswise(
        documents, documents, batches_of(arms, "super-4x@queries")
    )


def _crosswise(left: np.ndarray, right: np.ndarray, batches: np.ndarray) -> float:
    """Return the mean cosine of the rows of a batch with one another."""
    return float(np.mean([left[rows] @ right[rows].T for rows in batches]))


def test_super_batches_may_be_of_one_cluster_each(arms: Arms) -> None:
    labels, found = arms.labels(4 * BATCH, "own"), batches_of(arms, "super-cluster-4x")
    large = SOURCE == "large"
    sizes = np.bincount(labels[large])
    whole = [rows for rows in found if large[rows].all() and (sizes[labels[rows]] >= BATCH).all()]
    assert len(whole) > 2 * EPOCHS
    assert all(len(set(labels[rows].tolist())) == 1 for rows in whole)
