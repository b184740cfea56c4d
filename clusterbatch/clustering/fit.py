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
from clusterbatch.clustering.model import FittedClusters, KMeansClusters, NamedFit, StoredParts, write_fits
from clusterbatch.clustering.partial_sums import LocalRows
from clusterbatch.clustering.sample import SampleChunks, SampledChunk, SampleWorker
from clusterbatch.clustering.warm_start import KeptClusters, WarmStart
from clusterbatch.runtime import Result, WorkItem, bundle_items, current_executor, ray_session
from clusterbatch.store import Artifact, Counts, Stopwatch


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
    stored = sum(part.bytes for part in sample.parts)
    cell_bytes = stored * cells.sampled / max(1.0, cells.sampled.sum())
    # The larger first, so that no worker ends long after the others.
    items = sorted(bundle_items(cells.sampled, stored, distributed.LOCAL_BYTES / 2), key=lambda item: -item.rows)
    done = {} if fit.is_whole else fit.begin(force=True)
    spread = not fit.is_whole and current_executor().several_processes
    for item in items:
        if spread and cell_bytes[item.number] > distributed.LOCAL_BYTES and item.number not in done:
            watch = Stopwatch()
            output = passes.artifact(f"fit{suffix}")
            # Also where passes do without Ray: such a sample takes longer than starting it.
            with ray_session(corpus.config.ray.model_copy(update={"mode": "cluster"})):
                result = distributed.fit_distributed(level, item.number, output, corpus.computing_pool)
            done[item.number] = fit.finish(item, result, watch.seconds)
    manifest = fit.commit(items, done=done)
    # A projection that came from above is stored there.
    parts = [part for part in manifest.parts if number == 1 or part.details["content"] == "centroids"]
    return replace(above, stored=(*above.stored, StoredParts(passes.artifact(f"fit{suffix}"), parts)))


class FitWorker:
    """Fit the cells of an item one after the other, each with all of its sample in this process."""

    def __init__(self, level: FitLevel) -> None:
        torch.set_num_threads(1)
        self._level = level

    def process(self, item: WorkItem, output: Artifact) -> Result:
        cells: range = item.payload
        buckets = [self._level.cells.buckets_of(cell) for cell in cells]
        first = buckets[0].start
        sampled = self._level.sample.read_all(range(first, buckets[-1].stop))
        fits: list[NamedFit] = []
        rows = 0
        for cell, own in zip(cells, buckets, strict=True):
            filled = [each for each in sampled[own.start - first : own.stop - first] if len(each.chunk[0])]
            fits += self._fit(CellFit(self._level, cell), filled)
            rows += sum(len(each.chunk[0]) for each in filled)
        return Result(write_fits(output, item.number, fits), Counts(read=rows, written=rows))

    def _fit(self, cell: CellFit, sampled: Sequence[SampledChunk]) -> list[NamedFit]:
        matrix = cell.projection([each.chunk for each in sampled])
        projected = [(project(vectors, matrix), weights) for vectors, weights in (each.chunk for each in sampled)]
        return cell.table(cell.fit(LocalRows(projected, self._level.device), matrix, sampled), matrix)
