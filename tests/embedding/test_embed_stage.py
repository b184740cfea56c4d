from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from clusterbatch.config import EmbedConfig, RunConfig
from clusterbatch.corpus.row_groups import row_groups_of
from clusterbatch.embedding.embedder import UnitEmbedder
from clusterbatch.embedding.stage import embed
from clusterbatch.embedding.workers import sample_texts
from clusterbatch.encoder.load import load_encoder
from clusterbatch.encoder.save import save_model
from clusterbatch.errors import DataError, UsageError
from clusterbatch.schema import embeddings_schema
from clusterbatch.store import Manifest
from clusterbatch.store.tables import read_parquet
from clusterbatch.store.workspace import Workspace
from tests.encoder.corpora import commit_corpus, corpus_table
from tests.in_process import run_in_process

_ROWS = 150


@pytest.fixture
def run(tmp_path: Path, tiny: Callable[[str], Path]) -> Callable[..., RunConfig]:
    """`run(key=value)`: a workspace with a corpus of 150 rows in three units, and what to embed it with."""
    queries = [f"the fox number {row % 50}" for row in range(_ROWS)]
    documents = [f"the lazy dog sleeps {'all day ' * (row % 20)}" for row in range(_ROWS)]
    sources = ["first" if row < 100 else "second" for row in range(_ROWS)]
    base = RunConfig(workspace=str(tmp_path))
    commit_corpus(base, corpus_table(queries, documents, sources), row_group_rows=50, part_rows=100)

    def config(**settings: Any) -> RunConfig:
        settings = {"model": str(tiny("bert")), "device": "cpu", "max_tokens": 32, **settings}
        return base.model_copy(update={"embed": EmbedConfig(**settings)})

    return config


def _vectors(config: RunConfig, manifest: Manifest) -> pa.Table:
    folder = Workspace(config).embeddings().folder
    return pa.concat_tables([read_parquet(folder, part.path) for part in manifest.parts])


def _matrix(column: pa.ChunkedArray) -> np.ndarray:
    column = column.combine_chunks()
    return column.flatten().to_numpy().reshape(len(column), -1)


def test_one_part_a_unit_in_the_corpus_order(run: Callable[..., RunConfig], in_process: None) -> None:
    config = run(workers=2)
    manifest = embed(config)
    corpus = Workspace(config).corpus
    units = row_groups_of(corpus.require())
    assert [part.rows for part in manifest.parts] == [unit.rows for unit in units] == [50, 50, 50]
    assert manifest.counts.read == manifest.counts.written == _ROWS
    table = _vectors(config, manifest)
    assert table.schema.equals(embeddings_schema(32))
    rows = pa.concat_tables([read_parquet(corpus.folder, part) for part in corpus.require().parts])
    assert table["pair_id"].to_pylist() == rows["pair_id"].to_pylist()
    encoder = load_encoder(config.embed.model)
    for side in ("query", "document"):
        tokens = encoder.tokenizer.encode(rows[side].to_pylist(), 32)
        cosines = (encoder.encode(tokens, 4096) * _matrix(table[f"{side}_vector"])).sum(axis=1)
        assert cosines.min() > 0.999


def test_second_run_does_nothing_and_another_model_is_refused(
    run: Callable[..., RunConfig], in_process: None, tiny: Callable[[str], Path]
) -> None:
    first = embed(run(workers=1))
    assert embed(run(workers=2)) == first
    other = run(model=str(tiny("distilbert")))
    with pytest.raises(UsageError, match="another configuration"):
        embed(other)
    assert embed(other, force=True).fingerprint != first.fingerprint


def test_tokenisers_ahead_of_the_workers_change_nothing(run: Callable[..., RunConfig], ray_local: None) -> None:
    config = run(workers=2)
    with pytest.MonkeyPatch.context() as patch:
        run_in_process(patch)
        alone = _vectors(config, embed(config))
    ahead = embed(run(workers=1, tokenizers=1), force=True)
    assert _vectors(config, ahead).equals(alone)


def test_vectors_that_are_not_kept_are_the_same(run: Callable[..., RunConfig], in_process: None) -> None:
    config = run(workers=1)
    kept = _vectors(config, embed(config))
    fused = run(persist=False)
    manifest = embed(fused, force=True)
    assert (manifest.parts, manifest.details["persisted"]) == ([], False)
    embedder = UnitEmbedder(fused)
    assert embedder.dimensions == 32
    units = row_groups_of(Workspace(fused).corpus.require())
    for side in ("query", "document"):
        vectors = np.concatenate([embedder.embed(unit).vectors[side] for unit in units])
        assert np.array_equal(vectors, _matrix(kept[f"{side}_vector"]))
    some = embedder.embed(units[1], rows=np.array([3, 40]), sides=("document",))
    assert set(some.vectors) == {"document"}
    expected = _matrix(kept["document_vector"])[[53, 90]]
    assert np.abs(some.vectors["document"].astype(np.float32) - expected).max() < 0.02


@pytest.mark.parametrize("persist", [True, False])
def test_surrogate_without_a_model(persist: bool, run: Callable[..., RunConfig], in_process: None) -> None:
    config = run(model="char-ngrams", persist=persist)
    manifest = embed(config)
    embedder = UnitEmbedder(config)
    unit = row_groups_of(Workspace(config).corpus.require())[0]
    vectors = embedder.embed(unit).vectors["document"]
    assert np.allclose(np.linalg.norm(vectors.astype(np.float32), axis=1), 1, atol=1e-2)
    if persist:
        assert np.array_equal(vectors, _matrix(_vectors(config, manifest)["document_vector"])[:50])


def test_sample_is_uniform_over_rows(run: Callable[..., RunConfig]) -> None:
    corpus = Workspace(run()).corpus
    units = row_groups_of(corpus.require())
    assert len(sample_texts(corpus, units, 1000)) == 2 * _ROWS
    few = sample_texts(corpus, units, 30)
    assert len(few) == 60
    assert few == sample_texts(corpus, units, 30) != sample_texts(corpus, units, 30, seed=1)


def test_a_vector_that_is_not_finite_fails_with_the_row(
    run: Callable[..., RunConfig], in_process: None, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    encoder = load_encoder(str(tiny("bert")))
    (day,) = encoder.tokenizer.encode(["day"]).values[1:-1][:1]
    with torch.no_grad():
        encoder.backbone.get_input_embeddings().weight[day] = float("inf")  # type: ignore[operator,union-attr]
    save_model(encoder, tmp_path / "broken")
    config = run(model=str(tmp_path / "broken"))
    with pytest.raises(DataError, match=r"row group 0, row 1 \(pair [0-9a-f]{32}\): the vector of its document"):
        embed(config)
    assert Workspace(config).embeddings().manifest() is None


@pytest.mark.parametrize("persist", [True, False])
def test_unknown_tokens_are_warned_of_by_source(
    persist: bool, tmp_path: Path, minilm: str, in_process: None, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = EmbedConfig(model=minilm, max_tokens=16, workers=1, persist=persist, device="cpu")
    config = RunConfig(workspace=str(tmp_path), embed=settings)
    commit_corpus(config, corpus_table(["one two", "埼玉県"], ["three", "関東地方に位置"], ["english", "japanese"]))
    manifest = embed(config)
    shares = manifest.details["unknown_share"]
    assert shares["english"] == 0
    assert shares["japanese"] > 0.02
    [line] = [line for line in capsys.readouterr().err.splitlines() if "are unknown" in line]
    assert line.startswith(f"embed: {100 * shares['japanese']:.1f} % of the tokens of source japanese are unknown to")
    assert manifest.details["dimensions"] == 384
