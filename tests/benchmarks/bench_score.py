"""Cost of a teacher: scoring against embedding, the masked step against the unmasked, and memory.

    python -m tests.benchmarks.bench_score [--pairs 2000] [--rounds 5] [--steps 60] [--rows 2000] [--only memory]

Real pairs (CLUSTERBATCH_DATA), MiniLM as surrogate and as teacher, in this process with one thread; then steps over
the shards, with and without the teacher's mask, in turn, reading included: of a static encoder at batch 32 and 256, and
(a twentieth as many) of MiniLM at 32; then the peak memory of the stage in local mode (all processes, pages that they
share once), over rows made up for that and over ten times as many. JSON lines; times are CPU time. `--only memory` (or
scoring, steps) prints less.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from clusterbatch.batches.loader import SliceLoader
from clusterbatch.config import RunConfig, TrainConfig, with_changes
from clusterbatch.corpus.ingest import ingest
from clusterbatch.embedding.stage import embed
from clusterbatch.encoder.load import load_encoder
from clusterbatch.encoder.resolve import resolve_model
from clusterbatch.runtime import InProcessExecutor
from clusterbatch.runtime.executor import using
from clusterbatch.scoring.stage import score
from clusterbatch.shards.reader import ShardReader
from clusterbatch.shards.stage import cluster
from clusterbatch.store.details import ScoresDetails, details_of
from clusterbatch.store.workspace import Workspace
from clusterbatch.training.collectives import World
from clusterbatch.training.step import TrainingStep
from clusterbatch.training.worker import open_plan
from tests.benchmarks.bench_static import WARM, static_training
from tests.benchmarks.bench_training import MODEL
from tests.benchmarks.figures import emit
from tests.benchmarks.memory import PeakMemory
from tests.clustering.embedded import embedded_workspace
from tests.data_folder import require_data_folder

PAIRS = "pairs/msdocs.parquet"
PARTS = ["scoring", "steps", "memory"]


def cpu_seconds(work: Callable[[], Any]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def real_workspace(folder: Path, pairs: int) -> RunConfig:
    """Return the configuration of a workspace with so many real pairs, ingested."""
    table = pq.read_table(require_data_folder() / PAIRS)
    pq.write_table(table.slice(0, pairs), folder / "pairs.parquet")
    config = RunConfig.model_validate(
        {
            "workspace": str(folder / "workspace"),
            "corpus": {"paths": [str(folder / "pairs.parquet")], "decontaminate": "off"},
            "embed": {"model": MODEL, "device": "cpu", "tokenizers": 0},
            "cluster": {"device": "cpu", "mean_size": 256},
            "score": {"teacher": MODEL, "device": "cpu", "max_tokens": 256},
            "evaluate": {"holdout": 0},
            "train": {"model": MODEL},
        }
    )
    ingest(config)
    return config


def scoring(config: RunConfig, rounds: int) -> None:
    """Print the CPU time of the stage against that of embedding the same rows with the same model."""
    spent: dict[str, list[float]] = {"embed": [], "score": []}
    for _ in range(rounds):
        spent["embed"].append(cpu_seconds(lambda: embed(config, force=True)))
        cluster(config, force=True)
        spent["score"].append(cpu_seconds(lambda: score(config, force=True)))
    found = details_of(Workspace(config).scores().require(), ScoresDetails)
    medians = {name: float(np.median(each)) for name, each in spent.items()}
    emit(
        "scoring in-cluster candidates against embedding with the same model, CPU time",
        medians["score"],
        "s",
        peer=medians["embed"],
        rows=Workspace(config).corpus.require().counts.written,
        candidates=found["candidates"],
    )


def backbone_training(steps: int) -> TrainingStep:
    encoder = load_encoder(resolve_model(MODEL), "backbone", device="cpu")
    return TrainingStep(encoder, TrainConfig(encoder="backbone"), steps, World())


def steps(config: RunConfig, encoder: str, size: int, rounds: int, count: int) -> None:
    """Print the CPU time of a step with the teacher's mask against one without."""
    clusters = Workspace(config).clusters()
    # The first steps of a static encoder update its whole table.
    warm = WARM if encoder == "static" else 1
    total = warm + rounds * count
    arms = {}
    for name, scores in (("masked", Workspace(config).scores()), ("unmasked", None)):
        changed = with_changes(config, {"batches.size": size})
        training = (static_training if encoder == "static" else backbone_training)(total + 1)
        if scores is not None:
            mask = training.config.mask.model_copy(update={"teacher_margin": -0.05, "teacher_relative": True})
            training.loss._config = training.config = training.config.model_copy(update={"mask": mask})
        plan = open_plan(changed, clusters, clusters.require())
        arms[name] = training, iter(SliceLoader(plan, ShardReader(clusters, scores), 0, 1, 0, total))
    spent: dict[str, list[float]] = {name: [] for name in arms}
    rate = []

    def run(name: str, number: int) -> None:
        training, batches = arms[name]
        for _ in range(number):
            result = training.run(next(batches))
            if name == "masked":
                rate.append(result.mask_rate)

    for name in arms:
        run(name, warm)
    for number in range(rounds):
        for name in list(arms)[:: 1 if number % 2 == 0 else -1]:
            spent[name].append(cpu_seconds(lambda name=name: run(name, count)) / count)
    medians = {name: 1e3 * float(np.median(each)) for name, each in spent.items()}
    emit(
        "step with a teacher's mask against one without, CPU time",
        medians["masked"],
        "ms",
        peer=medians["unmasked"],
        case=f"{encoder}, batch {size}",
        mask_rate=round(float(np.mean(rate)), 5),
        rounds={name: [round(1e3 * each, 2) for each in found] for name, found in spent.items()},
    )


def memory(rows: int) -> None:
    """Print the peak memory of the stage over `rows` rows and over ten times as many."""
    peaks, seconds = {}, {}
    for times in (1, 10):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "tests.benchmarks.bench_score", "--memory-of", folder]
            subprocess.run([*command, "--rows", str(times * rows), "--prepare"], check=True)
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            peaks[times], seconds[times] = map(float, done.stdout.split()[-2:])
    emit(
        "scoring, peak memory at ten times the rows",
        peaks[10] / 2**20,
        "MiB",
        peer=peaks[1] / 2**20,
        rows=10 * rows,
        seconds=[seconds[1], seconds[10]],
    )


def _memory_of(folder: Path, rows: int | None) -> None:
    """Make a workspace of `rows` rows, clustered; or, if None, score it and print the peak memory in bytes and the
    seconds that it took."""
    settings = {
        "ray": {"mode": "local"},
        "cluster": {"device": "cpu", "mean_size": 1000},
        "score": {"teacher": MODEL, "device": "cpu"},
        "train": {"model": MODEL},
    }
    if rows is None:
        config = RunConfig.model_validate({"workspace": str(folder / "workspace"), **settings})
        with PeakMemory() as peak:
            manifest = score(config)
        print(peak.bytes, round(manifest.seconds, 1))
        return
    cluster(embedded_workspace(str(folder / "workspace"), {"made-up": rows}, row_group_rows=1024, settings=settings))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60, help="of a round")
    parser.add_argument("--only", choices=PARTS, help="print the figures of this part alone")
    parser.add_argument("--rows", type=int, default=2000, help="of the smaller workspace whose memory is measured")
    parser.add_argument("--memory-of", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--prepare", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.memory_of:
        _memory_of(options.memory_of, options.rows if options.prepare else None)
        return
    parts = [options.only] if options.only else PARTS
    if parts != ["memory"]:
        with using(InProcessExecutor()), tempfile.TemporaryDirectory() as folder:
            config = real_workspace(Path(folder), options.pairs)
            scoring(config, max(1, options.rounds // 2))
            if "steps" in parts:
                for size in (32, 256):
                    steps(config, "static", size, options.rounds, options.steps)
                steps(config, "backbone", 32, options.rounds, max(1, options.steps // 20))
    if "memory" in parts:
        memory(options.rows)


if __name__ == "__main__":
    main()
