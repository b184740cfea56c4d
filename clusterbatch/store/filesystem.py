"""The one place that turns a URI into bytes: local paths and S3-compatible storage behind the same few verbs."""

from __future__ import annotations

import json
import os
import threading
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, BinaryIO
from urllib.parse import urlsplit

import fsspec
from fsspec.implementations.local import LocalFileSystem

from clusterbatch.config import StorageConfig
from clusterbatch.errors import InfrastructureError, UsageError

_READ_AHEAD = 8 * 2**20


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
        return _filesystem(self.is_local, self.storage)

    def path(self, name: str = "") -> str:
        """`name` inside this folder as the file system spells it (no scheme)."""
        base = self.uri.removeprefix("s3://")
        return f"{base}/{name}" if name else base

    def child(self, *names: str) -> Folder:
        return Folder("/".join([self.uri, *names]), self.storage)

    def exists(self, name: str = "") -> bool:
        with _explained(self, name):
            return bool(self.filesystem.exists(self.path(name)))

    def size(self, name: str) -> int:
        with _explained(self, name):
            return int(self.filesystem.size(self.path(name)))

    def read(self, name: str, start: int | None = None, end: int | None = None) -> bytes:
        """Bytes [start, end) of a file; all of it when neither is given."""
        with _explained(self, name):
            return bytes(self.filesystem.cat_file(self.path(name), start=start, end=end))

    def open(self, name: str) -> BinaryIO:
        """A file to read in pieces, seekable. Later reads raise what the library raises: wrap them in `explained`."""
        with _explained(self, name):
            if self.is_local:
                return open(self.path(name), "rb")
            return self.filesystem.open(self.path(name), "rb", cache_type="readahead", block_size=_READ_AHEAD)

    def read_json(self, name: str) -> Any:
        return json.loads(self.read(name))

    def write(self, name: str, data: bytes | memoryview) -> None:
        path = self.path(name)
        with _explained(self, name):
            if not self.is_local:
                self.filesystem.pipe_file(path, bytes(data))
                return
            os.makedirs(os.path.dirname(path), exist_ok=True)
            temporary = f"{path}.{uuid.uuid4().hex[:8]}.tmp"
            try:
                with open(temporary, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, path)
            finally:
                if os.path.exists(temporary):
                    os.unlink(temporary)

    def write_json(self, name: str, value: Any) -> None:
        self.write(name, json.dumps(value, indent=1, ensure_ascii=False).encode())

    def list(self, name: str = "") -> list[str]:
        """Names of the files and folders directly inside, sorted; empty where nothing is."""
        with _explained(self, name):
            try:
                entries = self.filesystem.ls(self.path(name), detail=False)
            except (FileNotFoundError, NotADirectoryError):
                return []
        names = (entry.rstrip("/").rsplit("/", 1)[-1] for entry in entries)
        return sorted(entry for entry in names if not entry.endswith(".tmp"))

    def find(self, pattern: str | None = None) -> Sequence[Entry]:
        """All files below this folder, or those that match a glob `pattern` relative to it, sorted by name."""
        with _explained(self, pattern or ""):
            base = self.path()
            if pattern is None:
                found = self.filesystem.find(base, detail=True)
            else:
                found = self.filesystem.glob(f"{base}/{pattern}", detail=True)
        entries = []
        for path, info in found.items():
            if info["type"] == "file" and path != base:
                version = info.get("ETag") or info.get("mtime") or ""
                entries.append(Entry(path[len(base) + 1 :], int(info["size"]), str(version)))
        return sorted(entries)

    def remove(self, name: str = "") -> None:
        """Removes a file or a folder with all it holds; nothing happens where nothing is."""
        with _explained(self, name):
            path = self.path(name)
            if self.filesystem.exists(path):
                self.filesystem.rm(path, recursive=True)


def normalise_uri(uri: str) -> str:
    """Absolute local path, or s3://bucket/prefix; no trailing slash, nothing that climbs out with `..`."""
    scheme = urlsplit(uri).scheme if "://" in uri else ""
    if scheme in ("s3", "s3a"):
        bucket, _, key = uri.split("://", 1)[1].partition("/")
        if not bucket:
            raise UsageError(f"{uri}: no bucket in this address")
        parts = [part for part in key.split("/") if part]
        if ".." in parts:
            raise UsageError(f"{uri}: '..' cannot be part of an address")
        return "/".join([f"s3://{bucket}", *parts])
    if scheme not in ("", "file"):
        raise UsageError(f"{uri}: unknown scheme {scheme}://, expected a local path or s3://bucket/prefix")
    path = uri.removeprefix("file://") or "."
    return os.path.abspath(os.path.expanduser(path))


@lru_cache(maxsize=8)
def _filesystem_of_process(pid: int, is_local: bool, storage: StorageConfig) -> fsspec.AbstractFileSystem:
    if is_local:
        return LocalFileSystem(auto_mkdir=True)
    import s3fs

    config: dict[str, Any] = {
        "retries": {"max_attempts": storage.attempts, "mode": "standard"},
        "connect_timeout": storage.connect_timeout,
        "read_timeout": storage.read_timeout,
        # Many compatible servers do not know the newer checksum trailers.
        "request_checksum_calculation": "when_required",
        "response_checksum_validation": "when_required",
    }
    if storage.addressing_style != "auto":
        config["s3"] = {"addressing_style": storage.addressing_style}
    client: dict[str, Any] = {"verify": storage.ca_file or storage.verify_tls}
    if storage.region:
        client["region_name"] = storage.region
    return s3fs.S3FileSystem(
        endpoint_url=storage.endpoint_url,
        config_kwargs=config,
        client_kwargs=client,
        use_listings_cache=False,
        skip_instance_cache=True,
    )


_lock = threading.Lock()


def _filesystem(is_local: bool, storage: StorageConfig) -> fsspec.AbstractFileSystem:
    with _lock:
        return _filesystem_of_process(os.getpid(), is_local, storage)


@contextmanager
def _explained(folder: Folder, name: str) -> Iterator[None]:
    """Turns what storage libraries raise into one line that says what failed and where."""
    place = f"{folder.uri}/{name}" if name else folder.uri
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise
    except PermissionError as error:
        raise InfrastructureError(f"{place}: access denied ({error})") from error
    except OSError as error:
        raise InfrastructureError(f"{place}: {error.strerror or error}") from error
    except Exception as error:
        if type(error).__module__.split(".")[0] in ("botocore", "aiobotocore", "aiohttp"):
            raise InfrastructureError(f"{place}: {error}") from error
        raise
