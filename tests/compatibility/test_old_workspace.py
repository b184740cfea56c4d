"""Read, resume and refresh a workspace that an older version of this project made (make_workspace.py)."""

from __future__ import annotations

import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

from clusterbatch.cli import main
from tests.compatibility.make_workspace import (
    CHECKPOINT_EVERY,
    CUT_OFF_AT,
    FIRST_CORPUS,
    GROWN_CORPUS,
    HERE,
    MORE_PAIRS,
    OVERRIDES,
    STEPS,
    set_times,
)

pytestmark = [
    pytest.mark.skipif(not HERE.is_dir(), reason=f"the workspace's files are named by {HERE}"),
    pytest.mark.usefixtures("in_process"),
]

ARCHIVE = Path(__file__).with_name("workspace.tar.xz")
# Rewritten by commands that otherwise find everything done.
SUMMARIES = ("metrics.json", "_run.json", "report/", "compare/report/", "refresh.json")
Run = Callable[..., Any]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the old workspace, its inputs and its model; the working directory is where they are."""
    with tarfile.open(ARCHIVE) as archive:
        # Python has filters from 3.11.4 on.
        archive.extractall(tmp_path, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    set_times(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(root: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """A command in this process, which must succeed; returns what it prints with --json."""

    def command(*words: str, grown: bool = False) -> Any:
        capsys.readouterr()
        name, *rest = words
        corpus = GROWN_CORPUS if grown else FIRST_CORPUS
        code = main([name, *OVERRIDES, corpus, "--json", *rest])
        said = capsys.readouterr()
        assert code == 0, said.err
        return json.loads(said.out)

    return command


def _files(folder: Path) -> dict[str, bytes]:
    """Content of all files that make up artifacts, by relative path."""
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if not name.startswith(SUMMARIES)}


def _manifest(root: Path, artifact: str) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((root / "workspace" / artifact / "manifest.json").read_text())
    return manifest


def _table(root: Path, artifact: str, **details: Any) -> list[dict[str, Any]]:
    """Rows of the parts of an artifact that have these details."""
    parts = [part for part in _manifest(root, artifact)["parts"] if details.items() <= part["details"].items()]
    assert parts
    return [row for part in parts for row in pq.read_table(root / "workspace" / artifact / part["path"]).to_pylist()]


def _centroids(root: Path, generation: int) -> dict[str, tuple[str, int]]:
    """Source and number of every pair's centroid."""
    rows = _table(root, f"generation={generation:03d}/clusters", content="rows")
    return {row["pair_id"]: (row["source"], row["centroid"]) for row in rows}


def _weights(folder: Path) -> np.ndarray:
    tensors = load_file(folder / "model.safetensors")
    return np.concatenate([tensors[name].ravel() for name in sorted(tensors)])


def _steps(folder: Path) -> list[bytes]:
    """Lines of a finished training's log."""
    [part] = [part for part in json.loads((folder / "manifest.json").read_text())["parts"] if "metrics" in part["path"]]
    return (folder / part["path"]).read_bytes().splitlines()


def test_an_old_workspace_is_inspected(root: Path, run: Run) -> None:
    rows = run("inspect")
    assert {(row["stage"], row["generation"]) for row in rows} == {
        ("ingest", None),
        *((stage, generation) for stage in ("embed", "cluster", "train", "evaluate") for generation in (0, 1)),
    }
    artifacts = {"ingest": "corpus", "embed": "embeddings", "cluster": "clusters", "evaluate": "evaluation"}
    for row in rows:
        artifact = artifacts.get(row["stage"], row["stage"])
        where = artifact if row["generation"] is None else f"generation={row['generation']:03d}/{artifact}"
        manifest = _manifest(root, where)
        assert row["state"] == "done"
        assert {name: row[name] for name in manifest["counts"]} == manifest["counts"]
        assert (row["parts"], row["created"]) == (len(manifest["parts"]), manifest["created"])
    index = _table(root, "generation=001/clusters", content="index")
    sizes: dict[str, int] = {}
    for piece in index:
        name = f"{piece['source']}/{piece['cluster']}"
        sizes[name] = sizes.get(name, 0) + piece["rows"]
    assert sum(sizes.values()) == _manifest(root, "corpus")["counts"]["written"]
    for name, size in sizes.items():
        assert run("inspect", "--cluster", name)["rows"] == size


def test_finished_work_is_not_done_again(root: Path, run: Run) -> None:
    before = _files(root / "workspace")
    summary = run("run")
    found = {(row["stage"], row["generation"]): row["fingerprint"] for row in summary["stages"]}
    assert found["ingest", None] == _manifest(root, "corpus")["fingerprint"]
    assert found["train", 1] == _manifest(root, "generation=001/train")["fingerprint"]
    assert (summary["live_generation"], [round["promoted"] for round in summary["refresh"]]) == (1, [True])
    compared = run("compare")
    assert {arm["arm"] for arm in compared["arms"]} == {"random", "cluster"}
    # Not one file was written, removed or changed: every fingerprint is still the same.
    assert _files(root / "workspace") == before


def test_reports_are_rebuilt_in_another_language_and_copied(root: Path, run: Run) -> None:
    found = run("report", "report.language=ja", f"--output={root / 'copy'}")
    assert {"report", "comparison"} <= found.keys()
    for place in ("report", "compare/report"):
        page = (root / "workspace" / place / "index.html").read_bytes()
        assert b'<html lang="ja">' in page
        assert (root / "copy" / place / "index.html").read_bytes() == page


def test_a_training_that_was_cut_off_resumes(root: Path, run: Run) -> None:
    train = root / "workspace/generation=000/train"
    manifest, steps, weights = _manifest(root, "generation=000/train"), _steps(train), _weights(train / "model")
    whole = CUT_OFF_AT - CHECKPOINT_EVERY
    shutil.rmtree(train)
    shutil.copytree(root / "cut-off", train)
    logged = [line for path in sorted((train / "metrics").iterdir()) for line in path.read_bytes().splitlines()]
    assert len(logged) > whole, "some lines are to be dropped"
    [row] = [row for row in run("inspect") if (row["stage"], row["generation"]) == ("train", 0)]
    assert row["state"].startswith(f"step {len(logged)} done")
    resumed = run("train")
    assert resumed["fingerprint"] == manifest["fingerprint"]
    assert {**resumed["details"], "plan": None} == {**manifest["details"], "plan": None}
    # The steps before the checkpoint are those of the run that was cut off, to the second; the others were done now.
    lines = _steps(train)
    assert lines[:whole] == logged[:whole]
    assert not set(lines[whole:]) & set(logged)
    assert [json.loads(line)["step"] for line in lines] == list(range(STEPS))
    # As if nothing had happened: the last bits of sums may depend on the machine.
    found, wanted = ([json.loads(line)["loss"] for line in each] for each in (lines, steps))
    assert np.allclose(found, wanted, rtol=1e-4)
    assert np.allclose(_weights(train / "model"), weights, atol=1e-4)


def test_rows_are_appended_and_join_the_old_clusters(root: Path, run: Run) -> None:
    # To the generation whose clusters are the surrogate's: it stays with the rows that it was fitted to.
    assert run("refresh", "--rollback")["live_generation"] == 0
    before = _files(root / "workspace")
    corpus, old = _manifest(root, "corpus"), _centroids(root, 0)
    appended = run("ingest", "--append", grown=True)
    new = appended["counts"]["written"] - len(old)
    assert 0 < new <= MORE_PAIRS
    assert appended["counts"]["read"] == corpus["counts"]["read"] + MORE_PAIRS
    assert appended["earlier"] == [corpus["fingerprint"]]
    assert run("ingest", "--append", grown=True)["fingerprint"] == appended["fingerprint"]
    words = ["refresh.surrogate=char-ngrams", "refresh.when=drift > 0.999"]
    [_, record] = run("refresh", *words, grown=True)["refresh"]
    assert (record["base"], record["reclustered"], record["extended"], record["clusters"]) == (0, False, True, 2)
    assert _manifest(root, "generation=000/embeddings/versions/002")["details"]["rows"] == new
    found = _centroids(root, 2)
    assert len(found) == len(old) + new
    assert {pair: place for pair, place in found.items() if pair in old} == old
    # Of what there was only the live model is another.
    changed = {name for name, data in before.items() if (root / "workspace" / name).read_bytes() != data}
    assert all(name.startswith("model/") for name in changed)


def test_a_round_of_refresh_follows_the_old_one(root: Path, run: Run) -> None:
    before = _files(root / "workspace")
    found = run("refresh")
    first, second = found["refresh"]
    assert first == json.loads((root / "workspace/generation=001/refresh/round.json").read_text())
    assert (second["generation"], second["base"], second["clusters"], second["promoted"]) == (2, 1, 2, True)
    assert found["live_generation"] == 2
    train = _manifest(root, "generation=002/train")
    assert train["details"]["steps_before"] == STEPS + first["steps"]
    assert (
        _manifest(root, "generation=002/clusters")["counts"]["written"]
        == _manifest(root, "corpus")["counts"]["written"]
    )
    models = [_weights(root / f"workspace/generation={number:03d}/train/model") for number in (1, 2)]
    assert np.array_equal(_weights(root / "workspace/model"), models[1])
    assert 0 < np.abs(models[1] - models[0]).max() < 1
    changed = {name for name, data in before.items() if (root / "workspace" / name).read_bytes() != data}
    assert all(name.startswith("model/") for name in changed)
    run("refresh", "--rollback")
    assert np.array_equal(_weights(root / "workspace/model"), models[0])
