"""The installed package, seen from outside the checkout: `python check_installed.py VERSION`."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import clusterbatch


def output_of(*words: str) -> str:
    return subprocess.run(["clusterbatch", *words], check=True, capture_output=True, text=True).stdout


def main() -> None:
    folder = Path(clusterbatch.__file__).parent
    assert folder.is_relative_to(sys.prefix), f"imported from {folder}, not from what was installed"
    assert (folder / "py.typed").is_file(), "type information is not shipped"
    assert output_of("--version").split() == ["clusterbatch", sys.argv[1]]
    assert "clusterbatch" in {script.name for script in entry_points(group="console_scripts")}
    commands = re.findall(r"^    (\w+)  ", output_of("--help"), re.MULTILINE)
    assert len(commands) >= 14, commands
    for command in commands:
        assert f"usage: clusterbatch {command}" in output_of(command, "--help")
    print(f"clusterbatch {sys.argv[1]} in {folder}; {len(commands)} commands: {' '.join(commands)}")


if __name__ == "__main__":
    main()
