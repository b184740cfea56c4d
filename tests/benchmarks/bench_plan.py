"""The plan at scale: `python -m tests.benchmarks.bench_plan [--rows 1e9] [--clusters 100000] [--batch 1024]`.

Time to build, to address a step, to report on an epoch, and the peak of memory, for several distributions of cluster
sizes; each in a process of its own. Prints one JSON line per figure.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
from concurrent.futures import ProcessPoolExecutor

import numpy as np

from clusterbatch.batches.plan import BatchPlan
from clusterbatch.batches.plan_report import plan_report
from clusterbatch.config import BatchesConfig
from clusterbatch.shards.index import ClusterIndex
from tests.benchmarks.figures import emit

SOURCES, RUN_ROWS = 100, 64
DISTRIBUTIONS = ("equal", "lognormal", "heavy tail")


def cluster_sizes(kind: str, clusters: int, rows: int) -> np.ndarray:
    """(clusters,) int64 that add up to about `rows`."""
    random = np.random.default_rng(0)
    if kind == "equal":
        weights = np.ones(clusters)
    elif kind == "lognormal":
        weights = random.lognormal(0, 1, clusters)
    else:
        weights = random.pareto(1.2, clusters) + 0.01
    return np.maximum(1, weights / weights.sum() * rows).astype(np.int64)


def index_of(sizes: np.ndarray) -> ClusterIndex:
    runs = -(-sizes // RUN_ROWS)
    return ClusterIndex(
        sources=[f"source-{number}" for number in range(SOURCES)],
        source=np.sort(np.arange(len(sizes)) % SOURCES).astype(np.int32),
        cluster=np.arange(len(sizes), dtype=np.int32),
        rows=sizes,
        shard=np.zeros(len(sizes), np.int32),
        first_run=np.cumsum(runs) - runs,
        first_row=np.cumsum(sizes) - sizes,
        run_rows=RUN_ROWS,
        fingerprint=str(len(sizes)),
    )


def measure(kind: str, rows: int, clusters: int, batch: int, steps: int) -> dict[str, float]:
    index = index_of(cluster_sizes(kind, clusters, rows))
    before = peak_bytes()
    start = time.perf_counter()
    plan = BatchPlan(index, BatchesConfig(size=batch))
    built = time.perf_counter() - start
    chosen = np.random.default_rng(1).integers(0, plan.steps_per_epoch, steps).tolist()
    seconds = []
    for step in chosen:
        start = time.perf_counter()
        plan.batch(step)
        seconds.append(time.perf_counter() - start)
    stepped = peak_bytes()
    start = time.perf_counter()
    report = plan_report(plan)
    reported = time.perf_counter() - start
    return {
        "seconds to build": built,
        "milliseconds of a step, median": 1e3 * float(np.median(seconds)),
        # The first of a source, which makes its order for the epoch.
        "milliseconds of a step, slowest": 1e3 * max(seconds),
        "MiB that plan and steps add to the peak": (stepped - before) / 2**20,
        "seconds of the report on an epoch": reported,
        "MiB at the peak": peak_bytes() / 2**20,
        "steps per epoch": plan.steps_per_epoch,
        "purity": report["purity"],
        "packed share": report["packed_share"],
        "read amplification": report["read_amplification"],
    }


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=float, default=1e9)
    parser.add_argument("--clusters", type=int, default=100_000)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=2000)
    options = parser.parse_args()
    for kind in DISTRIBUTIONS:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            arguments = (kind, int(options.rows), options.clusters, options.batch, options.steps)
            figures = pool.submit(measure, *arguments).result()
        for name, value in figures.items():
            emit(f"plan, {name}", value, case=f"{kind} sizes", **vars(options))


if __name__ == "__main__":
    main()
