"""Parameter gradients in one flat buffer, summed over ranks in one fixed layout.

DDP averages (the loss here is already a part of the global one, so the sum is what is wanted) and rebuilds its buckets
after the first step, which changes the order of summation from three ranks on: a resumed run would differ in the last
bits. Here every parameter's `.grad` is a view of one buffer for the whole run, and one all-reduce sums it in place.

Tables of token embeddings are most of a small model, and a batch touches few of their rows. Their untouched rows have a
gradient of exactly zero on every rank, so only the rows that some rank touched are packed and sent.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from clusterbatch.training.gather import World

# Above this share of touched rows, sending the whole table is as cheap as packing.
_DENSE_FROM = 0.6


class FlatGradients:
    """Owns the gradients of `parameters`; call `clear` before and `reduce` after the backward passes of a step.

    tables: parameters (V, d) of which a batch touches only rows that are token ids of the batch.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], tables: Sequence[nn.Parameter], world: World) -> None:
        table_ids = {id(table) for table in tables}
        assert len({table.shape[0] for table in tables}) <= 1, "tables of one vocabulary"
        dense = [parameter for parameter in parameters if id(parameter) not in table_ids]
        ordered = [*dense, *tables]
        first = ordered[0]
        assert all(parameter.dtype == first.dtype for parameter in ordered)
        self.buffer = torch.zeros(sum(p.numel() for p in ordered), dtype=first.dtype, device=first.device)
        self._world = world
        self._dense_numel = sum(parameter.numel() for parameter in dense)
        self._tables = list(tables)
        self._views: list[tuple[nn.Parameter, Tensor]] = []
        offset = 0
        for parameter in ordered:
            view = self.buffer[offset : offset + parameter.numel()].view_as(parameter)
            parameter.grad = view
            self._views.append((parameter, view))
            offset += parameter.numel()

    def clear(self) -> None:
        self.buffer.zero_()

    def reduce(self, token_ids: np.ndarray) -> None:
        """Sums the gradients over ranks. `token_ids`: (n,) every token id of this rank's rows, repeats allowed."""
        self._assert_views()
        if self._world.size == 1:
            return
        rows = self._touched_rows(token_ids) if self._tables else None
        if rows is None:
            self._world.sum_(self.buffer)
            return
        packed = torch.cat(
            [self.buffer[: self._dense_numel], *(self._gradient(table)[rows].flatten() for table in self._tables)]
        )
        self._world.sum_(packed)
        self.buffer[: self._dense_numel] = packed[: self._dense_numel]
        offset = self._dense_numel
        for table in self._tables:
            size = len(rows) * table.shape[1]
            self._gradient(table).index_copy_(0, rows, packed[offset : offset + size].view(len(rows), table.shape[1]))
            offset += size

    def clip(self, largest_norm: float | None) -> Tensor:
        """The global gradient norm before clipping (a scalar tensor); scales the gradients down to `largest_norm`."""
        norm = torch.linalg.vector_norm(self.buffer)
        if largest_norm is not None:
            coefficient = largest_norm / (norm + 1e-6)
            # Without a look at the value where that would stall an accelerator; on a CPU the pass is saved.
            if self.buffer.device.type != "cpu":
                self.buffer.mul_(coefficient.clamp(max=1.0))
            elif coefficient < 1.0:
                self.buffer.mul_(coefficient)
        return norm

    def _touched_rows(self, token_ids: np.ndarray) -> Tensor | None:
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
