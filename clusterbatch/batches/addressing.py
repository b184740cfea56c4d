"""From a member of a group to a row of a piece: the order inside the groups, new in every epoch."""

from __future__ import annotations

import numpy as np

from clusterbatch.batches.permutation import permute
from clusterbatch.batches.strata import Stratum

_MEMBER, _SCATTER = 2, 3


def locate_rows(
    stratum: Stratum, group: np.ndarray, member: np.ndarray, seed: int, epoch: int
) -> tuple[np.ndarray, np.ndarray]:
    """Where the `member`-th row of `group` lies in this epoch.

    group, member: (n,) int64. Returns two (n,) int64 arrays: the piece of the cluster index and the row in it. Where
    rows move in runs, the full runs of a group come first, permuted, then the rows of its short runs.
    """
    if stratum.whole_runs:
        local, row = _by_runs(stratum, group, member, seed, epoch)
    else:
        local, row = _by_rows(stratum, group, member, seed, epoch)
    return stratum.pieces[local], row


def _by_runs(
    stratum: Stratum, group: np.ndarray, member: np.ndarray, seed: int, epoch: int
) -> tuple[np.ndarray, np.ndarray]:
    local, row = np.empty(len(member), np.int64), np.empty(len(member), np.int64)
    run_rows, first_piece = stratum.run_rows, stratum.first_piece
    full = stratum.group_runs[group] * run_rows
    inside = member < full

    owner = group[inside]
    run, rest = np.divmod(member[inside], run_rows)
    run = _shuffle(owner, run, stratum.group_runs, (seed, stratum.number, epoch))
    run += stratum.run_start[first_piece[owner]]
    local[inside] = piece = np.searchsorted(stratum.run_start, run, side="right") - 1
    row[inside] = (run - stratum.run_start[piece]) * run_rows + rest

    owner = group[~inside]
    place = stratum.tail_start[first_piece[owner]] + (member - full)[~inside]
    local[~inside] = piece = np.searchsorted(stratum.tail_start, place, side="right") - 1
    row[~inside] = stratum.piece_rows[piece] // run_rows * run_rows + place - stratum.tail_start[piece]
    return local, row


def _by_rows(
    stratum: Stratum, group: np.ndarray, member: np.ndarray, seed: int, epoch: int
) -> tuple[np.ndarray, np.ndarray]:
    row = _shuffle(group, member, stratum.group_rows, (seed, stratum.number, epoch))
    row += stratum.row_start[stratum.first_piece[group]]
    if stratum.scattered:
        # The same members in every epoch, as a cluster has: only then is this a control for clusters.
        row = permute(row, stratum.rows, seed, stratum.number, _SCATTER)
    local = np.searchsorted(stratum.row_start, row, side="right") - 1
    return local, row - stratum.row_start[local]


def _shuffle(group: np.ndarray, item: np.ndarray, items: np.ndarray, key: tuple[int, ...]) -> np.ndarray:
    """Permutes the items of each group among themselves; `items` (g,) says how many each has."""
    order = np.argsort(group, kind="stable")
    numbers, starts = np.unique(group[order], return_index=True)
    shuffled = item.copy()
    # A batch has few groups, so the loop is short.
    for number, here in zip(numbers.tolist(), np.split(order, starts)[1:], strict=True):
        if items[number] > 1:
            shuffled[here] = permute(item[here], int(items[number]), *key, _MEMBER, number)
    return shuffled
