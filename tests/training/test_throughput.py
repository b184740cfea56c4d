"""What a step costs: arithmetic of trained and of frozen weights, and the peak of the accelerator by its name."""

from __future__ import annotations

from pathlib import Path

import pytest

from clusterbatch.encoder.load import load_encoder
from clusterbatch.training.metrics import data_sheet_flops, training_flops_per_token
from clusterbatch.training.prepare_model import prepare
from tests.training.small_run import small_config


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40", 181e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_an_accelerator_is_known_by_its_whole_name(name: str, peak: float | None) -> None:
    assert data_sheet_flops(name) == peak


def test_frozen_weights_cost_no_gradient_of_their_own(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    config = small_config(tmp_path, train={"lora": {"rank": 4}}).train
    encoder = load_encoder(config.model, "backbone")
    table = encoder.backbone.get_input_embeddings().weight
    frozen = sum(weight.numel() for weight in encoder.parameters() if weight.ndim > 1) - table.numel()
    prepare(encoder, config)
    adapters = sum(weight.numel() for weight in encoder.parameters() if weight.requires_grad)
    assert 0 < adapters < frozen
    assert training_flops_per_token(encoder) == 4 * frozen + 6 * adapters
