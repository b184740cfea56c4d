"""A training run small enough for tests: a tiny transformer, its shards without corpus or clustering before them."""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from clusterbatch.config import RunConfig
from clusterbatch.shards.layout import ShardSchema
from clusterbatch.shards.reader import INDEX, index_table
from clusterbatch.shards.writer import ShardWriter
from clusterbatch.store import Counts, Receipt
from clusterbatch.store.tables import write_parquet
from clusterbatch.store.workspace import Workspace
from clusterbatch.training.collectives import World
from clusterbatch.training.loop import Preempted
from clusterbatch.training.metrics import read_metrics
from clusterbatch.training.worker import TrainingJob, open_plan, run_worker

WORDS = [f"word{number}" for number in range(180)]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
VOCABULARY = len(SPECIAL) + len(WORDS)
SURROGATE = 8


def tiny_model(folder: Path) -> str:
    """Writes a BERT of two layers and 32 dimensions, with dropout, that knows WORDS."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join([*SPECIAL, *WORDS]))
    # By position: the argument `vocab_file` is ignored since Transformers 5, which leaves the special tokens alone.
    tokenizer = BertTokenizerFast(str(folder / "vocab.txt"))
    assert tokenizer.vocab_size == VOCABULARY
    tokenizer.save_pretrained(folder)
    torch.manual_seed(5)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=VOCABULARY, max_position_embeddings=64, **shape)).save_pretrained(folder)
    return str(folder)


def small_config(folder: Path, **sections: Any) -> RunConfig:
    """A workspace under `folder` with the tiny model; `sections` override keys: train={...}, batches={...}."""
    model = folder / "tiny"
    train = {
        "model": str(model) if model.is_dir() else tiny_model(model),
        "encoder": "backbone",
        "steps": 40,
        "learning_rate": 1e-2,
        "precision": "float32",
        "deterministic": True,
        "checkpoint_every": 10,
        "keep_checkpoints": 3,
        "micro_batch_tokens": 256,
        "trackers": [],
    }
    return RunConfig.model_validate(
        {
            "workspace": sections.pop("workspace", str(folder / "workspace")),
            "train": {**train, **sections.pop("train", {})},
            "batches": {"size": 32, **sections.pop("batches", {})},
            **sections,
        }
    )


def write_clusters(
    config: RunConfig, *, negatives: bool = False, weight: bool = False, share: float = 1.0, **details: Any
) -> None:
    """Two sources of a few clusters each, 27 batches of 32 an epoch; a cluster's rows share some of their words.

    share: of the rows, for a shorter epoch.
    """
    layout = ShardSchema(VOCABULARY, run_rows=8, surrogate_dimensions=SURROGATE, negatives=negatives, weight=weight)
    artifact = Workspace(config).clusters()
    random = np.random.default_rng(1)
    parts, pieces = [], []
    for shard, (source, sizes) in enumerate({"first": [200, 120, 70], "second": [310, 100, 30]}.items()):
        writer = ShardWriter(layout)
        for cluster, size in enumerate(sizes):
            rows = int(share * size)
            table = _rows(random, rows, shard * 3 + cluster, layout)
            text = pa.table({"pair_id": [f"{source}-{cluster}-{row}" for row in range(rows)]})
            writer.add(table, text, source=source, cluster=cluster, piece=0, mean_cosine=0.5)
        parts += writer.write(artifact, f"shard-{shard}", shard=shard)
        pieces += [{**piece, "shard": shard} for piece in writer.pieces]
    total = sum(piece["rows"] for piece in pieces)
    index = write_parquet(artifact, "index", index_table(pieces), content=INDEX)
    artifact.commit(
        "clusters",
        [Receipt(unit=0, fingerprint="clusters", parts=parts, counts=Counts(read=total, written=total))],
        config={"stratify": "cluster"},
        inputs={},
        seconds=0.0,
        details={"layout": asdict(layout), **details},
        extra_parts=[index],
    )


def small_job(config: RunConfig) -> TrainingJob:
    clusters = Workspace(config).clusters()
    plan = open_plan(config, clusters, clusters.require())
    steps = config.train.steps or (config.train.epochs or 1) * plan.steps_per_epoch
    return TrainingJob(config, 0, steps, config.train.model, "a run")


def train_on_rank(world: World, job: TrainingJob) -> None:
    """One worker without Ray, to the last step."""
    run_worker(job, world, torch.device("cpu"))


def train_and_be_killed(world: World, job: TrainingJob, step: int, checkpoint: int) -> None:
    """Rank 0 kills itself (SIGKILL) after `step`, but not before the checkpoint of step `checkpoint` is whole."""

    def observe(line: dict[str, Any]) -> None:
        if line["step"] == step:
            while (latest := job.checkpoints.latest()) is None or latest.manifest.step < checkpoint:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)

    run_worker(job, world, torch.device("cpu"), observe=observe)


def train_until_asked_to_stop(world: World, job: TrainingJob, steps: int) -> str:
    """The last rank asks to stop in the `steps`-th step of this call; what the loop then says."""
    polled = 0

    def stop_requested() -> bool:
        nonlocal polled
        polled += 1
        return polled == steps and world.rank == world.size - 1

    try:
        run_worker(job, world, torch.device("cpu"), stop_requested=stop_requested)
    except Preempted as error:
        return str(error)
    return "ran to the end"


def metric_lines(job: TrainingJob) -> list[dict[str, Any]]:
    return [json.loads(line) for line in read_metrics(job.folder).splitlines()]


def model_weights(job: TrainingJob) -> dict[str, np.ndarray]:
    """All tensors of the model that the run has written."""
    from safetensors.numpy import load

    return load(job.folder.read("model/model.safetensors"))


def same_bits(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(one[name].tobytes() == other[name].tobytes() for name in one)


def _rows(random: np.random.Generator, rows: int, topic: int, layout: ShardSchema) -> pa.Table:
    def text() -> list[int]:
        common = random.integers(5 + 30 * topic, 35 + 30 * topic, random.integers(2, 9))
        return [2, *common.tolist(), *random.integers(5, VOCABULARY, 3).tolist(), 3]

    def vectors() -> pa.FixedSizeListArray:
        values = random.standard_normal((rows, SURROGATE))
        values /= np.linalg.norm(values, axis=1, keepdims=True)
        return pa.FixedSizeListArray.from_arrays(pa.array(values.astype(np.float16).ravel()), SURROGATE)

    columns: dict[str, Any] = {
        "query_tokens": [text() for _ in range(rows)],
        "document_tokens": [text() for _ in range(rows)],
        "query_hash": pa.array(random.integers(0, 2**63, rows), pa.uint64()),
        "document_hash": pa.array(random.integers(0, 2**63, rows), pa.uint64()),
        "query_vector": vectors(),
        "document_vector": vectors(),
    }
    if layout.negatives:
        columns["negative_tokens"] = [[text() for _ in range(random.integers(1, 4))] for _ in range(rows)]
    if layout.weight:
        columns["weight"] = pa.array(random.uniform(0.5, 2.0, rows), pa.float32())
    return pa.table(columns)
