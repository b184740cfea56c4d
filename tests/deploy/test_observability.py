"""Dashboards, alert rules and documentation use the metrics that exist, and all of them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from clusterbatch.runtime.metrics import MEASURES, exported_name
from tests.deploy.manifests import DEPLOY, ROOT

DASHBOARDS = sorted((DEPLOY / "grafana").glob("*.json"))
PROMETHEUS = DEPLOY / "prometheus"
README = DEPLOY / "README.md"
_SUFFIXES = r"_(?:bucket|sum|count)$"


def exported() -> set[str]:
    return {exported_name(name) for name in MEASURES}


def named(text: str) -> set[str]:
    """Metrics of ours that a text names; a histogram's series under the histogram's own name."""
    histograms = {exported_name(name) for name, measure in MEASURES.items() if measure.kind == "histogram"}
    found = set()
    for name in re.findall(r"\bray_clusterbatch_\w+", text):
        base = re.sub(_SUFFIXES, "", name)
        found.add(base if base in histograms else name)
    return found


@pytest.mark.parametrize("path", [*DASHBOARDS, PROMETHEUS / "alerts.yml", README], ids=lambda path: path.name)
def test_only_metrics_that_exist_are_named(path: Path) -> None:
    assert named(path.read_text()) <= exported()


def test_every_metric_is_on_a_dashboard_and_documented() -> None:
    assert set().union(*(named(path.read_text()) for path in DASHBOARDS)) == exported()
    assert named(README.read_text()) == exported()


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.name)
def test_dashboards_have_distinct_panels_with_queries(path: Path) -> None:
    board = json.loads(path.read_text())
    numbers = [panel["id"] for panel in board["panels"]]
    assert len(numbers) == len(set(numbers)) >= 8
    variables = {variable["name"] for variable in board["templating"]["list"]}
    for panel in board["panels"]:
        assert panel["title"]
        for target in panel["targets"]:
            assert set(re.findall(r"\$(\w+)", target["expr"])) <= variables
        x, width = panel["gridPos"]["x"], panel["gridPos"]["w"]
        assert 0 <= x <= x + width <= 24


@pytest.fixture(scope="module")
def promtool() -> str:
    program = shutil.which("promtool")
    if program is None:
        pytest.skip("promtool is not installed (Debian: apt-get install prometheus)")
    return program


@pytest.mark.parametrize(
    "arguments",
    [("check", "rules", "alerts.yml"), ("test", "rules", "alerts_test.yml"), ("check", "config", "prometheus.yml")],
    ids=" ".join,
)
def test_prometheus_accepts(arguments: tuple[str, ...], promtool: str) -> None:
    done = subprocess.run([promtool, *arguments], cwd=PROMETHEUS, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_dashboards_ask_what_prometheus_understands(promtool: str, tmp_path: Path) -> None:
    rules = []
    for path in DASHBOARDS:
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel["targets"]:
                expression = target["expr"].replace("$session", ".*")
                rules.append({"record": f"panel:query{len(rules)}", "expr": expression})
    file = tmp_path / "panels.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    done = subprocess.run([promtool, "check", "rules", str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_stages_that_are_documented_are_the_titles_of_passes() -> None:
    """Compare with titles in the code: arguments of Pass or a method that passes them on."""
    code = "".join(path.read_text() for path in sorted((ROOT / "clusterbatch").rglob("*.py")))
    given = re.findall(
        r'(?:title = |(?:Pass|\.run|\._run|\._pass|\._fit|\.create)\(\s*)f?"([a-z: ]+)({suffix})?"', code
    )
    titles = {title + number for title, suffix in given for number in (("", " 2") if suffix else ("",))}
    (table,) = re.findall(r"\| of \| `stage` \|\n(.*?)\n\n", README.read_text(), flags=re.DOTALL)
    documented = {title for row in table.splitlines() for title in re.findall(r"`([^`]+)`", row.split("|")[2])}
    assert documented == titles
    tested = set(re.findall(r'stage="([^"]*)"', (PROMETHEUS / "alerts_test.yml").read_text()))
    assert tested <= titles


def test_every_alert_says_what_to_do() -> None:
    (group,) = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"]
    for rule in group["rules"]:
        assert rule["labels"]["severity"] in ("info", "warning", "critical")
        assert rule["annotations"]["summary"]
        assert rule["annotations"]["action"]
