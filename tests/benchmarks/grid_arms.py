"""Arms of bench_grid: the batches that each of them makes of a corpus in memory.

Legend: N pairs of the corpus, B rows of a batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch

from clusterbatch.batches.curriculum import make_plan
from clusterbatch.batches.samplers import index_labels
from clusterbatch.clustering.assign import Assigner
from clusterbatch.clustering.kmeans import FitSettings, fit
from clusterbatch.clustering.packing_order import packing_order
from clusterbatch.clustering.partial_sums import LocalRows
from clusterbatch.config import BatchesConfig
from clusterbatch.encoder.devices import inference_dtype
from clusterbatch.encoder.load import load_encoder
from clusterbatch.encoder.resolve import resolve_model
from clusterbatch.experiments.compare.hardness import spaced
from clusterbatch.shards.index import LAYERS
from tests.benchmarks.grid_corpora import load_corpus
from tests.benchmarks.grid_masks import MASKS, RowFacts
from tests.benchmarks.static_trainer import Corpus, Mask, Pairs

# (N, M) unit vectors of the queries and of the documents of all pairs.
Sides: TypeAlias = tuple[np.ndarray, np.ndarray]

EPOCHS = 2
_CLUSTERED = ("cluster", "random-groups")
# Masks that the package does not have, by the surrogate. uncopied: documents near the query's own; skip: the four that
# score highest.
OTHER_MASKS = {"uncopied": Mask(copies=0.9), "skip": Mask(nearest=4)}


class Arms:
    """Batches of every arm on one corpus of the study in `folder`; clusters of each size are fitted once."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self.corpus = load_corpus(folder, name)
        self._labels: dict[tuple[int, str], np.ndarray] = {}
        self._of_minilm: dict[str, np.ndarray] = {}
        self.facts = RowFacts(self.corpus, folder / "teacher", lambda size: self.labels(size, "own"))

    def labels(self, size: int, vectors: str) -> np.ndarray:
        """Return (N,) cluster numbers inside each source for clusters of `size` rows.

        vectors: own (of documents, untrained), queries (of queries, untrained) or minilm (of documents, MiniLM's).
        """
        if (size, vectors) not in self._labels:
            pairs = self.corpus.pairs
            given = {"own": pairs.document_vector, "queries": pairs.query_vector}
            chosen = self._minilm("document") if vectors == "minilm" else given[vectors]
            self._labels[size, vectors] = clusters_of(self.corpus, chosen, size)
        return self._labels[size, vectors]

    def batches(
        self, arm: str, batch: int, seed: int, most: int | None = None, trained: Callable[[], Sides] | None = None
    ) -> np.ndarray | None:
        """Return (steps, B) rows of the run, or of `most` steps of it; None if the corpus has no such arm.

        STRATEGY[-TIMESx][-half][-MASK][@VECTORS]; times: batches of a cluster or super-batch; vectors: minilm, queries;
        of super-batches also documents (they and queries: the one side that divides them) and trained, those of the
        model that `trained` trains.
        Strategies of super-batches: super; super-cluster, each of one cluster; super-fixed, the same batches in every
        epoch; super-shuffled, all batches of an epoch shuffled; super-late, batches of sources in the first half.
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
        if strategy in _CLUSTERED and 2 * size > len(source) / sources:
            return None
        if strategy == "diverse":
            return self._diverse_batches(batch, seed)
        clustered = strategy in _CLUSTERED
        labels = self.labels(size, vectors or "own") if clustered else np.zeros(len(source), np.int64)
        layer = self.facts.duplicates(size)[1] if mask_of(name) == "apart" else None
        if strategy.startswith("super"):
            if half:
                raise ValueError(f"{arm}: super-batches exchange no rows")
            near, strata = self.near(vectors, trained), source
            if strategy == "super-cluster":
                strata = np.char.add(np.char.add(source, "/"), self.labels(size, "own").astype(str))
            planned = self._planned(
                "source", batch, seed, labels, most=most, super_batch=int(times[:-1]), near=near, source=strata
            )
            if strategy == "super-late":
                half_way = len(planned) // 2
                plain = self._planned("source", batch, seed, labels, most=most)
                return np.concatenate([plain[:half_way], planned[half_way:]])
            return _reordered(planned, strategy, seed)
        return self._planned(strategy.replace("-", "_"), batch, seed, labels, 0.5 if half else 0.0, most, layer)

    def near(self, vectors: str, trained: Callable[[], Sides] | None) -> Sides:
        """Return the vectors of queries and documents by which super-batches are divided."""
        if vectors == "minilm":
            return self._minilm("query"), self._minilm("document")
        if vectors == "trained":
            if trained is None:
                raise ValueError("there is no trained model here")
            return trained()
        sides = self.corpus.pairs.query_vector, self.corpus.pairs.document_vector
        return sides[vectors == "documents"], sides[vectors != "queries"]

    def _planned(
        self,
        stratify: str,
        batch: int,
        seed: int,
        labels: np.ndarray,
        random_share: float = 0,
        most: int | None = None,
        layer: np.ndarray | None = None,
        super_batch: int = 1,
        near: Sides | None = None,
        source: np.ndarray | None = None,
    ) -> np.ndarray:
        """Return (steps, B) rows of the batches of clusterbatch.batches.

        layer: (N,) int64, those of ClusterIndex; near: vectors by which super-batches are divided; source: (N,) names
        instead of those of the corpus.
        """
        source = self.corpus.source if source is None else source
        clusters = None if stratify in ("random", "source") else 1
        config = BatchesConfig(
            stratify=stratify,
            size=batch,
            seed=seed,
            clusters_per_batch=clusters,
            random_share=random_share,
            super_batch=super_batch,
        )
        index, row_of = index_labels(labels if layer is None else labels * LAYERS + layer, source)
        if layer is not None:
            labels, layer = labels[row_of[index.first_row]], layer[row_of[index.first_row]]
            index = replace(index, cluster=labels.astype(np.int32), layer=layer.astype(np.int8))

        def vectors_of(piece: np.ndarray, row: np.ndarray) -> Sides:
            assert near is not None
            rows = row_of[index.first_row[piece] + row]
            return near[0][rows], near[1][rows]

        plan = make_plan(index, config, vectors=vectors_of)
        steps = plan.steps_of(EPOCHS)
        planned = map(plan.batch, range(steps) if most is None else spaced(steps, most))
        return np.array([row_of[index.first_row[found.piece] + found.row] for found in planned])

    def _diverse_batches(self, batch: int, seed: int) -> np.ndarray:
        """Return batches of a source that take from each of its clusters its share, of as many clusters as rows."""
        random, found, labels = np.random.default_rng(seed), [], self._labels_of_shares(batch)
        for _ in range(EPOCHS):
            of_epoch = []
            for rows in self._strata(batch):
                ordered = rows[np.lexsort((random.random(len(rows)), labels[rows]))]
                batches = -(-len(rows) // batch)
                of_epoch += [self._completed(ordered[each::batches], rows, batch, random) for each in range(batches)]
            found += [of_epoch[number] for number in random.permutation(len(of_epoch))]
        return np.array(found)

    def _labels_of_shares(self, batch: int) -> np.ndarray:
        """Return (N,) cluster numbers inside each stratum of several batches, as many as a batch has rows."""
        if (batch, "shares") not in self._labels:
            labels = np.zeros(len(self.corpus.source), np.int64)
            for rows in self._strata(batch):
                if len(rows) > batch:
                    labels[rows] = cluster_numbers(self.corpus.pairs.document_vector[rows], batch)
            self._labels[batch, "shares"] = labels
        return self._labels[batch, "shares"]

    def _strata(self, batch: int) -> list[np.ndarray]:
        """Return the rows of each source; sources smaller than a batch share one stratum, as in a plan."""
        names, source = np.unique(self.corpus.source, return_inverse=True)
        source = np.where(np.bincount(source)[source] < batch, len(names), source)
        return [np.flatnonzero(source == number) for number in np.unique(source)]

    def _completed(self, rows: np.ndarray, stratum: np.ndarray, batch: int, random: np.random.Generator) -> np.ndarray:
        """Return a batch of `rows` and, if they are too few, of others of the stratum or of the corpus."""
        missing = batch - len(rows)
        if not missing:
            return rows
        others = np.setdiff1d(stratum, rows)
        if len(others) < missing:
            others = np.setdiff1d(np.arange(len(self.corpus.source)), rows)
        return np.concatenate([rows, random.choice(others, missing, replace=False)])

    def _minilm(self, side: str) -> np.ndarray:
        """Return (N, 384) vectors of the query or document of every pair by the pretrained model."""
        if side not in self._of_minilm:
            kept = self._folder / f"minilm/{self.corpus.name}-{side}.npy"
            if not kept.exists():
                kept.parent.mkdir(parents=True, exist_ok=True)
                dtype = inference_dtype("auto", torch.device("cpu"))
                encoder = load_encoder(resolve_model("all-MiniLM-L6-v2"), "backbone", dtype=dtype, packed=True)
                tokens = getattr(self.corpus.pairs, side)
                texts = encoder.tokenizer.surrounded([tokens[row].tolist() for row in range(len(tokens))])
                np.save(kept, encoder.encode(texts, 2048).astype(np.float16))
            self._of_minilm[side] = np.load(kept).astype(np.float32)
        return self._of_minilm[side]


def _reordered(batches: np.ndarray, strategy: str, seed: int) -> np.ndarray:
    """Return the (steps, B) batches of super-batches as the strategy has them, epoch by epoch."""
    if strategy in ("super", "super-cluster"):
        return batches
    epochs, random = np.split(batches, EPOCHS), np.random.default_rng(seed)
    if strategy == "super-fixed":
        epochs = [epochs[0]] * EPOCHS
    else:
        epochs = [random.permutation(epoch) for epoch in epochs]
    return np.concatenate(epochs)


def clusters_of(corpus: Corpus, vectors: np.ndarray, size: int) -> np.ndarray:
    """Return (N,) cluster numbers, inside each source in packing order; vectors: (N, M), what is clustered."""
    labels = np.zeros(len(vectors), np.int64)
    for source in np.unique(corpus.source):
        rows = np.flatnonzero(corpus.source == source)
        clusters = round(len(rows) / size)
        if clusters < 2:
            continue
        labels[rows] = cluster_numbers(vectors[rows], clusters)
    return labels


def cluster_numbers(vectors: np.ndarray, clusters: int) -> np.ndarray:
    """Return (n,) numbers of the nearest of so many centroids, in packing order; vectors: (n, M)."""
    shuffled = np.random.default_rng(0).permutation(len(vectors))
    centroids = fit(LocalRows.of(vectors[shuffled], clusters=clusters), FitSettings(clusters)).centers.centroids
    own = Assigner(centroids)(vectors).labels.numpy()
    weights = np.bincount(own, minlength=len(centroids))
    return np.argsort(packing_order(centroids, weights.astype(np.float64)))[own]


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
