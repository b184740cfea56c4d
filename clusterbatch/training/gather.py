"""Collectives of a training step: ragged gathers, one of them differentiable, over the ranks of one world.

The gradient rule is the one thing to get right here. Rank r scores its own rows against everybody's columns, and its
loss is the part of the global loss that its rows make up. So the gradient of a gathered row is the sum over ranks of
what each of them found, and the rank that owns the row takes it: no factor of W, no division by W. Parameter gradients
are then summed, not averaged, over ranks (reduce.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_SECONDS_BETWEEN_LOOKS = 0.1


@dataclass(frozen=True)
class World:
    """The ranks that train together; `World()` is one process without torch.distributed."""

    rank: int = 0
    size: int = 1

    @staticmethod
    def current() -> World:
        if dist.is_available() and dist.is_initialized():
            return World(dist.get_rank(), dist.get_world_size())
        return World()

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sums `tensor`, of one shape everywhere, over ranks in place."""
        # Gloo takes nothing that is empty, as the hard negatives of a batch may be.
        if self.size > 1 and tensor.numel():
            dist.all_reduce(tensor)
        return tensor

    def max_(self, tensor: Tensor) -> Tensor:
        """The largest value over ranks, element by element, in place."""
        if self.size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor

    def copy_from_first_(self, tensors: Iterable[Tensor]) -> None:
        """Overwrites tensors, of the same shapes everywhere, with those of rank 0."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def wait_until(self, is_ready: Callable[[], bool], device: torch.device) -> None:
        """Returns on all ranks once it holds on each.

        However long that takes, nobody stays in a collective for it: their time-out is meant for lost ranks.
        """
        while self.size > 1:
            waiting = torch.tensor([float(not is_ready())], device=device)
            if not self.sum_(waiting).item():
                return
            time.sleep(_SECONDS_BETWEEN_LOOKS)

    def counts(self, count: int, device: torch.device) -> list[int]:
        """`count` of every rank, in rank order."""
        if self.size == 1:
            return [count]
        every = torch.empty(self.size, dtype=torch.int64, device=device)
        dist.all_gather(list(every.split(1)), torch.tensor([count], dtype=torch.int64, device=device))
        return every.tolist()

    def gather(self, rows: Tensor, rows_of_rank: Sequence[int]) -> Tensor:
        """Rows of all ranks, one rank after the other, without a gradient.

        rows: (rows_of_rank[rank], ...) on every rank, any dtype; result (sum(rows_of_rank), ...).
        """
        assert len(rows) == rows_of_rank[self.rank]
        if self.size == 1:
            return rows
        longest = max(rows_of_rank)
        if longest == 0:
            return rows
        # Collectives want equal sizes; slices differ by a run at most, so the padding is small.
        padded = rows.new_zeros((longest, *rows.shape[1:]))
        padded[: len(rows)] = rows
        every = rows.new_empty((self.size * longest, *rows.shape[1:]))
        dist.all_gather(list(every.split(longest)), padded)
        if min(rows_of_rank) == longest:
            return every
        return torch.cat([every[rank * longest :][:count] for rank, count in enumerate(rows_of_rank)])

    def gather_differentiable(self, rows: Tensor, rows_of_rank: Sequence[int]) -> Tensor:
        """`gather`, of the same shapes; its backward pass sums the gradient over ranks and gives each its own rows."""
        if self.size == 1:
            return rows
        gathered: Tensor = _Gather.apply(rows, self, tuple(rows_of_rank))
        return gathered


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, rows: Tensor, world: World, rows_of_rank: tuple[int, ...]) -> Tensor:
        context.world, context.rows_of_rank = world, rows_of_rank
        return world.gather(rows, rows_of_rank)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        world, counts = context.world, context.rows_of_rank
        total = world.sum_(gradients[0].contiguous().clone())
        start = sum(counts[: world.rank])
        return total[start : start + counts[world.rank]], None, None
