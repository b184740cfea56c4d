"""Clusters of several nodes on one machine, drivers in processes of their own, and what an undisturbed run leaves."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray.cluster_utils import Cluster

from clusterbatch.config import RunConfig, load_config
from clusterbatch.pipeline.inspect_workspace import inspect_workspace
from clusterbatch.store import Manifest
from clusterbatch.store.artifact import RECEIPTS
from clusterbatch.store.workspace import Workspace
from clusterbatch.training.metrics import SEGMENTS

ROOT = Path(__file__).parents[3]
STORE_BYTES = 80 * 2**20
WAIT_SECONDS = 600.0

# Small, but with many units in every pass and steps long enough to be interrupted.
WORDS = [
    "embed.max_tokens=24",
    "embed.batch_tokens=1024",
    "corpus.row_group_rows=64",
    "cluster.mean_size=60",
    "cluster.run_rows=16",
    "cluster.shard_bytes=65536",
    "cluster.iterations=5",
    "batches.size=32",
    "train.encoder=backbone",
    "train.steps=24",
    "train.checkpoint_every=4",
    "train.max_query_tokens=12",
    "train.max_document_tokens=24",
    "train.deterministic=true",
    "train.dropout=0",
]
STAGES = ("ingest", "embed", "cluster", "train")
# Of a unit with this number, under a name that no other attempt uses.
_UNITS_PART = re.compile(r".+-\d{8}-[0-9a-f]{16}\.\w+")
_WORDS = ("alpha", "river", "stone", "matrix", "engine", "garden", "copper", "signal", "winter", "ladder")


def write_pairs(path: Path, rows: int = 1200) -> None:
    """Distinct pairs of three sources as JSON Lines."""
    with path.open("w") as file:
        for row in range(rows):
            words = [_WORDS[(row * 7 + place * place + row // 10) % len(_WORDS)] for place in range(12)]
            pair = {
                "query": f"what is {words[0]} {words[3]} number {row}",
                "document": f"{' '.join(words)} of number {row}",
                "source": f"source-{row % 3}",
            }
            file.write(json.dumps(pair) + "\n")


@contextmanager
def ray_cluster(nodes: int = 2, cpus: int = 2, **head: Any) -> Iterator[Cluster]:
    """A head that takes no work, and `nodes` others, each a raylet of its own."""
    # Two sessions on one machine must not find each other.
    os.environ.pop("RAY_ADDRESS", None)
    # A dead node is noticed within seconds, not half a minute.
    arguments = {"num_cpus": 0, "object_store_memory": STORE_BYTES, "include_dashboard": False, **head}
    cluster = Cluster(initialize_head=True, head_node_args=arguments)
    try:
        for _ in range(nodes):
            cluster.add_node(num_cpus=cpus, object_store_memory=STORE_BYTES)
        cluster.wait_for_nodes()
        yield cluster
    finally:
        cluster.shutdown()


class Costs:
    """What faults cost the runs in a workspace: time without a commit, and units that were done twice."""

    def __init__(self, workspace: Path) -> None:
        self._workspace = workspace
        self._commits: set[Path] = set()
        self._parts: set[Path] = set()
        self._struck = self._recovered = 0.0

    def strike(self) -> None:
        """From here on it is counted how long nothing is committed."""
        self.look()
        self._struck, self._recovered = time.monotonic(), 0.0

    def look(self) -> None:
        """To be called again and again: what is committed takes the place of its receipts."""
        before = len(self._commits)
        for path in files(self._workspace):
            if path.suffix == ".json":
                self._commits.add(path)
            elif _UNITS_PART.fullmatch(path.name):
                self._parts.add(path)
        if len(self._commits) > before and not self._recovered:
            self._recovered = time.monotonic()

    def __str__(self) -> str:
        units = {path.with_name(path.name.rsplit("-", 1)[0]) for path in self._parts}
        recovered, ended = self._recovered - self._struck, time.monotonic() - self._struck
        return (
            f"next commit after {recovered:.1f} s, end after {ended:.1f} s; "
            f"{len(self._parts) - len(units)} of {len(units)} units done twice"
        )


class Driver:
    """`clusterbatch COMMAND ...` in a process of its own, with its output kept."""

    def __init__(self, command: str, words: list[str], log: Path, address: str | None, costs: Costs) -> None:
        arguments = [sys.executable, "-m", "clusterbatch.cli", command, *words]
        if address is not None:
            arguments.append(f"ray.address={address}")
        else:
            arguments += ["ray.num_cpus=2", f"ray.object_store_memory={STORE_BYTES}"]
        self.log, self.costs = log, costs
        self.started = time.monotonic()
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            arguments, stdout=log.open("a"), stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )

    def wait(self) -> int:
        try:
            return self.process.wait(timeout=self.started + WAIT_SECONDS - time.monotonic())
        except subprocess.TimeoutExpired:
            self.kill_all()
            raise AssertionError(f"hangs\n{self.output}") from None

    def finish(self) -> None:
        """Waits for success, and shows what was said where there is none. To be called when the fault has struck."""
        self.costs.strike()
        while self.process.poll() is None and time.monotonic() - self.started < WAIT_SECONDS:
            self.costs.look()
            time.sleep(0.02)
        code = self.wait()
        assert code == 0, f"exit code {code}\n{self.output}"
        print(self.costs)

    def wait_until(self, reached: Callable[[], bool]) -> None:
        """Returns as soon as `reached`; fails where the driver ends before."""
        while not reached():
            self.costs.look()
            assert self.process.poll() is None, f"ended too early\n{self.output}"
            if time.monotonic() - self.started > WAIT_SECONDS:
                self.kill_all()
                raise AssertionError(f"hangs\n{self.output}")
            time.sleep(0.02)

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.process.pid, number)
        self.process.wait(timeout=60)

    def kill_all(self) -> None:
        """The driver and all that it has started: a local Ray, its workers."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(timeout=60)

    @property
    def output(self) -> str:
        return self.log.read_text()

    @property
    def last_line(self) -> str:
        return [line for line in self.output.splitlines() if line.strip()][-1]


class Runs:
    """Workspaces that begin where a finished run's stage begins, and the finished run to compare with."""

    def __init__(self, folder: Path, words: list[str]) -> None:
        self.folder, self.words = folder, words
        self.clean = folder / "undisturbed"
        self._number = 0
        self._costs: dict[Path, Costs] = {}

    def config(self, workspace: Path) -> RunConfig:
        return load_config(None, [*self.words, f"workspace={workspace}"])

    def drive(self, stage: str, workspace: Path, address: str | None, *more: str) -> Driver:
        """A new driver; `more` are words of its own."""
        costs = self._costs.setdefault(workspace, Costs(workspace))
        words = [*self.words, f"workspace={workspace}", *more]
        return Driver(stage, words, workspace.with_suffix(".log"), address, costs)

    def begin(self, stage: str) -> Path:
        """A new workspace in which all that comes before `stage` is done."""
        self._number += 1
        workspace = self.folder / f"{stage}-{self._number}"
        (workspace / "generation=000").mkdir(parents=True)
        for name in ["corpus", "generation=000/embeddings", "generation=000/clusters"][: STAGES.index(stage)]:
            # Linked, not copied: what is done is never written again.
            (workspace / name).symlink_to(self.clean / name)
        return workspace

    def manifest(self, workspace: Path, stage: str) -> Manifest | None:
        place = Workspace(self.config(workspace))
        return {
            "ingest": place.corpus,
            "embed": place.embeddings(),
            "cluster": place.clusters(),
            "train": place.train(),
        }[stage].manifest()

    def assert_undisturbed(self, workspace: Path, stage: str) -> None:
        """The stage's artifact is whole, equal to the undisturbed one, and nothing half-done lies beside it."""
        found, wanted = self.manifest(workspace, stage), self.manifest(self.clean, stage)
        assert found is not None
        assert wanted is not None
        found.counts.check(stage)
        assert found.counts == wanted.counts
        if stage == "train":
            assert training_lines(workspace) == training_lines(self.clean)
            ours, theirs = (folder / "model" / "model.safetensors" for folder in (workspace, self.clean))
            assert ours.read_bytes() == theirs.read_bytes()
        else:
            assert [part.checksum for part in found.parts] == [part.checksum for part in wanted.parts]
        rows = {row["stage"]: row for row in inspect_workspace(self.config(workspace))}
        assert rows[stage]["state"] == "done"
        left = [path for path in workspace.rglob("*") if path.name in ("_receipts", "_exchange", SEGMENTS)]
        left += list(workspace.rglob("*.tmp"))
        assert not left


def files(folder: Path) -> Iterator[Path]:
    """All files below a folder in which others work: folders that go away meanwhile are passed over."""
    for place, _, names in os.walk(folder):
        yield from (Path(place) / name for name in names)


def receipts(folder: Path) -> int:
    """Receipts anywhere below a folder, those of a stage's passes among them."""
    return sum(path.parent.name == RECEIPTS and path.suffix == ".json" for path in files(folder))


def training_lines(workspace: Path) -> list[tuple[int, float]]:
    """(step, loss) of every line of a finished run's metrics."""
    (path,) = (workspace / "generation=000" / "train").glob("metrics-*.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(len(lines)))
    return [(line["step"], line["loss"]) for line in lines]


def checkpoints(workspace: Path) -> int:
    return len(list((workspace / "generation=000" / "train" / "checkpoints").glob("*/manifest.json")))


def worker_processes(name: str, parents: set[int] | None = None) -> list[int]:
    """Ray's worker processes whose title has `name` in it, of those raylets only where they are given."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            title = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
        if title.startswith("ray::") and name in title and (parents is None or parent in parents):
            found.append(int(entry.name))
    return found


def raylets(cluster: Cluster) -> set[int]:
    """Process ids of the raylets of a cluster: other Ray sessions of this machine are left alone."""
    nodes = [cluster.head_node, *cluster.worker_nodes]
    return {process.process.pid for node in nodes for process in node.all_processes["raylet"]}
