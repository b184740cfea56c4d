"""Clustered against random batches: the same pairs per second, and hardly a wait for data.

    python -m tests.benchmarks.bench_strategies [--pairs 20000] [--steps 60] [--rounds 3] [--workspace URI]

Real pairs (CLUSTERBATCH_DATA) in shards as the cluster stage writes them for each strategy; which rows share a cluster
does not matter for speed, so clusters here are consecutive rows. One worker, a static encoder: the cheapest step there
is, so the hardest to keep fed. Rounds take turns; one JSON line. `--workspace s3://...` reads from object storage.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import torch

from clusterbatch.config import RunConfig
from clusterbatch.encoder.resolve import resolve_model
from clusterbatch.encoder.tokenizer import Tokenizer
from clusterbatch.schema import token_type
from clusterbatch.shards.layout import ShardSchema
from clusterbatch.shards.reader import INDEX, index_table
from clusterbatch.shards.writer import ShardWriter
from clusterbatch.store import Counts, Receipt
from clusterbatch.store.tables import write_parquet
from clusterbatch.store.workspace import Workspace
from clusterbatch.training.collectives import World
from clusterbatch.training.metrics import read_metrics
from clusterbatch.training.worker import TrainingJob, run_worker
from tests.benchmarks.bench_training import MODEL, real_pairs
from tests.benchmarks.figures import emit

CLUSTER_ROWS, RUN_ROWS, BATCH = 1000, 64, 256
# The first steps fill caches and start threads.
WARM_UP = 10


def write_shards(config: RunConfig, pairs: list[tuple[str, str]], strategy: str) -> None:
    """A committed clusters artifact of one source: clusters of 1,000 rows, or (random) one of all rows."""
    tokenizer = Tokenizer(resolve_model(MODEL), special_tokens=False)
    layout = ShardSchema(tokenizer.vocabulary, RUN_ROWS)
    kind, numbers = token_type(tokenizer.vocabulary), np.arange(len(pairs), dtype=np.uint64)
    table = pa.table(
        {
            "query_tokens": tokenizer.encode([query for query, _ in pairs], 64).to_arrow(kind),
            "document_tokens": tokenizer.encode([document for _, document in pairs], 256).to_arrow(kind),
            "query_hash": numbers,
            "document_hash": numbers,
        }
    )
    artifact = Workspace(config).clusters()
    writer = ShardWriter(layout)
    rows = CLUSTER_ROWS if strategy == "cluster" else len(pairs)
    for cluster, start in enumerate(range(0, len(pairs), rows)):
        piece = table.slice(start, rows)
        text = pa.table({"pair_id": [str(start + row) for row in range(piece.num_rows)]})
        writer.add(piece, text, source="pairs", cluster=cluster, piece=0, mean_cosine=0.5)
    parts = writer.write(artifact, "shard-0", shard=0)
    pieces = [{**piece, "shard": 0} for piece in writer.pieces]
    artifact.commit(
        "benchmark",
        [Receipt(unit=0, fingerprint="", parts=parts, counts=Counts(read=len(pairs), written=len(pairs)))],
        config={"stratify": strategy},
        inputs={},
        seconds=0.0,
        details={"layout": asdict(layout)},
        extra_parts=[write_parquet(artifact, "index", index_table(pieces), content=INDEX)],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=20_000)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workspace")
    options = parser.parse_args()
    pairs = real_pairs(options.pairs)
    rates: dict[str, list[float]] = {"cluster": [], "random": []}
    waits: dict[str, list[float]] = {"cluster": [], "random": []}
    with TemporaryDirectory() as folder:
        jobs = {}
        for strategy in rates:
            config = RunConfig.model_validate(
                {
                    "workspace": f"{options.workspace or folder}/{strategy}",
                    "batches": {"size": BATCH, "stratify": strategy},
                    "train": {"steps": options.steps, "learning_rate": 0.01, "trackers": []},
                }
            )
            write_shards(config, pairs, strategy)
            jobs[strategy] = TrainingJob(config, 0, options.steps, config.train.model, "benchmark")
        for number in range(options.rounds):
            for strategy in rates if number % 2 == 0 else reversed(rates):
                job = jobs[strategy]
                job.folder.remove()
                run_worker(job, World(), torch.device("cpu"))
                lines = [json.loads(line) for line in read_metrics(job.folder).splitlines()][WARM_UP:]
                seconds = sum(line["seconds"] for line in lines)
                rates[strategy].append(sum(line["pairs"] for line in lines) / seconds)
                waits[strategy].append(sum(line["data_wait"] * line["seconds"] for line in lines) / seconds)
    clustered, mixed = (float(np.median(rates[strategy])) for strategy in ("cluster", "random"))
    rounds = {strategy: [round(rate) for rate in found] for strategy, found in rates.items()}
    emit("clustered against random batches, difference of pairs/s", abs(clustered / mixed - 1), rounds=rounds)
    emit("clustered batches, share of time spent waiting for data", float(np.median(waits["cluster"])))


if __name__ == "__main__":
    main()
