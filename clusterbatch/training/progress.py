"""Progress of a training run as the driver shows it, however its workers are run."""

from __future__ import annotations

from typing import Any

from clusterbatch.log import say
from clusterbatch.runtime import ProgressLine
from clusterbatch.training.loop import log_line
from clusterbatch.training.worker import TrainingJob

# From this share of ignored negatives on, a step teaches next to nothing.
MASKED = 0.95


class ShownSteps:
    """Progress of a run as its lines come: each step counts once, and the first step that teaches nothing is named."""

    def __init__(self, progress: ProgressLine, done: int) -> None:
        self._progress, self._done = progress, done
        self._has_warned = False

    def show(self, line: dict[str, Any]) -> None:
        """Show a metrics line; nothing is shown for a step that a resumed run repeats."""
        if line["step"] < self._done:
            return
        self._progress.advance(line["step"] + 1 - self._done, log_line(line), line["seconds"])
        self._done = line["step"] + 1
        if line["mask_rate"] > MASKED and not self._has_warned:
            self._has_warned = True
            say(
                f"train: in step {line['step']:,} the mask ignores {line['mask_rate']:.0%} of the negatives, so there "
                "is next to nothing to learn from it: texts repeat within batches, or train.mask is too strict",
                level="warning",
            )


def steps_done(job: TrainingJob) -> int:
    """Return the steps of the last whole checkpoint."""
    latest = job.checkpoints.latest()
    return latest.manifest.step if latest else 0


def say_stopped(job: TrainingJob) -> None:
    """Say after an interrupt how far the checkpoints are."""
    latest = job.checkpoints.latest()
    if latest is not None:
        say(f"train: stopped after {latest.manifest.step:,} of {job.steps:,} steps, with a checkpoint")
