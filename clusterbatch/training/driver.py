"""Driver of training: run the workers on Ray, in processes of this machine, or one in this process."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from clusterbatch.encoder.devices import resolve_device
from clusterbatch.runtime import LocalExecutor, ProgressLine, current_executor
from clusterbatch.runtime.metrics import step_finished
from clusterbatch.runtime.resources import device_for
from clusterbatch.training.collectives import World
from clusterbatch.training.local_ranks import fit_on_this_machine
from clusterbatch.training.loop import Preempted
from clusterbatch.training.progress import ShownSteps, say_stopped, steps_done
from clusterbatch.training.worker import TrainingJob, run_worker


def fit(job: TrainingJob) -> None:
    """Run the workers of `job` until the last step.

    Raises what stopped them for good. On an interrupt (KeyboardInterrupt, which SIGTERM raises too) the workers finish
    their step and write a checkpoint before the interrupt is passed on; a second one ends the run at once.
    """
    executor = current_executor()
    if not executor.several_processes:
        _fit_in_process(job)
        return
    use_gpu = device_for(job.config.train.device).startswith("cuda")
    workers = job.config.train.workers or all_workers(use_gpu)
    # Every worker needs a row of each batch; a cluster may have more GPUs than that.
    fewest, most = (min(number, job.config.batches.size) for number in workers)
    if isinstance(executor, LocalExecutor):
        fit_on_this_machine(job, fewest, most, executor)
        return
    # Its import takes longer than a small training.
    from clusterbatch.training.ray_train import fit_on_ray

    fit_on_ray(job, fewest, most, use_gpu=use_gpu)


def all_workers(use_gpu: bool) -> tuple[int, int]:
    """Return the fewest and the most workers if `train.workers` is open. NCCL takes no two ranks on one GPU."""
    executor = current_executor()
    if not executor.several_processes:
        return 1, 1
    workers = max(1, int(executor.resources().get("GPU", 0))) if use_gpu else 2
    return workers, workers


def _fit_in_process(job: TrainingJob) -> None:
    """Train with one worker in this process until the last step."""
    done = steps_done(job)
    with ProgressLine("train", job.steps, "steps") as progress, _interrupts_as_requests(job) as stop_requested:
        progress.start_at(done)
        shown = ShownSteps(progress, done)

        def observe(line: dict[str, Any]) -> None:
            step_finished(line)
            shown.show(line)

        device = resolve_device(job.config.train.device)
        run_worker(job, World(), device, observe=observe, stop_requested=stop_requested.is_set)


@contextmanager
def _interrupts_as_requests(job: TrainingJob) -> Iterator[threading.Event]:
    """Turn the first SIGINT or SIGTERM of the block into the event, and pass it on when the worker has stopped."""
    requested = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield requested
        return
    first: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def pass_on(number: int, frame: FrameType | None) -> None:
        handler = before[signal.Signals(number)]
        if callable(handler):
            handler(number, frame)
        else:
            raise KeyboardInterrupt

    def request(number: int, frame: FrameType | None) -> None:
        if first:
            pass_on(number, frame)
        first.append(number)
        requested.set()

    for number in before:
        signal.signal(number, request)
    try:
        yield requested
    except Preempted:
        say_stopped(job)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if first:
        pass_on(first[0], None)
