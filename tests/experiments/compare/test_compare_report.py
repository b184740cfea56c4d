from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from clusterbatch.config import RunConfig, load_config
from clusterbatch.errors import UsageError
from clusterbatch.experiments.compare import report as comparison_report
from clusterbatch.experiments.compare.breakdown import arm_rows, steps_to_reach
from clusterbatch.experiments.compare.figures import learning_curves
from clusterbatch.experiments.compare.report import Views
from clusterbatch.experiments.compare.results import Comparison, read_comparison
from clusterbatch.experiments.compare.statistics import Training
from clusterbatch.experiments.compare.wording import answer, further, meeting_sentences, next_step
from clusterbatch.reporting.cluster_views import Example, MappedCluster, Outlier
from clusterbatch.reporting.figures import Plot
from clusterbatch.reporting.page import amount
from clusterbatch.reporting.phrases import comparison_phrases
from clusterbatch.store import Artifact, Folder, Manifest
from tests.experiments.compare.made_up import made_up_comparison

ATTACK = '<script>document.title = "taken"</script><img src=x onerror=alert(1)>'
JAPANESE = "東大寺の仏像はどこにありますか"


@pytest.fixture(scope="module", params=["en", "ja"])
def page(request, tmp_path_factory) -> Path:
    """A whole report from a made-up comparison, with hostile and Japanese text in it."""
    folder = tmp_path_factory.mktemp("report")
    config = load_config(
        None,
        [
            f"workspace={folder}",
            f"report.language={request.param}",
            "compare.arms=[random,cluster]",
            "ray.runtime_env={env_vars: {HF_TOKEN: not-for-others}}",
        ],
    )
    return write(config, made_up_comparison({"random": 0.0, "cluster": 0.03}))


def write(config: RunConfig, comparison: Comparison, purity: float | None = 0.5) -> Path:
    manifest = Manifest(
        kind="comparison",
        fingerprint="0" * 16,
        created="2026-01-01",
        seconds=1.0,
        counts={},
        parts=[],
        software={"torch": "2"},
    )
    mapped = [
        MappedCluster(f"source{n % 2}", n, 100 * (n + 1), n * 0.1, (n * 7 % 5) * 0.1, ["仏像", "word", ATTACK])
        for n in range(12)
    ]
    examples = [
        Example(arm, purity, 60, [{"query": ATTACK, "document": JAPANESE, "source": "one"}] * 6)
        for arm in ("random", "cluster")
    ]
    farthest = [Outlier("one", ATTACK, JAPANESE, 0.1, False)]
    views = Views(examples, mapped, [50 * n for n in range(1, 30)], farthest)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            comparison_report, "comparison_artifact", lambda config: type("A", (), {"require": lambda self: manifest})()
        )
        patch.setattr(comparison_report, "read_comparison", lambda *_: comparison)
        patch.setattr(comparison_report, "_views", lambda *_: views)
        return Path(comparison_report.write_comparison(config))


def test_no_secret_of_the_runtime_environment_is_shown(page: Path):
    for file in page.parent.rglob("*"):
        assert not file.is_file() or b"not-for-others" not in file.read_bytes(), file
    assert "ray.runtime_env is not shown" in page.read_text(encoding="utf-8")


def test_nothing_is_loaded_from_elsewhere_and_text_is_escaped(page: Path):
    html = page.read_text(encoding="utf-8")
    assert "&lt;script&gt;" in html
    assert ATTACK not in html
    loaded = re.findall(r'(?:src|href)="(?!#)([^"]+)"|url\((?!#)([^)]+)\)|@import', html)
    assert {one or other for one, other in loaded} == {"decision.html"}
    assert {path.name for path in page.parent.iterdir()} == {
        "index.html",
        "decision.html",
        "report.md",
        "comparison.json",
        "figures",
    }
    for plot in ("difference-curves", "learning-curves", "gains", "cluster-map"):
        assert (page.parent / "figures" / f"{plot}.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def no_figure_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are drawn for the page alone: their files take most of a report's time."""
    monkeypatch.setattr(Plot, "file", lambda self, extension: b"")


def draw_none(patch: pytest.MonkeyPatch) -> None:
    """Leave figures out of the page, too, where their words have been looked at already."""
    patch.setattr(Plot, "inline", lambda self: "")


@pytest.mark.usefixtures("no_figure_files")
@pytest.mark.parametrize("language", ["en", "ja"])
@pytest.mark.parametrize("few", [{"seeds": 1}, {"queries": 1}, {"noise": 0.0}])
def test_what_is_not_known_has_no_figure(
    language: str, few: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    if language == "ja":
        # Numbers in the figures are the same.
        draw_none(monkeypatch)
    words = [f"workspace={tmp_path}", f"report.language={language}", "compare.arms=[random,cluster]"]
    page = write(load_config(None, words), made_up_comparison({"random": 0.0, "cluster": 0.03}, **few))
    for file in ("index.html", "decision.html", "report.md", "comparison.json"):
        assert not re.search(r"\bnan\b", (page.parent / file).read_text(encoding="utf-8"), re.IGNORECASE), file
    found = json.loads((page.parent / "comparison.json").read_text())
    cluster = found["arms"][1]
    assert cluster["difference"] is not None
    assert (cluster["low"], cluster["high"], cluster["p_corrected"]) == (None, None, None)
    assert cluster["outcome"] == "cannot tell yet"
    assert all(row["low"] is None for row in found["segments"])
    assert '">–</td>' in page.read_text(encoding="utf-8")
    assert "| – |" in (page.parent / "report.md").read_text(encoding="utf-8")
    assert comparison_phrases(language)["say doubt, unknown"] in (page.parent / "decision.html").read_text(
        encoding="utf-8"
    )


def test_a_collection_of_one_query_is_named():
    comparison = made_up_comparison({"random": 0.0, "cluster": 0.03}, queries=1)
    config = load_config(None, ["workspace=/tmp/none"])
    for language in ("en", "ja"):
        assert "indoors, outdoors" in answer(comparison, config, language)
        assert "indoors, outdoors" in next_step(comparison, config, language)


@pytest.mark.usefixtures("no_figure_files")
@pytest.mark.parametrize("language", ["en", "ja"])
def test_with_a_sweep_it_is_said_which_figures_are_of_which_queries(
    language: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    draw_none(monkeypatch)
    words = [f"workspace={tmp_path}", f"report.language={language}", "compare.arms=[random,cluster]"]
    page = write(load_config(None, words), replace(made_up_comparison({"random": 0.0, "cluster": 0.03}), swept=True))
    phrases = comparison_phrases(language)
    # Curves, and what is read off them, are of all queries: scores on the way are not kept by query.
    for key in ("learning_curves", "early", "late", "trend", "reach"):
        assert phrases[key].lower() in phrases["swept_text"].lower()
    for file in (page, page.parent / "report.md"):
        assert phrases["swept_text"] in file.read_text(encoding="utf-8").replace("&#39;", "'")


def test_the_table_in_markdown_has_a_column_for_every_collection(page: Path):
    lines = (page.parent / "report.md").read_text(encoding="utf-8").splitlines()
    start = next(number for number, line in enumerate(lines) if "indoors" in line and line.startswith("|"))
    table = lines[start : start + 4]
    assert [line.count("|") for line in table] == [4, 4, 4, 4]
    assert [line.split("|")[1].strip() for line in table[2:]] == ["random", "cluster"]


@pytest.mark.usefixtures("no_figure_files")
def test_a_name_with_a_bar_does_not_split_its_column(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    draw_none(monkeypatch)
    made = made_up_comparison({"random": 0.0, "cluster": 0.03})
    renamed = {"indoors": "in|doors", "outdoors": "outdoors"}
    scores = {
        arm: {(renamed[name], metric): values for (name, metric), values in of_arm.items()}
        for arm, of_arm in made.scores.items()
    }
    arms = [
        replace(arm, by_collection={renamed[name]: gain for name, gain in arm.by_collection.items()})
        for arm in made.arms
    ]
    queries = {renamed[name]: of_collection for name, of_collection in made.queries.items()}
    comparison = replace(made, collections=list(renamed.values()), scores=scores, arms=arms, queries=queries)
    page = write(load_config(None, [f"workspace={tmp_path}", "compare.arms=[random,cluster]"]), comparison)
    lines = (page.parent / "report.md").read_text(encoding="utf-8").splitlines()
    start = next(number for number, line in enumerate(lines) if "doors" in line and line.startswith("|"))
    assert [line.replace("\\|", "").count("|") for line in lines[start : start + 4]] == [4, 4, 4, 4]


def test_incomplete_judgements_are_named(page: Path):
    for name in ("index.html", "decision.html"):
        html = (page.parent / name).read_text(encoding="utf-8")
        assert "Judgements made from held-out pairs are incomplete" in html or "正解判定は不完全です" in html


@pytest.mark.parametrize(
    "changes", [{"batches.super_batch": 16}, {"batches.curriculum": [{"steps": "half"}, {"super_batch": 16}]}]
)
def test_super_batches_are_what_the_question_is_about_as_clusters_are(changes: dict[str, Any]):
    made = made_up_comparison({"random": 0.0, "cluster": 0.0, "super-16x": 0.03})
    changes = {"batches.stratify": "source", **changes}
    arms = [replace(arm, stratify="source", changes=changes) if arm.name == "super-16x" else arm for arm in made.arms]
    comparison = replace(made, arms=arms)
    assert comparison.decisive.name == "super-16x"
    sentence = answer(comparison, load_config(None, ["workspace=/tmp/none"]), "en")
    assert sentence.startswith("Yes: super-16x batches pay.")


def test_the_answer_says_what_was_measured():
    comparison = made_up_comparison({"random": 0.0, "source": 0.001, "cluster": 0.03})
    config = load_config(None, ["workspace=/tmp/none"])
    assert comparison.decisive.name == "cluster"
    sentence = answer(comparison, config, "en")
    arm = comparison.arm("cluster")
    assert sentence.startswith("Yes: cluster batches pay.")
    assert f"{arm.gain.mean:+.4f}" in sentence
    assert f"{arm.verdict.low:+.4f}" in sentence
    assert f"{arm.gain.mean:+.4f}" in answer(comparison, config, "ja")


def test_what_costs_more_must_pay_over_what_costs_less():
    config = load_config(None, ["workspace=/tmp/none"])
    hours = {"random": 0.02, "source": 0.02, "cluster": 0.5}
    little = made_up_comparison({"random": 0.0, "source": 0.03, "cluster": 0.032}, hours=hours)
    # The question is about clusters, so the answer is; what to do takes the price into account.
    assert little.decisive.name == "cluster"
    assert little.cheaper.name == "source"
    assert answer(little, config, "en").startswith("Yes: cluster batches pay.")
    over = little.over(little.decisive, little.cheaper)
    assert f"{over.gain:+.4f}" in answer(little, config, "en")
    assert f"{over.gain:+.4f}" in answer(little, config, "ja")
    assert "25.0 times" in further(little, "en")
    assert next_step(little, config, "en") == "Use source batches."
    much = made_up_comparison({"random": 0.0, "source": 0.03, "cluster": 0.08}, hours=hours)
    assert much.decisive.name == "cluster"
    assert much.cheaper is None
    assert further(much, "en") == ""
    assert next_step(much, config, "en") == "Use cluster batches."
    # What counts is the price, not the hours.
    arms = [replace(arm, cost=replace(arm.cost, hours=0.02)) for arm in little.arms]
    assert replace(little, arms=arms).cheaper.name == "source"
    # At the same price there is no reason to take less.
    assert made_up_comparison({"random": 0.0, "source": 0.03, "cluster": 0.032}).cheaper is None
    # Of two arms of clusters the cheaper one is the answer, if the other does not pay once more.
    hours = {"random": 0.02, "cluster": 0.02, "cluster-both": 0.5}
    two = made_up_comparison({"random": 0.0, "cluster": 0.03, "cluster-both": 0.032}, hours=hours)
    assert (two.best.name, two.decisive.name) == ("cluster-both", "cluster")
    assert "25.0 times" in further(two, "en")


@pytest.mark.parametrize("language", ["en", "ja"])
@pytest.mark.parametrize(("training", "reason"), [(Training(0.15, True), "short"), (Training(3.0, True), "rising")])
@pytest.mark.parametrize("gain", [0.05, -0.05])
def test_too_little_training_gives_no_verdict_but_what_is_missing(
    language: str, training: Training, reason: str, gain: float
):
    comparison = made_up_comparison({"random": 0.0, "source": gain, "cluster": gain}, training=training)
    config = load_config(None, ["workspace=/tmp/none"])
    assert {(arm.verdict.outcome, arm.verdict.reason) for arm in comparison.others} == {("cannot tell yet", reason)}
    assert comparison.over(comparison.arms[2], comparison.arms[1]).outcome == "cannot tell yet"
    step = next_step(comparison, config, language)
    assert ("800" if reason == "short" else "compare.steps=240") in step
    assert f"{comparison.decisive.gain.mean:+.4f}" in answer(comparison, config, language)
    assert all("{" not in sentence for sentence in meeting_sentences(comparison, config, language))


def test_what_is_undecided_comes_before_what_is_decided_against():
    comparison = made_up_comparison({"random": 0.0, "cluster-query": 0.004, "cluster": 0.03})
    verdicts = {"cluster-query": ("cannot tell yet", "wide interval"), "cluster": ("does not pay", "too dear")}
    arms = [comparison.baseline]
    for name, (outcome, reason) in verdicts.items():
        arm = comparison.arm(name)
        arms.append(replace(arm, verdict=replace(arm.verdict, outcome=outcome, reason=reason)))
    comparison = replace(comparison, arms=arms)
    assert comparison.arm("cluster").spread.mean > comparison.arm("cluster-query").spread.mean
    assert comparison.decisive.name == "cluster-query"
    config = load_config(None, ["workspace=/tmp/none"])
    assert answer(comparison, config, "en").startswith("Not decided yet: cluster-query batches")
    assert "Stay" not in next_step(comparison, config, "en")


@pytest.mark.parametrize("gain", [0.0, -0.03])
def test_no_gain_is_claimed_where_there_is_none(gain):
    comparison = made_up_comparison({"random": 0.0, "source": gain, "cluster": gain})
    config = load_config(None, ["workspace=/tmp/none"])
    assert not answer(comparison, config, "en").startswith("Yes")
    assert "Use" not in next_step(comparison, config, "en")
    assert all(arm.verdict.outcome != "pays" for arm in comparison.others)


def test_both_languages_say_the_same_things():
    both = {language: comparison_phrases(language) for language in ("en", "ja")}
    assert both["en"].keys() == both["ja"].keys()
    for key, english in both["en"].items():
        japanese = both["ja"][key]
        figures = [set(re.findall(r"{(\w+)", text)) for text in (english, japanese)]
        assert figures[1] <= figures[0], key
    comparison = made_up_comparison({"random": 0.0, "cluster": 0.004}, seeds=2)
    config = load_config(None, ["workspace=/tmp/none"])
    for language in ("en", "ja"):
        assert all("{" not in sentence for sentence in meeting_sentences(comparison, config, language))


@pytest.mark.parametrize("language", ["en", "ja"])
def test_arms_with_the_same_batches_are_named_on_every_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, language: str
):
    draw_none(monkeypatch)
    config = load_config(
        None, [f"workspace={tmp_path}", "compare.arms=[random,cluster]", f"report.language={language}"]
    )
    comparison = made_up_comparison({"random": 0.0, "cluster": 0.03})
    sentence = comparison_phrases(language)["same_batches"].format(arm="random", others="cluster")
    for alike, expected in (((), False), ([["random", "cluster"]], True)):
        folder = write(config, replace(comparison, same_batches=alike)).parent
        for name in ("index.html", "decision.html", "report.md"):
            assert (sentence in (folder / name).read_text(encoding="utf-8")) is expected, name


def test_without_clusters_there_is_no_purity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    draw_none(monkeypatch)
    config = load_config(None, [f"workspace={tmp_path}", "compare.arms=[random,cluster]"])
    for purity, expected in ((None, [None, None]), (0.5, [0.9, 0.9])):
        written = write(config, made_up_comparison({"random": 0.0, "cluster": 0.03}), purity)
        arms = json.loads((written.parent / "comparison.json").read_text())["arms"]
        assert [arm["purity"] for arm in arms] == expected


def test_runs_are_those_of_the_two_arms_that_are_spoken_of():
    comparison = made_up_comparison({"random": 0.0, "source": 0.01, "cluster": 0.03})
    config = load_config(None, ["workspace=/tmp/none"])
    runs = 2 * comparison.decisive.spread.seeds
    assert f"in runs of 120 steps ({runs} in all)" in meeting_sentences(comparison, config, "en")[0]


def test_masks_are_said_to_be_equal_only_where_they_are():
    comparison = made_up_comparison({"random": 0.0, "cluster": 0.03})
    config = load_config(None, ["workspace=/tmp/none"])
    assert "with the same masks" in meeting_sentences(comparison, config, "en")[0]
    masked = replace(comparison.arm("cluster"), changes={"train.mask.surrogate_margin": -0.05})
    comparison = replace(comparison, arms=[comparison.baseline, masked])
    assert "with other masks" in meeting_sentences(comparison, config, "en")[0]


def test_table_of_arms_and_steps_to_reach_the_baseline():
    comparison = made_up_comparison({"random": 0.0, "cluster": 0.05})
    baseline, cluster = arm_rows(comparison, "en")
    assert baseline["difference"] is None
    assert baseline["reach"] == 120
    assert cluster["difference"] == pytest.approx(cluster["value"] - baseline["value"], abs=1e-9)
    assert cluster["low"] < cluster["difference"] < cluster["high"]
    end = comparison.baseline.curve[-1].mean()
    reached = steps_to_reach(comparison, comparison.arm("cluster"), end)
    assert 40 < reached < 120
    assert steps_to_reach(comparison, comparison.baseline, 2.0) is None


@pytest.mark.usefixtures("no_figure_files")
@pytest.mark.parametrize("language", ["en", "ja"])
def test_without_prices_the_report_has_hours_instead_of_money(
    language: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    words, phrases = ["compare.arms=[random,cluster]", f"report.language={language}"], comparison_phrases(language)
    pages = {}
    for priced in (False, True):
        prices = ["compare.prices={cpu_hour: 0.05, currency: EUR}"] if priced else []
        config = load_config(None, [f"workspace={tmp_path}/{priced}", *words, *prices])
        comparison = made_up_comparison({"random": 0.0, "cluster": 0.03}, priced=priced)
        page = write(config, comparison)
        html = [(page.parent / name).read_text(encoding="utf-8") for name in ("index.html", "decision.html")]
        pages[priced] = html
        draw_none(monkeypatch)
        row = json.loads((page.parent / "comparison.json").read_text())["arms"][1]
        money = (row["price"], row["per_point"], row["reach_price"])
        assert [value is not None for value in money] == [priced] * 3
        assert (row["hours"], row["gpu_hours"]) == (0.02, 0.0)
    for key in ("price", "per_point", "reach_price"):
        column = f">{phrases[key]}</button>"
        assert column in pages[True][0]
        assert column not in pages[False][0]
    for html in pages[False]:
        assert "compare.prices" in html
        assert "EUR" not in html
    assert phrases["cost in hours"].format(hours="0.0200") in pages[False][1]
    assert "EUR" in pages[True][1]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"),
        (2.16e-05, "< 0.0001"),
        (-2.16e-05, "> -0.0001"),
        (0.000216, "0.000216"),
        (0.0167, "0.0167"),
        (1.0, "1.00"),
        (12.34, "12.3"),
        (1234567.0, "1,234,567"),
        (-0.5, "-0.500"),
    ],
)
def test_amounts_have_three_digits_and_no_exponent(value: float, shown: str):
    assert amount(value) == shown


def test_the_title_of_a_figure_file_is_above_its_legend(monkeypatch: pytest.MonkeyPatch):
    boxes = {}

    def look(figure: Figure, *_: object, **__: object) -> None:
        FigureCanvasAgg(figure).draw()
        boxes["title"] = figure._suptitle.get_window_extent()
        boxes["legend"] = figure.axes[0].get_legend().get_window_extent()

    monkeypatch.setattr(Figure, "savefig", look)
    comparison = made_up_comparison(dict.fromkeys(("random", "source", "cluster", "random-groups", "tas"), 0.0))
    learning_curves(comparison, comparison_phrases("en")).file("png")
    assert boxes["title"].y0 >= boxes["legend"].y1


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="install selenium to look at the report in a browser")
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("no chromium with chromedriver is installed here (Debian: chromium chromium-driver fonts-noto-cjk)")
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


OVERLAPS = """
const found = [];
for (const svg of document.querySelectorAll("figure svg")) {
  const texts = [...svg.querySelectorAll("text")].filter((text) => text.textContent.trim());
  const boxes = texts.map((text) => text.getBoundingClientRect());
  for (let i = 0; i < boxes.length; i++) for (let j = 0; j < i; j++) {
    const [a, b] = [boxes[i], boxes[j]];
    const width = Math.min(a.right, b.right) - Math.max(a.left, b.left);
    const height = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
    if (width > 2 && height > 3) found.push([texts[i].textContent, texts[j].textContent]);
  }
}
return found;
"""


@pytest.mark.parametrize("width", [400, 1400])
def test_in_a_real_browser_it_fits_loads_nothing_and_complains_of_nothing(browser, page: Path, width: int):
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    )
    browser.get_log("performance")
    browser.get(page.as_uri())
    assert browser.get_log("browser") == []
    requests = [entry["message"] for entry in browser.get_log("performance") if "requestWillBeSent" in entry["message"]]
    addresses = set(re.findall(r'"url":"([^"]+)"', " ".join(requests)))
    assert addresses <= {page.as_uri()}
    assert browser.title in {comparison_phrases(language)["title"] for language in ("en", "ja")}
    assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    assert browser.execute_script(OVERLAPS) == []


def test_in_a_real_browser_tables_sort_and_points_explain_themselves(browser, page: Path):
    browser.get(page.as_uri())
    values = "return [...document.querySelectorAll('table.sortable')][0].tBodies[0].rows[0].cells[2].textContent"
    button = "document.querySelectorAll('table.sortable')[0].querySelectorAll('th button')[2]"
    browser.execute_script(f"{button}.click()")
    lowest = float(browser.execute_script(values))
    browser.execute_script(f"{button}.click()")
    assert float(browser.execute_script(values)) > lowest
    assert browser.execute_script(f"return {button}.closest('th').getAttribute('aria-sort')") == "descending"
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.by import By

    browser.execute_script("document.getElementById('cluster-map').scrollIntoView()")
    ActionChains(browser).move_to_element(browser.find_element(By.ID, "cluster-map-point-11")).perform()
    shown = browser.find_element(By.ID, "tip").text
    assert "source1 11 (1,200)" in shown
    assert ATTACK in shown
    assert browser.title != "taken"


def test_in_a_real_browser_dark_mode_has_light_text(browser, page: Path):
    dark = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", dark)
    browser.get(page.as_uri())
    colours = browser.execute_script(
        "return [getComputedStyle(document.body).backgroundColor,"
        " getComputedStyle(document.querySelector('figure text')).fill]"
    )
    background, text = (sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in colours)
    assert background < 150
    assert text > 600
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_a_report_of_arms_that_were_not_compared_is_refused() -> None:
    config = load_config(None, ["workspace=w", "compare.arms=[random,source,communities]"])
    manifest = Manifest(
        kind="comparison",
        fingerprint="0" * 16,
        created="2026-01-01",
        seconds=1.0,
        counts={},
        parts=[],
        details={"arms": {"random": {}, "source": {}}},
    )
    with pytest.raises(UsageError, match=r"compare.arms: communities was not compared here, only random, source"):
        read_comparison(config, Artifact(Folder("nowhere"), "comparison"), manifest)


def test_a_curve_of_one_point_has_no_trend():
    comparison = made_up_comparison({"random": 0.0, "cluster": 0.05})
    ends = [replace(arm, curve=arm.curve[[0, -1]]) for arm in comparison.arms]
    _, cluster = arm_rows(replace(comparison, arms=ends, steps=comparison.steps[[0, -1]]), "en")
    assert cluster["early"] == cluster["late"] == pytest.approx(cluster["difference"])
    assert cluster["trend"] is None


def test_what_the_untrained_model_has_takes_no_steps():
    comparison = made_up_comparison({"random": 0.0, "cluster": 0.05})
    arm = comparison.arm("cluster")
    falling = replace(arm, curve=arm.curve[::-1])
    assert steps_to_reach(comparison, falling, float(falling.curve[-1].mean())) == 0


def test_a_gain_by_source_has_a_colour_only_if_it_is_beyond_chance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    draw_none(monkeypatch)
    monkeypatch.setattr(Plot, "file", lambda self, extension: b"")
    config = load_config(None, [f"workspace={tmp_path}", "compare.arms=[random,cluster]"])
    page = write(config, made_up_comparison({"random": 0.0, "cluster": 0.0}))
    rows = json.loads((page.parent / "comparison.json").read_text())["segments"]
    assert len(rows) == 4
    assert all(row["low"] < 0 < row["high"] for row in rows)
    html = page.read_text(encoding="utf-8")
    assert 'class="gain"' not in html
    assert 'class="loss"' not in html
