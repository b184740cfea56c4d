"""Figures of a run for the dashboards people have: TensorBoard, MLflow, Weights & Biases.

The JSON lines of metrics_log are the record; these follow it. MLflow and Weights & Biases find their server and their
credentials in their own environment variables.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from clusterbatch.errors import UsageError
from clusterbatch.store import Folder

TENSORBOARD = "tensorboard"
_PROJECT = "clusterbatch"


class Tracker(Protocol):
    """Where the figures of training go besides the metrics file."""

    def add(self, step: int, figures: dict[str, float]) -> None: ...

    def flush(self) -> None:
        """Called when a checkpoint is taken: what was added so far will not be added again."""

    def close(self) -> None: ...


def check_trackers(names: Sequence[str]) -> None:
    """Raises UsageError where a tracker's package is missing."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UsageError(f"train.trackers: the package {name} is not installed (pip install {name})")


def open_trackers(
    names: Sequence[str], folder: Folder, run: str, first_step: int, config: dict[str, Any]
) -> list[Tracker]:
    """run: the identity under which a resumed run goes on; config: what servers show beside the figures."""
    makers: dict[str, Callable[[], Tracker]] = {
        "tensorboard": lambda: _TensorBoard(folder, first_step),
        "mlflow": lambda: _MLflow(run, config),
        "wandb": lambda: _WeightsAndBiases(run, config),
    }
    return [makers[name]() for name in names]


def figures_of(line: dict[str, Any]) -> dict[str, float]:
    """The numbers of a metrics line; names and missing figures are left out."""
    return {name: float(value) for name, value in line.items() if isinstance(value, (int, float)) and name != "step"}


class _TensorBoard:
    """Event files are written here and copied to storage at every checkpoint, which may be an object store.

    So events beyond the last checkpoint never arrive there, and a resumed run repeats none.
    """

    def __init__(self, folder: Folder, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._target = folder.child(TENSORBOARD)
        self._local = tempfile.TemporaryDirectory()
        # Files of a crashed attempt may lie beside ours; purge_step hides what they have from here on.
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
        # A resumed run goes on under the id that its first attempt was given.
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
