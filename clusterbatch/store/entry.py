"""Files below a folder, and the names that this product gives to its own."""

from __future__ import annotations

import re
import uuid
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

import xxhash

from clusterbatch.errors import DataError

# A random token and a check of the name before it, 8 hex digits each.
_OWN = re.compile(r"(?P<stem>.+)[-.](?P<token>[0-9a-f]{8})(?P<check>[0-9a-f]{8})\.[^./]+", re.DOTALL)


@dataclass(frozen=True, order=True)
class Entry:
    """A file below a folder: its name relative to the folder, its bytes, and what changes when its content does."""

    name: str
    size: int
    version: str


def own_name(stem: str, extension: str) -> str:
    """Return a new file name that no other attempt uses, and that `is_own_name` recognises; folders may precede it."""
    token = uuid.uuid4().hex[:8]
    return f"{stem}{'.' if extension == 'tmp' else '-'}{token}{_check(stem, token)}.{extension}"


def is_own_name(name: str) -> bool:
    """Return whether a file has a name of `own_name`.

    Interrupted attempts leave files that no manifest names. They may be removed only because their names show who wrote
    them: one name in 2^32 of the same pattern passes by chance.
    """
    found = _OWN.fullmatch(name.rpartition("/")[2])
    return found is not None and _check(found["stem"], found["token"]) == found["check"]


def _check(stem: str, token: str) -> str:
    text = f"clusterbatch {stem.rpartition('/')[2]} {token}"
    # A name may hold surrogates: bytes that are no UTF-8 on disk, or a source's own in the data.
    return xxhash.xxh3_64_hexdigest(text.encode("utf-8", "surrogatepass"))[:8]


def local_place(folder: Path, name: str) -> Path:
    """Return where a file that storage calls `name` belongs below a local folder.

    Raises DataError if the name could lead out of the folder: an object's key may be any text.
    """
    segments = name.split("/")
    windows = PureWindowsPath(name)
    if {"", ".", ".."} & set(segments) or windows.drive or windows.root or "\\" in name or "\0" in name:
        raise DataError(f"{name!r}: not a name that a file on this machine may have")
    return folder.joinpath(*segments)
