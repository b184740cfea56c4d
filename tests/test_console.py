"""What is printed for people: names are the user's, and what stands in brackets is not markup."""

from __future__ import annotations

from typing import Any

import pytest

from clusterbatch.console import (
    print_comparison,
    print_prediction,
    print_quality,
    print_removals,
    print_scores,
    print_workspace,
)
from clusterbatch.pipeline.clean import Removal
from clusterbatch.pipeline.summary import scoreboard

NAMES = ["docs[/v2]", "[en] wiki", "[red]shop[/red]", "back\\", "a :smile: b"]


def test_sources_are_printed_as_they_are_called(capsys: pytest.CaptureFixture[str]) -> None:
    source = {"rows": 9, "diversity": 0.5, "duplicates": 0.0, "gain": 0.1, "verdict": "pays", "why": "[why]"}
    found: dict[str, Any] = {
        "sources": {name: {**source, "source": {"difficulty": 1.0}} for name in NAMES},
        "answer": "[answer]",
    }
    print_prediction(found)
    shown = capsys.readouterr().out
    for name in NAMES:
        assert shown.count(name) == 1, name
    assert "[why]" in shown
    assert "[answer]" in shown


@pytest.mark.parametrize("name", NAMES)
def test_collections_paths_and_workspaces_too(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"generation": 0, "collection": name, "metric": "NDCG@10", "queries": 3, "values": {"before": 0.1}}
    print_quality([row], f"/runs/{name}/report")
    print_removals([Removal(name, 0, "[why]")], removed=True)
    print_workspace(f"/runs/{name}", [{"stage": "embed", "generation": None, "state": name}])
    assert capsys.readouterr().out.count(name) == 5


def test_a_difference_without_an_interval_has_a_dash(capsys: pytest.CaptureFixture[str]) -> None:
    row = {"arm": "random", "verdict": "baseline", "value": 0.5, "difference": None, "low": None, "high": None}
    row |= {"p_corrected": None, "minutes": 1.0}
    print_comparison({"arms": [row, {**row, "arm": "cluster", "difference": 0.1}], "answer": "[?]"}, "page")
    lines = capsys.readouterr().out.splitlines()
    assert [("–" in line) for line in lines if "random" in line or "cluster" in line] == [False, True]


def test_models_beside_the_trained_one_are_printed_with_its_gain(capsys: pytest.CaptureFixture[str]) -> None:
    def rows(generation: int, name: str, **values: float) -> list[dict[str, Any]]:
        sizes = {"generation": generation, "collection": name, "metric": "NDCG@10", "queries": 7, "documents": 9}
        return [{**sizes, "model": model, "value": value} for model, value in values.items()]

    def printed(*quality: list[dict[str, Any]]) -> list[list[str]]:
        print_quality(scoreboard([row for rows in quality for row in rows]), "page")
        return [line.replace("│", "").replace("┃", "").split() for line in capsys.readouterr().out.splitlines()]

    docs, faq = rows(0, "docs", before=0.25, after=0.5, bm25=0.75), rows(0, "faq", before=0.25, after=0.5, old=0.375)
    shown = printed(docs, faq)
    assert ["collection", "metric", "queries", "before", "after", "gain", "bm25", "old"] in shown
    assert ["docs", "NDCG@10", "7", "0.2500", "0.5000", "+0.2500", "0.7500"] in shown
    assert ["faq", "NDCG@10", "7", "0.2500", "0.5000", "+0.2500", "0.3750"] in shown
    # Without what was before, and with rounds of refresh.
    assert ["docs", "NDCG@10", "7", "0.5000"] in printed(rows(0, "docs", after=0.5))
    shown = printed(docs, rows(1, "docs", before=0.25, after=0.625))
    assert ["0", "docs", "NDCG@10", "7", "0.2500", "0.5000", "+0.2500", "0.7500"] in shown
    assert ["1", "docs", "NDCG@10", "7", "0.2500", "0.6250", "+0.3750"] in shown


def test_scores_have_a_line_per_metric_and_a_column_per_model(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"queries": 1200, "documents": 9}
    values = [("NDCG@10", "[old]", 0.25), ("NDCG@10", "after", 0.5), ("MRR@10", "after", 0.125)]
    print_scores([{"collection": "a", "metric": metric, "model": m, "value": v, **sizes} for metric, m, v in values])
    shown = [line.replace("│", "").replace("┃", "").split() for line in capsys.readouterr().out.splitlines()]
    assert ["collection", "metric", "queries", "[old]", "after"] in shown
    assert ["a", "NDCG@10", "1,200", "0.2500", "0.5000"] in shown
    assert ["a", "MRR@10", "1,200", "0.1250"] in shown
