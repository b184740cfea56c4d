"""Uploads in parts that a killed process left behind: no file yet, seen in no listing, and paid for until aborted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from clusterbatch.store.filesystem import Folder
from clusterbatch.store.retries import with_retries
from clusterbatch.store.traffic import count


@dataclass(frozen=True)
class Upload:
    """name: of the object it would have become, relative to the folder; begun: time as the server tells it."""

    name: str
    identifier: str
    begun: str


def unfinished_uploads(folder: Folder) -> Iterator[Upload]:
    """Those below `folder`; none on a local disk. One that is still going on looks the same: hold the lease."""
    if folder.is_local:
        return
    bucket, _, prefix = folder.path().partition("/")
    prefix = f"{prefix}/" if prefix else ""
    marker: dict[str, Any] = {}
    while True:
        page = _request(folder, "list_multipart_uploads", Bucket=bucket, Prefix=prefix, **marker)
        for item in page.get("Uploads", []):
            yield Upload(item["Key"].removeprefix(prefix), item["UploadId"], f"{item['Initiated']:%Y-%m-%d %H:%M}")
        if not page.get("IsTruncated"):
            return
        marker = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}


def abort_upload(folder: Folder, upload: Upload) -> None:
    """Frees the parts that are stored; nothing happens where they are gone."""
    bucket, _, key = folder.path(upload.name).partition("/")
    with suppress(FileNotFoundError):
        _request(folder, "abort_multipart_upload", writes=1, Bucket=bucket, Key=key, UploadId=upload.identifier)


def _request(folder: Folder, operation: str, writes: int = 0, **arguments: Any) -> dict[str, Any]:
    count(reads=1 - writes, writes=writes)
    answer = with_retries(folder.uri, folder.storage, lambda: folder.filesystem.call_s3(operation, **arguments))
    return dict(answer)
