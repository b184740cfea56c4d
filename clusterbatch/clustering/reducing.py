"""The other side of the shuffle: a bucket's rows become shards, sorted by cluster and, inside, by hash."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clusterbatch.clustering.groups import Groups
from clusterbatch.clustering.shards import ShardLayout, ShardWriter
from clusterbatch.errors import DataError
from clusterbatch.runtime import Unit
from clusterbatch.store import Artifact, Counts, Part, Receipt, Stopwatch
from clusterbatch.store.exchange import read_bucket

_TEXT = ["pair_id", "source", "query", "document", "negatives"]


class ReduceWorker:
    """Writes the shards of one bucket; numbers them inside the bucket, as nobody knows yet how many others make."""

    def __init__(
        self,
        exchange: Artifact,
        exchange_parts: Sequence[Part],
        clusters: Artifact,
        fingerprint: str,
        groups: Groups,
        layout: ShardLayout,
        shard_bytes: int,
    ) -> None:
        self._exchange, self._exchange_parts = exchange, exchange_parts
        self._clusters, self._fingerprint = clusters, fingerprint
        self._groups, self._layout = groups, layout
        self._shard_bytes = shard_bytes

    def process(self, unit: Unit) -> Receipt:
        watch = Stopwatch()
        table = read_bucket(self._exchange, self._exchange_parts, unit.number)
        rows = 0 if table is None else table.num_rows
        if rows != unit.rows:
            raise DataError(f"{self._exchange.folder.uri}: bucket {unit.number} has {rows} rows, expected {unit.rows}")
        parts: list[Part] = []
        pieces: list[dict[str, Any]] = []
        for shard, writer in enumerate(self._shards(table) if table is not None else ()):
            parts += writer.write(self._clusters, f"bucket-{unit.number:05d}-{shard}", shard=shard)
            pieces += [{**piece, "shard": shard} for piece in writer.pieces]
        receipt = Receipt(
            unit=unit.number,
            fingerprint=self._fingerprint,
            parts=parts,
            counts=Counts(read=rows, written=sum(piece["rows"] for piece in pieces)),
            seconds=watch.seconds,
            details={"pieces": pieces},
        )
        self._clusters.write_receipt(receipt)
        return receipt

    def _shards(self, table: pa.Table) -> Iterator[ShardWriter]:
        table = sort_rows(table)
        schemas = [self._layout.schema, self._layout.vectors_schema or pa.schema([])]
        read_by_training = table.select([name for schema in schemas for name in schema.names])
        target_rows = max(self._layout.run_rows, int(self._shard_bytes / (read_by_training.nbytes / table.num_rows)))
        writer, filled = ShardWriter(self._layout), 0
        for cluster, start, stop in _pieces(table["cluster"].to_numpy(), target_rows):
            if filled and filled + stop - start > 1.25 * target_rows:
                yield writer
                writer, filled = ShardWriter(self._layout), 0
            piece = table.slice(start, stop - start)
            group = int(np.searchsorted(self._groups.first_cluster, cluster, side="right")) - 1
            writer.add(
                piece,
                self._text(piece, cluster - int(self._groups.first_cluster[group])),
                source=self._groups.names[group],
                cluster=cluster - int(self._groups.first_cluster[group]),
                mean_cosine=_mean(piece["cosine"]),
            )
            filled += stop - start
        yield writer

    @staticmethod
    def _text(piece: pa.Table, cluster: int) -> pa.Table:
        text = piece.select([name for name in _TEXT if name in piece.column_names])
        numbers = pa.array(np.full(piece.num_rows, cluster, np.int32))
        return text.append_column("cluster", numbers).append_column("cosine", piece["cosine"])


def sort_rows(table: pa.Table) -> pa.Table:
    """By cluster, then hash, then pair_id (hashes may collide)."""
    order = pc.sort_indices(table, [(name, "ascending") for name in ("cluster", "hash", "pair_id")])
    return table.take(order).combine_chunks()


def _pieces(cluster: np.ndarray, target_rows: int) -> Iterator[tuple[int, int, int]]:
    """(cluster, start, stop) of each piece in sorted rows; clusters much larger than a shard are cut evenly."""
    starts = np.flatnonzero(np.diff(cluster, prepend=-1))
    for start, stop in zip(starts.tolist(), [*starts[1:].tolist(), len(cluster)], strict=True):
        parts = -(-(stop - start) // int(1.25 * target_rows))
        edges = np.linspace(start, stop, parts + 1).astype(int).tolist()
        for first, last in pairwise(edges):
            yield int(cluster[start]), first, last


def _mean(column: pa.ChunkedArray) -> float:
    return float(np.mean(column.to_numpy(), dtype=np.float64))
