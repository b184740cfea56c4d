"""The command that runs the benchmarks: what it says, not how fast anything is."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.benchmarks import running
from tests.benchmarks.__main__ import main
from tests.benchmarks.catalogue import CATALOGUE, WORKSPACE, Benchmark
from tests.benchmarks.figures import emit
from tests.benchmarks.generated_corpus import Sentences, rows_of
from tests.benchmarks.promises import PROMISES
from tests.benchmarks.running import Given, Outcome, run
from tests.benchmarks.table import as_markdown

HERE = Path(__file__).parent / "benchmarks"


def test_one_benchmark_in_a_table_and_in_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {"json": tmp_path / "figures.json", "markdown": tmp_path / "figures.md"}
    words = [word for name, file in files.items() for word in (f"--{name}", str(file))]
    assert main(["plan-coverage", "--quick", *words]) == 0
    printed = capsys.readouterr().out
    assert "plan, violations of coverage" in printed
    assert "value == 0" in printed
    found = json.loads(files["json"].read_text())
    assert found["machine"]["cores"] >= 1
    (benchmark,) = found["benchmarks"]
    figures = {line["figure"]: line for line in benchmark["figures"]}
    assert figures["plan, violations of coverage"]["kept"] is True
    assert benchmark["command"] == "python -m tests.benchmarks.plan_coverage --cases 50"
    assert "| plan, violations of coverage (50 random plans) | 0 |" in files["markdown"].read_text().replace("  ", " ")


def test_what_is_not_there_is_listed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("CLUSTERBATCH_DATA", "/nowhere")
    assert main(["training", "kmeans", "samples"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.count("skipped; needs") == 3
    assert "CLUSTERBATCH_DATA" in printed
    assert "--workspace" in printed


def test_a_benchmark_that_fails_is_a_failure(capfd: pytest.CaptureFixture[str]) -> None:
    broken = Benchmark("broken", "bench_assignment", "{workspace} --rows none", "", WORKSPACE)
    outcome = run(broken, Given(workspace="anywhere"))
    assert outcome.failure == "ended with 2 after 0 figures"
    assert "invalid int value: 'none'" in capfd.readouterr().err


def test_an_unknown_name_says_which_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["plans"])
    assert caught.value.code == 2
    assert "no benchmark is called plans; there are embedding" in capsys.readouterr().err


def test_a_figure_is_judged_by_its_promise(capsys: pytest.CaptureFixture[str]) -> None:
    name = "training, pairs/s against Sentence Transformers' cached loss"
    emit(name, 19.0, "pairs/s", peer=10.0)
    emit(name, 21.0, "pairs/s", case="batch 256", peer=10.0, steps=2)
    emit("something new", 1e-9)
    missed, kept, new = running.figures_of(capsys.readouterr().out)
    assert (missed["ratio"], missed["promise"], missed["kept"]) == (1.9, "ratio >= 2", False)
    assert (kept["kept"], kept["steps"]) == (True, 2)
    assert (new["value"], new["promise"], new["kept"]) == (1e-9, None, None)
    table = as_markdown([Outcome("training", "command", 1.0, [missed, kept])], quick=False)
    assert "| 19 pairs/s | 10 | 1.9 | ratio >= 2 | NO |" in table


def test_every_benchmark_is_in_the_catalogue() -> None:
    scripts = {file.stem for file in HERE.glob("*.py") if 'if __name__ == "__main__"' in file.read_text()}
    # The command itself, tools that prepare a workspace and a corpus, and those that read what another has left.
    tools = {"__main__", "real_workspace", "generated_corpus", "grid_predictors", "grid_mask_report"}
    assert {benchmark.module for benchmark in CATALOGUE} == scripts - tools


@pytest.mark.parametrize("name", sorted(benchmark.module for benchmark in CATALOGUE))
def test_every_benchmark_can_be_started(name: str) -> None:
    """Nothing else notices that what it imports from others has moved."""
    pytest.importorskip("ranx", reason="needs the extra `bench`")
    assert callable(importlib.import_module(f"tests.benchmarks.{name}").main)


def test_every_promise_has_a_figure() -> None:
    """Names that are put together from two pieces are in the source as such."""
    source = "".join(file.read_text() for file in HERE.glob("*.py") if file.name != "promises.py")
    prefixes = ("k-means fit, ", "plan, ", "embedding, rows/s against", "metrics, ", "training, pairs/s against")
    missing = [name for name in PROMISES if name not in source and not name.startswith(prefixes)]
    assert not missing


def test_generated_rows_depend_on_their_number_alone(tmp_path: Path) -> None:
    (tmp_path / "pairs").mkdir()
    text = " ".join(f"Sentence {number} of a text that is long enough." for number in range(400))
    pq.write_table(pa.table({"document": [text], "source": ["a"]}), tmp_path / "pairs" / "a.parquet")
    sentences = Sentences(tmp_path)
    numbers = np.arange(20_000)
    whole = rows_of(numbers, sentences, seed=1)
    pieces = [rows_of(numbers[start : start + 3_000], sentences, seed=1) for start in range(0, 20_000, 3_000)]
    assert pa.concat_tables(pieces) == whole
    assert rows_of(numbers, sentences, seed=2) != whole
    pairs = list(zip(whole["query"].to_pylist(), whole["document"].to_pylist(), strict=True))
    # Besides what is repeated on purpose, short documents of one sentence meet.
    longer = [pair for pair in pairs if len(pair[1]) > 300]
    assert 0.03 < 1 - len(set(longer)) / len(longer) < 0.07
    sources = whole["source"].value_counts().to_pylist()
    assert 0.18 < max(entry["counts"] for entry in sources) / len(numbers) < 0.22
