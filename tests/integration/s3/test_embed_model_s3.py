"""A model in a bucket: copied to the machine once, again when it changes."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest

from clusterbatch.config import StorageConfig
from clusterbatch.encoder.load import load_encoder
from clusterbatch.encoder.resolve import model_fingerprint, resolve_model
from clusterbatch.errors import DataError, InfrastructureError
from clusterbatch.store import Folder
from tests.encoder.models import make_model

pytestmark = pytest.mark.s3


def test_model_in_a_bucket(
    bucket: str, storage: StorageConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    local = make_model("bert", tmp_path / "bert")
    uri = f"s3://{bucket}/models/bert"
    with pytest.raises(DataError, match="no model here"):
        resolve_model(uri, storage)
    remote = Folder(uri, storage)
    for file in local.iterdir():
        remote.upload(file.name, str(file))
    copy = resolve_model(uri, storage)
    assert model_fingerprint(copy) == model_fingerprint(str(local))
    ours, theirs = load_encoder(copy), load_encoder(str(local))
    tokens = ours.tokenizer.encode(["the fox"])
    assert np.array_equal(ours.encode(tokens, 64), theirs.encode(tokens, 64))
    before = Path(copy, "config.json").stat().st_ino
    assert resolve_model(uri, storage) == copy
    assert Path(copy, "config.json").stat().st_ino == before
    remote.write("README.md", b"changed")
    assert resolve_model(uri, storage) != copy
    assert len(list((tmp_path / "cache" / "clusterbatch" / "models").iterdir())) == 2


def test_a_model_that_is_replaced_while_it_is_copied(
    bucket: str, storage: StorageConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files of two versions would be a model that nobody has made."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    remote = Folder(f"s3://{bucket}/models/new", storage)
    for name in ("a.json", "b.json"):
        remote.write(name, b"old")
    opened = Folder.open

    def replaced_after_the_first(folder: Folder, name: str, *others: int) -> BinaryIO:
        file = opened(folder, name, *others)
        remote.write(name, b"new")
        return file

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "open", replaced_after_the_first)
        with pytest.raises(InfrastructureError, match="was replaced while it was copied"):
            resolve_model(remote.uri, storage)
    assert list((tmp_path / "cache" / "clusterbatch" / "models").iterdir()) == []
    copy = Path(resolve_model(remote.uri, storage))
    assert {path.read_bytes() for path in copy.iterdir()} == {b"new"}
