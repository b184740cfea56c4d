"""Links in local folders: those to files are files; those to folders are followed where that is asked for."""

from __future__ import annotations

import os
from pathlib import Path

from clusterbatch.store import Folder


def test_a_link_to_a_file_is_that_file(tmp_path: Path) -> None:
    target = tmp_path / "blobs" / "6f2a"
    target.parent.mkdir()
    target.write_bytes(b"x" * 100)
    os.utime(target, (1_000_000, 1_000_000))
    folder = tmp_path / "snapshot"
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "train.parquet").symlink_to("../../blobs/6f2a")
    (folder / "data" / "nowhere.parquet").symlink_to("../../blobs/none")
    (folder / "data" / "itself.parquet").symlink_to("itself.parquet")
    (folder / "linked").symlink_to(folder / "data")
    for found in (Folder(str(folder)).find(), Folder(str(folder)).find("data/*.parquet")):
        assert [(entry.name, entry.size) for entry in found] == [("data/train.parquet", 100)]
    # A version is the one of what it leads to.
    [before] = Folder(str(folder)).find()
    assert before.version == Folder(str(target.parent)).find()[0].version
    target.write_bytes(b"y" * 100)
    assert Folder(str(folder)).find()[0].version != before.version


def test_links_to_folders_are_followed_on_request_and_never_in_circles(tmp_path: Path) -> None:
    names = ["base/own/file", "elsewhere/file", "elsewhere/deep/file", "other/file"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    base = tmp_path / "base"
    links = {
        "base/a-link": "elsewhere",
        # The folder itself, one above it, and one that is there anyway.
        "base/circle": "base",
        "base/own/up": ".",
        "base/again": "base/own",
        # From one linked folder to another, and back.
        "elsewhere/on": "other",
        "other/back": "elsewhere",
    }
    for name, target in links.items():
        (tmp_path / name).symlink_to(tmp_path / target)
    own = Folder(str(base)).find()
    assert [entry.name for entry in own] == ["own/file"]
    found = [entry.name for entry in Folder(str(base)).find(linked_folders=True)]
    assert sorted(os.path.realpath(base / name) for name in found) == sorted(str(tmp_path / name) for name in names)
    # By its own name where it has one.
    assert "own/file" in found
    # From the inside, a folder that is a link is like any other.
    assert [entry.name for entry in Folder(str(base / "a-link")).find()] == ["deep/file", "file"]
