"""The plan of 10^9 pairs in 10^5 clusters, followed by 1,000 simulated ranks in a few processes: `python -m
tests.benchmarks.bench_scale [--rows N] [--clusters N] [--ranks N]`. Texts are not made; all else is what a run does:
the index is read from its Parquet table, every process builds the plan for itself, and each rank takes its slice of
every step. Prints one JSON line per figure.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import resource
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clusterbatch.batches.plan import BatchPlan
from clusterbatch.config import BatchesConfig
from clusterbatch.schema import CLUSTER_INDEX
from clusterbatch.shards.index import ClusterIndex
from tests.benchmarks.figures import emit

RUN_ROWS, SOURCES, PROCESSES = 64, 12, 2
ROW_BYTES, SHARD_BYTES = 1_900, 2**30
# A run each: with less, two ranks read every run between them.
ROWS_PER_RANK = RUN_ROWS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=float, default=1e9)
    parser.add_argument("--clusters", type=int, default=100_000)
    parser.add_argument("--ranks", type=int, default=1_000)
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "index.parquet"
        pq.write_table(index_table(int(options.rows), options.clusters), path, compression="zstd")
        report("bytes of the cluster index as Parquet", path.stat().st_size, "bytes", options)
        arguments = [
            (str(path), options.ranks, options.steps, range(rank, options.ranks, PROCESSES))
            for rank in range(PROCESSES)
        ]
        # Fresh processes: nothing of the index's making is in their memory.
        with ProcessPoolExecutor(PROCESSES, multiprocessing.get_context("spawn")) as pool:
            found = list(pool.map(follow, *zip(*arguments, strict=True)))
    first = found[0]
    report("time to read the index", first["read_seconds"], "s", options)
    report("time to build the plan", first["plan_seconds"], "s", options)
    report("time for the first batch", first["first_seconds"], "s", options)
    report("time for a batch at any step", statistics.median(first["step_seconds"]), "s", options)
    report("the same, slowest", max(first["step_seconds"]), "s", options)
    report("memory of index and plan", max(process["bytes"] for process in found), "bytes", options)
    report("steps of the epoch", first["steps_per_epoch"], "steps", options)
    assert all(process["digests"] == first["digests"] for process in found), "processes disagree on a batch"
    report("processes that agree on every batch", len(found), "processes", options)
    covered = sum((np.asarray(process["covered"]) for process in found), np.zeros(options.steps))
    assert np.all(covered == options.ranks * ROWS_PER_RANK), "slices are not the batch"
    report("rows that all slices of a step hold, of those in the batch", 1.0, "ratio", options)
    requests = np.concatenate([process["requests"] for process in found])
    report("runs that a rank reads for a step", float(requests.mean()), "runs", options)
    shared = np.concatenate([process["runs"] for process in found]).sum() / sum(first["distinct_runs"])
    report("runs read, of the runs that a batch touches", float(shared), "ratio", options)


def index_table(rows: int, clusters: int) -> pa.Table:
    """A cluster index with sizes spread as k-means leaves them (log-normal, sigma 0.5), shards of a gibibyte."""
    random = np.random.default_rng(0)
    weights = random.lognormal(0.0, 0.5, clusters)
    sizes = np.maximum(1, weights / weights.sum() * rows).astype(np.int64)
    source = np.sort(random.integers(0, SOURCES, clusters))
    row_bytes = sizes * ROW_BYTES
    shard = np.cumsum(row_bytes) // SHARD_BYTES
    begins = np.concatenate([[True], np.diff(shard) > 0])
    columns = {"rows": sizes, "runs": -(-sizes // RUN_ROWS), "bytes": row_bytes}
    inside = {}
    for name, values in columns.items():
        before = np.cumsum(values) - values
        inside[name] = before - before[begins][np.cumsum(begins) - 1]
    starts = np.searchsorted(source, source)
    values = {
        "source": pa.array([f"source-{number:02d}" for number in source]),
        "cluster": np.arange(clusters) - starts,
        "piece": np.zeros(clusters, np.int32),
        "shard": shard - shard[0],
        "first_row": inside["rows"],
        "rows": sizes,
        "first_run": inside["runs"],
        "first_byte": inside["bytes"],
        "bytes": row_bytes,
        "mean_cosine": np.full(clusters, 0.6, np.float32),
    }
    return pa.table({field.name: pa.array(values[field.name]).cast(field.type) for field in CLUSTER_INDEX}).cast(
        CLUSTER_INDEX
    )


def follow(path: str, ranks: int, steps: int, mine: range) -> dict[str, Any]:
    """What the ranks `mine` of `ranks` do at some steps of an epoch; every one works out the batch for itself."""
    before = peak_bytes()
    clock = Clock()
    index = ClusterIndex.from_table(pq.read_table(path), RUN_ROWS, "simulated")
    read_seconds = clock.lap()
    plan = BatchPlan(index, BatchesConfig(size=ranks * ROWS_PER_RANK))
    plan_seconds = clock.lap()
    plan.batch(0)
    result: dict[str, Any] = {
        "read_seconds": read_seconds,
        "plan_seconds": plan_seconds,
        "first_seconds": clock.lap(),
        "steps_per_epoch": plan.steps_per_epoch,
        **{name: [] for name in ("step_seconds", "digests", "covered", "requests", "runs", "distinct_runs")},
    }
    for step in np.linspace(0, plan.steps_per_epoch - 1, steps).astype(int).tolist():
        clock.lap()
        batch = plan.batch(step)
        bounds = batch.slice_bounds(ranks, RUN_ROWS)
        result["step_seconds"].append(clock.lap())
        runs = index.first_run[batch.piece] + batch.row // RUN_ROWS + (index.shard[batch.piece].astype(np.int64) << 32)
        result["digests"].append(
            hashlib.sha256(batch.piece.tobytes() + batch.row.tobytes() + bounds.tobytes()).hexdigest()
        )
        read = [len(np.unique(runs[bounds[rank] : bounds[rank + 1]])) for rank in mine]
        result["requests"] += read
        result["runs"].append(sum(read))
        result["distinct_runs"].append(len(np.unique(runs)))
        result["covered"].append(sum(int(bounds[rank + 1] - bounds[rank]) for rank in mine))
    result["bytes"] = peak_bytes() - before
    return result


class Clock:
    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap."""
        now = time.perf_counter()
        last, self._last = self._last, now
        return now - last


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def report(figure: str, value: float, unit: str, options: argparse.Namespace) -> None:
    emit(f"simulated run, {figure}", value, unit, case=f"{options.rows:.0e} pairs, {options.ranks} ranks")


if __name__ == "__main__":
    main()
