"""Training without padding: the way to run a backbone on texts end to end that gives the states and gradients of today.

On CPUs layers built like BERT run as bert_layers computes them. Other architectures run their own modules on one long
row, with attention within each text: torch's variable-length kernel on GPUs, and on CPUs one call for all neighbours of
one length, of which sorted micro-batches have many.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from clusterbatch.encoder.model import Encoder
from clusterbatch.encoder.model_files import read_layout
from clusterbatch.encoder.packed import PackedStates, packed_states, reach, register, within_texts
from clusterbatch.training.bert_attention import runs
from clusterbatch.training.bert_layers import BertLayers

# The attention under which transformers runs a backbone on packed texts in training.
IN_TRAINING = "clusterbatch_packed_training"

# Largest difference of states, and of the gradient of each parameter, from the padded path, as a share of their norms.
# bfloat16 has 8 bits: two ways to add up differ by some per cent in a gradient.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.08}
# A gradient below this share of the largest one may be nothing but rounding, as that of a key's bias is.
_SMALL = 1e-2


def unpadded(encoder: Encoder, autocast: Callable[[], AbstractContextManager[Any]]) -> PackedStates | None:
    """Return how to run the encoder's backbone without padding in training, or None if it has to be padded.

    autocast: makes the context of a forward pass. Models do not declare whether positions, masks or biases follow from
    the padded row, so each way is tried on some short texts, without dropout: states and the gradients of all
    parameters must be those of texts run one at a time. If none is right, the backbone is left unchanged.
    """
    if encoder.kind != "backbone":
        return None
    backbone: Any = encoder.backbone
    usual = backbone.config._attn_implementation
    on_cpu = encoder.device.type == "cpu"
    with autocast():
        dtype = (
            torch.get_autocast_dtype(encoder.device.type) if torch.is_autocast_enabled(encoder.device.type) else None
        )
    if not usual.startswith("sdpa") or not (on_cpu or (encoder.device.type == "cuda" and dtype == torch.bfloat16)):
        return None
    layout, tolerance = read_layout(encoder.tokenizer.folder), _TOLERANCE[dtype or torch.float32]
    window = getattr(backbone.config, "sliding_window", None) or 0
    # One text is longer than the windows of local attention.
    lengths = [17 + 2 * window, 5, 1, 8, 8]
    # The upper half of a vocabulary has no special tokens, to which models give positions of their own.
    vocabulary = min(encoder.tokenizer.vocabulary, len(backbone.get_input_embeddings().weight))
    ids = np.random.default_rng(0).integers(vocabulary // 2, vocabulary, sum(lengths))
    offsets = np.concatenate([[0], np.cumsum(lengths)])

    def alone(ids: np.ndarray, offsets: np.ndarray) -> Tensor:
        texts = (torch.from_numpy(ids[start:end])[None].to(encoder.device) for start, end in pairwise(offsets))
        return torch.cat([backbone(input_ids=text).last_hidden_state[0] for text in texts])

    training = backbone.training
    backbone.eval()
    try:
        with autocast():
            expected = _states_and_gradients(backbone, alone, ids, offsets)
        for way in _ways(backbone, layout.first_position, on_cpu):
            try:
                with autocast():
                    found = _states_and_gradients(backbone, way, ids, offsets)
                    if all(_agree(one, other, tolerance) for one, other in zip(found, expected, strict=True)):
                        # Dropout, which a kernel may refuse, has no other way to be compared with.
                        backbone.train()
                        _states_and_gradients(backbone, way, ids, offsets)
                        return way
            except (AttributeError, TypeError, KeyError, ValueError, RuntimeError, IndexError):
                # Not made for it: it takes no positions, hands nothing on to attention, or a kernel refuses its shapes.
                pass
            backbone.eval().set_attn_implementation(usual)
    finally:
        backbone.train(training)
    return None


def _ways(backbone: Any, first_position: int, on_cpu: bool) -> Iterator[PackedStates]:
    if on_cpu:
        with suppress(AttributeError, ValueError):
            yield BertLayers(backbone, first_position)
    # The others may put windows and causality into the mask alone, which is not made here.
    if getattr(backbone, "_supports_flash_attn", False):
        register(IN_TRAINING, _attend)
        backbone.set_attn_implementation(IN_TRAINING)
        yield partial(packed_states, backbone, first_position=first_position)


def _states_and_gradients(
    backbone: nn.Module, states: PackedStates, ids: np.ndarray, offsets: np.ndarray
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the states, and the gradients of all trained parameters of one and the same weighted sum of them."""
    parameters = [parameter for parameter in backbone.parameters() if parameter.requires_grad]
    with torch.enable_grad():
        found = states(ids, offsets).float()
        weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(0)).to(found.device)
        gradients = torch.autograd.grad((found * weight).sum(), parameters, allow_unused=True)
    pairs = zip(gradients, parameters, strict=True)
    dense = [torch.zeros_like(parameter) if gradient is None else gradient.to_dense() for gradient, parameter in pairs]
    return [found.detach()], dense


def _agree(found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> bool:
    norms = torch.stack([tensor.norm() for tensor in expected])
    differences = torch.stack([(one - other).norm() for one, other in zip(found, expected, strict=True)])
    return bool((differences <= tolerance * norms.clamp(min=_SMALL * float(norms.max()))).all())


def _attend(
    module: nn.Module,
    query_1HTD: Tensor,
    key_1GTD: Tensor,
    value_1GTD: Tensor,
    attention_mask: None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention in the calling convention of transformers; G of H heads have keys; returns (1, T, H, d)."""
    attend = _in_runs if query_1HTD.device.type == "cpu" else _by_kernel
    attended_THD = attend(
        *(heads[0].transpose(0, 1) for heads in (query_1HTD, key_1GTD, value_1GTD)),
        offsets=options["cu_seq_lens_q"],
        longest=int(options["max_length_q"]),
        scale=scaling,
        dropout=dropout,
        window=reach(module, options),
    )
    return attended_THD[None], None


def _in_runs(
    query_THD: Tensor,
    key_TGD: Tensor,
    value_TGD: Tensor,
    *,
    offsets: Tensor,
    longest: int,
    scale: float | None,
    dropout: float,
    window: tuple[int, int],
) -> Tensor:
    """Attention of each text to itself, one call for all neighbours of one length; window: tokens before and after.

    In float32: the backward pass of torch's bfloat16 attention takes four times as long on CPUs.
    """
    sizes = runs(np.diff(offsets.numpy()))
    # One split instead of many slices: each slice's backward pass would write a gradient of all rows.
    rows = [count * length for count, length in sizes]
    parts = [tensor.float().split(rows) for tensor in (query_THD, key_TGD, value_TGD)]
    attended = []
    with torch.autocast("cpu", enabled=False):
        for number, (_, length) in enumerate(sizes):
            query, key, value = (part[number].unflatten(0, (-1, length)).transpose(1, 2) for part in parts)
            found_NHLD = scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=_within(window, length),
                dropout_p=dropout,
                scale=scale,
                enable_gqa=key_TGD.shape[1] < query_THD.shape[1],
            )
            attended.append(found_NHLD.transpose(1, 2).flatten(0, 1))
    return torch.cat(attended).to(query_THD.dtype)


def _within(window: tuple[int, int], length: int) -> Tensor | None:
    """Return (L, L) which tokens attend to which, None if all do; -1 before or after a token is without limit."""
    before, after = (length if tokens < 0 else tokens for tokens in window)
    if min(before, after) >= length - 1:
        return None
    distance = torch.arange(length)[None] - torch.arange(length)[:, None]
    return (distance >= -before) & (distance <= after)


def _by_kernel(
    query_THD: Tensor,
    key_TGD: Tensor,
    value_TGD: Tensor,
    *,
    offsets: Tensor,
    longest: int,
    scale: float | None,
    dropout: float,
    window: tuple[int, int],
) -> Tensor:
    """The same by torch's variable-length kernel on a GPU."""
    if dropout:
        # varlen_attn has none; the operator below it, that of nested tensors too, has.
        if window != (-1, -1) or key_TGD.shape[1] < query_THD.shape[1]:
            raise ValueError("dropout of attention with windows or shared keys")
        attended, *_ = torch.ops.aten._flash_attention_forward(
            query_THD, key_TGD, value_TGD, offsets, offsets, longest, longest, dropout, False, False, scale=scale
        )
        return attended
    return within_texts(query_THD, key_TGD, value_TGD, offsets, longest, scale, window)
