"""Imports inside the package: no circle between files or folders, mathematics without Ray, ingest without torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "clusterbatch"
# Its names are imported on first use, so that it may name what imports from it.
LAZY = "clusterbatch"


def modules() -> dict[str, Path]:
    """File by dotted name."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    return found


def imports() -> dict[str, set[str]]:
    """Modules of the package that each module imports anywhere in its code, in functions and for type checkers too."""
    files = modules()
    found: dict[str, set[str]] = {}
    for name, path in files.items():
        found[name] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "clusterbatch":
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    found[name].add(inner if inner in files else node.module)
        found[name].discard(name)
    found[LAZY] = set()
    return found


def folder(module: str) -> str:
    """The room a module is in; experiments are four, other subfolders belong to the folder above them."""
    parts = module.split(".")[1:]
    if not parts:
        return LAZY
    if PACKAGE.joinpath(parts[0]).is_dir():
        return ".".join(parts[:2]) if parts[0] == "experiments" and len(parts) > 2 else parts[0]
    return module


@pytest.mark.parametrize("room", [str, folder], ids=["files", "folders"])
def test_imports_run_in_no_circle(room: Callable[[str], str]) -> None:
    graph: dict[str, set[str]] = {}
    for module, imported in imports().items():
        below = {room(name) for name in imported} - {room(module)}
        graph.setdefault(room(module), set()).update(below)
    # Raises CycleError, which names the circle.
    assert len(list(TopologicalSorter(graph).static_order())) >= len(graph)


def test_mathematics_needs_no_ray() -> None:
    pure = [PACKAGE / name for name in ("encoder", "batches")]
    pure += [PACKAGE / "clustering" / f"{name}.py" for name in ("kmeans", "assign", "partial_sums", "packing_order")]
    pure += [PACKAGE / "training" / f"{name}.py" for name in ("loss", "masks", "grad_cache", "collectives", "step")]
    pure += [PACKAGE / "evaluation" / "metrics.py", PACKAGE / "search" / "topk.py"]
    for place in pure:
        for path in [place] if place.is_file() else place.rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                assert not [name for name in names if name.split(".")[0] == "ray"], path


def test_workers_that_only_move_rows_load_no_torch() -> None:
    """Importing it takes a worker of ingest longer than all else before its first row."""
    code = "import sys, clusterbatch.corpus.passes, clusterbatch.runtime.ray_executor; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
