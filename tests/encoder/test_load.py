"""Folders that would load as another model than they say are refused, each in one line."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import modules as st
from torch import Tensor

from clusterbatch.encoder.check import check_model
from clusterbatch.encoder.load import load_encoder
from clusterbatch.encoder.model_files import Kind
from clusterbatch.encoder.save import save_model
from clusterbatch.errors import ClusterbatchError, DataError, UsageError
from tests.encoder.models import make_static

TEXTS = ["the quick brown fox", "Jumps over The Lazy Dog", "a"]


@pytest.fixture
def changed(tiny: Callable[[str], Path], tmp_path: Path) -> Callable[..., str]:
    """`changed(weights)`: a copy of the tiny BERT whose weights by name went through that function."""

    def copy(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> str:
        folder = tmp_path / "changed"
        shutil.copytree(tiny("bert"), folder)
        weights = change(load_file(folder / "model.safetensors"))
        save_file(
            {name: value.clone() for name, value in weights.items()},
            folder / "model.safetensors",
            metadata={"format": "pt"},
        )
        return str(folder)

    return copy


def _refusal(folder: str | Path, kind: Kind | None = None) -> ClusterbatchError:
    """The error of loading, which the check before a run raises as well, behind the key."""
    with pytest.raises(ClusterbatchError) as loading:
        load_encoder(str(folder), kind)
    with pytest.raises(type(loading.value)) as checking:
        check_model(str(folder), key="train.model", kind=kind)
    assert str(checking.value) == f"train.model: {loading.value}"
    assert "\n" not in str(loading.value)
    return loading.value


@pytest.mark.parametrize("kind", [None, "static"])
def test_weights_under_other_names_are_not_made_up(kind: Kind | None, changed: Callable[..., str]) -> None:
    error = _refusal(changed(lambda weights: {f"module.{name}": value for name, value in weights.items()}), kind)
    assert isinstance(error, DataError)
    assert "weights are missing from its files (embeddings.LayerNorm.bias" in str(error)
    assert "module.embeddings.LayerNorm.bias" in str(error)


@pytest.mark.parametrize("kind", [None, "static"])
def test_a_missing_layer_is_not_made_up(kind: Kind | None, changed: Callable[..., str]) -> None:
    folder = changed(lambda weights: {name: value for name, value in weights.items() if ".layer.1." not in name})
    assert "(encoder.layer.1." in str(_refusal(folder, kind))


@pytest.mark.parametrize(
    "change",
    [
        lambda weights: {name: value for name, value in weights.items() if not name.startswith("pooler.")},
        lambda weights: {f"bert.{name}": value for name, value in weights.items()},
    ],
    ids=["without the pooler", "with the head's prefix"],
)
def test_names_that_masked_language_models_have_are_the_same_model(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]], changed: Callable[..., str], tiny: Callable[[str], Path]
) -> None:
    vectors = [
        encoder.encode(encoder.tokenizer.encode(TEXTS), 64)
        for encoder in (load_encoder(changed(change)), load_encoder(str(tiny("bert"))))
    ]
    assert np.array_equal(*vectors)


@pytest.mark.parametrize(
    ("architecture", "words"),
    [("bart", "encoder-decoders of type bart are not supported"), ("vit", "models of type vit are not supported")],
)
def test_architectures_that_are_no_encoders_of_texts(
    architecture: str, words: str, tiny: Callable[[str], Path]
) -> None:
    error = _refusal(tiny(architecture))
    assert isinstance(error, UsageError)
    assert words in str(error)


def test_folders_without_weights_that_may_be_loaded(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tiny("bert") / name).read_bytes())
    assert "no weights in the safetensors format" in str(_refusal(tmp_path))
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    error = _refusal(tmp_path)
    assert isinstance(error, UsageError)
    assert "weights only as pytorch_model.bin" in str(error)
    (tmp_path / "model.safetensors").write_bytes(b"not a tensor")
    assert "transformer cannot be loaded" in str(_refusal(tmp_path))


def test_an_adapter_alone(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    assert "an adapter alone" in str(_refusal(tmp_path))


def test_a_tokenizer_that_needs_a_package_is_named(
    tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(tiny("bert"), tmp_path / "japanese")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "BertJapaneseTokenizer", "word_tokenizer_type": "mecab"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "vocab.txt").write_text("[UNK]")
    (folder / "tokenizer.json").unlink()
    monkeypatch.setitem(sys.modules, "fugashi", None)
    error = _refusal(folder)
    assert isinstance(error, UsageError)
    assert "its tokenizer needs a package" in str(error)
    assert "fugashi" in str(error)


def test_model2vec_folders(tmp_path: Path) -> None:
    static = make_static(["fox", "dog", "cat"], tmp_path / "static", dimensions=4)
    expected = load_encoder(str(static))
    weights = load_file(static / "model.safetensors")["embedding.weight"]
    rows = torch.tensor([4, 3, 2, 1, 0])
    # Tokens share rows and have weights of their own.
    stored = {"embeddings": weights[rows] / 2, "mapping": rows, "weights": torch.full((5,), 2.0)}
    save_file({name: value.contiguous() for name, value in stored.items()}, static / "model.safetensors")
    tokens = expected.tokenizer.encode(["fox dog", "cat"])
    assert np.allclose(load_encoder(str(static)).encode(tokens, 64), expected.encode(tokens, 64), atol=1e-6)
    assert np.allclose(
        SentenceTransformer(str(static), device="cpu").encode(["fox dog", "cat"], normalize_embeddings=True),
        expected.encode(tokens, 64),
        atol=1e-6,
    )
    (static / "modules.json").unlink()
    (static / "config.json").write_text(json.dumps({"model_type": "model2vec"}))
    assert "a model2vec folder without modules.json" in str(_refusal(static))


def test_dimensions_that_the_folder_keeps(tiny: Callable[[str], Path], minilm: str, tmp_path: Path) -> None:
    modules = [st.Transformer(str(tiny("bert"))), st.Pooling(32), st.Normalize()]
    SentenceTransformer(modules=modules, truncate_dim=8, device="cpu").save(str(tmp_path / "peer"))
    encoder = load_encoder(str(tmp_path / "peer"))
    vectors = encoder.encode(encoder.tokenizer.encode(TEXTS), 64)
    assert vectors.shape == (3, encoder.dimensions) == (3, 8)
    expected = SentenceTransformer(str(tmp_path / "peer"), device="cpu").encode(TEXTS, normalize_embeddings=True)
    assert (vectors * expected).sum(axis=1).min() > 0.99999
    save_model(encoder, tmp_path / "ours")
    again = load_encoder(str(tmp_path / "ours"))
    assert np.array_equal(again.encode(again.tokenizer.encode(TEXTS), 64), vectors)
    assert SentenceTransformer(str(tmp_path / "ours"), device="cpu").encode(TEXTS).shape == (3, 8)


def test_lower_case_survives_saving(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """transformers drops the normalizer of a saved BERT tokenizer, here one that keeps case."""
    folder = shutil.copytree(tiny("bert"), tmp_path / "cased")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["normalizer"]["lowercase"] = False
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "BertTokenizer", "do_lower_case": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"do_lower_case": True}))
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    encoder = load_encoder(str(folder))
    upper, lower = (encoder.encode(encoder.tokenizer.encode([text]), 64) for text in ("THE Fox", "the fox"))
    assert np.array_equal(upper, lower)
    save_model(encoder, tmp_path / "saved")
    again = load_encoder(str(tmp_path / "saved"))
    assert np.allclose(again.encode(again.tokenizer.encode(["THE Fox"]), 64), upper, atol=1e-6)
    expected = SentenceTransformer(str(tmp_path / "saved"), device="cpu").encode(["THE Fox"])
    assert (expected * upper).sum() > 0.99999
