from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoTokenizer

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
    model = AutoModel.from_pretrained(tmp_path)
    weights = model.state_dict()
    for name, value in encoder.backbone.state_dict().items():
        assert torch.equal(weights[name], value), name
    if architecture in ARCHITECTURES:
        assert encoder.pooling == "mean"
        tokenizer = AutoTokenizer.from_pretrained(tmp_path)
        tokens = tokenizer(awkward_texts, padding=True, truncation=True, max_length=40, return_tensors="pt")
        with torch.no_grad():
            hidden = model(**tokens).last_hidden_state
        counted = tokens["attention_mask"].unsqueeze(2)
        means = torch.nn.functional.normalize((hidden * counted).sum(1) / counted.sum(1), dim=1)
        assert (vectors * means.numpy()).sum(axis=1).min() > 0.99999


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


# The newest of each minor release since modules have been named by other paths.
_RELEASES = ["5.0.0", "5.1.2", "5.2.3", "5.3.0", "5.4.1", "5.5.1", "5.6.1", "5.7.0", "6.0.1", "6.1.0"]
_OPEN = """
import json, sys
import numpy as np
from sentence_transformers import SentenceTransformer, __version__
for folder in sys.argv[1:]:
    texts = json.load(open(f"{folder}/texts.json"))
    np.save(f"{folder}/vectors.npy", SentenceTransformer(folder, device="cpu").encode(texts))
print(__version__)
"""


@pytest.mark.parametrize("name", ["passage", "corpus"])
@pytest.mark.parametrize("prompt", ["", "own: "])
def test_a_document_has_the_prompt_it_was_trained_with_whatever_the_first_model_called_its_own(
    name: str, prompt: str, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny("bert"), tmp_path / "first")
    settings = {"prompts": {"query": "q: ", name: "p: ", "classify": "c: "}}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(settings))
    encoder = load_encoder(str(folder))
    assert encoder.prompts == {"query": "q: ", "document": "p: "}
    encoder.prompts["document"] = prompt
    save_model(encoder, tmp_path / "saved")
    assert load_encoder(str(tmp_path / "saved")).prompts == {"query": "q: ", "document": prompt}
    loaded = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert (loaded.prompts["document"], loaded.prompts["classify"]) == (prompt, "c: ")


@pytest.mark.slow
@pytest.mark.parametrize(
    "release",
    # The oldest that is supported and the newest of each major release; the others beside the tests of faults.
    [pytest.param(each, marks=[] if each in ("5.0.0", "5.7.0", "6.1.0") else pytest.mark.faults) for each in _RELEASES],
)
def test_other_sentence_transformers_open_it(
    release: str, minilm: str, awkward_texts: list[str], tmp_path: Path
) -> None:
    package = tmp_path / "package"
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "-t", str(package)]
    installed = subprocess.run(
        [*install, f"sentence-transformers=={release}"], capture_output=True, text=True, check=False
    )
    if installed.returncode:
        pytest.skip(f"sentence-transformers {release} cannot be installed: {installed.stderr.splitlines()[-1]}")
    example("images").write_clip(tmp_path / "clip", ["a large red circle", "a small blue bar"], seed=0)
    texts = dict.fromkeys(("backbone", "static"), awkward_texts) | {"towers": ["a large red circle", "a bar"]}
    folders, expected = {}, {}
    for kind, those in texts.items():
        encoder = load_encoder(str(tmp_path / "clip")) if kind == "towers" else load_encoder(minilm, kind)  # type: ignore[arg-type]
        folders[kind] = tmp_path / kind
        save_model(encoder, folders[kind])
        (folders[kind] / "texts.json").write_text(json.dumps(those))
        expected[kind] = encoder.encode(encoder.tokenizer.encode(those, encoder.max_tokens), 256)
    command = [sys.executable, "-c", _OPEN, *map(str, folders.values())]
    environment = {**os.environ, "PYTHONPATH": str(package)}
    ended = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert ended.stdout.strip() == release
    for kind, folder in folders.items():
        found = np.load(folder / "vectors.npy")
        known = np.linalg.norm(found, axis=1) > 0
        assert known.sum() >= len(texts[kind]) - 2
        assert (found * expected[kind]).sum(axis=1)[known].min() > 0.99999, kind


def test_weights_are_float32_whatever_they_were_computed_in(minilm: str, tmp_path: Path) -> None:
    save_model(load_encoder(minilm, dtype=torch.bfloat16), tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} <= {torch.float32, torch.int64}  # noqa: SIM118
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float32"
