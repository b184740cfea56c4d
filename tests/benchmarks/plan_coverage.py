"""The promise of the plan over thousands of random cases: `python -m tests.benchmarks.plan_coverage [--cases 3000]`.

Each case draws sources, cluster sizes (uniform, equal, heavy-tailed), batch size, run size, pieces, strategy and seed,
and walks through one epoch: every row at least once, no row twice in a batch, at most batch - 1 repeats per source, one
source per batch but for the pool. Prints one JSON line per figure: violations, and the most repeats as a share of
what is allowed.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter

import numpy as np

from clusterbatch.batches.plan import BatchPlan
from clusterbatch.batches.strata import POOL
from clusterbatch.config import BatchesConfig
from tests.batches.indexes import make_index, row_ids
from tests.benchmarks.figures import emit


def random_plan(random: np.random.Generator) -> BatchPlan:
    size = int(random.choice([2, 3, 8, 16, 48, 64, 100, 128]))
    sizes = []
    for _ in range(random.integers(1, 5)):
        clusters = int(random.integers(1, 12))
        mean = int(random.integers(1, 4 * size))
        kind = random.choice(["uniform", "equal", "heavy"])
        if kind == "uniform":
            rows = random.integers(1, 2 * mean + 1, clusters)
        elif kind == "equal":
            rows = np.full(clusters, mean)
        else:
            rows = np.minimum(1 + mean * random.pareto(1.1, clusters), 40 * size).astype(int)
        sizes.append(rows.tolist())
    sizes[0].append(size)
    stratify = str(random.choice(["random", "source", "cluster", "group", "random_groups"]))
    layouts = {"cluster": "cluster", "group": "group", "random_groups": "cluster"}
    layout = layouts.get(stratify, str(random.choice([stratify, "cluster"])))
    divisors = [m for m in (1, 2, 4) if size % m == 0]
    config = BatchesConfig(
        stratify=stratify,
        size=size,
        clusters_per_batch=random.choice([None, *divisors]),
        small_sources=str(random.choice(["pool", "leave_out"])),
        seed=int(random.integers(2**31)),
    )
    index = make_index(sizes, run_rows=int(random.choice([1, 4, 16, 64])), pieces=int(random.integers(1, 4)))
    return BatchPlan(index, config, layout)


def violations(plan: BatchPlan, epoch: int) -> tuple[list[str], int]:
    """What is wrong with an epoch, and the most repeats of a source in it."""
    index, size = plan.index, plan.config.size
    left_out = np.isin(np.asarray(index.sources)[index.source], plan.left_out)
    wrong = []
    seen = np.zeros(index.total_rows, int)
    repeats: Counter[str] = Counter()
    for step in range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch):
        batch = plan.batch(step)
        rows = row_ids(index, batch.piece, batch.row)
        if len(np.unique(rows)) != size:
            wrong.append("a row twice in one batch, or a batch of another size")
        if batch.stratum.name not in (POOL, "(all)") and len(np.unique(index.source[batch.piece])) != 1:
            wrong.append("a batch of two sources")
        seen[rows] += 1
        repeats[batch.stratum.name] += batch.repeated
    if (seen[np.repeat(~left_out, index.rows)] == 0).any():
        wrong.append("a row left out")
    if (seen[seen > 0] - 1).sum() != sum(repeats.values()):
        wrong.append("repeats that are not counted")
    if max(repeats.values()) >= size:
        wrong.append("more than batch - 1 repeats")
    return wrong, max(repeats.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    start = time.perf_counter()
    random = np.random.default_rng(options.seed)
    found: Counter[str] = Counter()
    share, rows, batches = 0.0, 0, 0
    for _ in range(options.cases):
        plan = random_plan(random)
        wrong, repeats = violations(plan, epoch=int(random.integers(0, 4)))
        found.update(set(wrong))
        share = max(share, repeats / (plan.config.size - 1))
        rows += plan.index.total_rows
        batches += plan.steps_per_epoch
    seen = {"rows": rows, "batches": batches, "seconds": round(time.perf_counter() - start, 1)}
    case = f"{options.cases} random plans"
    emit("plan, violations of coverage", sum(found.values()), case=case, kinds=dict(found), **seen)
    emit("plan, most repeats of a source against what is allowed", share, case=case)


if __name__ == "__main__":
    main()
