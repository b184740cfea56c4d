"""Reading and sorting a generated corpus, against DuckDB on the same machine.

    python -m tests.benchmarks.bench_scale_peers [--pairs 1e6] [--folder FOLDER] [--rounds 2] [--memory 4]
        [--steps read sort]

DuckDB (`pip install duckdb`) has --memory GiB and two threads; this project two processes. Two steps of the pipeline
that an analytical database does as well:

- read: files of Parquet and gzipped JSON Lines, without rows that lack text, equal pairs once, to Parquet. Here it is
  `ingest` without Ray, which besides keeps rejected rows with their reasons, compares texts after normalisation, and
  may be killed at any moment; DuckDB silently skips what it cannot read.
- sort: rows by (cluster, hash) into Parquet, text and two vectors of 384 float16 numbers each. Here it is the shuffle
  through files that `cluster` uses: units of some thousand rows are bucketed, then every bucket sorted and written; no
  process holds more than a unit or a bucket. Clusters are drawn at random: their meaning does not matter here.

Each contender is a process of its own; rounds take turns. CPU seconds and memory (PSS) are those of the process and
all its children, looked at twice a second. One JSON line per figure.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clusterbatch.config.load import load_config
from clusterbatch.corpus.ingest import ingest
from clusterbatch.embedding.vectors import task_rows
from clusterbatch.store import Artifact, Folder, Part
from clusterbatch.store.shuffle import bucket_rows, read_bucket, write_buckets
from clusterbatch.store.tables import parquet_bytes, vector_column
from tests.benchmarks.bench_scale_end_to_end import Watched
from tests.benchmarks.figures import emit
from tests.benchmarks.generated_corpus import write_corpus

CLUSTER_ROWS, DIMENSIONS, PROCESSES = 512, 384, 2
STEPS = ["read", "sort"]
BUCKET_BYTES = 256 * 2**20
COLUMNS = "{query: 'VARCHAR', document: 'VARCHAR', source: 'VARCHAR'}"


def read_here(folder: Path, out: Path, memory: int) -> int:
    words = [f"workspace={out}", f"corpus.paths=[{folder / 'pairs'}]", "ray.mode=local", f"corpus.workers={PROCESSES}"]
    return ingest(load_config(None, words)).counts.written


def read_duckdb(folder: Path, out: Path, memory: int) -> int:
    pairs = folder / "pairs"
    database = _duckdb(out, memory)
    database.execute(
        f"""
        COPY (
            SELECT DISTINCT ON (source, query, document) query, document, source FROM (
                SELECT query, document, source FROM read_parquet('{pairs}/*.parquet')
                UNION ALL
                SELECT query, document, source FROM read_json(
                    '{pairs}/*.jsonl.gz', format = 'newline_delimited', columns = {COLUMNS}, ignore_errors = true
                )
            )
            WHERE trim(query) <> '' AND trim(document) <> '' AND trim(source) <> ''
        ) TO '{out}/rows.parquet' (FORMAT parquet, COMPRESSION zstd)
        """
    )
    return pq.ParquetFile(out / "rows.parquet").metadata.num_rows


def sort_here(folder: Path, out: Path, memory: int) -> int:
    file = pq.ParquetFile(folder / "rows.parquet")
    rows = file.metadata.num_rows
    each = sum(file.metadata.row_group(n).total_byte_size for n in range(file.num_row_groups)) / rows
    buckets = max(1, int(rows * each / BUCKET_BYTES))
    clusters = file.read(["cluster"])["cluster"].to_numpy()
    # Buckets are ranges of clusters with about as many rows.
    bounds = np.quantile(clusters, np.arange(1, buckets) / buckets)
    group_rows = file.metadata.row_group(0).num_rows
    step = max(1, round(task_rows(rows) / group_rows))
    tasks = [list(range(n, min(n + step, file.num_row_groups))) for n in range(0, file.num_row_groups, step)]
    with ProcessPoolExecutor(PROCESSES) as pool:
        parts = list(pool.map(partial(_bucketed, folder, out, bounds), range(len(tasks)), tasks))
        written = pool.map(partial(_sorted, out, parts), range(buckets))
        return sum(written)


def _bucketed(folder: Path, out: Path, bounds: np.ndarray, unit: int, groups: list[int]) -> Part:
    table = pq.ParquetFile(folder / "rows.parquet").read_row_groups(groups)
    bucket = np.searchsorted(bounds, table["cluster"].to_numpy(), side="right")
    return write_buckets(Artifact(Folder(str(out)), "rows"), unit, table, bucket, len(bounds) + 1)


def _sorted(out: Path, parts: list[Part], bucket: int) -> int:
    artifact = Artifact(Folder(str(out)), "rows")
    table = read_bucket(artifact, parts, bucket)
    assert table is not None
    assert table.num_rows == bucket_rows(artifact, parts)[bucket]
    order = np.lexsort((table["hash"].to_numpy(), table["cluster"].to_numpy()))
    data = parquet_bytes(table.take(pa.array(order)), row_group_rows=8192)
    artifact.write_part(f"sorted-{bucket:05d}", "parquet", memoryview(data), table.num_rows)
    return table.num_rows


def sort_duckdb(folder: Path, out: Path, memory: int) -> int:
    database = _duckdb(out, memory)
    database.execute(
        f"""
        COPY (SELECT * FROM read_parquet('{folder}/rows.parquet') ORDER BY cluster, hash)
        TO '{out}/sorted.parquet' (FORMAT parquet, COMPRESSION zstd, ROW_GROUP_SIZE 8192)
        """
    )
    return pq.ParquetFile(out / "sorted.parquet").metadata.num_rows


def _duckdb(out: Path, memory: int) -> Any:
    import duckdb

    out.mkdir(parents=True, exist_ok=True)
    database = duckdb.connect()
    database.execute(f"SET threads = {PROCESSES}; SET memory_limit = '{memory}GiB'; SET temp_directory = '{out}/spill'")
    database.execute("SET preserve_insertion_order = false")
    return database


CONTENDERS: dict[str, Callable[[Path, Path, int], int]] = {
    "read ours": read_here,
    "read DuckDB": read_duckdb,
    "sort ours": sort_here,
    "sort DuckDB": sort_duckdb,
}


def write_sortable(folder: Path) -> None:
    """Write the rows of `folder`/corpus with clusters, hashes and random vectors, unless that was done."""
    path = folder / "rows.parquet"
    if path.exists():
        return
    source = Artifact(Folder(str(folder / "corpus" / "corpus")), "corpus")
    numbers = np.random.default_rng(0)
    parts = [part for part in source.require().parts if part.details.get("role") == "pairs"]
    rows = sum(part.rows for part in parts)
    temporary = path.with_suffix(".part")
    writer = None
    for part in parts:
        file = pq.ParquetFile(f"{source.folder.uri.removeprefix('file://')}/{part.path}")
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, ["pair_id", "source", "query", "document"])
            columns = {
                "cluster": numbers.integers(0, max(1, rows // CLUSTER_ROWS), table.num_rows),
                "hash": numbers.integers(0, 2**63, table.num_rows).astype(np.uint64),
            }
            for side in ("query", "document"):
                vectors = numbers.standard_normal((table.num_rows, DIMENSIONS), np.float32).astype(np.float16)
                # Numbers of two bytes: not every reader takes float16.
                columns[f"{side}_vector"] = vector_column(vectors.view(np.int16))
            for name, column in columns.items():
                table = table.append_column(name, pa.array(column) if isinstance(column, np.ndarray) else column)
            writer = writer or pq.ParquetWriter(temporary, table.schema, compression="zstd")
            writer.write_table(table)
    assert writer is not None
    writer.close()
    temporary.rename(path)


def measured(name: str, folder: Path, memory: int) -> dict[str, float]:
    """Run a contender in a process of its own; return its wall and CPU seconds, its memory in bytes, and rows."""
    with tempfile.TemporaryDirectory(dir=folder) as out:
        words = ["--serve", name, "--out", out, "--folder", str(folder), "--memory", str(memory)]
        log = Path(out) / "log"
        done = Watched([sys.executable, "-m", "tests.benchmarks.bench_scale_peers", *words], log)
        assert done.code == 0, f"{name} ended with {done.code}: {log.read_text()}"
        figures = {"seconds": done.seconds, "cpu_seconds": done.cpu_seconds, "bytes": done.all_bytes}
        return {**figures, "rows": json.loads(log.read_text().splitlines()[-1])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=float, default=1e6)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--memory", type=int, default=4)
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        print(CONTENDERS[options.serve](options.folder, options.out / "out", options.memory))
        return
    with tempfile.TemporaryDirectory() as temporary:
        compare(
            (options.folder or Path(temporary)).resolve(),
            int(options.pairs),
            options.rounds,
            options.memory,
            options.steps,
        )


def compare(folder: Path, pairs: int, rounds: int, memory: int, steps: list[str]) -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    write_corpus(folder / "pairs", pairs)
    if "sort" in steps and not (folder / "rows.parquet").exists():
        read_here(folder, folder / "corpus", memory)
        write_sortable(folder)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS if name.split()[0] in steps}
    for _ in range(rounds):
        for name, each in found.items():
            each.append(measured(name, folder, memory))
    for step in steps:
        ours, peer = found[f"{step} ours"], found[f"{step} DuckDB"]
        emit(
            f"CPU seconds to {step} a corpus",
            min(each["cpu_seconds"] for each in ours),
            "s",
            case=f"{pairs:,} pairs",
            peer=min(each["cpu_seconds"] for each in peer),
            rounds={"ours": ours, "DuckDB": peer},
        )


if __name__ == "__main__":
    main()
