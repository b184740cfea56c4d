"""Every command line in manifests and documentation exists, takes those options and loads that configuration."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from clusterbatch.cli import main
from clusterbatch.config import load_config
from tests.deploy.manifests import ROOT, all_command_lines

LINES = sorted({(where, tuple(words)) for where, words in all_command_lines()})


def test_there_are_command_lines_to_check() -> None:
    programs = {words[0] for _, words in LINES}
    assert programs == {"clusterbatch", "python", "ray"}
    assert len(LINES) > 20


@pytest.mark.parametrize(("where", "words"), LINES, ids=[f"{where}: {' '.join(words)[:60]}" for where, words in LINES])
def test_command_line(where: str, words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    program, *rest = words
    if program == "ray":
        check_ray(rest, capsys)
    elif program == "python":
        check_python(rest, capsys)
    else:
        check_clusterbatch(rest, capsys)


def check_ray(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    from ray.scripts.scripts import cli

    own = words[: words.index("--")] if "--" in words else words
    names = [word for word in own if not word.startswith("-")]
    command = names[:2] if names[0] == "job" else names[:1]
    result = CliRunner().invoke(cli, [*command, "--help"])
    assert result.exit_code == 0, result.output
    for word in own:
        if word.startswith("--"):
            assert re.search(rf"{re.escape(word.split('=')[0])}\b", result.output), word
    if len(own) < len(words):
        program, *rest = words[len(own) + 1 :]
        (check_python if program == "python" else check_clusterbatch)(rest, capsys)


def check_python(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    if words[0] == "-m":
        return
    script = ROOT / words[0]
    assert script.is_file()
    source = script.read_text()
    command = re.search(r'main\(\["(\w+)", \*sys\.argv', source)
    if command:
        check_clusterbatch([command[1], *words[1:]], capsys)
    else:
        for word in words[1:]:
            if word.startswith("--"):
                assert f'"{word}"' in source, word
        # Its options, with values of their own, come last.
        own = next((place for place, word in enumerate(words) if word.startswith("--")), len(words))
        check_configuration(words[1:own])


def check_clusterbatch(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    if words[0].startswith("-"):
        return
    with pytest.raises(SystemExit) as ended:
        main([words[0], "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    for word in words[1:]:
        if word.startswith("--"):
            assert word.split("=")[0] in shown, word
    if words[0] != "sample":
        # What is neither a file in front nor key=value is the value of an option.
        given = [word for word in words[1:] if not word.startswith("--")]
        check_configuration([word for place, word in enumerate(given) if place == 0 or "=" in word])


def check_configuration(words: list[str]) -> None:
    """A configuration of jobs/ (mounted elsewhere in a cluster) and overrides must load together."""
    if not words or any(word.isupper() or word in ("CONFIG.yaml", "key=value") for word in words):
        return
    path, overrides = (words[0], words[1:]) if "=" not in words[0] else (None, words)
    if path is not None:
        assert (ROOT / "jobs" / Path(path).name).is_file(), path
        path = str(ROOT / "jobs" / Path(path).name)
    load_config(
        path, overrides if path or any(word.startswith("workspace=") for word in words) else [*words, "workspace=w"]
    )
