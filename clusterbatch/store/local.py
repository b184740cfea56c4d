"""The verbs of a folder on a local file system. Paths are absolute."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from glob import escape
from itertools import chain
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from clusterbatch.store.entry import Entry, own_name

# Name extension of a file that is being written.
TEMPORARY = ".tmp"
_COPIED_AT_ONCE = 8 * 2**20


def read(path: str, start: int | None, end: int | None) -> bytes:
    with open(path, "rb") as file:
        file.seek(start or 0)
        return file.read(-1 if end is None else max(0, end - (start or 0)))


def write(path: str, content: bytes | memoryview | Path) -> None:
    """Write bytes, or those of another file, and rename the result into place."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary = own_name(path, TEMPORARY.removeprefix("."))
    try:
        with open(temporary, "wb") as file:
            if isinstance(content, Path):
                with content.open("rb") as source:
                    shutil.copyfileobj(source, file, _COPIED_AT_ONCE)
            else:
                file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def remove(path: str) -> None:
    """Remove a file, or a folder with all it holds; for a link, only the link. Nothing happens if nothing is there."""
    with suppress(FileNotFoundError, NotADirectoryError):
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path)
        else:
            os.unlink(path)


def remove_empty_folders(path: str) -> None:
    """Remove the folders below `path` that hold no file, and `path` itself if it holds none."""
    for folder, _, _ in os.walk(path, topdown=False):
        with suppress(OSError):
            os.rmdir(folder)


def below(base: str, linked_folders: bool) -> list[Entry]:
    """All files below a folder, with names relative to it, and if asked those behind links to folders."""
    return _entries(base, _paths_below(base, linked_folders))


def glob(base: str, pattern: str) -> list[Entry]:
    return _entries(base, LocalFileSystem().glob(f"{escape(base)}/{pattern}"))


def _entries(base: str, paths: Any) -> list[Entry]:
    found = []
    for path in paths:
        # A link is what it leads to: nothing, if that does not exist.
        with suppress(OSError):
            stat = os.stat(path)
            if os.path.isfile(path):
                found.append(Entry(path[len(base.rstrip("/")) + 1 :], stat.st_size, str(stat.st_mtime)))
    return found


def _paths_below(base: str, linked_folders: bool) -> Iterator[str]:
    """Paths of all files below a folder, then, if so asked, of those behind links to folders. No folder comes twice, so
    that links in a circle end."""
    seen: set[str] = set()
    waiting = [base]
    while waiting:
        links: list[str] = []
        for folder, folders, names in chain.from_iterable(map(os.walk, waiting)):
            if (place := os.path.realpath(folder)) in seen:
                folders.clear()
                continue
            seen.add(place)
            yield from (os.path.join(folder, name) for name in names)
            links += (path for name in folders if os.path.islink(path := os.path.join(folder, name)))
        waiting = sorted(links) if linked_folders else []
