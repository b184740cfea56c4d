"""What dies comes back: a worker in mid-fit, the run in mid-shuffle. The clusters are the same, no row is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import ray
import torch

from clusterbatch.clustering.fit_distributed import RemoteRows
from clusterbatch.clustering.kmeans import FitSettings, fit
from clusterbatch.clustering.partial_sums import Centers, LocalRows, PartialSums
from clusterbatch.clustering.sample import SampleChunks
from clusterbatch.embedding.vectors import vector_column
from clusterbatch.runtime import Pool
from clusterbatch.shards.stage import cluster
from clusterbatch.store import Artifact, Folder
from clusterbatch.store.shuffle import write_buckets
from clusterbatch.store.workspace import Workspace
from tests.clustering.embedded import blobs, embedded_workspace
from tests.in_process import DRIVER

SOURCES = {"forum": 1600, "wiki": 400}
SETTINGS = {"cluster": {"mean_size": 200, "run_rows": 16, "shard_bytes": 2**16, "workers": 2, "device": "cpu"}}


class _Killing(RemoteRows):
    """Kills one worker's process in the middle of the fit's fourth round."""

    rounds = 0

    def partial_sums(self, centers: Centers, chunks: range, dtype: torch.dtype) -> PartialSums:
        self.rounds += 1
        if self.rounds == 4:
            ray.kill(self.actors[0], no_restart=False)
        return super().partial_sums(centers, chunks, dtype)


def test_a_worker_killed_in_mid_fit_changes_nothing(tmp_path: Path, ray_local: None) -> None:
    vectors, _ = blobs(6000, 20, 32, seed=0, spread=0.8)
    chunks = [piece.astype(np.float16) for piece in np.array_split(vectors, 8)]
    table = pa.table(
        {
            "position": np.concatenate([np.linspace(0, 1, len(chunk)) for chunk in chunks]),
            "vector": vector_column(np.concatenate(chunks)),
        }
    )
    artifact = Artifact(Folder(str(tmp_path)), "sample")
    bucket = np.repeat(np.arange(8), [len(chunk) for chunk in chunks])
    part = write_buckets(artifact, 0, table, bucket, 8)
    rows = _Killing(SampleChunks(artifact, [part], "document"), range(8), None, Pool(2), "cpu")
    wanted = FitSettings(24, passes=6)
    spread = fit(rows, wanted)
    rows.close()
    alone = fit(LocalRows([(chunk, None) for chunk in chunks]), wanted)
    assert rows.rounds > 4
    assert np.array_equal(spread.centers.centroids, alone.centers.centroids)


def test_a_run_killed_in_mid_shuffle_goes_on_to_the_same_clusters(tmp_path: Path, in_process: None) -> None:
    undisturbed = cluster(embedded_workspace(str(tmp_path / "whole"), SOURCES, settings=SETTINGS))
    config = embedded_workspace(str(tmp_path / "killed"), SOURCES, settings=SETTINGS)
    (tmp_path / "config.json").write_text(config.model_dump_json())
    for title, units in (("assign", 3), ("shards", 2)):
        command = [sys.executable, "-c", DRIVER, "cluster", str(tmp_path / "config.json"), title, str(units)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        ended = subprocess.run(command, env=environment, capture_output=True, check=False, timeout=300)
        assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()[-2000:]
        assert Workspace(config).clusters().manifest() is None
    start = time.time()
    manifest = cluster(config)
    assert [part.checksum for part in manifest.parts] == [part.checksum for part in undisturbed.parts]
    assert manifest.counts.written == sum(SOURCES.values())
    # What was whole is not made again: some shards are older than the last run.
    folder = Workspace(config).clusters().folder
    made_before = [part for part in manifest.parts if os.path.getmtime(folder.path(part.path)) < start]
    assert len(made_before) >= 2
