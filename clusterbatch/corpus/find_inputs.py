"""From `corpus.paths` to the files and collections that are read."""

from __future__ import annotations

import glob
import posixpath
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from clusterbatch.config import CorpusConfig, StorageConfig
from clusterbatch.corpus.beir import PairCollection, collection_in
from clusterbatch.corpus.inputs import InputFile, with_sources
from clusterbatch.corpus.readers.formats import EXTENSIONS, format_of_name
from clusterbatch.errors import UsageError
from clusterbatch.log import say
from clusterbatch.store.folder import Entry, Folder, normalise_uri

_GLOB = re.compile(r"[*?\[]")
# What Hugging Face's `save_to_disk` writes beside the rows of a data set, and what its `map` leaves there.
_BESIDE_ROWS = re.compile(r"(state|dataset_info|dataset_dict)\.json|cache-[^/]*\.arrow")
# Folders of tables whose own lists say which of their files are still part of them.
_TABLES = {
    "Delta": re.compile(r"(.*/)?_delta_log/[^/]+"),
    "Iceberg": re.compile(r"(.*/)?metadata/[^/]+\.metadata\.json"),
}
_NAMED_SKIPPED = 5
_HIDDEN = "hidden"


@dataclass(frozen=True)
class Inputs:
    """Files whose rows are pairs, collections whose judgements are, and by reason the files that were skipped."""

    files: list[InputFile]
    collections: list[PairCollection]
    skipped: tuple[tuple[str, str], ...] = ()

    def __bool__(self) -> bool:
        return bool(self.files or self.collections)

    def __iter__(self) -> Iterator[InputFile]:
        yield from self.files
        for collection in self.collections:
            for files in collection.files.values():
                yield from files

    @property
    def bytes(self) -> int:
        """Bytes of all files as they are stored."""
        return sum(file.size for file in self)

    def report_skipped(self) -> None:
        """Warn of files in folders of `corpus.paths` that are not read, by reason."""
        for reason, count in Counter(reason for _, reason in self.skipped).items():
            names = [name for name, why in self.skipped if why == reason]
            named = ", ".join(names[:_NAMED_SKIPPED]) + (", ..." if count > _NAMED_SKIPPED else "")
            plural = "" if count == 1 else "s"
            say(f"ingest    {count:,} file{plural} skipped, {reason}: {named}", level="warning", skipped=count)


def find_inputs(
    config: CorpusConfig, paths: Sequence[str], storage: StorageConfig, key: str = "corpus.paths"
) -> Inputs:
    """Find what `paths` lead to: files, folders (of a collection, or of files with a known extension), globs.

    A path that exists is taken as it is, even if it has the characters of a glob. Each file comes once, in the order of
    `paths`, then by name. Raises UsageError, which names `key`, if a path leads to nothing.
    """
    files: dict[str, InputFile] = {}
    collections: list[PairCollection] = []
    skipped: list[tuple[str, str]] = []
    for path in paths:
        folder, entries = _look(path, storage)
        found = len(collections)
        if entries is None:
            everything = folder.find(linked_folders=True)
            _check_no_table(folder, everything, key)
            everything = _without_notes(everything)
            for inside in _collection_folders(everything):
                place = folder.child(inside) if inside else folder
                collection = collection_in(place, len(collections), config.split)
                if collection is not None:
                    collections.append(collection)
                    everything = [entry for entry in everything if not _is_below(entry.name, inside)]
            skipped += [(f"{folder.uri}/{entry.name}", _why_skipped(entry.name)) for entry in everything]
            entries = [entry for entry in everything if not _why_skipped(entry.name)]
        if not entries and len(collections) == found:
            raise UsageError(f"{key}: {path}: no such file, or no file there that could be read as pairs")
        for file in _input_files(folder, entries):
            files.setdefault(file.uri, file)
    # Hidden files are meant to be overlooked.
    told = dict.fromkeys(pair for pair in skipped if pair[1] not in ("", _HIDDEN))
    return Inputs(with_sources(list(files.values())), collections, tuple(told))


def _look(path: str, storage: StorageConfig) -> tuple[Folder, Sequence[Entry] | None]:
    """Return the folder that `path` is or is in, and the files it names; None if it names the folder."""
    uri = normalise_uri(path)
    parent, _, name = uri.rpartition("/")
    # A bucket has no parent to look into.
    if parent not in ("s3:/", "s3:"):
        folder = Folder(parent or "/", storage)
        named = [entry for entry in folder.find(glob.escape(name)) if entry.name == name]
        if named:
            return folder, named
    if not _GLOB.search(uri) or Folder(uri, storage).exists():
        return Folder(uri, storage), None
    parts = uri.split("/")
    # Folders may have the characters of a glob in their names; if all of them exist, no part is a glob.
    first = next(
        (
            number
            for number, part in enumerate(parts)
            if _GLOB.search(part)
            and (number == len(parts) - 1 or not Folder("/".join(parts[: number + 1]), storage).exists())
        ),
        len(parts) - 1,
    )
    folder = Folder("/".join(parts[:first]) or "/", storage)
    return folder, folder.find("/".join(parts[first:]))


def _collection_folders(entries: Sequence[Entry]) -> list[str]:
    """Return the folders that may be collections: this one (""), or folders inside."""
    names = [entry.name for entry in entries]
    if any(re.match(r"(corpus\.jsonl|collection\.tsv)", name) for name in names):
        return [""]
    inside = (posixpath.split(name) for name in names)
    return sorted({folder for folder, name in inside if re.match(r"(corpus\.jsonl|collection\.tsv)", name)})


def _is_below(name: str, folder: str) -> bool:
    return not folder or name.startswith(f"{folder}/")


def _check_no_table(folder: Folder, entries: Sequence[Entry], key: str) -> None:
    """Raise UsageError for a folder of a table that may hold files of rows that were deleted or replaced."""
    for kind, pattern in _TABLES.items():
        found = next((match for entry in entries if (match := pattern.fullmatch(entry.name))), None)
        if found:
            place = folder.child(found[1].rstrip("/")) if found[1] else folder
            raise UsageError(
                f"{key}: {place.uri} is a table of {kind}, whose folder may hold files that are no longer part of it; "
                "export it as Parquet, or name the files to read"
            )


def _without_notes(entries: Sequence[Entry]) -> list[Entry]:
    """Leave out what Hugging Face's datasets write beside the rows of a saved data set."""
    if not any(posixpath.basename(entry.name) == "state.json" for entry in entries):
        return list(entries)
    return [entry for entry in entries if not _BESIDE_ROWS.fullmatch(posixpath.basename(entry.name))]


def _input_files(folder: Folder, entries: Sequence[Entry]) -> Iterator[InputFile]:
    base = folder.uri.rstrip("/")
    return (InputFile(f"{base}/{entry.name}", entry.size, entry.version) for entry in entries)


def _why_skipped(name: str) -> str:
    """Return why a file in a folder is not read; empty if it is."""
    if any(part.startswith((".", "_")) for part in name.split("/")):
        return _HIDDEN
    return "" if format_of_name(name).is_known else f"not {', '.join(f'.{name}' for name in EXTENSIONS)} (.gz, .zst)"
