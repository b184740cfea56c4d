"""A file that is read by ranges, as libraries want to open it."""

from __future__ import annotations

import io
from collections.abc import Callable


class RangeFile(io.RawIOBase):
    """Seekable and read-only. `read_range(start, end)` gives bytes [start, end) and deals with failures."""

    def __init__(self, size: int, read_range: Callable[[int, int], bytes]) -> None:
        self._size = size
        self._read_range = read_range
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readall(self) -> bytes:
        """Return the rest in one piece; Python's own would ask for 8 KiB at a time."""
        buffer = bytearray(max(0, self._size - self._position))
        filled = 0
        while filled < len(buffer):
            filled += self.readinto(memoryview(buffer)[filled:])
        return bytes(buffer)

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        end = min(self._position + len(buffer), self._size)
        if end <= self._position:
            return 0
        data = self._read_range(self._position, end)
        if not data:
            raise EOFError(f"the file ends at byte {self._position} of {self._size}")
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)
