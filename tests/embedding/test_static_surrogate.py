"""jobs/static_surrogate.py, which fits a static surrogate to a sample of a corpus."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from clusterbatch.config import RunConfig, with_changes
from clusterbatch.embedding.stage import embed
from tests.encoder.corpora import commit_corpus, corpus_table

_JOB = str(Path(__file__).parents[2] / "jobs" / "static_surrogate.py")


def _run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", [_JOB, *words])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(_JOB, run_name="__main__")
    return int(ended.value.code or 0)


def test_a_corpus_is_embedded_with_what_was_fitted_to_it(
    tmp_path: Path, tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, in_process: None
) -> None:
    config = RunConfig(workspace=str(tmp_path / "run"))
    queries = [f"the fox number {row}" for row in range(60)]
    documents = [f"the lazy dog sleeps {'all day ' * (row % 20)}" for row in range(60)]
    commit_corpus(config, corpus_table(queries, documents, ["one"] * 60), row_group_rows=25, part_rows=50)
    # A path with an equals sign, as the commands take it.
    (tmp_path / "kind=static.yaml").write_text(f"workspace: {config.workspace}\n")
    words = [str(tmp_path / "kind=static.yaml"), f"embed.model={tiny('bert')}", "embed.max_tokens=32"]
    output = str(tmp_path / "static")
    assert _run(monkeypatch, *words, "--output", output, "--pairs", "40") == 0
    manifest = embed(with_changes(config, {"embed.model": output, "embed.device": "cpu"}))
    assert manifest.counts.written == 60
    # What is left of the work is the model alone.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kind=static.yaml", "run", "static"]


def test_mistakes_are_one_line_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"workspace={tmp_path / 'run'}", "--output"]
    new = str(tmp_path / "static")
    for wrong, message in (
        ([*words, str(tmp_path)], "exists already"),
        ([*words, new, "--pairs", "0"], "--pairs: at least one"),
        (["embed.model=char-ngrams", *words, new], "only a transformer"),
        ([*words, new], "no finished corpus"),
    ):
        assert _run(monkeypatch, *wrong) in (2, 3)
        line = capsys.readouterr().err
        assert message in line
        assert line.count("\n") == 1
    assert not (tmp_path / "static").exists()
