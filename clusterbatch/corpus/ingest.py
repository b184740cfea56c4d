"""The ingest stage: any input becomes `<workspace>/corpus`, one row per pair, nothing lost and nothing twice.

Pass 1 reads slices of the input, validates rows and sorts them into buckets by document hash. Pass 2 takes a bucket,
drops duplicate pairs (the first by file and row stays) and writes it as parts of the corpus. Rows that are not taken
are in `corpus/rejects/` with file, row and reason.
"""

from __future__ import annotations

from collections import Counter

import numpy as np

from clusterbatch.config import DOCSTRINGS, RunConfig, fingerprint
from clusterbatch.corpus.inputs import InputFile, find_inputs, plan_units
from clusterbatch.corpus.origins import Origins
from clusterbatch.corpus.reading import ReadWorker, bucket_count
from clusterbatch.corpus.sample import PAIRS, ensure_sample
from clusterbatch.corpus.writing import WriteWorker
from clusterbatch.errors import DataError, UsageError
from clusterbatch.runtime import Pool, Unit, ray_session, run_units
from clusterbatch.store.artifact import Artifact, Counts, Manifest, Receipt, Stopwatch
from clusterbatch.store.workspace import Workspace

# Pass 1 leaves its buckets here, inside the corpus folder; they go when the corpus is whole.
EXCHANGE = "_exchange"


def ingest(config: RunConfig, *, generation: int = 0, force: bool = False) -> Manifest:
    """Reads `corpus.paths` into the workspace's corpus; does nothing where that is done already.

    Raises UsageError where a path leads nowhere, DataError for a broken file (unless corpus.on_error is reject) and
    where no valid pair is found.
    """
    if not config.corpus.paths:
        raise UsageError(f"corpus.paths: must be given (files, folders, globs, or {DOCSTRINGS})")
    stopwatch = Stopwatch()
    files = _inputs(config)
    identity = fingerprint("corpus", config.corpus, [[file.uri, file.size, file.version] for file in files])
    artifact = Workspace(config).corpus
    if artifact.is_done(identity) and not force:
        return artifact.require()
    done = artifact.begin(identity, force)
    exchange = Artifact(artifact.folder.child(EXCHANGE), "corpus buckets")
    with ray_session(config.ray):
        read = _read(config, exchange, identity, files)
        receipts = _write(config, artifact, exchange, identity, read, done)
    manifest = _commit(config, artifact, identity, files, read, receipts, stopwatch.seconds)
    exchange.folder.remove()
    return manifest


def _inputs(config: RunConfig) -> list[InputFile]:
    paths = []
    for path in config.corpus.paths:
        if path == DOCSTRINGS:
            ensure_sample(config)
            path = Workspace(config).sample.folder.child(PAIRS).uri
        paths.append(path)
    return find_inputs(paths, config.storage)


def _read(config: RunConfig, exchange: Artifact, identity: str, files: list[InputFile]) -> list[Receipt]:
    units = [
        Unit(number, sum(piece.end - piece.start for piece in slices), slices)
        for number, slices in enumerate(plan_units(files, config.corpus.unit_bytes))
    ]
    arguments = {
        "exchange": exchange,
        "fingerprint": identity,
        "config": config.corpus,
        "buckets": bucket_count(config.corpus, files),
    }
    done = exchange.begin(identity)
    return run_units(
        "ingest: read", units, ReadWorker, arguments, Pool(config.corpus.workers), done=done, measured_in="bytes"
    )


def _write(
    config: RunConfig,
    artifact: Artifact,
    exchange: Artifact,
    identity: str,
    read: list[Receipt],
    done: dict[int, Receipt],
) -> list[Receipt]:
    parts = [part for receipt in read for part in receipt.parts]
    pairs = [part for part in parts if part.details["role"] == "pairs"]
    rejects = [part for part in parts if part.details["role"] == "rejects"]
    rows = np.sum([part.details["bucket_rows"] for part in pairs], axis=0).tolist() if pairs else []
    units = [Unit(bucket, count, "bucket") for bucket, count in enumerate(rows)]
    units.append(Unit(len(rows), sum(part.rows for part in rejects), "rejects"))
    arguments = {
        "artifact": artifact,
        "exchange": exchange,
        "fingerprint": identity,
        "config": config.corpus,
        "pairs": pairs,
        "rejects": rejects,
        "origins": Origins.of_receipts(read),
    }
    return run_units("ingest: write", units, WriteWorker, arguments, Pool(config.corpus.workers), done=done)


def _commit(
    config: RunConfig,
    artifact: Artifact,
    identity: str,
    files: list[InputFile],
    read: list[Receipt],
    receipts: list[Receipt],
    seconds: float,
) -> Manifest:
    counts = sum((receipt.counts for receipt in receipts), Counts())
    if counts.read != sum(receipt.counts.read for receipt in read):
        raise DataError(f"{artifact.folder.uri}: rows were lost between reading and writing")
    reasons = sum((Counter(receipt.details["reasons"]) for receipt in receipts), Counter[str]())
    if not counts.written:
        most = f"; most common reason: {reasons.most_common(1)[0][0]}" if reasons else ""
        raise DataError(f"corpus.paths: no valid pair in {len(files)} files, {counts.rejected} rows rejected{most}")
    sources = sum((Counter(receipt.details["sources"]) for receipt in receipts), Counter[str]())
    return artifact.commit(
        identity,
        receipts,
        config=config.corpus.identity(),
        inputs={},
        seconds=seconds,
        details={
            "sources": dict(sorted(sources.items())),
            "rejects": dict(reasons.most_common()),
            "files": len(files),
            "input_bytes": sum(file.size for file in files),
            "cut_texts": sum(receipt.details["cut"] for receipt in read),
        },
    )
