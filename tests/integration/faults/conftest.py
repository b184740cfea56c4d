"""One undisturbed run for all faults to be compared with, on a local Ray with two CPUs."""

from __future__ import annotations

import pytest

from tests.integration.faults.harness import STAGES, WORDS, Runs, write_pairs


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("faults")
    write_pairs(folder / "pairs.jsonl")
    runs = Runs(folder, [*WORDS, f"corpus.paths={folder}/pairs.jsonl"])
    for stage in STAGES:
        runs.drive(stage, runs.clean, None).finish()
    return runs
