"""Join of judgements with their documents and queries through storage, so that no side has to fit in memory.

First, slices of all files become rows by id, bucketed: documents and judgements by document, queries by query. Then the
judgements of a bucket get their documents and are bucketed by query; last, they get their queries and are pairs like
those of any other input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from clusterbatch.config import CorpusConfig
from clusterbatch.corpus.beir import CollectionSlice, Role
from clusterbatch.corpus.judgements import is_header, parse_judgement
from clusterbatch.corpus.read import REJECTS, PairSink, Sorting
from clusterbatch.corpus.readers.dispatch import opened
from clusterbatch.corpus.readers.jsonl import lines_of, parse_object
from clusterbatch.corpus.readers.records import RowError, check_unicode
from clusterbatch.corpus.rows import REJECTED, BrokenFileError, Chunk, Reject, rejected, shown
from clusterbatch.corpus.validate import validate
from clusterbatch.errors import DataError
from clusterbatch.runtime import Result, WorkItem
from clusterbatch.store.artifact import Artifact, Counts, Part
from clusterbatch.store.shuffle import read_bucket, write_buckets
from clusterbatch.store.tables import write_parquet

NOT_RELEVANT = "judged not relevant"
NO_DOCUMENT = "no document with this id"
NO_QUERY = "no query with this id"
ID_TWICE = "an id that occurs twice"

_ORIGIN = [pa.field("slice", pa.int64()), pa.field("position", pa.int64())]
_SCHEMAS: dict[Role, pa.Schema] = {
    "documents": pa.schema([pa.field("id", pa.string()), pa.field("text", pa.string()), *_ORIGIN]),
    "queries": pa.schema([pa.field("id", pa.string()), pa.field("text", pa.string()), *_ORIGIN]),
    "judgements": pa.schema(
        [pa.field("id", pa.string()), pa.field("query_id", pa.string()), pa.field("source", pa.string()), *_ORIGIN]
    ),
}

# Judgements with their documents, by query.
_FOUND = pa.schema(
    [pa.field("id", pa.string()), pa.field("source", pa.string()), *_ORIGIN, pa.field("document", pa.string())]
)
_CHUNK_ROWS = 8192


class ScatterWorker:
    """Read one slice of a collection's file; write its rows by id."""

    def __init__(self, buckets: int, encoding: str, flush_bytes: int) -> None:
        self._buckets = buckets
        self._encoding = encoding
        self._flush_bytes = flush_bytes

    def process(self, item: WorkItem, output: Artifact) -> Result:
        piece: CollectionSlice = item.payload[0]
        scatter = _Scatter(output, item.number, piece, self._buckets, self._flush_bytes)
        try:
            with opened(piece.piece.file, output.folder.storage) as (_, file):
                for position, values in enumerate(parsed_lines(file, piece, self._encoding, to_store=True)):
                    scatter.add(position, values)
        except BrokenFileError as error:
            raise DataError(f"{piece.piece.file.uri}: {error}") from error
        parts, counts = scatter.finish()
        return Result(parts, counts, {"slices": [(piece.piece.number, piece.piece.file.uri, scatter.seen)]})


class _Scatter:
    """Collect the rows of one slice and write them by bucket; a compressed file is one slice, however large it is."""

    def __init__(self, output: Artifact, number: int, piece: CollectionSlice, buckets: int, flush_bytes: int) -> None:
        self._output = output
        self._number = number
        self._piece = piece
        self._buckets = buckets
        self._flush_bytes = flush_bytes
        self._rows: list[dict[str, Any]] = []
        self._rejects: list[Reject] = []
        self._tables: list[pa.Table] = []
        self._reject_tables: list[pa.Table] = []
        self._bytes = 0
        self._parts: list[Part] = []
        self._written = self._rejected = self._not_relevant = 0
        self.seen = 0

    def add(self, position: int, values: dict[str, Any] | Reject | None) -> None:
        self.seen += 1
        if isinstance(values, Reject):
            self._rejects.append(values)
        elif values is None:
            self._not_relevant += 1
        else:
            self._rows.append({**values, "slice": self._piece.piece.number, "position": position})
        if len(self._rows) + len(self._rejects) >= _CHUNK_ROWS:
            self._pack()
            if self._bytes >= self._flush_bytes:
                self._flush()

    def finish(self) -> tuple[list[Part], Counts]:
        """Write what is left; return all parts and what became of the rows."""
        self._pack()
        if self._tables or self._reject_tables or not self._parts:
            self._flush()
        # Only judgements are rows of the corpus; texts count if they cannot be read.
        pairs = self._written if self._piece.role == "judgements" else 0
        aside = {NOT_RELEVANT: self._not_relevant} if self._not_relevant else {}
        read = pairs + self._rejected + self._not_relevant
        return self._parts, Counts(read=read, written=pairs, rejected=self._rejected, set_aside=aside)

    def _pack(self) -> None:
        """Turn the waiting rows into Arrow, which takes a fraction of the memory."""
        if self._rows:
            self._tables.append(pa.Table.from_pylist(self._rows, schema=_SCHEMAS[self._piece.role]))
            self._bytes += self._tables[-1].nbytes
            self._written += len(self._rows)
        if self._rejects:
            positions = np.array([reject.row for reject in self._rejects], np.int64)
            table = rejected(np.full(len(self._rejects), self._piece.piece.number), positions, self._rejects)
            self._reject_tables.append(table)
            self._bytes += table.nbytes
            self._rejected += len(self._rejects)
        self._rows, self._rejects = [], []

    def _flush(self) -> None:
        table = pa.concat_tables([_SCHEMAS[self._piece.role].empty_table(), *self._tables])
        buckets = buckets_of(table["id"], self._buckets)
        self._parts.append(
            write_buckets(self._output, self._number, table, buckets, self._buckets, role=self._piece.role)
        )
        if self._reject_tables:
            refused = pa.concat_tables(self._reject_tables)
            self._parts.append(write_parquet(self._output, f"rejects-{self._number:08d}", refused, role=REJECTS))
        self._tables, self._reject_tables, self._bytes = [], [], 0


class DocumentWorker:
    """Give the judgements of one bucket their documents; write them bucketed by query."""

    def __init__(self, scattered: Artifact, parts: dict[Role, list[Part]], buckets: int) -> None:
        self._scattered = scattered
        self._parts = parts
        self._buckets = buckets

    def process(self, item: WorkItem, output: Artifact) -> Result:
        judgements = bucket_table(self._scattered, self._parts["judgements"], item.number, _SCHEMAS["judgements"])
        documents = bucket_table(self._scattered, self._parts["documents"], item.number, _SCHEMAS["documents"])
        documents, twice = first_of_id(documents)
        index = pc.index_in(judgements["id"], value_set=documents["id"].combine_chunks())
        known = index.is_valid()
        lost = judgements.filter(pc.invert(known))
        found = judgements.filter(known)
        texts = documents["text"].take(index.drop_null())
        found = found.drop_columns(["id"]).rename_columns(["id", "source", "slice", "position"])
        found = found.append_column("document", texts)
        buckets = buckets_of(found["id"], self._buckets)
        parts = [write_buckets(output, item.number, found, buckets, self._buckets, role="found")]
        rejects = [with_reason(lost, NO_DOCUMENT, lost["id"]), with_reason(twice, ID_TWICE, twice["id"])]
        refused = pa.concat_tables(rejects)
        if refused.num_rows:
            parts.append(write_parquet(output, f"rejects-{item.number:08d}", refused, role=REJECTS))
        read = judgements.num_rows + twice.num_rows
        return Result(parts, Counts(read=read, written=found.num_rows, rejected=refused.num_rows))


class QueryWorker:
    """Give the judgements of one bucket their queries: the result is pairs, as those of a slice of a file are."""

    def __init__(
        self,
        scattered: Artifact,
        joined: Artifact,
        config: CorpusConfig,
        queries: Sequence[Part],
        found: Sequence[Part],
        sorting: Sorting,
    ) -> None:
        self._scattered = scattered
        self._joined = joined
        self._config = config
        self._queries = queries
        self._found = found
        self._sorting = sorting

    def process(self, item: WorkItem, output: Artifact) -> Result:
        sink = PairSink(output, item.number, self._sorting)
        judgements = bucket_table(self._joined, self._found, item.number, _FOUND)
        queries = bucket_table(self._scattered, self._queries, item.number, _SCHEMAS["queries"])
        queries, twice = first_of_id(queries)
        index = pc.index_in(judgements["id"], value_set=queries["id"].combine_chunks())
        lost = judgements.filter(index.is_null())
        sink.refuse(with_reason(lost, NO_QUERY, lost["id"]))
        sink.refuse(with_reason(twice, ID_TWICE, twice["id"]))
        found = judgements.filter(index.is_valid()).append_column("query", queries["text"].take(index.drop_null()))
        slices, positions = found["slice"].to_numpy(), found["position"].to_numpy()
        for start in range(0, found.num_rows, _CHUNK_ROWS):
            rows = found.slice(start, _CHUNK_ROWS)
            columns = {name: rows[name].combine_chunks() for name in ("query", "document", "source")}
            chunk = Chunk(np.arange(start, start + rows.num_rows), columns)
            sink.add(validate(chunk, self._config, ""), lambda rows: (slices[rows], positions[rows]))
        return Result(sink.finish(), sink.counts, {"cut": sink.cut})


def buckets_of(ids: pa.ChunkedArray, buckets: int) -> np.ndarray:
    """Return a bucket for each id, by its hash: (n,) int64 in [0, buckets)."""
    hashes = np.fromiter((xxhash.xxh3_64_intdigest(text.encode()) for text in ids.to_pylist()), np.uint64, len(ids))
    return (hashes % np.uint64(buckets)).astype(np.int64)


def bucket_table(artifact: Artifact, parts: Sequence[Part], bucket: int, schema: pa.Schema) -> pa.Table:
    """Return the rows of a bucket, in the order of `parts`; an empty table of `schema` if there are none."""
    table = read_bucket(artifact, parts, bucket)
    return schema.empty_table() if table is None else table


def first_of_id(table: pa.Table) -> tuple[pa.Table, pa.Table]:
    """Return the first row of each id, in order, and the other rows."""
    ids = table["id"].combine_chunks()
    first = pc.index_in(ids, value_set=ids).to_numpy(zero_copy_only=False) == np.arange(len(ids))
    return table.filter(pa.array(first)), table.filter(pa.array(~first))


def with_reason(rows: pa.Table, reason: str, content: pa.ChunkedArray) -> pa.Table:
    """Return a table of `REJECTED` for rows that have slice and position."""
    columns = [rows["slice"], rows["position"], pa.repeat(pa.scalar(reason), rows.num_rows), content]
    return pa.table(columns, schema=REJECTED)


def parsed_lines(
    file: BinaryIO, item: CollectionSlice, encoding: str = "utf-8", to_store: bool = False
) -> Iterator[dict[str, Any] | Reject | None]:
    """Yield the values of each line, a Reject if it has none, or None for a judgement that says "not relevant".

    to_store: reject texts that cannot be written, as they are not Unicode. Raises BrokenFileError for an encoding in
    which bytes do not show where lines end.
    """
    if encoding.startswith(("utf-16", "utf-32")):
        raise BrokenFileError(
            f"{encoding.upper()} text; a collection must be UTF-8 or another encoding that keeps ASCII bytes"
        )
    whole = not item.piece.file.name.endswith((".jsonl", ".tsv"))
    lines = (line for line in lines_of(file, None if whole else item.piece) if line.strip())
    if item.role == "judgements":
        parse: Callable[[bytes, str], dict[str, Any] | None] = _judgement
        # BEIR has a header line, MS MARCO has none.
        lines = (line for line in lines if not is_header(line.decode(encoding, "replace")))
    else:
        parse = _json_text if ".jsonl" in item.piece.file.name else _tab_text
    for position, line in enumerate(lines):
        try:
            values = parse(line, encoding)
            for name, text in (values or {}).items() if to_store else ():
                check_unicode(name, text)
        except RowError as error:
            yield Reject(position, str(error), shown(line.decode(encoding, "backslashreplace")))
            continue
        if values is not None:
            values["id"] = f"{item.collection}:{values['id']}"
            if item.role == "judgements":
                values["query_id"] = f"{item.collection}:{values['query_id']}"
                values["source"] = item.source
        yield values


def _json_text(line: bytes, encoding: str) -> dict[str, Any]:
    value = parse_object(line, encoding)
    if "_id" in value and isinstance(value.get("image"), str):
        # For test collections; as input it is rejected, as it has no text.
        return {"id": str(value["_id"]), "text": "", "image": value["image"]}
    if "_id" not in value or not isinstance(value.get("text"), str):
        raise RowError("expected an object with _id and text")
    title = value.get("title") or ""
    return {"id": str(value["_id"]), "text": f"{title} {value['text']}".strip()}


def _tab_text(line: bytes, encoding: str) -> dict[str, Any]:
    name, tab, text = _decode(line, encoding).partition("\t")
    if not tab:
        raise RowError("expected an id, a tab and a text")
    return {"id": name, "text": text}


def _judgement(line: bytes, encoding: str) -> dict[str, Any] | None:
    text = _decode(line, encoding)
    try:
        query, document, grade = parse_judgement(text)
    except ValueError:
        raise RowError("expected query id, document id and a grade") from None
    return {"id": document, "query_id": query} if grade > 0 else None


def _decode(line: bytes, encoding: str) -> str:
    try:
        return line.decode(encoding)
    except UnicodeDecodeError as error:
        raise RowError(f"invalid {encoding.upper()} at byte {error.start} of the line") from None
