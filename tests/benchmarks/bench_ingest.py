"""Ingest of a synthetic corpus: `python -m tests.benchmarks.bench_ingest [--rows 200000 2000000]`.

For each size, in a process of its own: rows a second, files written, and the most memory that driver, workers and Ray's
own processes held together (PSS; the object store's size is fixed). The promise: ten times the rows take at most 1.15
times the memory. Prints one JSON line per figure.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from clusterbatch.config import RunConfig
from clusterbatch.corpus.ingest import ingest
from tests.benchmarks.figures import emit
from tests.benchmarks.memory import PeakMemory

_FILE_ROWS = 50_000


def write_corpus(folder: Path, rows: int) -> None:
    """Pairs of about 320 characters in 20 sources, every tenth of them a duplicate of the row before."""
    numbers = random.Random(0)
    words = [f"word{number}" for number in range(20_000)]
    paragraphs = [" ".join(numbers.choices(words, k=40)) for _ in range(2_000)]
    for first in range(0, rows, _FILE_ROWS):
        names = [number - (number % 10 == 9) for number in range(first, min(first + _FILE_ROWS, rows))]
        table = pa.table(
            {
                "query": [f"question {name} about {words[name % 20_000]}" for name in names],
                "document": [f"{name} {paragraphs[name * 7919 % 2_000]}" for name in names],
                "source": [f"source{name % 20}" for name in names],
            }
        )
        pq.write_table(table, folder / f"pairs-{first:09d}.parquet", row_group_size=10_000)


def measure(rows: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "in").mkdir()
        write_corpus(folder / "in", rows)
        config = RunConfig.model_validate(
            {
                "workspace": str(folder / "workspace"),
                "corpus": {"paths": [str(folder / "in")]},
                "ray": {"num_cpus": 2, "object_store_memory": 200 * 2**20},
            }
        )
        start = time.perf_counter()
        with PeakMemory() as memory:
            manifest = ingest(config)
        seconds = time.perf_counter() - start
    counts = manifest.counts
    assert counts.read == rows == counts.written + counts.rejected + sum(counts.set_aside.values())
    return {
        "rows": rows,
        "written": counts.written,
        "rejected": counts.rejected,
        "set_aside": sum(counts.set_aside.values()),
        "seconds": round(seconds, 1),
        "rows_per_second": round(rows / seconds),
        "files": len(manifest.parts),
        "input_bytes": manifest.details["input_bytes"],
        "written_bytes": sum(part.bytes for part in manifest.parts),
        "traffic": manifest.traffic.model_dump(),
        "peak_bytes": memory.bytes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[200_000, 2_000_000])
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.rows[0])))
        return
    results = []
    for rows in options.rows:
        command = [sys.executable, "-m", "tests.benchmarks.bench_ingest", "--one", "--rows", str(rows)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        results.append(json.loads(done.stdout.splitlines()[-1]))
        rate = results[-1].pop("rows_per_second")
        emit("ingest, rows/s of the whole stage", rate, "rows/s", case=f"{rows:,} rows", **results[-1])
    small, large = (result["peak_bytes"] / 2**20 for result in (results[0], results[-1]))
    emit("ingest, peak memory at ten times the rows", large, "MiB", peer=small, rows=options.rows)


if __name__ == "__main__":
    main()
