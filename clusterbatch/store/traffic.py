"""Requests and bytes that this process has asked of storage, for the cost of a stage.

Local files count alike: what a run would ask of a bucket can be read off a run on one machine. A local file that is
open counts as one request, for the operating system decides what is read.
"""

from __future__ import annotations

import io
import threading
from collections import Counter

from pydantic import BaseModel


class Traffic(BaseModel):
    """reads: requests that fetch, list or look; writes: those that put or delete."""

    reads: int = 0
    writes: int = 0
    bytes_read: int = 0
    bytes_written: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(**{name: getattr(self, name) + getattr(other, name) for name in type(self).model_fields})


_lock = threading.Lock()
_counted: Counter[str] = Counter()


def count(*, reads: int = 0, writes: int = 0, bytes_read: int = 0, bytes_written: int = 0) -> None:
    with _lock:
        _counted["reads"] += reads
        _counted["writes"] += writes
        _counted["bytes_read"] += bytes_read
        _counted["bytes_written"] += bytes_written


def since_last() -> Traffic:
    """Return what was counted since the last call: if called once per unit of work, that is the unit's traffic."""
    with _lock:
        found = Traffic(**_counted)
        _counted.clear()
    return found


def carry_over(found: Traffic) -> None:
    """Count what other processes or a pass have done, so that it belongs to the next artifact of this process."""
    count(**found.model_dump())


class CountedFile(io.FileIO):
    """A local file whose reads are counted."""

    def readinto(self, buffer: bytearray | memoryview) -> int | None:  # type: ignore[override]
        read = super().readinto(buffer)
        count(bytes_read=read or 0)
        return read

    def readall(self) -> bytes:
        data = super().readall() or b""
        count(bytes_read=len(data))
        return data
