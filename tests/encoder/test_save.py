from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from sentence_transformers import SentenceTransformer
from transformers import AutoModel

from clusterbatch.encoder.load import load_encoder
from clusterbatch.encoder.save import save_model
from tests.encoder.models import ARCHITECTURES
from tests.integration.test_examples import example


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "t5", "xlnet", "qwen2"])
def test_backbone_in_sentence_transformers_and_transformers(
    architecture: str, tiny: Callable[[str], Path], awkward_texts: list[str], tmp_path: Path
) -> None:
    encoder = load_encoder(str(tiny(architecture)))
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    encoder.max_tokens, encoder.prompts = 40, {"query": "the ", "document": ""}
    save_model(encoder, tmp_path)
    loaded = SentenceTransformer(str(tmp_path), device="cpu")
    assert loaded.max_seq_length == 40
    vectors = encoder.encode(encoder.tokenizer.encode(awkward_texts, 40), 256)
    expected = loaded.encode(awkward_texts)
    assert np.allclose(np.linalg.norm(expected, axis=1), 1, atol=1e-5)
    assert (vectors * expected).sum(axis=1).min() > 0.99999
    queries = encoder.encode(encoder.tokenizer.encode(awkward_texts, 40, "the "), 256)
    assert (queries * loaded.encode_query(awkward_texts)).sum(axis=1).min() > 0.99999
    weights = AutoModel.from_pretrained(tmp_path).state_dict()
    for name, value in encoder.backbone.state_dict().items():
        assert torch.equal(weights[name], value), name


def test_static_in_sentence_transformers(minilm: str, awkward_texts: list[str], tmp_path: Path) -> None:
    encoder = load_encoder(minilm, "static")
    encoder.max_tokens = 50
    save_model(encoder, tmp_path)
    loaded = SentenceTransformer(str(tmp_path), device="cpu")
    vectors = encoder.encode(encoder.tokenizer.encode(awkward_texts, 50), 256)
    expected = loaded.encode(awkward_texts)
    # Sentence Transformers gives texts without tokens the zero vector, this encoder a unit vector.
    known = np.linalg.norm(expected, axis=1) > 0
    assert (~known).sum() == 2
    assert (vectors * expected).sum(axis=1)[known].min() > 0.99999


@pytest.mark.parametrize("kind", ["backbone", "static"])
def test_saved_and_loaded_again_is_the_same(kind: str, minilm: str, tmp_path: Path) -> None:
    encoder = load_encoder(minilm, kind)  # type: ignore[arg-type]
    save_model(encoder, tmp_path)
    again = load_encoder(str(tmp_path))
    assert (again.kind, again.pooling, again.max_tokens, again.prompts) == (kind, "mean", 256, encoder.prompts)
    texts = ["the fox", "埼玉県は"]
    vectors = [model.encode(model.tokenizer.encode(texts, 256), 256) for model in (encoder, again)]
    assert np.array_equal(*vectors)


_OPEN = """
import json, sys
import numpy as np
from sentence_transformers import SentenceTransformer, __version__
folder, target = sys.argv[1:]
np.save(target, SentenceTransformer(folder, device="cpu").encode(json.load(open(f"{folder}/texts.json"))))
print(__version__)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["backbone", "static", "towers"])
def test_older_sentence_transformers_open_it(kind: str, minilm: str, awkward_texts: list[str], tmp_path: Path) -> None:
    """SENTENCE_TRANSFORMERS_5 names a folder with the package of a release 5, for example made by `pip install -t`."""
    older = os.environ.get("SENTENCE_TRANSFORMERS_5")
    if not older:
        pytest.skip("no older Sentence Transformers (set SENTENCE_TRANSFORMERS_5)")
    if kind == "towers":
        awkward_texts = ["a large red circle", "a small blue bar"]
        example("images").write_clip(tmp_path / "clip", awkward_texts, seed=0)
        encoder = load_encoder(str(tmp_path / "clip"))
    else:
        encoder = load_encoder(minilm, kind)  # type: ignore[arg-type]
    save_model(encoder, tmp_path / "saved")
    (tmp_path / "saved" / "texts.json").write_text(json.dumps(awkward_texts))
    command = [sys.executable, "-c", _OPEN, str(tmp_path / "saved"), str(tmp_path / "vectors.npy")]
    environment = {**os.environ, "PYTHONPATH": older}
    ended = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert ended.stdout.startswith("5.")
    found = np.load(tmp_path / "vectors.npy")
    expected = encoder.encode(encoder.tokenizer.encode(awkward_texts, encoder.max_tokens), 256)
    known = np.linalg.norm(found, axis=1) > 0
    assert known.sum() >= len(awkward_texts) - 2
    assert (found * expected).sum(axis=1)[known].min() > 0.99999


def test_weights_are_float32_whatever_they_were_computed_in(minilm: str, tmp_path: Path) -> None:
    save_model(load_encoder(minilm, dtype=torch.bfloat16), tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} <= {torch.float32, torch.int64}  # noqa: SIM118
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float32"
