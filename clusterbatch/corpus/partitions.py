"""Partitions: rows that are searched or clustered separately, either each source or the whole corpus."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa

from clusterbatch.errors import DataError
from clusterbatch.store import Manifest
from clusterbatch.store.details import CorpusDetails, details_of

# The name in the cluster index of rows that are not separated by source.
WHOLE_CORPUS = "(all)"


@dataclass(frozen=True)
class Partitions:
    """P partitions. names: sorted; rows: (P,) rows of each; clusters: (P,) into how many clusters each is split."""

    names: list[str]
    rows: np.ndarray
    clusters: np.ndarray

    def of_rows(self, source: pa.ChunkedArray) -> np.ndarray:
        """Return the (rows,) int64 partition of each row, by its source. Raises DataError for an unknown source."""
        if self.names == [WHOLE_CORPUS]:
            return np.zeros(len(source), np.int64)
        encoded = source.combine_chunks().dictionary_encode()
        names = encoded.dictionary.to_pylist()
        numbers = np.array([self._numbers.get(name, -1) for name in names], np.int64)
        if (numbers < 0).any():
            unknown = names[int(numbers.argmin())]
            raise DataError(f"corpus: a row of source {unknown!r}, which the corpus manifest does not name")
        return numbers[encoded.indices.to_numpy()]

    @cached_property
    def _numbers(self) -> dict[str, int]:
        # Kept: a row group has few of the names, of which there may be a hundred thousand.
        return {name: number for number, name in enumerate(self.names)}


def source_partitions(corpus: Manifest) -> Partitions:
    """Return one partition for every source that has rows, none of them split."""
    sources = details_of(corpus, CorpusDetails)["sources"]
    names = sorted(name for name, rows in sources.items() if rows)
    return Partitions(names, np.array([sources[name] for name in names], np.int64), np.ones(len(names), np.int64))
