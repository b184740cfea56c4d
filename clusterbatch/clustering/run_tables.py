"""Where the runs of each shard end, and their checksums, as readers keep them: a bounded number of shards at a time."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

# A run takes 12 bytes for each file: 10^9 rows in runs of 64 take 190 MB, twice that where vectors are read as well.
# Tables that were dropped are read again with their shard's next run.
_KEPT_BYTES = 256 * 2**20


@dataclass(frozen=True)
class RunTable:
    """Of one file of a shard with R runs. ends: (R + 1,) unsigned, a zero in front; checksums: (R,) uint64, XXH3-64."""

    ends: np.ndarray
    checksums: np.ndarray

    @property
    def bytes(self) -> int:
        return self.ends.nbytes + self.checksums.nbytes

    def span(self, first: int, last: int) -> tuple[int, int]:
        """Bytes [start, end) of the runs `first` to `last`."""
        return int(self.ends[first]), int(self.ends[last + 1])


class RunTables:
    """By shard and file; the least recently used leave first. Safe for several threads; pickled without what it holds.

    read: gives the Parquet bytes of a shard's table.
    """

    def __init__(self, read: Callable[[int], bytes], limit: int = _KEPT_BYTES) -> None:
        self._read, self._limit = read, limit
        self._clear()

    def _clear(self) -> None:
        self._tables: OrderedDict[tuple[int, str], RunTable] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, object]:
        return {"_read": self._read, "_limit": self._limit}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._clear()

    def get(self, shard: int, content: str) -> RunTable:
        """The table of the file of a shard that holds `content`."""
        key = (shard, content)
        with self._lock:
            if key in self._tables:
                self._tables.move_to_end(key)
                return self._tables[key]
        # Threads that want the same one read it side by side; the last stays.
        columns = pq.read_table(pa.BufferReader(self._read(shard)), columns=[f"{content}_end", f"{content}_checksum"])
        ends = np.concatenate([[0], columns[f"{content}_end"].to_numpy()])
        table = RunTable(ends.astype(np.min_scalar_type(ends[-1])), columns[f"{content}_checksum"].to_numpy().copy())
        with self._lock:
            previous = self._tables.pop(key, None)
            self._bytes += table.bytes - (previous.bytes if previous else 0)
            self._tables[key] = table
            while self._bytes > self._limit and len(self._tables) > 1:
                self._bytes -= self._tables.popitem(last=False)[1].bytes
        return table
