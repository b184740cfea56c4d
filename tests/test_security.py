"""What nobody may be able to do with data, models or object keys that come from elsewhere."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from clusterbatch.config import StorageConfig
from clusterbatch.encoder.load import load_encoder
from clusterbatch.encoder.resolve import resolve_model
from clusterbatch.errors import DataError, UsageError
from clusterbatch.store import Artifact, Counts, Folder, Part

PACKAGE = Path(__file__).parents[1] / "clusterbatch"
# Between this project's own workers, inside the cluster, units of work travel pickled; nowhere else.
PICKLES = {"runtime/work.py"}


def calls(path: Path) -> set[str]:
    """Dotted names of everything that a module calls."""
    tree = ast.parse(path.read_text())
    return {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}


def test_code_that_runs_what_it_reads_stays_out() -> None:
    for path in PACKAGE.rglob("*.py"):
        name, called = path.relative_to(PACKAGE).as_posix(), calls(path)
        assert not called & {"eval", "exec", "torch.load", "yaml.load", "yaml.unsafe_load", "joblib.load"}, name
        assert not re.search(
            r"trust_remote_code\s*=\s*True|allow_pickle\s*=\s*True|shell\s*=\s*True", path.read_text()
        ), name
        if name not in PICKLES:
            assert not called & {"pickle.load", "pickle.loads", "cloudpickle.load", "cloudpickle.loads"}, name


def test_names_do_not_lead_out_of_their_folder(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("s")
    folder = Folder(str(tmp_path / "workspace"))
    for name in ("../secret", "a/../../secret", ".."):
        with pytest.raises(DataError, match="cannot be the name of a file"):
            folder.read(name)
        with pytest.raises(DataError, match="cannot be the name of a file"):
            folder.write(name, b"overwritten")
    part = Part(path="../secret", rows=1, bytes=1, checksum="x")
    artifact = Artifact(folder, "corpus")
    artifact.commit("f", [], config={}, inputs={}, seconds=0, extra_parts=[part])
    assert artifact.require().counts == Counts()
    with pytest.raises(DataError, match="cannot be the name of a file"):
        artifact.read_part(part)
    assert (tmp_path / "secret").read_text() == "s"


def test_weights_in_pickles_are_not_loaded(tmp_path: Path) -> None:
    from transformers import AutoModel

    source = Path(resolve_model("all-MiniLM-L6-v2", StorageConfig()))
    for path in source.rglob("*"):
        if path.is_file() and path.suffix != ".safetensors":
            place = tmp_path / path.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(path.read_bytes())
    weights = AutoModel.from_pretrained(source).state_dict()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(UsageError, match=r"weights only as pytorch_model\.bin"):
        load_encoder(str(tmp_path), "backbone")
    save_file(
        {name: tensor.contiguous() for name, tensor in weights.items()},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    assert load_encoder(str(tmp_path), "backbone").dimensions == 384
