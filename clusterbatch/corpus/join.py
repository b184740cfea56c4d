"""Joins judgements with their documents and queries through storage, so that no side has to fit anywhere whole.

Scatter: slices of all files become rows by id, bucketed: documents and judgements by document, queries by query.
Then a bucket's judgements find their documents and go on, bucketed by query; and last they find their queries, and are
pairs like those of any other input.
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
from clusterbatch.corpus.read import REJECTS, PairSink, Sorting
from clusterbatch.corpus.readers.dispatch import opened
from clusterbatch.corpus.readers.jsonl import lines_of, parse_object
from clusterbatch.corpus.readers.records import RowError, check_unicode
from clusterbatch.corpus.rows import REJECTED, BrokenFileError, Chunk, Reject, rejected, shown
from clusterbatch.corpus.validate import validate
from clusterbatch.errors import DataError
from clusterbatch.runtime import Unit
from clusterbatch.store.artifact import Artifact, Counts, Part, Receipt, Stopwatch
from clusterbatch.store.shuffle import read_bucket, write_buckets
from clusterbatch.store.tables import write_parquet

NOT_RELEVANT = "judged not relevant"
NO_DOCUMENT = "no document with this id"
NO_QUERY = "no query with this id"
ID_TWICE = "an id that stands twice"

_ORIGIN = [pa.field("slice", pa.int64()), pa.field("position", pa.int64())]
_SCHEMAS: dict[Role, pa.Schema] = {
    "documents": pa.schema([pa.field("id", pa.string()), pa.field("text", pa.string()), *_ORIGIN]),
    "queries": pa.schema([pa.field("id", pa.string()), pa.field("text", pa.string()), *_ORIGIN]),
    "judgements": pa.schema(
        [pa.field("id", pa.string()), pa.field("query_id", pa.string()), pa.field("source", pa.string()), *_ORIGIN]
    ),
}

# Judgements that have their documents, by query.
_FOUND = pa.schema(
    [pa.field("id", pa.string()), pa.field("source", pa.string()), *_ORIGIN, pa.field("document", pa.string())]
)
_CHUNK_ROWS = 8192


class ScatterWorker:
    """Reads one slice of a collection's file; leaves its rows by id."""

    def __init__(self, artifact: Artifact, fingerprint: str, buckets: int, encoding: str) -> None:
        self._artifact = artifact
        self._fingerprint = fingerprint
        self._buckets = buckets
        self._encoding = encoding

    def process(self, unit: Unit) -> Receipt:
        stopwatch = Stopwatch()
        item: CollectionSlice = unit.payload[0]
        rows: list[dict[str, Any]] = []
        rejects: list[Reject] = []
        counts = Counts()
        seen = 0
        try:
            with opened(item.piece.file, self._artifact.folder.storage) as (_, file):
                for position, values in enumerate(parsed_lines(file, item, self._encoding, to_store=True)):
                    seen += 1
                    if isinstance(values, Reject):
                        rejects.append(values)
                    elif values is None:
                        counts += Counts(read=1, set_aside={NOT_RELEVANT: 1})
                    else:
                        rows.append({**values, "slice": item.piece.number, "position": position})
        except BrokenFileError as error:
            raise DataError(f"{item.piece.file.uri}: {error}") from error
        table = pa.Table.from_pylist(rows, schema=_SCHEMAS[item.role])
        # Only judgements are rows of the corpus; texts count where they cannot be read.
        pairs = len(rows) if item.role == "judgements" else 0
        counts += Counts(read=pairs + len(rejects), written=pairs, rejected=len(rejects))
        parts = [
            write_buckets(
                self._artifact,
                unit.number,
                table,
                buckets_of(table["id"], self._buckets),
                self._buckets,
                role=item.role,
            )
        ]
        if rejects:
            positions = np.array([reject.row for reject in rejects], np.int64)
            table = rejected(np.full(len(rejects), item.piece.number), positions, rejects)
            parts.append(write_parquet(self._artifact, f"rejects-{unit.number:08d}", table, role=REJECTS))
        receipt = Receipt(
            unit=unit.number,
            fingerprint=self._fingerprint,
            parts=parts,
            counts=counts,
            seconds=stopwatch.seconds,
            details={"slices": [(item.piece.number, item.piece.file.uri, seen)]},
        )
        self._artifact.write_receipt(receipt)
        return receipt


class DocumentWorker:
    """Gives the judgements of one bucket their documents; leaves them bucketed by query."""

    def __init__(
        self, artifact: Artifact, scattered: Artifact, fingerprint: str, parts: dict[Role, list[Part]], buckets: int
    ) -> None:
        self._artifact = artifact
        self._scattered = scattered
        self._fingerprint = fingerprint
        self._parts = parts
        self._buckets = buckets

    def process(self, unit: Unit) -> Receipt:
        stopwatch = Stopwatch()
        judgements = bucket_table(self._scattered, self._parts["judgements"], unit.number, _SCHEMAS["judgements"])
        documents = bucket_table(self._scattered, self._parts["documents"], unit.number, _SCHEMAS["documents"])
        documents, twice = first_of_id(documents)
        index = pc.index_in(judgements["id"], value_set=documents["id"].combine_chunks())
        known = index.is_valid()
        lost = judgements.filter(pc.invert(known))
        found = judgements.filter(known)
        texts = documents["text"].take(index.drop_null())
        found = found.drop_columns(["id"]).rename_columns(["id", "source", "slice", "position"])
        found = found.append_column("document", texts)
        rejects = [
            with_reason(lost, NO_DOCUMENT, lost["id"]),
            with_reason(twice, ID_TWICE, twice["id"]),
        ]
        parts = [
            write_buckets(
                self._artifact, unit.number, found, buckets_of(found["id"], self._buckets), self._buckets, role="found"
            )
        ]
        refused = pa.concat_tables(rejects)
        if refused.num_rows:
            parts.append(write_parquet(self._artifact, f"rejects-{unit.number:08d}", refused, role=REJECTS))
        receipt = Receipt(
            unit=unit.number,
            fingerprint=self._fingerprint,
            parts=parts,
            counts=Counts(read=judgements.num_rows + twice.num_rows, written=found.num_rows, rejected=refused.num_rows),
            seconds=stopwatch.seconds,
        )
        self._artifact.write_receipt(receipt)
        return receipt


class QueryWorker:
    """Gives the judgements of one bucket their queries: a source of pairs, as a slice of a file is."""

    def __init__(
        self,
        artifact: Artifact,
        scattered: Artifact,
        joined: Artifact,
        fingerprint: str,
        config: CorpusConfig,
        queries: Sequence[Part],
        found: Sequence[Part],
        sorting: Sorting,
    ) -> None:
        self._artifact = artifact
        self._scattered = scattered
        self._joined = joined
        self._fingerprint = fingerprint
        self._config = config
        self._queries = queries
        self._found = found
        self._sorting = sorting

    def process(self, unit: Unit) -> Receipt:
        stopwatch = Stopwatch()
        sink = PairSink(self._artifact, unit.number, self._sorting)
        judgements = bucket_table(self._joined, self._found, unit.number, _FOUND)
        queries = bucket_table(self._scattered, self._queries, unit.number, _SCHEMAS["queries"])
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
        receipt = Receipt(
            unit=unit.number,
            fingerprint=self._fingerprint,
            parts=sink.finish(),
            counts=sink.counts,
            seconds=stopwatch.seconds,
            details={"cut": sink.cut},
        )
        self._artifact.write_receipt(receipt)
        return receipt


def buckets_of(ids: pa.ChunkedArray, buckets: int) -> np.ndarray:
    """(n,) int64 in [0, buckets), by the hash of each id."""
    hashes = np.fromiter((xxhash.xxh3_64_intdigest(text.encode()) for text in ids.to_pylist()), np.uint64, len(ids))
    return (hashes % np.uint64(buckets)).astype(np.int64)


def bucket_table(artifact: Artifact, parts: Sequence[Part], bucket: int, schema: pa.Schema) -> pa.Table:
    """The rows of a bucket, in the order of `parts`; an empty table of `schema` where there are none."""
    table = read_bucket(artifact, parts, bucket)
    return schema.empty_table() if table is None else table


def first_of_id(table: pa.Table) -> tuple[pa.Table, pa.Table]:
    """The first row of each id, in order, and the other rows."""
    ids = table["id"].combine_chunks()
    first = pc.index_in(ids, value_set=ids).to_numpy(zero_copy_only=False) == np.arange(len(ids))
    return table.filter(pa.array(first)), table.filter(pa.array(~first))


def with_reason(rows: pa.Table, reason: str, content: pa.ChunkedArray) -> pa.Table:
    """A table of `REJECTED` for rows that have slice and position."""
    columns = [rows["slice"], rows["position"], pa.repeat(pa.scalar(reason), rows.num_rows), content]
    return pa.table(columns, schema=REJECTED)


def parsed_lines(
    file: BinaryIO, item: CollectionSlice, encoding: str = "utf-8", to_store: bool = False
) -> Iterator[dict[str, Any] | Reject | None]:
    """Values of each line that is one; None for a judgement that says "not relevant". `to_store` wants texts that can
    be written: Unicode.

    Raises BrokenFileError for an encoding in which lines cannot be told by their bytes.
    """
    if encoding.startswith(("utf-16", "utf-32")):
        raise BrokenFileError(f"{encoding.upper()} text; a collection's lines must be told by their bytes")
    whole = not item.piece.file.name.endswith((".jsonl", ".tsv"))
    lines = (line for line in lines_of(file, None if whole else item.piece) if line.strip())
    if item.role == "judgements":
        parse: Callable[[bytes, str], dict[str, Any] | None] = _judgement
        # BEIR has a header line, MS MARCO has none.
        lines = (line for line in lines if not line.endswith(b"\tscore"))
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
        # For test collections; as input it has no text, and is rejected for that.
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
    fields = text.split("\t") if "\t" in text else text.split()
    # TREC has an unused column between query and document; BEIR has none.
    if len(fields) == 4:
        del fields[1]
    try:
        query, document, grade = fields[0], fields[1], float(fields[2])
    except (IndexError, ValueError):
        raise RowError("expected query id, document id and a grade") from None
    return {"id": document, "query_id": query} if grade > 0 else None


def _decode(line: bytes, encoding: str) -> str:
    try:
        return line.decode(encoding)
    except UnicodeDecodeError as error:
        raise RowError(f"invalid {encoding.upper()} at byte {error.start} of the line") from None
