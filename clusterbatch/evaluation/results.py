"""From candidates to answers: the merge over document ranges, run files in TREC format, scores per query."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa

from clusterbatch.errors import DataError
from clusterbatch.evaluation.search_worker import read_candidates
from clusterbatch.search.topk import Ranking, descending_ids, merge
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

# (document id, score), best first, by query id.
Answers = dict[str, list[tuple[str, float]]]


def merge_block(artifact: Artifact, pieces: Sequence[Part], queries: Sequence[str], k: int, collection: str) -> Answers:
    """The best documents of one block of queries over all document ranges.

    pieces: the block's candidates, one part per range; queries: ids, of which the block's come first.
    """
    read = [read_candidates(artifact, piece) for piece in pieces]
    names = [name for _, ids in read for name in ids]
    if len(set(names)) < len(names):
        raise DataError(f"collection {collection}: a document id stands twice in its corpus.jsonl")
    order = descending_ids(names)
    number = np.empty(len(names), np.int64)
    number[order] = np.arange(len(names))
    rankings, first = [], 0
    for ranking, ids in read:
        # Position -1 (no candidate) must stay -1.
        global_number = np.append(number[first : first + len(ids)], -1)
        rankings.append(Ranking(ranking.scores, global_number[ranking.documents]))
        first += len(ids)
    best = merge(rankings, k)
    by_number = [names[row] for row in order]
    return {
        query: [
            (by_number[document], score) for document, score in zip(documents, scores, strict=True) if document >= 0
        ]
        for query, documents, scores in zip(queries, best.documents.tolist(), best.scores.tolist(), strict=False)
    }


def run_lines(answers: Answers, tag: str) -> str:
    """A run in TREC format: query, Q0, document, rank from 1, score, tag. Scores are written to the last bit."""
    return "".join(
        f"{query} Q0 {document} {rank} {score:.9g} {tag}\n"
        for query, best in answers.items()
        for rank, (document, score) in enumerate(best, start=1)
    )


def scores_table(collection: str, model: str, values: Mapping[str, np.ndarray], queries: Sequence[str]) -> pa.Table:
    """Schema SCORES. values: (Q,) by metric name, in the order of `queries`."""
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
    """The scores of all queries (schema SCORES), in the manifest's order of collections and models."""
    parts = [part for part in manifest.parts if part.path.startswith("scores-")]
    return pa.concat_tables([read_parquet(artifact.folder, part) for part in parts])
