"""A fit over several nodes: sums meet from separate raylets, and a node that is lost changes nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.faults

# In a process of its own: a cluster of several nodes cannot be started beside the session's Ray.
DRIVER = """
import sys
import numpy as np, pyarrow as pa, ray
from ray.cluster_utils import Cluster
from clusterbatch.clustering.chunks import SampleChunks
from clusterbatch.clustering.distributed import RemoteRows
from clusterbatch.clustering.kmeans import FitSettings, fit
from clusterbatch.clustering.sums import LocalRows
from clusterbatch.clustering.vectors import vector_column
from clusterbatch.runtime import Pool
from clusterbatch.store import Artifact, Folder
from clusterbatch.store.exchange import write_buckets
from tests.clustering.embedded import blobs

chunks = [piece.astype(np.float16) for piece in np.array_split(blobs(4000, 20, 24, seed=0, spread=0.8)[0], 8)]
table = pa.table({
    "position": np.concatenate([np.linspace(0, 1, len(chunk)) for chunk in chunks]),
    "vector": vector_column(np.concatenate(chunks)),
})
artifact = Artifact(Folder(sys.argv[1]), "sample")
part = write_buckets(artifact, 0, table, np.repeat(np.arange(8), [len(chunk) for chunk in chunks]), 8)

options = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}
cluster = Cluster(initialize_head=True, head_node_args={**options, "num_cpus": 0})
nodes = [cluster.add_node(**options) for _ in range(3)]
ray.init(cluster.address, log_to_driver=False, logging_level="error")

class LosingANode(RemoteRows):
    rounds = 0
    def partial_sums(self, centers, chunks, dtype):
        self.rounds += 1
        if self.rounds == 4:
            held = [a["NodeID"] if "NodeID" in a else a["node_id"] for a in actors()]
            assert len(set(held)) == 2, "the workers are on two nodes"
            cluster.remove_node(next(node for node in nodes if node.node_id == held[0]), allow_graceful=False)
        return super().partial_sums(centers, chunks, dtype)

def actors():
    from ray._private.state import actors as table
    return [{"node_id": entry["Address"]["NodeID"]} for entry in table().values() if entry["State"] == "ALIVE"]

rows = LosingANode(SampleChunks(artifact, [part], "document"), range(8), None, Pool(2), "cpu")
wanted = FitSettings(24, passes=6)
spread = fit(rows, wanted)
alone = fit(LocalRows([(chunk, None) for chunk in chunks]), wanted)
assert rows.rounds > 4
assert np.array_equal(spread.centers.centroids, alone.centers.centroids)
print("EQUAL")
"""


def test_a_node_lost_in_mid_fit_changes_nothing(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "RAY_ADDRESS": ""}
    command = [sys.executable, "-c", DRIVER, str(tmp_path)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert "EQUAL" in ended.stdout, ended.stderr[-3000:]
