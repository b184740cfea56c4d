"""Folders: local paths and S3-compatible storage behind the same few verbs."""

from __future__ import annotations

import builtins
import io
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import urlsplit

import fsspec
from fsspec.implementations.local import LocalFileSystem

from clusterbatch.config import StorageConfig
from clusterbatch.errors import DataError, InfrastructureError, UsageError
from clusterbatch.store import local
from clusterbatch.store.entry import Entry
from clusterbatch.store.local import TEMPORARY
from clusterbatch.store.range_file import RangeFile
from clusterbatch.store.s3 import S3Files, Upload
from clusterbatch.store.s3_client import s3_filesystem
from clusterbatch.store.traffic import CountedFile, count

_READ_AHEAD = 8 * 2**20


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
        """File system for libraries that need one; its calls lack the retries and error texts of this class."""
        return LocalFileSystem(auto_mkdir=True) if self.is_local else s3_filesystem(self.storage)

    def path(self, name: str = "") -> str:
        """Return `name` inside this folder as the file system spells it (no scheme).

        Raises DataError if the name leads out of the folder: names come from manifests and object keys as well.
        """
        if ".." in name.split("/") or "\0" in name:
            raise DataError(f"{self.uri}: {name!r} cannot be the name of a file in this folder")
        base = self.uri.removeprefix("s3://")
        return f"{base}/{name}" if name else base

    def child(self, *names: str) -> Folder:
        """Return a folder below this one. Raises DataError if a name leads out of it."""
        for name in names:
            self.path(name)
        return Folder("/".join([self.uri, *names]), self.storage)

    def exists(self, name: str = "") -> bool:
        """Return whether there is a file or a folder of this name."""
        path = self.path(name)
        return self._local(name, lambda: os.path.exists(path)) if self.is_local else self._s3.exists(path)

    def size(self, name: str) -> int:
        """Return the bytes of a file; raises FileNotFoundError if there is none."""
        path = self.path(name)
        return self._local(name, lambda: os.path.getsize(path)) if self.is_local else self._s3.size(path)

    def read(self, name: str, start: int | None = None, end: int | None = None) -> bytes:
        """Return bytes [start, end) of a file, all of it if neither is given. Raises FileNotFoundError if none.

        A range of no bytes is b"" without a look at the file.
        """
        path = self.path(name)
        if end is not None and end <= (start or 0):
            return b""
        if self.is_local:
            data = self._local(name, lambda: local.read(path, start, end))
        else:
            data = self._s3.read(path, start, end)
        count(bytes_read=len(data))
        return data

    def open(self, name: str, block: int = _READ_AHEAD) -> BinaryIO:
        """Return a seekable file, read in pieces of at least `block` bytes; raises FileNotFoundError if it is missing.

        A file no larger than one piece is read whole, so that bytes damaged in transit are noticed: a server gives
        nothing to compare a range with. All pieces are of the same object: InfrastructureError is raised if another
        one is put in its place meanwhile.
        """
        path = self.path(name)
        if self.is_local:
            return cast(BinaryIO, self._local(name, lambda: io.BufferedReader(CountedFile(path))))
        size, version = self._s3.size_and_version(path)
        if size <= block:
            return io.BytesIO(self.read(name))

        def piece(start: int, end: int) -> bytes:
            data = self._s3.read(path, start, end, version)
            count(bytes_read=len(data))
            return data

        return io.BufferedReader(RangeFile(size, piece), block)

    def read_json(self, name: str) -> Any:
        return json.loads(self.read(name))

    def write(self, name: str, data: bytes | memoryview) -> None:
        """Write a file whole; an existing one is replaced."""
        path = self.path(name)
        if self.is_local:
            self._local(name, lambda: local.write(path, data), writes=1)
        else:
            self._s3.write(path, data)
        count(bytes_written=len(data))

    def write_json(self, name: str, value: Any) -> None:
        self.write(name, json.dumps(value, indent=1, ensure_ascii=False).encode())

    def upload(self, name: str, file: str) -> None:
        """Write a file whole from one on this machine, for content too large for memory."""
        path = self.path(name)
        if self.is_local:
            self._local(name, lambda: local.write(path, Path(file)), writes=1)
        else:
            self._s3.upload(path, file)
        count(bytes_written=os.path.getsize(file))

    def list(self, name: str = "") -> builtins.list[str]:
        """Return names of the files and folders directly inside, sorted; empty if there is nothing."""
        path = self.path(name)
        if not self.is_local:
            names = self._s3.names(path)
        else:
            try:
                names = self._local(name, lambda: os.listdir(path))
            except (FileNotFoundError, NotADirectoryError):
                return []
        return sorted(name for name in names if not name.endswith(TEMPORARY))

    def last_write(self) -> float | None:
        """Return when something directly inside was written last, in seconds since 1970; None if there is nothing."""
        path = self.path()
        if not self.is_local:
            return self._s3.last_write(path)
        try:
            return self._local("", lambda: max((entry.stat().st_mtime for entry in os.scandir(path)), default=None))
        except (FileNotFoundError, NotADirectoryError):
            return None

    def find(self, pattern: str | None = None, *, linked_folders: bool = False) -> Sequence[Entry]:
        """Return all files below this folder, or those that match a glob `pattern` relative to it, sorted by name.

        A local link to a file is that file. Links to folders are followed only on request, and not by patterns: a
        caller that removes the files found must not remove those behind a link. Objects whose keys end in "/" are not
        files.
        """
        path = self.path()
        if not self.is_local:
            return sorted(self._s3.below(path) if pattern is None else self._s3.glob(path, pattern))
        if pattern is None:
            return sorted(self._local("", lambda: local.below(path, linked_folders)))
        return sorted(self._local(pattern, lambda: local.glob(path, pattern)))

    def remove(self, name: str = "") -> None:
        """Remove a file or a folder with all it holds; nothing happens if nothing is there.

        Raises UsageError for a place that nobody can mean: a whole bucket, the root, the home folder, the working
        directory or anything above it.
        """
        path = self.path(name)
        if _holds_too_much(path, self.is_local):
            raise UsageError(f"{self.uri}/{name}: refusing to remove this whole place")
        if self.is_local:
            self._local(name, lambda: local.remove(path), writes=1)
        else:
            self._s3.remove(path)

    def remove_files(self, names: Iterable[str]) -> None:
        """Remove files by name, and those local folders, this one or below it, that are then empty."""
        if not self.is_local:
            bucket, _, prefix = self.path().partition("/")
            self._s3.remove_all(bucket, [f"{prefix}/{name}".lstrip("/") for name in names])
            return
        for name in names:
            self.remove(name)
        path = self.path()
        if not _holds_too_much(path, True):
            self._local("", lambda: local.remove_empty_folders(path), writes=1)

    def unfinished_uploads(self) -> builtins.list[Upload]:
        """Return unfinished multipart uploads below this folder; none on a local disk.

        One that is under way looks the same: hold the lease.
        """
        return [] if self.is_local else builtins.list(self._s3.unfinished_uploads(self.path()))

    def abort_upload(self, upload: Upload) -> None:
        self._s3.abort_upload(self.path(upload.name), upload)

    @property
    def _s3(self) -> S3Files:
        return S3Files(self.storage)

    def _local(self, name: str, call: Callable[[], Any], writes: int = 0) -> Any:
        """Return `call()`, counted as one request that reads unless `writes` is 1."""
        count(reads=1 - writes, writes=writes)
        try:
            return call()
        except (FileNotFoundError, NotADirectoryError) as error:
            if not writes:
                # Behind a file there is nothing either.
                raise FileNotFoundError(error.errno, error.strerror, error.filename) from None
            place = f"{self.uri}/{name}" if name else self.uri
            raise InfrastructureError(f"{place}: cannot be written ({error.strerror or error})") from error
        except OSError as error:
            place = f"{self.uri}/{name}" if name else self.uri
            raise InfrastructureError(f"{place}: {error.strerror or error}") from error


def _holds_too_much(path: str, is_local: bool) -> bool:
    if not is_local:
        return "/" not in path.strip("/")
    wanted = Path(os.path.realpath(path))
    return any(kept.is_relative_to(wanted) for kept in (Path(os.path.expanduser("~")), Path.cwd()))


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
