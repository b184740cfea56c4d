"""Collectives of a training step: ragged gathers over the ranks of one world, and the sum of the gradients.

The gradient rule is the one thing to get right here. Rank r scores its own rows against everybody's columns, and its
loss is the part of the global loss that its rows make up. So the gradient of a gathered row is the sum over ranks of
what each of them found, and the rank that owns the row takes it: no factor of W, no division by W. Parameter gradients
are then summed, not averaged, over ranks.

They are summed in one flat buffer of a fixed layout. DDP averages (the loss here is already a part of the global one,
so the sum is what is wanted) and rebuilds its buckets after the first step, which changes the order of summation from
three ranks on: a resumed run would differ in the last bits. Here every parameter's `.grad` is a view of one buffer for
the whole run, and one all-reduce sums it in place.

Tables of token embeddings are most of a small model, and a batch touches few of their rows. The untouched rows have a
gradient of exactly zero on every rank, so only the rows that some rank touched are cleared, sent and measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from clusterbatch.batches.loader import SliceBatch
from clusterbatch.config import TrainConfig
from clusterbatch.training.margin_mse import TeacherMargins
from clusterbatch.training.masks import BatchFacts
from clusterbatch.training.teacher import ScoredPairs, scored_pairs

_SECONDS_BETWEEN_LOOKS = 0.1
# Above this share of touched rows, the whole table is as cheap as its rows.
_DENSE_FROM = 0.6


@dataclass(frozen=True)
class World:
    """Ranks that train together; `World()` is one process without torch.distributed."""

    rank: int = 0
    size: int = 1

    @staticmethod
    def current() -> World:
        if dist.is_available() and dist.is_initialized():
            return World(dist.get_rank(), dist.get_world_size())
        return World()

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum `tensor`, of one shape everywhere, over ranks in place."""
        # Gloo takes nothing that is empty, as the hard negatives of a batch may be.
        if self.size > 1 and tensor.numel():
            dist.all_reduce(tensor)
        return tensor

    def max_(self, tensor: Tensor) -> Tensor:
        """Take the largest value over ranks, element by element, in place."""
        if self.size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor

    def copy_from_first_(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors, of the same shapes everywhere, with those of rank 0."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def wait_until(self, is_ready: Callable[[], bool], device: torch.device) -> None:
        """Return on all ranks once `is_ready` holds on each.

        However long that takes, no rank stays in a collective for it: their time-out is meant for lost ranks.
        """
        while self.size > 1:
            waiting = torch.tensor([float(not is_ready())], device=device)
            if not self.sum_(waiting).item():
                return
            time.sleep(_SECONDS_BETWEEN_LOOKS)

    def counts(self, count: int, device: torch.device) -> list[int]:
        """Return the `count` of every rank, in rank order."""
        if self.size == 1:
            return [count]
        every = torch.empty(self.size, dtype=torch.int64, device=device)
        dist.all_gather(list(every.split(1)), torch.tensor([count], dtype=torch.int64, device=device))
        return every.tolist()

    def gather(self, rows: Tensor, rows_of_rank: Sequence[int]) -> Tensor:
        """Return the rows of all ranks, one rank after the other, without a gradient.

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
        """Return what `gather` returns; the backward pass sums the gradient over ranks and gives each its own rows."""
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


@dataclass(frozen=True)
class GatheredBatch:
    """A global batch as one rank sees it, but for the vectors.

    facts: of the rows of all ranks; rows_of_rank, negatives_of_rank: number of rows, and of hard negatives, of each
    rank; weight_B: (B,) weights of all rows, None if the data has none; margins: the surrogate's, of this rank's own
    hard negatives, None without train.margin_mse or if there are a teacher's scores; scored: these, of this rank's own
    rows.
    """

    world: World
    facts: BatchFacts
    rows_of_rank: Sequence[int]
    negatives_of_rank: Sequence[int]
    weight_B: Tensor | None = None
    margins: TeacherMargins | None = None
    scored: ScoredPairs | None = None

    @property
    def own(self) -> slice:
        """This rank's rows among those of the global batch."""
        first = sum(self.rows_of_rank[: self.world.rank])
        return slice(first, first + self.rows_of_rank[self.world.rank])


def gather_batch(batch: SliceBatch, world: World, device: torch.device, config: TrainConfig) -> GatheredBatch:
    """Gather what the loss needs of the global batch of which `batch` is this rank's slice; all ranks must call it.

    The shards have margins, or come with a teacher's scores, if `config` needs them. The columns of the data decide
    which arrays a slice has, so all ranks have the same.
    """
    rows_of_rank = batch.slice_rows.tolist()

    def everywhere(array: np.ndarray | None) -> Tensor | None:
        if array is None:
            return None
        # A copy: arrays that Arrow owns are not writable, and torch has no such tensors.
        return world.gather(torch.from_numpy(np.array(array)).to(device), rows_of_rank)

    columns = {"query_hash": batch.query_hash, "document_hash": batch.document_hash}
    negative_hash, negatives_of_rank = None, [0] * world.size
    if batch.negative_tokens is not None:
        columns["document_token_hash"] = batch.document_tokens.hashes
        negatives_of_rank = world.counts(len(batch.negative_tokens), device)
        own = torch.from_numpy(batch.negative_tokens.hashes.view(np.int64)).to(device)
        negative_hash = world.gather(own, negatives_of_rank)
    negative_row = None
    if batch.mode is not None and negative_hash is not None:
        assert batch.negative_counts is not None
        owner = sum(rows_of_rank[: world.rank]) + np.repeat(np.arange(len(batch)), batch.negative_counts)
        negative_row = world.gather(torch.from_numpy(owner).to(device), negatives_of_rank)
    optional = {
        "document_id": batch.document_id_hash,
        "mode": batch.mode,
        "duplicate_group": batch.duplicate_group,
    }
    columns |= {name: column for name, column in optional.items() if column is not None}
    integers = everywhere(np.stack([each.astype(np.uint64).view(np.int64) for each in columns.values()], axis=1))
    assert integers is not None
    gathered = {name: integers[:, place].contiguous() for place, name in enumerate(columns)}
    scored, answers = None, None
    if batch.teacher is not None:
        scored = _scored(batch, gathered["document_hash"], negatives_of_rank, world, device)
        if config.mask.needs_teacher:
            row, column = scored.answers(config.mask)
            answers = row + sum(rows_of_rank[: world.rank]), column
            if world.size > 1 and "document_to_query" in config.directions:
                # A rank then masks the queries of others, too.
                answers_of_rank = world.counts(len(column), device)
                answers = world.gather(answers[0], answers_of_rank), world.gather(column, answers_of_rank)
    facts = BatchFacts(
        **gathered,
        negative_hash=negative_hash,
        negative_row=negative_row,
        query_vector=everywhere(batch.query_vector),
        document_vector=everywhere(batch.document_vector),
        answers=answers,
    )
    weight = everywhere(batch.weight)
    margins = _teacher_margins(batch, device) if config.margin_mse and scored is None else None
    return GatheredBatch(world, facts, rows_of_rank, negatives_of_rank, weight, margins, scored)


def _scored(
    batch: SliceBatch, document_hash: Tensor, negatives_of_rank: Sequence[int], world: World, device: torch.device
) -> ScoredPairs:
    """Return the teacher's scores of this rank's rows. document_hash: (B,) int64, of the global batch."""
    teacher = batch.teacher
    assert teacher is not None
    columns = document_hash
    if teacher.negative_hash is not None:
        # A copy: arrays that Arrow owns are not writable, and torch has no such tensors.
        own = torch.from_numpy(np.array(teacher.negative_hash).view(np.int64)).to(device)
        columns = torch.cat([columns, world.gather(own, negatives_of_rank)])
    return scored_pairs(teacher, columns.cpu().numpy().view(np.uint64), device)


def _teacher_margins(batch: SliceBatch, device: torch.device) -> TeacherMargins:
    assert batch.negative_counts is not None
    assert batch.negative_margins is not None
    row = torch.from_numpy(np.repeat(np.arange(len(batch)), batch.negative_counts))
    return TeacherMargins(row.to(device), torch.from_numpy(np.array(batch.negative_margins)).to(device))


class FlatGradients:
    """Gradients of `parameters` in one buffer; call `begin` before and `reduce` after a step's backward passes.

    tables: parameters (V, d) of which a batch touches only rows that are token ids of the batch.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], tables: Sequence[nn.Parameter], world: World) -> None:
        table_ids = {id(table) for table in tables}
        assert len({table.shape for table in tables}) <= 1, "tables of one shape"
        dense = [parameter for parameter in parameters if id(parameter) not in table_ids]
        ordered = [*dense, *tables]
        first = ordered[0]
        assert all(parameter.dtype == first.dtype for parameter in ordered)
        self.buffer = torch.zeros(sum(p.numel() for p in ordered), dtype=first.dtype, device=first.device)
        self._world = world
        self._dense_numel = sum(parameter.numel() for parameter in dense)
        self._tables = list(tables)
        self._rows: Tensor | None = None
        self._views: list[tuple[nn.Parameter, Tensor]] = []
        offset = 0
        for parameter in ordered:
            view = self.buffer[offset : offset + parameter.numel()].view_as(parameter)
            parameter.grad = view
            self._views.append((parameter, view))
            offset += parameter.numel()

    def begin(self, token_ids: np.ndarray) -> Tensor | None:
        """Set the gradients to zero; return the table rows that the step touches on any rank, in order; None: any.

        token_ids: (n,) every token id of this rank's rows, repeats allowed. All ranks must call it.
        """
        self._assert_views()
        if self._rows is None:
            self.buffer.zero_()
        else:
            self.buffer[: self._dense_numel].zero_()
            for table in self._tables:
                self._gradient(table).index_fill_(0, self._rows, 0.0)
        self._rows = self._touched_rows(token_ids)
        return self._rows

    def reduce(self) -> None:
        """Sum the gradients over ranks."""
        self._assert_views()
        if self._world.size == 1:
            return
        if self._rows is None:
            self._world.sum_(self.buffer)
            return
        packed = self._packed()
        self._world.sum_(packed)
        self._unpack(packed)

    def clip(self, largest_norm: float | None) -> Tensor:
        """Scale the gradients down to `largest_norm`; return the global norm before that, a scalar tensor."""
        values = self.buffer if self._rows is None else self._packed()
        norm = torch.linalg.vector_norm(values)
        if largest_norm is not None:
            coefficient = largest_norm / (norm + 1e-6)
            # A look at the value would stall an accelerator; on a CPU it saves the pass.
            if values.device.type != "cpu":
                values.mul_(coefficient.clamp(max=1.0))
            elif coefficient < 1.0:
                values.mul_(coefficient)
            else:
                return norm
            if self._rows is not None:
                self._unpack(values)
        return norm

    def _packed(self) -> Tensor:
        """Return a copy of all gradients that may differ from zero: those outside tables, then the touched rows."""
        assert self._rows is not None
        rows = [self._gradient(table).index_select(0, self._rows).flatten() for table in self._tables]
        return torch.cat([self.buffer[: self._dense_numel], *rows])

    def _unpack(self, packed: Tensor) -> None:
        """Put back what `_packed` has returned."""
        assert self._rows is not None
        self.buffer[: self._dense_numel] = packed[: self._dense_numel]
        rows = packed[self._dense_numel :].view(len(self._tables), len(self._rows), self._tables[0].shape[1])
        for table, values in zip(self._tables, rows, strict=True):
            self._gradient(table).index_copy_(0, self._rows, values)

    def _touched_rows(self, token_ids: np.ndarray) -> Tensor | None:
        # One process on an accelerator gains nothing from knowing them, and would wait for the answer.
        if not self._tables or (self._world.size == 1 and self.buffer.device.type != "cpu"):
            return None
        vocabulary = self._tables[0].shape[0]
        touched = np.zeros(vocabulary, np.uint8)
        touched[token_ids] = 1
        union = self._world.max_(torch.from_numpy(touched).to(self.buffer.device))
        rows = union.nonzero().squeeze(1)
        return None if len(rows) > _DENSE_FROM * vocabulary else rows

    def _gradient(self, parameter: nn.Parameter) -> Tensor:
        assert parameter.grad is not None
        return parameter.grad

    def _assert_views(self) -> None:
        # A backward pass that replaced a gradient instead of adding to it would train on nothing from here on.
        assert all(parameter.grad is view for parameter, view in self._views), "a gradient left the flat buffer"
