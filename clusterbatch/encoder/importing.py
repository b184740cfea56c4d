"""Embeddings from vectors that came with the corpus (`corpus.columns.vector`): no model, parts of the same shape."""

from __future__ import annotations

from collections.abc import Mapping

from clusterbatch.config import RunConfig, fingerprint
from clusterbatch.corpus.units import CorpusUnit, corpus_units, read_unit
from clusterbatch.runtime import Pool, Unit, ray_session, run_units
from clusterbatch.schema import embeddings_schema
from clusterbatch.store import Artifact, Counts, Manifest, Receipt, Stopwatch
from clusterbatch.store.tables import write_parquet
from clusterbatch.store.versions import GrowingArtifact, made_before

MODEL = "imported"


class ImportWorker:
    """Copies the vectors of one unit of the corpus."""

    def __init__(self, corpus: Artifact, artifact: Artifact, identity: str, dimensions: int) -> None:
        self._corpus, self._artifact = corpus, artifact
        self._identity, self._schema = identity, embeddings_schema(dimensions)

    def process(self, unit: Unit) -> Receipt:
        watch = Stopwatch()
        corpus_unit: CorpusUnit = unit.payload
        table = read_unit(self._corpus, corpus_unit, self._schema.names).select(self._schema.names).cast(self._schema)
        part = write_parquet(self._artifact, f"unit-{unit.number:08d}", table, deleted=corpus_unit.deleted)
        receipt = Receipt(
            unit=unit.number,
            fingerprint=self._identity,
            parts=[part],
            counts=Counts(read=corpus_unit.rows, written=part.rows),
            seconds=round(watch.seconds, 3),
        )
        self._artifact.write_receipt(receipt)
        return receipt


def import_identity(corpus: str) -> str:
    """The fingerprint of the embeddings that are made of the corpus of that fingerprint."""
    return fingerprint("embeddings", MODEL, corpus)


def import_vectors(
    config: RunConfig, corpus: Artifact, manifest: Manifest, artifact: GrowingArtifact, force: bool
) -> Manifest:
    """The manifest of embeddings made of the corpus' own vectors; what `embed` does where there are some."""
    identity = import_identity(manifest.fingerprint)
    if artifact.is_done(identity) and not force:
        return artifact.require()
    watch = Stopwatch()
    base = None if force else made_before(artifact, import_identity, manifest)
    target = artifact.next_version(base) if base else artifact
    done = target.begin(identity, force)
    dimensions = int(manifest.details["dimensions"])
    there = len(base.parts) if base else 0
    units = [Unit(unit.number, unit.rows, unit) for unit in corpus_units(manifest)[there:]]
    arguments: Mapping[str, object] = {
        "corpus": corpus,
        "artifact": target,
        "identity": identity,
        "dimensions": dimensions,
    }
    with ray_session(config.ray):
        receipts = run_units("embed: import", units, ImportWorker, arguments, Pool(config.embed.workers), done=done)
    return target.commit(
        identity,
        receipts,
        config={},
        inputs={"corpus": manifest.fingerprint},
        seconds=watch.seconds,
        details={"model": MODEL, "persisted": True, "dimensions": dimensions, "tokens": 0, "unknown_share": {}},
    )
