"""Connections to S3 and compatible storage; the one place where they are made."""

from __future__ import annotations

import os
import threading
from functools import lru_cache
from typing import Any

import fsspec

from clusterbatch.config import StorageConfig

_lock = threading.Lock()


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
