"""One stratum, one epoch: the order in which its groups' rows are dealt into parts of a batch.

Every group is cut into whole parts of `part_rows` rows. What remains of the groups, strung together in packing order,
is cut likewise, so that remains meet their neighbours'. The order of all parts is random. So every row stands in the
sequence exactly once, any position can be computed directly, and the memory is a few integers per group.

    axis       | whole parts, group by group | remains: full runs | remains: short runs |
    sequence   | parts of the axis, permuted ...................|.. the last, as they are

Short runs (the last run of a piece, its length arbitrary) are strung together apart from the full ones: a run is read
for two batches only if they are cut there. So a plan of parts of whole runs reads hardly more than its rows.

`locate_rows` turns members of groups into rows of pieces, by an order inside each group that is new in every epoch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from clusterbatch.batches.permutation import combine_key, draws, permute
from clusterbatch.batches.strata import Stratum

_MEMBER, _SCATTER = 2, 3


def locate_rows(
    stratum: Stratum, group: np.ndarray, member: np.ndarray, seed: int, epoch: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the place of the `member`-th row of `group` in this epoch.

    group, member: (n,) int64. Returns two (n,) int64 arrays: the piece of the cluster index and the row in it. If
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
    """Permute the items of each group among themselves; `items` (g,) says how many each has."""
    order = np.argsort(group, kind="stable")
    numbers, starts = np.unique(group[order], return_index=True)
    shuffled = item.copy()
    # A batch has few groups, so the loop is short.
    for number, here in zip(numbers.tolist(), np.split(order, starts)[1:], strict=True):
        if items[number] > 1:
            shuffled[here] = permute(item[here], int(items[number]), *key, _MEMBER, number)
    return shuffled


# A group hardly larger than a part would make the same batch every epoch. Up to this multiple of the part it lends its
# rows to the remains in every other epoch, at random, where they mix with the neighbours'.
HARDLY_LARGER = 1.5
# How many places a group may move along the packing order from epoch to epoch, so that remains meet other neighbours.
_DRIFT = 4

_PART, _LEND, _RING, _ENTRY, _SKIP = 0, 4, 5, 6, 9

# Groups, the first member of each stretch, and its length.
Section = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Stretches:
    """Stretches of consecutive members of one group, in the order of a sequence; arrays are (s,) int64.

    packed: bool, whether it is what remained of its group.
    """

    group: np.ndarray
    member: np.ndarray
    rows: np.ndarray
    packed: np.ndarray


class EpochSequence:
    """The rows of `stratum` in the order of one epoch, in parts of `part_rows`."""

    def __init__(self, stratum: Stratum, part_rows: int, seed: int, epoch: int) -> None:
        self._stratum = stratum
        self._part_rows = part_rows
        self._seed, self._epoch = seed, epoch
        self._key = (seed, stratum.number, epoch)
        in_runs = (stratum.whole_runs or stratum.scattered) and part_rows % stratum.run_rows == 0
        short = stratum.group_tail if in_runs else np.zeros_like(stratum.group_tail)
        full = stratum.group_rows - short
        whole = full // part_rows
        whole -= self._lent(whole)
        kept = whole * part_rows
        # Both strings of remains begin at the same place of the ring: the end of one meets the beginning of the other.
        self._order = self._ring()
        sections: list[Section] = [
            (np.arange(len(full)), np.zeros_like(full), kept),
            self._strung(kept, full - kept, stratum.run_rows if in_runs else 1),
            self._strung(full, short, 1),
        ]
        owner, first_member, length = (np.concatenate(arrays) for arrays in zip(*sections, strict=True))
        present = length > 0
        self._owner, self._first_member = owner[present], first_member[present]
        self._edge = np.concatenate([[0], np.cumsum(length[present])])
        self._whole_rows = int(kept.sum())
        self._parts = int(full.sum()) // part_rows

    @property
    def in_order_from(self) -> int:
        """Position from which on the remains are in packing order, no longer in permuted parts."""
        return self._parts * self._part_rows

    def stretches(self, start: int, end: int) -> Stretches:
        """Return the stretches at positions [start, end) of the sequence; each ends with its part at the latest."""
        size = self._part_rows
        part = np.arange(start // size, -(-end // size))
        begin = part.copy()
        permuted = part < self._parts
        begin[permuted] = permute(part[permuted], max(self._parts, 1), *self._key, _PART)
        begin *= size
        low, high = begin.copy(), begin + size
        low[0] += start - part[0] * size
        high[-1] = begin[-1] + end - part[-1] * size
        return self._cut(low, high)

    def rows(self, start: int, end: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return the rows at positions [start, end) of the sequence.

        Returns four (end - start,) arrays: the piece of the cluster index, the row in that piece, the group (int64),
        and whether the row is packed (bool).
        """
        found = self.stretches(start, end)
        group = np.repeat(found.group, found.rows)
        member = np.repeat(found.member, found.rows) + _ramps(found.rows)
        piece, row = locate_rows(self._stratum, group, member, self._seed, self._epoch)
        return piece, row, group, np.repeat(found.packed, found.rows)

    def rows_at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return the rows at any (n,) positions of the sequence, as `rows` does; packed is False for all of them."""
        part, offset = np.divmod(positions, self._part_rows)
        permuted = part < self._parts
        part[permuted] = permute(part[permuted], max(self._parts, 1), *self._key, _PART)
        axis = part * self._part_rows + offset
        entry = np.searchsorted(self._edge, axis, side="right") - 1
        group, member = self._owner[entry], self._first_member[entry] + axis - self._edge[entry]
        piece, row = locate_rows(self._stratum, group, member, self._seed, self._epoch)
        return piece, row, group, np.zeros(len(axis), bool)

    def _cut(self, low: np.ndarray, high: np.ndarray) -> Stretches:
        """Return the intervals [low, high) of the axis, cut where the group changes."""
        first = np.searchsorted(self._edge, low, side="right") - 1
        last = np.searchsorted(self._edge, high, side="left") - 1
        count = last - first + 1
        entry = np.repeat(first, count) + _ramps(count)
        start = np.maximum(np.repeat(low, count), self._edge[entry])
        stop = np.minimum(np.repeat(high, count), self._edge[entry + 1])
        member = self._first_member[entry] + start - self._edge[entry]
        return Stretches(self._owner[entry], member, stop - start, start >= self._whole_rows)

    def _lent(self, whole: np.ndarray) -> np.ndarray:
        """Return (groups,) 1 for a group hardly larger than a part that gives it up for this epoch, otherwise 0."""
        if len(whole) == 1:
            return np.zeros(1, np.int64)
        narrow = (whole == 1) & (self._stratum.group_rows < HARDLY_LARGER * self._part_rows)
        return (narrow & (self._draws(_LEND, len(whole)) < 0.5)).astype(np.int64)

    def _ring(self) -> np.ndarray:
        """Return (g,) groups along the ring of the packing order, entered anywhere, each a few places off at most."""
        groups = len(self._stratum.group_rows)
        order = np.argsort(np.arange(groups) + _DRIFT * self._draws(_RING, groups), kind="stable")
        return np.roll(order, -(combine_key(*self._key, _ENTRY) % groups))

    def _strung(self, first_member: np.ndarray, length: np.ndarray, unit: int) -> Section:
        """String the remains of the groups along the ring; first_member, length: (g,) the remains of each group.

        The ring is entered inside a group, at a multiple of `unit`: otherwise groups of equal sizes would always be cut
        at their ends.
        """
        order = self._order[length[self._order] > 0]
        if not len(order):
            return order, order, order
        first_member, length = first_member[order], length[order]
        units = int(length[0]) // unit
        skipped = unit * (1 + combine_key(*self._key, _SKIP) % (units - 1)) if units > 1 else 0
        # What is skipped at first comes last.
        owners, members = np.append(order, order[0]), np.append(first_member, first_member[0])
        lengths = np.append(length, skipped)
        members[0] += skipped
        lengths[0] -= skipped
        return owners, members, lengths

    def _draws(self, purpose: int, count: int) -> np.ndarray:
        """Return (count,) float64 in [0, 1), one per group."""
        return (draws(count, combine_key(*self._key, purpose)) >> np.uint64(11)) * 2.0**-53


def _ramps(lengths: np.ndarray) -> np.ndarray:
    """Return 0 .. n - 1 for each n of `lengths`, one after the other."""
    return np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
