"""Masks of bench_grid: those of clusterbatch, by its own functions, of batches of rows in memory.

Legend: N pairs of the corpus, B rows of a batch, D dimensions of the teacher's vectors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from clusterbatch.batches.loader import TeacherScores
from clusterbatch.clustering.features import unit_length
from clusterbatch.config import MaskConfig, TrainConfig
from clusterbatch.encoder.devices import inference_dtype
from clusterbatch.encoder.load import load_encoder
from clusterbatch.encoder.resolve import resolve_model
from clusterbatch.scoring.candidates import find_candidates
from clusterbatch.shards.index import LAYERS
from clusterbatch.shards.semantic_duplicates import near_rows
from clusterbatch.store.tables import vector_column
from clusterbatch.training.collectives import World, gather_batch
from clusterbatch.training.masks import NEGATIVE, Relation
from tests.benchmarks.static_trainer import Corpus, Pairs
from tests.training.batches import plain_batch

# masked: documents that the surrogate scores near or above the query's own; teacher, guided: those that the teacher
# does, guided without a margin; ranks: the three that it scores highest; distinct: semantic duplicates of the row;
# apart: the same, and batches keep them apart.
MASKS = {
    "masked": MaskConfig(surrogate_margin=-0.05, surrogate_relative=True),
    "teacher": MaskConfig(teacher_margin=-0.05, teacher_relative=True),
    "guided": MaskConfig(teacher_margin=0.0),
    "ranks": MaskConfig(teacher_ranks=3),
    "distinct": MaskConfig(),
    "apart": MaskConfig(),
}
_DUPLICATES = ("distinct", "apart")
# Those of the package's configuration (score.nearest), and of bench_duplicates.
NEAREST, THRESHOLD = 10, 0.95


@dataclass(frozen=True)
class Known:
    """Facts about the N pairs beside their vectors and hashes.

    scores: a teacher's, of schema.scores_schema; duplicate_group: (N,), equal in semantic duplicates.
    """

    scores: pa.Table | None = None
    duplicate_group: np.ndarray | None = None


class RowFacts:
    """Facts that masks need of a corpus' rows, for clusters of each size; vectors of MiniLM are kept below `folder`.

    labels: gives the (N,) cluster numbers inside each source for clusters of so many rows.
    """

    def __init__(self, corpus: Corpus, folder: Path, labels: Callable[[int], np.ndarray]) -> None:
        self._corpus, self._folder, self._labels = corpus, folder, labels
        self._scores, self.duplicates = cache(self._find_scores), cache(self._find_duplicates)

    def known(self, mask: str, size: int) -> Known:
        """Return what the mask of that name needs to know, with clusters of `size` rows."""
        if mask in _DUPLICATES:
            return Known(duplicate_group=self.duplicates(size)[0])
        return Known(self._scores(size) if MASKS[mask].needs_teacher else None)

    def _find_duplicates(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Return groups of semantic duplicates in clusters of `size` rows, and the layer of each row, both (N,)."""
        group, rank = duplicate_groups(self._corpus.pairs, self._cells(size))
        return group, rank.clip(max=LAYERS - 1)

    def _find_scores(self, size: int) -> pa.Table:
        return teacher_scores(self._corpus.pairs, self._cells(size), *self._teacher())

    def _cells(self, size: int) -> np.ndarray:
        """Return (N,) int64, a number for each cluster of each source."""
        labels, source = self._labels(size), np.unique(self._corpus.source, return_inverse=True)[1]
        return source * (labels.max() + 1) + labels

    def _teacher(self) -> np.ndarray:
        """Return (2, N, D) float32, MiniLM's vectors of queries and documents."""
        kept = self._folder / f"{self._corpus.name}.npy"
        if not kept.exists():
            kept.parent.mkdir(parents=True, exist_ok=True)
            dtype = inference_dtype("auto", torch.device("cpu"))
            encoder = load_encoder(resolve_model("all-MiniLM-L6-v2"), "backbone", dtype=dtype, packed=True)
            sides = [
                encoder.encode(encoder.tokenizer.surrounded([of[row].tolist() for row in range(len(of))]), 2048)
                for of in (self._corpus.pairs.query, self._corpus.pairs.document)
            ]
            np.save(kept, np.stack(sides))
        found: np.ndarray = np.load(kept)
        return found


def teacher_scores(
    pairs: Pairs, cluster: np.ndarray, query: np.ndarray, document: np.ndarray, nearest: int = NEAREST
) -> pa.Table:
    """Return (N,) rows of schema.scores_schema, as the stage `score` makes them.

    cluster: (N,) int64, a number for each cluster of each source; query, document: (N, D) unit vectors of a teacher.
    """
    order = np.argsort(cluster, kind="stable")
    # Texts take no part in the choice: here they are numbers of rows.
    number = pa.array([str(row) for row in order.tolist()])
    runs = {f"{side}_hash": pa.array(getattr(pairs, f"{side}_hash")[order]) for side in ("query", "document")}
    runs |= {
        f"{side}_vector": vector_column(getattr(pairs, f"{side}_vector")[order].astype(np.float16))
        for side in ("query", "document")
    }
    text = pa.table({"query": number, "document": number})
    windows = np.unique(cluster, return_counts=True)[1].tolist()
    candidates = find_candidates(pa.table(runs), text, windows, nearest)
    asked, read, pair_of_entry = candidates.pairs()
    asked_rows, read_rows = (np.array(rows, np.int64) for rows in (candidates.queries, candidates.documents))
    scores = np.einsum("pd,pd->p", query[asked_rows[asked]], document[read_rows[read]]).astype(np.float32)
    return candidates.table(scores[pair_of_entry]).take(pa.array(np.argsort(order))).combine_chunks()


def duplicate_groups(pairs: Pairs, cluster: np.ndarray, threshold: float = THRESHOLD) -> tuple[np.ndarray, np.ndarray]:
    """Return (N,) the first row of each row's group of semantic duplicates, and (N,) how many of it come before."""
    group, rank = np.arange(len(cluster)), np.zeros(len(cluster), np.int64)
    query, document = unit_length(pairs.query_vector), unit_length(pairs.document_vector)
    for number in np.unique(cluster).tolist():
        rows = np.flatnonzero(cluster == number)
        found = near_rows(query[rows], document[rows], threshold)
        group[rows], rank[rows] = rows[found.group], found.rank
    return group, rank


def kept(pairs: Pairs, rows: np.ndarray, mask: MaskConfig, known: Known) -> np.ndarray:
    """Return (B, B) bool, the documents of the batch that are negatives of each query; rows: (B,) of the batch."""
    none = pairs.query.take(rows)
    batch = replace(
        plain_batch(0, none, none),
        query_hash=pairs.query_hash[rows],
        document_hash=pairs.document_hash[rows],
        query_vector=pairs.query_vector[rows],
        document_vector=pairs.document_vector[rows],
        teacher=None if known.scores is None else _of_rows(known.scores, rows),
        duplicate_group=None if known.duplicate_group is None else known.duplicate_group[rows],
    )
    facts = gather_batch(batch, World(), torch.device("cpu"), TrainConfig(mask=mask)).facts
    every = slice(0, len(rows))
    relation = Relation(mask, facts).block(every, every, torch.zeros(len(rows), len(rows)))
    return (relation == NEGATIVE).numpy()


def kept_of_batches(pairs: Pairs, batches: np.ndarray, mask: MaskConfig, known: Known) -> tuple[np.ndarray, float]:
    """Return (steps, B, B) bool, `kept` of each batch, and the share of the other rows' documents that the mask leaves
    out beyond those of rows with the same text."""
    found = np.stack([kept(pairs, rows, mask, known) for rows in batches])
    query, document = pairs.query_hash[batches], pairs.document_hash[batches]
    same = (query[:, :, None] == query[:, None]) | (document[:, :, None] == document[:, None])
    rows = batches.shape[1]
    return found, float((~found & ~same).sum() / (len(batches) * rows * (rows - 1)))


def _of_rows(scores: pa.Table, rows: np.ndarray) -> TeacherScores:
    taken = scores.take(pa.array(rows))
    documents, values = (taken[name].combine_chunks() for name in ("teacher_document", "teacher_score"))
    counts = documents.value_lengths().to_numpy()
    positive = taken["teacher_positive"].to_numpy()
    return TeacherScores(positive, counts, documents.flatten().to_numpy(), values.flatten().to_numpy())
