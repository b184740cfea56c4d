"""Trials of a comparison: each trains an arm with a seed in one process and measures it along the way."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import xxhash

from clusterbatch.config import RunConfig, fingerprint, with_changes
from clusterbatch.encoder.clip import TowersEncoder
from clusterbatch.encoder.devices import resolve_device
from clusterbatch.encoder.load import drop_padding, load_encoder
from clusterbatch.encoder.model import Encoder
from clusterbatch.encoder.resolve import resolve_model
from clusterbatch.evaluation.collection import Collection
from clusterbatch.evaluation.measure import LoadedCollection
from clusterbatch.evaluation.metrics import Metric, parse_metric
from clusterbatch.evaluation.models import measuring_dtype
from clusterbatch.experiments.compare.arms import Arm
from clusterbatch.runtime import Result, WorkItem
from clusterbatch.store import Artifact, Counts, Stopwatch
from clusterbatch.store.details import TrialDetails
from clusterbatch.store.tables import write_parquet
from clusterbatch.training.collectives import World
from clusterbatch.training.metrics import read_metrics
from clusterbatch.training.prepare_model import finish, prepare
from clusterbatch.training.worker import CHECKPOINTS, TrainingJob, prepare_torch, run_worker

UNTRAINED = "untrained"

# (learning rate, temperature)
Setting = tuple[float, float]


SCORES = pa.schema(
    [
        pa.field("collection", pa.string(), nullable=False),
        pa.field("metric", pa.string(), nullable=False),
        pa.field("query_id", pa.string(), nullable=False),
        pa.field("value", pa.float64(), nullable=False),
    ]
)


def comparison_folder(config: RunConfig) -> str:
    """Return the folder of a comparison in its workspace; that of `batches.size` if several sizes are compared."""
    return f"compare/batch={config.batches.size}" if config.compare.batch_sizes else "compare"


@dataclass(frozen=True)
class Trial:
    """One run of an arm; name: of its folder; config: with its own workspace and seeds; 0 steps: untrained."""

    name: str
    arm: str
    seed: int
    steps: int
    config: RunConfig
    fingerprint: str


class Trials:
    """Numbering of the trials, whichever of them are run: 0 is the untrained model, then arms x settings x seeds."""

    def __init__(
        self, config: RunConfig, arms: Sequence[Arm], layouts: Mapping[str, RunConfig], steps: int, identity: str
    ) -> None:
        self._config, self._arms, self._layouts = config, arms, layouts
        self._steps, self._identity = steps, identity

    def settings(self, arm: Arm) -> list[Setting]:
        """Return the settings of an arm's sweep; without a sweep the one setting it has."""
        compare, train = self._config.compare, arm.config.train
        assert train.learning_rate is not None, "arms have theirs filled in"
        return list(
            product(compare.learning_rates or [train.learning_rate], compare.temperatures or [train.temperature])
        )

    def sweep(self) -> list[WorkItem]:
        """Return one seed of every setting of the arms that choose among several."""
        compare = self._config.compare
        return [
            self._item(position, choice, 0)
            for position, arm in enumerate(self._arms)
            for choice in range(len(self.settings(arm)))
            if len(self.settings(arm)) > 1 and (compare.sweep == "each" or arm.name == compare.reference)
        ]

    def main(self, chosen: Mapping[str, Setting]) -> list[WorkItem]:
        """Return the untrained model, and every arm with its setting and all seeds."""
        reference = next(arm for arm in self._arms if arm.name == self._config.compare.reference)
        untrained = self._trial(reference, self.settings(reference)[0], 0, UNTRAINED, 0)
        items = [WorkItem(0, 0, untrained)]
        # Seed by seed: an interrupted comparison then has whole seeds of all arms.
        for seed in range(self._config.compare.seeds):
            for position, arm in enumerate(self._arms):
                items.append(self._item(position, self.settings(arm).index(chosen[arm.name]), seed))
        return items

    def _item(self, position: int, choice: int, seed: int) -> WorkItem:
        arm = self._arms[position]
        setting = self.settings(arm)[choice]
        seeds, settings = self._config.compare.seeds, len(self.settings(arm))
        name = f"{arm.name}.seed={seed}" if settings == 1 else f"{arm.name}.setting={choice}.seed={seed}"
        number = 1 + (position * settings + choice) * seeds + seed
        return WorkItem(number, self._steps, self._trial(arm, setting, seed, name, self._steps))

    def _trial(self, arm: Arm, setting: Setting, seed: int, name: str, steps: int) -> Trial:
        config = with_changes(
            arm.config,
            {
                "workspace": f"{self._config.workspace}/{comparison_folder(self._config)}/runs/{name}",
                "reuse.clusters": self._layouts[arm.layout].workspace,
                "train.seed": seed,
                "batches.seed": seed,
                "train.learning_rate": setting[0],
                "train.temperature": setting[1],
            },
        )
        return Trial(name, arm.name, seed, steps, config, fingerprint("trial", self._identity, name))


def is_for_tuning(query: str) -> bool:
    """Return whether settings are chosen on a query; the verdict then rests on the other half of the queries."""
    return xxhash.xxh3_64_intdigest(query.encode()) % 2 == 0


class TrialWorker:
    """Runs trials one after the other; collections are read and tokenised once."""

    def __init__(self, collections: Sequence[Collection], metrics: Sequence[str], points: int) -> None:
        self._collections = collections
        self._metrics = [parse_metric(name) for name in metrics]
        self._points = points
        self._loaded: list[LoadedCollection] | None = None

    def process(self, item: WorkItem, output: Artifact) -> Result:
        """Run one trial; its part has every query's score at the end.

        Result.details: trial, arm, seed, steps, device, seconds_training, seconds_measuring, losses [[step, loss]],
        curve [{step, collection, metric, value}].

        Everything is measured with the prompts of training, also the untrained model: before and after differ by the
        training alone, not by what the model is given.
        """
        trial: Trial = item.payload
        watch = Stopwatch()
        prepare_torch(trial.config.train)
        device = resolve_device(trial.config.train.device)
        curve: list[dict[str, Any]] = []
        losses: list[list[float]] = []
        trained = 0.0
        if trial.steps:
            job = self._job(trial)
            run_worker(job, World(), device)
            trained, losses = _cost(job)
            for checkpoint in job.checkpoints.whole():
                encoder = _trained_encoder(trial.config, device, checkpoint.parameters())
                ended = checkpoint.manifest.step == trial.steps
                # On the way only the curve's metric: the depth of the other metrics takes most of a measurement.
                scores = self._measure(encoder, trial, self._metrics if ended else self._metrics[:1])
                curve += self._means(scores, checkpoint.manifest.step)
            job.artifact.remove(CHECKPOINTS)
        else:
            encoder = starting_encoder(trial.config, device)
            drop_padding(encoder, measuring_dtype(trial.config, encoder))
            scores = self._measure(encoder, trial, self._metrics)
            curve = self._means(scores, 0)
        part = write_parquet(output, f"scores-{trial.name}", self._table(scores), trial=trial.name)
        pairs = trial.steps * trial.config.batches.size
        details = TrialDetails(
            trial=trial.name,
            arm=trial.arm,
            seed=trial.seed,
            steps=trial.steps,
            pairs=pairs,
            device=device.type,
            seconds_training=trained,
            seconds_measuring=watch.seconds - trained,
            curve=curve,
            losses=losses,
            progress=f"{trial.arm} seed {trial.seed}",
        )
        return Result(
            [part],
            Counts(read=pairs, written=pairs),
            dict(details),
        )

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
        """Return scores (Q,) by (number of the collection, metric name)."""
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
    """Load the model that a trial's training starts from, with the prompts of its training."""
    encoder = load_encoder(resolve_model(config.train.model, config.storage), config.train.encoder, device=device)
    encoder.prompts.update(config.train.named_prompts)
    return encoder


def _trained_encoder(config: RunConfig, device: torch.device, parameters: Mapping[str, torch.Tensor]) -> Encoder:
    """Load a checkpoint's model as training would write it: adapters merged, evaluation mode.

    The model is prepared as for training, so that it has exactly the parameters that a checkpoint holds, adapters
    included; a name too many or too few is an AssertionError.
    """
    encoder = starting_encoder(config, device)
    if isinstance(encoder, TowersEncoder):
        encoder.freeze_unused(config.corpus.columns.images)
    prepare(encoder, config.train)
    trained = {f"encoder.{name}": each for name, each in encoder.named_parameters() if each.requires_grad}
    of_encoder = {name for name in parameters if name.startswith("encoder.")}
    assert of_encoder == trained.keys(), "a checkpoint of another model"
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(parameters[name])
    finish(encoder)
    drop_padding(encoder, measuring_dtype(config, encoder))
    return encoder


def _cost(job: TrainingJob) -> tuple[float, list[list[float]]]:
    """Return seconds of training, and up to 200 (step, mean loss since the one before) of the loss curve.

    Every step counts with the median step's seconds: other load on the machine is no property of an arm.
    """
    lines = [json.loads(line) for line in read_metrics(job.folder).splitlines()]
    width = max(1, -(-len(lines) // 200))
    blocks = [lines[start : start + width] for start in range(0, len(lines), width)]
    losses = [[float(block[-1]["step"] + 1), float(np.mean([line["loss"] for line in block]))] for block in blocks]
    return float(np.median([line["seconds"] for line in lines])) * len(lines), losses
