"""Checksums that notice what storage does not: a flipped byte in a download passes every client unseen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import xxhash

_READS = 2
_CHUNK_BYTES = 16 * 2**20


class DamagedError(Exception):
    """Bytes are not those that were written."""


def read_verified(read: Callable[[], bytes], is_whole: Callable[[bytes], bool]) -> bytes:
    """Return what `read` gives, once `is_whole` accepts it. Otherwise read again: bytes may be damaged in transit.

    Raises DamagedError if they are damaged every time.
    """
    for _ in range(_READS):
        data = read()
        if is_whole(data):
            return data
    raise DamagedError


def checksum(data: bytes | memoryview) -> str:
    """Return XXH3-128 as 32 hex digits: it detects damage, not an adversary, and is about as fast as memory."""
    return xxhash.xxh3_128_hexdigest(data)


def file_checksum(path: Path) -> str:
    """Return `checksum` of a local file's content, of which a chunk is in memory at a time."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def checksum64(data: bytes | memoryview) -> int:
    """Return XXH3-64 as an unsigned integer, for tables of many small pieces."""
    return xxhash.xxh3_64_intdigest(data)
