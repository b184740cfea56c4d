"""Where a row came from: slices and positions in them become files and positions in files."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from clusterbatch.store.artifact import Receipt


@dataclass(frozen=True)
class Origins:
    """`files[slice]` is a slice's file, `first_row[slice]` (int64) the position in the file of its first row."""

    files: list[str]
    first_row: np.ndarray

    @staticmethod
    def of_receipts(receipts: Iterable[Receipt]) -> Origins:
        """From the receipts of pass 1, whose details tell each slice's file and rows, in order."""
        files: list[str] = []
        first_row: list[int] = []
        rows_before: dict[str, int] = {}
        for receipt in receipts:
            for file, rows in receipt.details["slices"]:
                files.append(file)
                first_row.append(rows_before.get(file, 0))
                rows_before[file] = first_row[-1] + rows
        return Origins(files, np.array(first_row, np.int64))

    def _rows(self, slices: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Positions in the files, from slices and positions in them, all (n,) int64."""
        return self.first_row[slices] + positions
