"""Structured lines: each is one JSON object that says whose it is."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import pytest

from clusterbatch import cli
from clusterbatch.cli import main
from clusterbatch.embedding.stage import warn_of_unknown
from clusterbatch.log import LOG_FORMAT, log_context, say
from clusterbatch.runtime import ProgressLine


def test_plain_lines_are_for_people(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(LOG_FORMAT, raising=False)
    with log_context(run="w"):
        say("embed: 3 rows", rows=3)
    assert capsys.readouterr().err == "embed: 3 rows\n"


def test_one_is_not_called_many(capsys: pytest.CaptureFixture[str]) -> None:
    for unit in ("rows", "parts", "KiB of documents"):
        with ProgressLine("embed", total=1, unit=unit) as line:
            line.advance(1)
    assert [line.split(" in ")[0] for line in capsys.readouterr().err.splitlines()[::2]] == [
        "embed: 1 row",
        "embed: 1 part",
        "embed: 1 KiB of documents",
    ]


def test_structured_lines_carry_their_context(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LOG_FORMAT, "json")
    with log_context(run="s3://b/run"), log_context(stage="embed", generation=2):
        with ProgressLine("embed", total=4) as line:
            line.advance(4)
        say('a "quoted"\nline', level="warning")
    say("after")
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [line["message"].split(" in ")[0] for line in lines] == [
        "embed: 4 rows",
        "embed: 4 rows",
        'a "quoted"\nline',
        "after",
    ]
    assert all((line["run"], line["stage"], line["generation"]) == ("s3://b/run", "embed", 2) for line in lines[:3])
    assert [line["level"] for line in lines] == ["info", "info", "warning", "info"]
    assert (lines[1]["work"], lines[1]["done"], lines[1]["total"]) == ("embed", 4, 4)
    assert "run" not in lines[3]


def test_the_last_line_of_a_failure_is_structured_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LOG_FORMAT, "json")
    assert main(["embed", "cluster.meansize=3"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    found = json.loads(line)
    assert found["level"] == "error"
    assert found["exit_code"] == 2
    assert "cluster.meansize" in found["message"]


def test_a_bug_is_one_structured_line_with_its_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise KeyError("nonsense")

    monkeypatch.setattr(cli, "load_words", broken)
    monkeypatch.delenv(LOG_FORMAT, raising=False)
    with pytest.raises(KeyError):
        main(["embed"])
    capsys.readouterr()
    monkeypatch.setenv(LOG_FORMAT, "json")
    assert main(["embed"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    found = json.loads(line)
    assert (found["level"], found["exit_code"]) == ("error", 1)
    assert found["message"] == "clusterbatch: a bug: KeyError: 'nonsense'"
    assert "in broken" in found["traceback"]


def test_a_command_that_does_not_exist_is_a_structured_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LOG_FORMAT, "json")
    for words in (["nonsense"], ["embed", "--nonsense"], ["clean", "--keep", "few"]):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert json.loads(line)["exit_code"] == 2


def test_warnings_are_structured_too(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LOG_FORMAT, "json")
    warn_of_unknown("model", {"english": 0.001, "japanese": 0.5})
    (line,) = capsys.readouterr().err.splitlines()
    found = json.loads(line)
    assert (found["level"], found["source"], found["share"]) == ("warning", "japanese", 0.5)


def test_no_module_warns_past_the_structured_lines() -> None:
    """Python's logging writes plain lines to standard error where nobody has set it up."""
    package = Path(cli.__file__).parent
    sources = {path: path.read_text() for path in package.rglob("*.py")}
    assert [
        path.name for path, text in sources.items() if re.search(r"_?logg(er|ing)\.(warning|error|info)\(", text)
    ] == []


def test_lines_reach_the_loggers_of_the_program_that_imports_it(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("clusterbatch")
    logger.addHandler(caplog.handler)
    try:
        with log_context(run="w"):
            say("embed: 3 rows", level="warning", rows=3)
    finally:
        logger.removeHandler(caplog.handler)
    (record,) = caplog.records
    assert (record.getMessage(), record.levelname, record.name) == ("embed: 3 rows", "WARNING", "clusterbatch")
    assert record.__dict__["figures"] == {"run": "w", "rows": 3}


def test_a_program_can_silence_it(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("clusterbatch")
    level = logger.level
    logger.setLevel("ERROR")
    try:
        say("embed: 3 rows")
        say("lost", level="error")
    finally:
        logger.setLevel(level)
    assert capsys.readouterr().err == "lost\n"


def test_a_message_with_percent_signs_is_no_format(capsys: pytest.CaptureFixture[str]) -> None:
    say("100 %s of %d")
    assert capsys.readouterr().err == "100 %s of %d\n"
