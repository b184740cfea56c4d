"""Trap 4, a resume that restores the weights and restarts the data; and all else that a resume must not change.

Every run here is real processes that talk over gloo. 20 steps cross the end of an epoch (13 steps).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.training.small_run import (
    metric_lines,
    model_weights,
    same_bits,
    small_config,
    small_job,
    train_and_be_killed,
    train_on_rank,
    train_until_asked_to_stop,
    write_clusters,
)
from tests.training.worlds import run_killed_world, run_world

_SHARE, _STEPS = 0.5, 20
_MEASURED = ("seconds", "pairs_per_second", "tokens_per_second", "mfu", "data_wait", "memory_bytes")


def _figures(lines: list[dict]) -> list[dict]:
    return [{name: value for name, value in line.items() if name not in _MEASURED} for line in lines]


@pytest.mark.parametrize(
    ("size", "batches"),
    # The checkpoint is in the middle of a super-batch.
    [(2, {}), (2, {"stratify": "source", "super_batch": 4}), pytest.param(4, {}, marks=pytest.mark.slow)],
)
def test_killed_and_resumed_equals_undisturbed_bit_for_bit(tmp_path: Path, size: int, batches: dict[str, Any]) -> None:
    """With dropout, hard negatives, row weights, all directions, masks, a learned temperature, a step cut in two."""
    train = {
        "steps": _STEPS,
        "checkpoint_every": 5,
        "learn_temperature": True,
        "directions": ["query_to_document", "document_to_query", "query_to_query"],
        # Some micro-batches keep their graph, some are computed twice.
        "activation_bytes": 3 * 2**19 // size,
        "mask": {"surrogate_margin": 0.2, "own_score_margin": 0.1},
    }
    jobs = {}
    for name in ("undisturbed", "killed"):
        config = small_config(tmp_path, workspace=str(tmp_path / name), train=train, batches=batches)
        write_clusters(config, negatives=True, weight=True, share=_SHARE)
        jobs[name] = small_job(config)

    run_world(size, train_on_rank, jobs["undisturbed"])

    exit_codes = run_killed_world(size, train_and_be_killed, jobs["killed"], 12, 10)
    assert exit_codes[0] == -9
    latest = jobs["killed"].checkpoints.latest()
    assert latest is not None
    assert latest.manifest.step == 10
    run_world(size, train_on_rank, jobs["killed"])

    assert same_bits(model_weights(jobs["undisturbed"]), model_weights(jobs["killed"]))
    wanted, found = (_figures(metric_lines(jobs[name])) for name in ("undisturbed", "killed"))
    assert [line["step"] for line in found] == list(range(_STEPS))
    assert {line["epoch"] for line in found} == {0, 1}
    assert all(0 < line["kept_share"] < 1 for line in found)
    assert wanted == found


def test_other_data_gives_other_weights(tmp_path: Path) -> None:
    """So the test above can fail: equal weights do not come from a model that learns nothing."""
    weights = []
    for seed in (0, 1):
        config = small_config(tmp_path, workspace=str(tmp_path / str(seed)), batches={"seed": seed}, train={"steps": 5})
        write_clusters(config)
        job = small_job(config)
        run_world(1, train_on_rank, job)
        weights.append(model_weights(job))
    assert not same_bits(*weights)


def test_another_number_of_workers_continues_with_the_same_batches(tmp_path: Path) -> None:
    """W 2 -> 1 -> 3 -> 2, five steps each, against 2 all along; without dropout."""
    train = {"steps": _STEPS, "dropout": 0.0, "checkpoint_every": 100, "learning_rate": 1e-3}
    jobs = {}
    for name in ("steady", "changing"):
        config = small_config(tmp_path, workspace=str(tmp_path / name), train=train)
        write_clusters(config, negatives=True, share=_SHARE)
        jobs[name] = small_job(config)
    run_world(2, train_on_rank, jobs["steady"])
    for size, reached in ((2, 5), (1, 10), (3, 15)):
        said = run_world(size, train_until_asked_to_stop, jobs["changing"], 5)
        assert said == [f"stopped after step {reached}, as asked; its checkpoint is written"] * size
    run_world(2, train_on_rank, jobs["changing"])

    wanted, found = (metric_lines(jobs[name]) for name in ("steady", "changing"))
    assert [line["step"] for line in found] == list(range(_STEPS))
    for name in ("epoch", "stratum", "purity", "pairs", "tokens"):
        assert [line[name] for line in wanted] == [line[name] for line in found]
    assert [line["loss"] for line in wanted] == pytest.approx([line["loss"] for line in found], rel=1e-4)
    norms = [[line["gradient_norm"] for line in lines] for lines in (wanted, found)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
