"""The public names, and the two ways to start the command line."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

import clusterbatch


def test_public_names_are_there() -> None:
    listed = re.findall(r"^- `clusterbatch[a-z_.]*\.(\w+)`", clusterbatch.__doc__, re.MULTILINE)
    assert len(listed) == 6
    for name in listed:
        assert callable(getattr(clusterbatch, name))
        assert name in dir(clusterbatch)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        clusterbatch.nonsense  # noqa: B018


def test_the_package_is_the_command() -> None:
    found = subprocess.run([sys.executable, "-m", "clusterbatch", "--version"], capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (0, f"clusterbatch {clusterbatch.__version__}\n")


def test_help_imports_neither_torch_nor_ray() -> None:
    code = (
        "import sys; from clusterbatch.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'ray', 'transformers'} & set(sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


def test_output_that_is_closed_early_is_no_error() -> None:
    command = f"{sys.executable} -m clusterbatch config | head -1; exit ${{PIPESTATUS[0]}}"
    found = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (found.stdout.count("\n"), found.stderr) == (1, "")
