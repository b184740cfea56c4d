"""Reduce side of the shuffle by cluster: a bucket's rows become shards, sorted by cluster and, inside, by hash."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clusterbatch.clustering.features import feature_vectors, unit_length
from clusterbatch.clustering.model import StoredParts
from clusterbatch.config import ClusterConfig
from clusterbatch.corpus.partitions import Partitions
from clusterbatch.errors import DataError
from clusterbatch.runtime import Result, WorkItem
from clusterbatch.shards.bucket_plan import BucketPlan
from clusterbatch.shards.cluster_facts import cluster_facts
from clusterbatch.shards.index import LAYERS
from clusterbatch.shards.layout import ShardSchema, VectorEncoder, squared_errors
from clusterbatch.shards.semantic_duplicates import Found, find_duplicates
from clusterbatch.shards.size_bounds import merge_small, split_large
from clusterbatch.shards.writer import ShardWriter
from clusterbatch.store import Artifact, Counts, Part
from clusterbatch.store.shuffle import read_bucket
from clusterbatch.store.tables import write_parquet

# Content of a part with rows that were set aside.
OUTLIERS = "outliers"
_TEXT = ["pair_id", "source", "query", "document", "negatives"]
_SCORES = ["score", "negative_scores"]
# Bytes of a text column in one piece: the offsets of its type reach 2 GiB.
_PIECE_BYTES = 2**30


class ReduceWorker:
    """Write the shards of one bucket, numbered inside the bucket, as the number of other buckets' shards is unknown.

    facts: receives the bucket's facts about its clusters, for statistics.
    """

    def __init__(
        self,
        exchange: StoredParts,
        facts: Artifact,
        partitions: Partitions,
        plan: BucketPlan,
        schema: ShardSchema,
        config: ClusterConfig,
    ) -> None:
        self._exchange, self._facts, self._partitions = exchange, facts, partitions
        self._plan, self._schema, self._config = plan, schema, config

    def process(self, item: WorkItem, output: Artifact) -> Result:
        write = self._outliers if item.number >= self._plan.cluster_buckets else self._shards
        # Handed over and not kept here: sorting makes a copy, and a bucket is a good part of the worker's memory.
        return write(item.number, self._read(item), output)

    def _read(self, item: WorkItem) -> pa.Table:
        table = read_bucket(self._exchange.artifact, self._exchange.parts, item.number)
        rows = 0 if table is None else table.num_rows
        if table is None or rows != item.rows:
            uri = self._exchange.artifact.folder.uri
            raise DataError(f"{uri}: bucket {item.number} has {rows} rows, expected {item.rows}")
        return table

    def _shards(self, bucket: int, table: pa.Table, output: Artifact) -> Result:
        read = table.num_rows
        columns = _columns(table.append_column("part", pa.array(np.zeros(read, np.int64))))
        del table
        table = self._bounded(bucket, _sorted(columns))
        parts: list[Part] = []
        found: Found | None = None
        if self._config.duplicates.threshold is not None:
            table, found, parts = self._without_duplicates(bucket, table, output)
        shards = self._written(bucket, table, output)
        parts += shards.parts
        facts = cluster_facts(_widened(table), shards.pieces, self._config.features)
        facts_part = write_parquet(self._facts, f"facts-{bucket:05d}", facts)
        details = {"pieces": shards.pieces, "facts": facts_part.model_dump(), "surrogate_errors": shards.errors}
        if found is not None:
            details |= {"duplicates": found.counts, "duplicate_examples": found.examples}
        written = sum(piece["rows"] for piece in shards.pieces)
        aside = {"semantic duplicate": read - written} if read > written else {}
        return Result(parts, Counts(read=read, written=written, set_aside=aside), details)

    def _outliers(self, bucket: int, table: pa.Table, output: Artifact) -> Result:
        columns = _columns(table)
        del table
        table = _sorted(columns)
        part = self._aside(f"outliers-{bucket:05d}", table, output)
        # A pair may be both; it is counted for the first reason.
        inconsistent = pc.sum(table["inconsistent"]).as_py() if "inconsistent" in table.column_names else 0
        reasons = {"inconsistent": inconsistent, "outlier": table.num_rows - inconsistent}
        aside = {reason: rows for reason, rows in reasons.items() if rows}
        return Result([part], Counts(read=table.num_rows, set_aside=aside))

    def _bounded(self, bucket: int, table: pa.Table) -> pa.Table:
        """Return the sorted rows with `cluster` and `part` changed if clusters are too small or too large."""
        config, cluster = self._config, table["cluster"].to_numpy()
        if config.min_size is None and config.max_size is None:
            return table
        alone = self._plan.pieces[cluster[0]] > 1
        if config.min_size is not None and not alone:
            starts = np.flatnonzero(np.diff(cluster, prepend=-1))
            rows = np.diff(np.append(starts, len(cluster)))
            # Cluster by cluster: the vectors of all rows in float32 would be twice the bucket.
            sums = [
                feature_vectors(table.slice(start, number), config.features).sum(axis=0)
                for start, number in zip(starts.tolist(), rows.tolist(), strict=True)
            ]
            means = unit_length(np.stack(sums))
            merged = merge_small(rows, means, self._plan.partition_of(cluster[starts]), config.min_size)
            # A merged cluster has the number of its first member.
            first = cluster[starts][np.searchsorted(merged, merged)]
            cluster = np.repeat(first, rows)
        part = np.zeros(len(cluster), np.int64)
        if config.max_size is not None:
            changes = np.flatnonzero(np.diff(cluster, prepend=-1)).tolist()
            for start, stop in pairwise([*changes, len(cluster)]):
                vectors = partial(feature_vectors, table.slice(start, stop - start), config.features)
                part[start:stop] = split_large(stop - start, config.max_size, vectors)
            # Fragments of a cluster that is spread over several buckets are clusters of their own: no two buckets may
            # share a number.
            part += bucket << 32 if alone else 0
        for name, values in (("cluster", cluster), ("part", part)):
            table = table.set_column(table.schema.get_field_index(name), name, pa.array(values))
        columns = _columns(table)
        del table
        return _sorted(columns)

    def _without_duplicates(self, bucket: int, table: pa.Table, output: Artifact) -> tuple[pa.Table, Found, list[Part]]:
        """Return the sorted rows with their semantic duplicates marked, or apart from those that are dropped, with what
        was found and the part with the dropped rows."""
        found = find_duplicates(table, self._source_of, self._config.duplicates)
        if self._config.duplicates.action == "drop":
            dropped = table.filter(pa.array(found.rank > 0))
            parts = [self._aside(f"dropped-{bucket:05d}", dropped, output)] if dropped.num_rows else []
            return table.filter(pa.array(found.rank == 0)), found, parts
        table = table.append_column("duplicate_group", pa.array(table["hash"].to_numpy()[found.first]))
        if self._config.duplicates.action == "apart":
            columns = _columns(table.append_column("layer", pa.array(np.minimum(found.rank, LAYERS - 1))))
            del table
            table = _sorted(columns)
        return table, found, []

    def _source_of(self, cluster: int) -> str:
        return self._partitions.names[int(self._plan.partition_of(np.array([cluster]))[0])]

    def _aside(self, stem: str, table: pa.Table, output: Artifact) -> Part:
        """Write rows that are set aside, for people."""
        cluster = table["cluster"].to_numpy()
        centroid = cluster - self._plan.first_cluster[self._plan.partition_of(cluster)]
        return write_parquet(output, stem, _text(table, centroid), 8192, content=OUTLIERS)

    def _written(self, bucket: int, table: pa.Table, output: Artifact) -> WrittenShards:
        """Write the shards of sorted rows; one at a time is in memory."""
        done = WrittenShards([], [], [0.0, 0])
        vectors = self._schema.vectors
        of_vectors = 0 if vectors is None else vectors.row_bytes
        each = table.select(self._schema.training.names).nbytes / table.num_rows + of_vectors
        target_rows = max(self._schema.run_rows, int(self._config.shard_bytes / each))
        cluster, part = table["cluster"].to_numpy(), table["part"].to_numpy()
        layer = table["layer"].to_numpy() if "layer" in table.column_names else np.zeros_like(part)
        writer, filled = ShardWriter(self._schema), 0
        for start, stop in _pieces((cluster, part, layer), target_rows):
            rows = stop - start
            if filled and filled + rows > 1.25 * target_rows:
                done.add(writer, bucket, output)
                writer, filled = ShardWriter(self._schema), 0
            partition = int(self._plan.partition_of(cluster[start]))
            centroid = int(cluster[start] - self._plan.first_cluster[partition])
            piece = table.slice(start, rows)
            writer.add(
                self._with_surrogate(piece, done),
                _text(piece, np.full(rows, centroid)),
                source=self._partitions.names[partition],
                centroid=centroid,
                part=int(part[start]),
                **({"layer": int(layer[start])} if layer[start] else {}),
                mean_cosine=float(np.mean(piece["cosine"].to_numpy(), dtype=np.float64)),
            )
            filled += rows
        done.add(writer, bucket, output)
        return done

    def _with_surrogate(self, piece: pa.Table, done: WrittenShards) -> pa.Table:
        """Return the training columns of some rows, and their vectors as they are stored; count the errors of those."""
        training = piece.select(self._schema.training.names)
        stored_as = self._schema.vectors
        if stored_as is None:
            return training
        stored = VectorEncoder(stored_as, self._config.seed).encode(piece)
        errors = squared_errors(stored_as, stored, piece)
        done.errors[0] += float(errors.sum(dtype=np.float64))
        done.errors[1] += len(errors)
        return pa.table({**_columns(training), **dict(zip(stored.schema.names, stored.columns, strict=True))})


@dataclass(frozen=True)
class WrittenShards:
    """Shards of a bucket as far as they are written.

    pieces: entries of their clusters in the index, in the order of the rows; errors: [sum, number] of the squared
    errors of the stored vectors' cosines.
    """

    parts: list[Part]
    pieces: list[dict[str, Any]]
    errors: list[float]

    def add(self, writer: ShardWriter, bucket: int, output: Artifact) -> None:
        """Write the shard that `writer` has collected."""
        shard = self.pieces[-1]["shard"] + 1 if self.pieces else 0
        self.parts.extend(writer.write(output, f"bucket-{bucket:05d}-{shard}", shard=shard))
        self.pieces.extend({**piece, "shard": shard} for piece in writer.pieces)


def _columns(table: pa.Table) -> dict[str, pa.ChunkedArray]:
    return {name: table[name] for name in table.column_names}


def _sorted(columns: dict[str, pa.ChunkedArray]) -> pa.Table:
    """Return the rows sorted by cluster, part, layer, hash and, as hashes may collide, pair_id.

    `columns` is emptied, one by one, so that no more than one column is in memory twice.
    """
    keys = [name for name in ("cluster", "part", "layer", "hash", "pair_id") if name in columns]
    order = pc.sort_indices(pa.table({name: columns[name] for name in keys}), [(name, "ascending") for name in keys])
    ordered: dict[str, pa.ChunkedArray] = {}
    for name in list(columns):
        ordered[name] = _ordered(columns.pop(name), order, text=name in _TEXT)
    return pa.table(ordered)


def _ordered(column: pa.ChunkedArray, order: pa.Array, text: bool) -> pa.ChunkedArray:
    kind = column.type
    if text:
        column = column.cast(_wide(kind))
    # The caller has let go of the chunks: they are freed here, before rows are taken.
    whole = column.combine_chunks()
    del column
    return pa.chunked_array(_taken(whole, order, kind) if text else [whole.take(order)], kind)


def _taken(wide: pa.Array, order: pa.Array, kind: pa.DataType) -> list[pa.Array]:
    """Return the rows of `order` as `kind`, in as many pieces as that needs.

    Arrow gathers rows with their own type's offsets, and the texts of a bucket may be more than 32 bits reach.
    """
    found = wide.take(order)
    if found.nbytes <= _PIECE_BYTES or len(order) == 1:
        return [found.cast(kind)]
    # Not both at once.
    del found
    middle = len(order) // 2
    return [*_taken(wide, order[:middle], kind), *_taken(wide, order[middle:], kind)]


def _widened(table: pa.Table) -> pa.Table:
    """Return the table with text types that rows can be taken from, however much text there is; nothing is copied."""
    fields = [field.with_type(_wide(field.type)) if field.name in _TEXT else field for field in table.schema]
    return table.cast(pa.schema(fields))


def _wide(kind: pa.DataType) -> pa.DataType:
    """Return the type of strings, or lists of them, with offsets of 64 bits."""
    if pa.types.is_list(kind):
        return pa.large_list(kind.value_field.with_type(_wide(kind.value_type)))
    return pa.large_string()


def _pieces(keys: Sequence[np.ndarray], target_rows: int) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of each piece in rows sorted by `keys`; one much larger than a shard is cut evenly."""
    changes = np.any([np.diff(key, prepend=-1) != 0 for key in keys], axis=0)
    for start, stop in pairwise([*np.flatnonzero(changes).tolist(), len(changes)]):
        cuts = -(-(stop - start) // int(1.25 * target_rows))
        yield from pairwise(np.linspace(start, stop, cuts + 1).astype(int).tolist())


def _text(rows: pa.Table, centroid: np.ndarray) -> pa.Table:
    """Return the columns for people and other tools; `centroid`: (rows,) numbers of the fit's centroids, inside each
    partition."""
    text = rows.select([name for name in (*_TEXT, *_SCORES) if name in rows.column_names])
    return text.append_column("centroid", pa.array(centroid.astype(np.int32))).append_column("cosine", rows["cosine"])
