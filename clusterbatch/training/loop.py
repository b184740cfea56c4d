"""The training loop: follows the plan from the last checkpoint to the last step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from clusterbatch.batches.loader import SliceBatch, SliceLoader
from clusterbatch.training.checkpoint import CheckpointManifest, Checkpoints
from clusterbatch.training.metrics import MetricsLog, Trackers, figures_of, peak_memory_bytes, training_flops_per_token
from clusterbatch.training.step import StepResult, TrainingStep
from clusterbatch.training.validation import Validation


class Preempted(RuntimeError):
    """Some rank was told to stop; a checkpoint of the last finished step has been written."""


@dataclass(frozen=True)
class LoopSettings:
    """Settings of a training loop. Steps count from 0; training ends before `last_step`."""

    first_step: int
    last_step: int
    checkpoint_every: int
    run_fingerprint: str
    plan_fingerprint: str
    evaluate_every: int = 1
    # Seconds that a step may wait for the checkpoint before it to be written; all ranks are idle meanwhile.
    patience: float = math.inf
    # (least, most) seconds between two checkpoints, beside checkpoint_every.
    checkpoint_seconds: tuple[float, float] = (0.0, math.inf)


class TrainingLoop:
    """Loop that runs on every rank; rank 0 also writes metrics and checkpoints (`log`, `checkpoints`; None elsewhere).

    observe: called on rank 0 with each step's line. stop_requested: polled before every step, see Preempted.
    """

    def __init__(
        self,
        training: TrainingStep,
        loader: SliceLoader,
        settings: LoopSettings,
        *,
        checkpoints: Checkpoints | None,
        log: MetricsLog | None,
        peak_flops: float,
        trackers: Trackers | None = None,
        validation: Validation | None = None,
        observe: Callable[[dict[str, Any]], None] = lambda line: None,
        stop_requested: Callable[[], bool] = lambda: False,
    ) -> None:
        self._training, self._loader, self._settings = training, loader, settings
        self._checkpoints, self._log = checkpoints, log
        self._peak_flops = peak_flops
        self._trackers, self._validation = trackers or Trackers({}), validation
        self.last_line: dict[str, Any] | None = None
        self._last_checkpoint = time.monotonic()
        self._observe, self._stop_requested = observe, stop_requested
        self._flops_per_token = training_flops_per_token(training.encoder)

    def run(self) -> None:
        """Train to the last step. Raises Preempted if a rank was told to stop, after a checkpoint of what is done."""
        settings = self._settings
        waited, begun = self._loader.wait_seconds, time.perf_counter()
        for batch in self._loader:
            result = self._training.run(batch, self._stop_requested())
            now = time.perf_counter()
            wait_share = (self._loader.wait_seconds - waited) / (now - begun)
            line = self._line(batch, result, now - begun, wait_share)
            done = batch.step + 1
            stopping = result.stop_requests > 0
            ending = stopping or done == settings.last_step
            score = None if stopping else self._score(done)
            if score is not None:
                line["score"] = score
            self._record(line)
            if ending or score is not None:
                # A score is worth a checkpoint: it may be the best.
                self._wait_together()
                self._checkpoint(done, batch.epoch, score)
            elif self._is_due(done) and self._is_free():
                self._checkpoint(done, batch.epoch, None)
            if stopping and done < settings.last_step:
                self._wait_together()
                raise Preempted(f"stopped after step {done}, as asked; its checkpoint is written")
            begun, waited = time.perf_counter(), self._loader.wait_seconds
        self._wait()

    def _record(self, line: dict[str, Any]) -> None:
        self.last_line = line
        if self._log is None:
            return
        self._log.add(line)
        self._trackers.add(line["step"], figures_of(line))
        self._observe(line)

    def _score(self, done: int) -> float | None:
        settings = self._settings
        if self._validation is None or not (done % settings.evaluate_every == 0 or done == settings.last_step):
            return None
        with self._training.current_weights(done):
            return self._validation.measure(self._training.encoder)

    def _checkpoint(self, step: int, epoch: int, score: float | None) -> None:
        if self._checkpoints is None or self._log is None:
            return
        self._log.cut(step)
        self._trackers.flush()
        settings, training = self._settings, self._training
        manifest = CheckpointManifest(
            step=step,
            run_fingerprint=settings.run_fingerprint,
            plan_fingerprint=settings.plan_fingerprint,
            epoch=epoch,
            world_size=training.world.size,
            seed=training.config.seed,
            parts=[],
            score=score,
        )
        self._checkpoints.save(manifest, *training.saved_state(step))
        self._last_checkpoint = time.monotonic()

    def _is_due(self, done: int) -> bool:
        """Return whether a periodic checkpoint is due; rank 0 alone decides, as no other rank writes any."""
        least, most = self._settings.checkpoint_seconds
        seconds = time.monotonic() - self._last_checkpoint
        return seconds >= most or (done % self._settings.checkpoint_every == 0 and seconds >= least)

    def _is_free(self) -> bool:
        """Return whether the checkpoint before is written, after waiting for it no longer than `patience`.

        If storage takes longer for a checkpoint than the time between two, fewer are written: the other ranks, in their
        next collective by now, would take a longer wait for a lost worker.
        """
        return self._checkpoints is None or self._checkpoints.is_free(self._settings.patience)

    def _wait_together(self) -> None:
        """Wait on all ranks until the last checkpoint is written.

        The others must not wait in a collective, which would take storage that is slow for a lost worker, nor raise
        before it is written: Ray ends all workers as soon as one has.
        """
        try:
            self._training.world.wait_until(
                lambda: self._checkpoints is None or self._checkpoints.is_free(), self._device
            )
        finally:
            self._wait()

    def _wait(self) -> None:
        if self._checkpoints is not None:
            self._checkpoints.wait()

    def _line(self, batch: SliceBatch, result: StepResult, seconds: float, wait_share: float) -> dict[str, Any]:
        figures = asdict(result)
        del figures["seconds"], figures["stop_requests"], figures["padded_tokens"]
        mfu = None
        if self._flops_per_token is not None:
            mfu = self._flops_per_token * result.tokens / seconds / (self._peak_flops * self._training.world.size)
        composition = batch.composition
        return {
            "step": batch.step,
            "epoch": batch.epoch,
            **figures,
            "stratum": composition.stratum,
            "purity": composition.purity,
            "groups": composition.groups,
            "repeated": composition.repeated,
            "seconds": seconds,
            "pairs_per_second": result.pairs / seconds,
            "tokens_per_second": result.tokens / seconds,
            "padding": 1 - result.tokens / max(1, result.padded_tokens),
            "mfu": mfu,
            "data_wait": wait_share,
            "memory_bytes": peak_memory_bytes(self._device),
        }

    @property
    def _device(self) -> torch.device:
        return self._training.encoder.device


def log_line(line: dict[str, Any]) -> str:
    """Return the line for people: step loss grad_norm memory tokens/s MFU data-wait%."""
    mfu = "-" if line["mfu"] is None else f"{100 * line['mfu']:.1f}%"
    return (
        f"step {line['step']} loss {line['loss']:.4f} grad_norm {line['gradient_norm']:.3f} "
        f"memory {line['memory_bytes'] / 2**30:.2f}GiB tokens/s {line['tokens_per_second']:,.0f} MFU {mfu} "
        f"data-wait {100 * line['data_wait']:.1f}%"
    )
