"""Ray Train's own files on S3: written, found and read as pyarrow asks, while requests fail."""

from __future__ import annotations

import pickle

import pyarrow.fs
import pytest

from clusterbatch.config import StorageConfig
from clusterbatch.store import Folder
from clusterbatch.training.ray_storage import ray_storage
from tests.integration.s3.fault_proxy import FaultProxy
from tests.integration.s3.server import S3Server

pytestmark = pytest.mark.s3


def test_small_files_survive_failing_requests(s3_server: S3Server, bucket: str) -> None:
    with FaultProxy(s3_server.port) as proxy:
        storage = StorageConfig(endpoint_url=proxy.endpoint_url, read_timeout=20.0)
        place = ray_storage(Folder(f"s3://{bucket}/train/_ray", storage))
        filesystem = pickle.loads(pickle.dumps(place["storage_filesystem"]))
        folder = f"{place['storage_path']}/run"
        filesystem.create_dir(folder)
        for fault, method in (("server_error", "PUT"), ("drop_answer", "PUT"), ("server_error", "GET")):
            proxy.plan(fault, method=method, path="snapshot.json", times=2)
        with filesystem.open_output_stream(f"{folder}/snapshot.json") as stream:
            stream.write(b"{}")
        with filesystem.open_input_stream(f"{folder}/snapshot.json") as stream:
            assert stream.readall() == b"{}"
        assert filesystem.get_file_info(f"{folder}/snapshot.json").type == pyarrow.fs.FileType.File
        assert filesystem.get_file_info(f"{folder}/nothing").type == pyarrow.fs.FileType.NotFound
        selected = filesystem.get_file_info(pyarrow.fs.FileSelector(folder))
        assert [info.base_name for info in selected] == ["snapshot.json"]
        filesystem.delete_file(f"{folder}/snapshot.json")
        assert filesystem.get_file_info(f"{folder}/snapshot.json").type == pyarrow.fs.FileType.NotFound
        assert sum(proxy.injected.values()) == 6
