"""The fit against faiss and scikit-learn on real vectors: `python -m tests.benchmarks.bench_kmeans VECTORS`.

VECTORS is a folder of .npy files or a workspace. All run in one process, in turn, with the same number of threads.
Prints one JSON line per figure; quality is the mean cosine of all rows to their nearest centroid.
"""

from __future__ import annotations

from collections.abc import Callable

import faiss
import numpy as np
import torch
from sklearn.cluster import MiniBatchKMeans

from clusterbatch.clustering.assign import Assigner
from clusterbatch.clustering.cells import apportion
from clusterbatch.clustering.features import unit_length
from clusterbatch.clustering.kmeans import FitSettings, fit
from clusterbatch.clustering.model import PartitionAssigner, PartitionModel
from clusterbatch.clustering.partial_sums import Centers, LocalRows
from clusterbatch.encoder.devices import inference_dtype
from clusterbatch.shards.statistics import gini
from tests.benchmarks.figures import emit
from tests.benchmarks.vectors import in_turn, load_vectors, vector_arguments

DTYPE = inference_dtype("auto", torch.device("cpu"))
# Contestant: how its figures are called.
PEERS = {
    "faiss, 25 iterations": "faiss with 25 iterations",
    "faiss, 10 iterations": "faiss with 10 iterations",
    "MiniBatchKMeans": "MiniBatchKMeans",
}


def ours(vectors: np.ndarray, clusters: int, sample_per_centroid: int = 256, passes: int = 4) -> np.ndarray:
    sample = vectors[: clusters * sample_per_centroid]
    settings = FitSettings(clusters, passes=passes, dtype=DTYPE)
    return fit(LocalRows.of(sample, clusters=clusters), settings).centers.centroids


def of_faiss(vectors: np.ndarray, clusters: int, iterations: int, all_points: bool = False) -> np.ndarray:
    # Parameters belong into the constructor: set afterwards they are ignored.
    most = len(vectors) if all_points else 256
    peer = faiss.Kmeans(
        vectors.shape[1], clusters, niter=iterations, spherical=True, seed=1, max_points_per_centroid=most
    )
    peer.train(vectors)
    return unit_length(peer.centroids)


def of_sklearn(vectors: np.ndarray, clusters: int) -> np.ndarray:
    peer = MiniBatchKMeans(clusters, batch_size=8192, n_init=1, random_state=1).fit(vectors)
    return unit_length(peer.cluster_centers_).astype(np.float32)


def two_levels(vectors: np.ndarray, clusters: int, sample_per_centroid: int) -> PartitionModel:
    """As the stage does it, without the passes: coarse clusters first, then the rows of each."""
    sample = vectors[: clusters * sample_per_centroid]
    number = round(clusters**0.5)
    coarse = ours(sample, number)
    labels = Assigner(coarse)(sample).labels.numpy()
    shares = np.bincount(labels, minlength=number) / len(sample)
    fine = []
    for cluster, wanted in enumerate(apportion(clusters, np.maximum(shares, 1e-9)).tolist()):
        rows = sample[labels == cluster]
        fine.append(Centers(ours(rows, wanted, len(rows)) if len(rows) else coarse[cluster : cluster + 1]))
    return PartitionModel(fine, np.ones(1), coarse=Centers(coarse))


def quality(vectors: np.ndarray, centroids: np.ndarray) -> float:
    return float(Assigner(centroids)(vectors).cosine.double().mean())


def against_peers(vectors: np.ndarray, clusters: int, rounds: int) -> None:
    contestants: dict[str, Callable[[], np.ndarray]] = {
        "clusterbatch": lambda: ours(vectors, clusters),
        # About as long as the peer's ten iterations take.
        "clusterbatch, 12 passes": lambda: ours(vectors, clusters, passes=12),
        "faiss, 25 iterations": lambda: of_faiss(vectors, clusters, 25),
        "faiss, 10 iterations": lambda: of_faiss(vectors, clusters, 10),
        "MiniBatchKMeans": lambda: of_sklearn(vectors, clusters),
    }
    found = in_turn(contestants, rounds)
    cosine = {name: quality(vectors, entry["result"]) for name, entry in found.items()}
    for name, peer in PEERS.items():
        for mine in ("clusterbatch", "clusterbatch, 12 passes"):
            details = {"case": mine, "rows": len(vectors), "dimensions": vectors.shape[1], "clusters": clusters}
            cpu = {who: found[who]["rounds_cpu"] for who in (mine, name)}
            times = found[mine]["seconds"], found[name]["seconds"]
            emit(f"k-means fit, seconds against {peer}", times[0], "s", peer=times[1], rounds_cpu=cpu, **details)
            emit(f"k-means fit, mean cosine against {peer}", cosine[mine], peer=cosine[name], **details)


def all_points(vectors: np.ndarray, clusters: int) -> None:
    found = in_turn({"faiss, 25 iterations, all points": lambda: of_faiss(vectors, clusters, 25, True)}, 1)
    for name, entry in found.items():
        value = quality(vectors, entry["result"])
        emit("k-means fit, mean cosine", value, case=name, clusters=clusters, cpu_seconds=entry["cpu"])


def sample_sizes(vectors: np.ndarray, clusters: int) -> None:
    for per_centroid in (32, 64, 128, 256, -(-len(vectors) // clusters)):
        entry = in_turn({"fit": lambda size=per_centroid: ours(vectors, clusters, size)}, 1)["fit"]
        value = quality(vectors, entry["result"])
        emit("k-means fit, mean cosine", value, case=f"{per_centroid} rows per centroid", cpu_seconds=entry["cpu"])


def growth(vectors: np.ndarray) -> None:
    """Of the fit, whose sample follows from the number of clusters, and of the assignment of all rows."""
    for clusters in (100, 300, 1000, 3000):
        for rows in (len(vectors) // 4, len(vectors) // 2, len(vectors)):
            fitted = in_turn({"fit": lambda n=rows, k=clusters: ours(vectors[:n], k)}, 1)["fit"]
            assigner = Assigner(fitted["result"])
            assigned = in_turn({"assign": lambda a=assigner, n=rows: a(vectors[:n])}, 1)["assign"]
            case = f"{rows:,} rows, {clusters} clusters"
            emit("k-means fit, growth", fitted["cpu"], "CPU s", case=case, sampled=min(rows, 256 * clusters))
            emit("assignment, growth", assigned["cpu"], "CPU s", case=case)


def levels(vectors: np.ndarray, clusters: int) -> None:
    """A tenth of the rows is kept from the fits: with few rows per centroid a fit flatters the rows that it saw."""
    seen = vectors[len(vectors) // 10 :]
    per_centroid = max(8, min(256, len(seen) // clusters))
    flat = in_turn({"fit": lambda: ours(seen, clusters, per_centroid)}, 1)["fit"]
    two = in_turn({"fit": lambda: two_levels(seen, clusters, per_centroid)}, 1)["fit"]
    for name, entry, model in (
        ("flat", flat, PartitionModel([Centers(flat["result"])], np.ones(clusters))),
        ("two levels", two, two["result"]),
    ):
        assigned = in_turn({"assign": lambda model=model: PartitionAssigner(model)(vectors)}, 1)["assign"]
        labels, cosine = assigned["result"]
        emit(
            "k-means fit, mean cosine of unseen rows",
            float(cosine[: -len(seen)].mean(dtype=np.float64)),
            case=f"{clusters:,} clusters, {name}",
            rows=len(vectors),
            fit_cpu_seconds=entry["cpu"],
            assign_cpu_seconds=assigned["cpu"],
            mean_cosine=float(cosine[-len(seen) :].mean(dtype=np.float64)),
            gini=gini(np.bincount(labels, minlength=clusters)),
        )


def main() -> None:
    parser = vector_arguments(__doc__)
    parser.add_argument("--parts", nargs="+", default=["peers"], choices=["peers", "all", "sample", "growth", "levels"])
    parser.add_argument("--many", type=int, default=20_000, help="clusters for the comparison of levels")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    faiss.omp_set_num_threads(options.threads)
    vectors = load_vectors(options.vectors, options.rows)
    if "peers" in options.parts:
        against_peers(vectors, options.clusters, options.rounds)
    if "all" in options.parts:
        all_points(vectors, options.clusters)
    if "sample" in options.parts:
        sample_sizes(vectors, options.clusters)
    if "growth" in options.parts:
        growth(vectors)
    if "levels" in options.parts:
        levels(vectors, options.many)


if __name__ == "__main__":
    main()
