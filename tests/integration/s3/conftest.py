"""An S3 server for the session, a bucket for each test, and credentials in the environment.

CLUSTERBATCH_S3_SERVER says which: swift (the default), ceph, or moto.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from itertools import count

import pytest

from clusterbatch.config import StorageConfig
from clusterbatch.store import Folder
from tests.integration.s3.ceph import ceph_server
from tests.integration.s3.moto import moto_server
from tests.integration.s3.server import NoServerError, S3Server
from tests.integration.s3.swift import swift_server

_SERVERS: dict[str, Callable[[], AbstractContextManager[S3Server]]] = {
    "swift": swift_server,
    "ceph": ceph_server,
    "moto": moto_server,
}
_numbers = count()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    chosen = os.environ.get("CLUSTERBATCH_S3_SERVER")
    with ExitStack() as stack:
        try:
            server = stack.enter_context(_SERVERS[chosen or "swift"]())
        except NoServerError as error:
            if chosen:
                pytest.skip(f"no S3 server: {error}")
            server = _stand_in(stack, error)
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield server


def _stand_in(stack: ExitStack, reason: NoServerError) -> S3Server:
    try:
        server = stack.enter_context(moto_server())
    except NoServerError as error:
        pytest.skip(f"no S3 server: {reason}; {error}")
    warnings.warn(f"S3 tests run against {server.name}, not a real server: {reason}", stacklevel=1)
    return server


@pytest.fixture
def storage(s3_server: S3Server) -> StorageConfig:
    return StorageConfig(endpoint_url=s3_server.endpoint_url, read_timeout=20.0)


@pytest.fixture
def bucket(storage: StorageConfig) -> str:
    """The name of a new, empty bucket."""
    name = f"bucket-{next(_numbers)}"
    Folder(f"s3://{name}", storage).filesystem.call_s3("create_bucket", Bucket=name)
    return name
