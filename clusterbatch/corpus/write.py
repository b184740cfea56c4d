"""Pass 2 of ingest: a bucket of rows becomes parts of the corpus, without its duplicate pairs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, groupby

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clusterbatch.config import CorpusConfig
from clusterbatch.corpus.append import Known
from clusterbatch.corpus.decontaminate import EXACT, NEAR, NEAR_HELD_OUT, Contamination
from clusterbatch.corpus.holdout import HeldOut
from clusterbatch.corpus.near_duplicates import NEAR_PAIR, NearDuplicates
from clusterbatch.corpus.read import REJECTS
from clusterbatch.corpus.row_groups import PAIRS
from clusterbatch.corpus.rows import optional_columns, shown
from clusterbatch.runtime import Result, WorkItem
from clusterbatch.schema import REJECTS as REJECTS_SCHEMA
from clusterbatch.schema import VECTORS, corpus_schema
from clusterbatch.store.artifact import Artifact, Counts, Part, Receipt
from clusterbatch.store.shuffle import read_bucket
from clusterbatch.store.tables import read_parquet, write_parquet

# The role of parts with valid pairs that are not trained on.
ASIDE = "aside"
DUPLICATE = "duplicate pair"
HELD_OUT = "held out"
# From this size on, Arrow cannot reorder the texts of a table with 32-bit offsets.
_LARGE_BYTES = 2**30

_HELD_OUT = pa.schema({"query_hash": pa.uint64(), "query": pa.string(), "document_hash": pa.uint64()})

# A part and the artifact that it is in.
Placed = tuple[Artifact, Part]


@dataclass(frozen=True)
class Origins:
    """Origins of rows: `files[slice]` is a slice's file, `first_row[slice]` (int64) its first row in that file."""

    files: list[str]
    first_row: np.ndarray

    @staticmethod
    def of_receipts(receipts: Iterable[Receipt]) -> Origins:
        """Sum up the receipts of pass 1, whose details name each slice's number, file and rows."""
        # A receipt that was read from storage has lists, a new one tuples.
        slices = sorted(tuple(piece) for receipt in receipts for piece in receipt.details.get("slices", []))
        first_row = np.zeros(len(slices), np.int64)
        rows_before: dict[str, int] = {}
        for number, file, rows in slices:
            first_row[number] = rows_before.get(file, 0)
            rows_before[file] = int(first_row[number]) + rows
        return Origins([file for _, file, _ in slices], first_row)


@dataclass(frozen=True)
class Rejected:
    """Rows that the passes before have rejected and set aside, to be gathered by the last work item.

    broken: what could not be read of files, a table of `rows.REJECTED`.
    """

    parts: tuple[Placed, ...]
    broken: pa.Table
    set_aside: dict[str, int]


@dataclass(frozen=True)
class Exclusions:
    """Valid pairs that are not trained on.

    held_out, held_out_texts: held-out pairs, and texts that others must not be near to; contamination: texts of test
    collections; known: pairs that the corpus has already; leftovers: where the buckets leave what becomes the held-out
    collection, None if there is one already.
    """

    held_out: HeldOut
    held_out_texts: Contamination | None
    contamination: Contamination | None
    near_duplicates: NearDuplicates | None
    leftovers: Artifact | None
    known: Known | None


class WriteWorker:
    """Write one bucket, or (payload `Rejected`) gather what was rejected before."""

    def __init__(
        self,
        config: CorpusConfig,
        pairs: Sequence[Placed],
        origins: Origins,
        exclusions: Exclusions,
        dimensions: int | None,
    ) -> None:
        self._config = config
        self._pairs = pairs
        self._origins = origins
        self._exclusions = exclusions
        self._dimensions = dimensions
        self._schema = corpus_schema(optional_columns(config.columns), dimensions)
        self._tests = exclusions.contamination.load() if exclusions.contamination else None
        self._held_out_texts = exclusions.held_out_texts.load() if exclusions.held_out_texts else None

    def process(self, item: WorkItem, output: Artifact) -> Result:
        if isinstance(item.payload, Rejected):
            return self._gather_rejects(item.number, item.payload, output)
        return self._write_bucket(item.number, output)

    def _write_bucket(self, bucket: int, output: Artifact) -> Result:
        table = self._read_bucket(bucket)
        if table is None:
            return _result([], Counts(), Counter(), Counter())
        read = table.num_rows
        refused: list[tuple[pa.Table, str]] = []
        if self._dimensions is not None:
            table, others = self._of_dimensions(table, self._dimensions)
            refused.append((others, f"vector: of another length than the corpus' {self._dimensions} numbers"))
        first = first_of_pair(table)
        if self._exclusions.known:
            first &= ~self._exclusions.known.mask(bucket, table)
        refused.append((table.filter(pa.array(~first)), DUPLICATE))
        table = table.filter(pa.array(first))
        kept, aside, parts = self._exclude(bucket, table, output)
        parts += self._write_pairs(bucket, kept.select(self._schema.names), output)
        reasons: Counter[str] = Counter()
        for rows, reason in refused:
            if rows.num_rows:
                reasons[reason] = rows.num_rows
                # The text of a duplicate is in the corpus, and need not be kept twice.
                parts.append(self._write_rejects(bucket, rows, pa.repeat(reason, rows.num_rows), None, output))
        sources = pc.value_counts(kept["source"].combine_chunks())
        by_source = Counter({item["values"]: item["counts"] for item in sources.to_pylist()})
        counts = Counts(read=read, written=kept.num_rows, rejected=reasons.total(), set_aside=dict(+aside))
        result = _result(parts, counts, by_source, reasons)
        result.details["echoes"] = int(pc.sum(pc.equal(kept["query_hash"], kept["document_hash"])).as_py() or 0)
        if self._exclusions.leftovers and not self._exclusions.held_out.is_empty:
            if self._exclusions.held_out.by_query:
                # Documents that no other pair trains would be as new as their queries.
                table = table.filter(pc.is_in(table["document_hash"], kept["document_hash"].combine_chunks()))
            result.details["leftovers"] = self._leave_collection(self._exclusions.leftovers, bucket, table)
        return result

    @staticmethod
    def _of_dimensions(table: pa.Table, dimensions: int) -> tuple[pa.Table, pa.Table]:
        """Return the rows whose vectors have that length, and the others."""
        right = np.ones(table.num_rows, bool)
        for name in VECTORS:
            right &= pc.list_value_length(table[name]).to_numpy() == dimensions
        return table.filter(pa.array(right)), table.filter(pa.array(~right))

    def _exclude(self, bucket: int, pairs: pa.Table, output: Artifact) -> tuple[pa.Table, Counter[str], list[Part]]:
        """Return the pairs that are trained on; how many are not, by reason; and the parts that keep the latter."""
        aside: Counter[str] = Counter()
        parts: list[Part] = []
        if self._exclusions.leftovers:
            held_out = self._exclusions.held_out.mask(pairs)
            aside[HELD_OUT] = int(held_out.sum())
            pairs = pairs.filter(pa.array(~held_out))
        for reason, find in self._finders(bucket):
            found = find(pairs)
            aside[reason] = int(found.sum())
            if aside[reason]:
                parts.append(self._write_aside(bucket, pairs.filter(pa.array(found)), reason, output))
                pairs = pairs.filter(pa.array(~found))
        return pairs, aside, parts

    def _finders(self, bucket: int) -> Iterator[tuple[str, Callable[[pa.Table], np.ndarray]]]:
        if not self._exclusions.leftovers:
            yield HELD_OUT, self._exclusions.held_out.mask
        if self._held_out_texts:
            yield NEAR_HELD_OUT, self._held_out_texts.near
        if self._tests:
            yield EXACT, self._tests.exact
            yield NEAR, self._tests.near
        near_duplicates = self._exclusions.near_duplicates
        if near_duplicates:
            yield NEAR_PAIR, lambda pairs: near_duplicates.mask(bucket, pairs)

    def _leave_collection(self, leftovers: Artifact, bucket: int, pairs: pa.Table) -> list[str]:
        """Write the bucket's share of the held-out collection: its documents, once each, and its held-out pairs."""
        hashes = pairs["document_hash"].to_numpy()
        _, first = np.unique(hashes, return_index=True)
        documents = pairs.select(["document_hash", "document"]).take(pa.array(np.sort(first)))
        held = pairs.filter(pa.array(self._exclusions.held_out.judged(pairs)))
        held = held.select(_HELD_OUT.names).cast(_HELD_OUT)
        parts = [
            write_parquet(leftovers, f"documents-{bucket:06d}", documents, role="documents"),
            write_parquet(leftovers, f"held-{bucket:06d}", held, role="held"),
        ]
        return [part.model_dump_json() for part in parts]

    def _read_bucket(self, bucket: int) -> pa.Table | None:
        """Return the rows of one bucket, in the order of slices and positions; None if it is empty."""
        tables = []
        for artifact, parts in groupby(self._pairs, key=lambda placed: placed[0]):
            table = read_bucket(artifact, [part for _, part in parts], bucket)
            if table is not None:
                tables.append(table)
        if not tables:
            return None
        table = pa.concat_tables(tables)
        if table.nbytes >= _LARGE_BYTES:
            table = table.cast(_with_large_texts(table.schema))
        return table.sort_by([("slice", "ascending"), ("position", "ascending")])

    def _gather_rejects(self, number: int, work: Rejected, output: Artifact) -> Result:
        parts: list[Part] = []
        reasons: Counter[str] = Counter()
        waiting: list[pa.Table] = []
        tables = chain((read_parquet(artifact.folder, part) for artifact, part in work.parts), [work.broken])
        for position, rejected in enumerate(tables):
            waiting.append(rejected)
            last = position == len(work.parts)
            if last or sum(table.nbytes for table in waiting) >= self._config.part_bytes:
                table = pa.concat_tables(waiting)
                waiting = []
                if table.num_rows:
                    reasons.update(table["reason"].to_pylist())
                    parts.append(self._write_rejects(number, table, table["reason"], table["content"], output))
        total = sum(part.rows for _, part in work.parts) + work.broken.num_rows
        read = total + sum(work.set_aside.values())
        counts = Counts(read=read, rejected=total, set_aside=work.set_aside)
        return _result(parts, counts, Counter(), reasons)

    def _write_pairs(self, bucket: int, table: pa.Table, output: Artifact) -> list[Part]:
        """Write one part, or several if the bucket is larger than a part should be; whole row groups each."""
        group = self._config.row_group_rows
        pieces = max(1, -(-table.nbytes // (2 * self._config.part_bytes)))
        rows = max(group, -(-table.num_rows // pieces) // group * group)
        return [
            write_parquet(output, f"part-{bucket:06d}", table.slice(start, rows).cast(self._schema), group, role=PAIRS)
            for start in range(0, table.num_rows, rows)
        ]

    def _write_aside(self, bucket: int, pairs: pa.Table, reason: str, output: Artifact) -> Part:
        content = pa.array(
            [shown(row) for row in pairs.select(["query", "document", "source"]).to_pylist()], pa.string()
        )
        table = self._refused(pairs, pa.repeat(reason, pairs.num_rows), content)
        return write_parquet(output, f"aside/part-{bucket:06d}", table, role=ASIDE)

    def _write_rejects(
        self,
        number: int,
        table: pa.Table,
        reasons: pa.Array | pa.ChunkedArray,
        content: pa.ChunkedArray | None,
        output: Artifact,
    ) -> Part:
        refused = self._refused(table, reasons, content)
        return write_parquet(output, f"rejects/part-{number:06d}", refused, role=REJECTS)

    def _refused(
        self,
        table: pa.Table,
        reasons: pa.Array | pa.ChunkedArray,
        content: pa.Array | pa.ChunkedArray | None,
    ) -> pa.Table:
        """Return rows that have slice and position as file, row, reason and content."""
        slices = table["slice"].to_numpy()
        columns = {
            "file": [self._origins.files[number] for number in slices.tolist()],
            "row": pc.add(table["position"], pa.array(self._origins.first_row[slices])),
            "reason": reasons,
            "content": pa.nulls(len(slices), pa.string()) if content is None else content,
        }
        return pa.table(columns, schema=REJECTS_SCHEMA)


def _result(parts: list[Part], counts: Counts, sources: Counter[str], reasons: Counter[str]) -> Result:
    return Result(parts, counts, {"sources": dict(sources), "reasons": dict(reasons)})


def _with_large_texts(schema: pa.Schema) -> pa.Schema:
    """Return the schema with 64-bit offsets for texts."""
    return pa.schema(
        [field.with_type(pa.large_string()) if pa.types.is_string(field.type) else field for field in schema]
    )


def first_of_pair(table: pa.Table) -> np.ndarray:
    """Return which rows are the first of their (query, document) by their hashes, in the table's order: (n,) bool."""
    pairs = np.stack([table["document_hash"].to_numpy(), table["query_hash"].to_numpy()], axis=1)
    # lexsort is stable: of equal pairs, the earliest row comes first.
    order = np.lexsort((pairs[:, 1], pairs[:, 0]))
    ordered = pairs[order]
    new = np.ones(len(order), bool)
    new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    first = np.zeros(len(order), bool)
    first[order[new]] = True
    return first
