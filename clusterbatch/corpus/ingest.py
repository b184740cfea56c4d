"""The ingest stage: any input becomes `<workspace>/corpus`, one row per pair, nothing lost and nothing twice.

Pass 1 reads slices of the input, validates rows and sorts them into buckets by document hash; collections are joined
first. Pass 2 takes a bucket, drops duplicate pairs (the first by file and row stays) and writes it as parts of the
corpus. Rows that are not taken are in `corpus/rejects/` with file, row and reason. Files that are appended to a corpus
go through the same passes, and are also compared with the rows that it has.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from clusterbatch.config import DOCSTRINGS, RunConfig, fingerprint
from clusterbatch.corpus.append import (
    CHOSEN,
    Dropping,
    Growth,
    changed_reading,
    changed_rules,
    check_same_rules,
    dropped_lists,
    files_read,
    lacks_signatures,
    new_inputs,
    without_dropped,
    write_files,
)
from clusterbatch.corpus.beir import PairCollection, collection_in
from clusterbatch.corpus.decontaminate import SIGNATURES, distinct_texts
from clusterbatch.corpus.docstrings import PAIRS, ensure_sample
from clusterbatch.corpus.find_inputs import Inputs, find_inputs
from clusterbatch.corpus.image_sizes import referenced_bytes
from clusterbatch.corpus.inputs import InputFile
from clusterbatch.corpus.passes import IngestPasses
from clusterbatch.corpus.read import TEXT_PER_BYTE, held_out_documents
from clusterbatch.errors import DataError, InfrastructureError, OtherWorkError, UsageError
from clusterbatch.log import say
from clusterbatch.runtime import ray_session
from clusterbatch.store.artifact import EXCHANGE, Artifact, Counts, Manifest, Part, Receipt, Stopwatch
from clusterbatch.store.details import CorpusDetails, details_of
from clusterbatch.store.folder import Folder
from clusterbatch.store.growing import Version
from clusterbatch.store.tables import write_parquet
from clusterbatch.store.workspace import Workspace

# Sources that are named in a message.
_NAMED_SOURCES = 8
# Share of pairs whose query is their document, from which on a mistake is likely.
_MANY_ECHOES = 0.5
_OTHER = "of other inputs or made with another configuration"


def ingest(config: RunConfig, *, generation: int = 0, force: bool = False, append: bool = False) -> Manifest:
    """Read `corpus.paths` into the workspace's corpus; do nothing if that is done already.

    append: if there is a corpus, files of `corpus.paths` that it does not have (or that have changed since) become its
    next version, without the rows of `corpus.delete` and `corpus.drop_sources`.

    Raises UsageError if a path leads nowhere or the corpus was made with other rules, DataError for a broken file
    (unless corpus.on_error is reject) and if no valid pair is found.
    """
    if not config.corpus.paths:
        raise UsageError(f"corpus.paths: must be given (files, folders, globs, or {DOCSTRINGS})")
    inputs, tests = _inputs(config, force), _tests(config)
    if config.corpus.columns.images and inputs.collections:
        raise UsageError("corpus.columns.images: images are read from files of pairs, not from a collection's")
    # The built-in sample, if it had to be mined, has its own manifest and its own seconds.
    stopwatch = Stopwatch()
    tests_described = _described(_files(tests))
    held_out = ["by query"] if config.evaluate.holdout_by == "query" else []
    if not held_out and config.corpus.columns.document_id is not None:
        # Parts of documents were once held out without the other parts.
        held_out = ["whole documents"]
    identity = fingerprint(
        "corpus",
        config.corpus,
        _described(inputs),
        held_out_documents(config),
        tests_described,
        *([config.corpus.drop_sources] if config.corpus.drop_sources else []),
        *(held_out if held_out_documents(config) else []),
    )
    artifact = Workspace(config).corpus
    made = artifact.manifest()
    grows = made is not None and append and not force
    if config.corpus.delete and not grows:
        say(
            "ingest    corpus.delete applies only to `ingest --append` to an existing corpus; the rows it lists are "
            "included",
            level="warning",
        )
    if made is not None and not force and lacks_signatures(config, made):
        say(
            f"ingest    {artifact.folder.uri} was made by a version that left near copies of held-out texts in the "
            "corpus; only rows that are appended are compared with them, ingest --force compares all",
            level="warning",
        )
    if made is not None and grows:
        return _append(config, made, inputs, tests, stopwatch)
    if made is not None and not force:
        changed = changed_rules(config, made, fingerprint(tests_described))
        if made.version > 1 and not changed and not new_inputs(inputs, files_read(artifact, made)):
            return made
        if made.version == 1 and made.fingerprint == identity:
            return made
        if not artifact.reused:
            raise OtherWorkError(f"{artifact.folder.uri}: {_difference(changed, changed_reading(config, made))}")
    done = artifact.begin(identity, force)
    inputs.report_skipped()
    passes = IngestPasses(config, identity, artifact, inputs, tests, _bytes(inputs, config))
    with ray_session(config.ray):
        passes.join()
        passes.read()
        _check_unchanged(passes)
        receipts = passes.write(done)
        collection = passes.collect(receipts)
    return _commit(passes, receipts, collection, stopwatch.seconds)


def _append(
    config: RunConfig, base: Manifest, inputs: Inputs, tests: list[PairCollection], stopwatch: Stopwatch
) -> Manifest:
    """Make the next version of the corpus; return the newest if there is nothing that it does not have."""
    corpus = Workspace(config).corpus
    check_same_rules(config, base, fingerprint(_described(_files(tests))))
    read = files_read(corpus, base)
    inputs = new_inputs(inputs, read)
    lists = new_inputs(find_inputs(config.corpus, config.corpus.delete, config.storage, "corpus.delete"), read).files
    sources = [name for name in config.corpus.drop_sources if details_of(base, CorpusDetails)["sources"].get(name)]
    if not (inputs or lists or sources):
        return base
    identity = fingerprint("corpus version", base.fingerprint, _described(inputs), _described(lists), sources)
    version = corpus.next_version(base)
    done = version.begin(identity)
    inputs.report_skipped()
    dropping = Dropping([file.uri for file in lists], sources, corpus.folder)
    growth = Growth(corpus, base, dropping)
    passes = IngestPasses(config, identity, version, inputs, tests, _bytes(inputs, config), growth)
    with ray_session(config.ray):
        passes.join()
        passes.read()
        _check_unchanged(passes)
        passes.look_up()
        receipts = passes.write(done)
    version.base = without_dropped(base, passes.known, version.path)
    manifest = _commit(passes, receipts, [*dropped_lists(passes.known)], stopwatch.seconds, lists)
    dropped = base.counts.written - version.base.counts.written
    say(
        f"ingest    version {manifest.version}: {manifest.counts.written - version.base.counts.written:,} pairs "
        f"appended, {dropped:,} deleted",
        version=manifest.version,
    )
    return manifest


def _check_unchanged(passes: IngestPasses) -> None:
    """Raise InfrastructureError if a file was replaced after it was listed: rows of both may have been read.

    What was read is then removed, so that the next ingest reads all files again.
    """
    then = _described([*passes.inputs, *_files(passes.tests)])
    now = _described([*_inputs(passes.config, force=False), *_files(_tests(passes.config))])
    versions = {uri: version for uri, *version in now}
    replaced = [uri for uri, *version in then if versions.get(uri, version) != version]
    if replaced:
        more = f", and {len(replaced) - 1:,} more files" if len(replaced) > 1 else ""
        passes.artifact.remove(EXCHANGE)
        raise InfrastructureError(f"{replaced[0]}: was replaced while it was read{more}; ingest again")


def _bytes(inputs: Inputs, config: RunConfig) -> int:
    """Return the bytes of the inputs, with those of images that they refer to as far as they count for planning."""
    return inputs.bytes + referenced_bytes(inputs.files, config.corpus, config.storage) // TEXT_PER_BYTE


def _difference(rules: Sequence[str], reading: Sequence[str]) -> str:
    """Say how an existing corpus differs from the one that is asked for, and what can be done."""
    if rules:
        return f"{'; '.join(rules)}; --force replaces the corpus"
    found = f"made with another configuration ({'; '.join(reading)})" if reading else _OTHER
    return f"holds a corpus {found}; --append adds the files that are new, --force replaces it"


def _inputs(config: RunConfig, force: bool) -> Inputs:
    paths = []
    for path in config.corpus.paths:
        if path == DOCSTRINGS:
            ensure_sample(config, force)
            path = Workspace(config).sample.folder.child(PAIRS).uri
        paths.append(path)
    return find_inputs(config.corpus, paths, config.storage)


def _tests(config: RunConfig) -> list[PairCollection]:
    """Return the collections that the corpus must not contain; the built-in sample's own is separate already."""
    if config.corpus.decontaminate == "off":
        return []
    paths = [path for path in config.evaluate.path if path != DOCSTRINGS]
    found = []
    for number, path in enumerate(paths):
        folder = Folder(path, config.storage)
        collection = collection_in(folder, number, config.evaluate.split, "evaluate.split")
        if collection is None:
            # If it were skipped, its texts would be trained on.
            raise UsageError(
                f"evaluate.path: {folder.uri} is not a collection in BEIR layout (corpus.jsonl, queries.jsonl, "
                f"qrels/{config.evaluate.split}.tsv)"
            )
        found.append(collection)
    return found


def _files(collections: list[PairCollection]) -> list[InputFile]:
    return [file for item in collections for files in item.files.values() for file in files]


def _described(files: Inputs | list[InputFile]) -> list[list[Any]]:
    return [[file.uri, file.size, file.version] for file in files]


def _commit(
    passes: IngestPasses,
    receipts: list[Receipt],
    more: list[Part],
    seconds: float,
    lists: list[InputFile] | None = None,
) -> Manifest:
    """Check that no row is lost and write the manifest.

    more: parts beside those of the receipts; lists: files of rows to delete that were read as well.
    """
    artifact, files = passes.artifact, list(passes.inputs)
    counts = sum((receipt.counts for receipt in receipts), Counts())
    if counts.read != passes.rows_read:
        raise DataError(f"{artifact.folder.uri}: rows were lost between reading and writing")
    reasons = sum((Counter(receipt.details["reasons"]) for receipt in receipts), Counter[str]())
    sources = sum((Counter(receipt.details["sources"]) for receipt in receipts), Counter[str]())
    before = CorpusDetails(sources={}, rejects={})
    if isinstance(artifact, Version):
        before = details_of(artifact.base, CorpusDetails)
        if not artifact.base.counts.written + counts.written:
            raise DataError("ingest --append: no pair of the corpus would be left")
    elif not counts.written:
        _withdraw(artifact, receipts)
        artifact.remove(EXCHANGE)
        most = f"; most common reason: {reasons.most_common(1)[0][0]}" if reasons else ""
        raise DataError(f"corpus.paths: no valid pair in {len(files)} files, {counts.rejected} rows rejected{most}")
    extra = [*more, write_files(artifact, [*files, *(lists or [])])]
    if not isinstance(artifact, Version) and not passes.held_out.is_empty:
        extra.append(write_parquet(artifact, "heldout", passes.held_out.to_table(), role=CHOSEN))
    texts = passes.held_out_texts
    if texts and not (passes.growth and texts.artifact is passes.growth.corpus):
        # A version has them, too, if the corpus was made without.
        extra.append(write_parquet(artifact, "heldout-signatures", distinct_texts(texts), role=SIGNATURES))
    manifest = artifact.commit(
        passes.identity,
        receipts,
        config=passes.config.corpus.identity(),
        inputs={},
        seconds=seconds,
        details=CorpusDetails(
            sources=dict(sorted((Counter(before["sources"]) + sources).items())),
            rejects=dict((Counter(before.get("rejects", {})) + reasons).most_common()),
            files=before.get("files", 0) + len(files),
            input_bytes=before.get("input_bytes", 0) + sum(file.size for file in files),
            cut_texts=before.get("cut_texts", 0) + passes.cut,
            # Of the vectors that came with the rows.
            dimensions=passes.dimensions,
            # The collections that the corpus must not contain.
            tests=fingerprint(_described(_files(passes.tests))),
        ),
        extra_parts=extra,
    )
    artifact.remove(EXCHANGE)
    _report_sources(details_of(manifest, CorpusDetails)["sources"])
    # Receipts of an older version do not count them.
    _warn_of_echoes(sum(receipt.details.get("echoes", 0) for receipt in receipts), counts.written)
    return manifest


def _warn_of_echoes(echoes: int, written: int) -> None:
    """Warn if most queries are the text of their own document, as when one column is named for both."""
    if echoes > written * _MANY_ECHOES:
        say(
            f"ingest    in {echoes:,} of {written:,} pairs the query is its document: next to nothing is learned from "
            "them, and scores on such pairs mean nothing; look at corpus.columns",
            level="warning",
        )


def _withdraw(artifact: Artifact, receipts: Sequence[Receipt]) -> None:
    """Remove what was written, so that an ingest without a valid pair is not in the way of the next one."""
    artifact.remove_receipts()
    for receipt in receipts:
        for part in receipt.parts:
            artifact.folder.remove(part.path)


def _report_sources(sources: dict[str, int]) -> None:
    """Print the sources with their pairs, the largest first: a wrong division into sources shows here."""
    largest = sorted(sources, key=lambda name: (-sources[name], name))
    named = ", ".join(f"{name} {sources[name]:,}" for name in largest[:_NAMED_SOURCES])
    more = f", and {len(largest) - _NAMED_SOURCES:,} more" if len(largest) > _NAMED_SOURCES else ""
    plural = "" if len(largest) == 1 else "s"
    say(f"ingest    {len(largest):,} source{plural}: {named}{more}", sources=len(largest))
