"""A smaller corpus for a quick comparison, drawn so that neighbourhoods stay as dense as they are in the whole.

Thinning a corpus uniformly takes a row's nearest neighbours away, makes clustered batches easier, and the result no
longer carries over. So whole coarse neighbourhoods are drawn instead: random rows of every source are pivots, every row
belongs to the nearest pivot of its source (by static vectors, which cost next to nothing), and some pivots' rows are
kept, all of them. One pass; what is kept does not depend on units or workers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import numpy as np
import pyarrow as pa

from clusterbatch.config import RunConfig, fingerprint
from clusterbatch.corpus.row_groups import PAIRS, RowGroup, read_row_group, row_groups_of, take_live
from clusterbatch.encoder.model import Encoder, load_encoder
from clusterbatch.encoder.resolve import model_fingerprint, resolve_model
from clusterbatch.errors import UsageError
from clusterbatch.hashing import row_hashes
from clusterbatch.runtime import Pool, Unit, ray_session, run_units
from clusterbatch.schema import VECTORS
from clusterbatch.store import Artifact, Counts, Manifest, Part, Receipt, Stopwatch
from clusterbatch.store.tables import read_parquet, write_parquet
from clusterbatch.store.workspace import Workspace

Way = Literal["neighbourhoods", "uniform"]

# Rows of a neighbourhood, in the mean.
_NEIGHBOURHOOD = 256
_TOKENS = 64
_HASHES = 2.0**64


def sample_home(config: RunConfig, share: float, way: Way) -> str:
    """The workspace (URI) whose corpus the sample is."""
    return f"{config.workspace}/compare/samples/{way}-{share:.4f}"


def sample_corpus(config: RunConfig, share: float, way: Way, *, force: bool = False) -> Manifest:
    """Writes about `share` of the corpus' rows, of every source, as the corpus of `sample_home`; at once when done.

    Where embeddings of the whole corpus are reused, rows keep their vectors, and nothing is embedded again.

    Raises DataError where there is no corpus.
    """
    watch = Stopwatch()
    source = Workspace(config).corpus
    corpus = source.require()
    embedded = Workspace(config).embeddings() if config.reuse.embeddings else None
    vectors = embedded.require() if embedded else None
    home = config.model_copy(update={"workspace": sample_home(config, share, way), "reuse": type(config.reuse)()})
    model = resolve_model(config.embed.model, config.storage) if way == "neighbourhoods" else ""
    identity = fingerprint(
        "sample",
        corpus.fingerprint,
        share,
        way,
        model and model_fingerprint(model),
        _NEIGHBOURHOOD,
        vectors.fingerprint if vectors else None,
    )
    artifact = Workspace(home).corpus
    if artifact.is_done(identity) and not force:
        return artifact.require()
    done = artifact.begin(identity, force)
    parts = _vector_parts(vectors, len(row_groups_of(corpus)))
    units = [Unit(unit.number, unit.rows, (unit, parts[unit.number])) for unit in row_groups_of(corpus)]
    pivots = _pivots(source, corpus, share, model) if model else {}
    arguments = {
        "source": source,
        "embedded": embedded,
        "artifact": artifact,
        "fingerprint": identity,
        "share": share,
        "pivots": pivots,
        "model": model,
    }
    with ray_session(config.ray):
        receipts = run_units("compare: sample", units, SampleWorker, arguments, Pool(config.corpus.workers), done=done)
    sources: dict[str, int] = {}
    for receipt in receipts:
        for name, rows in receipt.details["sources"].items():
            sources[name] = sources.get(name, 0) + rows
    return artifact.commit(
        identity,
        receipts,
        config={"share": share, "way": way},
        inputs={"corpus": corpus.fingerprint},
        seconds=watch.seconds,
        details={
            "sources": dict(sorted(sources.items())),
            "rejects": {},
            "dimensions": vectors.details["dimensions"] if vectors else None,
        },
    )


def _vector_parts(embeddings: Manifest | None, units: int) -> list[Part | None]:
    """Where the vectors of each unit of the corpus are. Raises UsageError where they were not kept."""
    if embeddings is None:
        return [None] * units
    if not embeddings.details.get("persisted", True):
        raise UsageError("reuse.embeddings: these were not kept (embed.persist: false), a sample cannot take them over")
    if len(embeddings.parts) < units:
        raise UsageError(
            "reuse.embeddings: these are of an earlier version of the corpus; `clusterbatch embed` it there"
        )
    return list(embeddings.parts)


class SampleWorker:
    """Keeps what is drawn of one unit. pivots: (vectors (m, d), drawn (m,) bool) by source; empty: uniform."""

    def __init__(
        self,
        source: Artifact,
        embedded: Artifact | None,
        artifact: Artifact,
        fingerprint: str,
        share: float,
        pivots: Mapping[str, tuple[np.ndarray, np.ndarray]],
        model: str,
    ) -> None:
        self._source, self._artifact, self._fingerprint = source, artifact, fingerprint
        self._embedded = embedded
        self._share, self._pivots = share, pivots
        self._encoder = load_encoder(model, "static") if model else None

    def process(self, unit: Unit) -> Receipt:
        watch = Stopwatch()
        corpus_unit, part = unit.payload
        table = read_row_group(self._source, corpus_unit)
        if self._embedded is not None:
            folder = self._embedded.folder
            vectors = read_parquet(folder, part.path, VECTORS)
            place = f"{folder.uri}/{part.path}"
            vectors = take_live(self._source, corpus_unit, vectors, part.details.get("deleted"), place)
            for name in VECTORS:
                table = table.append_column(name, vectors[name])
        kept = table.filter(pa.array(self._drawn(table)))
        parts = []
        if kept.num_rows:
            parts.append(write_parquet(self._artifact, f"part-{unit.number:06d}", kept, role=PAIRS))
        counted = kept["source"].value_counts().to_pylist()
        receipt = Receipt(
            unit=unit.number,
            fingerprint=self._fingerprint,
            parts=parts,
            counts=Counts(
                read=table.num_rows,
                written=kept.num_rows,
                set_aside={"not in the sample": table.num_rows - kept.num_rows},
            ),
            seconds=watch.seconds,
            details={"sources": {entry["values"]: entry["counts"] for entry in counted}},
        )
        self._artifact.write_receipt(receipt)
        return receipt

    def _drawn(self, table: pa.Table) -> np.ndarray:
        """(rows,) bool."""
        if self._encoder is None:
            return row_hashes(table["pair_id"], 0) < self._share * _HASHES
        vectors = _static_vectors(self._encoder, table["document"].to_pylist())
        sources = np.array(table["source"].to_pylist())
        drawn = np.zeros(table.num_rows, bool)
        for name in np.unique(sources):
            pivots, chosen = self._pivots[name]
            rows = np.flatnonzero(sources == name)
            drawn[rows] = chosen[np.argmax(vectors[rows] @ pivots.T, axis=1)]
        return drawn


def _pivots(source: Artifact, corpus: Manifest, share: float, model: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Vectors of the pivots of every source, and which of them are drawn.

    Pivots are the rows with the smallest hashes; of them the first are drawn, for hashes are random already. Only ids
    are read of rows that are no pivots.
    """
    wanted = {
        name: min(rows, max(math.ceil(2 / share), round(rows / _NEIGHBOURHOOD)))
        for name, rows in corpus.details["sources"].items()
    }
    smallest: dict[str, list[tuple[int, RowGroup, int]]] = {name: [] for name in wanted}
    for unit in row_groups_of(corpus):
        table = read_row_group(source, unit, ["pair_id", "source"])
        hashes = row_hashes(table["pair_id"], 0).tolist()
        for row, (name, value) in enumerate(zip(table["source"].to_pylist(), hashes, strict=True)):
            smallest[name].append((value, unit, row))
        for name, rows in smallest.items():
            rows.sort(key=lambda entry: entry[0])
            del rows[wanted[name] :]
    encoder = load_encoder(model, "static")
    found = {}
    for name, rows in smallest.items():
        texts = [read_row_group(source, unit, ["document"])["document"][row].as_py() for _, unit, row in rows]
        drawn = np.arange(len(rows)) < max(1, round(share * len(rows)))
        found[name] = (_static_vectors(encoder, texts), drawn)
    return found


def _static_vectors(encoder: Encoder, texts: list[str]) -> np.ndarray:
    """(n, d) float32 unit vectors: the mean of the token embeddings."""
    return encoder.encode(encoder.tokenizer.encode(texts, _TOKENS), 65_536)
