"""The whole run on a small real corpus: everything is made, nothing is lost, nothing is done twice."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clusterbatch.cli import main
from clusterbatch.config import RunConfig, load_config
from clusterbatch.encoder.load import load_encoder
from clusterbatch.encoder.resolve import resolve_model
from clusterbatch.pipeline.run import STAGES
from clusterbatch.store.workspace import Workspace
from tests.encoder.models import make_static
from tests.in_process import OVERRIDES, run_in_process

SMALL = [
    "corpus.paths=docstrings://",
    "evaluate.path=docstrings://",
    "corpus.sample_pairs=800",
    "embed.max_tokens=16",
    "cluster.mean_size=100",
    "batches.size=64",
    "train.epochs=2",
    "train.learning_rate=0.005",
]


@pytest.fixture(scope="module")
def finished(ray_local: None, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Two workers of Ray Train; the other stages, whose workers have tests of their own, in this process."""
    folder = tmp_path_factory.mktemp("run")
    # A relative address, as in the shipped configuration: workers have other working directories.
    words = [f"workspace={folder.name}", *SMALL, *OVERRIDES]
    for commands in (["ingest", "embed", "cluster"], ["train"], ["run"]):
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder.parent)
            if commands != ["train"]:
                run_in_process(patch)
            for command in commands:
                assert main([command, *words]) == 0
    return load_config(None, [f"workspace={folder}", *SMALL])


def test_no_row_is_lost_between_the_stages(finished: RunConfig) -> None:
    manifests = {stage.name: stage.artifact(Workspace(finished), 0).require() for stage in STAGES}
    pairs = manifests["ingest"].counts.written
    assert pairs > 600
    assert manifests["embed"].counts.read == manifests["embed"].counts.written == pairs
    cluster = manifests["cluster"].counts
    assert cluster.read == pairs == cluster.written + sum(cluster.set_aside.values())
    for manifest in manifests.values():
        manifest.counts.check(manifest.kind)


def test_every_file_is_named_with_its_checksum(finished: RunConfig) -> None:
    for stage in STAGES:
        artifact = stage.artifact(Workspace(finished), 0)
        for part in artifact.require().parts:
            artifact.read_part(part)


def test_a_second_run_does_nothing(finished: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    before = [stage.artifact(Workspace(finished), 0).require() for stage in STAGES]
    assert main(["run", f"workspace={finished.workspace}", *SMALL]) == 0
    assert capsys.readouterr().err.count("done already") == len(STAGES)
    assert [stage.artifact(Workspace(finished), 0).require() for stage in STAGES] == before


def test_another_configuration_does_not_overwrite(finished: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"workspace={finished.workspace}", *SMALL, "cluster.mean_size=50"]
    assert main(["cluster", *words]) == 2
    assert "--force" in capsys.readouterr().err


def test_the_model_opens_in_sentence_transformers(finished: RunConfig) -> None:
    from sentence_transformers import SentenceTransformer

    folder = Workspace(finished).model.path()
    texts = ["Return the largest item of a list.", "", "Übersetzung für 東京 🙂", "word " * 1000]
    encoder = load_encoder(folder)
    ours = encoder.encode(encoder.tokenizer.encode(texts, encoder.max_tokens or 10**6), 4096)
    theirs = SentenceTransformer(folder, device="cpu").encode(texts, normalize_embeddings=True)
    kept = np.linalg.norm(theirs, axis=1) > 0
    assert kept.sum() >= 3
    assert np.all(np.sum(ours * theirs, axis=1)[kept] > 0.99999)


def test_every_stage_says_what_it_asked_of_storage(finished: RunConfig) -> None:
    workspace = Workspace(finished)
    stages = [workspace.corpus, workspace.embeddings(), workspace.clusters(), workspace.train(), workspace.evaluation()]
    for artifact in stages:
        manifest = artifact.require()
        assert manifest.traffic.reads > 0, artifact.kind
        assert manifest.traffic.bytes_written >= sum(part.bytes for part in manifest.parts), artifact.kind
    # Training reads, through its workers, every row once an epoch.
    tokens = [part for part in workspace.clusters().require().parts if part.details.get("content") == "training"]
    assert workspace.train().require().traffic.bytes_read > sum(part.bytes for part in tokens)


def test_training_changed_the_model_for_the_better(finished: RunConfig) -> None:
    table = Workspace(finished).evaluation().require().details["table"]
    values = {row["model"]: row["value"] for row in table if row["metric"] == "NDCG@10"}
    assert values["after"] > values["before"]


def test_the_report_stands_alone(finished: RunConfig) -> None:
    page = (Path(finished.workspace) / "report" / "index.html").read_text()
    assert not re.search(r"""(?:src|href)=["']?https?://""", page)
    summary = json.loads((Path(finished.workspace) / "metrics.json").read_text())
    assert {row["stage"] for row in summary["stages"]} >= {stage.name for stage in STAGES}


@pytest.mark.usefixtures("in_process")
def test_a_transformer_goes_the_same_way(finished: RunConfig, tmp_path: Path) -> None:
    from transformers import AutoModel

    # The same corpus and vectors in a workspace of its own: only what depends on the model is made anew.
    for name in ("sample", "corpus", "generation=000/embeddings"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(Path(finished.workspace) / name)
    words = [f"workspace={tmp_path}", *SMALL, *OVERRIDES, "train.encoder=backbone", "train.learning_rate=2e-5"]
    words += [
        "train.workers=1",
        "train.epochs=null",
        "train.steps=2",
        "train.max_document_tokens=48",
        "batches.size=16",
    ]
    assert main(["cluster", *words]) == 0
    assert main(["train", *words]) == 0
    trained = AutoModel.from_pretrained(tmp_path / "model").state_dict()
    start = AutoModel.from_pretrained(resolve_model("all-MiniLM-L6-v2", finished.storage)).state_dict()
    moved = [name for name in trained if name in start and not np.allclose(trained[name], start[name], atol=1e-6)]
    assert len(moved) > 50


_MEASURE = """
import resource, sys
from clusterbatch.cli import main
from clusterbatch.runtime import lasting_session
folders, words = sys.argv[1:3], sys.argv[3:]
with lasting_session():
    for folder in folders:
        for stage in ("ingest", "embed", "cluster"):
            assert main([stage, *words, f"workspace={folder}/run", f"corpus.paths={folder}/pairs.parquet"]) == 0
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.slow
def test_the_drivers_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    # A quick surrogate with long vectors: what would show on the driver costs little to make.
    words = ["alpha", "beta", "gamma", "delta", "omega", "sigma"]
    model = make_static([*words, "question", "number"], tmp_path / "model", dimensions=384)
    random = np.random.default_rng(0)
    folders = []
    for rows in (1_000, 12_000):
        folder = tmp_path / str(rows)
        folder.mkdir()
        documents = [f"{number} " + " ".join(random.choice(words, 500)) for number in range(rows)]
        table = pa.table({"query": [f"question number {n}" for n in range(rows)], "document": documents})
        pq.write_table(table.append_column("source", pa.array(["made"] * rows)), folder / "pairs.parquet")
        folders.append(str(folder))
    settings = [f"embed.model={model}", f"train.model={model}", "embed.max_tokens=16", "train.max_document_tokens=16"]
    command = [sys.executable, "-c", _MEASURE, *folders, *settings, "cluster.clusters=8", "embed.tokenizers=0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    small, large = (int(line) for line in done.stdout.split()[-2:])
    # 12,000 rows are 33 MB of text and 18 MB of vectors; receipts and Ray's own bookkeeping are a few MB.
    assert large - small < 20, (small, large)
