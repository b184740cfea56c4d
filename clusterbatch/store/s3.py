"""Connections to S3 and compatible storage; the one place where they are made.

A file that is read by ranges, as libraries want to open it.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import threading
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import fsspec
from fsspec.asyn import sync

from clusterbatch.config import StorageConfig


class RangeFile(io.RawIOBase):
    """Seekable and read-only. `read_range(start, end)` gives bytes [start, end) and deals with failures."""

    def __init__(self, size: int, read_range: Callable[[int, int], bytes]) -> None:
        self._size = size
        self._read_range = read_range
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        end = min(self._position + len(buffer), self._size)
        if end <= self._position:
            return 0
        data = self._read_range(self._position, end)
        if not data:
            raise EOFError(f"the file ends at byte {self._position} of {self._size}")
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


_lock = threading.Lock()
_MD5 = re.compile(r'"?([0-9a-f]{32})"?')


def s3_filesystem(storage: StorageConfig) -> fsspec.AbstractFileSystem:
    """One connection pool for each process and configuration. Credentials come from the environment or a role."""
    with _lock:
        return _of_process(os.getpid(), storage)


@lru_cache(maxsize=8)
def _of_process(pid: int, storage: StorageConfig) -> fsspec.AbstractFileSystem:
    import s3fs

    config: dict[str, Any] = {
        # Attempts are counted in one place, store.retries, which knows the budget.
        "retries": {"total_max_attempts": 1, "mode": "standard"},
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
    filesystem = s3fs.S3FileSystem(
        endpoint_url=storage.endpoint_url,
        config_kwargs=config,
        client_kwargs=client,
        use_listings_cache=False,
        skip_instance_cache=True,
    )
    # Some, so that not all parts of a multipart upload are begun again for one of them.
    filesystem.retries = 3
    return filesystem


def read_object(filesystem: fsspec.AbstractFileSystem, path: str) -> tuple[bytes, bool | None]:
    """All bytes of an object in one request, and whether its ETag is theirs: None where an ETag cannot tell.

    The ETag is the content's MD5, except of what went up in parts or is encrypted with a key of the user's.
    """

    async def read() -> tuple[bytes, Any]:
        bucket, key, _ = filesystem.split_path(path)
        answer = await filesystem._call_s3("get_object", Bucket=bucket, Key=key)
        async with answer["Body"] as body:
            return await body.read(), answer

    data, answer = sync(filesystem.loop, read)
    md5 = _MD5.fullmatch(str(answer.get("ETag")))
    encrypted = str(answer.get("ServerSideEncryption")).startswith("aws:kms") or "SSECustomerAlgorithm" in answer
    if md5 is None or encrypted:
        return data, None
    return data, hashlib.md5(data, usedforsecurity=False).hexdigest() == md5[1]
