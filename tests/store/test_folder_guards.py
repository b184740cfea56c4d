from pathlib import Path

import pytest

from clusterbatch.errors import UsageError
from clusterbatch.store import Folder


def test_an_empty_address_is_not_the_working_directory() -> None:
    for address in ("", " ", "file://"):
        with pytest.raises(UsageError, match="empty address"):
            Folder(address)


def test_places_that_hold_too_much_are_not_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "project" / "runs").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    for address in ("/", ".", "..", "~", str(tmp_path), str(tmp_path / "link")):
        with pytest.raises(UsageError, match="refusing"):
            Folder(address).remove()
    with pytest.raises(UsageError, match="refusing"):
        Folder("s3://bucket").remove()
    Folder("runs").remove()
    assert not (tmp_path / "project" / "runs").exists()
    assert (tmp_path / "project").is_dir()
