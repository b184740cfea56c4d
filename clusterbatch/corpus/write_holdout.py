"""Writer of what was held out, as one BEIR folder: all documents, the held-out queries, their judgements by split."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence

import pyarrow as pa
import xxhash

from clusterbatch.corpus.holdout import SPLITS, split_of
from clusterbatch.runtime import Result, WorkItem
from clusterbatch.store.artifact import Artifact, Part
from clusterbatch.store.checksum import checksum
from clusterbatch.store.tables import read_parquet

HOLDOUT = "holdout"
_ROLE = "collection"
# Lines that are written at once.
_LINES = 4096
_quoted = json.JSONEncoder(ensure_ascii=False).encode


class CollectionWorker:
    """Turn what the buckets left into corpus.jsonl, queries.jsonl and qrels/SPLIT.tsv of `corpus`, in one item.

    images: sides ("query", "document") that are images. BEIR's layout knows only texts; images are named as in MTEB's.
    """

    def __init__(
        self,
        corpus: Artifact,
        leftovers: Artifact,
        documents: Sequence[Part],
        held_out: Sequence[Part],
        images: Sequence[str],
    ) -> None:
        self._corpus = corpus
        self._leftovers = leftovers
        self._documents = documents
        self._held_out = held_out
        self._field = {side: "image" if side in images else "text" for side in ("query", "document")}

    def process(self, item: WorkItem, output: None) -> Result:
        return Result([self._write_documents(), *self._write_queries()])

    def _write_documents(self) -> Part:
        digest, size, rows = xxhash.xxh3_128(), 0, 0
        with tempfile.NamedTemporaryFile(suffix=".jsonl") as file:
            for lines in self._document_lines():
                data = "".join(lines).encode()
                digest.update(data)
                size += len(data)
                rows += len(lines)
                file.write(data)
            file.flush()
            self._corpus.folder.upload(f"{HOLDOUT}/corpus.jsonl", file.name)
        path = f"{HOLDOUT}/corpus.jsonl"
        return Part(path=path, rows=rows, bytes=size, checksum=digest.hexdigest(), details={"role": _ROLE})

    def _document_lines(self) -> Iterator[list[str]]:
        """Yield lines, those of some documents at a time."""
        # Put together by hand: JSON's encoder takes several times as long for an object.
        field = self._field["document"]
        for part in self._documents:
            for batch in read_parquet(self._leftovers.folder, part).to_batches(_LINES):
                documents = zip(batch["document_hash"].to_pylist(), batch["document"].to_pylist(), strict=True)
                yield [
                    f'{{"_id": "{document_id(number)}", "title": "", "{field}": {_quoted(text)}}}\n'
                    for number, text in documents
                ]

    def _write_queries(self) -> Iterator[Part]:
        tables = [read_parquet(self._leftovers.folder, part) for part in self._held_out]
        held_out = pa.concat_tables(tables).sort_by([("query_hash", "ascending"), ("document_hash", "ascending")])
        texts: dict[int, str] = {}
        judgements: dict[str, list[str]] = {split: [] for split in SPLITS}
        for row in held_out.to_pylist():
            texts.setdefault(row["query_hash"], row["query"])
            line = f"{query_id(row['query_hash'])}\t{document_id(row['document_hash'])}\t1\n"
            judgements[split_of(row["query_hash"])].append(line)
        queries = [
            json.dumps({"_id": query_id(key), self._field["query"]: text}, ensure_ascii=False)
            for key, text in texts.items()
        ]
        yield self._write("queries.jsonl", "".join(f"{line}\n" for line in queries), len(queries))
        for split, lines in judgements.items():
            yield self._write(f"qrels/{split}.tsv", "".join(["query-id\tcorpus-id\tscore\n", *lines]), len(lines))

    def _write(self, name: str, text: str, rows: int) -> Part:
        data = text.encode()
        path = f"{HOLDOUT}/{name}"
        self._corpus.folder.write(path, data)
        return Part(path=path, rows=rows, bytes=len(data), checksum=checksum(data), details={"role": _ROLE})


def document_id(document_hash: int) -> str:
    """Return the id of a document in the held-out collection."""
    return f"d{document_hash:016x}"


def query_id(query_hash: int) -> str:
    """Return the id of a query in the held-out collection."""
    return f"q{query_hash:016x}"
