"""One training worker, from configuration to the written model, without Ray."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clusterbatch.batches.curriculum import Plan, make_plan
from clusterbatch.batches.loader import SliceLoader
from clusterbatch.batches.negatives import NegativeChoice
from clusterbatch.batches.row_reader import StoredVectors
from clusterbatch.config import RunConfig, TrainConfig
from clusterbatch.encoder.clip import TowersEncoder
from clusterbatch.encoder.load import load_encoder
from clusterbatch.encoder.resolve import resolve_model
from clusterbatch.encoder.save import save_model
from clusterbatch.errors import UsageError
from clusterbatch.shards.reader import ShardReader
from clusterbatch.shards.row_filter import filter_rows
from clusterbatch.store import Artifact, Folder, Manifest, Part, Receipt
from clusterbatch.store.checksum import file_checksum
from clusterbatch.store.workspace import MODEL, TrainingRun, Workspace
from clusterbatch.training.checkpoint import Checkpoint, Checkpoints
from clusterbatch.training.collectives import World
from clusterbatch.training.loop import LoopSettings, TrainingLoop
from clusterbatch.training.metrics import MetricsLog, Trackers, open_trackers, peak_flops
from clusterbatch.training.model_card import model_card
from clusterbatch.training.prepare_model import computing_dtype, finish, micro_batch_tokens
from clusterbatch.training.resume import Start, resume
from clusterbatch.training.starting_model import check_matryoshka
from clusterbatch.training.step import LOG_SCALE, TrainingStep
from clusterbatch.training.validation import Validation

CHECKPOINTS = "checkpoints"
# What Ray Train keeps of its own state during a run.
RAY_FOLDER = "_ray"
# If the configuration does not say when to write checkpoints: about this many in a run, no two of them nearer to each
# other than the first number of seconds nor farther apart than the second.
_CHECKPOINTS_PER_RUN = 10
_SECONDS_BETWEEN_CHECKPOINTS = (60.0, 1800.0)


@dataclass(frozen=True)
class Continuation:
    """Start of a later generation: the last checkpoint of generation `base`; it trains `steps` (unset: one epoch).

    clusters: the generation whose clusters it trains on; steps_before: optimizer steps that the checkpoint has seen, in
    all generations, which AdamW's correction of its moments counts.
    """

    base: int
    clusters: int
    steps: int | None
    steps_before: int = 0


@dataclass(frozen=True)
class TrainingJob:
    """Instructions to a worker; small and picklable. `initial_model` is a name, a folder or an s3:// URI."""

    config: RunConfig
    generation: int
    steps: int
    initial_model: str
    fingerprint: str
    continued: Continuation | None = None

    @property
    def clusters(self) -> Artifact:
        generation = self.continued.clusters if self.continued else self.generation
        return Workspace(self.config).clusters(generation)

    @property
    def scores(self) -> Artifact | None:
        """The teacher's scores of the clusters; None if training needs none."""
        if not self.config.needs_teacher:
            return None
        generation = self.continued.clusters if self.continued else self.generation
        return Workspace(self.config).scores(generation)

    @property
    def artifact(self) -> TrainingRun:
        return Workspace(self.config).train(self.generation)

    @property
    def folder(self) -> Folder:
        return self.artifact.folder

    @property
    def checkpoints(self) -> Checkpoints:
        return checkpoints_of(self.config, self.generation)

    @property
    def first_checkpoint(self) -> Checkpoint | None:
        """The last checkpoint of the run that this one continues."""
        return None if self.continued is None else checkpoints_of(self.config, self.continued.base).latest()

    @property
    def checkpoint_every(self) -> int:
        return self.config.train.checkpoint_every or max(1, -(-self.steps // _CHECKPOINTS_PER_RUN))


def checkpoints_of(config: RunConfig, generation: int) -> Checkpoints:
    """Return the checkpoints of a generation's training run."""
    folder = Workspace(config).train(generation).folder.child(CHECKPOINTS)
    return Checkpoints(folder, config.train.keep_checkpoints)


def open_plan(config: RunConfig, clusters: Artifact, manifest: Manifest, *, count_negatives: bool = False) -> Plan:
    """Return the batch plan over the rows of committed clusters that `train.filter` keeps.

    count_negatives: whether to count the hard negatives that it leaves out, which takes a look at all of their scores.
    """
    reader = ShardReader(clusters)
    unused = [name for name, weight in (config.batches.source_weights or {}).items() if weight == 0]
    index = filter_rows(clusters, manifest, reader.index, config.train.filter, unused=unused, negatives=count_negatives)
    return make_plan(index, config.batches, manifest.config["stratify"], StoredVectors(reader, index))


def run_worker(
    job: TrainingJob,
    world: World,
    device: torch.device,
    *,
    observe: Callable[[dict[str, Any]], None] = lambda line: None,
    stop_requested: Callable[[], bool] = lambda: False,
) -> None:
    """Train from the last whole checkpoint to the last step; rank 0 then writes the model.

    Raises loop.Preempted when asked to stop, DataError if shards or checkpoints are damaged.
    """
    config = job.config
    prepare_torch(config.train)
    encoder = load_encoder(resolve_model(job.initial_model, config.storage), config.train.encoder, device=device)
    check_matryoshka(config.train, encoder.dimensions)
    if isinstance(encoder, TowersEncoder):
        encoder.freeze_unused(config.corpus.columns.images)
    encoder.prompts.update(config.train.named_prompts)
    training = TrainingStep(encoder, config.train, job.steps, world)
    clusters = job.clusters
    reader = ShardReader(clusters, job.scores)
    plan = open_plan(config, clusters, clusters.require())
    first_step = resume(training, lambda: _read_start(job, plan, training))
    loader = SliceLoader(
        plan,
        reader,
        world.rank,
        world.size,
        first_step,
        job.steps,
        vectors=config.train.mask.surrogate_margin is not None,
        prefetch_bytes=config.batches.prefetch_bytes,
        cache_bytes=config.batches.cache_bytes,
        images=encoder.images,
        negatives=NegativeChoice.of(config.train, plan.index),
    )
    settings = LoopSettings(
        first_step=first_step,
        last_step=job.steps,
        checkpoint_every=job.checkpoint_every,
        run_fingerprint=job.fingerprint,
        plan_fingerprint=plan.fingerprint,
        evaluate_every=config.train.evaluate_every or job.steps,
        patience=config.train.collective_timeout / 4,
        checkpoint_seconds=(0.0, math.inf) if config.train.checkpoint_every else _SECONDS_BETWEEN_CHECKPOINTS,
    )
    validation = None
    if config.train.evaluate_path is not None:
        collection = Folder(config.train.evaluate_path, config.storage)
        validation = Validation(collection, config.evaluate, encoder, world, micro_batch_tokens(config.train, encoder))
    is_first = world.rank == 0
    trackers = Trackers({})
    if is_first:
        described = {"train": config.train.identity(), "batches": config.batches.identity()}
        trackers = open_trackers(config.train.trackers, job.folder, job.fingerprint, first_step, described)
    loop = TrainingLoop(
        training,
        loader,
        settings,
        checkpoints=job.checkpoints if is_first else None,
        log=MetricsLog(job.folder, first_step) if is_first else None,
        peak_flops=peak_flops(device, computing_dtype(config.train, encoder)),
        trackers=trackers,
        validation=validation,
        observe=observe,
        stop_requested=stop_requested,
    )
    try:
        loop.run()
    finally:
        trackers.close()
    if is_first:
        with tempfile.TemporaryDirectory() as folder:
            save_model(finish(encoder), folder)
            card = model_card(config, encoder, plan, job.steps, job.generation, loop.last_line)
            Path(folder, "README.md").write_text(card, encoding="utf-8")
            write_model(Path(folder), job)


def prepare_torch(config: TrainConfig) -> None:
    """Set threads and determinism; call it before anything is computed, as both change the last bits of sums."""
    torch.set_num_threads(max(1, int(config.cpus_per_worker)))
    if config.deterministic:
        # cuBLAS reads it when its first handle is made.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    torch.manual_seed(config.seed)


def write_model(source: Path, job: TrainingJob) -> None:
    """Copy the model's files from a local folder into the run; files of others stay.

    A receipt lists them before they are written: those that an interruption leaves are known to be the run's.
    """
    files = {f"{MODEL}/{path.relative_to(source).as_posix()}": path for path in source.rglob("*") if path.is_file()}
    parts = []
    for name, path in sorted(files.items()):
        parts.append(Part(path=name, rows=0, bytes=path.stat().st_size, checksum=file_checksum(path)))
    job.artifact.write_receipt(Receipt(unit=0, fingerprint=job.fingerprint, parts=parts))
    for name, path in sorted(files.items()):
        job.folder.upload(name, str(path))


def _read_start(job: TrainingJob, plan: Plan, training: TrainingStep) -> Start:
    """Read the last whole checkpoint of the run; without one, what the run begins from."""
    checkpoint, first = job.checkpoints.latest(), job.first_checkpoint
    with_adapters = job.config.train.lora is not None
    # Adapters are merged into the initial model; new ones begin at nothing, and so do their moments.
    before = job.continued.steps_before if job.continued and first and not with_adapters else 0
    if checkpoint is None:
        if first is None:
            return Start(0, 0, None)
        return Start(0, before, _temperature(first, training) if with_adapters else first.load())
    manifest = checkpoint.manifest
    if (manifest.run_fingerprint, manifest.plan_fingerprint) != (job.fingerprint, plan.fingerprint):
        raise UsageError(f"{checkpoint.folder.uri}: a checkpoint of another configuration; pass --force to replace it")
    return Start(manifest.step, before + manifest.step, checkpoint.load())


def _temperature(checkpoint: Checkpoint, training: TrainingStep) -> tuple[dict[str, Tensor], dict[str, Tensor]] | None:
    """Return the state of a fresh run with the temperature that `checkpoint` has learned; None if it has none."""
    parameters, moments = training.blank()
    learned = checkpoint.parameters() if LOG_SCALE in parameters else {}
    if LOG_SCALE not in learned:
        return None
    return {**parameters, LOG_SCALE: learned[LOG_SCALE]}, moments
