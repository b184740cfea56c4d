"""What arithmetic an encoder does for texts, and what arithmetic the machine can do: how near a rate is to the end."""

from __future__ import annotations

import time
from typing import Any

import torch

from clusterbatch.encoder.model import Encoder
from clusterbatch.encoder.tokens import Tokens


def encoder_flops(encoder: Encoder, tokens: Tokens) -> float:
    """FLOP of one pass without padding: per token 2 for each weight of the layers, and in each layer 4 d L to attend
    to L tokens."""
    config: Any = encoder.backbone.config
    layers = encoder.backbone.get_submodule("encoder")
    weights = sum(parameter.numel() for parameter in layers.parameters() if parameter.ndim > 1)
    attention = 4.0 * config.num_hidden_layers * config.hidden_size * float((tokens.lengths**2).sum())
    return 2.0 * weights * len(tokens.values) + attention


def product_flops(inner: int, outer: int, dtype: torch.dtype, rows: int = 4096, least_seconds: float = 1.0) -> float:
    """FLOP/s of the product (rows, inner) x (inner, outer) on this machine's CPUs: what its library reaches."""
    left, right = torch.randn(rows, inner).to(dtype), torch.randn(inner, outer).to(dtype)
    into = torch.empty(rows, outer, dtype=dtype)
    torch.mm(left, right, out=into)
    start, rounds = time.perf_counter(), 0
    while time.perf_counter() - start < least_seconds:
        torch.mm(left, right, out=into)
        rounds += 1
    return 2.0 * rows * inner * outer * rounds / (time.perf_counter() - start)
