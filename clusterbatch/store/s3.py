"""Files on S3-compatible storage: the verbs of a folder in terms of single requests.

Keys that end in "/" are folder markers, which copying tools write. They are not files: nothing here lists or reads one.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from fsspec.utils import glob_translate

from clusterbatch.config import StorageConfig
from clusterbatch.errors import InfrastructureError
from clusterbatch.store.entry import Entry
from clusterbatch.store.s3_client import request

# Uploads of twice this size or more go up in parts of it, this many at once. A server takes at most 10,000
# parts.
_PART_BYTES = 50 * 2**20
_PARTS_AT_ONCE = 8
_MOST_PARTS = 9_000
# Keys of one delete request, a limit of S3.
_DELETED_AT_ONCE = 1_000
# How often an object is read if its bytes do not match its ETag.
_READS = 4
# Codes for a range that an object is too short for.
_BEHIND_THE_END = ("InvalidRange", "416")
# Codes for an object that has another ETag than the one asked for.
_REPLACED = ("PreconditionFailed", "412")
_MD5 = re.compile(r'"?([0-9a-f]{32})"?')
_MAGIC = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class Upload:
    """An unfinished multipart upload. `name` is the key, `begun` the server's time in UTC."""

    name: str
    identifier: str
    begun: str


@dataclass(frozen=True)
class S3Files:
    """The verbs of a folder on S3. Paths are `bucket/key`, and keys are taken literally, whatever they contain."""

    storage: StorageConfig

    def exists(self, path: str) -> bool:
        """Return whether there is such a file, or any file below it."""
        if self._is_file(path):
            return True
        return any(True for _ in self.below(path))

    def size(self, path: str) -> int:
        return self.size_and_version(path)[0]

    def size_and_version(self, path: str) -> tuple[int, str]:
        """Return an object's bytes and its ETag, "" if the server gives none."""
        head = self._head(path)
        return int(head["ContentLength"]), str(head.get("ETag") or "")

    def read(self, path: str, start: int | None, end: int | None, version: str = "") -> bytes:
        """Bytes [start, end) of an object; those of a whole object are compared with its ETag.

        version: an ETag; raises InfrastructureError if the object has another one by now.
        """
        only = {"IfMatch": version} if version else {}
        if start is None and end is None:
            return self._read_whole(path, only)
        start = start or 0
        span = f"bytes={start}-" if end is None else f"bytes={start}-{end - 1}"
        try:
            return bytes(self._get(path, Range=span, **only)["Body"])
        except InfrastructureError as error:
            # Behind the last byte there is nothing to read, as in a local file.
            if _code(error) in _BEHIND_THE_END and start >= self.size(path):
                return b""
            raise

    def write(self, path: str, data: bytes | memoryview) -> None:
        data = memoryview(data)
        self._write(path, len(data), lambda start, end: bytes(data[start:end]))

    def upload(self, path: str, file: str) -> None:
        def piece(start: int, end: int) -> bytes:
            with open(file, "rb") as source:
                source.seek(start)
                return source.read(end - start)

        self._write(path, os.path.getsize(file), piece)

    def names(self, path: str) -> list[str]:
        """Names of the files and folders directly below."""
        folders, files = self._level(f"{path}/")
        return sorted({*folders, *(entry.name for entry in files)} - {""})

    def last_write(self, path: str) -> float | None:
        """Time of the last write of a file directly below, in seconds since 1970; None if there is none."""
        times = (item["LastModified"].timestamp() for item in self._items(f"{path}/", Delimiter="/"))
        return max(times, default=None)

    def below(self, path: str) -> Iterator[Entry]:
        """All files below a folder, with names relative to it."""
        yield from _entries(self._items(f"{path}/"), f"{path}/")

    def glob(self, path: str, pattern: str) -> Iterator[Entry]:
        """Files whose names relative to a folder match `pattern`; folders that cannot hold any are not listed."""
        base, segments = f"{path}/", pattern.split("/")
        if "**" in pattern:
            literal = "".join(f"{each}/" for each in takewhile(lambda each: not _MAGIC.search(each), segments[:-1]))
            found = _entries(self._items(f"{base}{literal}"), base)
            yield from (entry for entry in found if _matches(pattern, entry.name))
            return
        prefixes = [base]
        for name in segments[:-1]:
            prefixes = [f"{each}{folder}/" for each in prefixes for folder in self._folders(each, name)]
        last = segments[-1]
        for prefix in prefixes:
            _, files = self._level(prefix, _MAGIC.split(last)[0])
            for entry in files:
                if _matches(last, entry.name):
                    yield Entry(f"{prefix}{entry.name}"[len(base) :], entry.size, entry.version)

    def remove(self, path: str) -> None:
        """Remove a file and everything below a folder of this name, folder markers too."""
        bucket, _, key = path.partition("/")
        keys = [item["Key"] for item in self._items(f"{path}/", markers=True)]
        self.remove_all(bucket, [*keys, *([key] if self._is_file(path) else [])])

    def remove_all(self, bucket: str, keys: Iterable[str]) -> None:
        keys = list(keys)
        for start in range(0, len(keys), _DELETED_AT_ONCE):
            failed = self._delete(bucket, keys[start : start + _DELETED_AT_ONCE])
            # Servers answer 200 and list what they could not do.
            failed = self._delete(bucket, [item["Key"] for item in failed]) if failed else []
            if failed:
                code = failed[0].get("Code", "no reason given")
                raise InfrastructureError(f"s3://{bucket}/{failed[0]['Key']}: cannot be removed ({code})")

    def unfinished_uploads(self, path: str) -> Iterator[Upload]:
        """Multipart uploads below a folder, with names relative to it. One that is under way looks the same."""
        bucket, _, prefix = f"{path}/".partition("/")
        marker: dict[str, Any] = {}
        while True:
            page = request(self.storage, "list_multipart_uploads", Bucket=bucket, Prefix=prefix, **marker)
            for item in page.get("Uploads", []):
                yield Upload(item["Key"].removeprefix(prefix), item["UploadId"], f"{item['Initiated']:%Y-%m-%d %H:%M}")
            if not page.get("IsTruncated"):
                return
            marker = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}

    def abort_upload(self, path: str, upload: Upload) -> None:
        """Free the parts that are stored; nothing happens if they are gone."""
        with suppress(FileNotFoundError):
            self._request(path, "abort_multipart_upload", writes=1, UploadId=upload.identifier)

    def _request(self, path: str, operation: str, *, writes: int = 0, **arguments: Any) -> dict[str, Any]:
        bucket, _, key = path.partition("/")
        return request(self.storage, operation, writes=writes, Bucket=bucket, Key=key, **arguments)

    def _head(self, path: str) -> dict[str, Any]:
        """Return the answer to HEAD, or raise the reason for its refusal.

        A refused HEAD has no body, so no reason either. GET is refused with one; from a body that names the bucket's
        region the client learns it, and HEAD then succeeds.
        """
        try:
            return self._request(path, "head_object")
        except InfrastructureError as error:
            if _code(error) not in ("301", "400", "403"):
                raise
        try:
            self._request(path, "get_object", Range="bytes=0-0")
        except InfrastructureError as error:
            if _code(error) not in _BEHIND_THE_END:
                raise
        return self._request(path, "head_object")

    def _is_file(self, path: str) -> bool:
        if not path.partition("/")[2]:
            return False
        try:
            self._head(path)
        except FileNotFoundError:
            return False
        return True

    def _get(self, path: str, **arguments: Any) -> dict[str, Any]:
        try:
            return self._request(path, "get_object", **arguments)
        except InfrastructureError as error:
            if _code(error) not in _REPLACED:
                raise
            raise InfrastructureError(f"s3://{path}: was replaced while it was read; try again") from error

    def _read_whole(self, path: str, only: Mapping[str, str]) -> bytes:
        """Read an object in one request; again if its ETag shows that bytes were damaged in transit."""
        before = None
        for _ in range(_READS):
            answer = self._get(path, **only)
            data = bytes(answer["Body"])
            # The same twice: it is stored so, or this server's ETag is something else. Parts have our own checksums.
            if _is_whole(data, answer) is not False or data == before:
                return data
            before = data
        raise InfrastructureError(f"s3://{path}: comes damaged, {_READS} times in different ways")

    def _write(self, path: str, size: int, piece: Callable[[int, int], bytes]) -> None:
        try:
            if size < 2 * _PART_BYTES:
                self._request(path, "put_object", writes=1, Body=piece(0, size))
            else:
                self._write_in_parts(path, size, piece)
        except FileNotFoundError as error:
            raise InfrastructureError(f"s3://{path}: cannot be written, not found ({error})") from error

    def _write_in_parts(self, path: str, size: int, piece: Callable[[int, int], bytes]) -> None:
        length = max(_PART_BYTES, -(-size // _MOST_PARTS))
        upload = Upload(path, self._request(path, "create_multipart_upload", writes=1)["UploadId"], "")

        def send(number: int) -> dict[str, Any]:
            body = piece((number - 1) * length, min(number * length, size))
            numbered = {"UploadId": upload.identifier, "PartNumber": number, "Body": body}
            return {"PartNumber": number, "ETag": self._request(path, "upload_part", writes=1, **numbered)["ETag"]}

        try:
            with ThreadPoolExecutor(_PARTS_AT_ONCE) as pool:
                sent = [pool.submit(send, number) for number in range(1, -(-size // length) + 1)]
                try:
                    parts = [each.result() for each in sent]
                except BaseException:
                    pool.shutdown(cancel_futures=True)
                    raise
            try:
                done = {"UploadId": upload.identifier, "MultipartUpload": {"Parts": parts}}
                self._request(path, "complete_multipart_upload", writes=1, **done)
            except FileNotFoundError:
                # An answer may be lost in transit: the upload is then complete when the request is repeated.
                if not self._is_file(path) or self.size(path) != size:
                    raise
        except BaseException:
            with suppress(InfrastructureError):
                self.abort_upload(path, upload)
            raise

    def _delete(self, bucket: str, keys: list[str]) -> list[dict[str, Any]]:
        """Remove keys; return the server's errors for those that it has not removed."""
        if not keys:
            return []
        wanted = {"Objects": [{"Key": key} for key in keys], "Quiet": True}
        failed: list[dict[str, Any]] = request(
            self.storage, "delete_objects", writes=1, Bucket=bucket, Delete=wanted
        ).get("Errors", [])
        return [item for item in failed if item.get("Code") != "NoSuchKey"]

    def _level(self, prefix: str, head: str = "") -> tuple[list[str], list[Entry]]:
        """Folders and files directly below `prefix` whose names begin with `head`."""
        folders: list[str] = []
        files: list[Entry] = []
        for page in self._pages(f"{prefix}{head}", Delimiter="/"):
            cut = len(prefix.partition("/")[2])
            folders += [each["Prefix"][cut:-1] for each in page.get("CommonPrefixes", [])]
            files += _entries(page.get("Contents", []), prefix)
        return folders, files

    def _folders(self, prefix: str, pattern: str) -> list[str]:
        if not _MAGIC.search(pattern):
            return [pattern]
        folders, _ = self._level(prefix, _MAGIC.split(pattern)[0])
        return [name for name in folders if _matches(pattern, name)]

    def _items(self, prefix: str, *, markers: bool = False, **arguments: Any) -> Iterator[dict[str, Any]]:
        for page in self._pages(prefix, **arguments):
            yield from (item for item in page.get("Contents", []) if markers or not item["Key"].endswith("/"))

    def _pages(self, prefix: str, **arguments: Any) -> Iterator[dict[str, Any]]:
        """Pages of a listing; `prefix` is `bucket/beginning of the keys`."""
        bucket, _, key = prefix.partition("/")
        more: dict[str, Any] = {}
        while True:
            page = request(self.storage, "list_objects_v2", Bucket=bucket, Prefix=key, **arguments, **more)
            yield page
            if not page.get("IsTruncated"):
                return
            more = {"ContinuationToken": page["NextContinuationToken"]}


def _entries(items: Iterable[dict[str, Any]], prefix: str) -> Iterator[Entry]:
    cut = len(prefix.partition("/")[2])
    for item in items:
        if not item["Key"].endswith("/"):
            yield Entry(item["Key"][cut:], int(item["Size"]), str(item.get("ETag") or item["LastModified"]))


def _matches(pattern: str, name: str) -> bool:
    return re.compile(glob_translate(pattern)).match(name) is not None


def _code(error: InfrastructureError) -> str:
    """The server's code of a refused request, for example InvalidRange."""
    response = getattr(error.__cause__, "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))


def _is_whole(data: bytes, answer: dict[str, Any]) -> bool | None:
    """Return whether an object's ETag matches its bytes; None if that cannot be told.

    The ETag is the content's MD5, except for multipart uploads and objects encrypted with a user's key.
    """
    md5 = _MD5.fullmatch(str(answer.get("ETag")))
    encrypted = str(answer.get("ServerSideEncryption")).startswith("aws:kms") or "SSECustomerAlgorithm" in answer
    if md5 is None or encrypted:
        return None
    return hashlib.md5(data, usedforsecurity=False).hexdigest() == md5[1]
