"""Partitions: rows that are searched or clustered separately, either each source or the whole corpus."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

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
        found = pc.index_in(source, pa.array(self.names))
        if found.null_count:
            unknown = pc.filter(source, pc.is_null(found))[0].as_py()
            raise DataError(f"corpus: a row of source {unknown!r}, which the corpus manifest does not name")
        return found.to_numpy().astype(np.int64)


def source_partitions(corpus: Manifest) -> Partitions:
    """Return one partition for every source that has rows, none of them split."""
    sources = details_of(corpus, CorpusDetails)["sources"]
    names = sorted(name for name, rows in sources.items() if rows)
    return Partitions(names, np.array([sources[name] for name in names], np.int64), np.ones(len(names), np.int64))
