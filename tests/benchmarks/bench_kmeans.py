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
from clusterbatch.clustering.models import GroupAssigner, GroupModel
from clusterbatch.clustering.statistics import gini
from clusterbatch.clustering.sums import Centers, LocalRows
from clusterbatch.encoder.hardware import inference_dtype
from tests.benchmarks.vectors import emit, in_turn, load_vectors, vector_arguments

DTYPE = inference_dtype("auto", torch.device("cpu"))


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


def two_levels(vectors: np.ndarray, clusters: int, sample_per_centroid: int) -> GroupModel:
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
    return GroupModel(fine, np.ones(1), coarse=Centers(coarse))


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
    mine = found["clusterbatch"]
    for name, entry in found.items():
        emit(
            "k-means fit",
            who=name,
            rows=len(vectors),
            dimensions=vectors.shape[1],
            clusters=clusters,
            seconds=entry["seconds"],
            cpu_seconds=entry["cpu"],
            rounds_cpu=entry["rounds_cpu"],
            mean_cosine=cosine[name],
            seconds_ratio=mine["seconds"] / entry["seconds"],
            cpu_ratio=mine["cpu"] / entry["cpu"],
            cosine_ratio=cosine["clusterbatch"] / cosine[name],
            promise="ratios <= 0.25 and cosine_ratio >= 0.99 against faiss with 25 iterations",
        )


def all_points(vectors: np.ndarray, clusters: int) -> None:
    found = in_turn({"faiss, 25 iterations, all points": lambda: of_faiss(vectors, clusters, 25, True)}, 1)
    for name, entry in found.items():
        value = quality(vectors, entry["result"])
        emit("k-means fit", who=name, clusters=clusters, cpu_seconds=entry["cpu"], mean_cosine=value)


def sample_sizes(vectors: np.ndarray, clusters: int) -> None:
    for per_centroid in (32, 64, 128, 256, -(-len(vectors) // clusters)):
        entry = in_turn({"fit": lambda size=per_centroid: ours(vectors, clusters, size)}, 1)["fit"]
        value = quality(vectors, entry["result"])
        emit("quality by sample", per_centroid=per_centroid, cpu_seconds=entry["cpu"], mean_cosine=value)


def growth(vectors: np.ndarray) -> None:
    """Of the fit, whose sample follows from the number of clusters, and of the assignment of all rows."""
    for clusters in (100, 300, 1000, 3000):
        for rows in (len(vectors) // 4, len(vectors) // 2, len(vectors)):
            fitted = in_turn({"fit": lambda n=rows, k=clusters: ours(vectors[:n], k)}, 1)["fit"]
            assigner = Assigner(fitted["result"])
            assigned = in_turn({"assign": lambda a=assigner, n=rows: a(vectors[:n])}, 1)["assign"]
            emit(
                "cost of fit and assignment",
                rows=rows,
                clusters=clusters,
                sampled=min(rows, 256 * clusters),
                fit_cpu_seconds=fitted["cpu"],
                assign_cpu_seconds=assigned["cpu"],
            )


def levels(vectors: np.ndarray, clusters: int) -> None:
    """A tenth of the rows is kept from the fits: with few rows per centroid a fit flatters the rows that it saw."""
    seen = vectors[len(vectors) // 10 :]
    per_centroid = max(8, min(256, len(seen) // clusters))
    flat = in_turn({"fit": lambda: ours(seen, clusters, per_centroid)}, 1)["fit"]
    two = in_turn({"fit": lambda: two_levels(seen, clusters, per_centroid)}, 1)["fit"]
    for name, entry, model in (
        ("flat", flat, GroupModel([Centers(flat["result"])], np.ones(clusters))),
        ("two levels", two, two["result"]),
    ):
        assigned = in_turn({"assign": lambda model=model: GroupAssigner(model)(vectors)}, 1)["assign"]
        labels, cosine = assigned["result"]
        emit(
            "levels",
            who=name,
            clusters=clusters,
            rows=len(vectors),
            fit_cpu_seconds=entry["cpu"],
            assign_cpu_seconds=assigned["cpu"],
            mean_cosine=float(cosine[-len(seen) :].mean(dtype=np.float64)),
            mean_cosine_of_unseen_rows=float(cosine[: -len(seen)].mean(dtype=np.float64)),
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
