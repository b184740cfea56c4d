"""Training in processes of this machine, without Ray: lost ones are replaced from the last whole checkpoint."""

from __future__ import annotations

import os
import tempfile
import threading
import traceback
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch.distributed as dist

from clusterbatch import errors
from clusterbatch.encoder.devices import resolve_device
from clusterbatch.errors import ClusterbatchError, InfrastructureError, last_line
from clusterbatch.log import say
from clusterbatch.runtime import LocalExecutor, Pool, ProgressLine, check_resources
from clusterbatch.runtime.fork_server import ForkedProcess
from clusterbatch.store.traffic import Traffic, carry_over, since_last
from clusterbatch.training.collectives import World
from clusterbatch.training.loop import Preempted
from clusterbatch.training.progress import ShownSteps, say_stopped, steps_done
from clusterbatch.training.worker import TrainingJob, run_worker

# How long an interrupted run waits for its workers to finish the step and write a checkpoint.
_SECONDS_TO_STOP = 60.0
# How long the others may take, when a worker has lost them, to say what stopped one of them for good.
_SECONDS_TO_EXPLAIN = 2.0


class _Lost(Exception):
    """A worker has died, or has lost the others: a fresh set may do better."""


def fit_on_this_machine(job: TrainingJob, fewest: int, most: int, executor: LocalExecutor) -> None:
    """Run as many workers as there is room for until the last step. Raises as `driver.fit` does."""
    settings = job.config.train
    check_resources("train", fewest, Pool(fewest, settings.cpus_per_worker))
    room = int(executor.resources()["CPU"] / settings.cpus_per_worker + 1e-9)
    workers = min(most, max(fewest, room))
    done = steps_done(job)
    with ProgressLine("train", job.steps, "steps") as progress:
        progress.start_at(done)
        shown = ShownSteps(progress, done)
        failures = 0
        while True:
            try:
                _attempt(job, workers, executor, shown)
            except _Lost as error:
                failures += 1
                if settings.failures in range(failures):
                    raise InfrastructureError(f"train: {error}") from None
            else:
                return


def _attempt(job: TrainingJob, workers: int, executor: LocalExecutor, shown: ShownSteps) -> None:
    """Run one set of workers to the end; raise _Lost if one is lost."""
    with tempfile.TemporaryDirectory() as folder:
        started = [
            executor.start(partial(_rank, job, World(rank, workers), Path(folder, "rendezvous")), __name__)
            for rank in range(workers)
        ]
        try:
            try:
                for line in _lines(started):
                    shown.show(line)
            except KeyboardInterrupt:
                say(
                    "train: stopping when the step is done and its checkpoint is written; interrupt again to stop at "
                    "once"
                )
                _stop(job, started)
                raise
        finally:
            for process in started:
                if not process.connection.closed:
                    process.kill()


def _stop(job: TrainingJob, started: list[ForkedProcess]) -> None:
    for process in started:
        if not process.connection.closed:
            with suppress(OSError):
                process.connection.send("stop")
    try:
        for _ in _lines(started, _SECONDS_TO_STOP):
            pass
    except Exception as error:
        # The interrupt counts, whatever else went wrong; the run resumes from its last whole checkpoint.
        say(f"train: stopped without a checkpoint of the last step ({error})", level="warning")
    else:
        say_stopped(job)


def _lines(started: list[ForkedProcess], seconds: float | None = None) -> Iterator[dict[str, Any]]:
    """Yield the lines of metrics until all workers have ended.

    Raises what stopped one for good, _Lost if one is lost, TimeoutError if nothing comes in `seconds`.
    """
    running = [process.connection for process in started if not process.connection.closed]
    lost: _Lost | None = None
    while running:
        ready = wait(running, _SECONDS_TO_EXPLAIN if lost else seconds)
        if not ready:
            raise lost or TimeoutError("no answer")
        for connection in ready:
            assert isinstance(connection, Connection)
            try:
                kind, value = connection.recv()
            except (EOFError, ConnectionResetError):
                kind, value = "lost", "a worker was lost (out of memory, or a crash in native code)"
            if kind == "line":
                yield value
                continue
            if kind not in ("ended", "lost"):
                raise getattr(errors, kind, RuntimeError)(value)
            if kind == "ended":
                carry_over(value)
            else:
                lost = lost or _Lost(value)
            connection.close()
            running.remove(connection)
    if lost:
        raise lost


def _rank(job: TrainingJob, world: World, rendezvous: Path, connection: Connection) -> None:
    """Train as one rank; tell the driver the lines of rank 0, and how it ended."""
    stop = threading.Event()
    threading.Thread(target=_listen, args=(connection, stop), daemon=True).start()
    try:
        if world.size > 1:
            # Its own address, whatever the machine's name resolves to.
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
            dist.init_process_group(
                "gloo",
                init_method=rendezvous.as_uri(),
                rank=world.rank,
                world_size=world.size,
                timeout=timedelta(seconds=job.config.train.collective_timeout),
            )
        run_worker(
            job,
            world,
            resolve_device(job.config.train.device),
            observe=lambda line: connection.send(("line", line)),
            stop_requested=stop.is_set,
        )
    except Preempted:
        pass
    except (InfrastructureError, RuntimeError, OSError) as error:
        # A collective without its peer or a machine without memory: a fresh set of workers may do better.
        _tell(connection, "lost", last_line(error))
        return
    except ClusterbatchError as error:
        _tell(connection, type(error).__name__, str(error))
        return
    except Exception:
        _tell(connection, "bug", f"train: a worker failed\n{traceback.format_exc()}")
        return
    _tell(connection, "ended", since_last())


def _tell(connection: Connection, kind: str, value: str | Traffic) -> None:
    connection.send((kind, value))


def _listen(connection: Connection, stop: threading.Event) -> None:
    """Ask for a stop of this worker when the driver says so; end it with the driver."""
    try:
        connection.recv()
    except (EOFError, OSError):
        os._exit(1)
    stop.set()
