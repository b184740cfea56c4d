"""The ingest stage: any input becomes `<workspace>/corpus`, one row per pair, nothing lost and nothing twice.

Pass 1 reads slices of the input, validates rows and sorts them into buckets by document hash; collections are joined
first. Pass 2 takes a bucket, drops duplicate pairs (the first by file and row stays) and writes it as parts of the
corpus. Rows that are not taken are in `corpus/rejects/` with file, row and reason.
"""

from __future__ import annotations

from collections import Counter

from clusterbatch.config import DOCSTRINGS, RunConfig, fingerprint
from clusterbatch.corpus.collections import PairCollection, collection_in
from clusterbatch.corpus.finding import Inputs, find_inputs
from clusterbatch.corpus.passes import Passes, held_out_documents
from clusterbatch.corpus.sample import PAIRS, ensure_sample
from clusterbatch.errors import DataError, UsageError
from clusterbatch.runtime import ray_session
from clusterbatch.store.artifact import Counts, Manifest, Part, Receipt, Stopwatch
from clusterbatch.store.filesystem import Folder
from clusterbatch.store.workspace import Workspace


def ingest(config: RunConfig, *, generation: int = 0, force: bool = False) -> Manifest:
    """Reads `corpus.paths` into the workspace's corpus; does nothing where that is done already.

    Raises UsageError where a path leads nowhere, DataError for a broken file (unless corpus.on_error is reject) and
    where no valid pair is found.
    """
    if not config.corpus.paths:
        raise UsageError(f"corpus.paths: must be given (files, folders, globs, or {DOCSTRINGS})")
    inputs, tests = _inputs(config), _tests(config)
    # The built-in sample, where it had to be mined, has its own manifest and its own seconds.
    stopwatch = Stopwatch()
    identity = fingerprint(
        "corpus",
        config.corpus,
        [[file.uri, file.size, file.version] for file in inputs],
        held_out_documents(config),
        [[file.uri, file.size, file.version] for item in tests for files in item.files.values() for file in files],
    )
    artifact = Workspace(config).corpus
    if artifact.is_done(identity) and not force:
        return artifact.require()
    done = artifact.begin(identity, force)
    passes = Passes(config, identity, artifact, inputs, tests)
    with ray_session(config.ray):
        passes.join()
        passes.read()
        receipts = passes.write(done)
        collection = passes.collect(receipts)
    manifest = _commit(passes, receipts, collection, stopwatch.seconds)
    passes.exchange.remove()
    return manifest


def _inputs(config: RunConfig) -> Inputs:
    paths = []
    for path in config.corpus.paths:
        if path == DOCSTRINGS:
            ensure_sample(config)
            path = Workspace(config).sample.folder.child(PAIRS).uri
        paths.append(path)
    return find_inputs(config.corpus, paths, config.storage)


def _tests(config: RunConfig) -> list[PairCollection]:
    """The collections that the corpus must not contain; the built-in sample's own is apart already."""
    if config.corpus.decontaminate == "off":
        return []
    paths = [path for path in config.evaluate.path if path != DOCSTRINGS]
    found = (
        collection_in(Folder(path, config.storage), number, config.evaluate.split) for number, path in enumerate(paths)
    )
    # What is no collection is for the evaluation to refuse.
    return [collection for collection in found if collection is not None]


def _commit(passes: Passes, receipts: list[Receipt], collection: list[Part], seconds: float) -> Manifest:
    files = list(passes.inputs)
    counts = sum((receipt.counts for receipt in receipts), Counts())
    if counts.read != passes.rows_read:
        raise DataError(f"{passes.artifact.folder.uri}: rows were lost between reading and writing")
    reasons = sum((Counter(receipt.details["reasons"]) for receipt in receipts), Counter[str]())
    if not counts.written:
        most = f"; most common reason: {reasons.most_common(1)[0][0]}" if reasons else ""
        raise DataError(f"corpus.paths: no valid pair in {len(files)} files, {counts.rejected} rows rejected{most}")
    sources = sum((Counter(receipt.details["sources"]) for receipt in receipts), Counter[str]())
    return passes.artifact.commit(
        passes.identity,
        receipts,
        config=passes.config.corpus.identity(),
        inputs={},
        seconds=seconds,
        details={
            "sources": dict(sorted(sources.items())),
            "rejects": dict(reasons.most_common()),
            "files": len(files),
            "input_bytes": sum(file.size for file in files),
            "cut_texts": passes.cut,
            # Of the vectors that came with the rows.
            "dimensions": passes.dimensions,
        },
        extra_parts=collection,
    )
