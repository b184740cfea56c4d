"""A workspace with real pairs and vectors that were computed before:
`python -m tests.benchmarks.real_workspace WORKSPACE --pairs FOLDER --vectors FOLDER`.

The vectors are `{query,document}-FILE-OFFSET.npy`, rows in the order of `FILE.parquet`; the pairs are ingested as
always, and each row gets the vectors of its own texts.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clusterbatch.clustering.features import unit_length
from clusterbatch.config import RunConfig
from clusterbatch.corpus.ingest import ingest
from clusterbatch.corpus.row_groups import read_row_group, row_groups_of
from clusterbatch.embedding.vectors import vector_column
from clusterbatch.schema import embeddings_schema
from clusterbatch.store import Counts, Receipt, Stopwatch
from clusterbatch.store.tables import write_parquet
from clusterbatch.store.workspace import Workspace


def build(uri: str, pairs: Path, vectors: Path) -> RunConfig:
    """Pairs whose vectors are not there are left out of the corpus' paths, file by file."""
    known = {side: _load(pairs, vectors, side) for side in ("query", "document")}
    complete = [name for name in known["query"][1] if name in known["document"][1]]
    config = RunConfig.model_validate(
        {"workspace": uri, "corpus": {"paths": [str(pairs / f"{name}.parquet") for name in complete]}}
    )
    corpus = ingest(config)
    workspace, watch = Workspace(config), Stopwatch()
    embeddings, parts, rows = workspace.embeddings(), [], 0
    if embeddings.is_done(corpus.fingerprint):
        return config
    for unit in row_groups_of(corpus):
        table = read_row_group(workspace.corpus, unit, ["pair_id", "source", "query", "document"])
        columns = [table["pair_id"].combine_chunks(), table["source"].combine_chunks()]
        for side in ("query", "document"):
            values, _, row_of_text = known[side]
            chosen = values[[row_of_text[text] for text in table[side].to_pylist()]]
            columns.append(vector_column(unit_length(chosen.astype(np.float32)).astype(np.float16)))
        made = pa.Table.from_arrays(columns, schema=embeddings_schema(columns[2].type.list_size))
        parts.append(write_parquet(embeddings, f"unit-{unit.number:08d}", made))
        rows += made.num_rows
    receipt = Receipt(unit=0, fingerprint=corpus.fingerprint, parts=parts, counts=Counts(read=rows, written=rows))
    dimensions = known["query"][0].shape[1]
    embeddings.commit(
        corpus.fingerprint,
        [receipt],
        config={},
        inputs={"corpus": corpus.fingerprint},
        seconds=watch.seconds,
        details={"dimensions": dimensions, "persisted": True},
    )
    return config


def _load(pairs: Path, vectors: Path, side: str) -> tuple[np.ndarray, list[str], dict[str, int]]:
    """All vectors of a side, the files that are complete, and the row of each text."""
    pieces, names, row_of_text, total = [], [], {}, 0
    for file in sorted(pairs.glob("*.parquet")):
        texts = pq.read_table(file, columns=[side])[side].to_pylist()
        pattern = re.compile(rf"{side}-{re.escape(file.stem)}-(\d+)\.npy")
        found = sorted(path for path in vectors.iterdir() if pattern.fullmatch(path.name))
        values = [np.load(path) for path in found]
        if sum(map(len, values)) != len(texts):
            continue
        names.append(file.stem)
        pieces += values
        # As the corpus keeps them: ingestion strips what surrounds a text.
        row_of_text |= {text: total + row for row, text in enumerate(texts)}
        row_of_text |= {text.strip(): total + row for row, text in enumerate(texts)}
        total += len(texts)
    return np.concatenate(pieces), names, row_of_text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workspace")
    parser.add_argument("--pairs", type=Path, required=True)
    parser.add_argument("--vectors", type=Path, required=True)
    options = parser.parse_args()
    config = build(options.workspace, options.pairs, options.vectors)
    print(Workspace(config).corpus.require().details["sources"])


if __name__ == "__main__":
    main()
