"""Sizes of models for the scale model, read from their files."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn
from transformers import AlbertConfig, AlbertModel, AutoModel

from clusterbatch.config import load_config
from clusterbatch.experiments.capacity.sizes import Shape
from clusterbatch.experiments.capacity.workload import shape_of
from tests.encoder.models import make_model


def test_a_model_is_measured_by_its_own_files() -> None:
    config = load_config(None, ["workspace=w"])
    known = shape_of("all-MiniLM-L6-v2", config)
    assert known == Shape()
    assert known.weights == pytest.approx(10.6e6, rel=0.02)


@pytest.mark.parametrize("architecture", ["bert", "distilbert", "modernbert", "t5", "xlnet", "qwen3", "gemma3"])
def test_sizes_are_read_whatever_an_architecture_calls_them(architecture: str, tmp_path: Path) -> None:
    folder = str(make_model(architecture, tmp_path))
    made = AutoModel.from_pretrained(folder)
    encoder = made.get_encoder() if made.config.is_encoder_decoder else made
    layers = [module for module in encoder.modules() if isinstance(module, nn.Linear)]
    # XLNet's attention is made of bare parameters.
    bare = [each for name, each in encoder.named_parameters() if "rel_attn" in name and each.ndim == 3]
    wanted = sum(each.numel() for each in [*(layer.weight for layer in layers), *bare])
    if getattr(encoder, "pooler", None) is not None:
        wanted -= encoder.pooler.dense.weight.numel()
    found = shape_of(folder, load_config(None, ["workspace=w"]))
    assert (found.hidden, found.vocabulary) == (32, made.get_input_embeddings().num_embeddings)
    # T5's few relative positions and XLNet's biases of attention count, too.
    assert found.weights == pytest.approx(wanted, rel=0.02)


def test_layers_that_share_weights_count_each_time(tmp_path: Path) -> None:
    sizes = {"embedding_size": 16, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
    AlbertModel(AlbertConfig(vocab_size=50, num_hidden_layers=6, **sizes)).save_pretrained(tmp_path)
    assert shape_of(str(tmp_path), load_config(None, ["workspace=w"])).weights == 6 * (4 * 32**2 + 2 * 32 * 64)


def test_a_model_whose_sizes_cannot_be_read_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = load_config(None, ["workspace=w"])
    for name in ("/nowhere/at/all", str(make_model("vit", tmp_path))):
        assert shape_of(name, config) == Shape()
        assert shape_of(name, config) == Shape()
        assert caplog.text.count(f"{name}: its sizes cannot be read") == 1
