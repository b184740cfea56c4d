"""Prediction from vectors alone: structure pays, none does not, and the figures are what they say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from clusterbatch.experiments.predict.batch_figures import (
    BatchFigures,
    Sample,
    batch_figures,
    overall,
    predict_group,
    verdict_of,
)
from tests.clustering.embedded import blobs

BATCH = {"batch": 64, "temperature": 0.05, "mask_share": 0.95}


def _sample(documents: np.ndarray, repeats: int = 1) -> Sample:
    random = np.random.default_rng(1)
    query = documents + 0.3 * random.standard_normal(documents.shape) / np.sqrt(documents.shape[1])
    query = (query / np.linalg.norm(query, axis=1, keepdims=True)).astype(np.float32)
    hashes = np.arange(len(documents), dtype=np.uint64)
    return Sample(query, documents.astype(np.float32), hashes, hashes // np.uint64(repeats))


def _group(sample: Sample, rows: int = 20_000, sizes: tuple[int, ...] = (1024, 2048)) -> dict[str, Any]:
    return predict_group(sample, rows, sample.document, sizes, seed=0, **BATCH)


def test_figures_are_means_over_pairs_of_one_label() -> None:
    documents, label = blobs(60, 3, 8, seed=2)
    sample = _sample(documents)
    found = batch_figures(sample, label, **BATCH)
    scores, same = sample.query @ sample.document.T, label[:, None] == label[None, :]
    np.fill_diagonal(same, False)
    own = np.diagonal(scores)[:, None]
    assert found.hardness == pytest.approx(scores[same].mean(), abs=1e-5)
    assert found.false_negatives == pytest.approx((scores >= own)[same].mean(), abs=1e-6)
    masked = same & (scores > 0.95 * own)
    assert found.masked == pytest.approx(masked.sum() / same.sum(), abs=1e-6)
    mean = (np.exp((scores - own) / 0.05) * (same & ~masked)).sum(axis=1) / same.sum(axis=1)
    assert found.difficulty == pytest.approx(np.log1p(63 * mean).mean(), rel=1e-4)
    equal = same & (sample.document @ sample.document.T >= 0.95)
    assert found.copies == pytest.approx((63 * equal.sum(axis=1) / same.sum(axis=1)).mean(), rel=1e-4)


def test_a_source_with_topics_gains_and_one_without_does_not() -> None:
    topics, _ = blobs(1500, 16, 24, seed=3, spread=0.5)
    plain = np.random.default_rng(4).standard_normal((1500, 192)).astype(np.float32)
    plain /= np.linalg.norm(plain, axis=1, keepdims=True)
    with_topics, without = _group(_sample(topics)), _group(_sample(plain))
    assert verdict_of(with_topics)[0] == "harder"
    assert verdict_of(without)[0] == "not harder"
    assert verdict_of(with_topics)[1] > verdict_of(without)[1]
    # A finer cut is harder.
    hardness = [with_topics["clusters"][size]["hardness"] for size in ("2048", "1024")]
    assert with_topics["source"]["hardness"] < hardness[0] < hardness[1]


def test_near_copies_are_those_of_a_batch_not_of_the_source() -> None:
    """Every document has seven others that say nearly the same, under hashes of their own."""
    topics, _ = blobs(200, 16, 24, seed=3, spread=0.5)
    random = np.random.default_rng(5)
    copied = np.repeat(topics, 8, axis=0)
    copied += 0.05 * random.standard_normal(copied.shape) / np.sqrt(copied.shape[1])
    copied /= np.linalg.norm(copied, axis=1, keepdims=True)
    found = _group(_sample(copied.astype(np.float32)))
    # 63 others are drawn of 1,599 rows of the sample, seven of which are copies.
    assert found["source"]["copies"] == pytest.approx(63 * 7 / 1599, rel=0.4)
    # A cluster of about 1,024 of the 20,000 rows has all copies of its documents.
    assert found["clusters"]["1024"]["copies"] > 5 * found["source"]["copies"]


def test_what_cannot_be_known_is_said() -> None:
    topics, _ = blobs(300, 16, 24, seed=3)
    # 300 rows of 20,000 are too few for twenty clusters.
    found = _group(_sample(topics), sizes=(1024,))
    assert found["too_small"] == [1024]
    assert verdict_of(found)[0] == "cannot tell"
    assert verdict_of(_group(_sample(topics), rows=300))[0] == "unsuitable"


@pytest.mark.parametrize(
    ("rows", "sizes", "outcome"),
    [
        # As large as a batch: no clusters of it fill two.
        (1024, (256, 512), "unsuitable"),
        # Larger clusters might be harder, but are not among the sizes.
        (20_000, (256, 512, 1024), "cannot tell"),
    ],
)
def test_clusters_hardly_larger_than_a_batch_get_no_credit(rows: int, sizes: tuple[int, ...], outcome: str) -> None:
    topics, _ = blobs(1024, 16, 24, seed=3, spread=0.5)
    sample = _sample(topics)
    found = predict_group(sample, rows, sample.document, sizes, seed=0, **{**BATCH, "batch": 1024})
    assert found["clusters"] == {}
    assert found["below_batch"] == sorted(sizes, reverse=True)
    verdict, gain, why = verdict_of(found)
    assert (verdict, gain) == (outcome, 0.0)
    assert "hardly larger than a batch" in why
    assert ("predict.sizes" in why) == (outcome == "cannot tell")


def test_a_source_of_repeats_is_sent_back() -> None:
    topics, _ = blobs(1500, 16, 24, seed=3)
    found = _group(_sample(topics, repeats=2))
    assert found["duplicates"] == pytest.approx(0.5)
    outcome, _, why = verdict_of(found)
    assert outcome == "unsuitable"
    assert "duplicates" in why


def test_no_word_of_paying_comes_before_training() -> None:
    topics, _ = blobs(1500, 16, 24, seed=3, spread=0.5)
    figures = {"one": _group(_sample(topics)), "two": _group(_sample(topics, repeats=2))}
    for group in figures.values():
        group["verdict"], group["gain"], group["why"] = verdict_of(group)
        assert "pay" not in f"{group['verdict']} {group['why']}"
    answer = overall(figures, BatchFigures(0, 0, 0, 0.5, 0))["answer"]
    assert "pay" not in answer


def test_the_corpus_is_judged_by_rows() -> None:
    def group(rows: int, verdict: str, gain: float) -> dict[str, Any]:
        return {"rows": rows, "verdict": verdict, "gain": gain, "source": {"difficulty": 1.0}}

    mixed = BatchFigures(0, 0, 0, 0.5, 0)
    mostly = overall({"a": group(900, "harder", 0.5), "b": group(100, "not harder", 0.0)}, mixed)
    assert "harder in sources that hold 90%" in mostly["answer"]
    assert mostly["gain"] == pytest.approx(0.45)
    hardly = overall({"a": group(100, "harder", 0.5), "b": group(900, "not harder", 0.0)}, mixed)
    assert "hardly" in hardly["answer"]
    assert "Cannot tell" in overall({"a": group(10, "cannot tell", 0.0)}, mixed)["answer"]
