"""The whole stage on an embedded workspace: `python -m tests.benchmarks.bench_shards WORKSPACE [--clusters 10 100]`.

For each number of clusters (over the whole corpus) and of workers: files, bytes, write amplification, rows in and out,
seconds, and the most memory that driver and workers held together. Clusters are written into a temporary workspace that
reads the corpus and the embeddings of WORKSPACE. Prints one JSON line per figure.
"""

from __future__ import annotations

import argparse
import tempfile
import time

from clusterbatch.config import RunConfig
from clusterbatch.shards import stage
from clusterbatch.shards.reader import ROWS
from clusterbatch.store import Artifact
from tests.benchmarks.figures import emit
from tests.benchmarks.memory import PeakMemory


def measure(workspace: str, clusters: int, workers: int, shard_bytes: int, scope: str) -> None:
    written: list[int] = []
    commit = Artifact.commit

    def counting(self: Artifact, *arguments: object, **keywords: object) -> object:
        manifest = commit(self, *arguments, **keywords)  # type: ignore[arg-type]
        written.append(sum(part.bytes for part in manifest.parts))
        return manifest

    with tempfile.TemporaryDirectory() as folder:
        config = RunConfig.model_validate(
            {
                "workspace": folder,
                "reuse": {"corpus": workspace, "embeddings": workspace},
                "cluster": {"clusters": clusters, "scope": scope, "workers": workers, "shard_bytes": shard_bytes},
                "ray": {"object_store_memory": 300 * 2**20, "num_cpus": 2},
            }
        )
        Artifact.commit = counting  # type: ignore[method-assign, assignment]
        start = time.perf_counter()
        try:
            with PeakMemory() as memory:
                manifest = stage.cluster(config)
        finally:
            Artifact.commit = commit  # type: ignore[method-assign]
        seconds = time.perf_counter() - start
    training = [part for part in manifest.parts if "shard" in part.details and part.details["content"] != ROWS]
    final = sum(part.bytes for part in manifest.parts)
    emit(
        "cluster, write amplification of the stage",
        sum(written) / final,
        case=f"{clusters} clusters, {workers} workers",
        scope=scope,
        shard_bytes=shard_bytes,
        seconds=seconds,
        rows_in=manifest.counts.read,
        rows_out=manifest.counts.written,
        set_aside=manifest.counts.set_aside,
        shards=manifest.details["shards"],
        files=len(manifest.parts),
        training_and_vector_bytes=sum(part.bytes for part in training),
        bytes=final,
        mean_cosine={name: fit["mean_cosine"] for name, fit in manifest.details["fit"].items()},
        peak_memory_bytes=memory.bytes,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workspace")
    parser.add_argument("--clusters", type=int, nargs="+", default=[10, 100, 1000, 5000])
    parser.add_argument("--workers", type=int, nargs="+", default=[2])
    parser.add_argument("--shard-bytes", type=int, default=64 * 2**20)
    parser.add_argument("--scope", choices=["source", "corpus"], default="corpus")
    options = parser.parse_args()
    for workers in options.workers:
        for clusters in options.clusters:
            measure(options.workspace, clusters, workers, options.shard_bytes, options.scope)


if __name__ == "__main__":
    main()
