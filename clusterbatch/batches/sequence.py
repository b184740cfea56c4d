"""One stratum, one epoch: the order in which its groups' rows are dealt into parts of a batch.

Every group is cut into whole parts of `part_rows` rows; what remains of the groups forms one ring in packing order,
entered at a random place and cut likewise. Whole parts come in random order; what is left of the ring, shorter than a
part, comes last. So every row stands in the sequence exactly once, any position can be computed directly, and the
memory is a few integers per group.
"""

from __future__ import annotations

import numpy as np

from clusterbatch.batches.permutation import combine_key, mix, permute
from clusterbatch.batches.strata import Stratum

# A group hardly larger than a part would make the same batch every epoch. Up to this multiple of the part it lends its
# rows to the ring in every other epoch, at random, where they mix with the neighbours'.
_HARDLY_LARGER = 1.5

_PART, _RING, _MEMBER, _SCATTER, _LEND = range(5)


class EpochSequence:
    """Rows of `stratum` in the order of one epoch, in parts of `part_rows`."""

    def __init__(self, stratum: Stratum, part_rows: int, seed: int, epoch: int) -> None:
        self._stratum = stratum
        self._part_rows = part_rows
        self._key = (seed, stratum.number, epoch)
        self._seed = seed
        whole = stratum.group_rows // part_rows
        whole -= self._lends(whole)
        self._whole_end = np.cumsum(whole)
        self._kept = whole * part_rows
        self._ring_end = np.cumsum(stratum.group_rows - self._kept)
        self._whole = int(self._whole_end[-1])
        self._ring = int(self._ring_end[-1])
        self._ring_parts = self._ring // part_rows
        self._ring_start = combine_key(*self._key, _RING) % self._ring if self._ring else 0

    @property
    def parts(self) -> int:
        """Whole parts, the ring's included; a shorter one may follow."""
        return self._whole + self._ring_parts

    def ring_segments(self) -> tuple[np.ndarray, np.ndarray]:
        """Where the ring is cut: (part number, rows) of every stretch of one group, for reports."""
        edges = np.unique(
            np.concatenate(
                [
                    np.arange(0, self._ring, self._part_rows),
                    (self._ring_end - self._ring_start) % max(self._ring, 1),
                    [0, self._ring],
                ]
            )
        )
        return edges[:-1] // self._part_rows, np.diff(edges)

    def rows(self, start: int, end: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows at positions [start, end) of the sequence.

        Returns three (end - start,) int64 arrays: the piece of the cluster index, the row in that piece, and the group.
        """
        position = np.arange(start, end)
        part, inside = position // self._part_rows, position % self._part_rows
        ordered = part < self.parts
        part[ordered] = permute(part[ordered], max(self.parts, 1), *self._key, _PART)
        from_ring = part >= self._whole
        group = np.empty(len(position), np.int64)
        member = np.empty(len(position), np.int64)

        whole = part[~from_ring]
        group[~from_ring] = owner = np.searchsorted(self._whole_end, whole, side="right")
        before = np.concatenate([[0], self._whole_end])[owner]
        member[~from_ring] = (whole - before) * self._part_rows + inside[~from_ring]

        place = (part[from_ring] - self._whole) * self._part_rows + inside[from_ring]
        place = (place + self._ring_start) % max(self._ring, 1)
        group[from_ring] = owner = np.searchsorted(self._ring_end, place, side="right")
        before = np.concatenate([[0], self._ring_end])[owner]
        member[from_ring] = self._kept[owner] + place - before
        piece, row = self._address(group, self._shuffled(group, member))
        return piece, row, group

    def _lends(self, whole: np.ndarray) -> np.ndarray:
        """(groups,) 1 where a group that is hardly larger than a part gives it up for this epoch, else 0."""
        sizes = self._stratum.group_rows
        if len(sizes) == 1:
            return np.zeros(1, np.int64)
        narrow = (whole == 1) & (sizes < _HARDLY_LARGER * self._part_rows)
        with np.errstate(over="ignore"):
            draws = mix(np.arange(len(sizes), dtype=np.uint64) ^ np.uint64(combine_key(*self._key, _LEND)))
        return (narrow & (draws >> np.uint64(63) == 1)).astype(np.int64)

    def _shuffled(self, group: np.ndarray, member: np.ndarray) -> np.ndarray:
        """Permutes each group's granules for this epoch; the short last one stays last."""
        granule = self._stratum.granule
        shuffled = member.copy()
        # Rows of one group are mostly neighbours here, so the loop is over the few groups of a batch.
        for number in np.unique(group):
            here = np.flatnonzero(group == number)
            granules = int(self._stratum.group_rows[number]) // granule
            which = member[here] // granule
            whole = which < granules
            moved = permute(which[whole], granules, *self._key, _MEMBER, int(number)) if granules else which[whole]
            shuffled[here[whole]] = moved * granule + member[here[whole]] % granule
        return shuffled

    def _address(self, group: np.ndarray, member: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        stratum = self._stratum
        if len(stratum.group_rows) == len(stratum.pieces) and not stratum.scattered:
            return stratum.pieces[group], member
        group_start = np.concatenate([[0], np.cumsum(stratum.group_rows)])[group]
        row = group_start + member
        if stratum.scattered:
            # The same members in every epoch, as a cluster has: only then is this a control for clusters.
            row = permute(row, stratum.rows, self._seed, stratum.number, _SCATTER)
        local = np.searchsorted(stratum.piece_start, row, side="right") - 1
        return stratum.pieces[local], row - stratum.piece_start[local]
