"""Vectors that came with the corpus become embeddings without a model."""

from __future__ import annotations

from pathlib import Path

from clusterbatch.corpus.ingest import ingest
from clusterbatch.embedding.stage import embed
from clusterbatch.store.tables import read_parquet
from clusterbatch.store.workspace import Workspace
from tests.corpus.test_ingest import configuration, corpus_rows, write_lines


def test_embeddings_are_the_vectors_of_the_corpus(tmp_path: Path, in_process: None) -> None:
    rows = [{"query": f"q {n}", "document": f"d {n}", "v": [float(n), 1.0]} for n in range(300)]
    config = configuration(
        tmp_path, [write_lines(tmp_path / "x.jsonl", rows)], columns={"vector": "v"}, row_group_rows=64
    )
    corpus = corpus_rows(config, ingest(config))
    manifest = embed(config)
    assert manifest.details["dimensions"] == 2
    assert manifest.counts.written == 300
    folder = Workspace(config).embeddings().folder
    found = [row for part in manifest.parts for row in read_parquet(folder, part.path).to_pylist()]
    names = ("pair_id", "source", "query_vector", "document_vector")
    assert found == [{name: row[name] for name in names} for row in corpus]
    assert embed(config).created == manifest.created
