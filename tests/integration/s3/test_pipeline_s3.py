"""The whole run with corpus, collection and workspace in a bucket: the same rows, figures and weights as on disk."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from clusterbatch.config import RunConfig, StorageConfig, load_config
from clusterbatch.corpus.docstrings import COLLECTION, PAIRS, write_sample
from clusterbatch.pipeline.run import STAGES
from clusterbatch.store import Folder
from clusterbatch.store.workspace import Workspace
from tests.encoder.models import make_model
from tests.in_process import run_in_process
from tests.integration.s3.fault_proxy import FaultProxy
from tests.integration.s3.server import S3Server

pytestmark = pytest.mark.s3

_ROOT = Path(__file__).parents[3]
_WORDS = [
    "embed.max_tokens=16",
    "embed.tokenizers=0",
    "corpus.unit_bytes=32768",
    "corpus.row_group_rows=64",
    "cluster.mean_size=100",
    "batches.size=64",
    "train.epochs=1",
    "train.learning_rate=0.005",
    "train.deterministic=true",
    "evaluate.max_document_tokens=64",
    "ray.num_cpus=2",
    "ray.object_store_memory=104857600",
]
# One request in twenty fails.
_RATES = {
    "slow_down": 0.015,
    "server_error": 0.005,
    "reset": 0.005,
    "drop_answer": 0.005,
    "reset_body": 0.005,
    "truncate": 0.005,
    "corrupt": 0.005,
    "latency": 0.005,
}


@dataclass(frozen=True)
class Disk:
    """A corpus and a collection on disk, the words that name models, and what a run on disk leaves."""

    inputs: Path
    words: list[str]
    outcome: dict[str, Any]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, ray_local: None) -> Disk:
    """Few pairs and a tiny model of random weights: the ways of the bytes are the same."""
    folder = tmp_path_factory.mktemp("small")
    model = make_model("bert", folder / "model")
    return disk(folder, 400, [f"embed.model={model}", f"train.model={model}"])


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory, ray_local: None) -> Disk:
    return disk(tmp_path_factory.mktemp("sample"), 1500, [])


def disk(folder: Path, pairs: int, words: list[str]) -> Disk:
    """Without worker processes, but for the two that train."""
    write_sample(Folder(str(folder / "inputs")), pairs, 0)
    config = load_config(None, words_of(f"{folder}/run", f"{folder}/inputs", StorageConfig(), words))
    for stage in STAGES:
        with pytest.MonkeyPatch.context() as patch:
            if stage.name != "train":
                run_in_process(patch)
            stage.function(config)
    return Disk(folder / "inputs", words, outcome(config))


@pytest.mark.slow
def test_a_run_in_a_bucket_is_the_run_on_disk(
    small: Disk, s3_server: S3Server, storage: StorageConfig, bucket: str
) -> None:
    check_counted(small, s3_server, storage, bucket)


@pytest.mark.faults
def test_the_sample_in_a_bucket_is_the_sample_on_disk(
    sample: Disk, s3_server: S3Server, storage: StorageConfig, bucket: str
) -> None:
    check_counted(sample, s3_server, storage, bucket)


@pytest.mark.faults
@pytest.mark.parametrize(("corpus", "seed"), [("small", 0), ("small", 1), ("small", 2), ("sample", 3)])
def test_one_request_in_twenty_fails_and_nothing_changes(
    corpus: str,
    seed: int,
    request: pytest.FixtureRequest,
    s3_server: S3Server,
    storage: StorageConfig,
    bucket: str,
) -> None:
    sample: Disk = request.getfixturevalue(corpus)
    upload(sample.inputs, Folder(f"s3://{bucket}/inputs", storage))
    with FaultProxy(s3_server.port, seed=seed, rates=_RATES) as proxy:
        faulty = storage.model_copy(update={"endpoint_url": proxy.endpoint_url})
        config = run(f"s3://{bucket}/run", f"s3://{bucket}/inputs", faulty, sample.words)
        print(f"requests {dict(proxy.requests)}, faults {dict(proxy.injected)}")
        assert sum(proxy.injected.values()) > 0.03 * sum(proxy.requests.values())
    undisturbed = config.model_copy(update={"storage": storage})
    assert outcome(undisturbed) == sample.outcome


def check_counted(wanted: Disk, s3_server: S3Server, storage: StorageConfig, bucket: str) -> None:
    """A run through a proxy that only counts leaves what the run on disk left."""
    upload(wanted.inputs, Folder(f"s3://{bucket}/inputs", storage))
    with FaultProxy(s3_server.port) as proxy:
        counting = storage.model_copy(update={"endpoint_url": proxy.endpoint_url})
        config = run(f"s3://{bucket}/run", f"s3://{bucket}/inputs", counting, wanted.words)
        requests = Counter(proxy.requests)
        entries = Workspace(config).root.find()
        print(f"{len(entries)} objects, {sum(entry.size for entry in entries)} bytes, requests {dict(requests)}")
        assert outcome(config) == wanted.outcome


def run(workspace: str, inputs: str, storage: StorageConfig, more: list[str]) -> RunConfig:
    """`clusterbatch run` in a process of its own: its workers inherit the credentials."""
    words = words_of(workspace, inputs, storage, more)
    environment = {**os.environ, "PYTHONPATH": str(_ROOT), "RAY_ADDRESS": ""}
    command = [sys.executable, "-m", "clusterbatch.cli", "run", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    print(done.stderr)
    return load_config(None, words)


def words_of(workspace: str, inputs: str, storage: StorageConfig, more: list[str]) -> list[str]:
    return [
        *_WORDS,
        *more,
        f"workspace={workspace}",
        f"corpus.paths={inputs}/{PAIRS}/",
        f"evaluate.path={inputs}/{COLLECTION}",
        *(f"storage.{name}={value}" for name, value in storage.model_dump(exclude_defaults=True).items()),
    ]


def upload(source: Path, target: Folder) -> None:
    for path in sorted(source.rglob("*")):
        if path.is_file():
            target.write(path.relative_to(source).as_posix(), path.read_bytes())


def outcome(config: RunConfig) -> dict[str, Any]:
    """Everything that must not depend on where the bytes live: rows, vectors, clusters, losses, weights, figures."""
    workspace = Workspace(config)
    manifests = {stage.name: stage.artifact(workspace, 0).require() for stage in STAGES}
    found: dict[str, Any] = {name: manifest.counts.model_dump() for name, manifest in manifests.items()}
    for stage in STAGES[:3]:
        artifact = stage.artifact(workspace, 0)
        # These name the files that rows come from, which lie elsewhere.
        named = ("rejects", "aside", "files")
        parts = [part for part in manifests[stage.name].parts if part.details.get("role") not in named]
        found[f"{stage.name} parts"] = [(part.rows, part.checksum) for part in parts]
        for part in parts:
            artifact.read_part(part)
    metrics = workspace.train().read_part(manifests["train"].parts[-1])
    lines = [json.loads(line) for line in metrics.splitlines()]
    found["losses"] = [(line["step"], line["loss"]) for line in lines]
    found["model"] = hashlib.sha256(workspace.model.read("model.safetensors")).hexdigest()
    found["quality"] = [
        {name: row[name] for name in ("collection", "model", "metric", "value", "queries", "documents")}
        for row in manifests["evaluate"].details["table"]
    ]
    return found
