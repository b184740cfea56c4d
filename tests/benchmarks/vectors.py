"""Real vectors for benchmarks, and how work on them is timed."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from clusterbatch.clustering.features import unit_length
from clusterbatch.config import RunConfig
from clusterbatch.embedding.vectors import vector_values
from clusterbatch.store.tables import read_parquet
from clusterbatch.store.workspace import Workspace


def vector_arguments(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("vectors", help="folder of .npy files (n, D), or a workspace with embeddings")
    parser.add_argument("--rows", type=int, help="take so many, at random; default: all")
    parser.add_argument("--clusters", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    return parser


def load_vectors(place: str, rows: int | None) -> np.ndarray:
    """(n, D) float32 of unit length, in random order."""
    files = sorted(Path(place).glob("*.npy")) if Path(place).is_dir() else []
    if files:
        pieces = [np.load(file) for file in files if ".tmp" not in file.name]
    else:
        artifact = Workspace(RunConfig(workspace=place)).embeddings()
        tables = [read_parquet(artifact.folder, part) for part in artifact.require().parts]
        pieces = [vector_values(table[f"{side}_vector"]) for table in tables for side in ("query", "document")]
    vectors = np.concatenate(pieces).astype(np.float32)
    order = np.random.default_rng(0).permutation(len(vectors))[:rows]
    return unit_length(vectors[order])


def in_turn(contestants: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, dict[str, Any]]:
    """Runs all of them in each round, in alternating order; `seconds` is wall time, `cpu` processor time, both medians.

    Where other work shares the machine only the processor time means something.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    cpu: dict[str, list[float]] = {name: [] for name in contestants}
    results: dict[str, Any] = {}
    for number in range(rounds):
        for name in list(contestants) if number % 2 == 0 else list(reversed(contestants)):
            start, start_cpu = time.perf_counter(), time.process_time()
            results[name] = contestants[name]()
            seconds[name].append(time.perf_counter() - start)
            cpu[name].append(time.process_time() - start_cpu)
    return {
        name: {
            "seconds": float(np.median(seconds[name])),
            "cpu": float(np.median(cpu[name])),
            "rounds_cpu": [round(value, 3) for value in cpu[name]],
            "result": results[name],
        }
        for name in contestants
    }
