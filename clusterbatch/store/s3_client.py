"""Connections to S3-compatible storage, and single requests.

Every request goes through `request`: one attempt at a time, with a time limit, retried by `store.retries` alone. The
connection pool, credentials and regions are those of s3fs; its own retries and parallel reads are not used.
"""

from __future__ import annotations

import asyncio
import os
import threading
from functools import lru_cache
from typing import Any

import fsspec
from fsspec.asyn import sync

from clusterbatch.config import StorageConfig
from clusterbatch.store.retries import with_retries
from clusterbatch.store.traffic import count

# A transfer that is slower than this counts as one that has stopped (bytes per second).
_SLOWEST = 100_000

_lock = threading.Lock()


def s3_filesystem(storage: StorageConfig) -> fsspec.AbstractFileSystem:
    """Return the connection pool of this process and configuration. Credentials come from the environment or a role."""
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
    filesystem.retries = 1
    return filesystem


def request(storage: StorageConfig, operation: str, *, writes: int = 0, **arguments: Any) -> dict[str, Any]:
    """Return the answer to one S3 request, named and parametrised as in boto3; a `Body` in it is read, as bytes.

    Retried as `store.retries` says. Counted as a request that reads unless `writes` is 1. Raises FileNotFoundError if
    the server answers 404, InfrastructureError in one line for everything else.
    """
    count(reads=1 - writes, writes=writes)
    filesystem = s3_filesystem(storage)
    key = arguments.get("Key", arguments.get("Prefix", ""))
    place = f"s3://{arguments['Bucket']}/{key}".rstrip("/")

    def attempt(seconds: float) -> dict[str, Any]:
        answer: dict[str, Any] = sync(filesystem.loop, _ask, filesystem, operation, arguments, seconds)
        return answer

    return with_retries(place, storage, attempt)


async def _ask(
    filesystem: fsspec.AbstractFileSystem, operation: str, arguments: dict[str, Any], seconds: float
) -> dict[str, Any]:
    """`seconds`: how long the server may be silent; in addition, a transfer has time in proportion to its bytes."""
    from botocore.exceptions import ClientError

    body = arguments.get("Body", b"")
    async with asyncio.timeout(seconds + len(body) / _SLOWEST) as limit:
        await filesystem.set_session()
        client = await filesystem.get_s3(arguments["Bucket"])
        _send_bodies_at_once(client)
        try:
            answer: dict[str, Any] = await getattr(client, operation)(**arguments)
        except ClientError as error:
            if error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") == 404:
                raise FileNotFoundError(arguments.get("Key", arguments["Bucket"])) from error
            raise
        if "Body" in answer:
            allowed = seconds + int(answer.get("ContentLength", 0)) / _SLOWEST
            limit.reschedule(asyncio.get_running_loop().time() + allowed)
            async with answer["Body"] as stream:
                answer["Body"] = await stream.read()
    return answer


def _send_bodies_at_once(client: Any) -> None:
    """Do without `Expect: 100-continue`: aiohttp waits for ever for the answer of a server that has hung up."""
    from botocore.handlers import add_expect_header

    # Nothing happens if it is gone already.
    client.meta.events.unregister("before-call.s3", add_expect_header)
