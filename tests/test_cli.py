import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from clusterbatch.cli import main
from clusterbatch.commands import COMMANDS, Command, Outcome, _copy_reports
from clusterbatch.config import load_config
from clusterbatch.errors import InfrastructureError


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for command in ("sample", "ingest", "embed", "cluster", "train", "evaluate", "run", "report", "inspect"):
        assert command in text


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["run", "cluster.nonsense=1"], 2, "cluster.nonsense: unknown key"),
        (["run", "nowhere.yaml"], 2, "nowhere.yaml: No such file"),
        (["run", "workspace={}/w"], 2, "corpus.paths"),
        (["embed", "workspace={}/empty"], 3, "no finished corpus here"),
        (["ingest", "workspace={}/w", "corpus.paths={}/nothing.parquet"], 2, "nothing.parquet"),
        (["ingest", "workspace=ftp://host/w", "corpus.paths=a"], 2, "unknown scheme"),
        (["report", "workspace={}/empty"], 3, "nothing to report"),
    ],
)
def test_mistakes_are_one_line_and_an_exit_code(
    arguments: list[str], code: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([word.replace("{}", str(tmp_path)) for word in arguments]) == code
    output = capsys.readouterr()
    lines = [line for line in output.err.splitlines() if line]
    assert len(lines) == 1, output.err
    assert lines[0].startswith("clusterbatch: ")
    assert message in lines[0]


@pytest.mark.parametrize("place", range(3))
def test_options_may_stand_anywhere_among_the_words(
    place: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "metrics.json").write_text("{}")
    words = [f"workspace={tmp_path}", "cluster.seed=1"]
    words.insert(place, "--json")
    assert main(["inspect", *words]) == 0
    assert json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("words", [["inspect", "a.yaml", "--nonsense"], ["sample", "folder", "a=b"]])
def test_what_no_command_knows_is_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    assert "unrecognized arguments" in capsys.readouterr().err


def test_inspect_says_what_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Nothing of ours is here: the address is wrong.
    (tmp_path / "notes.txt").write_text("of somebody else")
    assert main(["inspect", f"workspace={tmp_path}/mistyped"]) == 2
    assert main(["clean", f"workspace={tmp_path}/mistyped"]) == 2
    assert not (tmp_path / "mistyped").exists()
    assert main(["inspect", f"workspace={tmp_path}", "--json"]) == 2
    assert f"no run has been at {tmp_path}" in capsys.readouterr().err
    # A run that has just begun.
    (tmp_path / "_lease.json").write_text("{}")
    assert main(["inspect", f"workspace={tmp_path}", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["state"] for row in rows} == {"not begun"}


@pytest.mark.parametrize("as_json", [[], ["--json"]], ids=["table", "json"])
def test_a_closed_pipe_is_no_bug(as_json: list[str]) -> None:
    """As with `| head`: whoever reads has what it wants, at once or when Python writes what is left at its exit."""
    program = "import sys; from clusterbatch.cli import main; sys.exit(main(sys.argv[1:]))"
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-c", program, "config", "report", *as_json], stdout=writing, stderr=subprocess.PIPE, text=True
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_broken_pipe_that_is_not_the_outputs_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(config: object, options: object) -> Outcome:
        raise BrokenPipeError

    monkeypatch.setitem(COMMANDS, "inspect", Command("test", broken, exclusive=False))
    with pytest.raises(BrokenPipeError):
        main(["inspect", "workspace=w"])


def test_json_has_no_numbers_that_json_does_not_have(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {"a": [math.nan, 1.5], "b": {"c": (-math.inf, "x")}}
    command = Command("test", lambda config, options: Outcome(found), exclusive=False)
    monkeypatch.setitem(COMMANDS, "inspect", command)
    assert main(["inspect", "workspace=w", "--json"]) == 0

    def refuse(name: str) -> None:
        raise AssertionError(name)

    shown = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert shown == {"a": [None, 1.5], "b": {"c": [None, "x"]}}


def test_a_configuration_in_a_folder_with_an_equals_sign(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "batch=16" / "run.yaml"
    file.parent.mkdir()
    file.write_text(f"workspace: {tmp_path}/w\n")
    assert main(["inspect", str(file)]) == 2
    assert f"no run has been at {tmp_path}/w" in capsys.readouterr().err


@pytest.mark.parametrize(("encoding", "shown"), [("ascii", b"\\xfc\\ud800"), ("utf-8", b"\xc3\xbc\\ud800")])
def test_names_that_the_terminal_cannot_write_end_no_command(
    encoding: str, shown: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text(f'workspace: w\ncorpus: {{source: "\\u00fc\\ud800{name}"}}\n')
    output = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(output, encoding=encoding))
    assert main(["config", "--difference", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert shown + b"a" in output.getvalue()


def test_reports_are_copied_or_the_place_is_named_that_cannot_be_written(tmp_path: Path) -> None:
    config = load_config(None, [f"workspace={tmp_path}/w"])
    page = tmp_path / "w" / "report" / "index.html"
    page.parent.mkdir(parents=True)
    page.write_text("page")
    _copy_reports(config, str(tmp_path / "copy"))
    assert (tmp_path / "copy" / "report" / "index.html").read_text() == "page"
    with pytest.raises(InfrastructureError, match=f"{page}/report/index.html: cannot be written"):
        _copy_reports(config, str(page))
