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
        """From the receipts of pass 1, whose details tell each slice's number, file and rows where they read any."""
        # A receipt that was read from storage has lists, a new one tuples.
        slices = sorted(tuple(piece) for receipt in receipts for piece in receipt.details.get("slices", []))
        first_row = np.zeros(len(slices), np.int64)
        rows_before: dict[str, int] = {}
        for number, file, rows in slices:
            first_row[number] = rows_before.get(file, 0)
            rows_before[file] = int(first_row[number]) + rows
        return Origins([file for _, file, _ in slices], first_row)
