"""Inputs whose pairs are judgements about texts in other files: BEIR folders and MS MARCO passage files."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from clusterbatch.corpus.inputs import InputFile, Slice, cut
from clusterbatch.errors import UsageError
from clusterbatch.store.folder import Entry, Folder

Role = Literal["documents", "queries", "judgements"]

_LAYOUTS: tuple[dict[Role, re.Pattern[str]], ...] = (
    {  # BEIR
        "documents": re.compile(r"^corpus\.jsonl(\.(gz|zst))?$"),
        "queries": re.compile(r"^queries\.jsonl(\.(gz|zst))?$"),
        "judgements": re.compile(r"^qrels/[^/]+\.tsv$"),
    },
    {  # MS MARCO passages
        "documents": re.compile(r"^collection\.tsv(\.(gz|zst))?$"),
        "queries": re.compile(r"^queries\.[^/]*tsv(\.(gz|zst))?$"),
        "judgements": re.compile(r"^qrels\.[^/]*tsv$"),
    },
)
_TRAIN = re.compile(r"(^|[./])train\.tsv$")


@dataclass(frozen=True)
class PairCollection:
    """A folder of documents, queries and judgements; `number` keeps its ids apart from those of others."""

    number: int
    name: str
    files: dict[Role, tuple[InputFile, ...]]


@dataclass(frozen=True)
class CollectionSlice:
    """A slice of one of a collection's files, and its role."""

    collection: int
    role: Role
    source: str
    piece: Slice

    @property
    def size(self) -> int:
        return self.piece.size


def collection_in(folder: Folder, number: int, split: str | None, key: str = "corpus.split") -> PairCollection | None:
    """Return the collection in a folder; None if the folder's files have neither layout.

    Judgements: those of `split` (qrels/SPLIT.tsv, qrels.SPLIT.tsv), by default the training ones, otherwise all.
    Raises UsageError, which names `key`, if there is no such split.
    """
    entries = folder.find(linked_folders=True)
    for layout in _LAYOUTS:
        found = {role: [entry for entry in entries if pattern.match(entry.name)] for role, pattern in layout.items()}
        if not all(found.values()):
            continue
        found["judgements"] = _of_split(folder, found["judgements"], split, key)
        files = {
            role: tuple(InputFile(f"{folder.uri}/{entry.name}", entry.size, entry.version) for entry in entries)
            for role, entries in found.items()
        }
        return PairCollection(number, posixpath.basename(folder.uri), files)
    return None


def _of_split(folder: Folder, entries: Sequence[Entry], split: str | None, key: str) -> list[Entry]:
    if split is not None:
        named = [entry for entry in entries if re.search(rf"(^|[./]){re.escape(split)}\.tsv$", entry.name)]
        if not named:
            raise UsageError(f"{key}: {folder.uri} has no judgements called {split}")
        return named
    return [entry for entry in entries if _TRAIN.search(entry.name)] or list(entries)


def plan_collections(
    collections: Sequence[PairCollection], unit_bytes: int, first_slice: int
) -> list[list[CollectionSlice]]:
    """Return the slices of all files, of at most about `unit_bytes`, each a unit; numbered from `first_slice` on."""
    units: list[list[CollectionSlice]] = []
    number = first_slice
    for collection in collections:
        for role, files in collection.files.items():
            for file in files:
                for start, end in cut(file, unit_bytes, can_be_cut=file.name.endswith((".jsonl", ".tsv"))):
                    piece = Slice(number, file, start, end)
                    units.append([CollectionSlice(collection.number, role, collection.name, piece)])
                    number += 1
    return units
