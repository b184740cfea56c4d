"""A whole run by `ray job submit` to a cluster of several nodes, its corpus and workspace on a real S3 server."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from clusterbatch.cli import main
from clusterbatch.config import StorageConfig, load_config
from clusterbatch.pipeline.inspect_workspace import inspect_workspace
from clusterbatch.runtime.metrics import MEASURES, exported_name
from clusterbatch.store import Folder
from tests.integration.faults.harness import ROOT, WORDS, ray_cluster, write_pairs
from tests.integration.s3.server import SECRET_KEY

pytestmark = pytest.mark.faults

_JOB_SECONDS = 900
_AGENT_SECONDS = 300
# A task on every node. The nodes of one machine share a folder of packages, and each unpacks a job's files anew when it
# first meets them: under a job that runs already they would vanish.
_ON_EVERY_NODE = """
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

ray.init(logging_level="error")
nodes = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in ray.nodes() if node["Alive"]]
ray.get([ray.remote(num_cpus=0)(lambda: None).options(scheduling_strategy=node).remote() for node in nodes])
"""
# What a run on a CPU without rejects must have reported by its end.
_EXPECTED = {
    exported_name(name)
    for name in ("clusterbatch_rows", "clusterbatch_units", "clusterbatch_bytes_written", "clusterbatch_training_loss")
}


def test_a_job_on_several_nodes(
    bucket: str, storage: StorageConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Jobs are started as `python`: this one, also where its environment is not activated.
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    inputs = Folder(f"s3://{bucket}/inputs", storage)
    write_pairs(tmp_path / "pairs.jsonl", 600)
    inputs.write("pairs/pairs.jsonl", (tmp_path / "pairs.jsonl").read_bytes())
    write_collection(inputs.child("test"), (tmp_path / "pairs.jsonl").read_text().splitlines()[:100])
    checkout = copy_checkout(tmp_path / "checkout")
    words = [
        *WORDS,
        f"workspace=s3://{bucket}/run",
        f"corpus.paths=s3://{bucket}/inputs/pairs/",
        f"evaluate.path=s3://{bucket}/inputs/test/",
        f"storage.endpoint_url={storage.endpoint_url}",
        # The pairs are made of few words: most of them are near copies of a test text.
        "corpus.decontaminate=exact",
        "train.steps=60",
    ]
    with ray_cluster(include_dashboard=True, dashboard_port=free_port()) as cluster:
        wait_for_job_agents(cluster, checkout)
        job = submit(cluster, checkout, ["python", "jobs/run.py", *words])
        seen, metrics = watch(job, words, cluster)
        output, _ = job.communicate(timeout=_JOB_SECONDS)
        assert job.returncode == 0, output
        assert "succeeded" in output
        # While it ran, from outside: stages not begun, under way and done.
        assert any(state == "done" for state in seen)
        assert any("units" in state or "step" in state for state in seen)
        assert metrics >= _EXPECTED
        assert {name for name in metrics if name.startswith("ray_clusterbatch_")} <= known_series()
        again = submit(cluster, checkout, ["python", "jobs/run.py", *words])
        output, _ = again.communicate(timeout=_JOB_SECONDS)
        assert again.returncode == 0, output
        assert output.count("done already") == 5
        wrong = submit(cluster, checkout, ["python", "jobs/run.py", *words, "cluster.meansize=3"])
        output, _ = wrong.communicate(timeout=_JOB_SECONDS)
        assert wrong.returncode != 0
        assert "cluster.meansize: unknown key, did you mean cluster.mean_size?" in output
        assert_no_secret(Path(cluster.head_node.get_session_dir_path()), Folder(f"s3://{bucket}/run", storage))


def write_collection(folder: Folder, lines: list[str]) -> None:
    """A collection in BEIR layout of these pairs."""
    pairs = [json.loads(line) for line in lines]
    documents = [json.dumps({"_id": f"d{n}", "title": "", "text": pair["document"]}) for n, pair in enumerate(pairs)]
    queries = [json.dumps({"_id": f"q{n}", "text": pair["query"]}) for n, pair in enumerate(pairs)]
    judgements = ["query-id\tcorpus-id\tscore", *(f"q{n}\td{n}\t1" for n in range(len(pairs)))]
    folder.write("corpus.jsonl", "\n".join(documents).encode())
    folder.write("queries.jsonl", "\n".join(queries).encode())
    folder.write("qrels/test.tsv", "\n".join(judgements).encode())


def copy_checkout(folder: Path) -> Path:
    """What `--working-dir .` would send of a clean checkout."""
    for name in ("clusterbatch", "jobs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def submit(cluster: Cluster, checkout: Path, entrypoint: list[str]) -> subprocess.Popen[str]:
    ray = shutil.which("ray", path=str(Path(sys.executable).parent))
    assert ray is not None
    command = [ray, "job", "submit", "--address", f"http://{cluster.webui_url}", "--working-dir", str(checkout)]
    return subprocess.Popen([*command, "--", *entrypoint], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for_job_agents(cluster: Cluster, checkout: Path) -> None:
    """The dashboard answers before the agents that start jobs are there."""
    started, output, code = time.monotonic(), "", 1
    while code and time.monotonic() - started < _AGENT_SECONDS:
        job = submit(cluster, checkout, ["python", "-c", _ON_EVERY_NODE])
        output, _ = job.communicate(timeout=_JOB_SECONDS)
        code = job.returncode
    assert code == 0, output


def watch(job: subprocess.Popen[str], words: list[str], cluster: Cluster) -> tuple[set[str], set[str]]:
    """(every state that `inspect` tells while the job runs, every metric that is served meanwhile or just after).

    What a process reports is served for as long as it lives: the loss is gone soon after training.
    """
    states: set[str] = set()
    metrics: set[str] = set()
    config = load_config(None, words)
    started = time.monotonic()
    while job.poll() is None and time.monotonic() - started < _JOB_SECONDS:
        states |= {row["state"] for row in inspect_workspace(config)}
        metrics |= scrape(cluster)
        time.sleep(0.5)
    return states, metrics | scrape(cluster)


def scrape(cluster: Cluster) -> set[str]:
    """Names that all nodes' metrics ports serve now."""
    names: set[str] = set()
    for node in [cluster.head_node, *cluster.worker_nodes]:
        url = f"http://{node.node_ip_address}:{node.metrics_export_port}/metrics"
        with urllib.request.urlopen(url, timeout=10) as answer:
            names |= set(re.findall(r"^(\w+)[{ ]", answer.read().decode(), flags=re.MULTILINE))
    return names


def known_series() -> set[str]:
    series = {exported_name(name) for name in MEASURES}
    histograms = [exported_name(name) for name, measure in MEASURES.items() if measure.kind == "histogram"]
    return series | {f"{name}_{suffix}" for name in histograms for suffix in ("bucket", "sum", "count")}


def assert_no_secret(session: Path, workspace: Folder) -> None:
    """Neither Ray's logs nor anything that the run has left names the secret key."""
    secret = SECRET_KEY.encode()
    logs = [path for path in (session / "logs").rglob("*") if path.is_file()]
    assert logs
    assert not [path for path in logs if secret in path.read_bytes()]
    entries = workspace.find()
    assert len(entries) > 20
    assert not [entry.name for entry in entries if secret in workspace.read(entry.name)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("key", ["AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"])
def test_errors_do_not_print_credentials(
    key: str, storage: StorageConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(key, "wrong-and-very-secret")
    assert main(["embed", "workspace=s3://nowhere-at-all/run", f"storage.endpoint_url={storage.endpoint_url}"]) in (
        3,
        4,
    )
    output = capsys.readouterr()
    assert "very-secret" not in output.out + output.err
    assert len(output.err.strip().splitlines()) == 1
