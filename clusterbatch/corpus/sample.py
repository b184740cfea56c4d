"""The built-in sample: mined pairs, split into a corpus to train on and a test collection in BEIR layout."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby

import pyarrow as pa

from clusterbatch.config import RunConfig, fingerprint
from clusterbatch.corpus.docstrings import MinedPair, mine
from clusterbatch.corpus.normalise import keyed_hash, text_hash
from clusterbatch.errors import DataError
from clusterbatch.store.artifact import Artifact, Counts, Manifest, Receipt, Stopwatch
from clusterbatch.store.filesystem import Folder
from clusterbatch.store.tables import parquet_bytes
from clusterbatch.store.workspace import Workspace

PAIRS = "pairs"
COLLECTION = "collection"
# One pair in fifteen is held out: 1,200 test queries of 18,000 pairs.
_HELD_OUT = 15


@dataclass(frozen=True)
class SampleSummary:
    """What `write_sample` wrote: training pairs by source, test queries, documents of the collection."""

    sources: dict[str, int]
    queries: int
    documents: int

    @property
    def pairs(self) -> int:
        return sum(self.sources.values())


def write_sample(folder: Folder, pairs: int, seed: int) -> SampleSummary:
    """Mines at most `pairs` pairs into `folder`: pairs/SOURCE.parquet and collection/ (BEIR layout).

    No query and no document occurs twice among all pairs, so no held-out pair nor a copy of it is trained on; the
    collection's documents are those of all pairs, so that finding the right one is not easy.
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
    """The workspace's sample, mined unless it is there already; packages installed since do not change it.

    force: replaces one of another size or seed, else a UsageError.
    """
    artifact = Workspace(config).sample
    identity = fingerprint("sample", config.corpus.sample_pairs, config.corpus.sample_seed)
    manifest = artifact.manifest()
    if manifest is not None and manifest.fingerprint == identity:
        return manifest
    artifact.begin(identity, force)
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
        details={"sources": summary.sources, "queries": summary.queries, "documents": summary.documents},
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
