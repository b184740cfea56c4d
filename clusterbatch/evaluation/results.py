"""From candidates to answers: the merge over document ranges, run files in TREC format, scores per query."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa

from clusterbatch.evaluation.search_worker import merge_candidates, read_candidates
from clusterbatch.store import Artifact, Manifest, Part
from clusterbatch.store.tables import read_parquet

SCORES = pa.schema(
    [
        pa.field("collection", pa.string(), nullable=False),
        pa.field("model", pa.string(), nullable=False),
        pa.field("query_id", pa.string(), nullable=False),
        pa.field("metric", pa.string(), nullable=False),
        pa.field("value", pa.float64(), nullable=False),
    ]
)

# Parts that are read at once.
_READERS = 16
# (document id, score), best first, by query id.
Answers = dict[str, list[tuple[str, float]]]


def merge_block(
    artifact: Artifact, parts: Sequence[Part], block: int, queries: Sequence[str], collection: str
) -> Answers:
    """Return the best documents of one block of queries over all document ranges.

    parts: of one model; queries: ids of the block.
    """
    # Waiting for storage is most of the work.
    with ThreadPoolExecutor(_READERS) as readers:
        pieces = list(readers.map(lambda part: read_candidates(artifact, part, block), parts))
    best = merge_candidates(pieces, collection)
    rows = zip(best.ranking.documents.tolist(), best.ranking.scores.tolist(), strict=True)
    return {
        query: [(best.ids[document], score) for document, score in zip(documents, scores, strict=True) if document >= 0]
        for query, (documents, scores) in zip(queries, rows, strict=True)
    }


def run_lines(answers: Answers, tag: str) -> str:
    """Return a run in TREC format: query, Q0, document, rank from 1, score, tag. Scores are written to the last bit."""
    # White space separates the columns.
    tag = "_".join(tag.split())
    return "".join(
        f"{query} Q0 {document} {rank} {score:.9g} {tag}\n"
        for query, best in answers.items()
        for rank, (document, score) in enumerate(best, start=1)
    )


def scores_table(collection: str, model: str, values: Mapping[str, np.ndarray], queries: Sequence[str]) -> pa.Table:
    """Return a table of schema SCORES. values: (Q,) by metric name, in the order of `queries`."""
    rows = len(queries) * len(values)
    columns = {
        "collection": [collection] * rows,
        "model": [model] * rows,
        "query_id": list(queries) * len(values),
        "metric": [metric for metric in values for _ in queries],
        "value": np.concatenate(list(values.values())),
    }
    return pa.table(columns, schema=SCORES)


def read_scores(artifact: Artifact, manifest: Manifest) -> pa.Table:
    """Return the scores of all queries (schema SCORES), in the manifest's order of collections and models."""
    parts = [part for part in manifest.parts if part.path.startswith("scores-")]
    return pa.concat_tables([read_parquet(artifact.folder, part) for part in parts])
