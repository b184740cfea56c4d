"""What the tests of deploy/ look at: YAML documents, the command lines in them, and those in the documentation."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
KUBERNETES = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
# Programs whose command lines can be tried on any machine that has the test environment.
PROGRAMS = ("clusterbatch", "python", "ray")


def documents(path: Path) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def strings(value: Any) -> Iterator[str]:
    """Every string of a YAML document."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from strings(item)


def pod_specs(value: Any) -> Iterator[dict[str, Any]]:
    """Every pod specification of a YAML document."""
    if isinstance(value, dict):
        if "containers" in value:
            yield value
        for item in value.values():
            yield from pod_specs(item)
    elif isinstance(value, list):
        for item in value:
            yield from pod_specs(item)


def command_lines(text: str) -> Iterator[list[str]]:
    """Command lines of PROGRAMS in a text, as words; continued lines are joined, comments and prompts left out."""
    for line in text.replace("\\\n", " ").splitlines():
        line = re.sub(r"\$\((?:[^()]|\([^()]*\))*\)", "value", line.strip().removeprefix("#").strip())
        # What follows a `;`, `&&` or `(` is a command of its own, or prose.
        for command in re.split(r"\s*(?:;|&&|\s\()\s*", line):
            try:
                words = shlex.split(command, comments=True)
            except ValueError:
                continue
            while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                words = words[1:]
            if len(words) > 1 and words[0] in PROGRAMS:
                yield words


def code_blocks(markdown: str) -> str:
    return "\n".join(re.findall(r"```(?:bash|sh|yaml)\n(.*?)```", markdown, flags=re.DOTALL))


def all_command_lines() -> list[tuple[str, list[str]]]:
    """(where, words) of every command line in manifests, jobs and documentation."""
    found = []
    for path in [*KUBERNETES, DEPLOY / "aws" / "cluster.yaml"]:
        for text in [path.read_text(), *(value for document in documents(path) for value in strings(document))]:
            found += [(path.name, words) for words in command_lines(text)]
    for path in [ROOT / "README.md", DEPLOY / "README.md"]:
        found += [(path.name, words) for words in command_lines(code_blocks(path.read_text()))]
    for path in sorted((ROOT / "jobs").iterdir()):
        if path.suffix in (".py", ".yaml"):
            quoted = re.findall(r"`([^`]+)`", path.read_text())
            found += [(path.name, words) for text in quoted for words in command_lines(text)]
    return found
