"""Corpora of the study that differ in how many pairs are trained on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

pytest.importorskip("numba", reason="the study's trainer is compiled (pip install '.[bench]')")

from tests.benchmarks import grid_corpora
from tests.benchmarks.static_trainer import Corpus


@pytest.mark.parametrize("name", ["tldr", "wordset-by-query"])
def test_sizes_of_a_corpus_differ_only_in_the_pairs_trained_on(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = np.arange(600)
    table = pa.table(
        {
            "query": [f"what is entry {number}" for number in numbers],
            "document": [f"entry {number} of the list, told at length" for number in numbers // 2],
            "source": ["list"] * len(numbers),
        }
    )
    monkeypatch.setattr(grid_corpora, "read_pairs", lambda path: table)
    monkeypatch.setattr(grid_corpora, "require_data_folder", lambda: tmp_path)
    monkeypatch.setattr(grid_corpora, "_QUERIES", 60)

    def read(size: str) -> Corpus:
        return grid_corpora.read_corpus(tmp_path, f"{name}:{size}")

    def trained(corpus: Corpus) -> set[tuple[int, int]]:
        return set(zip(corpus.pairs.query_hash.tolist(), corpus.pairs.document_hash.tolist(), strict=True))

    small, middle, whole = read("100"), read("300"), read("all")
    assert (len(trained(small)), len(trained(middle))) == (100, 300)
    assert trained(small) < trained(middle) < trained(whole)
    for each in (middle, whole):
        assert [row.tolist() for row in each.relevant] == [row.tolist() for row in small.relevant]
        assert np.array_equal(each.queries.values, small.queries.values)
        assert np.array_equal(each.documents.values, small.documents.values)
    assert len(small.relevant) >= 30
