"""Provenance of an artifact besides its configuration and inputs: versions of software, and the commit of this code."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_PACKAGES = ("clusterbatch", "ray", "torch", "transformers", "faiss-cpu", "pyarrow", "numpy")
_GIT_SECONDS = 5


def software_versions() -> dict[str, str]:
    """Versions of the software that can change a result; `commit` if it is known."""
    commit = source_commit()
    return {**_package_versions(), **({"commit": commit} if commit else {})}


@cache
def _package_versions() -> Mapping[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


@cache
def source_commit() -> str | None:
    """Return the commit of this code: that of the checkout it runs from (with `-dirty` if files were changed),
    otherwise the environment's (CLUSTERBATCH_REVISION, which the container image sets), otherwise None."""
    checkout = Path(__file__).parents[2]
    if (checkout / ".git").exists():
        command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_SECONDS, check=True)
            return done.stdout.strip()
        except (OSError, subprocess.SubprocessError):
            # No git, or a checkout that belongs to another user: then as if there were no checkout.
            pass
    return os.environ.get("CLUSTERBATCH_REVISION")
