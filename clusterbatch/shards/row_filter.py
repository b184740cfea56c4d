"""Rows that training leaves out by their scores (`train.filter`): a cluster index of the others.

The shards keep all rows. Their text files have the scores as columns, of which a row takes four bytes: those of a pair
are read by every process that plans batches, those of its negatives once, to count them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pyarrow as pa

from clusterbatch.config import FilterConfig, fingerprint
from clusterbatch.errors import UsageError
from clusterbatch.shards.index import ClusterIndex, KeptRows, LeftOut
from clusterbatch.shards.layout import PAIR_SCORES, ROWS
from clusterbatch.store import Artifact, Manifest
from clusterbatch.store.details import ClustersDetails, details_of
from clusterbatch.store.tables import read_parquet

# Shards whose scores are read at once: most of the time is storage's answers.
_READERS = 16


def filter_rows(
    artifact: Artifact,
    manifest: Manifest,
    index: ClusterIndex,
    config: FilterConfig,
    *,
    unused: Collection[str] = (),
    negatives: bool = False,
) -> ClusterIndex:
    """Return the index of the rows that score enough, with what is left out of each source.

    The same index if no threshold is set. unused: sources that no batch is drawn from; negatives: whether to count the
    hard negatives too.

    Raises UsageError if the shards have no such scores, a source that is named does not exist, or nothing is left of a
    source that is used.
    """
    if not any(each.is_on for each in config.all):
        return index
    _check(artifact, manifest, index, config)
    min_score = [config.of(name).min_score for name in index.sources]
    min_margin = [config.of(name).min_margin for name in index.sources]
    negatives = negatives and any(margin is not None for margin in min_margin)
    left_out = {name: _nothing() for name in index.sources}

    def kept_rows() -> Iterator[tuple[int, np.ndarray]]:
        columns = ["score", *(["negative_scores"] if negatives else [])]
        for piece, table in _pieces(artifact, manifest, index, columns):
            source = int(index.source[piece])
            score, counts = table["score"].to_numpy(), left_out[index.sources[source]]
            enough = ~(score < np.float32(_number(min_score[source])))
            counts["rows"] += len(score)
            counts["rows_left_out"] += int(len(score) - enough.sum())
            counts["rows_without_score"] += int(np.isnan(score).sum())
            if negatives:
                lists = table["negative_scores"].combine_chunks().filter(pa.array(enough))
                of_negative = np.repeat(score[enough], lists.value_lengths().to_numpy(zero_copy_only=False))
                margin = of_negative - lists.flatten().to_numpy(zero_copy_only=False)
                counts["negatives"] += len(margin)
                counts["negatives_left_out"] += int((margin < np.float32(_number(min_margin[source]))).sum())
                counts["negatives_without_score"] += int(np.isnan(margin).sum())
            yield piece, enough

    kept = KeptRows.of(kept_rows(), index.rows)
    for name, counts in left_out.items():
        if counts["rows"] == counts["rows_left_out"] > 0 and name not in unused:
            raise UsageError(
                f"train.filter: no pair of {name} scores {config.of(name).min_score} or more; "
                f"batches.source_weights.{name}=0 leaves a source out"
            )
    if kept.before[-1] < index.total_rows:
        index = _kept(index, kept, fingerprint("kept rows", index.fingerprint, min_score))
    return replace(index, left_out=left_out)


def _check(artifact: Artifact, manifest: Manifest, index: ClusterIndex, config: FilterConfig) -> None:
    for name in config.sources:
        index.require_source(name, f"train.filter.sources.{name}")
    layout = details_of(manifest, ClustersDetails)["layout"]
    for key, column, is_needed in (
        ("min_score", "score", True),
        ("min_margin", "negative_scores", any(each.min_margin is not None for each in config.all)),
    ):
        if is_needed and not layout.get(column):
            raise UsageError(f"train.filter.{key}: {artifact.folder.uri} was made without corpus.columns.{column}")


def _pieces(
    artifact: Artifact, manifest: Manifest, index: ClusterIndex, columns: list[str]
) -> Iterator[tuple[int, pa.Table]]:
    """Yield each piece of the index with all its rows' columns, shard by shard."""
    parts = {part.details["shard"]: part for part in manifest.parts if part.details.get("content") == ROWS}
    # Earlier versions had the scores beside the texts alone.
    parts |= {part.details["shard"]: part for part in manifest.parts if part.details.get("content") == PAIR_SCORES}
    order = np.lexsort((index.first_row, index.shard))
    shards, starts = np.unique(index.shard[order], return_index=True)
    of_shard = np.split(order, starts[1:])

    def read(shard: int) -> pa.Table:
        return read_parquet(artifact.folder, parts[shard], columns)

    with ThreadPoolExecutor(_READERS) as pool:
        for first in range(0, len(shards), _READERS):
            here = slice(first, first + _READERS)
            for table, pieces in zip(pool.map(read, shards[here].tolist()), of_shard[here], strict=True):
                for piece in pieces.tolist():
                    yield piece, table.slice(int(index.first_row[piece]), int(index.rows[piece]))


def _kept(index: ClusterIndex, kept: KeptRows, identity: str) -> ClusterIndex:
    rows = np.diff(kept.first_kept, append=kept.before[-1])
    alive = np.flatnonzero(rows)
    return replace(
        index,
        source=index.source[alive],
        cluster=index.cluster[alive],
        rows=rows[alive],
        shard=index.shard[alive],
        first_run=index.first_run[alive],
        first_row=index.first_row[alive],
        fingerprint=identity,
        mean_cosine=index.mean_cosine[alive] if len(index.mean_cosine) else index.mean_cosine,
        crowding=index.crowding[alive] if len(index.crowding) else index.crowding,
        layer=index.layer[alive] if len(index.layer) else index.layer,
        kept=kept.take(alive),
    )


def _number(threshold: float | None) -> float:
    return -np.inf if threshold is None else threshold


def _nothing() -> LeftOut:
    return LeftOut(
        rows=0,
        rows_left_out=0,
        rows_without_score=0,
        negatives=0,
        negatives_left_out=0,
        negatives_without_score=0,
    )
