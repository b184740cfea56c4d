"""`predict`: embeds a sample and says, source by source, how much harder batches of clusters would be."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa

from clusterbatch.clustering.features import feature_vectors
from clusterbatch.config import EmbedConfig, RunConfig, fingerprint
from clusterbatch.corpus.ingest import ingest
from clusterbatch.corpus.partitions import Partitions, source_partitions
from clusterbatch.corpus.row_groups import read_row_group
from clusterbatch.embedding.char_ngrams import SURROGATES
from clusterbatch.embedding.stage import embed, embedding_pool
from clusterbatch.embedding.vectors import SIDES, TaskUnit, VectorSource, tasks, vector_values
from clusterbatch.encoder.limits import check_limits, embedding_limits
from clusterbatch.encoder.resolve import model_fingerprint, resolve_model
from clusterbatch.experiments.predict.batch_figures import Sample, batch_figures, overall, predict_group, verdict_of
from clusterbatch.hashing import row_hashes
from clusterbatch.runtime import Pass, Pool, Result, WorkItem, bundle_items, lasting_session, ray_session
from clusterbatch.store import Artifact, Counts, Manifest, Part, Stopwatch
from clusterbatch.store.details import given_dimensions, has_vectors
from clusterbatch.store.shuffle import iterate_buckets, read_buckets, write_buckets
from clusterbatch.store.workspace import Workspace

PREDICTION = "predict/prediction.json"
_LEAST_ROWS = 2048
# Rows of all sources that batches without regard to sources are drawn from.
_MIXED_ROWS = 4096


def predict(config: RunConfig, *, force: bool = False) -> dict[str, Any]:
    """Predict how hard batches of clusters would be, source by source, and write it to `predict/prediction.json`.

    Returns what is written: `answer` and `gain` of the corpus, figures and verdict by source. Needs the corpus, which
    is ingested here if it is not yet, and the embedding model; trains nothing, so it cannot say if clusters pay.
    """
    watch = Stopwatch()
    workspace = Workspace(config)
    if config.embed.model not in SURROGATES:
        check_limits(config.embed.model, config.storage, embedding_limits(config))
    with lasting_session():
        if config.reuse.corpus is None:
            ingest(config)
        artifact, parts, groups = draw_sample(config, force)
        pool = Pool(config.embed.workers, config.embed.cpus_per_worker)
        with ray_session(config.ray):
            items = bundle_items(groups.rows * _shares(config, groups), sum(part.bytes for part in parts))
            worker = {"config": config, "sample": artifact, "parts": parts, "groups": groups}
            receipts = Pass("predict", None, "", PredictWorker, worker, pool).run(items)
    found = [of_source for receipt in receipts for of_source in receipt.details["sources"]]
    figures = dict(zip(groups.names, found, strict=True))
    rows = _mixed(config, artifact, parts, groups)
    mixed = batch_figures(rows, np.zeros(len(rows), int), **batch_settings(config))
    result = {
        **overall(figures, mixed),
        "mixed": asdict(mixed),
        "sources": figures,
        "seconds": round(watch.seconds, 1),
    }
    workspace.root.write_json(PREDICTION, result)
    return result


def draw_sample(config: RunConfig, force: bool) -> tuple[Artifact, list[Part], Partitions]:
    """Write vectors and hashes of about `predict.rows` rows of the ingested corpus, in parts bucketed by source."""
    workspace = Workspace(config)
    corpus = workspace.corpus.require()
    workspace.corpus.check_parts(corpus)
    groups = source_partitions(corpus)
    shares = _shares(config, groups)
    artifact = Artifact(workspace.root.child("predict", "sample"), "sample of vectors")
    embeddings, vectors = _vectors(config, corpus)
    identity = fingerprint("predict", config.embed, vectors, corpus.fingerprint, shares.tolist())
    arguments = {"config": config, "groups": groups, "shares": shares}
    with ray_session(config.ray):
        pool = Pool(config.embed.workers, config.embed.cpus_per_worker) if embeddings else embedding_pool(config.embed)
        sample = Pass("predict: sample", artifact, identity, SampleVectors, arguments, pool)
        receipts = sample.run(tasks(corpus, embeddings), force=force)
    return artifact, [part for receipt in receipts for part in receipt.parts], groups


def sample_tables(
    config: RunConfig, artifact: Artifact, parts: Sequence[Part], groups: Partitions
) -> Iterator[pa.Table]:
    """Yield the sampled rows of each source, in order; a few sources at a time are in memory."""
    for table in iterate_buckets(artifact, parts, groups.rows * _shares(config, groups)):
        assert table is not None, "a source without sampled rows"
        yield table


def _shares(config: RunConfig, groups: Partitions) -> np.ndarray:
    """Return (sources,) float64: the share of each source's rows that is sampled."""
    share = config.predict.rows / max(1, int(groups.rows.sum()))
    return np.minimum(1.0, np.maximum(share, _LEAST_ROWS / groups.rows))


def batch_settings(config: RunConfig) -> dict[str, Any]:
    """Return what batch_figures needs to know of the training to come."""
    return {
        "batch": config.batches.size,
        "temperature": config.train.temperature,
        "mask_share": config.predict.mask_share,
    }


def _vectors(config: RunConfig, corpus: Manifest) -> tuple[Manifest | None, str]:
    """Return the existing vectors, or None if only the sample is to be embedded; and their identity."""
    kept = Workspace(config).embeddings().manifest()
    if kept is not None and kept.inputs.get("corpus") == corpus.fingerprint and has_vectors(kept):
        made_with = EmbedConfig.model_validate(kept.config) if kept.config else config.embed
        if made_with.identity() == config.embed.identity():
            return kept, kept.fingerprint
    if config.embed.model in SURROGATES or given_dimensions(corpus) is not None:
        # Fitted to the corpus, or brought with it: there is no model that would embed a sample.
        kept = embed(config)
        return kept, kept.fingerprint
    return None, model_fingerprint(resolve_model(config.embed.model, config.storage))


def read_sample(table: pa.Table) -> Sample:
    vectors = [vector_values(table[f"{side}_vector"]) for side in SIDES]
    hashes = [table[f"{side}_hash"].to_numpy() for side in SIDES]
    return Sample(vectors[0], vectors[1], hashes[0], hashes[1])


def _mixed(config: RunConfig, artifact: Artifact, parts: Sequence[Part], groups: Partitions) -> Sample:
    """Return rows of all sources in their true proportions."""
    counts = np.maximum(1, np.round(_MIXED_ROWS * groups.rows / groups.rows.sum())).astype(int).tolist()
    tables = zip(sample_tables(config, artifact, parts, groups), counts, strict=True)
    # Copied: a slice would keep all rows of its source in memory.
    pieces = [table.take(pa.array(np.arange(min(count, table.num_rows)))) for table, count in tables]
    return read_sample(pa.concat_tables(pieces))


class SampleVectors:
    """Embeds the rows of a task whose hash is below their source's share; writes them bucketed by source."""

    def __init__(self, config: RunConfig, groups: Partitions, shares: np.ndarray) -> None:
        self._corpus = Workspace(config).corpus
        self._vectors = VectorSource(config, 0)
        self._groups, self._shares = groups, shares

    def process(self, item: WorkItem, output: Artifact) -> Result:
        picked = [found for found in map(self._pick, item.payload) if found is not None]
        parts = []
        if picked:
            group = np.concatenate([each for each, _ in picked])
            table = pa.concat_tables([rows for _, rows in picked])
            parts.append(write_buckets(output, item.number, table, group, len(self._groups.names)))
        kept = sum(part.rows for part in parts)
        counts = Counts(read=item.rows, written=kept, set_aside={"not sampled": item.rows - kept})
        return Result(parts, counts)

    def _pick(self, item: TaskUnit) -> tuple[np.ndarray, pa.Table] | None:
        hashes = [f"{side}_hash" for side in SIDES]
        rows = read_row_group(self._corpus, item.unit, ["pair_id", "source", *hashes])
        group = self._groups.of_rows(rows["source"])
        kept = np.flatnonzero(row_hashes(rows["pair_id"], 0) / 2.0**64 < self._shares[group])
        if not len(kept):
            return None
        table = self._vectors.read(item, SIDES, kept).select([f"{side}_vector" for side in SIDES])
        for name in hashes:
            table = table.append_column(name, rows[name].take(pa.array(kept)))
        return group[kept], table


class PredictWorker:
    """Return the figures and the verdicts of the item's sources."""

    def __init__(self, config: RunConfig, sample: Artifact, parts: Sequence[Part], groups: Partitions) -> None:
        self._config, self._sample, self._parts, self._groups = config, sample, parts, groups

    def process(self, item: WorkItem, output: Artifact) -> Result:
        sources: range = item.payload
        tables = read_buckets(self._sample, self._parts, sources)
        return Result(details={"sources": [self._predict(*each) for each in zip(sources, tables, strict=True)]})

    def _predict(self, source: int, table: pa.Table | None) -> dict[str, Any]:
        assert table is not None, "a source without sampled rows"
        config = self._config
        found = predict_group(
            read_sample(table),
            int(self._groups.rows[source]),
            feature_vectors(table, config.cluster.features),
            config.predict.sizes,
            seed=config.cluster.seed,
            **batch_settings(config),
        )
        outcome, gain, why = verdict_of(found)
        return {**found, "verdict": outcome, "gain": gain, "why": why}
