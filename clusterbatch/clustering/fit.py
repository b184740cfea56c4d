"""K-means of a corpus: passes that sample and fit one level after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from clusterbatch.clustering import fit_distributed as distributed
from clusterbatch.clustering.cell_fit import CellFit, FitLevel
from clusterbatch.clustering.cells import Cells, coarse_clusters, first_level, second_level
from clusterbatch.clustering.embedded_corpus import EmbeddedCorpus, PassFactory
from clusterbatch.clustering.features import project
from clusterbatch.clustering.model import FittedClusters, KMeansClusters, StoredParts
from clusterbatch.clustering.partial_sums import Chunk, LocalRows
from clusterbatch.clustering.sample import SampleChunks, SampleWorker
from clusterbatch.clustering.warm_start import KeptClusters, WarmStart
from clusterbatch.runtime import Result, WorkItem, current_executor
from clusterbatch.store import Artifact, Counts, Stopwatch

# Bundles of cells at least, if the cells are many: all workers have something to do, and none much at the end.
_BUNDLES = 64


def fit_kmeans(corpus: EmbeddedCorpus, passes: PassFactory) -> FittedClusters:
    """Fit all partitions that are split, in one level or two."""
    config, partitions = corpus.config.cluster, corpus.partitions
    clusters = KMeansClusters(partitions, config.features, device=corpus.assigning_device)
    coarse = coarse_clusters(partitions, config.levels)
    for partition, model in corpus.held.items():
        coarse[partition] = len(model.fine) if model.coarse else 0
    cells = first_level(partitions, coarse, config.sample_per_centroid)
    if not len(cells):
        return clusters
    clusters = _fit_level(corpus, passes, clusters, cells)
    if coarse.any():
        shares = {partition: clusters.models[partition].shares for partition in np.flatnonzero(coarse).tolist()}
        fine = {p: np.diff(corpus.held[p].first_of_coarse) for p in shares if p in corpus.held}
        cells = second_level(partitions, shares, config.sample_per_centroid, fine)
        clusters = _fit_level(corpus, passes, clusters, cells)
    if corpus.previous is None or not corpus.previous.keep:
        return clusters
    return KeptClusters(clusters, corpus.previous, config.seed)


def _fit_level(corpus: EmbeddedCorpus, passes: PassFactory, above: KMeansClusters, cells: Cells) -> KMeansClusters:
    """Sample and fit one level below `above`: large samples by all workers together, small ones side by side."""
    config, number = corpus.config.cluster, 1 + len(above.stored)
    suffix = "" if number == 1 else f" {number}"
    arguments = {
        "rows": corpus.rows,
        "cells": cells,
        "above": above,
        "previous": corpus.previous,
        "weighted": "weight" in corpus.columns,
    }
    sample = passes.run(f"sample{suffix}", corpus.items, SampleWorker, arguments, corpus.reading_pool)
    chunks = SampleChunks(sample.artifact, sample.parts, config.features)
    warm = WarmStart(corpus.previous, frozenset(corpus.held)) if corpus.previous else None
    level = FitLevel(chunks, cells, above, config, corpus.device, warm)
    fit = passes.create(f"fit{suffix}", FitWorker, {"level": level}, corpus.computing_pool)
    cell_bytes = sum(part.bytes for part in sample.parts) * cells.sampled / max(1.0, cells.sampled.sum())
    bundles = bundle_cells(cell_bytes)
    cells_of = {bundle.start: len(bundle) for bundle in bundles}
    # A version before this one left a receipt for every cell.
    done = {
        first: receipt
        for first, receipt in ({} if fit.is_whole else fit.begin(force=passes.force)).items()
        if receipt.details.get("cells", 1) == cells_of.get(first)
    }
    # The larger first, so that no worker ends long after the others.
    bundles.sort(key=lambda bundle: (-cell_bytes[bundle.start : bundle.stop].sum(), bundle.start))
    spread = not fit.is_whole and current_executor().several_processes
    for bundle in bundles:
        cell = bundle.start
        if spread and cell_bytes[cell] > distributed.LOCAL_BYTES and cell not in done:
            watch = Stopwatch()
            result = distributed.fit_distributed(level, cell, passes.artifact(f"fit{suffix}"), corpus.computing_pool)
            done[cell] = fit.finish(cell, result, watch.seconds)
    rows = np.maximum(1, cells.sampled).astype(np.int64)
    items = [WorkItem(bundle.start, int(rows[bundle.start : bundle.stop].sum()), bundle) for bundle in bundles]
    manifest = fit.commit(items, done=done)
    # A projection that came from above is stored there.
    parts = [part for part in manifest.parts if number == 1 or part.details["content"] == "centroids"]
    return replace(above, stored=(*above.stored, StoredParts(passes.artifact(f"fit{suffix}"), parts)))


def bundle_cells(cell_bytes: np.ndarray) -> list[range]:
    """Return ranges of cells that one worker fits one after the other, after it has read them together.

    cell_bytes: (C,) of each cell's sample. Sources may be many and small, and each part of the sample has a piece of
    every cell: read one by one, requests would grow with the product of cells and parts. A cell that is fitted by all
    workers together is a bundle by itself.
    """
    limit = min(distributed.LOCAL_BYTES / 2, cell_bytes.sum() / _BUNDLES)
    bundles: list[range] = []
    first, held = 0, 0.0
    for cell, size in enumerate(cell_bytes.tolist()):
        if cell > first and held + size > limit:
            bundles.append(range(first, cell))
            first, held = cell, 0.0
        held += size
    return [*bundles, range(first, len(cell_bytes))]


class FitWorker:
    """Fit the cells of an item one after the other, each with all of its sample in this process."""

    def __init__(self, level: FitLevel) -> None:
        torch.set_num_threads(1)
        self._level = level

    def process(self, item: WorkItem, output: Artifact) -> Result:
        cells: range = item.payload
        buckets = [self._level.cells.buckets_of(cell) for cell in cells]
        first = buckets[0].start
        chunks = self._level.sample.read_all(range(first, buckets[-1].stop))
        fitted = [
            self._fit(cell, chunks[own.start - first : own.stop - first], output)
            for cell, own in zip(cells, buckets, strict=True)
        ]
        parts = [part for result in fitted for part in result.parts]
        return Result(parts, sum((result.counts for result in fitted), Counts()), {"cells": len(cells)})

    def _fit(self, number: int, chunks: Sequence[Chunk], output: Artifact) -> Result:
        cell = CellFit(self._level, number)
        filled = [chunk for chunk in chunks if len(chunk[0])]
        matrix = cell.projection(filled)
        projected = [(project(vectors, matrix), weights) for vectors, weights in filled]
        found = cell.fit(LocalRows(projected, self._level.device), matrix)
        return cell.write(output, found, matrix, sum(len(vectors) for vectors, _ in projected))
