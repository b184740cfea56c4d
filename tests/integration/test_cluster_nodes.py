"""Clustering over several nodes: sums meet from separate raylets, and a node that is lost changes nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from clusterbatch.shards.stage import cluster
from clusterbatch.store.workspace import Workspace
from tests.clustering.embedded import embedded_workspace

pytestmark = pytest.mark.faults

# In processes of their own: a cluster of several nodes cannot be started beside the session's Ray.
NODES = """
import sys
import ray
from ray.cluster_utils import Cluster
from ray._private.state import actors

options = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}
cluster = Cluster(initialize_head=True, head_node_args={**options, "num_cpus": 0})
nodes = [cluster.add_node(**options) for _ in range(3)]
ray.init(cluster.address, log_to_driver=False, logging_level="error")
# A driver ends with the raylet that it joined through, whichever that is.
own = ray.get_runtime_context().get_node_id()

def lose_a_node():
    ours = [entry for entry in actors().values() if any(name in str(entry) for name in ("MapWorker", "ChunkHolder"))]
    held = [entry["Address"]["NodeID"] for entry in ours if entry["State"] == "ALIVE"]
    lost = next(node for node in nodes if node.node_id in held and node.node_id != own)
    cluster.remove_node(lost, allow_graceful=False)
    return len(set(held))
"""
# In this order: Ray ends a driver whose raylet goes first with exit code 1.
LEAVE = """
ray.shutdown()
cluster.shutdown()
"""
FIT = (
    NODES
    + """
import numpy as np, pyarrow as pa
from clusterbatch.clustering.sample import SampleChunks
from clusterbatch.clustering.fit_distributed import RemoteRows
from clusterbatch.clustering.kmeans import FitSettings, fit
from clusterbatch.clustering.partial_sums import LocalRows
from clusterbatch.embedding.vectors import vector_column
from clusterbatch.runtime import Pool
from clusterbatch.store import Artifact, Folder
from clusterbatch.store.shuffle import write_buckets
from tests.clustering.embedded import blobs

chunks = [piece.astype(np.float16) for piece in np.array_split(blobs(4000, 20, 24, seed=0, spread=0.8)[0], 8)]
table = pa.table({
    "position": np.concatenate([np.linspace(0, 1, len(chunk)) for chunk in chunks]),
    "vector": vector_column(np.concatenate(chunks)),
})
artifact = Artifact(Folder(sys.argv[1]), "sample")
part = write_buckets(artifact, 0, table, np.repeat(np.arange(8), [len(chunk) for chunk in chunks]), 8)

class LosingANode(RemoteRows):
    rounds = 0
    def partial_sums(self, centers, chunks, dtype):
        self.rounds += 1
        if self.rounds == 4:
            assert lose_a_node() == 2, "the workers are on two nodes"
        return super().partial_sums(centers, chunks, dtype)

rows = LosingANode(SampleChunks(artifact, [part], "document"), range(8), None, Pool(2), "cpu")
wanted = FitSettings(24, passes=6)
spread = fit(rows, wanted)
alone = fit(LocalRows([(chunk, None) for chunk in chunks]), wanted)
assert rows.rounds > 4
assert np.array_equal(spread.centers.centroids, alone.centers.centroids)
print("EQUAL")
"""
    + LEAVE
)
# A node is lost as soon as so many units of a pass are whole.
STAGE = (
    NODES
    + """
import threading, time
from pathlib import Path
from clusterbatch.shards.stage import cluster as run
from clusterbatch.config import RunConfig

_, config, folder, units = sys.argv
def watch():
    while len(list(Path(folder).glob("_receipts/*.json"))) < int(units):
        time.sleep(0.02)
    if manifest is None:
        lose_a_node()
        print("LOST", flush=True)

manifest = None
threading.Thread(target=watch, daemon=True).start()
manifest = run(RunConfig.model_validate_json(open(config).read()))
"""
    + LEAVE
)
SOURCES = {"forum": 4000, "wiki": 900}
SETTINGS = {"cluster": {"mean_size": 200, "run_rows": 16, "shard_bytes": 2**16, "workers": 2, "device": "cpu"}}


def drive(code: str, *arguments: str) -> tuple[str, str]:
    """What a driver prints, and its messages; it must end well."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "RAY_ADDRESS": ""}
    command = [sys.executable, "-c", code, *arguments]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert ended.returncode == 0, (ended.returncode, ended.stdout, ended.stderr[-3000:])
    return ended.stdout, ended.stderr[-3000:]


def test_a_node_lost_in_mid_fit_changes_nothing(tmp_path: Path) -> None:
    printed, messages = drive(FIT, str(tmp_path))
    assert "EQUAL" in printed, messages


@pytest.mark.parametrize(("folder", "units"), [("_exchange/assign", 3), (".", 2)])
def test_a_node_lost_in_mid_shuffle_changes_nothing(tmp_path: Path, in_process: None, folder: str, units: int) -> None:
    """On the side that assigns, and on the one that writes shards."""
    undisturbed = cluster(embedded_workspace(str(tmp_path / "whole"), SOURCES, settings=SETTINGS))
    config = embedded_workspace(str(tmp_path / "disturbed"), SOURCES, settings=SETTINGS)
    (tmp_path / "config.json").write_text(config.model_dump_json())
    clusters = Workspace(config).clusters()
    printed, messages = drive(
        STAGE, str(tmp_path / "config.json"), str(Path(clusters.folder.path()) / folder), str(units)
    )
    assert "LOST" in printed, messages
    manifest = clusters.manifest()
    assert manifest is not None, messages
    assert [part.checksum for part in manifest.parts] == [part.checksum for part in undisturbed.parts]
    assert manifest.counts.read == manifest.counts.written == sum(SOURCES.values())
