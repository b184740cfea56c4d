from __future__ import annotations

import math

import numpy as np
import pytest

from clusterbatch.evaluation.bm25 import LexicalIndex, words


def test_words_of_scripts_with_and_without_spaces():
    assert words("Wing-flow at Mach 2, it's <b>fast</b>") == [
        "wing",
        "flow",
        "at",
        "mach",
        "2",
        "it",
        "s",
        "b",
        "fast",
        "b",
    ]
    assert words("東大寺の仏像") == ["東大", "大寺", "寺の", "の仏", "仏像"]
    # Full-width letters are the same words, and mixed text is cut where the script changes.
    assert words("ＡＢＣとCafé") == ["abc", "と", "café"]


def test_words_keep_their_vowel_signs():
    assert words("हिन्दी भाषा") == ["हिन्दी", "भाषा"]
    assert words("தமிழ் மொழி") == ["தமிழ்", "மொழி"]
    assert words("العَرَبِيَّة") == ["العَرَبِيَّة"]
    # A mark on no letter is no word.
    assert words("\u2764\ufe0f love") == ["love"]


def test_documents_without_a_term_are_no_answers():
    assert LexicalIndex(["", "!!"]).search(["volcano"], 2).documents.tolist() == [[-1, -1]]


def test_scores_are_lucenes_formula():
    documents = ["red red car", "green car", "blue sky over the sea"]
    lengths = [3, 2, 5]
    mean = sum(lengths) / 3

    def weight(frequency: int, length: int, documents_with: int) -> float:
        idf = math.log(1 + (3 - documents_with + 0.5) / (documents_with + 0.5))
        return idf * frequency / (frequency + 0.9 * (1 - 0.4 + 0.4 * length / mean))

    found = LexicalIndex(documents).search(["red car"], 3)
    expected = [weight(2, 3, 1) + weight(1, 3, 2), weight(1, 2, 2)]
    assert found.documents.tolist() == [[0, 1, -1]]
    assert found.scores[0, :2] == pytest.approx(expected, rel=1e-5)
    assert np.isneginf(found.scores[0, 2])


def test_without_a_shared_word_there_is_no_answer():
    index = LexicalIndex(["one two", "three"])
    assert index.search(["four", "three"], 2, excluded=np.array([-1, 1])).documents.tolist() == [[-1, -1], [-1, -1]]
