"""The built-in sample: mined pairs, split into a corpus to train on and a test collection in BEIR layout.

Real pairs without a network: (summary, body) of the docstrings of the installed Python packages. Source code is parsed,
never imported or run. Each package is one source. The summary, a docstring's first paragraph, is the query; the rest of
the docstring is its document, as a title's text is.
"""

from __future__ import annotations

import ast
import gc
import json
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from itertools import groupby, islice
from multiprocessing import get_context
from pathlib import Path

import pyarrow as pa

from clusterbatch.config import RunConfig, fingerprint
from clusterbatch.cores import available_cores
from clusterbatch.corpus.normalise import keyed_hash, normalise, text_hash
from clusterbatch.errors import DataError, UsageError
from clusterbatch.store.artifact import Artifact, Counts, Manifest, Receipt, Stopwatch
from clusterbatch.store.details import SampleDetails, details_of
from clusterbatch.store.folder import Folder
from clusterbatch.store.tables import parquet_bytes
from clusterbatch.store.workspace import Workspace

# Tests and vendored copies say little or say it twice.
_SKIPPED = re.compile(r"(^|/)(_?tests?|testing|_?vendor(ed)?|third_?party|site-packages)(/|$)")
_LARGEST_FILE = 2 * 2**20
_LEAST_WORDS = 4
# No source gives more than this share of the sample, so that there are at least as many sources.
_LEAST_SOURCES = 8
# Only the packages with most code are read: their sources are large enough to cluster, and reading all takes a minute.
_MOST_SOURCES = 12


@dataclass(frozen=True)
class MinedPair:
    """source: the package; query: the summary line of a docstring; document: its body."""

    source: str
    query: str
    document: str


def mine(pairs: int, seed: int) -> list[MinedPair]:
    """Return at most `pairs` distinct pairs, balanced over the packages; no query and no document occurs twice.

    Deterministic for one set of installed packages. Small packages give all they have, large ones equal shares.
    """
    most = max(1, pairs // _LEAST_SOURCES)
    packages = _largest_packages()
    # Forking a process that has threads (Ray, Arrow) is unsafe; parsing is slow enough to pay for fresh ones. A syntax
    # tree has no cycles, so looking for garbage at every few hundred of its nodes (a third of the time) finds none.
    with ProcessPoolExecutor(min(8, available_cores()), get_context("spawn"), initializer=gc.disable) as pool:
        futures = {name: pool.submit(_mine_package, name, files, most, seed) for name, files in packages.items()}
        mined = {name: futures[name].result() for name in sorted(packages)}
    distinct = _distinct(mined)
    quotas = equal_shares({name: len(found) for name, found in distinct.items()}, pairs)
    return [pair for name, found in distinct.items() for pair in found[: quotas[name]]]


def docstring_pairs(code: bytes) -> Iterator[tuple[str, str]]:
    """Yield (summary, body) of each docstring in one file of source code; nothing if it does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return
    for node in (tree, *_definitions(tree.body)):
        docstring = ast.get_docstring(node)
        if docstring:
            pair = split_docstring(docstring)
            if pair:
                yield pair


def split_docstring(docstring: str) -> tuple[str, str] | None:
    """Return summary (first paragraph, on one line) and body (the rest); None if either is too short."""
    first, _, rest = docstring.strip().partition("\n\n")
    summary, body = " ".join(first.split()), rest.strip()
    if len(summary.split()) < _LEAST_WORDS or not body or normalise(summary) == normalise(body):
        return None
    try:
        (summary + body).encode()
    except UnicodeEncodeError:  # an escape such as \ud800 in the source: not text
        return None
    return summary, body


def equal_shares(available: dict[str, int], total: int) -> dict[str, int]:
    """Return how many each gives so that together they give `total` (or all) and the largest share is smallest."""
    shares: dict[str, int] = {}
    left = total
    for position, name in enumerate(sorted(available, key=lambda name: (available[name], name))):
        shares[name] = min(available[name], left // (len(available) - position))
        left -= shares[name]
    return shares


def _definitions(body: Sequence[ast.stmt]) -> Iterator[ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    for statement in body:
        if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield statement
        elif isinstance(statement, ast.ClassDef):
            yield statement
            yield from _definitions(statement.body)
        elif isinstance(statement, (ast.If, ast.Try)):
            yield from _definitions(statement.body)


def _largest_packages() -> dict[str, list[str]]:
    """Return the source files of the installed distributions with most code, by name in lower case, largest first."""
    packages: dict[str, list[str]] = {}
    size: dict[str, int] = {}
    for distribution in metadata.distributions():
        name = (distribution.metadata["Name"] or "").lower().replace("_", "-")
        if not name or name in packages or name == "clusterbatch":
            continue
        files = [file for file in distribution.files or [] if file.suffix == ".py" and not _SKIPPED.search(str(file))]
        packages[name] = sorted(str(file.locate()) for file in files)
        # As the installer recorded it: asking the file system for each file takes longer.
        size[name] = sum(file.size or 0 for file in files)
    largest = sorted(packages, key=lambda name: (-size[name], name))[:_MOST_SOURCES]
    return {name: packages[name] for name in largest if packages[name]}


def _mine_package(name: str, files: list[str], most: int, seed: int) -> list[MinedPair]:
    # Each seed has its own order of files: a package with more than enough is sampled, not cut off.
    # Only the end of the path counts, so that two installations in different folders agree.
    root = os.path.commonpath(files) if files else ""
    ordered = sorted(files, key=lambda file: (keyed_hash(seed, os.path.relpath(file, root)), file))
    return list(islice(_pairs_of_files(name, ordered), most))


def _pairs_of_files(name: str, files: Sequence[str]) -> Iterator[MinedPair]:
    seen: set[int] = set()
    for file in files:
        try:
            if os.path.getsize(file) > _LARGEST_FILE:
                continue
            code = Path(file).read_bytes()
        except OSError:  # listed by the installer, removed since then
            continue
        if b'"""' not in code and b"'''" not in code:
            continue
        for summary, body in docstring_pairs(code):
            hashes = {text_hash(summary), text_hash(body)}
            if not hashes & seen:
                seen |= hashes
                yield MinedPair(name, summary, body)


def _distinct(mined: dict[str, list[MinedPair]]) -> dict[str, list[MinedPair]]:
    """Keep each query and each document only at its first place over all packages."""
    seen: set[int] = set()
    distinct: dict[str, list[MinedPair]] = {}
    for name, pairs in mined.items():
        distinct[name] = []
        for pair in pairs:
            hashes = {text_hash(pair.query), text_hash(pair.document)}
            if not hashes & seen:
                seen |= hashes
                distinct[name].append(pair)
    return distinct


PAIRS = "pairs"
COLLECTION = "collection"
_PROBE = "_writable"
# One pair in fifteen is held out: 1,200 test queries of 18,000 pairs.
_HELD_OUT = 15


@dataclass(frozen=True)
class SampleSummary:
    """Counts of a written sample: training pairs by source, test queries, documents of the collection."""

    sources: dict[str, int]
    queries: int
    documents: int

    @property
    def pairs(self) -> int:
        return sum(self.sources.values())


def check_place(folder: Folder) -> None:
    """Raise the error that writing a sample to `folder` would end in, before anything is mined.

    Raises UsageError if files are in its place: rows of two samples, or of the user's own, would become one corpus, in
    which what one holds out is trained on. Raises InfrastructureError if nothing can be written there.
    """
    for name in (PAIRS, COLLECTION):
        if folder.list(name):
            raise UsageError(f"sample: there are files in {folder.uri}/{name}; choose another folder, or remove them")
    folder.write(_PROBE, b"")
    folder.remove(_PROBE)


def write_sample(folder: Folder, pairs: int, seed: int) -> SampleSummary:
    """Mine at most `pairs` pairs into `folder`: pairs/SOURCE.parquet and collection/ (BEIR layout).

    No query and no document occurs twice among all pairs, so no held-out pair and no copy of it is trained on; the
    collection has the documents of all pairs, so that finding the right one is not easy.
    """
    mined = mine(pairs, seed)
    if not mined:
        raise DataError("sample: the installed packages have no docstrings to mine")
    train: list[MinedPair] = []
    test: list[MinedPair] = []
    for _, group in groupby(mined, key=lambda pair: pair.source):
        ordered = sorted(group, key=lambda pair: keyed_hash(seed, pair.query))
        held_out = max(1, round(len(ordered) / _HELD_OUT))
        test += ordered[:held_out]
        train += ordered[held_out:]
    sources: dict[str, int] = {}
    for source, group in groupby(train, key=lambda pair: pair.source):
        rows = list(group)
        sources[source] = len(rows)
        table = pa.table({name: [getattr(pair, name) for pair in rows] for name in ("query", "document", "source")})
        folder.write(f"{PAIRS}/{source}.parquet", memoryview(parquet_bytes(table)))
    _write_collection(folder.child(COLLECTION), mined, test)
    return SampleSummary(sources, len(test), len(mined))


def ensure_sample(config: RunConfig, force: bool = False) -> Manifest:
    """Return the workspace's sample, mined unless it exists already; packages installed since do not change it.

    force: replace one of another size or seed, which otherwise raises UsageError.
    """
    artifact = Workspace(config).sample
    identity = fingerprint("sample", config.corpus.sample_pairs, config.corpus.sample_seed)
    manifest = artifact.manifest()
    if manifest is not None and manifest.fingerprint == identity:
        return manifest
    artifact.begin(identity, force)
    if manifest is not None:
        # Files are called after packages, which may be others by now, and ingest reads all that are there.
        before = details_of(manifest, SampleDetails)["sources"]
        artifact.folder.child(PAIRS).remove_files(f"{source}.parquet" for source in before)
    return _commit_sample(config, artifact, identity)


def _commit_sample(config: RunConfig, artifact: Artifact, identity: str) -> Manifest:
    stopwatch = Stopwatch()
    summary = write_sample(artifact.folder, config.corpus.sample_pairs, config.corpus.sample_seed)
    read = summary.pairs + summary.queries
    counts = Counts(read=read, written=summary.pairs, set_aside={"held out": summary.queries})
    return artifact.commit(
        identity,
        [Receipt(unit=0, fingerprint=identity, counts=counts)],
        config={"sample_pairs": config.corpus.sample_pairs, "sample_seed": config.corpus.sample_seed},
        inputs={},
        seconds=stopwatch.seconds,
        details=SampleDetails(sources=summary.sources, queries=summary.queries, documents=summary.documents),
    )


def _write_collection(folder: Folder, pairs: Iterable[MinedPair], test: Iterable[MinedPair]) -> None:
    documents = [{"_id": _document_id(pair), "title": "", "text": pair.document} for pair in pairs]
    queries = [{"_id": _query_id(pair), "text": pair.query} for pair in test]
    judgements = [f"{_query_id(pair)}\t{_document_id(pair)}\t1" for pair in test]
    folder.write("corpus.jsonl", _json_lines(documents))
    folder.write("queries.jsonl", _json_lines(queries))
    folder.write("qrels/test.tsv", "\n".join(["query-id\tcorpus-id\tscore", *judgements, ""]).encode())


def _document_id(pair: MinedPair) -> str:
    return f"{pair.source}-d{text_hash(pair.document):016x}"


def _query_id(pair: MinedPair) -> str:
    return f"{pair.source}-q{text_hash(pair.query):016x}"


def _json_lines(rows: Iterable[dict[str, str]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
