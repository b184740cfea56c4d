"""Names that storage gives cannot lead out of a folder, and own files are known by their names."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from clusterbatch.encoder.resolve import resolve_model
from clusterbatch.errors import DataError, InfrastructureError
from clusterbatch.store import Folder
from clusterbatch.store.entry import Entry, is_own_name, local_place, own_name

_ESCAPES = [
    "/etc/passwd",
    "//server/share/x",
    "a//b",
    "../x",
    "a/../../x",
    "a/..",
    ".",
    "",
    "a/./b",
    "a\\..\\..\\x",
    "C:/x",
    "C:x",
    "c:\\x",
    "x\0y",
]
_SEGMENTS = st.sampled_from(["..", ".", "", "a", "b.json", "C:", "\\", "..\\", "\0", "~", "/"])


@pytest.mark.parametrize("name", _ESCAPES)
def test_a_name_that_could_lead_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="not a name"):
        local_place(tmp_path, name)


@given(st.lists(_SEGMENTS, min_size=1, max_size=5))
def test_whatever_a_name_is_made_of_it_stays_in_its_folder(segments: list[str]) -> None:
    root = Path("/somewhere/inside")
    try:
        place = local_place(root, "/".join(segments))
    except DataError:
        return
    assert place != root
    assert place.is_relative_to(root)
    assert place == Path(*root.parts, *segments)


@pytest.mark.parametrize("name", ["/planted", "../planted", "a//../../planted", "..\\planted"])
def test_a_model_in_a_bucket_writes_nothing_outside_its_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if name.startswith("/"):
        name = f"{tmp_path}{name}"
    monkeypatch.setattr(Folder, "find", lambda folder, **options: [Entry("config.json", 2, "1"), Entry(name, 2, "1")])
    monkeypatch.setattr(Folder, "open", lambda folder, name: io.BytesIO(b"{}"))
    with pytest.raises(DataError):
        resolve_model("s3://bucket/model")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").write_text("a file, where no folder can be made")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(Folder, "find", lambda folder, **options: [Entry("config.json", 2, "1")])
    with pytest.raises(InfrastructureError, match=r"s3://bucket/model: cannot be copied to .*/cache/.*XDG_CACHE_HOME"):
        resolve_model("s3://bucket/model")


def test_a_user_without_a_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Containers may run under a user number that no name belongs to."""
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(Folder, "find", lambda folder, **options: [Entry("config.json", 2, "1")])
    monkeypatch.setattr(Folder, "open", lambda folder, name: io.BytesIO(b"{}"))
    copy = Path(resolve_model("s3://bucket/model"))
    assert copy.is_relative_to(tmp_path)
    assert copy.parent.stat().st_mode & 0o077 == 0
    with monkeypatch.context() as another:
        # Whoever made that folder could have put a model of their own there.
        another.setattr("os.getuid", lambda: -1)
        copy.parent.rename(tmp_path / "clusterbatch-models--1")
        with pytest.raises(InfrastructureError, match="another user"):
            resolve_model("s3://bucket/model")
    folder = Folder(str(tmp_path / "runs"))
    folder.write("file", b"x")
    folder.remove("file")
    assert folder.list() == []


def test_a_folder_refuses_names_that_lead_out_of_it(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path / "inside"))
    for name in ("../x", "a/../../x", "..", "x\0"):
        with pytest.raises(DataError, match="cannot be the name"):
            folder.write(name, b"x")
        with pytest.raises(DataError, match="cannot be the name"):
            folder.child(name)
    folder.write("/x", b"x")
    assert (tmp_path / "inside" / "x").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["inside"]


@example("\ud800", "parquet")
@example("\udc80", "tmp")
@given(st.text(st.characters(exclude_characters="/"), min_size=1), st.sampled_from(["parquet", "tmp", "bin"]))
def test_own_names_are_known_and_others_are_not(stem: str, extension: str) -> None:
    name = own_name(f"folder/{stem}", extension)
    assert is_own_name(name)
    assert is_own_name(f"elsewhere/{name}")
    # One digit more or less, another stem or none: not ours.
    assert not is_own_name(f"x{name.rpartition('/')[2]}")
    assert not is_own_name(name.replace("folder/", "")[1:])
    assert name != own_name(f"folder/{stem}", extension)


@pytest.mark.parametrize(
    "name",
    ["pairs-20240101.parquet", "part-00000-0123456789abcdef.parquet", "x-00000000.bin", "data.0123456789abcdef.tmp"],
)
def test_names_that_look_like_ours_are_not_ours(name: str) -> None:
    assert not is_own_name(name)


def test_a_range_of_no_bytes_is_read_without_a_request() -> None:
    nowhere = Folder("s3://no-such-bucket/nothing")
    assert nowhere.read("x", 5, 5) == nowhere.read("x", 0, 0) == nowhere.read("x", None, 0) == b""
