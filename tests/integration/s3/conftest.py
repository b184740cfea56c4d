"""An S3 server for the session, a bucket for each test, and credentials in the environment."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from itertools import count

import pytest

from clusterbatch.config import StorageConfig
from clusterbatch.store import Folder
from tests.integration.s3.swift import S3Server, swift_server

_numbers = count()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    patch = pytest.MonkeyPatch()
    try:
        running = swift_server()
        server = running.__enter__()
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no S3 server: OpenStack Swift cannot be installed from the package index ({error})")
    try:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield server
    finally:
        patch.undo()
        running.__exit__(None, None, None)


@pytest.fixture
def storage(s3_server: S3Server) -> StorageConfig:
    return StorageConfig(endpoint_url=s3_server.endpoint_url, read_timeout=20.0)


@pytest.fixture
def bucket(storage: StorageConfig) -> str:
    """The name of a new, empty bucket."""
    name = f"bucket-{next(_numbers)}"
    Folder(f"s3://{name}", storage).filesystem.call_s3("create_bucket", Bucket=name)
    return name
