"""One run of a comparison, in one process: train an arm with a seed, and measure it along the way."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from clusterbatch.config import RunConfig
from clusterbatch.encoder.hardware import resolve_device
from clusterbatch.encoder.model import Encoder, load_encoder
from clusterbatch.encoder.resolve import resolve_model
from clusterbatch.evaluation.collection import Collection
from clusterbatch.evaluation.measure import LoadedCollection
from clusterbatch.evaluation.metrics import Metric, parse_metric
from clusterbatch.runtime import Unit
from clusterbatch.store import Artifact, Counts, Receipt, Stopwatch
from clusterbatch.store.tables import write_parquet
from clusterbatch.training.gather import World
from clusterbatch.training.metrics_log import read_metrics
from clusterbatch.training.worker import CHECKPOINTS, TrainingJob, prepare_torch, run_worker

SCORES = pa.schema(
    [
        pa.field("collection", pa.string(), nullable=False),
        pa.field("metric", pa.string(), nullable=False),
        pa.field("query_id", pa.string(), nullable=False),
        pa.field("value", pa.float64(), nullable=False),
    ]
)


@dataclass(frozen=True)
class Trial:
    """`name` is that of its folder; `config` has its own workspace and seeds. No steps: the model untrained."""

    name: str
    arm: str
    seed: int
    steps: int
    config: RunConfig
    fingerprint: str


class TrialWorker:
    """Runs trials one after the other; collections are read and tokenised once."""

    def __init__(
        self,
        artifact: Artifact,
        fingerprint: str,
        collections: Sequence[Collection],
        metrics: Sequence[str],
        points: int,
    ) -> None:
        self._artifact, self._fingerprint = artifact, fingerprint
        self._collections = collections
        self._metrics = [parse_metric(name) for name in metrics]
        self._points = points
        self._loaded: list[LoadedCollection] | None = None

    def process(self, unit: Unit) -> Receipt:
        """Receipt.details: trial, arm, seed, steps, device, seconds_training, seconds_measuring, losses [[step, loss]],
        curve [{step, collection, metric, value}]. Its part has every query's score at the end.

        All is measured behind the prompts of training, also the model untrained: before and after differ by the
        training alone, not by what the model is given.
        """
        trial: Trial = unit.payload
        watch = Stopwatch()
        prepare_torch(trial.config)
        device = resolve_device(trial.config.train.device)
        encoder = starting_encoder(trial.config, device)
        curve: list[dict[str, Any]] = []
        losses: list[list[float]] = []
        trained = 0.0
        if trial.steps:
            job = self._job(trial)
            run_worker(job, World(), device)
            trained, losses = _cost(job)
            for checkpoint in job.checkpoints.whole():
                _load_parameters(encoder, checkpoint.load()[0])
                ended = checkpoint.manifest.step == trial.steps
                # On the way only what the curve shows: the depth of the other metrics is most of a measurement.
                scores = self._measure(encoder, trial, self._metrics if ended else self._metrics[:1])
                curve += self._means(scores, checkpoint.manifest.step)
            job.folder.remove(CHECKPOINTS)
        else:
            scores = self._measure(encoder, trial, self._metrics)
            curve = self._means(scores, 0)
        part = write_parquet(self._artifact, f"scores-{trial.name}", self._table(scores), trial=trial.name)
        pairs = trial.steps * trial.config.batches.size
        receipt = Receipt(
            unit=unit.number,
            fingerprint=self._fingerprint,
            parts=[part],
            counts=Counts(read=pairs, written=pairs),
            seconds=watch.seconds,
            details={
                "trial": trial.name,
                "arm": trial.arm,
                "seed": trial.seed,
                "steps": trial.steps,
                "pairs": pairs,
                "device": device.type,
                "seconds_training": trained,
                "seconds_measuring": watch.seconds - trained,
                "curve": curve,
                "losses": losses,
                "progress": f"{trial.arm} seed {trial.seed}",
            },
        )
        self._artifact.write_receipt(receipt)
        return receipt

    def _job(self, trial: Trial) -> TrainingJob:
        every = -(-trial.steps // self._points)
        train = trial.config.train.model_copy(
            update={
                "checkpoint_every": every,
                "keep_checkpoints": self._points + 1,
                "workers": (1, 1),
                "trackers": [],
            }
        )
        config = trial.config.model_copy(update={"train": train})
        return TrainingJob(config, 0, trial.steps, config.train.model, trial.fingerprint)

    def _measure(self, encoder: Encoder, trial: Trial, metrics: Sequence[Metric]) -> dict[tuple[int, str], np.ndarray]:
        """(Q,) by (number of the collection, metric name)."""
        settings = trial.config.evaluate
        cutoffs = [metric.cutoff or settings.top_k for metric in metrics]
        if self._loaded is None:
            self._loaded = [
                LoadedCollection(
                    collection,
                    settings.max_query_tokens,
                    settings.max_document_tokens,
                    settings.ignore_identical_ids,
                )
                for collection in self._collections
            ]
        return {
            (number, metric): values
            for number, loaded in enumerate(self._loaded)
            for metric, values in loaded.measure(
                encoder, metrics, max(cutoffs), trial.config.embed.batch_tokens
            ).items()
        }

    def _table(self, scores: Mapping[tuple[int, str], np.ndarray]) -> pa.Table:
        assert self._loaded is not None
        tables = []
        for (number, metric), values in scores.items():
            loaded = self._loaded[number]
            rows = len(values)
            columns = [[loaded.collection.name] * rows, [metric] * rows, loaded.queries, values]
            tables.append(pa.table(columns, schema=SCORES))
        return pa.concat_tables(tables)

    def _means(self, scores: Mapping[tuple[int, str], np.ndarray], step: int) -> list[dict[str, Any]]:
        return [
            {
                "step": step,
                "collection": self._collections[number].name,
                "metric": metric,
                "value": float(values.mean()),
            }
            for (number, metric), values in scores.items()
        ]


def starting_encoder(config: RunConfig, device: torch.device) -> Encoder:
    """The model that a trial's training starts from, with the prompts that it is trained behind."""
    encoder = load_encoder(resolve_model(config.train.model, config.storage), config.train.encoder, device=device)
    encoder.prompts.update(config.train.named_prompts)
    return encoder


def _load_parameters(encoder: Encoder, parameters: Mapping[str, torch.Tensor]) -> None:
    """Weights of a checkpoint, which holds those that are trained; the others are as the model starts with them."""
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if f"encoder.{name}" in parameters:
                parameter.copy_(parameters[f"encoder.{name}"])


def _cost(job: TrainingJob) -> tuple[float, list[list[float]]]:
    """Seconds of training, and up to 200 (step, mean loss since the one before) of the loss curve.

    Every step is counted with the median step's seconds: what else the machine was doing is no property of an arm.
    """
    lines = [json.loads(line) for line in read_metrics(job.folder).splitlines()]
    width = max(1, -(-len(lines) // 200))
    blocks = [lines[start : start + width] for start in range(0, len(lines), width)]
    losses = [[float(block[-1]["step"] + 1), float(np.mean([line["loss"] for line in block]))] for block in blocks]
    return float(np.median([line["seconds"] for line in lines])) * len(lines), losses
