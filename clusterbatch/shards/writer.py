"""Writer of one shard: pieces of clusters collected in memory, then written as parts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from clusterbatch.shards.index import LEAST_CROWDING, repeated_share
from clusterbatch.shards.layout import PAIR_SCORES, ROWS, RUNS, TRAINING, VECTORS, ShardSchema
from clusterbatch.store.artifact import Artifact, Part
from clusterbatch.store.checksum import checksum64
from clusterbatch.store.tables import write_parquet


class ShardWriter:
    """Collect the pieces of one shard in memory and write its parts."""

    def __init__(self, schema: ShardSchema) -> None:
        self._schema = schema
        self._files = {TRAINING: RunFile(schema.training)}
        if schema.vectors is not None:
            self._files[VECTORS] = RunFile(schema.vectors.schema)
        self._text: list[pa.Table] = []
        self.pieces: list[dict[str, Any]] = []
        self._rows = 0
        self._runs = 0

    @property
    def bytes(self) -> int:
        """Bytes of tokens and vectors so far."""
        return sum(file.bytes for file in self._files.values())

    def add(self, table: pa.Table, text: pa.Table, **described: Any) -> None:
        """Append one piece of a cluster: `table` has the training columns (and vectors), `text` the same rows.

        described: the entries of schema.CLUSTER_INDEX that the caller knows. `crowding` is added if the piece's rows
        repeat each other's texts so much that the plan has to know.
        """
        assert table.num_rows == text.num_rows > 0
        crowding = max(repeated_share(table[name].to_numpy()) for name in ("query_hash", "document_hash"))
        if crowding >= LEAST_CROWDING:
            described["crowding"] = round(crowding, 4)
        run_rows, training = self._schema.run_rows, self._files[TRAINING]
        first_byte = training.bytes
        for file in self._files.values():
            file.extend(table, run_rows)
        self._text.append(text)
        self.pieces.append(
            {
                **described,
                "first_row": self._rows,
                "rows": table.num_rows,
                "first_run": self._runs,
                "first_byte": first_byte,
                "bytes": training.bytes - first_byte,
            }
        )
        self._rows += table.num_rows
        self._runs += -(-table.num_rows // run_rows)

    def write(self, artifact: Artifact, stem: str, **details: Any) -> list[Part]:
        """Write and return the parts of this shard, each with `details`."""
        parts = write_runs(artifact, stem, self._files, self._rows, **details)
        text = pa.concat_tables(self._text)
        parts.append(write_parquet(artifact, f"{stem}-{ROWS}", text, 8192, content=ROWS, **details))
        scores = [name for name in ("score", "negative_scores") if name in text.column_names]
        if scores:
            # All are read before training. Between the texts, a request of a megabyte would fetch those of 8,192 rows.
            table = text.select(scores)
            parts.append(write_parquet(artifact, f"{stem}-{PAIR_SCORES}", table, content=PAIR_SCORES, **details))
        return parts


def write_runs(artifact: Artifact, stem: str, files: Mapping[str, RunFile], rows: int, **details: Any) -> list[Part]:
    """Write files of the same runs, by content, and the table of these runs; return the parts."""
    parts = []
    table: dict[str, Any] = {}
    for content, file in files.items():
        parts.append(
            artifact.write_part(f"{stem}-{content}", "arrows", file.getvalue(), rows, content=content, **details)
        )
        table[f"{content}_end"] = pa.array(file.ends, pa.int64())
        table[f"{content}_checksum"] = pa.array(file.checksums, pa.uint64())
    return [*parts, write_parquet(artifact, f"{stem}-{RUNS}", pa.table(table), content=RUNS, **details)]


class RunFile:
    """Messages of one file of runs, back to back; every call of `extend` begins a new run."""

    def __init__(self, schema: pa.Schema) -> None:
        self._schema = schema
        # Grown by an eighth at a time; Arrow's streams double, and this may be a good part of what a worker holds.
        self._sink = bytearray()
        self.ends: list[int] = []
        self.checksums: list[int] = []

    def extend(self, table: pa.Table, run_rows: int) -> None:
        batch = table.select(self._schema.names).cast(self._schema).combine_chunks().to_batches()[0]
        for start in range(0, batch.num_rows, run_rows):
            message = batch.slice(start, run_rows).serialize()
            self._sink += memoryview(message)
            self.ends.append(self.bytes)
            self.checksums.append(checksum64(message))

    @property
    def bytes(self) -> int:
        """Bytes so far."""
        return len(self._sink)

    def getvalue(self) -> memoryview:
        return memoryview(self._sink)
