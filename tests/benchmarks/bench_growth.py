"""Growth of the parts of ingest and of sampling that once grew with the square of the rows.

    python -m tests.benchmarks.bench_growth [--cases held-out sample collection append] [--rows 1e5 2e5 4e5 8e5]

held-out: the choice of the pairs that are held out, 200 rows a source, in sketches of 10,000 rows. sample: the
neighbourhoods of a comparison, with vectors of the user's own. collection: the scatter of a compressed BEIR corpus.
append: 1,000 pairs more for a corpus whose near duplicates are set aside. Each size runs in a process of its own: its
seconds (wall and processor), the memory it took beyond its input, and the exponent of the growth of both over all
sizes (1: linear). One JSON line per figure.
"""

from __future__ import annotations

import argparse
import gzip
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa

from clusterbatch.config import RunConfig, load_config
from clusterbatch.corpus.find_inputs import find_inputs
from clusterbatch.corpus.holdout import SKETCH, choose, sketch
from clusterbatch.corpus.ingest import ingest
from clusterbatch.corpus.row_groups import PAIRS
from clusterbatch.embedding.vectors import vector_column
from clusterbatch.experiments.compare.sample import sample_corpus
from clusterbatch.schema import corpus_schema
from clusterbatch.store import Counts, Receipt
from clusterbatch.store.tables import write_parquet
from clusterbatch.store.workspace import Workspace
from tests.benchmarks.figures import emit

_SKETCH_ROWS, _ROWS_OF_SOURCE, _HELD_OUT = 10_000, 200, 2000
_PART_ROWS, _GROUP_ROWS, _DIMENSIONS = 50_000, 8192, 32
_ADDED = 1000


def held_out(folder: Path, rows: int) -> Callable[[], object]:
    random = np.random.default_rng(0)
    source = pa.array([f"site {number}" for number in range(rows // _ROWS_OF_SOURCE)])
    of_row = pa.array(np.sort(random.integers(0, len(source), rows)))
    hashes = [pa.array(random.integers(0, 2**63, rows).astype(np.uint64)) for _ in range(2)]
    table = pa.table([source.take(of_row), *hashes], schema=SKETCH)
    pieces = [table.slice(start, _SKETCH_ROWS) for start in range(0, rows, _SKETCH_ROWS)]
    return lambda: choose([sketch(piece, _HELD_OUT) for piece in pieces], _HELD_OUT)


def sample(folder: Path, rows: int) -> Callable[[], object]:
    config = _config(folder)
    artifact, random = Workspace(config).corpus, np.random.default_rng(0)
    parts = []
    for start in range(0, rows, _PART_ROWS):
        count = min(_PART_ROWS, rows - start)
        numbers = pa.array(np.arange(start, start + count, dtype=np.uint64))
        texts = pa.array([f"text {number}" for number in range(start, start + count)])
        ids = pa.array([f"{number:032x}" for number in range(start, start + count)])
        table = pa.table([ids, texts, texts, pa.array(["all"] * count), numbers, numbers], schema=corpus_schema())
        vectors = random.normal(size=(count, _DIMENSIONS)).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        for side in ("query", "document"):
            table = table.append_column(f"{side}_vector", vector_column(vectors.astype(np.float16)))
        parts.append(write_parquet(artifact, f"part-{start:09d}", table, _GROUP_ROWS, role=PAIRS))
    receipt = Receipt(unit=0, fingerprint="f", parts=parts, counts=Counts(read=rows, written=rows))
    details = {"sources": {"all": rows}, "dimensions": _DIMENSIONS}
    artifact.commit("f", [receipt], config={}, inputs={}, seconds=0.0, details=details)
    return lambda: sample_corpus(config, 0.1, "neighbourhoods")


def collection(folder: Path, rows: int) -> Callable[[], object]:
    place = folder / "collection"
    (place / "qrels").mkdir(parents=True)
    with gzip.open(place / "corpus.jsonl.gz", "wt", compresslevel=1) as file:
        for number in range(rows):
            file.write(json.dumps({"_id": f"d{number}", "text": f"document {number} says {number * 7919}"}) + "\n")
    with (place / "queries.jsonl").open("w") as file:
        file.writelines(
            json.dumps({"_id": f"q{number}", "text": f"question {number}"}) + "\n" for number in range(1000)
        )
    judged = "".join(f"q{number}\td{number}\t1\n" for number in range(1000))
    (place / "qrels/train.tsv").write_text(f"query-id\tcorpus-id\tscore\n{judged}")
    config = _config(folder, f"corpus.paths={place}")
    assert find_inputs(config.corpus, config.corpus.paths, config.storage)
    return lambda: ingest(config)


def append(folder: Path, rows: int) -> Callable[[], object]:
    place = folder / "pairs"
    place.mkdir()
    _write_pairs(place / "first.jsonl", range(rows))
    config = _config(folder, f"corpus.paths={place}", "corpus.near_duplicates=set_aside")
    ingest(config)
    _write_pairs(place / "second.jsonl", range(rows, rows + _ADDED))
    return lambda: ingest(config, append=True)


CASES = {"held-out": held_out, "sample": sample, "collection": collection, "append": append}


def _config(folder: Path, *words: str) -> RunConfig:
    own = [f"workspace={folder}/ws", "ray.mode=in-process", "evaluate.holdout=0", "corpus.decontaminate=exact"]
    return load_config(None, [*own, *([] if words else ["corpus.paths=unused"]), *words])


def _write_pairs(path: Path, numbers: range) -> None:
    with path.open("w") as file:
        for number in numbers:
            words = " ".join(f"w{number * step % 99_991}" for step in (1, 7, 31, 311, 1013, 7919))
            file.write(json.dumps({"query": f"question {number}", "document": words, "source": "all"}) + "\n")


def _one(case: str, rows: int) -> None:
    """Run one size in this process and print its figures."""
    with tempfile.TemporaryDirectory() as folder:
        call = CASES[case](Path(folder), rows)
        before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        call()
        seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        print(json.dumps({"seconds": seconds, "cpu": cpu, "mebibytes": (after.ru_maxrss - before.ru_maxrss) / 2**10}))


def exponent(sizes: list[int], values: list[float]) -> float:
    """Return the slope of the line through the logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(np.maximum(values, 1e-9)), 1)[0])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument(
        "--rows", nargs="+", type=lambda text: int(float(text)), default=[10**5 * 2**n for n in range(4)]
    )
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        _one(options.cases[0], options.rows[0])
        return
    for case in options.cases:
        found = []
        for rows in options.rows:
            words = [sys.executable, "-m", __spec__.name, "--one", "--cases", case, "--rows", str(rows)]
            done = subprocess.run(words, check=True, capture_output=True, text=True)
            found.append(json.loads(done.stdout.splitlines()[-1]))
            details = {"cpu_seconds": found[-1]["cpu"], "peak_mebibytes": found[-1]["mebibytes"]}
            emit("growth", found[-1]["seconds"], "s", case=f"{case}, {rows:,} rows", **details)
        if len(found) > 1:
            cpu = exponent(options.rows, [each["cpu"] for each in found])
            emit(
                "growth exponent",
                cpu,
                case=case,
                memory=exponent(options.rows, [max(1.0, each["mebibytes"]) for each in found]),
            )


if __name__ == "__main__":
    main()
