"""The one place that turns a URI into bytes: local paths and S3-compatible storage behind the same few verbs."""

from __future__ import annotations

import builtins
import glob
import io
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import urlsplit

import fsspec
from fsspec.implementations.local import LocalFileSystem

from clusterbatch.config import StorageConfig
from clusterbatch.errors import DataError, InfrastructureError, UsageError
from clusterbatch.store.retries import with_retries
from clusterbatch.store.s3 import RangeFile, read_object, s3_filesystem
from clusterbatch.store.traffic import CountedFile, count

# What a local write is called until it is whole.
TEMPORARY = ".tmp"
_READ_AHEAD = 8 * 2**20
# How often an object is read whose bytes are not those that its ETag promises.
_READS = 4


@dataclass(frozen=True, order=True)
class Entry:
    """A file below a folder: its name relative to the folder, its bytes, and what changes when its content does."""

    name: str
    size: int
    version: str


@dataclass(frozen=True)
class Folder:
    """A folder at a URI. Small and picklable: workers get the folder, not a connection.

    Writes are whole or absent: a local file is renamed into place, an object is put in one piece.
    """

    uri: str
    storage: StorageConfig = field(default_factory=StorageConfig)

    def __post_init__(self) -> None:
        object.__setattr__(self, "uri", normalise_uri(self.uri))

    @property
    def is_local(self) -> bool:
        return not self.uri.startswith("s3://")

    @property
    def filesystem(self) -> fsspec.AbstractFileSystem:
        """For libraries that want one; its calls have none of the retries and error texts of this class."""
        return LocalFileSystem(auto_mkdir=True) if self.is_local else s3_filesystem(self.storage)

    def path(self, name: str = "") -> str:
        """`name` inside this folder as the file system spells it (no scheme).

        Raises DataError where the name leads out of the folder: names come from manifests and object keys as well.
        """
        if ".." in name.split("/"):
            raise DataError(f"{self.uri}: '..' cannot be part of a name ({name})")
        base = self.uri.removeprefix("s3://")
        return f"{base}/{name}" if name else base

    def child(self, *names: str) -> Folder:
        return Folder("/".join([self.uri, *names]), self.storage)

    def exists(self, name: str = "") -> bool:
        return bool(self._call(name, lambda: self.filesystem.exists(self.path(name))))

    def size(self, name: str) -> int:
        """Bytes of a file; raises FileNotFoundError where there is none."""
        return int(self._call(name, lambda: self.filesystem.size(self.path(name))))

    def read(self, name: str, start: int | None = None, end: int | None = None) -> bytes:
        """Bytes [start, end) of a file; all of it when neither is given. Raises FileNotFoundError where none is."""
        path = self.path(name)
        if self.is_local or start is not None or end is not None:
            data = bytes(self._call(name, lambda: self.filesystem.cat_file(path, start=start, end=end)))
        else:
            data = self._read_object(name)
        count(bytes_read=len(data))
        return data

    def open(self, name: str, block: int = _READ_AHEAD) -> BinaryIO:
        """A file to read in pieces of at least `block` bytes, seekable; raises FileNotFoundError where none is.

        What is no larger than a piece comes whole, so that bytes damaged on their way are noticed. Of a range
        a server says nothing to compare it with.
        """
        if self.is_local:
            return cast(BinaryIO, self._call(name, lambda: io.BufferedReader(CountedFile(self.path(name)))))
        size = self.size(name)
        if size <= block:
            return io.BytesIO(self.read(name))
        return io.BufferedReader(RangeFile(size, lambda start, end: self.read(name, start, end)), block)

    def read_json(self, name: str) -> Any:
        return json.loads(self.read(name))

    def write(self, name: str, data: bytes | memoryview) -> None:
        """Writes a file whole; whatever was there before is replaced."""
        if self.is_local:
            self._call(name, lambda: self._write_local(name, data), writes=1)
        else:
            self._put(name, lambda path: self.filesystem.pipe_file(path, bytes(data)))
        count(bytes_written=len(data))

    def write_json(self, name: str, value: Any) -> None:
        self.write(name, json.dumps(value, indent=1, ensure_ascii=False).encode())

    def upload(self, name: str, file: str) -> None:
        """Writes a file whole from one on this machine, for what is too large to be in memory."""
        if self.is_local:
            self._call(name, lambda: self._write_local(name, Path(file)), writes=1)
        else:
            self._put(name, lambda path: self.filesystem.put_file(file, path))
        count(bytes_written=os.path.getsize(file))

    def list(self, name: str = "") -> builtins.list[str]:
        """Names of the files and folders directly inside, sorted; empty where nothing is."""
        try:
            entries = self._call(name, lambda: self.filesystem.ls(self.path(name), detail=False))
        except (FileNotFoundError, NotADirectoryError):
            return []
        names = (entry.rstrip("/").rsplit("/", 1)[-1] for entry in entries)
        return sorted(entry for entry in names if not entry.endswith(TEMPORARY))

    def last_write(self) -> float | None:
        """When something directly inside was written last, in seconds since 1970; None where nothing is."""
        try:
            entries = self._call("", lambda: self.filesystem.ls(self.path(), detail=True))
        except (FileNotFoundError, NotADirectoryError):
            return None
        # Local files have `mtime`, objects `LastModified`; folders of objects neither.
        times = [entry.get("LastModified", entry.get("mtime", 0.0)) for entry in entries]
        return max((time.timestamp() if isinstance(time, datetime) else float(time) for time in times), default=None)

    def find(self, pattern: str | None = None, *, linked_folders: bool = False) -> Sequence[Entry]:
        """All files below this folder, or those that match a glob `pattern` relative to it, sorted by name.

        A local link to a file is that file. What lies behind links to folders is found on request alone, and not by
        patterns: who removes what is found here must not remove it there.
        """
        base = self.path()
        if self.is_local:
            found = self._call(pattern or "", lambda: _local_files(base, pattern, linked_folders))
        elif pattern is None:
            found = self._call("", lambda: self.filesystem.find(base, detail=True))
        else:
            found = self._call(pattern, lambda: self.filesystem.glob(f"{glob.escape(base)}/{pattern}", detail=True))
        entries = []
        for path, info in found.items():
            if info["type"] == "file" and path != base:
                version = info.get("ETag") or info.get("mtime") or ""
                entries.append(Entry(path[len(base.rstrip("/")) + 1 :], int(info["size"]), str(version)))
        return sorted(entries)

    def remove(self, name: str = "") -> None:
        """Removes a file or a folder with all it holds; nothing happens where nothing is.

        Refuses, with UsageError, what nobody can have meant: a whole bucket, the root, the home folder, the working
        directory or anything above it.
        """
        if _holds_too_much(self.path(name), self.is_local):
            raise UsageError(f"{self.uri}/{name}: refusing to remove this whole place")

        def call() -> None:
            path = self.path(name)
            if self.filesystem.exists(path):
                # After an answer that was lost on its way, what should go is gone already.
                with suppress(FileNotFoundError):
                    self.filesystem.rm(path, recursive=True)

        self._call(name, call, writes=1)

    def _call(self, name: str, call: Callable[[], Any], writes: int = 0) -> Any:
        """One request, counted as one that reads unless `writes` is 1."""
        count(reads=1 - writes, writes=writes)
        place = f"{self.uri}/{name}" if name else self.uri
        if not self.is_local:
            return with_retries(place, self.storage, call)
        try:
            return call()
        except (FileNotFoundError, NotADirectoryError):
            raise
        except OSError as error:
            raise InfrastructureError(f"{place}: {error.strerror or error}") from error

    def _read_object(self, name: str) -> bytes:
        """An object whole, read again where its ETag says that bytes were damaged on their way."""
        before = None
        for _ in range(_READS):
            data, is_whole = self._call(name, lambda: read_object(self.filesystem, self.path(name)))
            # Twice the same: so it is stored, or this server's ETag is something else. Parts have checksums of ours.
            if is_whole is not False or data == before:
                return bytes(data)
            before = data
        raise InfrastructureError(f"{self.uri}/{name}: comes damaged, {_READS} times in different ways")

    def _put(self, name: str, put: Callable[[str], Any]) -> None:
        try:
            self._call(name, lambda: put(self.path(name)), writes=1)
        except FileNotFoundError as error:
            raise InfrastructureError(f"{self.uri}/{name}: cannot be written, not found ({error})") from error

    def _write_local(self, name: str, content: bytes | memoryview | Path) -> None:
        path = self.path(name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        temporary = f"{path}.{uuid.uuid4().hex[:8]}{TEMPORARY}"
        try:
            with open(temporary, "wb") as file:
                if isinstance(content, Path):
                    with content.open("rb") as source:
                        shutil.copyfileobj(source, file, _READ_AHEAD)
                else:
                    file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            if os.path.exists(temporary):
                os.unlink(temporary)


def _holds_too_much(path: str, is_local: bool) -> bool:
    if not is_local:
        return "/" not in path.strip("/")
    wanted = Path(os.path.realpath(path))
    return any(kept.is_relative_to(wanted) for kept in (Path.home(), Path.cwd()))


def _local_files(base: str, pattern: str | None, linked_folders: bool) -> dict[str, Any]:
    """What fsspec tells of the files below a folder, by path."""
    filesystem = LocalFileSystem()
    paths = _paths_below(base, linked_folders) if pattern is None else filesystem.glob(f"{glob.escape(base)}/{pattern}")
    found = {}
    for path in paths:
        # Listed, a link is no file to fsspec; asked for by its path, it is what it leads to (nothing, if nowhere).
        with suppress(OSError):
            found[path] = filesystem.info(path)
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


def normalise_uri(uri: str) -> str:
    """Absolute local path, or s3://bucket/prefix; no trailing slash, nothing that climbs out with `..`."""
    scheme = urlsplit(uri).scheme if "://" in uri else ""
    if scheme in ("s3", "s3a"):
        bucket, _, key = uri.split("://", 1)[1].partition("/")
        if not bucket:
            raise UsageError(f"{uri}: no bucket in this address")
        if "@" in bucket or ":" in bucket:
            # Not repeated: this may be a secret.
            raise UsageError("s3:// address: credentials come from the environment, not from the address")
        parts = [part for part in key.split("/") if part]
        if ".." in parts:
            raise UsageError(f"{uri}: '..' cannot be part of an address")
        return "/".join([f"s3://{bucket}", *parts])
    if scheme not in ("", "file"):
        raise UsageError(f"{uri}: unknown scheme {scheme}://, expected a local path or s3://bucket/prefix")
    path = uri.removeprefix("file://")
    if not path.strip():
        raise UsageError("an empty address: expected a local path or s3://bucket/prefix")
    return os.path.abspath(os.path.expanduser(path))
