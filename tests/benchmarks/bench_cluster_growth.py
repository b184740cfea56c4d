"""The clustering stages as workers, nodes and rows grow, on real vectors.

    python -m tests.benchmarks.bench_cluster_growth workers WORKSPACE [--clusters 1000]
    python -m tests.benchmarks.bench_cluster_growth memory  WORKSPACE [--clusters 20]

workers: one distributed fit by one and by two workers of a local Ray, then by one worker on each node of local clusters
of two and of three nodes; all of them share this machine's cores. The centroids must be the same, bit for bit.
memory: the whole stage on a tenth of the corpus and on all of it, in processes of their own, with the same number of
clusters and sizes of shard and object store: the most that driver, workers and Ray held. One JSON line per figure.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import ray
import torch
from ray.cluster_utils import Cluster

from clusterbatch.clustering.fit_distributed import RemoteRows
from clusterbatch.clustering.kmeans import FitSettings, fit
from clusterbatch.clustering.partial_sums import chunk_count
from clusterbatch.clustering.sample import SampleChunks
from clusterbatch.config import RayConfig, RunConfig
from clusterbatch.corpus.row_groups import read_row_group, row_groups_of
from clusterbatch.embedding.vectors import vector_column
from clusterbatch.encoder.devices import inference_dtype
from clusterbatch.runtime import Pool, ray_session
from clusterbatch.shards.stage import cluster
from clusterbatch.store import Artifact, Counts, Folder, Receipt
from clusterbatch.store.shuffle import write_buckets
from clusterbatch.store.workspace import Workspace
from tests.benchmarks.figures import emit
from tests.benchmarks.memory import PeakMemory
from tests.benchmarks.vectors import load_vectors

STORE_BYTES = 300 * 2**20
SHARD_BYTES = 8 * 2**20


def workers(place: str, clusters: int) -> None:
    vectors = load_vectors(place, 256 * clusters)
    first: np.ndarray | None = None
    with tempfile.TemporaryDirectory() as folder:
        sample, buckets = stored_sample(folder, vectors, clusters)
        for nodes, count in ((1, 1), (1, 2), (2, 2), (3, 3)):
            with local_cluster(nodes, count):
                rows = RemoteRows(sample, range(buckets), None, Pool(count), "cpu")
                start = time.perf_counter()
                found = fit(rows, FitSettings(clusters, dtype=inference_dtype("auto", torch.device("cpu"))))
                seconds = time.perf_counter() - start
                rows.close()
            centroids = found.centers.centroids
            first = centroids if first is None else first
            emit(
                "distributed fit",
                seconds,
                "s",
                case=f"{nodes} nodes, {count} workers",
                rows=len(vectors),
                dimensions=vectors.shape[1],
                clusters=clusters,
                rounds=len(found.history),
                mean_cosine=found.mean_cosine,
                same_centroids=bool(np.array_equal(centroids, first)),
            )


def stored_sample(folder: str, vectors: np.ndarray, clusters: int) -> tuple[SampleChunks, int]:
    """The vectors as the sampling pass leaves them, and in how many chunks."""
    buckets = chunk_count(len(vectors), clusters)
    bucket = np.arange(len(vectors)) * buckets // len(vectors)
    columns = {"position": np.arange(len(vectors), dtype=float), "vector": vector_column(vectors.astype(np.float16))}
    artifact = Artifact(Folder(folder), "sample")
    part = write_buckets(artifact, 0, pa.table(columns), bucket, buckets)
    return SampleChunks(artifact, [part], "document"), buckets


@contextmanager
def local_cluster(nodes: int, workers: int) -> Iterator[None]:
    """Ray on this machine: of several nodes, each a raylet with an object store of its own, or of one."""
    if nodes == 1:
        with ray_session(RayConfig(num_cpus=workers, object_store_memory=STORE_BYTES)):
            yield
        return
    options = {"object_store_memory": STORE_BYTES, "include_dashboard": False}
    started = Cluster(initialize_head=True, head_node_args={**options, "num_cpus": 0})
    try:
        for _ in range(nodes):
            started.add_node(**options, num_cpus=1)
        ray.init(started.address, log_to_driver=False, logging_level="error")
        yield
    finally:
        ray.shutdown()
        started.shutdown()


def memory(place: str, clusters: int) -> None:
    peaks = []
    with tempfile.TemporaryDirectory() as folder:
        for share in (10, 1):
            workspace = place if share == 1 else first_units(place, Path(folder) / "corpus", share)
            command = [sys.executable, "-m", "tests.benchmarks.bench_cluster_growth", "one", workspace]
            done = subprocess.run([*command, "--clusters", str(clusters)], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            peaks.append(json.loads(done.stdout.splitlines()[-1]))
            emit("cluster, seconds of the whole stage", peaks[-1]["seconds"], "s", case=f"{peaks[-1]['rows']:,} rows")
    small, large = (peak["peak_bytes"] / 2**20 for peak in peaks)
    rows = [peak["rows"] for peak in peaks]
    emit("cluster, peak memory at ten times the rows", large, "MiB", peer=small, rows=rows, clusters=clusters)


def first_units(place: str, folder: Path, share: int) -> str:
    """A workspace with the first of `share` equal parts of another one's units: its files by reference."""
    given, made = (Workspace(RunConfig(workspace=uri)) for uri in (place, str(folder)))
    corpus, embeddings = given.corpus.require(), given.embeddings().require()
    units = row_groups_of(corpus)
    units = units[: len(units) // share]
    groups: dict[str, list[int]] = {}
    sources: dict[str, int] = {}
    for unit in units:
        groups.setdefault(unit.path, []).append(unit.rows)
        of_unit = read_row_group(given.corpus, unit, ["source"])["source"].value_counts().to_pylist()
        for entry in of_unit:
            sources[entry["values"]] = sources.get(entry["values"], 0) + entry["counts"]
    rows = sum(unit.rows for unit in units)
    corpus_parts = [
        part.model_copy(
            update={"rows": sum(groups[part.path]), "details": {**part.details, "row_groups": groups[part.path]}}
        )
        for part in corpus.parts
        if part.path in groups
    ]
    for artifact, parts, origin, details in (
        (made.corpus, corpus_parts, given.corpus, {**corpus.details, "sources": sources}),
        (made.embeddings(), embeddings.parts[: len(units)], given.embeddings(), embeddings.details),
    ):
        Path(artifact.folder.path()).mkdir(parents=True)
        for part in parts:
            Path(artifact.folder.path(part.path)).symlink_to(Path(origin.folder.path(part.path)).resolve())
        receipt = Receipt(unit=0, fingerprint=f"1/{share}", parts=parts, counts=Counts(read=rows, written=rows))
        artifact.commit(f"1/{share}", [receipt], config={}, inputs={}, seconds=0.0, details=details)
    return str(folder)


def one(place: str, clusters: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        config = RunConfig.model_validate(
            {
                "workspace": folder,
                "reuse": {"corpus": place, "embeddings": place},
                "cluster": {"clusters": clusters, "scope": "corpus", "shard_bytes": SHARD_BYTES},
                "ray": {"object_store_memory": STORE_BYTES, "num_cpus": 2},
            }
        )
        start = time.perf_counter()
        with PeakMemory() as peak:
            manifest = cluster(config)
        seconds = round(time.perf_counter() - start, 1)
    print(json.dumps({"rows": manifest.counts.written, "seconds": seconds, "peak_bytes": peak.bytes}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figure", choices=["workers", "memory", "one"])
    parser.add_argument("workspace")
    parser.add_argument("--clusters", type=int, help="default: 1000 for workers, 20 for memory")
    options = parser.parse_args()
    if options.figure == "workers":
        workers(options.workspace, options.clusters or 1000)
    elif options.figure == "memory":
        memory(options.workspace, options.clusters or 20)
    else:
        one(options.workspace, options.clusters or 20)


if __name__ == "__main__":
    main()
