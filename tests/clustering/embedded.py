"""A workspace whose corpus and embeddings are there already, made without readers and models."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from clusterbatch.config import RunConfig
from clusterbatch.corpus.normalise import text_hashes
from clusterbatch.corpus.row_groups import PAIRS
from clusterbatch.schema import corpus_schema, embeddings_schema
from clusterbatch.store import Counts, Receipt
from clusterbatch.store.tables import write_parquet
from clusterbatch.store.workspace import Workspace
from tests.encoder.models import make_static

WORDS = ["river", "stone", "market", "engine", "garden", "theory", "winter", "signal", "bread", "voyage"]


def blobs(rows: int, centres: int, dimensions: int, seed: int, spread: float = 0.3) -> tuple[np.ndarray, np.ndarray]:
    """(rows, dimensions) unit vectors around `centres` random directions, and the (rows,) centre of each."""
    random = np.random.default_rng(seed)
    means = random.standard_normal((centres, dimensions))
    label = random.integers(0, centres, rows)
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    noise = random.standard_normal((rows, dimensions)) / np.sqrt(dimensions)
    vectors = means[label] + spread * noise
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32), label


def embedded_workspace(
    uri: str,
    rows: dict[str, int],
    *,
    centres: int = 6,
    dimensions: int = 16,
    parts: int = 2,
    row_group_rows: int = 256,
    optional: Sequence[str] = (),
    spread: float = 0.2,
    weightless: Sequence[str] = (),
    without_negatives: Sequence[str] = (),
    settings: dict[str, Any] | None = None,
) -> RunConfig:
    """Writes corpus and embeddings with `rows` per source, sources mixed; returns the run's configuration.

    spread: how far queries lie from their documents; weightless: sources whose rows all have weight 0;
    without_negatives: sources whose rows have no negatives.
    """
    settings = settings or {}
    train = {"model": str(_model()), **settings.get("train", {})}
    config = RunConfig.model_validate({"workspace": uri, **settings, "train": train})
    table, queries, documents = _rows(rows, centres, dimensions, optional, spread, weightless, without_negatives)
    workspace = Workspace(config)
    corpus_parts, embeddings_parts = [], []
    edges = np.linspace(0, table.num_rows, parts + 1).astype(int)
    for part in range(parts):
        start, stop = int(edges[part]), int(edges[part + 1])
        piece = table.slice(start, stop - start)
        corpus_parts.append(write_parquet(workspace.corpus, f"part-{part:05d}", piece, row_group_rows, role=PAIRS))
        for first in range(start, stop, row_group_rows):
            last = min(stop, first + row_group_rows)
            columns = [
                table["pair_id"][first:last].combine_chunks(),
                table["source"][first:last].combine_chunks(),
                *(
                    pa.FixedSizeListArray.from_arrays(pa.array(side[first:last].astype(np.float16).ravel()), dimensions)
                    for side in (queries, documents)
                ),
            ]
            vectors = pa.Table.from_arrays(columns, schema=embeddings_schema(dimensions))
            embeddings_parts.append(write_parquet(workspace.embeddings(), "unit", vectors))
    counts = Counts(read=table.num_rows, written=table.num_rows)
    for artifact, made, inputs, details in (
        (workspace.corpus, corpus_parts, {}, {"sources": rows}),
        (workspace.embeddings(), embeddings_parts, {"corpus": "given"}, {"dimensions": dimensions}),
    ):
        receipt = Receipt(unit=0, fingerprint="given", parts=made, counts=counts)
        artifact.commit("given", [receipt], config={}, inputs=inputs, seconds=0.0, details=details)
    return config


@cache
def _model() -> Path:
    """Return a static model of the corpus's words: every pass loads its tokenizer, and that of a real one is large."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return make_static([*WORDS, "what", "about", "not"], folder / "model")


def _rows(
    rows: dict[str, int],
    centres: int,
    dimensions: int,
    optional: Sequence[str],
    spread: float,
    weightless: Sequence[str],
    without_negatives: Sequence[str],
) -> tuple[pa.Table, np.ndarray, np.ndarray]:
    random = np.random.default_rng(7)
    source = random.permutation(np.repeat(list(rows), list(rows.values())))
    documents = np.empty((len(source), dimensions), np.float32)
    label = np.empty(len(source), np.int64)
    for number, name in enumerate(rows):
        of_source = source == name
        documents[of_source], label[of_source] = blobs(int(of_source.sum()), centres, dimensions, seed=number)
    noise = random.standard_normal(documents.shape) / np.sqrt(dimensions)
    queries = documents + spread * noise
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    columns: dict[str, Any] = {
        "pair_id": [f"{number:06d}" for number in range(len(source))],
        "query": [f"what about {WORDS[centre % 10]} {row}" for row, centre in enumerate(label)],
        "document": [f"about {WORDS[centre % 10]} " * int(1 + row % 5) for row, centre in enumerate(label)],
        "source": source,
    }
    for side in ("query", "document"):
        columns[f"{side}_hash"] = text_hashes(columns[side], len(source))
    if "negatives" in optional:
        columns["negatives"] = [
            [f"not {WORDS[row % 10]}"] * int(row % 3) if row % 4 and source[row] not in without_negatives else None
            for row in range(len(source))
        ]
    if "score" in optional:
        # Some of the first source have none.
        columns["score"] = [
            None if row % 9 == 4 and source[row] == next(iter(rows)) else float(row * 37 % 101) / 100
            for row in range(len(source))
        ]
    if "negative_scores" in optional:
        columns["negative_scores"] = [
            given and [float(row * 53 % 97 + place) / 100 for place in range(len(given))]
            for row, given in enumerate(columns["negatives"])
        ]
    if "weight" in optional:
        weights = np.where(np.isin(source, list(weightless)), 0, 1 + np.arange(len(source)) % 3)
        columns["weight"] = weights.astype(np.float32)
    if "document_id" in optional:
        # In every source the same ids.
        columns["document_id"] = [f"book {row % 7}" for row in range(len(source))]
    if "group" in optional:
        columns["group"] = [f"user-{centre % 3}" for centre in label]
    return pa.table(columns, schema=corpus_schema(optional)), queries, documents
