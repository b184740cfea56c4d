from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from clusterbatch.encoder import packed
from clusterbatch.encoder.load import drop_padding, load_encoder
from clusterbatch.encoder.model import pool
from clusterbatch.encoder.model_files import POOLING_MODES

_CAN = ["bert", "roberta", "xlm-roberta", "distilbert"]
# With windows or causal attention: by the GPU's kernel alone.
_KERNEL_ALONE = ["modernbert", "qwen2", "qwen3", "gemma3"]
_CANNOT = ["mpnet"]


def _text_by_text(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    offsets: torch.Tensor,
    longest: int,
    scale: Any,
    window: tuple[int, int],
) -> torch.Tensor:
    """What the GPU's kernel computes, in a loop."""
    pieces = []
    before, after = (longest if tokens == -1 else tokens for tokens in window)
    for start, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        assert end - start <= longest
        heads = [tensor[start:end].transpose(0, 1)[None] for tensor in (query, key, value)]
        distance = torch.arange(end - start) - torch.arange(end - start)[:, None]
        seen = (distance >= -before) & (distance <= after)
        attended = scaled_dot_product_attention(*heads, attn_mask=seen, scale=scale, enable_gqa=True)
        pieces.append(attended[0].transpose(0, 1))
    return torch.cat(pieces)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "_has_kernel", lambda weight: True)
    monkeypatch.setattr(packed, "within_texts", _text_by_text)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("architecture", _CAN + _KERNEL_ALONE + _CANNOT)
def test_packed_or_not_the_vectors_are_the_same(
    architecture: str, tiny: Callable[[str], Path], awkward_texts: list[str]
) -> None:
    padded, other = load_encoder(str(tiny(architecture))), load_encoder(str(tiny(architecture)), packed=True)
    assert other.unpadded == (architecture in _CAN + _KERNEL_ALONE)
    tokens = padded.tokenizer.encode(awkward_texts, padded.max_tokens)
    assert np.abs(padded.encode(tokens, 512) - other.encode(tokens, 512)).max() < 1e-5


@pytest.mark.parametrize("architecture", _CAN + _KERNEL_ALONE + _CANNOT)
def test_padding_is_dropped_after_the_weights_have_changed(
    architecture: str, tiny: Callable[[str], Path], awkward_texts: list[str]
) -> None:
    encoder = load_encoder(str(tiny(architecture)))
    tokens = encoder.tokenizer.encode(awkward_texts, encoder.max_tokens)
    before = encoder.encode(tokens, 512)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.05 * torch.sin(torch.arange(parameter.numel(), dtype=torch.float32)).view_as(parameter))
    changed = encoder.encode(tokens, 512)
    assert np.abs(changed - before).max() > 0.01
    drop_padding(encoder, torch.float32)
    assert encoder.unpadded == (architecture in _CAN)
    assert np.abs(encoder.encode(tokens, 512) - changed).max() < 1e-5


@pytest.mark.usefixtures("kernel")
def test_texts_without_any_token(tiny: Callable[[str], Path]) -> None:
    from clusterbatch.encoder.tokens import Tokens

    padded, other = load_encoder(str(tiny("bert"))), load_encoder(str(tiny("bert")), packed=True)
    tokens = Tokens.from_lists([[], [7, 8], [], [9]])
    assert np.abs(padded.encode(tokens, 64) - other.encode(tokens, 64)).max() < 1e-5


@pytest.mark.parametrize("mode", POOLING_MODES)
def test_pooling_of_packed_states(mode: str) -> None:
    states = torch.randn(3, 5, 4)
    lengths = torch.tensor([2, 5, 1])
    flat = torch.cat([states[row, : lengths[row]] for row in range(3)])
    offsets = np.array([0, 2, 7, 8])
    assert torch.allclose(packed.pool_packed(flat, offsets, mode), pool(states, lengths, mode), atol=1e-6)


@pytest.mark.parametrize("mode", ["cls", "lasttoken", "mean", "mean_sqrt_len_tokens"])
def test_pooling_keeps_no_states_for_the_backward_pass(mode: str) -> None:
    kept: list[int] = []
    states_TD = torch.randn(500, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda saved: kept.append(saved.numel()) or saved, lambda saved: saved
    ):
        packed.pool_packed(states_TD, np.array([0, 200, 500]), mode)
    assert sum(kept) < 500


def test_a_kernel_that_fails_or_errs_is_not_used(tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*arguments: Any) -> torch.Tensor:
        raise RuntimeError("head dimension not supported")

    monkeypatch.setattr(packed, "_has_kernel", lambda weight: True)
    for broken in (failing, lambda query, *rest: 100 * torch.randn_like(query)):
        monkeypatch.setattr(packed, "within_texts", broken)
        encoder = load_encoder(str(tiny("bert")), packed=True)
        assert not encoder.unpadded
        assert np.isfinite(encoder.encode(encoder.tokenizer.encode(["the fox", "the"]), 64)).all()
