"""Real worlds of several processes for tests: gloo on this machine, one process per rank."""

from __future__ import annotations

import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from clusterbatch.training.collectives import World

# A server that has torch loaded already and forks clean processes from there: starting four ranks costs little.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["tests.training.small_run", "clusterbatch.training.worker", "transformers.models.bert.modeling_bert"]
)
# Generous: a busy machine is slow, and only a hang should fail.
_SECONDS = 400


def run_world(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`function(world, *arguments)` on every rank of a world of `size`; what it returned, by rank."""
    with tempfile.TemporaryDirectory() as folder:
        ends = [_CONTEXT.Pipe(duplex=False) for _ in range(size)]
        processes = [
            _CONTEXT.Process(target=_rank, args=(rank, size, str(Path(folder) / "store"), end[1], function, arguments))
            for rank, end in enumerate(ends)
        ]
        for process in processes:
            process.start()
        results = []
        try:
            for rank, (receiver, sender) in enumerate(ends):
                sender.close()
                assert receiver.poll(_SECONDS), f"rank {rank} of {size} does not answer"
                good, value = receiver.recv()
                assert good, f"rank {rank} of {size} failed:\n{value}"
                results.append(value)
        finally:
            for process in processes:
                if len(results) < size:
                    process.kill()
                process.join()
        return results


def run_killed_world(size: int, function: Callable[..., Any], *arguments: Any) -> list[int]:
    """The same, for a function that gets its own process killed; exit codes by rank once all processes have ended."""
    with tempfile.TemporaryDirectory() as folder:
        sinks = [_CONTEXT.Pipe(duplex=False) for _ in range(size)]
        processes = [
            _CONTEXT.Process(target=_rank, args=(rank, size, str(Path(folder) / "store"), sink[1], function, arguments))
            for rank, sink in enumerate(sinks)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(_SECONDS)
            assert process.exitcode is not None, "a rank survives the loss of another"
        return [process.exitcode or 0 for process in processes]


def _rank(
    rank: int, size: int, store: str, sender: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    try:
        if size > 1:
            dist.init_process_group(
                "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=_SECONDS)
            )
        sender.send((True, function(World(rank, size), *arguments)))
    except BaseException:
        sender.send((False, traceback.format_exc()))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
