"""Which benchmarks there are, with the words that each is run with: the full sizes, and quick ones."""

from __future__ import annotations

from typing import NamedTuple

DATA, WORKSPACE, COMPARISON, GPU = "data", "workspace", "comparison", "gpu"

NEEDS = {
    DATA: "real pairs: set CLUSTERBATCH_DATA to a folder with pairs/*.parquet and eval/",
    WORKSPACE: "an embedded workspace of some 100,000 real pairs: --workspace URI",
    COMPARISON: "the configuration of a comparison with compare.steps: --comparison CONFIG.yaml",
    GPU: "a GPU that torch sees",
}


class Benchmark(NamedTuple):
    name: str
    module: str
    full: str
    quick: str
    needs: str = ""
    """A key of NEEDS; `{workspace}` and `{comparison}` stand for what was given."""


CATALOGUE = [
    Benchmark("embedding", "bench_embedding", "encoder", "encoder --documents 96 --rounds 1", DATA),
    Benchmark("embedding-stage", "bench_embedding", "stage", "stage --pairs 400", DATA),
    Benchmark("embedding-gpu", "bench_embedding_gpu", "", "--texts 1024 --rounds 1", GPU),
    Benchmark("embedding-memory", "bench_embedding", "memory --pairs 40000", "memory --pairs 2000", DATA),
    Benchmark(
        "kmeans",
        "bench_kmeans",
        "{workspace} --threads 2 --rounds 2",
        "{workspace} --threads 2 --rounds 1 --rows 20000 --clusters 50",
        WORKSPACE,
    ),
    Benchmark(
        "assignment",
        "bench_assignment",
        "{workspace} --rounds 5",
        "{workspace} --rounds 1 --rows 8192 --clusters 256",
        WORKSPACE,
    ),
    Benchmark(
        "shards",
        "bench_shards",
        "{workspace} --clusters 10 1000 5000",
        "{workspace} --clusters 10 --shard-bytes 8388608",
        WORKSPACE,
    ),
    Benchmark(
        "cluster-workers", "bench_cluster_growth", "workers {workspace}", "workers {workspace} --clusters 50", WORKSPACE
    ),
    Benchmark("cluster-memory", "bench_cluster_growth", "memory {workspace}", "memory {workspace}", WORKSPACE),
    Benchmark("mining", "bench_mining", "{workspace}", "{workspace} --rows 20000", WORKSPACE),
    Benchmark("score", "bench_score", "", "--pairs 600 --rounds 1 --steps 10 --rows 2000", DATA),
    Benchmark("training", "bench_training", "--rounds 2", "--batch 32 --steps 1 --rounds 1", DATA),
    Benchmark("static", "bench_static", "", "--steps 10 --rounds 1", DATA),
    Benchmark("strategies", "bench_strategies", "--rounds 5", "--pairs 4000 --steps 20 --rounds 1", DATA),
    Benchmark("loader", "bench_loader", "", "--rows 8000 --rounds 1 --step 0.02"),
    Benchmark("growth", "bench_growth", "", "--rows 3000 6000"),
    Benchmark("plan", "bench_plan", "", "--rows 1e6 --clusters 1000 --steps 200"),
    Benchmark("plan-coverage", "plan_coverage", "", "--cases 50"),
    Benchmark("scale", "bench_scale", "", "--rows 1e6 --clusters 1000 --ranks 16 --steps 4"),
    Benchmark("scale-end-to-end", "bench_scale_end_to_end", "--pairs 1e5 1e6", "--pairs 1e4 --steps 20", DATA),
    Benchmark("scale-peers", "bench_scale_peers", "--pairs 1e6", "--pairs 2e4 --rounds 1", DATA),
    Benchmark("gradients", "gradient_parity", "", ""),
    Benchmark("ingest", "bench_ingest", "", "--rows 2000 20000"),
    Benchmark("capacity", "bench_capacity", "", "--rows 400 800 1600", DATA),
    Benchmark("metrics", "bench_metrics", "", "", DATA),
    Benchmark("verdicts", "bench_verdicts", "", "--comparisons 100"),
    Benchmark("predict", "bench_predict", "{comparison}", "{comparison} --rows 20000", COMPARISON),
    Benchmark(
        "grid",
        "bench_grid",
        "runs/grid",
        "runs/grid-quick --corpora mitre --sizes 256 --arms source,cluster-4x --seeds 1",
        DATA,
    ),
    Benchmark("embedding-peers", "bench_embedding_peers", "", "--documents 64 --rounds 1", DATA),
    Benchmark(
        "effort", "bench_effort", "runs/effort", "runs/effort-quick --corpora movies --pairs 200 --seeds 1", DATA
    ),
    Benchmark("duplicates", "bench_duplicates", "runs/duplicates", "runs/duplicates --corpora mitre --rounds 1", DATA),
    Benchmark("samples", "bench_samples", "{comparison}", "{comparison}", COMPARISON),
]
