"""Pass 2 of ingest: a bucket of rows becomes parts of the corpus, without its duplicate pairs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clusterbatch.config import CorpusConfig
from clusterbatch.corpus.origins import Origins
from clusterbatch.corpus.rows import optional_columns
from clusterbatch.corpus.units import PAIRS
from clusterbatch.runtime import Unit
from clusterbatch.schema import REJECTS, corpus_schema
from clusterbatch.store.artifact import Artifact, Counts, Part, Receipt, Stopwatch
from clusterbatch.store.exchange import read_bucket
from clusterbatch.store.tables import read_parquet, write_parquet

DUPLICATE = "duplicate pair"


class WriteWorker:
    """Writes one bucket, or (payload "rejects") gathers what pass 1 rejected."""

    def __init__(
        self,
        artifact: Artifact,
        exchange: Artifact,
        fingerprint: str,
        config: CorpusConfig,
        pairs: Sequence[Part],
        rejects: Sequence[Part],
        origins: Origins,
    ) -> None:
        self._artifact = artifact
        self._exchange = exchange
        self._fingerprint = fingerprint
        self._config = config
        self._pairs = pairs
        self._rejects = rejects
        self._origins = origins

    def process(self, unit: Unit) -> Receipt:
        stopwatch = Stopwatch()
        receipt = self._gather_rejects(unit.number) if unit.payload == "rejects" else self._write_bucket(unit.number)
        receipt = receipt.model_copy(update={"seconds": stopwatch.seconds})
        self._artifact.write_receipt(receipt)
        return receipt

    def _write_bucket(self, bucket: int) -> Receipt:
        table = read_bucket(self._exchange, self._pairs, bucket)
        if table is None:
            return self._receipt(bucket, [], Counts(), Counter(), Counter())
        first = first_of_pair(table)
        kept = table.filter(pa.array(first)).select(corpus_schema(optional_columns(self._config.columns)).names)
        parts = self._write_pairs(bucket, kept)
        duplicates = table.filter(pa.array(~first))
        reasons: Counter[str] = Counter()
        if duplicates.num_rows:
            reasons[DUPLICATE] = duplicates.num_rows
            # Which pair it repeats is in the corpus; its text need not be kept twice.
            parts.append(self._write_rejects(bucket, duplicates, pa.repeat(DUPLICATE, duplicates.num_rows), None))
        sources = pc.value_counts(kept["source"].combine_chunks())
        by_source = Counter({item["values"]: item["counts"] for item in sources.to_pylist()})
        counts = Counts(read=table.num_rows, written=kept.num_rows, rejected=duplicates.num_rows)
        return self._receipt(bucket, parts, counts, by_source, reasons)

    def _gather_rejects(self, number: int) -> Receipt:
        parts: list[Part] = []
        reasons: Counter[str] = Counter()
        waiting: list[pa.Table] = []
        for position, part in enumerate(self._rejects):
            waiting.append(read_parquet(self._exchange.folder, part.path))
            last = position == len(self._rejects) - 1
            if last or sum(table.nbytes for table in waiting) >= self._config.part_bytes:
                table = pa.concat_tables(waiting)
                waiting = []
                reasons.update(table["reason"].to_pylist())
                parts.append(self._write_rejects(number, table, table["reason"], table["content"]))
        total = sum(part.rows for part in self._rejects)
        return self._receipt(number, parts, Counts(read=total, rejected=total), Counter(), reasons)

    def _write_pairs(self, bucket: int, table: pa.Table) -> list[Part]:
        """One part, or several where the bucket came out larger than a part should be; whole row groups each."""
        group = self._config.row_group_rows
        pieces = max(1, -(-table.nbytes // (2 * self._config.part_bytes)))
        rows = max(group, -(-table.num_rows // pieces) // group * group)
        return [
            write_parquet(self._artifact, f"part-{bucket:06d}", table.slice(start, rows), group, role=PAIRS)
            for start in range(0, table.num_rows, rows)
        ]

    def _write_rejects(
        self, number: int, table: pa.Table, reasons: pa.Array | pa.ChunkedArray, content: pa.ChunkedArray | None
    ) -> Part:
        slices = table["slice"].to_numpy()
        positions = table["position"]
        rows = pc.add(positions, pa.array(self._origins.first_row[slices]))
        columns = {
            "file": [self._origins.files[number] for number in slices.tolist()],
            "row": rows,
            "reason": reasons,
            "content": pa.nulls(len(slices), pa.string()) if content is None else content,
        }
        return write_parquet(
            self._artifact, f"rejects/part-{number:06d}", pa.table(columns, schema=REJECTS), role="rejects"
        )

    def _receipt(
        self, unit: int, parts: list[Part], counts: Counts, sources: Counter[str], reasons: Counter[str]
    ) -> Receipt:
        return Receipt(
            unit=unit,
            fingerprint=self._fingerprint,
            parts=parts,
            counts=counts,
            details={"sources": dict(sources), "reasons": dict(reasons)},
        )


def first_of_pair(table: pa.Table) -> np.ndarray:
    """(n,) bool: the first row of each (query, document) by their hashes, in the table's order."""
    pairs = np.stack([table["document_hash"].to_numpy(), table["query_hash"].to_numpy()], axis=1)
    # lexsort is stable: of equal pairs, the earliest row comes first.
    order = np.lexsort((pairs[:, 1], pairs[:, 0]))
    ordered = pairs[order]
    new = np.ones(len(order), bool)
    new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    first = np.zeros(len(order), bool)
    first[order[new]] = True
    return first
