"""From `corpus.paths` to the files and collections that are read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from clusterbatch.config import CorpusConfig, StorageConfig
from clusterbatch.corpus.beir import PairCollection, collection_in
from clusterbatch.corpus.inputs import InputFile
from clusterbatch.corpus.readers.formats import format_of_name
from clusterbatch.errors import UsageError
from clusterbatch.store.folder import Entry, Folder, normalise_uri

_GLOB = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class Inputs:
    """Files whose rows are pairs, and collections whose judgements are."""

    files: list[InputFile]
    collections: list[PairCollection]

    def __bool__(self) -> bool:
        return bool(self.files or self.collections)

    def __iter__(self) -> Iterator[InputFile]:
        yield from self.files
        for collection in self.collections:
            for files in collection.files.values():
                yield from files


def find_inputs(
    config: CorpusConfig, paths: Sequence[str], storage: StorageConfig, key: str = "corpus.paths"
) -> Inputs:
    """What `paths` lead to: files, folders (a collection's, or files with a known extension), globs.

    Each file once, in the order of `paths`, then by name. Raises UsageError, which names `key`, where a path leads to
    nothing.
    """
    files: dict[str, InputFile] = {}
    collections: list[PairCollection] = []
    for path in paths:
        folder, entries = _look(path, storage)
        if entries is None:
            collection = collection_in(folder, len(collections), config.split)
            if collection is not None:
                collections.append(collection)
                continue
            entries = [entry for entry in folder.find(linked_folders=True) if _is_wanted(entry.name)]
        if not entries:
            raise UsageError(f"{key}: {path}: no such file, or no file there that could be read as pairs")
        for file in _input_files(folder, entries):
            files.setdefault(file.uri, file)
    return Inputs(list(files.values()), collections)


def _look(path: str, storage: StorageConfig) -> tuple[Folder, Sequence[Entry] | None]:
    """The folder that `path` is or is in, and the files it names; None where it names the folder."""
    uri = normalise_uri(path)
    if _GLOB.search(uri):
        parts = uri.split("/")
        first = next(index for index, part in enumerate(parts) if _GLOB.search(part))
        folder = Folder("/".join(parts[:first]) or "/", storage)
        return folder, folder.find("/".join(parts[first:]))
    parent, _, name = uri.rpartition("/")
    # A bucket has no parent to look into.
    if parent not in ("s3:/", "s3:"):
        folder = Folder(parent or "/", storage)
        named = [entry for entry in folder.find(name) if entry.name == name]
        if named:
            return folder, named
    return Folder(uri, storage), None


def _input_files(folder: Folder, entries: Iterable[Entry]) -> Iterable[InputFile]:
    base = folder.uri.rstrip("/")
    return (InputFile(f"{base}/{entry.name}", entry.size, entry.version) for entry in entries)


def _is_wanted(name: str) -> bool:
    hidden = any(part.startswith((".", "_")) for part in name.split("/"))
    return not hidden and format_of_name(name).is_known
