"""Training on Ray: Ray Train runs the workers and replaces lost ones; a status actor tells how far they are."""

from __future__ import annotations

import signal
import threading
import traceback
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
import ray.train
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from clusterbatch import errors
from clusterbatch.errors import ClusterbatchError, InfrastructureError, last_line
from clusterbatch.log import say
from clusterbatch.runtime import Pool, ProgressLine, check_resources
from clusterbatch.runtime.metrics import count_retries, step_finished
from clusterbatch.runtime.ray_executor import announced_wait
from clusterbatch.store.traffic import Traffic, carry_over, since_last
from clusterbatch.training.collectives import World
from clusterbatch.training.loop import Preempted
from clusterbatch.training.progress import ShownSteps, say_stopped, steps_done
from clusterbatch.training.ray_storage import ray_storage
from clusterbatch.training.worker import RAY_FOLDER, TrainingJob, run_worker

_SECONDS_BETWEEN_LOOKS = 1.0
# How long an interrupted run waits for its workers to finish the step and write a checkpoint.
_SECONDS_TO_STOP = 60.0


def fit_on_ray(job: TrainingJob, fewest: int, most: int, *, use_gpu: bool) -> None:
    """Run as many workers as there is room for until the last step. Raises as `driver.fit` does."""
    settings = job.config.train
    check_resources("train", fewest, Pool(fewest, settings.cpus_per_worker, 1.0 if use_gpu else 0.0))
    # On the driver's node: on any other it could be lost with that node, and all workers with it.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    status = _Status.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]
    resources = {"CPU": settings.cpus_per_worker, **({"GPU": 1} if use_gpu else {})}
    trainer = TorchTrainer(
        _train_loop,
        train_loop_config={"job": job, "status": status},
        torch_config=_StoppableTorchConfig(
            backend="nccl" if use_gpu else "gloo", timeout_s=int(settings.collective_timeout)
        ),
        scaling_config=ray.train.ScalingConfig(
            num_workers=most if fewest == most else (fewest, most), use_gpu=use_gpu, resources_per_worker=resources
        ),
        run_config=ray.train.RunConfig(
            name=job.fingerprint,
            failure_config=ray.train.FailureConfig(max_failures=settings.failures),
            **ray_storage(job.folder.child(RAY_FOLDER)),
        ),
    )
    bundles = [Pool(1, settings.cpus_per_worker, 1.0 if use_gpu else 0.0).bundle] * most
    with _progress(job, status), announced_wait("train", bundles):
        try:
            _fit_or_stop(trainer, job, status)
        except Exception as error:
            _raise_fatal(status)
            raise InfrastructureError(f"train: {last_line(error)}") from error
        carry_over(ray.get(status.traffic.remote()))
        _raise_fatal(status)


def _fit_or_stop(trainer: TorchTrainer, job: TrainingJob, status: Any) -> None:
    """Run the trainer to its end; on an interrupt stop its workers behind a checkpoint and pass the interrupt on.

    Workers that have not begun, as Ray is still starting them or has no room for them, are not waited for.
    The trainer runs in a thread: on the main thread Ray Train takes over SIGINT, to end the process with exit code 1
    and without a word, and turns what a handler of SIGTERM raises into a plain KeyboardInterrupt.
    """
    ended: Future[None] = Future()

    def run() -> None:
        try:
            trainer.fit()
        except BaseException as error:
            ended.set_exception(error)
        else:
            ended.set_result(None)

    try:
        threading.Thread(target=run, name="ray-train", daemon=True).start()
        ended.result()
    except KeyboardInterrupt:
        try:
            if not ray.get(status.stop.remote(), timeout=_SECONDS_TO_STOP):
                raise
            say("train: stopping when the step is done and its checkpoint is written; interrupt again to stop at once")
            ended.result(_SECONDS_TO_STOP)
        except Exception as error:
            # The interrupt counts, whatever else went wrong; the run resumes from its last whole checkpoint.
            say(f"train: stopped without a checkpoint of the last step ({last_line(error)})", level="warning")
        else:
            say_stopped(job)
        raise


def _raise_fatal(status: Any) -> None:
    """Raise a worker's error that no restart could mend: a user's mistake in one line, a bug with its traceback."""
    fatal = ray.get(status.fatal.remote())
    if fatal is not None:
        kind, message = fatal
        raise getattr(errors, kind, RuntimeError)(message)


def _train_loop(config: dict[str, Any]) -> None:
    """Train on one worker; Ray Train calls it on each."""
    job, status = config["job"], config["status"]
    if ray.get(status.fatal.remote()) is not None or ray.get(status.is_stopping.remote()):
        # Ray restarts whatever fails; returning tells it that there is nothing left to do.
        return
    ray.get(status.begin.remote())
    count_retries()
    ended = threading.Event()
    threading.Thread(target=_watch_for_stop, args=(status, ended), daemon=True).start()
    try:
        run_worker(
            job,
            World.current(),
            ray.train.torch.get_device(),
            observe=partial(_observe, status),
            stop_requested=_stop_requested.is_set,
        )
    except Preempted:
        if not ray.get(status.is_stopping.remote()):
            raise
    except (InfrastructureError, RuntimeError, OSError):
        # A collective without its peer or a machine without memory: a fresh set of workers may do better.
        raise
    except ClusterbatchError as error:
        ray.get(status.fail.remote(type(error).__name__, str(error)))
        raise
    except Exception:
        ray.get(status.fail.remote("bug", f"train: a worker failed\n{traceback.format_exc()}"))
        raise
    finally:
        ended.set()
        ray.get(status.spend.remote(since_last()))


def _observe(status: Any, line: dict[str, Any]) -> None:
    status.show.remote(line)
    step_finished(line)


_stop_requested = threading.Event()


def _watch_for_stop(status: Any, ended: threading.Event) -> None:
    """Ask for a stop of this worker as soon as the driver has asked for one of all workers."""
    while not ended.wait(_SECONDS_BETWEEN_LOOKS):
        try:
            if ray.get(status.is_stopping.remote()):
                _stop_requested.set()
                return
        except ray.exceptions.RayError:
            # The driver is gone, and Ray ends its workers.
            return


class _StoppableBackend(TorchConfig().backend_cls):  # type: ignore[misc]
    """Let a worker finish its step and write a checkpoint when it is sent SIGTERM, as spot machines are."""

    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        super().on_start(worker_group, backend_config)
        # Only this runs on the workers' main threads, and handlers can be set on no other.
        worker_group.execute(_listen_for_sigterm)


@dataclass
class _StoppableTorchConfig(TorchConfig):
    @property
    def backend_cls(self) -> type:
        return _StoppableBackend


def _listen_for_sigterm() -> None:
    signal.signal(signal.SIGTERM, lambda number, frame: _stop_requested.set())


@ray.remote(num_cpus=0)
class _Status:
    """Actor through which workers report to the driver, and the driver asks them to stop."""

    def __init__(self) -> None:
        self._lines: list[dict[str, Any]] = []
        self._traffic = Traffic()
        self._fatal: tuple[str, str] | None = None
        self._has_begun = self._is_stopping = False

    def begin(self) -> None:
        self._has_begun = True

    def show(self, line: dict[str, Any]) -> None:
        self._lines.append(line)

    def new_lines(self) -> list[dict[str, Any]]:
        """Return the lines since the last call."""
        lines, self._lines = self._lines, []
        return lines

    def fail(self, kind: str, message: str) -> None:
        self._fatal = (kind, message)

    def fatal(self) -> tuple[str, str] | None:
        return self._fatal

    def spend(self, traffic: Traffic) -> None:
        self._traffic += traffic

    def traffic(self) -> Traffic:
        return self._traffic

    def stop(self) -> bool:
        """Ask workers to stop; return whether one has begun, and may have something to write."""
        self._is_stopping = True
        return self._has_begun

    def is_stopping(self) -> bool:
        return self._is_stopping


@contextmanager
def _progress(job: TrainingJob, status: Any) -> Iterator[None]:
    """Show the lines that reach the status actor while the block runs."""
    ended = threading.Event()
    done = steps_done(job)

    def look(progress: ProgressLine) -> None:
        shown = ShownSteps(progress, done)
        while True:
            is_last = ended.wait(_SECONDS_BETWEEN_LOOKS)
            for line in ray.get(status.new_lines.remote()):
                shown.show(line)
            if is_last:
                return

    with ProgressLine("train", job.steps, "steps") as progress:
        progress.start_at(done)
        watcher = threading.Thread(target=look, args=(progress,), daemon=True)
        watcher.start()
        try:
            yield
        finally:
            ended.set()
            watcher.join()
