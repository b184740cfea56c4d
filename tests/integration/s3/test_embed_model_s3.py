"""A model in a bucket: copied to the machine once, again when it changes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from clusterbatch.config import StorageConfig
from clusterbatch.encoder.load import load_encoder
from clusterbatch.encoder.resolve import model_fingerprint, resolve_model
from clusterbatch.errors import DataError
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
