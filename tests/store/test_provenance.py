"""What a manifest says of the code that wrote it."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from clusterbatch.store import Artifact, Folder
from clusterbatch.store import provenance as lineage


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """The commit is looked up once a process; each test looks anew."""
    lineage.source_commit.cache_clear()
    yield
    lineage.source_commit.cache_clear()


def place_code(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lineage, "__file__", str(folder / "clusterbatch" / "store" / "lineage.py"))


def test_a_checkout_names_its_commit_and_whether_files_were_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place_code(tmp_path, monkeypatch)
    monkeypatch.setenv("CLUSTERBATCH_REVISION", "that of an image")
    (tmp_path / "file").write_text("1")
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    for words in (["init", "-q"], ["add", "file"], [*identity, "commit", "-qm", "first"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    found = lineage.source_commit()
    assert found is not None
    assert re.fullmatch(r"[0-9a-f]{40}", found)
    lineage.source_commit.cache_clear()
    (tmp_path / "file").write_text("2")
    assert lineage.source_commit() == f"{found}-dirty"


def test_an_image_names_the_commit_that_it_was_built_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place_code(tmp_path, monkeypatch)
    monkeypatch.setenv("CLUSTERBATCH_REVISION", "abc")
    artifact = Artifact(Folder(str(tmp_path / "corpus")), "corpus")
    artifact.commit("f", [], config={}, inputs={"corpus": "1234"}, seconds=0)
    manifest = artifact.require()
    assert manifest.software["commit"] == "abc"
    assert manifest.inputs == {"corpus": "1234"}
    assert {"python", "ray", "torch"} <= manifest.software.keys()


def test_an_unknown_commit_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place_code(tmp_path, monkeypatch)
    monkeypatch.delenv("CLUSTERBATCH_REVISION", raising=False)
    assert "commit" not in lineage.software_versions()
