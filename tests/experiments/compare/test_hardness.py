"""How hard a batch is: the highest score of another row's document."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from clusterbatch.experiments.compare.hardness import _of_batch


def _batch(documents: list[int]) -> SimpleNamespace:
    vectors = np.eye(3, dtype=np.float32)
    hashes = np.array(documents, np.uint64)
    mixed = (vectors + 0.5 * np.roll(vectors, 1, axis=1)).astype(np.float32)
    return SimpleNamespace(
        query_vector=vectors,
        document_vector=mixed,
        query_hash=np.arange(3, dtype=np.uint64),
        document_hash=hashes,
    )


def test_hardness_is_that_of_the_nearest_other_document() -> None:
    assert _of_batch(_batch([1, 2, 3])) == pytest.approx(0.5)


def test_a_batch_of_one_repeated_document_has_no_negatives() -> None:
    assert _of_batch(_batch([1, 1, 1])) is None
