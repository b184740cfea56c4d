"""`clean` shows first, then removes only what nothing needs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from clusterbatch.config import RunConfig
from clusterbatch.errors import InfrastructureError, UsageError
from clusterbatch.log import LOG_FORMAT
from clusterbatch.pipeline.clean import clean
from clusterbatch.pipeline.rounds import Round, next_generation, rollback_target, rounds, write_round
from clusterbatch.pipeline.run import STAGES, run_stage
from clusterbatch.store import Artifact, Counts, Folder, Part, Receipt
from clusterbatch.store.checksum import checksum
from clusterbatch.store.workspace import MARK, Workspace, live_generation


def finish(artifact: Artifact, *more: Part) -> None:
    part = artifact.write_part("part", "bin", b"kept", 1)
    receipt = Receipt(unit=0, fingerprint="f", parts=[part, *more], counts=Counts(read=1, written=1))
    artifact.commit("f", [receipt], config={}, inputs={}, seconds=0.0)


def checkpoint(folder: Folder, score: float | None = None) -> None:
    part = Artifact(folder, "checkpoint").write_part("parameters", "safetensors", b"w" * 100, 1)
    manifest = {"step": 1, "run_fingerprint": "f", "parts": [part.model_dump()], "score": score}
    folder.write("manifest.json", json.dumps(manifest).encode())


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """Three finished generations and one that is being made."""
    config = RunConfig(workspace=str(tmp_path))
    workspace = Workspace(config)
    finish(workspace.corpus)
    workspace.corpus.write_part("attempt", "parquet", b"orphan", 1)
    Artifact(workspace.corpus.folder.child("_exchange"), "rows").write_part("unit", "arrows", b"left over", 1)
    for generation in (0, 1, 2):
        finish(workspace.embeddings(generation))
        finish(Artifact(workspace.embeddings(generation).folder.child("surrogate"), "surrogate"))
        model = Part(path="model/model.safetensors", rows=0, bytes=7, checksum=checksum(b"weights"))
        finish(workspace.train(generation), model)
        workspace.train(generation).folder.write(model.path, b"weights")
        for step in (10, 20, 30):
            checkpoint(workspace.train(generation).folder.child("checkpoints", f"step={step:08d}"))
    workspace.embeddings(3).write_part("part", "bin", b"in work", 1)
    return config


_OLD = "generation={:03d}/train/checkpoints/step=00000010"


def test_a_dry_run_removes_nothing_and_says_what_would_go(config: RunConfig, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    removals = clean(config, keep=2, dry_run=True)
    assert sorted(tmp_path.rglob("*")) == before
    [attempt], [unit] = tmp_path.glob("corpus/attempt-*"), tmp_path.glob("corpus/_exchange/unit-*")
    sizes = [sum(file.stat().st_size for file in tmp_path.glob(f"{_OLD.format(each)}/*")) for each in (1, 2)]
    assert {removal.path: removal.bytes for removal in removals} == {
        "generation=000": removals[0].bytes,
        _OLD.format(1): sizes[0],
        _OLD.format(2): sizes[1],
        f"corpus/{attempt.name}": 6,
        f"corpus/_exchange/{unit.name}": 9,
    }


def test_cleaning_keeps_what_is_finished_named_or_in_work(config: RunConfig, tmp_path: Path) -> None:
    clean(config, keep=1, dry_run=False)
    assert [path.name for path in sorted(tmp_path.glob("generation=*"))] == ["generation=002", "generation=003"]
    assert [path.name for path in tmp_path.glob("generation=002/train/checkpoints/*")] == ["step=00000030"]
    workspace = Workspace(config)
    for artifact in (workspace.corpus, workspace.embeddings(2), workspace.train(2)):
        assert artifact.read_part(artifact.require().parts[0]) == b"kept"
    assert len(list(tmp_path.glob("generation=003/embeddings/part-*"))) == 1
    assert clean(config, keep=1, dry_run=True) == []


def test_what_an_interrupted_attempt_left_in_a_whole_checkpoint_goes(config: RunConfig, tmp_path: Path) -> None:
    folder = Workspace(config).train(2).folder.child("checkpoints", "step=00000030")
    named = {path.name for path in (tmp_path / "generation=002/train/checkpoints/step=00000030").iterdir()}
    left = Artifact(folder, "checkpoint").write_part("parameters", "safetensors", b"left over", 1)
    # One without a manifest may be in work.
    unfinished = Workspace(config).train(2).folder.child("checkpoints", "step=00000040")
    begun = Artifact(unfinished, "checkpoint").write_part("parameters", "safetensors", b"begun", 1)
    [removal] = [each for each in clean(config, keep=3, dry_run=False) if "checkpoints" in each.path]
    assert removal.path.endswith(f"step=00000030/{left.path}")
    assert (removal.bytes, removal.reason) == (9, "not named in the manifest")
    assert set(folder.list()) == named
    assert unfinished.list() == [begun.path]


def test_the_best_checkpoint_stays_however_old(config: RunConfig, tmp_path: Path) -> None:
    checkpoints = Workspace(config).train(2).folder.child("checkpoints")
    for step, score in ((10, 0.5), (20, 0.5), (30, 0.4)):
        checkpoint(checkpoints.child(f"step={step:08d}"), score)
    clean(config, keep=1, dry_run=False)
    assert checkpoints.list() == ["step=00000010", "step=00000030"]


_FOREIGN = ["notes.txt", "corpus/pairs-20240101.parquet", "corpus/sub/manifest.json", "corpus/_receipts/mine.json"]
_FOREIGN += [f"corpus/_exchange/{name}" for name in ("mine.arrows", "mine/manifest.json", "rows/00000001.json")]
_INNER = ["notes.md", "model/notes.md", "metrics/mine.jsonl", "_ray/mine.json", "checkpoints/mine/manifest.json"]
_INNER += ["checkpoints/step=00000010/notes.md", "checkpoints/step=00000030/notes.md", "_receipts/mine.json"]
_INNER += ["model/vocab.txt"]
_FOREIGN += [f"generation={number:03d}/train/{name}" for number in (0, 1, 2) for name in _INNER]


def test_files_of_others_stay(config: RunConfig, tmp_path: Path) -> None:
    for name in _FOREIGN:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('{"mine": true}')
    clean(config, keep=1, dry_run=False)
    Workspace(config).corpus.remove()
    assert all((tmp_path / name).read_text() == '{"mine": true}' for name in _FOREIGN)
    # What is theirs alone is not listed again.
    assert clean(config, keep=1) == []
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    places = ("corpus/", "generation=000/", "generation=001/")
    assert {name for name in left if name.startswith(places)} == {name for name in _FOREIGN if name.startswith(places)}


def test_a_copy_that_somebody_has_made_of_a_checkpoint_stays(config: RunConfig, tmp_path: Path) -> None:
    checkpoints = tmp_path / "generation=002/train/checkpoints"
    shutil.copytree(checkpoints / "step=00000010", checkpoints / "best")
    clean(config, keep=1, dry_run=False)
    Workspace(config).train(2).remove()
    assert {path.name for path in checkpoints.iterdir()} == {"best"}
    assert len(list((checkpoints / "best").iterdir())) == 2


def test_at_least_one_generation_is_kept(config: RunConfig) -> None:
    with pytest.raises(UsageError, match="at least 1"):
        clean(config, keep=0, dry_run=False)


def test_what_is_live_and_what_it_rests_on_stays(config: RunConfig) -> None:
    workspace = Workspace(config)
    shared = {"when": "never", "drift": {}, "promoted": True}
    # Generation 1 has clusters of its own; 2 is live and goes on with them; 3 did not go live.
    write_round(workspace, Round(generation=1, base=0, clusters=1, **shared))
    write_round(workspace, Round(generation=2, base=1, clusters=1, **shared))
    write_round(workspace, Round(generation=3, base=2, clusters=1, when="never", drift={}, promoted=False))
    workspace.model.write_json(MARK, {"generation": 2})
    gone = {removal.path for removal in clean(config, keep=1, dry_run=False) if "/" not in removal.path}
    assert gone == {"generation=000"}
    assert rollback_target(workspace) == 1


def test_rounds_keep_their_numbers_when_generations_are_cleaned_away(config: RunConfig, tmp_path: Path) -> None:
    workspace = Workspace(config)
    for generation in (1, 2, 3, 4):
        finish(workspace.train(generation)) if generation > 2 else None
        record = Round(generation=generation, base=generation - 1, clusters=generation, when="always", drift={})
        write_round(workspace, record.model_copy(update={"promoted": True}))
    workspace.model.write_json(MARK, {"generation": 4})
    clean(config, keep=1, dry_run=False)
    assert workspace.train(2).manifest() is None
    assert workspace.train(3).manifest() is not None
    assert [record.generation for record in rounds(workspace)] == [1, 2, 3, 4]
    assert (next_generation(workspace), rollback_target(workspace)) == (5, 3)
    # Without the oldest record, too, as after `clean` of an older version.
    workspace.refresh(1).remove()
    assert (next_generation(workspace), rollback_target(workspace)) == (5, 3)
    assert clean(config, keep=1) == []
    with pytest.raises(UsageError, match="generation 4 is live"):
        run_stage(next(stage for stage in STAGES if stage.name == "train"), config)
    assert live_generation(workspace) == 4


def test_a_round_under_way_keeps_what_it_continues_from(config: RunConfig) -> None:
    workspace = Workspace(config)
    write_round(workspace, Round(generation=3, base=0, clusters=1, when="always", drift={}))
    workspace.model.write_json(MARK, {"generation": 2})
    assert not [removal for removal in clean(config, keep=1) if removal.path in ("generation=000", "generation=001")]


def test_a_server_that_lists_no_uploads_is_cleaned_all_the_same(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(folder: Folder) -> None:
        raise InfrastructureError("403 AccessDenied")

    monkeypatch.setenv(LOG_FORMAT, "json")
    monkeypatch.setattr(Folder, "unfinished_uploads", refused)
    assert clean(config, keep=2, dry_run=True)
    (line,) = capsys.readouterr().err.splitlines()
    assert json.loads(line)["message"] == "unfinished uploads cannot be listed: 403 AccessDenied"
    assert json.loads(line)["level"] == "warning"
