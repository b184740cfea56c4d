from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from clusterbatch.config import RunConfig, load_config
from clusterbatch.errors import DataError
from clusterbatch.evaluation.results import scores_table
from clusterbatch.pipeline.report import (
    gains,
    paired_interval,
    query_gains,
    scoreboard,
    segments_of,
    write_report,
)
from clusterbatch.reporting.phrases import workspace_phrases
from clusterbatch.store import Counts, Receipt
from clusterbatch.store.tables import write_parquet
from clusterbatch.store.workspace import Workspace

HOSTILE = "<b>bold</b>"


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """A workspace with a corpus of a hostile reject reason, and an evaluation of two models and BM25."""
    config = load_config(None, [f"workspace={tmp_path}/ws"])
    workspace = Workspace(config)
    counts = Counts(read=12, written=10, rejected=1, set_aside={HOSTILE: 1})
    corpus = Receipt(unit=0, fingerprint="c" * 16, counts=counts)
    workspace.corpus.commit("c" * 16, [corpus], config={}, inputs={}, seconds=2.5)
    rng = np.random.default_rng(0)
    queries = [f"{source}-q{number:016x}" for source in ("numpy", "scipy") for number in range(30)]
    before = rng.uniform(size=60)
    after = np.clip(before + np.where(np.arange(60) < 30, 0.1, -0.05) + 0.02 * rng.normal(size=60), 0, 1)
    parts, table = [], []
    for model, values in (("before", before), ("after", after), ("bm25", before / 2)):
        scores = scores_table("docs", model, {"NDCG@10": values}, queries)
        parts.append(write_parquet(workspace.evaluation(), f"scores-docs.{model}", scores))
        row = {"collection": "docs", "model": model, "metric": "NDCG@10", "value": values.mean()}
        table.append({**row, "queries": 60, "documents": 500})
    done = Receipt(unit=0, fingerprint="e" * 16, counts=Counts(read=500, written=500))
    details = {"table": table, "models": ["before", "after", "bm25"]}
    workspace.evaluation().commit(
        "e" * 16, [done], config={}, inputs={}, seconds=1.5, details=details, extra_parts=parts
    )
    return config


def test_page_and_summary_say_what_the_stages_left(config: RunConfig):
    page = Path(write_report(config)).read_text(encoding="utf-8")
    summary = json.loads(Workspace(config).root.read("metrics.json"))
    assert [(stage["stage"], stage["rows_read"], stage["rows_rejected"]) for stage in summary["stages"]] == [
        ("ingest", 12, 1),
        ("evaluate", 500, 0),
    ]
    assert summary["seconds"] == 4.0
    assert HOSTILE not in page
    assert "&lt;b&gt;bold&lt;/b&gt;: 1" in page
    assert not re.search(r'(?:src|href)="http|@import|url\(', page)
    for row in summary["quality"]:
        assert f"{row['value']:.4f}" in page
    # Every model is a column, and the sources with their winners and losers are there.
    assert ">bm25<" in page
    assert page.index("numpy") < page.index("scipy")


def test_the_page_in_japanese_says_the_same(config: RunConfig):
    own = config.model_copy(update={"report": config.report.model_copy(update={"language": "ja"})})
    english = Path(write_report(config)).read_text(encoding="utf-8")
    japanese = Path(write_report(own)).read_text(encoding="utf-8")
    assert '<html lang="ja">' in japanese
    assert workspace_phrases("ja")["report_title"] in japanese
    figure = re.compile(r"[+-]?\d\.\d{4}")
    assert sorted(figure.findall(japanese)) == sorted(figure.findall(english))
    assert workspace_phrases("en").keys() == workspace_phrases("ja").keys()


def test_incomplete_judgements_are_named_where_they_come_from_pairs(config: RunConfig):
    assert "Judgements made of held-out pairs are incomplete" in Path(write_report(config)).read_text()
    given = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"path": ["/data/beir"]})})
    assert "are incomplete" not in Path(write_report(given)).read_text()


def test_gains_pair_before_and_after(config: RunConfig):
    write_report(config)
    quality = json.loads(Workspace(config).root.read("metrics.json"))["quality"]
    (row,) = gains(quality)
    assert row["after"] > row["before"]
    assert scoreboard(quality)[0]["values"].keys() == {"before", "after", "bm25"}
    assert gains([entry for entry in quality if entry["model"] != "after"]) == []


def test_intervals_and_segments(config: RunConfig):
    intervals, segments = query_gains(config, 0)
    low, high = intervals["docs", "NDCG@10"]
    assert low < np.mean([row["gain"] for row in segments]) < high
    assert [row["segment"] for row in segments] == ["numpy", "scipy"]
    assert segments[0]["low"] > 0 > segments[1]["high"]


def test_interval_is_the_paired_t_interval():
    rng = np.random.default_rng(1)
    one, two = rng.uniform(size=(2, 50))
    expected = stats.ttest_rel(one, two).confidence_interval(0.95)
    assert paired_interval(one, two) == pytest.approx((expected.low, expected.high))
    assert paired_interval(one, one) == (0.0, 0.0)
    # One query, however much it gained, says nothing of another.
    assert paired_interval(np.array([0.9]), np.array([0.1])) is None


def test_one_query_has_a_difference_and_no_interval(tmp_path: Path):
    config = load_config(None, [f"workspace={tmp_path}/ws"])
    evaluation = Workspace(config).evaluation()
    values = {"before": 0.0, "after": 0.6309}
    parts = [
        write_parquet(evaluation, f"scores-docs.{model}", scores_table("docs", model, {"NDCG@10": [value]}, ["q"]))
        for model, value in values.items()
    ]
    row = {"collection": "docs", "metric": "NDCG@10", "queries": 1, "documents": 5}
    table = [{**row, "model": model, "value": value} for model, value in values.items()]
    done = Receipt(unit=0, fingerprint="e" * 16, counts=Counts(read=5, written=5))
    details = {"table": table, "models": ["before", "after"]}
    evaluation.commit("e" * 16, [done], config={}, inputs={}, seconds=1.5, details=details, extra_parts=parts)
    page = Path(write_report(config)).read_text(encoding="utf-8")
    assert "+0.6309" in page
    assert "+0.0000" not in page
    assert '<td data-value="">–</td>' in page


def test_segments_come_from_ids_of_the_samples_form_only():
    pattern = load_config(None, ["workspace=/tmp/none"]).report.segment_pattern
    ids = [
        "scikit-learn-q0123456789abcdef",
        "medquad-0123456789abcdef",
        "de-000-00-001",
        "c262",
        "5725b33f6a3fe71400b8952d",
    ]
    assert segments_of(ids, pattern).tolist() == ["scikit-learn", "medquad", "", "", ""]


def test_nothing_to_report_is_one_line(tmp_path: Path):
    with pytest.raises(DataError, match="no finished stage here, nothing to report"):
        write_report(load_config(None, [f"workspace={tmp_path}/empty"]))
