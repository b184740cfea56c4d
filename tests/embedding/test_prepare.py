from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clusterbatch.config import EmbedConfig, RunConfig, StorageConfig
from clusterbatch.corpus.row_groups import row_groups_of
from clusterbatch.embedding.embedder import PreparedUnit, Preparer, UnitEmbedder
from clusterbatch.encoder.tokens import Tokens
from clusterbatch.hashing import first_of_each
from clusterbatch.store.workspace import Workspace
from tests.encoder.corpora import commit_corpus, corpus_table

_QUERIES = ["one two", "One  TWO ", "three", "埼玉県は日本", "one two"]
_DOCUMENTS = ["alpha", "beta", "alpha", "関東地方に位置", "gamma " * 500]
_SOURCES = ["english", "english", "english", "japanese", "english"]


def _prepare(folder: Path, **settings: object) -> PreparedUnit:
    config = RunConfig(workspace=str(folder))
    (unit,) = row_groups_of(commit_corpus(config, corpus_table(_QUERIES, _DOCUMENTS, _SOURCES)))
    return Preparer(Workspace(config).corpus, EmbedConfig(**settings), StorageConfig()).prepare(unit)  # type: ignore[arg-type]


@given(st.lists(st.integers(0, 9), max_size=50).map(lambda hashes: np.array(hashes, np.uint64)))
def test_first_of_each(hashes: np.ndarray) -> None:
    first, position = first_of_each(hashes)
    assert np.array_equal(hashes[first][position], hashes)
    assert first.tolist() == sorted({hashes.tolist().index(value) for value in hashes.tolist()})


def test_equal_texts_are_tokenised_once(minilm: str, tmp_path: Path) -> None:
    prepared = _prepare(tmp_path, model=minilm)
    assert prepared.texts["query"].text_of_row.tolist() == [0, 1, 2, 3, 0]
    assert len(prepared.texts["query"].inputs) == 4
    assert len(prepared.texts["document"].inputs) == 4
    assert prepared.rows["source"].to_pylist() == _SOURCES


def test_each_text_has_its_own_vector_even_if_another_differs_from_it_in_case_alone(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    queries = ["the quick fox", "THE QUICK FOX", "The Quick Fox"]
    config = RunConfig(
        workspace=str(tmp_path), embed=EmbedConfig(model=str(tiny("xlm-roberta")), device="cpu", dtype="float32")
    )
    (unit,) = row_groups_of(commit_corpus(config, corpus_table(queries, queries, ["english"] * 3)))
    embedder = UnitEmbedder(config)
    together = embedder.embed(unit).vectors["query"]
    alone = [embedder.embed(unit, rows=np.array([row])).vectors["query"][0] for row in range(3)]
    np.testing.assert_allclose(together.astype(float), np.stack(alone).astype(float), atol=2e-3)


def test_tokens_are_small_integers_cut_to_the_limit(minilm: str, tmp_path: Path) -> None:
    prepared = _prepare(tmp_path, model=minilm, max_tokens=20, document_prompt="the document: ")
    inputs = prepared.texts["document"].inputs
    assert inputs.type == pa.list_(pa.uint16())
    tokens = Tokens.from_arrow(inputs)
    assert tokens.lengths.max() == 20
    prompt = tokens[0][1:4]
    assert all(np.array_equal(tokens[row][1:4], prompt) for row in range(len(tokens)))


def test_unknown_tokens_are_counted_by_source_and_row(minilm: str, tmp_path: Path) -> None:
    unknown = _prepare(tmp_path, model=minilm).unknown
    assert unknown["english"][0] == 0
    # "one two" counts in each of its three rows.
    assert unknown["english"][1] == 3 * 2 + 1 + 1 + 1 + 1 + 254
    assert unknown["japanese"][0] / unknown["japanese"][1] > 0.02


def test_travels_to_another_process(minilm: str, tmp_path: Path) -> None:
    prepared = _prepare(tmp_path, model=minilm)
    copy = pickle.loads(pickle.dumps(prepared))
    assert copy.rows.equals(prepared.rows)
    assert copy.texts["query"].inputs.equals(prepared.texts["query"].inputs)


@pytest.mark.parametrize("model", ["char-ngrams"])
def test_a_model_without_tokens_gets_the_texts(model: str, tmp_path: Path) -> None:
    prepared = _prepare(tmp_path, model=model)
    assert prepared.texts["query"].inputs.to_pylist() == ["one two", "One  TWO ", "three", "埼玉県は日本"]
    assert prepared.unknown == {}
