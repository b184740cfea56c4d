"""Runs without anything to do: recognised without heavy imports, and never by mistake."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from clusterbatch.config import RunConfig, load_config, with_changes
from clusterbatch.errors import ClusterbatchError
from clusterbatch.pipeline.check_inputs import check_named_files
from clusterbatch.pipeline.finished import finished_report, read_state, record_finished
from clusterbatch.pipeline.run import run
from clusterbatch.store.workspace import Workspace
from tests.encoder.models import make_static
from tests.in_process import OVERRIDES as ONE_PROCESS

COMMAND = """
import json, sys
from clusterbatch.cli import main

code = main(sys.argv[1:])
heavy = [name for name in ("ray", "torch", "transformers", "matplotlib") if name in sys.modules]
print(json.dumps([code, heavy]))
"""


def in_own_process(*words: str) -> tuple[list[object], str]:
    """Return [exit code, heavy modules] of a command, and all that it printed."""
    done = subprocess.run([sys.executable, "-c", COMMAND, *words], capture_output=True, text=True, timeout=120)
    return json.loads(done.stdout.splitlines()[-1]), done.stdout + done.stderr


@pytest.fixture
def finished(tmp_path: Path, in_process: None) -> RunConfig:
    words = ["harbour", "volcano", "guitar", "orchard"]
    make_static(words, tmp_path / "model")
    pairs = [{"query": f"{words[n % 4]} {n}", "document": f"{words[n // 4 % 4]} {n}"} for n in range(200)]
    (tmp_path / "pairs.jsonl").write_text("".join(f"{json.dumps(pair)}\n" for pair in pairs))
    config = load_config(
        None,
        [
            f"workspace={tmp_path}/own",
            f"corpus.paths={tmp_path}/pairs.jsonl",
            "embed.model=char-ngrams",
            "cluster.clusters=2",
            "batches.size=16",
            f"train.model={tmp_path}/model",
            "train.steps=2",
            "train.workers=1",
            *ONE_PROCESS,
        ],
    )
    run(config)
    return config


def test_a_finished_run_imports_neither_ray_nor_torch(finished: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(finished.model_dump_json())
    result, printed = in_own_process("run", f"{tmp_path}/run.yaml")
    assert result == [0, []], printed
    assert printed.count("done already") == 5
    assert f"{tmp_path}/own/report/index.html" in printed


def _append_pair(folder: Path) -> None:
    with (folder / "pairs.jsonl").open("a") as file:
        file.write('{"query": "one", "document": "more"}\n')


def _swap_model(folder: Path) -> None:
    with (folder / "model/model.safetensors").open("ab") as file:
        file.write(b"more")


# The last one leaves a workspace that is not finished.
CHANGES: list[Callable[[Path], object]] = [
    _append_pair,
    _swap_model,
    lambda folder: (folder / "own/model/model.safetensors").unlink(),
    lambda folder: (folder / "own/report/index.html").write_text("of somebody else"),
    lambda folder: (folder / "own/metrics.json").write_text("{}"),
    lambda folder: (folder / "own/_run.json").write_text("[]"),
    lambda folder: (folder / "own/generation=000/clusters/_exchange/fit").mkdir(parents=True),
    lambda folder: (folder / "own/generation=000/train/manifest.json").unlink(),
]


def test_whatever_has_changed_is_looked_at(finished: RunConfig, tmp_path: Path) -> None:
    assert finished_report(with_changes(finished, {"report.language": "ja"})) is None
    for change in CHANGES:
        assert finished_report(finished) == f"{Workspace(finished).report.uri}/index.html"
        change(tmp_path)
        assert finished_report(finished) is None
        if change is CHANGES[-2]:
            (tmp_path / "own/generation=000/clusters/_exchange/fit").rmdir()
            (tmp_path / "own/generation=000/clusters/_exchange").rmdir()
        record_finished(finished, read_state(finished))
    assert finished_report(finished) is None


def test_what_changes_during_a_run_is_not_recorded_as_read(finished: RunConfig, tmp_path: Path) -> None:
    read = read_state(finished)
    _append_pair(tmp_path)
    record_finished(finished, read)
    assert finished_report(finished) is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["corpus.paths={}/nothing.jsonl"], "nothing.jsonl: no such file"),
        (["corpus.paths={}/pairs.csv", "corpus.columns.query=title"], "no column title"),
        (["corpus.paths=[{}/pairs.csv,{}/empty.csv]"], "empty.csv: empty file"),
        (["corpus.paths={}/pairs.jsonl", "corpus.columns.query=title"], "pairs.jsonl: query: no column 'title'"),
        (["corpus.paths={}/pairs.csv", "evaluate.path=[{}/nowhere]"], "nowhere is not a collection"),
        (["corpus.paths={}/pairs.csv", "evaluate.path=[{}/topics]"], r"topics has no judgements called test"),
        (["corpus.paths={}/pairs.csv", "train.model={}/nowhere"], "train.model: .*nowhere: no such model folder"),
        (["corpus.paths={}/pairs.csv", "embed.model={}/topics"], "embed.model: .*topics: no model here"),
        (["corpus.paths={}/pairs.csv", "embed.model={}/bare"], "embed.model: .*bare: no weights in the safetensors"),
    ],
)
def test_inputs_that_cannot_be_read_are_refused_before_heavy_imports(
    words: list[str], message: str, tmp_path: Path
) -> None:
    (tmp_path / "pairs.csv").write_text("query,document\na question,an answer\n")
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "pairs.jsonl").write_text('{"query": "a question", "document": "an answer"}\n' * 2)
    for name in ("corpus", "queries"):
        (tmp_path / "topics").mkdir(exist_ok=True)
        (tmp_path / "topics" / f"{name}.jsonl").write_text('{"_id": "1", "text": "a text"}\n')
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare/config.json").write_text('{"model_type": "bert"}')
    words = [f"workspace={tmp_path}/own", *(word.format(tmp_path, tmp_path) for word in words)]
    with pytest.raises(ClusterbatchError, match=message):
        check_named_files(load_config(None, words))
    result, printed = in_own_process("run", *words)
    assert result in ([2, []], [3, []]), printed
    assert re.search(message, printed)
    assert not (tmp_path / "own").exists()
