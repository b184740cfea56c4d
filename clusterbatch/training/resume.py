"""Start of a worker: rank 0 reads the checkpoint, all others get it from there.

If each read it for itself, storage would be asked for the same bytes W times, a node's memory would hold as many copies
as it has ranks, and one rank could find another checkpoint than the others: ranks of different weights train on without
an error.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from clusterbatch.training.step import TrainingStep


@dataclass(frozen=True)
class Start:
    """First step to do; optimizer steps that the tensors have seen; (parameters, moments), None for a fresh run."""

    first_step: int
    steps_done: int
    tensors: tuple[dict[str, Tensor], dict[str, Tensor]] | None


def resume(training: TrainingStep, read: Callable[[], Start]) -> int:
    """Put all ranks in the state that `read`, called on rank 0 alone, returns; return the first step to do.

    Raises what `read` raises, on rank 0; RuntimeError on the others then.
    """
    world, device = training.world, training.encoder.device
    if world.size == 1:
        return _begin(training, read())
    if world.rank:
        world.wait_until(lambda: True, device)
        return _follow(training)
    with ThreadPoolExecutor(1) as pool:
        reading: Future[Start] = pool.submit(read)
        world.wait_until(reading.done, device)
    failed = reading.exception() is not None
    start = Start(-1, 0, None) if failed else reading.result()
    world.copy_from_first_([torch.tensor([start.first_step, start.steps_done, start.tensors is not None]).to(device)])
    if failed:
        reading.result()
    first_step = _begin(training, start)
    if start.tensors is not None:
        _send(training)
    return first_step


def _begin(training: TrainingStep, start: Start) -> int:
    if start.tensors is not None:
        training.load(*start.tensors, steps_done=start.steps_done)
    return start.first_step


def _follow(training: TrainingStep) -> int:
    """Do the part of `resume` of the other ranks."""
    numbers = torch.zeros(3, dtype=torch.int64, device=training.encoder.device)
    training.world.copy_from_first_([numbers])
    first_step, steps_done, is_there = numbers.tolist()
    if first_step < 0:
        raise RuntimeError("rank 0 could not read the checkpoint")
    if is_there:
        # Tensors to receive into.
        training.load(*training.blank(), steps_done=steps_done)
        _send(training)
    return int(first_step)


def _send(training: TrainingStep) -> None:
    parameters, moments = training.state()
    training.world.copy_from_first_([*parameters.values(), *moments.values()])
