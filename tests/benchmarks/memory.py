"""The most memory that a process and all below it hold at once."""

from __future__ import annotations

import threading
import time

import psutil

_SECONDS_BETWEEN_LOOKS = 0.2


class PeakMemory:
    """`with PeakMemory() as memory: ...`, then `memory.bytes`: this process and its descendants, Ray's own included.

    Pages that processes share, such as the object store's, are counted once (PSS).
    """

    def __init__(self) -> None:
        self.bytes = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        me, pause = psutil.Process(), _SECONDS_BETWEEN_LOOKS
        while not self._ended.wait(pause):
            start, held = time.perf_counter(), 0
            for process in [me, *me.children(recursive=True)]:
                try:
                    held += process.memory_full_info().pss
                except psutil.Error:
                    continue
            self.bytes = max(self.bytes, held)
            # Counting the pages of many processes is work: at most a tenth of one core.
            pause = max(_SECONDS_BETWEEN_LOOKS, 10 * (time.perf_counter() - start))
