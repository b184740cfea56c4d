"""What a training step waits for its data: `python -m tests.benchmarks.bench_loader [--rows 40000] [--rounds 3]`.

A step of fixed length (a sleep: training on a GPU, or on other cores) is driven by the loader and, in turn, by batches
that are in memory already; the share of time lost to the first is the figure. Also the bytes read against those of the
columns, for several distributions of cluster sizes and batch sizes. Shards lie in a temporary folder, or under
CLUSTERBATCH_BENCH_URI (s3://bucket/prefix; CLUSTERBATCH_BENCH_ENDPOINT, credentials from the environment). Prints one
JSON line per figure.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterable
from typing import Any

import numpy as np

from clusterbatch.batches import BatchPlan, SliceLoader
from clusterbatch.batches.plan_report import plan_report
from clusterbatch.config import BatchesConfig, StorageConfig
from clusterbatch.shards.layout import TRAINING
from clusterbatch.shards.reader import ShardReader
from clusterbatch.store import Folder
from tests.batches.indexes import make_index
from tests.benchmarks.figures import emit
from tests.clustering.synthetic import build_shards

RUN_ROWS = 64


def sizes_of(kind: str, mean: int, rows: int) -> list[int]:
    random = np.random.default_rng(0)
    clusters = max(4, rows // mean)
    weights = {
        "equal": np.ones(clusters),
        "lognormal": random.lognormal(0, 0.7, clusters),
        "heavy tail": random.pareto(1.2, clusters) + 0.05,
    }[kind]
    return np.maximum(1, weights / weights.sum() * rows).astype(int).tolist()


def seconds_of(batches: Iterable[Any], step: float) -> tuple[float, int]:
    start, count = time.perf_counter(), 0
    for _ in batches:
        time.sleep(step)
        count += 1
    return time.perf_counter() - start, count


def waiting(reader: ShardReader, batch: int, step: float, rounds: int) -> dict[str, Any]:
    plan = BatchPlan(reader.index, BatchesConfig(size=batch))
    in_memory = list(SliceLoader(plan, reader, 0, 1, 0, plan.steps_per_epoch))
    loaded, held, waits = [], [], []
    for _ in range(rounds):
        loader = SliceLoader(plan, reader, 0, 1, 0, plan.steps_per_epoch)
        loaded.append(seconds_of(loader, step)[0])
        waits.append(loader.wait_seconds / loaded[-1])
        held.append(seconds_of(in_memory, step)[0])
    return {
        "value": round(1 - min(held) / min(loaded), 4),
        "waited": round(float(np.median(waits)), 4),
        "steps": len(in_memory),
        "rounds": rounds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=40_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--step", type=float, default=0.05, help="seconds of one training step")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as local:
        uri = os.environ.get("CLUSTERBATCH_BENCH_URI")
        storage = StorageConfig(endpoint_url=os.environ.get("CLUSTERBATCH_BENCH_ENDPOINT"))
        folder = Folder(uri, storage).child(f"bench-loader-{os.getpid()}") if uri else Folder(local)
        try:
            sizes = {"source": sizes_of("lognormal", 1024, options.rows)}
            artifact, _ = build_shards(folder, sizes, run_rows=RUN_ROWS, shard_rows=8192, dimensions=64)
            reader = ShardReader(artifact)
            for batch in (256, 1024):
                found = waiting(reader, batch, options.step, options.rounds)
                case = f"batch {batch}, {'s3' if uri else 'local'}"
                emit("loader, share of step time lost", found.pop("value"), case=case, step=options.step, **found)
            stored = sum(part.bytes for part in artifact.require().parts if part.details.get("content") == TRAINING)
            for batch in (256, 1024, 4096):
                plan = BatchPlan(reader.index, BatchesConfig(size=batch))
                loader = SliceLoader(plan, reader, 0, 1, 0, plan.steps_per_epoch)
                used = sum(len(slice_batch) for slice_batch in loader) / reader.index.total_rows
                figure, sizes = "loader, bytes read against bytes of the columns", "lognormal, 1,024"
                read, held = loader.bytes_read / 2**20, stored * used / 2**20
                emit(figure, read, "MiB", case=f"batch {batch}", peer=held, sizes=sizes)
        finally:
            if uri:
                folder.remove()
    predicted(25 * options.rows)


def predicted(rows: int) -> None:
    """Rows fetched / rows used for one worker, from the plan's report."""
    for kind in ("equal", "lognormal", "heavy tail"):
        for mean in (200, 512, 1000, 4000):
            index = make_index([sizes_of(kind, mean, rows)], run_rows=RUN_ROWS)
            for batch in (256, 512, 1024, 4096, 16_384):
                report = plan_report(BatchPlan(index, BatchesConfig(size=batch)))
                plan = {
                    "clusters_per_batch": report["sources"]["source-0"]["clusters_per_batch"],
                    "purity": round(report["purity"], 3),
                    "packed_share": round(report["packed_share"], 3),
                }
                case = f"{kind}, mean {mean}, batch {batch}"
                emit("loader, predicted rows fetched per row used", report["read_amplification"], case=case, **plan)


if __name__ == "__main__":
    main()
