from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import modules as st
from transformers import AutoModel

from clusterbatch.encoder.model import load_encoder
from clusterbatch.encoder.save import save_model
from tests.encoder.models import ARCHITECTURES


def _json_files(folder: Path) -> dict[str, object]:
    return {str(path.relative_to(folder)): json.loads(path.read_text()) for path in folder.rglob("*.json")}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
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


def test_files_are_those_that_sentence_transformers_writes(minilm: str, tmp_path: Path) -> None:
    peer = SentenceTransformer(minilm, device="cpu")
    peer.save(str(tmp_path / "peer"), create_model_card=False)
    save_model(load_encoder(minilm), tmp_path / "ours")
    ours, theirs = _json_files(tmp_path / "ours"), _json_files(tmp_path / "peer")
    assert ours.keys() == theirs.keys()
    for name in ("modules.json", "1_Pooling/config.json", "2_Normalize/config.json", "sentence_bert_config.json"):
        assert ours[name] == theirs[name], name
    static = SentenceTransformer(
        modules=[st.StaticEmbedding(peer.tokenizer, embedding_dim=8), st.Normalize()], device="cpu"
    )
    static.save(str(tmp_path / "static peer"), create_model_card=False)
    save_model(load_encoder(minilm, "static"), tmp_path / "static ours")
    ours, theirs = _json_files(tmp_path / "static ours"), _json_files(tmp_path / "static peer")
    assert ours.keys() == theirs.keys()
    assert ours["modules.json"] == theirs["modules.json"]
    assert ours["config_sentence_transformers.json"] == theirs["config_sentence_transformers.json"]


def test_weights_are_float32_whatever_they_were_computed_in(minilm: str, tmp_path: Path) -> None:
    save_model(load_encoder(minilm, dtype=torch.bfloat16), tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} <= {torch.float32, torch.int64}  # noqa: SIM118
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float32"
