"""Signatures of texts, and the near copies that they find, against datasketch's own."""

from __future__ import annotations

import random

import numpy as np
import pytest
import xxhash
from datasketch import MinHash, MinHashLSH

from clusterbatch.corpus import minhash
from clusterbatch.corpus.minhash import PERMUTATIONS, NearIndex, signature, signatures
from clusterbatch.corpus.normalise import normalise

TEXTS = [
    "",
    " ",
    "one",
    "One  two",
    "one two three",
    "one two three four",
    "one two three one two three",
    "\u3000ｗｉｄｅ letters,\n\ttabs and  lines\u2028that are normalised ",
    "Größe, naïveté, ΐΰ and straße",
    "日本",
    "日本語の文章には空白がないので文字の並びで比べる。",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "half a \ud83d character of a pair",
    "\ud83d" * 30,
    "😀" * 30,
    "data:image/png;base64,iVBORw0KGgo=",
    "data:image/png;base64,iVBORw0KGgo",
    "x" * 300 + " " + "y" * 300 + " z" * 300,
]


def by_datasketch(text: str, kind: bytes) -> np.ndarray:
    """Return the signature as datasketch computes it, shingle by shingle."""
    folded = normalise(text)
    words = folded.split()
    if folded.startswith("data:image/png;base64,") and folded.endswith("="):
        shingles = [folded]
    elif len(folded) > 20 * len(words):
        shingles = [folded[start : start + 5] for start in range(max(1, len(folded) - 4))]
    else:
        shingles = [" ".join(words[start : start + 3]) for start in range(max(1, len(words) - 2))]
    found = MinHash(
        num_perm=PERMUTATIONS, scheme="affine32", hashfunc=lambda data: xxhash.xxh3_64_intdigest(data) & 0xFFFFFFFF
    )
    found.update_batch([kind + shingle.encode("utf-8", "surrogatepass") for shingle in shingles])
    return np.array(found.hashvalues, np.uint64)


@pytest.mark.parametrize("batch_characters", [1, 40, 2**18])
@pytest.mark.parametrize("kind", [b"", b"?"])
def test_signatures_are_datasketchs_however_texts_are_batched(
    monkeypatch: pytest.MonkeyPatch, kind: bytes, batch_characters: int
) -> None:
    monkeypatch.setattr(minhash, "_BATCH_CHARACTERS", batch_characters)
    numbers = random.Random(0)
    words = ["a", "of", "the", "Boat", "harbour", "網", "évènement", "x" * 40]
    texts = [*TEXTS, *(" ".join(numbers.choices(words, k=numbers.randrange(60))) for _ in range(200))]
    numbers.shuffle(texts)
    expected = np.stack([by_datasketch(text, kind) for text in texts])
    np.testing.assert_array_equal(signatures(texts, kind), expected)
    np.testing.assert_array_equal(signature(texts[0], kind), expected[0])
    assert signatures([], kind).shape == (0, PERMUTATIONS)


def test_all_white_space_is_one_space() -> None:
    spaces = [chr(code) for code in range(0x110000) if chr(code).isspace()]
    assert len(spaces) > 20
    for space in spaces:
        for text in (f"a{space}b", f"{space}a{space}{space}b{space}", f" a {space}b ", f"a{space} b"):
            assert normalise(text) == "a b", ascii(text)


def test_similarity_is_estimated_about_right() -> None:
    numbers = random.Random(3)
    words = [f"word{numbers.randrange(10_000)}" for _ in range(400)]
    changed = words[:380] + ["other"] * 20
    # 378 of 400 + 18 triples are common.
    estimate = float(np.mean(signature(" ".join(words)) == signature(" ".join(changed))))
    assert abs(estimate - 378 / 402) < 0.12
    text, other = (
        "日本語の文章には空白がないので文字の並びで比べる。",
        "まったく別の文章であり、似ているところはほとんどない。",
    )
    index = NearIndex(np.array([signature(3 * text)]), 0.8)
    assert index.near([3 * text + "はい", 3 * other]).tolist() == [True, False]
    assert index.near([]).tolist() == []


def of_library(text: str) -> MinHash:
    found = MinHash(num_perm=PERMUTATIONS)
    found.hashvalues = signature(text)
    return found


def test_near_copies_are_those_that_an_index_of_datasketch_finds() -> None:
    random = np.random.default_rng(0)
    known = [" ".join(map(str, random.integers(0, 400, 60))) for _ in range(200)]
    texts = [*known[:20], *(" ".join(map(str, random.integers(0, 400, 60))) for _ in range(50))]
    for text in known[20:120]:
        words = np.array(text.split())
        changed = random.choice(60, random.integers(1, 8), replace=False)
        words[changed] = random.integers(400, 500, len(changed))
        texts.append(" ".join(words))
    index = MinHashLSH(threshold=0.8, num_perm=PERMUTATIONS, weights=(0.1, 0.9))
    of_known = [of_library(text) for text in known]
    for number, one in enumerate(of_known):
        index.insert(number, one)
    expected = []
    for text in texts:
        one = of_library(text)
        expected.append(any(one.jaccard(of_known[number]) >= 0.8 for number in index.query(one)))
    assert 20 < sum(expected) < len(texts) - 50
    assert NearIndex(np.array([signature(text) for text in known]), 0.8).near(texts).tolist() == expected
