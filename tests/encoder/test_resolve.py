from __future__ import annotations

import json
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from unittest.mock import MagicMock

import pytest
from huggingface_hub.errors import GatedRepoError

from clusterbatch.encoder.resolve import model_fingerprint, resolve_model
from clusterbatch.errors import InfrastructureError, UsageError
from clusterbatch.store.checksum import checksum


def test_packaged_model_by_both_names(minilm: str) -> None:
    assert Path(minilm, "model.safetensors").is_file()
    assert resolve_model("sentence-transformers/all-MiniLM-L6-v2") == resolve_model("all-MiniLM-L6-v2") == minilm


def test_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve_model("model") == resolve_model(str(tmp_path / "model")) == str(tmp_path / "model")
    with pytest.raises(UsageError, match="no such model folder"):
        resolve_model("./missing")


def test_a_name_that_no_hub_answers_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InfrastructureError, match="hub cannot be reached"):
        resolve_model("nobody/no-such-model")
    with pytest.raises(UsageError, match="neither a folder nor a model"):
        resolve_model("not//a name")


def test_what_the_hub_answers_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    class ProxyError(Exception):
        """As the hub's HTTP library raises it: no error of the hub or of the system."""

    def raising(error: Exception) -> None:
        def download(*arguments: object, **options: object) -> str:
            raise error

        monkeypatch.setattr("huggingface_hub.snapshot_download", download)

    raising(ProxyError("403 Forbidden"))
    with pytest.raises(InfrastructureError, match=r"hub cannot be reached to look for it \(403 Forbidden\)"):
        resolve_model("somebody/model")
    raising(GatedRepoError("Access to this model is restricted", response=MagicMock()))
    with pytest.raises(UsageError, match="who have accepted its terms"):
        resolve_model("somebody/model")


def test_fingerprint_holds_no_file_in_memory(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(64 * 2**20))
    tracemalloc.start()
    found = model_fingerprint(str(tmp_path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == checksum(f"model.safetensors {checksum(bytes(64 * 2**20))}".encode())
    assert peak < 40 * 2**20


def test_fingerprint_is_of_the_content(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    copy = shutil.copytree(tiny("bert"), tmp_path / "copy")
    before = model_fingerprint(str(tiny("bert")))
    assert model_fingerprint(str(copy)) == before
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert model_fingerprint(str(copy)) != before


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_fingerprint_is_of_a_module_in_its_own_folder_too(
    name: str, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    module = shutil.copytree(tiny("bert"), tmp_path / "0_Transformer")
    transformer = {"idx": 0, "name": "0", "path": "0_Transformer", "type": "sentence_transformers.models.Transformer"}
    (tmp_path / "modules.json").write_text(json.dumps([transformer]))
    before = model_fingerprint(str(tmp_path))
    (module / name).write_text(json.dumps(json.loads((module / name).read_text()) | {"changed": True}))
    assert model_fingerprint(str(tmp_path)) != before
