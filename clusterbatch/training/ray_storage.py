"""Storage of Ray Train's own few small files, with the same retries as everything else."""

from __future__ import annotations

import io
from typing import Any

import pyarrow as pa
import pyarrow.fs

from clusterbatch.config import StorageConfig
from clusterbatch.store import Folder
from clusterbatch.store.retries import with_retries


def ray_storage(folder: Folder) -> dict[str, Any]:
    """Return the arguments of ray.train.RunConfig for `folder`, which all nodes must see."""
    if folder.is_local:
        return {"storage_path": folder.path()}
    handler = _RetryingHandler(folder.storage)
    return {"storage_path": folder.path(), "storage_filesystem": pyarrow.fs.PyFileSystem(handler)}


class _RetryingHandler(pyarrow.fs.FSSpecHandler):  # type: ignore[misc]
    """pyarrow's view of S3. Paths are `bucket/key`; files are small enough to be in memory whole."""

    def __init__(self, storage: StorageConfig) -> None:
        self._storage = storage
        super().__init__(Folder("s3://any", storage).filesystem)

    def __reduce__(self) -> tuple[Any, ...]:
        # The process that this is sent to makes a connection of its own.
        return type(self), (self._storage,)

    def create_dir(self, path: str, recursive: bool) -> None:
        """Do nothing: objects need no directories."""

    def get_file_info(self, paths: list[str]) -> Any:
        call = super().get_file_info
        return with_retries(f"s3://{paths[0]}", self._storage, lambda _: call(paths))

    def get_file_info_selector(self, selector: Any) -> Any:
        call = super().get_file_info_selector
        return with_retries(f"s3://{selector.base_dir}", self._storage, lambda _: call(selector))

    def open_input_stream(self, path: str) -> Any:
        return pa.PythonFile(io.BytesIO(self._parent(path).read(_name(path))), mode="r")

    def open_input_file(self, path: str) -> Any:
        return self.open_input_stream(path)

    def open_output_stream(self, path: str, metadata: Any) -> Any:
        return pa.PythonFile(_Upload(self._parent(path), _name(path)), mode="w")

    def delete_file(self, path: str) -> None:
        self._parent(path).remove(_name(path))

    def delete_dir(self, path: str) -> None:
        self._parent(path).remove(_name(path))

    def _parent(self, path: str) -> Folder:
        return Folder(f"s3://{path.rstrip('/').rpartition('/')[0]}", self._storage)


class _Upload(io.BytesIO):
    """File that becomes an object when it is closed."""

    def __init__(self, folder: Folder, name: str) -> None:
        super().__init__()
        self._folder = folder
        self._name = name

    def close(self) -> None:
        if not self.closed:
            self._folder.write(self._name, self.getvalue())
        super().close()


def _name(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]
