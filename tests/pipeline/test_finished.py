"""Runs without anything to do: recognised without heavy imports, and never by mistake."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from clusterbatch.config import RunConfig, load_config, with_changes
from clusterbatch.errors import ClusterbatchError
from clusterbatch.pipeline.check_inputs import check_named_files
from clusterbatch.pipeline.finished import finished_report, read_state, record_finished
from clusterbatch.pipeline.run import run
from clusterbatch.store.workspace import Workspace
from tests.encoder.models import make_static
from tests.in_process import OVERRIDES as ONE_PROCESS
from tests.in_process import run_in_process

COMMANDS = """
import contextlib, io, json, sys
from clusterbatch.cli import main

found = []
for words in json.loads(sys.argv[1]):
    with contextlib.redirect_stderr(io.StringIO()) as errors, contextlib.redirect_stdout(io.StringIO()) as output:
        code = main(words)
    heavy = [name for name in ("ray", "torch", "transformers", "matplotlib") if name in sys.modules]
    found.append([code, heavy, output.getvalue() + errors.getvalue()])
print(json.dumps(found))
"""


def in_own_process(*commands: list[str]) -> list[list[Any]]:
    """Return [exit code, heavy modules, all that it printed] of each command; they follow each other in one process."""
    command = [sys.executable, "-c", COMMANDS, json.dumps(commands)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found: list[list[Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def finished_once(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    tmp_path = tmp_path_factory.mktemp("finished")
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
    with pytest.MonkeyPatch.context() as patch:
        run_in_process(patch)
        run(config)
    return config


@pytest.fixture
def finished(finished_once: RunConfig, tmp_path: Path) -> Iterator[RunConfig]:
    """A whole run over pairs and a model in the folder above its workspace; what the test changes is put back."""
    folder = Path(finished_once.workspace).parent
    shutil.copytree(folder, tmp_path / "kept")
    yield finished_once
    shutil.rmtree(folder)
    shutil.move(tmp_path / "kept", folder)


def test_a_finished_run_imports_neither_ray_nor_torch(finished: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(finished.model_dump_json())
    [[code, heavy, printed]] = in_own_process(["run", f"{tmp_path}/run.yaml"])
    assert (code, heavy) == (0, []), printed
    assert printed.count("done already") == 5
    assert f"{finished.workspace}/report/index.html" in printed


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


def test_whatever_has_changed_is_looked_at(finished: RunConfig) -> None:
    folder = Path(finished.workspace).parent
    assert finished_report(with_changes(finished, {"report.language": "ja"})) is None
    for change in CHANGES:
        assert finished_report(finished) == f"{Workspace(finished).report.uri}/index.html"
        change(folder)
        assert finished_report(finished) is None
        if change is CHANGES[-2]:
            (folder / "own/generation=000/clusters/_exchange/fit").rmdir()
            (folder / "own/generation=000/clusters/_exchange").rmdir()
        record_finished(finished, read_state(finished))
    assert finished_report(finished) is None


def test_what_changes_during_a_run_is_not_recorded_as_read(finished: RunConfig) -> None:
    read = read_state(finished)
    _append_pair(Path(finished.workspace).parent)
    record_finished(finished, read)
    assert finished_report(finished) is None


# The words of a command, and what it says of them.
UNREADABLE = [
    (["corpus.paths={}/nothing.jsonl"], "nothing.jsonl: no such file"),
    (["corpus.paths={}/pairs.csv", "corpus.columns.query=title"], "no column title"),
    (["corpus.paths=[{}/pairs.csv,{}/empty.csv]"], "empty.csv: empty file"),
    (["corpus.paths={}/pairs.jsonl", "corpus.columns.query=title"], "pairs.jsonl: query: no column 'title'"),
    (["corpus.paths={}/pairs.csv", "evaluate.path=[{}/nowhere]"], "nowhere is not a collection"),
    (["corpus.paths={}/pairs.csv", "evaluate.path=[{}/topics]"], r"topics has no judgements called test"),
    (["corpus.paths={}/pairs.csv", "train.model={}/nowhere"], "train.model: .*nowhere: no such model folder"),
    (["corpus.paths={}/pairs.csv", "embed.model={}/topics"], "embed.model: .*topics: no model here"),
    (["corpus.paths={}/pairs.csv", "embed.model={}/bare"], "embed.model: .*bare: no weights in the safetensors"),
]


def test_inputs_that_cannot_be_read_are_refused_before_heavy_imports(tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").write_text("query,document\na question,an answer\n")
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "pairs.jsonl").write_text('{"query": "a question", "document": "an answer"}\n' * 2)
    for name in ("corpus", "queries"):
        (tmp_path / "topics").mkdir(exist_ok=True)
        (tmp_path / "topics" / f"{name}.jsonl").write_text('{"_id": "1", "text": "a text"}\n')
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare/config.json").write_text('{"model_type": "bert"}')
    commands = []
    for words, message in UNREADABLE:
        words = [f"workspace={tmp_path}/own", *(word.format(tmp_path, tmp_path) for word in words)]
        with pytest.raises(ClusterbatchError, match=message):
            check_named_files(load_config(None, words))
        commands.append(["run", *words])
    found = in_own_process(*commands)
    for (_, message), (code, heavy, printed) in zip(UNREADABLE, found, strict=True):
        assert code in (2, 3), printed
        assert heavy == [], printed
        assert re.search(message, printed), (message, printed)
    assert not (tmp_path / "own").exists()
