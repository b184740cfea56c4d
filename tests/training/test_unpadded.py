"""Training without padding: gradients of every parameter against float64 autograd of padded texts, and its refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from clusterbatch.encoder.load import load_encoder
from clusterbatch.encoder.model import Encoder
from clusterbatch.encoder.model_files import POOLING_MODES
from clusterbatch.encoder.tokens import Tokens
from clusterbatch.training import bert_layers, unpadded
from clusterbatch.training.bert_attention import draw_dropout
from clusterbatch.training.bert_layers import BertLayers
from clusterbatch.training.collectives import World
from clusterbatch.training.prepare_model import autocast, finish, prepare
from tests.training.parity import (
    KEPT_BYTES,
    largest_parameter_error,
    transformer_config,
    transformer_parity,
    transformer_reference,
    transformer_step,
    transformer_texts,
)

_BUILT_LIKE_BERT = ["bert", "roberta", "xlm-roberta", "distilbert"]
_BY_THEIR_OWN_MODULES = ["modernbert", "qwen2"]
# float32 has 7 digits; two layers and their backward passes leave five.
_TOLERANCE = 2e-5

Tiny = Callable[[str], Path]


def _prepared(folder: Path | str, **changes: Any) -> Encoder:
    encoder = load_encoder(str(folder), "backbone")
    prepare(encoder, transformer_config(**changes))
    return encoder


def _tokens(encoder: Encoder) -> Tokens:
    queries, documents = transformer_texts(len(encoder.backbone.get_input_embeddings().weight))
    return Tokens.from_lists([*queries, *documents])


def _gradients(encoder: Encoder, tokens: Tokens, **changes: Any) -> list[Tensor]:
    """Gradients of one weighted sum of the vectors, micro-batch of all rows, longest first."""
    rows = np.argsort(-tokens.lengths, kind="stable")
    parameters = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
    with autocast(transformer_config(**changes), encoder)():
        vectors = encoder(tokens.take(rows))
    weight = torch.randn(vectors.shape, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad((vectors * weight).sum(), parameters, allow_unused=True)
    return [gradient.to_dense() for gradient in found if gradient is not None]


def _errors(found: list[Tensor], wanted: list[Tensor]) -> float:
    least = 0.01 * max(float(gradient.norm()) for gradient in wanted)
    return max(
        float((one - other).norm()) / max(float(other.norm()), least) for one, other in zip(found, wanted, strict=True)
    )


@pytest.mark.parametrize(
    ("architecture", "dropout", "drops"), [("t5", 0.0, False), ("qwen2", 0.0, False), ("qwen2", 0.5, True)]
)
def test_dropout_is_set_where_a_module_keeps_it_as_a_number(
    architecture: str, dropout: float, drops: bool, tiny: Tiny
) -> None:
    encoder = _prepared(tiny(architecture), dropout=dropout)
    tokens = _tokens(encoder)
    with torch.no_grad():
        assert torch.equal(encoder(tokens), encoder(tokens)) is not drops


@pytest.mark.parametrize("kept", KEPT_BYTES)
@pytest.mark.parametrize("architecture", _BUILT_LIKE_BERT + _BY_THEIR_OWN_MODULES)
def test_gradients_of_every_parameter_equal_float64_autograd(architecture: str, kept: str, tiny: Tiny) -> None:
    folder = str(tiny(architecture))
    # The tokenizers of the others always add tokens; padding alone has a position of its own there, or no direction.
    vocabulary = len(load_encoder(folder).backbone.get_input_embeddings().weight)
    texts = transformer_texts(vocabulary, with_empty=architecture in ("bert", "distilbert", "modernbert"))
    config = transformer_config(activation_bytes=KEPT_BYTES[kept])
    found = transformer_step(World(), folder, config, texts)
    assert largest_parameter_error(found, transformer_reference(folder, texts)) < _TOLERANCE


def test_gradients_over_ranks_equal_float64_autograd(tiny: Tiny) -> None:
    errors = transformer_parity(str(tiny("bert")), sizes=(2, 4))
    assert len(errors) == 2 * len(KEPT_BYTES)
    assert max(errors.values()) < _TOLERANCE


@pytest.mark.parametrize("mode", POOLING_MODES)
@pytest.mark.parametrize("architecture", ["bert", "modernbert"])
def test_gradients_through_every_pooling_equal_those_with_padding(architecture: str, mode: str, tiny: Tiny) -> None:
    padded, packed = load_encoder(str(tiny(architecture)), "backbone"), _prepared(tiny(architecture))
    padded.pooling = packed.pooling = mode
    tokens = _tokens(padded)
    assert packed.unpadded
    assert _errors(_gradients(packed, tokens), _gradients(padded, tokens)) < _TOLERANCE


@pytest.mark.parametrize("architecture", ["bert", "distilbert", "modernbert"])
def test_bfloat16_comes_as_near_as_its_digits_allow(architecture: str, tiny: Tiny) -> None:
    padded, packed = (
        load_encoder(str(tiny(architecture)), "backbone"),
        _prepared(tiny(architecture), precision="bfloat16"),
    )
    assert packed.unpadded
    tokens = _tokens(padded)
    wanted = torch.cat([gradient.flatten() for gradient in _gradients(padded, tokens)])
    found = torch.cat([gradient.flatten() for gradient in _gradients(packed, tokens, precision="bfloat16")])
    assert found.dtype == torch.float32
    assert float((found - wanted).norm() / wanted.norm()) < 0.03


@pytest.mark.parametrize("architecture", ["bert", "roberta", "distilbert"])
def test_gradients_with_dropout_are_those_of_the_loss(architecture: str, tiny: Tiny) -> None:
    """The same draws for nearby weights: the slope along the gradient is its squared norm."""
    encoder = _prepared(tiny(architecture), dropout=0.3)
    assert isinstance(encoder.packed, BertLayers)
    tokens = _tokens(encoder)
    weight = torch.randn(len(tokens), encoder.dimensions, generator=torch.Generator().manual_seed(1))
    parameters = [parameter for parameter in encoder.parameters() if parameter.requires_grad]

    def loss() -> Tensor:
        torch.manual_seed(3)
        return (encoder(tokens).double() * weight).sum()

    gradients = [gradient.to_dense() for gradient in torch.autograd.grad(loss(), parameters)]
    squared = sum(float(gradient.double().square().sum()) for gradient in gradients)
    values = []
    step = 2e-3 / squared**0.5
    with torch.no_grad():
        for sign in (1, -2):
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.add_(gradient, alpha=sign * step)
            values.append(float(loss()))
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(squared, rel=0.01)


def test_what_is_dropped_follows_the_share_and_the_seed() -> None:
    def draw(seed: int) -> tuple[Tensor, float]:
        return draw_dropout((1001, 999), 0.1, torch.Generator().manual_seed(seed))

    dropped, factor = draw(1)
    assert float(dropped.double().mean()) == pytest.approx(0.1, abs=0.002)
    assert factor == pytest.approx(1 / 0.9, rel=1e-4)
    assert torch.equal(dropped, draw(1)[0])
    # Independent of another seed, and of its own neighbours.
    for other in (draw(2)[0], dropped.roll(1, 1), dropped.roll(1, 0)):
        assert float((dropped & other).double().mean()) == pytest.approx(0.01, abs=0.002)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_keeping_less_changes_no_bit(dropout: float, precision: str, tiny: Tiny) -> None:
    encoder = _prepared(tiny("bert"), dropout=dropout, precision=precision)
    layers, tokens = encoder.packed, _tokens(encoder)
    assert isinstance(layers, BertLayers)
    found = []
    for layers.keep in ("all", "sums"):
        torch.manual_seed(9)
        found.append(_gradients(encoder, tokens, precision=precision))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_weights_are_read_anew_outside_of_the_block_that_fixes_them(precision: str, tiny: Tiny) -> None:
    encoder = _prepared(tiny("bert"), dropout=0.0, precision=precision)
    layers, tokens = encoder.packed, _tokens(encoder)
    assert isinstance(layers, BertLayers)
    before = _gradients(encoder, tokens, precision=precision)
    with layers.fixed_weights():
        fixed = _gradients(encoder, tokens, precision=precision)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            parameter.add_(torch.full_like(parameter, 0.01 * (len(name) % 3)))
    encoder.packed = None
    padded = _gradients(encoder, tokens, precision=precision)
    encoder.packed = layers
    after = _gradients(encoder, tokens, precision=precision)
    with layers.fixed_weights():
        fixed_after = _gradients(encoder, tokens, precision=precision)
    assert all(torch.equal(one, other) for one, other in zip(before, fixed, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(after, fixed_after, strict=True))
    tolerance = _TOLERANCE if precision == "float32" else 0.08
    assert _errors(after, padded) < tolerance < _errors(before, padded)


def test_keeping_less_takes_a_fraction_of_the_memory(tiny: Tiny) -> None:
    from clusterbatch.training.grad_cache import _counting_saved

    encoder = _prepared(tiny("bert"))
    layers, tokens = encoder.packed, _tokens(encoder)
    assert isinstance(layers, BertLayers)
    taken = {}
    for layers.keep in ("all", "sums", "nothing"):
        with _counting_saved() as saved:
            layers(tokens.values, np.unique(tokens.offsets))
        taken[layers.keep] = saved.bytes / (4 * len(tokens.values) * encoder.dimensions)
    # Two layers, each 8 widths of products and 1 of sums here (its inner width is twice the outer), and the input. The
    # embeddings keep their ids alone, an eighth, where less is kept.
    assert taken["sums"] == pytest.approx(2 + 1 + 1 / 8, abs=0.01)
    assert taken["all"] - taken["nothing"] == pytest.approx(2 * 8 + 1, rel=0.05)


@pytest.mark.parametrize("architecture", ["bert", "modernbert"])
def test_gradient_checkpointing_gives_the_same_gradients(architecture: str, tiny: Tiny) -> None:
    usual, checkpointed = (
        _prepared(tiny(architecture), gradient_checkpointing=checkpointing) for checkpointing in (False, True)
    )
    tokens = _tokens(usual)
    assert checkpointed.unpadded
    if isinstance(checkpointed.packed, BertLayers):
        assert checkpointed.packed.keep == "sums"
    assert _errors(_gradients(checkpointed, tokens), _gradients(usual, tokens)) < 1e-6


def test_adapters_get_their_gradients(tiny: Tiny) -> None:
    pytest.importorskip("peft")
    encoder = _prepared(tiny("bert"), lora={"rank": 4})
    assert encoder.unpadded
    assert not isinstance(encoder.packed, BertLayers)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    tokens = _tokens(encoder)
    found = _gradients(encoder, tokens)
    encoder.packed = None
    encoder.backbone.set_attn_implementation("sdpa")
    assert _errors(found, _gradients(encoder, tokens)) < _TOLERANCE


@pytest.mark.parametrize("architecture", ["bert", "modernbert"])
def test_validation_and_the_written_model_are_those_of_the_usual_path(
    architecture: str, tiny: Tiny, awkward_texts: list[str]
) -> None:
    usual, trained = load_encoder(str(tiny(architecture)), "backbone"), _prepared(tiny(architecture))
    tokens = usual.tokenizer.encode(awkward_texts, usual.max_tokens)
    assert np.abs(usual.encode(tokens, 512) - trained.encode(tokens, 512)).max() < 1e-5
    finish(trained)
    assert not trained.unpadded
    assert trained.backbone.config._attn_implementation == usual.backbone.config._attn_implementation
    assert np.array_equal(usual.encode(tokens, 512), trained.encode(tokens, 512))


@pytest.mark.parametrize("architecture", ["mpnet", "t5", "xlnet"])
def test_what_cannot_be_packed_is_trained_with_padding(architecture: str, tiny: Tiny) -> None:
    """Biases by distance, and attention that is not handed on."""
    usual, trained = load_encoder(str(tiny(architecture)), "backbone"), _prepared(tiny(architecture))
    assert not trained.unpadded
    tokens = _tokens(usual)
    # T5's attention drops by a function of its own.
    trained.eval()
    assert _errors(_gradients(trained, tokens), _gradients(usual, tokens)) < 1e-6


def test_wrong_gradients_of_right_states_are_noticed(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    right = bert_layers.attend_backward

    def wrong(*arguments: Any) -> Tensor:
        found = right(*arguments)
        # Only the values' part.
        found[:, -found.shape[1] // 3 :] *= 0.99
        return found

    monkeypatch.setattr(bert_layers, "attend_backward", wrong)
    encoder = _prepared(tiny("bert"))
    assert encoder.unpadded
    assert not isinstance(encoder.packed, BertLayers)
    monkeypatch.setattr(unpadded, "_in_runs", lambda query, *rest, **options: query * 1.0)
    encoder = _prepared(tiny("bert"))
    assert not encoder.unpadded
    assert encoder.backbone.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("architecture", ["bert", "modernbert", "qwen2"])
def test_the_kernel_of_gpus_is_given_what_it_needs(
    architecture: str, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its place is taken by a loop over texts with the windows that it was given."""

    def text_by_text(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        offsets: Tensor,
        offsets_of_keys: Tensor,
        longest: int,
        longest_of_keys: int,
        *,
        scale: float,
        window_size: tuple[int, int],
        enable_gqa: bool,
    ) -> Tensor:
        assert offsets.dtype == torch.int32
        assert torch.equal(offsets, offsets_of_keys)
        assert longest == longest_of_keys == int(offsets.diff().max())
        pieces = []
        before, after = (10**6 if reach < 0 else reach for reach in window_size)
        for start, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
            place = torch.arange(end - start)
            mask = (place[None] - place[:, None] <= after) & (place[:, None] - place[None] <= before)
            heads = [tensor[start:end].transpose(0, 1)[None] for tensor in (query, key, value)]
            found = scaled_dot_product_attention(*heads, attn_mask=mask, scale=scale, enable_gqa=enable_gqa)
            pieces.append(found[0].transpose(0, 1))
        return torch.cat(pieces)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", text_by_text)
    monkeypatch.setattr(unpadded, "_in_runs", unpadded._by_kernel)
    monkeypatch.setattr(unpadded, "BertLayers", _refused)
    padded, packed = load_encoder(str(tiny(architecture)), "backbone"), _prepared(tiny(architecture))
    assert packed.unpadded
    tokens = _tokens(padded)
    assert _errors(_gradients(packed, tokens), _gradients(padded, tokens)) < _TOLERANCE


def _refused(*arguments: Any) -> None:
    raise ValueError("not built like BERT")
