"""Checks of the Markdown pages: links, files, commands, configuration keys and imports that they name exist."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from clusterbatch.cli import main
from clusterbatch.commands import COMMANDS
from clusterbatch.config import RunConfig

ROOT = Path(__file__).parents[1]
FOLDERS = ("clusterbatch", "deploy", "jobs", "tests")
PAGES = sorted([*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))])
# setuptools includes these by itself.
ALWAYS = {"README.md", "LICENSE", "pyproject.toml", "MANIFEST.in"}
# Files that a run writes, and names that stand for a user's own.
WRITTEN = {"tune/chosen.yaml", "CONFIG.yaml", "run.yaml"}
ENDINGS = {"html", "json", "jsonl", "md", "parquet", "py", "yaml"}

each_page = pytest.mark.parametrize("page", PAGES, ids=[page.relative_to(ROOT).as_posix() for page in PAGES])


def links(page: Path) -> list[tuple[str, str]]:
    """Return (path, anchor) of every link that is not a URL; either may be empty."""
    return re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def code(page: Path) -> list[str]:
    """Return the code blocks and the inline code of a page."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"```\w*\n(.*?)```", text, re.DOTALL)
    return [*blocks, *re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))]


@each_page
def test_links_lead_to_a_page_and_to_a_heading_of_it(page: Path) -> None:
    for path, anchor in links(page):
        target = (page.parent / path) if path else page
        assert target.exists(), path
        if anchor:
            assert anchor in anchors(target), f"{path}#{anchor}"


@pytest.mark.parametrize("document", ["README.md", "FAQ.md"])
def test_linked_files_are_in_the_source_distribution(document: str) -> None:
    found = [path for path, _ in links(ROOT / document) if path]
    assert found
    lines = [line.split() for line in (ROOT / "MANIFEST.in").read_text().splitlines()]
    carried = ALWAYS | {name for line in lines if line and line[0] in ("include", "graft") for name in line[1:]}
    for link in found:
        assert Path(link).parts[0] in carried, link


@each_page
def test_named_source_files_exist(page: Path) -> None:
    bases = [ROOT, page.parent, ROOT / "clusterbatch"]
    for text in code(page):
        for name in re.findall(r"(?<![\w/.:*=-])[\w-]+(?:/[\w-]+)*\.(?:py|yaml|yml|sh|toml)\b(?![\w/])", text):
            if "/" in name and not name.startswith(("runs/", "data/")) and name not in WRITTEN:
                assert any((base / name).is_file() for base in bases), name


@each_page
def test_named_commands_and_options_exist(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text in code(page):
        for line in text.replace("\\\n", " ").splitlines():
            words = line.split("#")[0].split()
            if len(words) < 2 or words[0] != "clusterbatch" or not re.fullmatch("[a-z]+", words[1]):
                continue
            with pytest.raises(SystemExit) as ended:
                main([words[1], "--help"])
            shown = capsys.readouterr().out
            assert ended.value.code == 0, line
            for word in words[2:]:
                if word.startswith("--"):
                    assert word.split("=")[0] in shown, line


def test_the_readme_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    commands = set(re.findall(r"^    ([a-z]+)\b", capsys.readouterr().out, re.MULTILINE))
    assert "ingest" in commands
    table = re.search(r"^## Commands$.*?^## ", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert table
    rows = [row.split("|")[1] for row in table[0].splitlines() if row.startswith("| `")]
    assert {name for row in rows for name in re.findall(r"`([a-z]+)", row)} == commands


def test_every_command_has_a_script_to_submit_but_those_that_are_named() -> None:
    page = " ".join((ROOT / "deploy" / "README.md").read_text(encoding="utf-8").split())
    [named] = re.findall(r"has a script for every command except ([^.]+), which run anywhere", page)
    without = {name for name in COMMANDS if not (ROOT / "jobs" / f"{name}.py").is_file()}
    assert without == set(re.findall(r"`(\w+)`", named)) - {"sample", "config"}


@each_page
def test_named_configuration_keys_exist(page: Path) -> None:
    if page.name == "CHANGELOG.md":
        return  # also names keys of earlier versions
    for key in configuration_keys(page):
        model: type[BaseModel] | None = RunConfig
        for name in key.split("."):
            if model is None:
                break  # a mapping of the user's own keys
            assert name in model.model_fields, key
            kind = model.model_fields[name].annotation
            kinds = [kind, *getattr(kind, "__args__", ())]
            model = next((each for each in kinds if isinstance(each, type) and issubclass(each, BaseModel)), None)


def configuration_keys(page: Path) -> Iterator[str]:
    """Yield the dotted keys in the code of a page, such as `cluster.mean_size`."""
    sections = "|".join(name for name, field in RunConfig.model_fields.items() if name != "workspace")
    for text in code(page):
        for key in re.findall(rf"(?<![\w./])((?:{sections})(?:\.[a-z_]+)+)(?![\w(/*])", text):
            if key.rsplit(".", 1)[1] not in ENDINGS:
                yield key


def test_configuration_keys_are_found_in_pages() -> None:
    assert {"train.mask.surrogate_margin", "cluster.mean_size"} <= {
        key for page in PAGES for key in configuration_keys(page)
    }


@each_page
def test_imports_of_python_examples_resolve(page: Path) -> None:
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] == "clusterbatch":
                module = importlib.import_module(str(node.module))
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{node.module}: {alias.name}"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
