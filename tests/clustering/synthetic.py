"""Synthetic shards without Ray or a corpus: what tests of readers, plans and loaders need."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from clusterbatch.shards.layout import ShardSchema
from clusterbatch.shards.reader import INDEX, index_table
from clusterbatch.shards.writer import ShardWriter
from clusterbatch.store import Artifact, Counts, Folder, Receipt
from clusterbatch.store.tables import write_parquet


def synthetic_rows(rows: int, *, vocabulary: int = 1000, dimensions: int = 8, seed: int = 0) -> pa.Table:
    """Rows of the training columns with `dimensions`-wide vectors, token lists of 1 to 12 ids."""
    random = np.random.default_rng(seed)

    def tokens() -> pa.ListArray:
        offsets = np.concatenate([[0], np.cumsum(random.integers(1, 13, rows))]).astype(np.int32)
        return pa.ListArray.from_arrays(
            offsets, pa.array(random.integers(0, vocabulary, offsets[-1]).astype(np.uint16))
        )

    def vectors() -> pa.FixedSizeListArray:
        values = random.standard_normal((rows, dimensions))
        values = (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float16)
        return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), dimensions)

    hashes = random.integers(0, 2**63, (2, rows)).astype(np.uint64)
    return pa.table(
        {
            "query_tokens": tokens(),
            "document_tokens": tokens(),
            "query_hash": hashes[0],
            "document_hash": hashes[1],
            "query_vector": vectors(),
            "document_vector": vectors(),
        }
    )


def build_shards(
    folder: Folder,
    sizes: dict[str, Sequence[int]],
    *,
    run_rows: int = 16,
    shard_rows: int = 500,
    dimensions: int | None = 8,
    seed: int = 0,
) -> tuple[Artifact, dict[tuple[str, int], pa.Table]]:
    """A committed clusters artifact with clusters of the given sizes per source; returns it and each cluster's rows."""
    layout = ShardSchema(vocabulary=1000, run_rows=run_rows, surrogate_dimensions=dimensions)
    artifact = Artifact(folder, "clusters")
    parts, pieces, written = [], [], {}
    writer, shard = ShardWriter(layout), 0

    def close() -> None:
        nonlocal writer, shard
        parts.extend(writer.write(artifact, f"shard-{shard:05d}", shard=shard))
        pieces.extend({**piece, "shard": shard} for piece in writer.pieces)
        writer, shard = ShardWriter(layout), shard + 1

    for source, rows_of_clusters in sizes.items():
        for cluster, rows in enumerate(rows_of_clusters):
            table = synthetic_rows(rows, dimensions=dimensions or 8, seed=seed + len(written))
            text = pa.table({"pair_id": [f"{source}-{cluster}-{row}" for row in range(rows)]})
            writer.add(table, text, source=source, cluster=cluster, piece=0, mean_cosine=0.5)
            written[source, cluster] = table
            if sum(piece["rows"] for piece in writer.pieces) >= shard_rows:
                close()
    if writer.pieces:
        close()
    parts.append(write_parquet(artifact, "index", index_table(pieces), content=INDEX))
    total = sum(sum(rows) for rows in sizes.values())
    receipt = Receipt(unit=0, fingerprint="synthetic", parts=parts, counts=Counts(read=total, written=total))
    artifact.commit("synthetic", [receipt], config={}, inputs={}, seconds=0.0, details={"layout": layout.__dict__})
    return artifact, written
