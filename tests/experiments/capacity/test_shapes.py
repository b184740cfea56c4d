"""Sizes of models for the scale model, read from their files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from torch import nn
from transformers import AlbertConfig, AlbertModel, AutoModel, MixtralConfig, Qwen3MoeConfig

from clusterbatch.config import load_config
from clusterbatch.experiments.capacity.scale_model import CapacityModel
from clusterbatch.experiments.capacity.sizes import Shape, Workload
from clusterbatch.experiments.capacity.workload import shape_of
from tests.encoder.models import make_model
from tests.integration.test_examples import example


def test_a_model_is_measured_by_its_own_files() -> None:
    config = load_config(None, ["workspace=w"])
    known = shape_of("all-MiniLM-L6-v2", config)
    assert known == replace(Shape(), held=known.weights)
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
    found = shape_of(str(tmp_path), load_config(None, ["workspace=w"]))
    assert found.weights == 6 * (4 * 32**2 + 2 * 32 * 64)
    # In memory they are once.
    assert found.held == found.weights // 6


def test_of_experts_those_that_a_token_chooses_are_passed_and_all_are_held(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"num_key_value_heads": 4, "head_dim": 8, "vocab_size": 60}
    made = {
        "qwen": Qwen3MoeConfig(moe_intermediate_size=16, num_experts=8, num_experts_per_tok=2, **sizes, **more),
        "mixtral": MixtralConfig(
            num_local_experts=8, num_experts_per_tok=2, **{**sizes, "intermediate_size": 16}, **more
        ),
    }
    for name, config in made.items():
        AutoModel.from_config(config).save_pretrained(tmp_path / name)
        found = shape_of(str(tmp_path / name), load_config(None, ["workspace=w"]))
        shared, expert = 4 * 32**2 + 8 * 32, 3 * 32 * 16
        assert (found.weights, found.held) == (2 * (shared + 2 * expert), 2 * (shared + 8 * expert)), name


def test_an_image_passes_the_tower_for_images_and_a_text_that_for_texts(tmp_path: Path) -> None:
    example("images").write_clip(tmp_path, ["a red circle", "a blue bar"], seed=0)
    model = AutoModel.from_pretrained(tmp_path)

    def layers(module: nn.Module) -> int:
        return sum(each.weight.numel() for each in module.encoder.modules() if isinstance(each, nn.Linear))

    text, vision = layers(model.text_model), layers(model.vision_model)
    config = load_config(None, ["workspace=w", "corpus.columns.images=[document]", "train.encoder=backbone"])
    shape = shape_of(str(tmp_path), config)
    patches = (model.config.vision_config.image_size // model.config.vision_config.patch_size) ** 2 + 1
    assert (shape.weights, shape.vision, shape.held, shape.patches) == (text, vision, text + vision, patches)
    # Encoded images have far more characters than a text may have tokens.
    workload = Workload(1000, 1, 10**7, query_characters=40, document_characters=40_000)
    plan = CapacityModel(config, workload, shape, shape)
    of_a_pair = 12 * text + patches * vision
    assert plan.work("embed") == 2 * of_a_pair * 1000
    assert plan.work("train") == 6 * of_a_pair * plan.steps * config.batches.size
    assert 30_000 < plan.training_bytes / 1000 < 31_000
    assert plan._parameters == text + vision + shape.table


def test_a_model_whose_sizes_cannot_be_read_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = load_config(None, ["workspace=w"])
    for name in ("/nowhere/at/all", str(make_model("vit", tmp_path))):
        assert shape_of(name, config) == Shape()
        assert shape_of(name, config) == Shape()
        assert caplog.text.count(f"{name}: its sizes cannot be read") == 1
