"""A comparison at several batch sizes: the same pairs at every size, one rate for all arms, a report of its state."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clusterbatch.config import RunConfig, with_changes
from clusterbatch.errors import UsageError
from clusterbatch.experiments.compare.arms import arms_of
from clusterbatch.experiments.compare.grid import CELLS, compare_sizes, finished_sizes, write_grid
from clusterbatch.experiments.compare.plan import at_size, plan_comparison
from clusterbatch.experiments.compare.report import write_comparison
from clusterbatch.experiments.compare.stage import comparison_artifact
from clusterbatch.reporting.figures import Plot
from clusterbatch.runtime import Pass, WorkItem
from tests.in_process import OVERRIDES, run_in_process
from tests.integration.subjects import subjects_config

ARMS = "{random: , source: , cluster: , small: {batches.stratify: cluster, cluster.mean_size: 2x}}"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A comparison that was made at batches of 8 and cut off in the trials of 16."""
    words = [
        *OVERRIDES,
        f"compare.arms={ARMS}",
        "compare.baseline=source",
        "compare.batch_sizes=[16,8]",
        "compare.seeds=2",
        "compare.points=1",
        "compare.learning_rates=[0.1,0.3]",
        "compare.sweep=baseline",
        "cluster.mean_size=null",
        "train.steps=null",
        "train.epochs=1",
        "train.max_document_tokens=32",
    ]
    config = subjects_config(tmp_path_factory.mktemp("grid"), words)
    with pytest.MonkeyPatch.context() as patch:
        run_in_process(patch)
        compare_sizes(with_changes(config, {"compare.batch_sizes": [8]}))
    return config


@pytest.mark.usefixtures("in_process")
def test_an_interrupted_grid_shows_the_finished_sizes_and_resumes(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert finished_sizes(config) == [8]
    # Pages draw their figures again.
    monkeypatch.setattr(Plot, "file", lambda self, extension: b"")
    page = Path(write_grid(config))
    assert {cell["batch"] for cell in json.loads((page.parent / CELLS).read_text())["cells"]} == {8}
    ran: list[Any] = []
    original = Pass.run

    def counted(self: Pass, items: Sequence[WorkItem], **options: Any) -> Any:
        if self.title == "compare":
            ran.extend(item.payload for item in items if item.number not in options["done"])
        return original(self, items, **options)

    monkeypatch.setattr(Pass, "run", counted)
    compare_sizes(config)
    # The untrained model, two rates of the baseline, and four arms with two seeds, one of which the sweep has made.
    assert len(ran) == 1 + 2 + 8 - 1
    assert {trial.config.batches.size for trial in ran} == {16}
    compare_sizes(config)
    assert len(ran) == 10

    data = json.loads((page.parent / CELLS).read_text())
    cells = {(cell["batch"], cell["arm"]): cell for cell in data["cells"]}
    assert set(cells) == {(size, arm) for size in (8, 16) for arm in ("random", "source", "cluster", "small")}
    assert {size * cells[size, "source"]["steps"] for size in (8, 16)} == {320}
    for size in (8, 16):
        assert len({cells[size, arm]["learning_rate"] for arm in ("random", "source", "cluster", "small")}) == 1
        assert cells[size, "cluster"]["cluster_batches"] == 4
        assert cells[size, "small"]["cluster_batches"] == 2
        own, its = (np.array(cells[size, arm]["scores"]["topics"]) for arm in ("cluster", "source"))
        assert own.shape == (2, len(data["queries"]["topics"]))
        assert cells[size, "cluster"]["gain"] == pytest.approx((own - its).mean(), abs=1e-4)
    html = page.read_text(encoding="utf-8")
    assert "gain-by-batch" in html
    assert "gain-map" in html
    for size in (8, 16):
        report = Path(write_comparison(at_size(config, size)))
        assert (page.parent / f"../batch={size}/report/index.html").resolve() == report
        assert f'href="../batch={size}/report/index.html"' in html


def test_the_place_of_a_comparison_of_one_size_is_as_before(config: RunConfig) -> None:
    one = with_changes(config, {"compare.batch_sizes": []})
    assert comparison_artifact(one).folder.uri == f"{config.workspace}/compare/trials"
    assert comparison_artifact(at_size(config, 8)).folder.uri == f"{config.workspace}/compare/batch=8/trials"
    assert one.compare.identity() == config.compare.identity()


def test_a_plan_counts_the_sweep_of_the_baseline_alone(config: RunConfig) -> None:
    one = at_size(config, 8)
    assert plan_comparison(one).runs == 4 * 2 + 2
    assert plan_comparison(with_changes(one, {"compare.sweep": "each"})).runs == 4 * 2 + 4 * 2


def test_sizes_of_clusters_can_be_given_in_batches(config: RunConfig) -> None:
    words = {
        "compare.arms": {"source": None, "cluster-8x": None, "large": {"batches.size": "2x", "cluster.mean_size": "3x"}}
    }
    arms = {arm.name: arm.config for arm in arms_of(with_changes(config, words))[0]}
    size = config.batches.size
    assert arms["cluster-8x"].cluster.mean_size == 8 * size
    assert (arms["large"].batches.size, arms["large"].cluster.mean_size) == (2 * size, 6 * size)


def test_a_number_of_steps_is_refused(config: RunConfig) -> None:
    with pytest.raises(UsageError, match=r"train\.epochs, not train\.steps"):
        compare_sizes(with_changes(config, {"train.epochs": None, "train.steps": 3}))
    for changes in ({"compare.steps": 3}, {"compare.budget": 600}, {"compare.batch_sizes": [8, 8]}):
        with pytest.raises(UsageError, match="batch_sizes: "):
            with_changes(config, changes)
