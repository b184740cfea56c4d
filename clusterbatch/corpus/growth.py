"""What a new version of a corpus goes on from: its rows, its input files, what it holds out; and what is new."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import pyarrow as pa

from clusterbatch.config import RunConfig
from clusterbatch.corpus.finding import Inputs
from clusterbatch.corpus.holdout import NOTHING, HeldOut
from clusterbatch.corpus.inputs import InputFile
from clusterbatch.corpus.known import Dropping
from clusterbatch.errors import UsageError
from clusterbatch.store.artifact import Artifact, Manifest, Part
from clusterbatch.store.tables import read_parquet, write_parquet
from clusterbatch.store.versions import GrowingArtifact

# Roles of parts: the files that a version was made of, and the hashes of what is held out.
FILES, CHOSEN = "files", "held out"
# Keys of `corpus` that may differ from version to version; all others decide what is a valid pair, or its columns.
_FREE = ("paths", "source", "split", "on_error", "encoding", "sample_pairs", "sample_seed")
_FILES_SCHEMA = pa.schema({"uri": pa.string(), "size": pa.int64(), "version": pa.string()})


@dataclass(frozen=True)
class Growth:
    """base: the newest version of `corpus`; dropping: the rows that the next one has no more."""

    corpus: GrowingArtifact
    base: Manifest
    dropping: Dropping

    @property
    def dimensions(self) -> int | None:
        """Of the vectors that came with the rows."""
        found: int | None = self.base.details.get("dimensions")
        return found

    @cached_property
    def held_out(self) -> HeldOut:
        parts = [part for part in self.base.parts if part.details.get("role") == CHOSEN]
        return HeldOut.from_table(read_parquet(self.corpus.folder, parts[0])) if parts else NOTHING


def new_inputs(inputs: Inputs, read: set[tuple[str, int, str]]) -> Inputs:
    """The files that are not among those that were read, or have changed since; collections as a whole."""
    collections = [
        collection
        for collection in inputs.collections
        if any(not _is_read(file, read) for files in collection.files.values() for file in files)
    ]
    return Inputs([file for file in inputs.files if not _is_read(file, read)], collections)


def files_read(corpus: GrowingArtifact, manifest: Manifest) -> set[tuple[str, int, str]]:
    """(uri, size, version) of all files that a corpus was made of."""
    parts = [part for part in manifest.parts if part.details.get("role") == FILES]
    rows = [row for part in parts for row in read_parquet(corpus.folder, part).to_pylist()]
    return {(row["uri"], row["size"], row["version"]) for row in rows}


def write_files(artifact: Artifact, files: Iterable[InputFile]) -> Part:
    rows = [{"uri": file.uri, "size": file.size, "version": file.version} for file in files]
    return write_parquet(artifact, "files", pa.Table.from_pylist(rows, schema=_FILES_SCHEMA), role=FILES)


def check_same_rules(config: RunConfig, base: Manifest, tests: str) -> None:
    """Raises UsageError where rows would be taken by other rules than those of the corpus.

    tests: fingerprint of the test collections that the corpus must not contain.
    """
    if "tests" not in base.details:
        raise UsageError("ingest --append: this corpus does not say what it was made of (an older one); ingest it anew")
    before, now = base.config, config.corpus.identity()
    changed = [key for key in now if key not in _FREE and now[key] != before.get(key)]
    if changed:
        raise UsageError(f"ingest --append: corpus.{changed[0]} is another than the corpus was made with")
    if base.details["tests"] != tests:
        raise UsageError(
            "ingest --append: the collections of evaluate.path, which the corpus must not contain, have changed since "
            "it was made; ingest it anew (--force)"
        )


def _is_read(file: InputFile, read: set[tuple[str, int, str]]) -> bool:
    return (file.uri, file.size, file.version) in read
