from __future__ import annotations

import numpy as np
import pytest

from clusterbatch.embedding.char_ngrams import NgramSurrogate

_TOPICS = [
    "埼玉県は日本の関東地方に位置する県である。県庁所在地は{}番である。",
    "select {} from the table where the column is larger than the other column",
    "the patient was given {} milligrams of the drug and recovered within days",
]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [_TOPICS[number % 3].format(number) for number in range(150)]


def test_texts_that_look_alike_come_together(texts: list[str]) -> None:
    vectors = NgramSurrogate.fit(texts, 256).encode(texts, 256)
    similarity = vectors @ vectors.T
    same = np.arange(150)[:, None] % 3 == np.arange(150) % 3
    assert similarity[same].min() > similarity[~same].max()


def test_unit_vectors_also_of_texts_without_any_known_ngram(texts: list[str], awkward_texts: list[str]) -> None:
    vectors = NgramSurrogate.fit(texts, 64).encode(awkward_texts, 64)
    assert np.isfinite(vectors).all()
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_kept_as_numbers_alone(texts: list[str]) -> None:
    surrogate = NgramSurrogate.fit(texts, 256)
    again = NgramSurrogate.from_bytes(surrogate.to_bytes())
    assert np.array_equal(again.encode(texts, 256), surrogate.encode(texts, 256))
    assert b"pickle" not in surrogate.to_bytes()[:200]


def test_same_fit_every_time_and_texts_are_cut(texts: list[str]) -> None:
    first, second = NgramSurrogate.fit(texts, 256), NgramSurrogate.fit(texts, 256)
    assert first.to_bytes() == second.to_bytes()
    long = [texts[0], texts[0] + "another matter entirely " * 1000]
    cut = first.encode(long, len(texts[0]) // 4)
    assert np.allclose(cut[0], cut[1], atol=0.2)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_corpora_smaller_than_the_dimensions(count: int, texts: list[str]) -> None:
    vectors = NgramSurrogate.fit(texts[:count], 256).encode(texts, 256)
    assert vectors.shape[1] <= max(2, count)
    assert np.isfinite(vectors).all()
