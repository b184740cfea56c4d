"""Small corpora, committed as the ingest stage commits them, for tests of the stages after it."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from clusterbatch.config import RunConfig
from clusterbatch.corpus.normalise import pair_ids, text_hashes
from clusterbatch.corpus.row_groups import PAIRS
from clusterbatch.schema import corpus_schema
from clusterbatch.store import Counts, Manifest, Receipt
from clusterbatch.store.tables import write_parquet
from clusterbatch.store.workspace import Workspace


def corpus_table(queries: Sequence[str], documents: Sequence[str], sources: Sequence[str]) -> pa.Table:
    rows = len(queries)
    return pa.table(
        {
            "pair_id": pair_ids(list(sources), list(queries), list(documents)),
            "query": list(queries),
            "document": list(documents),
            "source": list(sources),
            "query_hash": text_hashes(queries, rows),
            "document_hash": text_hashes(documents, rows),
        },
        schema=corpus_schema(),
    )


def commit_corpus(config: RunConfig, table: pa.Table, *, row_group_rows: int = 64, part_rows: int = 256) -> Manifest:
    """Writes `table` as the corpus of a workspace, in parts of `part_rows` and row groups of `row_group_rows`."""
    artifact = Workspace(config).corpus
    receipts = []
    for unit, start in enumerate(range(0, table.num_rows, part_rows)):
        piece = table.slice(start, part_rows)
        part = write_parquet(artifact, f"part-{unit:05d}", piece, row_group_rows, role=PAIRS)
        counts = Counts(read=piece.num_rows, written=piece.num_rows)
        receipts.append(Receipt(unit=unit, fingerprint="corpus", parts=[part], counts=counts))
    return artifact.commit("corpus", receipts, config={}, inputs={}, seconds=0.0)
