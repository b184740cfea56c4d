"""The stage `train`: Ray Train runs the workers and replaces those that are lost; the model is written last."""

from __future__ import annotations

import signal
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import ray
import ray.train
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from clusterbatch import errors
from clusterbatch.batches.plan_report import plan_report
from clusterbatch.config import RunConfig, fingerprint
from clusterbatch.encoder.devices import resolve_device
from clusterbatch.encoder.resolve import model_fingerprint, resolve_model
from clusterbatch.errors import (
    ClusterbatchError,
    InfrastructureError,
    OtherWorkError,
    UsageError,
    root_cause,
)
from clusterbatch.log import say
from clusterbatch.runtime import Pool, ProgressLine, check_resources, current_executor, ray_session
from clusterbatch.runtime.metrics import count_retries, step_finished
from clusterbatch.runtime.ray_executor import announced_wait
from clusterbatch.runtime.resources import device_for
from clusterbatch.store import Counts, Manifest, Receipt, Stopwatch
from clusterbatch.store.traffic import Traffic, carry_over, since_last
from clusterbatch.store.workspace import Workspace, publish
from clusterbatch.training.checks import check_phases, check_tokens, check_workers
from clusterbatch.training.collectives import World
from clusterbatch.training.loop import log_line
from clusterbatch.training.metrics import SEGMENTS, check_trackers, read_metrics
from clusterbatch.training.prepare_model import check_adapters
from clusterbatch.training.ray_storage import ray_storage
from clusterbatch.training.worker import CHECKPOINTS, Continuation, TrainingJob, open_plan, run_worker

_RAY_FOLDER = "_ray"
_SECONDS_BETWEEN_LOOKS = 1.0


def train(
    config: RunConfig, *, generation: int = 0, force: bool = False, continued: Continuation | None = None
) -> Manifest:
    """Trains on the clusters of `generation`, from the last whole checkpoint on; at once when that is done already.

    Generation 0 starts from train.model, and its model goes live; a later one goes on as `continued` says, and whether
    its model goes live is for the caller to decide.
    """
    assert (generation == 0) == (continued is None)
    workspace = Workspace(config)
    if continued is None:
        clusters, initial_model = workspace.clusters(), config.train.model
        initial = model_fingerprint(resolve_model(initial_model, config.storage))
    else:
        before = workspace.train(continued.base).require()
        clusters, initial_model = workspace.clusters(continued.clusters), workspace.trained_model(continued.base).uri
        initial = before.fingerprint
        seen = before.details.get("steps_before", 0) + before.details["steps"]
        continued = replace(continued, steps_before=seen)
    inputs = clusters.require()
    check_workers(config)
    check_tokens(config, clusters.folder.uri, inputs)
    if config.train.margin_mse and not inputs.details["layout"].get("margins"):
        raise UsageError(f"train.margin_mse: {clusters.folder.uri} was made without mine.margins")
    plan = open_plan(config, clusters, inputs)
    if continued is None:
        steps = config.train.steps or plan.steps_of(config.train.epochs or 1)
        check_phases(plan, steps)
    else:
        steps = continued.steps or plan.steps_of(1)
    # A first run's steps are in its configuration.
    rest = [] if continued is None else [steps]
    identity = fingerprint("training run", config.train, plan.fingerprint, inputs.fingerprint, initial, *rest)
    artifact = workspace.train(generation)
    if artifact.is_done(identity) and not force:
        return artifact.require()
    check_adapters(config.train)
    check_trackers(config.train.trackers)
    report = plan_report(plan)
    for warning in report["warnings"]:
        say(f"plan: {warning}", level="warning")
    watch = Stopwatch()
    artifact.begin(identity, force)
    job = TrainingJob(config, generation, steps, initial_model, identity, continued)
    _begin_checkpoints(job, force)
    with ray_session(config.ray):
        _fit(job)
    rows = inputs.counts.written
    metrics = artifact.write_part("metrics", "jsonl", read_metrics(artifact.folder), steps)
    if continued is None:
        publish(workspace, generation)
    manifest = artifact.commit(
        identity,
        [Receipt(unit=0, fingerprint=identity, counts=Counts(read=rows, written=rows), seconds=watch.seconds)],
        config={"train": config.train.identity(), "batches": config.batches.identity()},
        inputs={"clusters": inputs.fingerprint, "model": initial},
        seconds=watch.seconds,
        details={
            "steps": steps,
            "steps_before": continued.steps_before if continued else 0,
            "steps_per_epoch": plan.steps_per_epoch,
            "model": workspace.trained_model(generation).uri,
            "plan": report,
        },
        extra_parts=[metrics],
    )
    artifact.folder.remove(SEGMENTS)
    artifact.folder.remove(_RAY_FOLDER)
    return manifest


def _begin_checkpoints(job: TrainingJob, force: bool) -> None:
    """Refuses to go on from, or to write over, the checkpoints of another configuration."""
    latest = job.checkpoints.latest()
    if latest is None or latest.manifest.run_fingerprint == job.fingerprint:
        return
    if not force:
        raise OtherWorkError(
            f"{job.folder.uri}: holds checkpoints of another configuration or other inputs; "
            "choose another workspace, or pass --force to replace them"
        )
    for name in (CHECKPOINTS, SEGMENTS):
        job.folder.remove(name)


def _fit(job: TrainingJob) -> None:
    """Run the workers through Ray Train until the last step; raise what stopped them for good."""
    if not current_executor().several_processes:
        _fit_in_process(job)
        return
    settings = job.config.train
    use_gpu = device_for(settings.device).startswith("cuda")
    fewest, most = settings.workers or all_workers(use_gpu)
    check_resources("train", fewest, Pool(fewest, settings.cpus_per_worker, 1.0 if use_gpu else 0.0))
    # Where the driver is: on any other node it could be lost with that node, and all workers with it.
    beside_us = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    board = _Board.options(scheduling_strategy=beside_us).remote()  # type: ignore[attr-defined]
    resources = {"CPU": settings.cpus_per_worker, **({"GPU": 1} if use_gpu else {})}
    trainer = TorchTrainer(
        _train_loop,
        train_loop_config={"job": job, "board": board},
        torch_config=_StoppableTorchConfig(
            backend="nccl" if use_gpu else "gloo", timeout_s=int(settings.collective_timeout)
        ),
        scaling_config=ray.train.ScalingConfig(
            num_workers=most if fewest == most else (fewest, most), use_gpu=use_gpu, resources_per_worker=resources
        ),
        run_config=ray.train.RunConfig(
            name=job.fingerprint,
            failure_config=ray.train.FailureConfig(max_failures=settings.failures),
            **ray_storage(job.folder.child(_RAY_FOLDER)),
        ),
    )
    bundles = [Pool(1, settings.cpus_per_worker, 1.0 if use_gpu else 0.0).bundle] * most
    with _progress(job, board), announced_wait("train", bundles):
        try:
            trainer.fit()
        except Exception as error:
            _raise_fatal(board)
            raise InfrastructureError(f"train: {_last_line(error)}") from error
        carry_over(ray.get(board.traffic.remote()))
        _raise_fatal(board)


def _fit_in_process(job: TrainingJob) -> None:
    """Train with one worker in this process until the last step."""
    latest = job.checkpoints.latest()
    with ProgressLine("train", job.steps, "steps") as progress:
        progress.start_at(latest.manifest.step if latest else 0)

        def observe(line: dict[str, Any]) -> None:
            step_finished(line)
            progress.advance(1, log_line(line))

        run_worker(job, World(), resolve_device(job.config.train.device), observe=observe)


def all_workers(use_gpu: bool) -> tuple[int, int]:
    """Return the fewest and the most workers if `train.workers` is open. NCCL takes no two ranks on one GPU."""
    executor = current_executor()
    if not executor.several_processes:
        return 1, 1
    workers = max(1, int(executor.resources().get("GPU", 0))) if use_gpu else 2
    return workers, workers


def _raise_fatal(board: Any) -> None:
    """Raises what a worker said no restart could mend: the user's mistake in one line, a bug with its traceback."""
    fatal = ray.get(board.fatal.remote())
    if fatal is not None:
        kind, message = fatal
        raise getattr(errors, kind, RuntimeError)(message)


def _train_loop(config: dict[str, Any]) -> None:
    """What Ray Train calls on every worker."""
    job, board = config["job"], config["board"]
    if ray.get(board.fatal.remote()) is not None:
        # Ray restarts whatever fails; this is how it learns that there is nothing to do.
        return
    count_retries()
    try:
        run_worker(
            job,
            World.current(),
            ray.train.torch.get_device(),
            observe=partial(_observe, board),
            stop_requested=_stop_requested.is_set,
        )
    except (InfrastructureError, RuntimeError, OSError):
        # A collective without its peer, a machine without memory, a stop: a fresh set of workers may do better.
        raise
    except ClusterbatchError as error:
        ray.get(board.fail.remote(type(error).__name__, str(error)))
        raise
    except Exception:
        ray.get(board.fail.remote("bug", f"train: a worker failed\n{traceback.format_exc()}"))
        raise
    finally:
        ray.get(board.spend.remote(since_last()))


def _observe(board: Any, line: dict[str, Any]) -> None:
    board.show.remote(line)
    step_finished(line)


_stop_requested = threading.Event()


class _StoppableBackend(TorchConfig().backend_cls):  # type: ignore[misc]
    """Lets a worker finish its step and write a checkpoint when it is sent SIGTERM, as spot machines are."""

    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        super().on_start(worker_group, backend_config)
        # Here, because only this runs on the workers' main threads, where alone handlers can be set.
        worker_group.execute(_listen_for_sigterm)


@dataclass
class _StoppableTorchConfig(TorchConfig):
    @property
    def backend_cls(self) -> type:
        return _StoppableBackend


def _listen_for_sigterm() -> None:
    signal.signal(signal.SIGTERM, lambda number, frame: _stop_requested.set())


@ray.remote(num_cpus=0)
class _Board:
    """Where workers leave what the driver shows or needs to know."""

    def __init__(self) -> None:
        self._line: dict[str, Any] | None = None
        self._traffic = Traffic()
        self._fatal: tuple[str, str] | None = None

    def show(self, line: dict[str, Any]) -> None:
        self._line = line

    def line(self) -> dict[str, Any] | None:
        return self._line

    def fail(self, kind: str, message: str) -> None:
        self._fatal = (kind, message)

    def spend(self, traffic: Traffic) -> None:
        self._traffic += traffic

    def traffic(self) -> Traffic:
        return self._traffic

    def fatal(self) -> tuple[str, str] | None:
        return self._fatal


@contextmanager
def _progress(job: TrainingJob, board: Any) -> Iterator[None]:
    """Shows the newest line of the board while the block runs."""
    ended = threading.Event()
    latest = job.checkpoints.latest()
    done = latest.manifest.step if latest else 0

    def look(line: ProgressLine) -> None:
        shown = done
        while not ended.wait(_SECONDS_BETWEEN_LOOKS):
            shown = _show(line, board, shown)
        _show(line, board, shown)

    with ProgressLine("train", job.steps, "steps") as line:
        line.start_at(done)
        watcher = threading.Thread(target=look, args=(line,), daemon=True)
        watcher.start()
        try:
            yield
        finally:
            ended.set()
            watcher.join()


def _show(line: ProgressLine, board: Any, shown: int) -> int:
    newest = ray.get(board.line.remote())
    # Steps that a resumed run does again are not counted twice.
    if newest is None or newest["step"] < shown:
        return shown
    line.advance(newest["step"] + 1 - shown, log_line(newest))
    return int(newest["step"]) + 1


def _last_line(error: BaseException) -> str:
    lines = [line for line in str(root_cause(error)).strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
