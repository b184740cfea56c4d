"""One line of progress for long work: the share done, the rate, and the time left."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from clusterbatch.log import is_structured, say

_SECONDS_BETWEEN_LINES = 10.0


class ProgressLine:
    """`with ProgressLine("embed", total=rows) as line: line.advance(n)`.

    A live bar on a terminal; elsewhere (logs, CI) a line every ten seconds, as clusterbatch.log says it.
    """

    def __init__(self, title: str, total: int, unit: str = "rows") -> None:
        self._title, self._total = title, total
        self._unit = unit.removesuffix("s") if total == 1 and unit.isalpha() else unit
        self._console = Console(stderr=True)
        self._done = 0
        self._initial = 0
        self._note = ""
        self._start = time.monotonic()
        self._begun = self._last_line = self._start
        self._bar: Progress | None = None

    def __enter__(self) -> ProgressLine:
        self._start = self._begun = self._last_line = time.monotonic()
        if self._console.is_terminal and not is_structured():
            self._bar = Progress(
                TextColumn("{task.description:<10}"),
                BarColumn(),
                TaskProgressColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._bar.add_task(self._title, total=self._total, rate="")
            self._bar.start()
        else:
            self._say(f"{self._title}: {self._total:,} {self._unit}")
        return self

    def start_at(self, done: int) -> None:
        """Count work that an earlier session finished; it does not affect the rate."""
        self._initial = self._done = done
        if self._bar:
            self._bar.update(self._task, completed=done)

    def advance(self, count: int, note: str = "", seconds: float | None = None) -> None:
        """Count finished work. seconds: how long it took; with the first, what came before it was the start of workers,
        which does not affect the rate."""
        now = time.monotonic()
        if self._done == self._initial and seconds is not None:
            self._begun = max(self._start, now - seconds)
        self._done += count
        self._note = note
        rate = (self._done - self._initial) / max(now - self._begun, 1e-9)
        # Steps of a large model take seconds.
        number = f"{rate:,.0f}" if rate >= 10 or not rate else f"{rate:.2g}"
        speed = f"{number} {self._unit.split()[0]}/s"
        note = f", {note}" if note else ""
        if self._bar:
            text = f"{self._done:,}/{self._total:,} {self._unit}, {speed}{note}"
            self._bar.update(self._task, completed=self._done, rate=text)
        elif now - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = now
            left = f", {(self._total - self._done) / rate:,.0f} s left" if rate > 0 else ""
            text = f"{self._done:,}/{self._total:,} {self._unit}, {speed}{left}{note}"
            self._say(f"{self._title}: {text}", rate=float(f"{rate:.3g}"))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        elapsed = time.monotonic() - self._start
        if self._bar:
            self._bar.stop()
        if error is None:
            self._say(f"{self._title}: {self._done:,} {self._unit} in {elapsed:,.1f} s {self._note}", seconds=elapsed)

    def _say(self, text: str, **figures: Any) -> None:
        say(text.rstrip(), work=self._title, done=self._done, total=self._total, unit=self._unit, **figures)
