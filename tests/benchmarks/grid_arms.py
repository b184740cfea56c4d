"""Arms of bench_grid: the batches that each of them makes of a corpus in memory.

Legend: N pairs of the corpus, B rows of a batch.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from clusterbatch.batches.curriculum import make_plan
from clusterbatch.batches.samplers import index_labels
from clusterbatch.clustering.assign import Assigner
from clusterbatch.clustering.kmeans import FitSettings, fit
from clusterbatch.clustering.packing_order import packing_order
from clusterbatch.clustering.partial_sums import LocalRows
from clusterbatch.config import BatchesConfig
from clusterbatch.encoder.load import load_encoder
from clusterbatch.encoder.resolve import resolve_model
from clusterbatch.experiments.compare.hardness import spaced
from clusterbatch.shards.index import LAYERS
from tests.benchmarks.grid_corpora import TOKENS, load_corpus
from tests.benchmarks.grid_masks import MASKS, RowFacts
from tests.benchmarks.static_trainer import Corpus, Mask, Pairs

EPOCHS = 2
# Masks that the package does not have, by the surrogate. uncopied: documents near the query's own; skip: the four that
# score highest.
OTHER_MASKS = {"uncopied": Mask(copies=0.9), "skip": Mask(nearest=4)}


class Arms:
    """Batches of every arm on one corpus of the study in `folder`; clusters of each size are fitted once."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self.corpus = load_corpus(folder, name)
        self._labels: dict[tuple[int, str], np.ndarray] = {}
        self.facts = RowFacts(self.corpus, folder / "teacher", lambda size: self.labels(size, "own"))

    def labels(self, size: int, vectors: str) -> np.ndarray:
        """Return (N,) cluster numbers inside each source for clusters of `size` rows; vectors: own or minilm."""
        if (size, vectors) not in self._labels:
            own = self.corpus.pairs.document_vector if vectors == "own" else self._minilm()
            self._labels[size, vectors] = clusters_of(self.corpus, own, size)
        return self._labels[size, vectors]

    def batches(self, arm: str, batch: int, seed: int, most: int | None = None) -> np.ndarray | None:
        """Return (steps, B) rows of the run, or of `most` steps of it; None if the corpus has no such arm.

        STRATEGY[-TIMESx][-half][-MASK][@minilm]; times: batches that a cluster holds, rows of super-batches.
        """
        name, _, vectors = arm.partition("@")
        base, half, _ = name.partition("-half")
        base = base.removesuffix(f"-{mask_of(name)}")
        strategy, _, times = base.rpartition("-")
        if not times.endswith("x"):
            strategy, times = base, "4x"
        size, source = int(times[:-1]) * batch, self.corpus.source
        sources = len(np.unique(source))
        if strategy == "random" and sources == 1:
            return None
        if strategy == "super":
            return self._packed_batches(size, batch, seed)
        if strategy == "diverse":
            return self._diverse_batches(batch, seed)
        clustered = strategy in ("cluster", "random-groups")
        if clustered and 2 * size > len(source) / sources:
            return None
        labels = self.labels(size, vectors or "own") if clustered else np.zeros(len(source), np.int64)
        layer = self.facts.duplicates(size)[1] if mask_of(name) == "apart" else None
        return self._planned(strategy.replace("-", "_"), batch, seed, labels, 0.5 if half else 0.0, most, layer)

    def _planned(
        self,
        stratify: str,
        batch: int,
        seed: int,
        labels: np.ndarray,
        random_share: float = 0,
        most: int | None = None,
        layer: np.ndarray | None = None,
    ) -> np.ndarray:
        """Return (steps, B) rows of the batches of clusterbatch.batches; layer: (N,) int64, those of ClusterIndex."""
        clusters = None if stratify in ("random", "source") else 1
        config = BatchesConfig(
            stratify=stratify, size=batch, seed=seed, clusters_per_batch=clusters, random_share=random_share
        )
        index, row_of = index_labels(labels if layer is None else labels * LAYERS + layer, self.corpus.source)
        if layer is not None:
            labels, layer = labels[row_of[index.first_row]], layer[row_of[index.first_row]]
            index = replace(index, cluster=labels.astype(np.int32), layer=layer.astype(np.int8))
        plan = make_plan(index, config)
        steps = plan.steps_of(EPOCHS)
        planned = map(plan.batch, range(steps) if most is None else spaced(steps, most))
        return np.array([row_of[index.first_row[found.piece] + found.row] for found in planned])

    def _packed_batches(self, rows: int, batch: int, seed: int) -> np.ndarray:
        """Return batches of near neighbours inside random super-batches of `rows` rows of a source.

        The first row that is left is joined by those whose query and document score highest with its own, crosswise.
        """
        pairs, found = self.corpus.pairs, []
        for super_batch in self._planned("source", rows, seed, np.zeros(len(self.corpus.source), np.int64)):
            scores = pairs.query_vector[super_batch] @ pairs.document_vector[super_batch].T
            scores, left = scores + scores.T, np.ones(rows, bool)
            while left.any():
                first = int(np.argmax(left))
                near = np.where(left, scores[first], -np.inf)
                near[first] = np.inf
                chosen = np.argsort(-near, kind="stable")[:batch]
                left[chosen] = False
                found.append(super_batch[chosen])
        # Batches of one super-batch come one after the other, as they would in a stream.
        return np.array(found)

    def _diverse_batches(self, batch: int, seed: int) -> np.ndarray:
        """Return batches of a source that take from each of its clusters its share, of as many clusters as rows."""
        source, found = self.corpus.source, []
        random = np.random.default_rng(seed)
        for _ in range(EPOCHS):
            of_epoch = []
            for name in np.unique(source):
                rows = np.flatnonzero(source == name)
                labels = self.labels(max(2, round(len(rows) / batch)), "own")[rows]
                rows = rows[np.lexsort((random.random(len(rows)), labels))]
                batches = len(rows) // batch
                starts = random.integers(0, max(1, len(rows) - batches * batch + 1))
                of_epoch += [rows[starts : starts + batches * batch][number::batches] for number in range(batches)]
            found += [of_epoch[number] for number in random.permutation(len(of_epoch))]
        return np.array(found)

    def _minilm(self) -> np.ndarray:
        kept = self._folder / f"minilm/{self.corpus.name}.npy"
        if not kept.exists():
            kept.parent.mkdir(parents=True, exist_ok=True)
            encoder = load_encoder(resolve_model("all-MiniLM-L6-v2"), "backbone")
            np.save(kept, encoder.encode(encoder.tokenizer.encode(self.corpus.texts, TOKENS), 2048).astype(np.float16))
        return np.load(kept).astype(np.float32)


def clusters_of(corpus: Corpus, vectors: np.ndarray, size: int) -> np.ndarray:
    """Return (N,) cluster numbers, inside each source in packing order; vectors: (N, M), what is clustered."""
    labels = np.zeros(len(vectors), np.int64)
    for source in np.unique(corpus.source):
        rows = np.flatnonzero(corpus.source == source)
        clusters = round(len(rows) / size)
        if clusters < 2:
            continue
        shuffled = np.random.default_rng(0).permutation(rows)
        centroids = fit(LocalRows.of(vectors[shuffled], clusters=clusters), FitSettings(clusters)).centers.centroids
        own = Assigner(centroids)(vectors[rows]).labels.numpy()
        weights = np.bincount(own, minlength=len(centroids))
        place = np.argsort(packing_order(centroids, weights.astype(np.float64)))
        labels[rows] = place[own]
    return labels


def mask_of(arm: str) -> str:
    """Return the name of the arm's mask, or nothing."""
    last = arm.partition("@")[0].rpartition("-")[2]
    return last if last in MASKS or last in OTHER_MASKS else ""


def hardness(pairs: Pairs, batches: np.ndarray) -> float:
    """Return the mean over queries of the highest surrogate's score of another row's document, of eight batches."""
    found = []
    for rows in batches[np.linspace(0, len(batches) - 1, 8).astype(int)]:
        scores = pairs.query_vector[rows] @ pairs.document_vector[rows].T
        for hashes in (pairs.query_hash, pairs.document_hash):
            scores[hashes[rows][:, None] == hashes[rows][None, :]] = -np.inf
        highest = scores.max(1)
        found.append(highest[np.isfinite(highest)])
    return float(np.mean(np.concatenate(found)))
