"""The texts of a micro-batch end to end, without any padding: by variable-length attention on GPUs, fused on CPUs."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clusterbatch.encoder.fused import FusedBackbone

# (T,) token ids and (N + 1,) offsets of the texts in them -> (T, d) states, each text attending to itself alone.
PackedStates = Callable[[np.ndarray, np.ndarray], Tensor]

_NAME = "clusterbatch_packed"
# Agreement with padded attention that a backbone must show before it is trusted with packed texts: all but rounding.
# Weights that were hardly trained attend to everything alike, so in float32 a small difference is an error too.
_LEAST_COSINE = {torch.float32: 0.99999, torch.bfloat16: 0.999, torch.float16: 0.999}


def pack(backbone: nn.Module, vocabulary: int, first_position: int) -> PackedStates | None:
    """Return the function that runs `backbone` without padding on this device, or None.

    There is one if it gives the vectors of padded attention. The check is a short run both ways, as models do not
    declare it: an architecture may compute positions, or a bias by distance, from the padded row. One of its texts is
    longer than the windows of local attention. If there is none, the backbone is left unchanged.
    """
    usual = backbone.config._attn_implementation  # type: ignore[union-attr]
    weight = next(backbone.parameters())
    if usual != "sdpa" or not (_has_kernel(weight) or weight.device.type == "cpu"):
        return None
    window = getattr(backbone.config, "sliding_window", None) or 0  # type: ignore[union-attr]
    lengths = [17 + 2 * window, 5, 1, 8, 8]
    # The upper half of a vocabulary has no special tokens, to which models give positions of their own.
    ids = np.random.default_rng(0).integers(vocabulary // 2, vocabulary, sum(lengths))
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    with torch.inference_mode():
        expected = torch.cat([_alone(backbone, ids[start:end]) for start, end in pairwise(offsets)])
        try:
            states: PackedStates
            if _has_kernel(weight):
                if not getattr(backbone, "_supports_flash_attn", False):
                    raise ValueError("windows and causality may be in the mask alone")
                register(_NAME, _attend)
                backbone.set_attn_implementation(_NAME)  # type: ignore[operator]
                states = partial(packed_states, backbone, first_position=first_position)
            else:
                states = FusedBackbone(backbone, first_position)
            cosines = torch.cosine_similarity(states(ids, offsets).float(), expected.float(), dim=-1)
            if float(cosines.min()) > _LEAST_COSINE[weight.dtype]:
                return states
        except (AttributeError, TypeError, KeyError, ValueError, RuntimeError, IndexError):
            # Not made for it: it takes no positions, hands nothing on to attention, or the kernel refuses its shapes.
            pass
        backbone.set_attn_implementation(usual)  # type: ignore[operator]
        return None


def packed_states(backbone: nn.Module, ids: np.ndarray, offsets: np.ndarray, first_position: int) -> Tensor:
    """PackedStates of a backbone that was switched to variable-length attention."""
    device = next(backbone.parameters()).device
    lengths = np.diff(offsets)
    positions = np.arange(len(ids)) - np.repeat(offsets[:-1], lengths) + first_position
    longest = int(lengths.max())
    cumulative = torch.from_numpy(offsets.astype(np.int32)).to(device)
    output = backbone(
        input_ids=torch.from_numpy(ids.astype(np.int64))[None].to(device),
        position_ids=torch.from_numpy(positions.astype(np.int64))[None].to(device),
        cu_seq_lens_q=cumulative,
        cu_seq_lens_k=cumulative,
        max_length_q=longest,
        max_length_k=longest,
    )
    return output.last_hidden_state[0]


def pool_packed(states_TD: Tensor, offsets: np.ndarray, mode: str) -> Tensor:
    """Pool packed states (T, d), as `model.pool` pools padded ones: (N, d) float32, or (N, m d) of m modes."""
    if "+" in mode:
        return torch.cat([pool_packed(states_TD, offsets, each) for each in mode.split("+")], dim=1)
    ends = torch.from_numpy(offsets[1:]).to(states_TD.device)
    starts = torch.from_numpy(offsets[:-1]).to(states_TD.device)
    if mode == "cls":
        return states_TD[starts].float()
    if mode == "lasttoken":
        return states_TD[ends - 1].float()
    states_TD, lengths = states_TD.float(), ends - starts
    if mode == "max":
        return torch.segment_reduce(states_TD, "max", lengths=lengths, axis=0)
    if mode == "weightedmean":
        positions = torch.arange(len(states_TD), device=starts.device) - starts.repeat_interleave(lengths)
        states_TD = states_TD * (positions + 1)[:, None]
    sums_ND: Tensor = _Sums.apply(states_TD, lengths)
    return sums_ND / mean_divisor(lengths, mode)[:, None]


class _Sums(torch.autograd.Function):
    """(T, d), (N,) lengths -> (N, d) sums over the tokens of each text; torch's own would keep the tokens' states."""

    @staticmethod
    def forward(context: Any, states_TD: Tensor, lengths_N: Tensor) -> Tensor:
        context.save_for_backward(lengths_N)
        return torch.segment_reduce(states_TD, "sum", lengths=lengths_N, axis=0)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (lengths_N,) = context.saved_tensors
        return gradients[0].repeat_interleave(lengths_N, dim=0), None


def mean_divisor(lengths_N: Tensor, mode: str) -> Tensor:
    """Return (N,) what the sum over the tokens of a text is divided by: mean, mean_sqrt_len_tokens or weightedmean."""
    if mode == "weightedmean":
        return lengths_N * (lengths_N + 1) / 2
    return lengths_N.sqrt() if mode == "mean_sqrt_len_tokens" else lengths_N


def _alone(backbone: nn.Module, ids: np.ndarray) -> Tensor:
    row = torch.from_numpy(ids)[None].to(next(backbone.parameters()).device)
    return backbone(input_ids=row).last_hidden_state[0]


def _has_kernel(weight: Tensor) -> bool:
    """Return whether torch's own variable-length attention runs on this device and type."""
    if weight.device.type != "cuda" or weight.dtype not in (torch.bfloat16, torch.float16):
        return False
    return importlib.util.find_spec("torch.nn.attention.varlen") is not None


def register(name: str, attend: Callable[..., tuple[Tensor, None]]) -> None:
    """Let transformers call `attend` for backbones that are switched to the attention `name`, without any mask."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(name, attend)
    # Who attends to whom is in the offsets.
    AttentionMaskInterface.register(name, lambda *arguments, **options: None)


def reach(module: nn.Module, options: Mapping[str, Any]) -> tuple[int, int]:
    """Return how many tokens before and after itself a token attends to, -1 for all, by transformers' options.

    Raises ValueError if the options ask for what attention within texts cannot do.
    """
    if any(options.get(name) is not None for name in ("position_bias", "softcap", "s_aux")):
        raise ValueError("packed attention supports neither biases nor capped scores nor sinks")
    window = options.get("sliding_window")
    # A window of transformers is a number of tokens on either side, the token itself included.
    before = -1 if window is None else window - 1
    return before, 0 if getattr(module, "is_causal", False) else before


def _attend(
    module: nn.Module,
    query_1HTD: Tensor,
    key_1HTD: Tensor,
    value_1HTD: Tensor,
    attention_mask: None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention in the calling convention of transformers; returns (1, T, heads, d)."""
    attended_THD = within_texts(
        query_1HTD[0].transpose(0, 1),
        key_1HTD[0].transpose(0, 1),
        value_1HTD[0].transpose(0, 1),
        options["cu_seq_lens_q"],
        int(options["max_length_q"]),
        scaling,
        reach(module, options),
    )
    return attended_THD[None], None


def within_texts(
    query_THD: Tensor,
    key_TGD: Tensor,
    value_TGD: Tensor,
    offsets: Tensor,
    longest: int,
    scale: float | None,
    window: tuple[int, int],
) -> Tensor:
    """Return (T, H, d) attention of each text to itself by torch's kernel for GPUs; G of H heads have keys.

    window: as `reach`.
    """
    from torch.nn.attention.varlen import varlen_attn

    attended = varlen_attn(
        query_THD,
        key_TGD,
        value_TGD,
        offsets,
        offsets,
        longest,
        longest,
        scale=scale,
        window_size=window,
        enable_gqa=key_TGD.shape[1] < query_THD.shape[1],
    )
    assert isinstance(attended, Tensor)
    return attended
