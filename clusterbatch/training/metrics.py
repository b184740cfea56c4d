"""Metrics of a run: JSON lines as the record, dashboards that follow it, and the cost of a step.

Every step is in the lines exactly once whatever crashes in between. Object storage cannot append, so the lines are in
segments named after their first step: a new one begins with every checkpoint and when one has grown large, and the
current one is written again as it grows. A run that resumes from step s removes the segments that begin at or after s:
lines beyond the last whole checkpoint are dropped, and those steps are logged again.

TensorBoard, MLflow and Weights & Biases get the same figures. The last two find their server and their credentials in
their own environment variables.

A step's cost is memory, and the share of the machine's arithmetic that training uses (MFU).
"""

from __future__ import annotations

import importlib.util
import json
import re
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from clusterbatch.encoder.model import Encoder
from clusterbatch.errors import InfrastructureError, UsageError, last_line
from clusterbatch.json_text import json_text
from clusterbatch.log import say
from clusterbatch.store import Folder

SEGMENTS, TENSORBOARD = "metrics", "tensorboard"
_SEGMENT = re.compile(r"steps-\d{10}\.jsonl")
_SECONDS_BETWEEN_WRITES = 10.0
# The step waits while a segment is written.
_SEGMENT_BYTES = 2**20
# The name of the project on servers of trackers.
_PROJECT = "clusterbatch"
# Dense bfloat16 peak of accelerators, FLOP/s, from their data sheets, by the whole words of their names.
_PEAKS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A10G": 70e12,
    "A10": 125e12,
}
_GEMM_SIZE = 1024
_GEMM_ROUNDS = 8


class MetricsLog:
    """Write the lines of steps from `first_step` on under <folder>/metrics/. Rank 0 only."""

    def __init__(self, folder: Folder, first_step: int) -> None:
        self._folder = folder
        for name in _segments(folder):
            if _first_step(name) >= first_step:
                folder.remove(f"{SEGMENTS}/{name}")
        self._begin(first_step)

    def add(self, line: dict[str, Any]) -> None:
        self._lines.append(json_text(line))
        self._bytes += len(self._lines[-1])
        if self._bytes > _SEGMENT_BYTES:
            self.cut(line["step"] + 1)
        elif time.monotonic() - self._written > _SECONDS_BETWEEN_WRITES:
            self._write()

    def cut(self, next_step: int) -> None:
        """End the segment; the next line is that of `next_step`. Call before a checkpoint of that step is saved."""
        self._write()
        self._begin(next_step)

    def _begin(self, step: int) -> None:
        self._name = f"steps-{step:010d}.jsonl"
        self._lines: list[str] = []
        self._bytes = 0
        self._written = time.monotonic()

    def _write(self) -> None:
        if self._lines:
            self._folder.write(f"{SEGMENTS}/{self._name}", ("\n".join(self._lines) + "\n").encode())
        self._written = time.monotonic()


def read_metrics(folder: Folder) -> bytes:
    """Return all lines so far, in step order."""
    return b"".join(folder.read(f"{SEGMENTS}/{name}") for name in _segments(folder))


def read_last_line(folder: Folder) -> dict[str, Any] | None:
    """Return the newest line of a run that may still be under way; None before its first."""
    for name in reversed(_segments(folder)):
        lines = folder.read(f"{SEGMENTS}/{name}").splitlines()
        if lines:
            newest: dict[str, Any] = json.loads(lines[-1])
            return newest
    return None


def _segments(folder: Folder) -> list[str]:
    """Return the names of the segments, in step order; other files may be beside them."""
    return [name for name in folder.list(SEGMENTS) if _SEGMENT.fullmatch(name)]


def _first_step(name: str) -> int:
    return int(name.removeprefix("steps-").removesuffix(".jsonl"))


class Tracker(Protocol):
    """Receiver of training's figures besides the metrics file."""

    def add(self, step: int, figures: dict[str, float]) -> None: ...

    def flush(self) -> None:
        """Keep what was added so far: a checkpoint is taken, so it will not be added again."""

    def close(self) -> None: ...


def check_trackers(names: Sequence[str]) -> None:
    """Raise UsageError if a tracker's package is missing."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UsageError(f"train.trackers: the package {name} is not installed (pip install {name})")


class Trackers:
    """Open trackers, by name. One that fails is named and gets no more figures.

    The lines are the record, and no run ends for a dashboard whose server is down.
    """

    def __init__(self, trackers: dict[str, Tracker]) -> None:
        self._open = trackers

    def add(self, step: int, figures: dict[str, float]) -> None:
        self._each(lambda tracker: tracker.add(step, figures))

    def flush(self) -> None:
        self._each(lambda tracker: tracker.flush())

    def close(self) -> None:
        self._each(lambda tracker: tracker.close())

    def _each(self, do: Callable[[Tracker], None]) -> None:
        for name, tracker in [*self._open.items()]:
            try:
                do(tracker)
            except Exception as error:
                del self._open[name]
                say(f"train.trackers: {name} failed and gets no more figures ({last_line(error)})", level="warning")


def open_trackers(names: Sequence[str], folder: Folder, run: str, first_step: int, config: dict[str, Any]) -> Trackers:
    """Open the named trackers.

    run: the identity under which a resumed run continues; config: shown by servers beside the figures. Raises
    InfrastructureError if one cannot be opened.
    """
    makers: dict[str, Callable[[], Tracker]] = {
        "tensorboard": lambda: _TensorBoard(folder, first_step),
        "mlflow": lambda: _MLflow(run, config),
        "wandb": lambda: _WeightsAndBiases(run, config),
    }
    opened = {}
    for name in names:
        try:
            opened[name] = makers[name]()
        except Exception as error:
            raise InfrastructureError(f"train.trackers: {name} cannot be opened ({last_line(error)})") from error
    return Trackers(opened)


def figures_of(line: dict[str, Any]) -> dict[str, float]:
    """Return the numbers of a metrics line, without names and missing figures."""
    return {name: float(value) for name, value in line.items() if isinstance(value, (int, float)) and name != "step"}


class _TensorBoard:
    """Event files, written locally and copied to storage, which may be an object store, at every checkpoint.

    So events beyond the last checkpoint never arrive there, and a resumed run repeats none.
    """

    def __init__(self, folder: Folder, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._target = folder.child(TENSORBOARD)
        self._local = tempfile.TemporaryDirectory()
        # Files of a crashed attempt may be beside ours; purge_step hides what they have from here on.
        self._writer = SummaryWriter(self._local.name, purge_step=first_step or None)

    def add(self, step: int, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        self._writer.flush()
        for path in sorted(Path(self._local.name).iterdir()):
            self._target.write(path.name, path.read_bytes())

    def close(self) -> None:
        self._writer.close()
        self._local.cleanup()


class _MLflow:
    def __init__(self, run: str, config: dict[str, Any]) -> None:
        import mlflow

        self._mlflow = mlflow
        mlflow.set_experiment(_PROJECT)
        # A resumed run continues under the id that its first attempt was given.
        found = mlflow.search_runs(filter_string=f"tags.run = '{run}'", output_format="list", max_results=1)
        mlflow.start_run(run_id=found[0].info.run_id if found else None, tags={"run": run})
        if not found:
            mlflow.log_params({name: str(value)[:500] for name, value in config.items()})

    def add(self, step: int, figures: dict[str, float]) -> None:
        self._mlflow.log_metrics(figures, step=step)

    def flush(self) -> None:
        """Nothing to do: figures are sent as they come."""

    def close(self) -> None:
        self._mlflow.end_run()


class _WeightsAndBiases:
    def __init__(self, run: str, config: dict[str, Any]) -> None:
        import wandb

        self._run = wandb.init(project=_PROJECT, id=run, resume="allow", config=config)

    def add(self, step: int, figures: dict[str, float]) -> None:
        self._run.log(figures, step=step)

    def flush(self) -> None:
        """Nothing to do: figures are sent as they come."""

    def close(self) -> None:
        self._run.finish()


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s of the device: its data sheet's if known, otherwise the best of a few matrix products."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        known = data_sheet_flops(torch.cuda.get_device_name(device))
        if known is not None:
            return known
    left = torch.randn(_GEMM_SIZE, _GEMM_SIZE, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(_GEMM_ROUNDS):
        start = time.perf_counter()
        left @ left
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * _GEMM_SIZE**3 / best


def data_sheet_flops(name: str) -> float | None:
    """Return the dense bfloat16 peak of an accelerator of this name, FLOP/s; None if it is not known."""
    return next((peak for key, peak in _PEAKS.items() if re.search(rf"\b{key}\b", name)), None)


def training_flops_per_token(encoder: Encoder) -> float | None:
    """Return the FLOP of forward and backward per token, attention scores left out (a few per cent at these lengths).

    6 per weight that a token passes (Kaplan 2020): 2 forward, 2 for the gradient of its input, 2 for its own, which a
    frozen weight has not. None for a static encoder, whose work is moving memory, and for two towers, each of which
    only part of the tokens pass.
    """
    if encoder.kind != "backbone":
        return None
    table = encoder.backbone.get_input_embeddings().weight  # type: ignore[operator]
    weights = [weight for weight in encoder.parameters() if weight.ndim > 1 and weight is not table]
    return float(sum((6 if weight.requires_grad else 4) * weight.numel() for weight in weights))


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most that this process has held so far: of the accelerator's memory, or resident on the CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
