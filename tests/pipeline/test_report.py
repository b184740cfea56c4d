from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from scipy import stats

from clusterbatch.config import RunConfig, load_config
from clusterbatch.errors import DataError
from clusterbatch.evaluation.results import scores_table
from clusterbatch.pipeline.report import (
    Views,
    headlines,
    paired_interval,
    query_gains,
    scoreboard,
    segments_of,
    write_report,
)
from clusterbatch.pipeline.run_figures import refresh_rounds, running_mean, segments_before_after, training_curves
from clusterbatch.pipeline.summary import gains
from clusterbatch.reporting.cluster_views import MappedCluster
from clusterbatch.reporting.figures import cluster_map
from clusterbatch.reporting.phrases import comparison_phrases, workspace_phrases
from clusterbatch.shards.index import LeftOut
from clusterbatch.store import Counts, Receipt
from clusterbatch.store.details import SemanticDuplicates
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
    assert not re.search(r'(?:src|href)="http|@import|url\((?!#)', page)
    for row in summary["quality"]:
        assert f"{row['value']:.4f}" in page
    # Every model is a column, and the sources with their winners and losers are there.
    assert ">bm25<" in page
    table = page[page.rindex("</svg>") :]
    assert table.index("numpy") < table.index("scipy")


def test_the_page_in_japanese_says_the_same(config: RunConfig):
    own = config.model_copy(update={"report": config.report.model_copy(update={"language": "ja"})})
    english = Path(write_report(config)).read_text(encoding="utf-8")
    japanese = Path(write_report(own)).read_text(encoding="utf-8")
    assert '<html lang="ja">' in japanese
    assert workspace_phrases("ja")["report_title"] in japanese
    # Where a label stands in a picture depends on its width.
    english, japanese = (re.sub(r"<svg.*?</svg>", "", page, flags=re.DOTALL) for page in (english, japanese))
    figure = re.compile(r"[+-]?\d\.\d{4}")
    assert sorted(figure.findall(japanese)) == sorted(figure.findall(english))
    assert workspace_phrases("en").keys() == workspace_phrases("ja").keys()


def test_incomplete_judgements_are_named_where_they_come_from_pairs(config: RunConfig):
    assert "Judgements made from held-out pairs are incomplete" in Path(write_report(config)).read_text()
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
    # No difference anywhere is no measure of chance.
    assert paired_interval(one, one) is None
    assert paired_interval(one + 0.25, one) is None
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


def quality_rows(**values: float) -> list[dict[str, object]]:
    """Rows of an evaluation: `generation0_before=0.2` and so on."""
    rows = []
    for name, value in values.items():
        generation, model = name.split("_")
        row = {"generation": int(generation.removeprefix("generation")), "collection": "docs", "metric": "NDCG@10"}
        rows.append({**row, "model": model, "value": value, "queries": 9, "documents": 90})
    return rows


def test_the_headline_is_the_live_generation_s():
    quality = quality_rows(generation0_before=0.2, generation0_after=0.4, generation1_before=0.2, generation1_after=0.3)
    assert [row["generation"] for row in headlines(quality, 0)] == [0]
    assert [row["generation"] for row in headlines(quality, 1)] == [1]
    # A live model that was never measured: the last one that was.
    assert [row["generation"] for row in headlines(quality, None)] == [1]
    assert headlines([], None) == []


def test_a_reference_that_beats_the_trained_model_is_named(config: RunConfig):
    quality = quality_rows(generation0_before=0.2, generation0_after=0.4, generation0_bm25=0.5)
    assert headlines(quality, 0)[0]["reference"] == {"model": "bm25", "value": 0.5}
    quality = quality_rows(generation0_before=0.2, generation0_after=0.4, generation0_bm25=0.3)
    assert headlines(quality, 0)[0]["reference"] is None
    assert "does not beat it" not in Path(write_report(config)).read_text(encoding="utf-8")


def test_no_difference_is_neither_gain_nor_loss(tmp_path: Path):
    config = load_config(None, [f"workspace={tmp_path}/ws"])
    evaluation = Workspace(config).evaluation()
    values = np.random.default_rng(0).uniform(size=40)
    queries = [f"numpy-q{number:016x}" for number in range(40)]
    parts, table = [], []
    for model in ("before", "after"):
        scores = scores_table("docs", model, {"NDCG@10": values}, queries)
        parts.append(write_parquet(evaluation, f"scores-docs.{model}", scores))
        row = {"collection": "docs", "model": model, "metric": "NDCG@10", "value": values.mean()}
        table.append({**row, "queries": 40, "documents": 50})
    done = Receipt(unit=0, fingerprint="e" * 16, counts=Counts(read=50, written=50))
    details = {"table": table, "models": ["before", "after"]}
    evaluation.commit("e" * 16, [done], config={}, inputs={}, seconds=1, details=details, extra_parts=parts)
    page = Path(write_report(config)).read_text(encoding="utf-8")
    assert "+0.0000" in page
    assert 'class="gain"' not in page
    assert 'class="loss"' not in page


def test_intervals_of_segments_hold_together(config: RunConfig):
    _, segments = query_gains(config, 0)
    rng = np.random.default_rng(0)
    before = rng.uniform(size=60)
    after = np.clip(before + np.where(np.arange(60) < 30, 0.1, -0.05) + 0.02 * rng.normal(size=60), 0, 1)
    expected = stats.ttest_rel(after[:30], before[:30]).confidence_interval(0.975)
    assert (segments[0]["low"], segments[0]["high"]) == pytest.approx((expected.low, expected.high))
    assert (segments[0]["before"], segments[0]["after"]) == pytest.approx((before[:30].mean(), after[:30].mean()))


def test_figures_of_a_training_name_their_first_and_last_values():
    words = workspace_phrases("en")
    lines = [{"step": step, "loss": 4.0 - step / 10, "accuracy": step / 40, "gradient_norm": 1.0} for step in range(40)]
    plots = training_curves(lines, words)
    assert [plot.name for plot in plots] == ["training-loss", "training-accuracy", "training-gradient-norm"]
    assert "3.850" in plots[0].description
    assert "0.250" in plots[0].description
    assert all(plot.inline().startswith("<svg") for plot in plots)


def test_a_running_mean_keeps_a_straight_line_and_the_number_of_points():
    values = np.arange(50.0)
    for width in (1, 4, 7):
        assert running_mean(values, width)[width:-width] == pytest.approx(values[width:-width])
    assert len(running_mean(values, 9)) == 50
    assert running_mean(values, 9)[0] == pytest.approx(values[:5].mean())


def test_the_figure_of_segments_shows_those_with_the_most_queries():
    rows = [
        {"segment": f"s{number}", "queries": number, "before": 0.1, "after": 0.2, "low": 0.05, "high": 0.15}
        for number in range(20, 50)
    ]
    plot = segments_before_after(rows, "NDCG@10", workspace_phrases("en"))
    drawn = plot.inline()
    assert "s49 (49)" in drawn
    assert "s29 (29)" not in drawn


def test_the_page_lists_what_is_left_out_and_what_says_the_same(config: RunConfig, monkeypatch: pytest.MonkeyPatch):
    texts = {"query": HOSTILE, "document": "one", "other_query": "two", "other_document": "three"}
    pair = {"source": "forum", "query_cosine": 0.9512, "document_cosine": 0.25, **texts}
    left_out = LeftOut(
        rows=7001,
        rows_left_out=1203,
        rows_without_score=4,
        negatives=90,
        negatives_left_out=31,
        negatives_without_score=2,
    )
    counts = SemanticDuplicates(groups=11, rows=2300, pairs=54, dropped=17)
    views = Views(duplicates={"forum": counts}, near_pairs=[pair], left_out={HOSTILE: left_out})
    monkeypatch.setattr("clusterbatch.pipeline.report.run_views", lambda config, words: views)
    page = Path(write_report(config)).read_text(encoding="utf-8")
    assert HOSTILE not in page
    cells = re.findall(r"<t[dh][^>]*>([^<]*)</t[dh]>", page)
    start = cells.index("&lt;b&gt;bold&lt;/b&gt;")
    assert cells[start + 1 : start + 7] == ["7,001", "1,203", "4", "90", "31", "2"]
    start = cells.index("forum")
    assert cells[start + 1 : start + 5] == ["11", "2,300", "54", "17"]
    assert "0.951, 0.250" in cells


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize(
    "name", ["_hidden", "cash $\\frac$ 1", "very long, " * 30], ids=["underscore", "formula", "long"]
)
def test_figures_show_sources_of_any_name(name: str) -> None:
    clusters = [MappedCluster(f"{name}{n // 3}", n, 10, 0.1 * n, 0.1 * (n % 3), ["word"]) for n in range(9)]
    rows = [{"segment": name, "queries": 30, "before": 0.1, "after": 0.2, "low": 0.05, "high": 0.15}]
    for plot in (
        cluster_map(clusters, comparison_phrases("en")),
        segments_before_after(rows, "NDCG@10", workspace_phrases("en")),
    ):
        assert name[:7] in plot.inline().split("aria-label", 1)[1]
        assert plot.file("png")


def test_a_group_that_takes_no_part_names_no_segment() -> None:
    assert segments_of(["en-q1", "q2"], r"^(?:(\w+)-)?q").tolist() == ["en", ""]


def test_segments_name_the_metric_that_they_are_of(config: RunConfig) -> None:
    """Settings of `evaluate` may have changed from one generation to the next."""
    workspace = Workspace(config)
    rng = np.random.default_rng(0)
    queries = [f"numpy-q{number:016x}" for number in range(30)]
    parts, table = [], []
    for model in ("before", "after"):
        values = rng.uniform(size=30)
        parts.append(
            write_parquet(
                workspace.evaluation(1),
                f"scores-docs.{model}",
                scores_table("docs", model, {"MRR@10": values}, queries),
            )
        )
        row = {"collection": "docs", "model": model, "metric": "MRR@10", "value": values.mean()}
        table.append({**row, "queries": 30, "documents": 500})
    done = Receipt(unit=0, fingerprint="f" * 16, counts=Counts(read=500, written=500))
    details = {"table": table, "models": ["before", "after"]}
    workspace.evaluation(1).commit(
        "f" * 16, [done], config={}, inputs={}, seconds=1.0, details=details, extra_parts=parts
    )
    html = Path(write_report(config)).read_text(encoding="utf-8")
    assert workspace_phrases("en")["winners_text"].format(metric="MRR@10", least=20) in html


@pytest.mark.parametrize(("live", "shown"), [(0, [0, 1]), (1, [1]), (None, [1])])
def test_one_round_of_refresh_has_whole_generations_on_its_axis(live: int | None, shown: list[int]) -> None:
    row = {"generation": 1, "live_value": 0.5, "own_value": 0.6, "metric": "NDCG@10"}
    axes = Figure().subplots()
    refresh_rounds([row], live, workspace_phrases("en")).draw(axes)
    low, high = axes.get_xlim()
    assert [tick for tick in axes.get_xticks() if low <= tick <= high] == shown
