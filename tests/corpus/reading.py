"""Reads input files in this process, as the workers of pass 1 do, for tests."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clusterbatch.config import CorpusConfig, StorageConfig
from clusterbatch.corpus.find_inputs import find_inputs
from clusterbatch.corpus.inputs import plan_units
from clusterbatch.corpus.readers.dispatch import read_slice
from clusterbatch.corpus.rows import BrokenFileError, Reject
from clusterbatch.corpus.validate import validate


@dataclass
class Outcome:
    rows: list[dict[str, Any]] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)
    broken: str | None = None

    @property
    def pairs(self) -> list[tuple[str, str]]:
        return [(row["query"], row["document"]) for row in self.rows]


def read(path: Path, **config: Any) -> Outcome:
    """All rows of one file, cut into slices of `unit_bytes`."""
    corpus = CorpusConfig(paths=[str(path)], **config)
    storage = StorageConfig()
    outcome = Outcome()
    for unit in plan_units(find_inputs(corpus, corpus.paths, storage).files, corpus.unit_bytes):
        for piece in unit:
            try:
                for chunk in read_slice(piece, corpus, storage):
                    valid = validate(chunk, corpus, piece.file.source)
                    outcome.rows += valid.table.to_pylist()
                    outcome.rejects += valid.rejects
            except BrokenFileError as error:
                outcome.broken = str(error)
    return outcome
