"""Metrics per step as JSON lines, with every step exactly once whatever crashes in between.

Object storage cannot append, so the lines lie in segments named after their first step: a new one begins with every
checkpoint and where one has grown large, and the current one is written again as it grows. A run that resumes from step
s removes the segments that begin at or after s: lines beyond the last whole checkpoint are dropped, and those steps are
logged anew.
"""

from __future__ import annotations

import json
import time
from typing import Any

from clusterbatch.store import Folder

SEGMENTS = "metrics"
_SECONDS_BETWEEN_WRITES = 10.0
# The step waits while a segment is written.
_SEGMENT_BYTES = 2**20


class MetricsLog:
    """Writes the lines of steps from `first_step` on under <folder>/metrics/. Rank 0 only."""

    def __init__(self, folder: Folder, first_step: int) -> None:
        self._folder = folder
        for name in folder.list(SEGMENTS):
            if _first_step(name) >= first_step:
                folder.remove(f"{SEGMENTS}/{name}")
        self._begin(first_step)

    def add(self, line: dict[str, Any]) -> None:
        self._lines.append(json.dumps(line))
        self._bytes += len(self._lines[-1])
        if self._bytes > _SEGMENT_BYTES:
            self.cut(line["step"] + 1)
        elif time.monotonic() - self._written > _SECONDS_BETWEEN_WRITES:
            self._write()

    def cut(self, next_step: int) -> None:
        """Ends the segment; the next line is that of `next_step`. Call before a checkpoint of that step is saved."""
        self._write()
        self._begin(next_step)

    def _begin(self, step: int) -> None:
        self._name = f"steps-{step:010d}.jsonl"
        self._lines: list[str] = []
        self._bytes = 0
        self._written = time.monotonic()

    def _write(self) -> None:
        if self._lines:
            self._folder.write(f"{SEGMENTS}/{self._name}", ("\n".join(self._lines) + "\n").encode())
        self._written = time.monotonic()


def read_metrics(folder: Folder) -> bytes:
    """All lines so far, in step order."""
    names = sorted(folder.list(SEGMENTS), key=_first_step)
    return b"".join(folder.read(f"{SEGMENTS}/{name}") for name in names)


def read_last_line(folder: Folder) -> dict[str, Any] | None:
    """The newest line of a run that may still be under way; None before its first."""
    for name in sorted(folder.list(SEGMENTS), key=_first_step, reverse=True):
        lines = folder.read(f"{SEGMENTS}/{name}").splitlines()
        if lines:
            newest: dict[str, Any] = json.loads(lines[-1])
            return newest
    return None


def _first_step(name: str) -> int:
    return int(name.removeprefix("steps-").removesuffix(".jsonl"))
