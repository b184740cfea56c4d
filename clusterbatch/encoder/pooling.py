"""From token states to one vector a text, in fp32 whatever the backbone computes in."""

from __future__ import annotations

import torch
from torch import Tensor


def pool(states_NLD: Tensor, lengths_N: Tensor, mode: str) -> Tensor:
    """(N, d) float32 of right-padded states (N, L, d); lengths (N,) are at least 1. mode: cls, mean or lasttoken."""
    if mode == "cls":
        return states_NLD[:, 0].float()
    if mode == "lasttoken":
        return states_NLD[torch.arange(len(states_NLD), device=states_NLD.device), lengths_N - 1].float()
    positions = torch.arange(states_NLD.shape[1], device=states_NLD.device)
    padding_NL1 = (positions >= lengths_N[:, None])[..., None]
    return states_NLD.masked_fill(padding_NL1, 0.0).sum(dim=1, dtype=torch.float32) / lengths_N[:, None]


def unit(vectors_ND: Tensor) -> Tensor:
    """Rows of length 1. A zero row (a text without any known token) becomes a fixed unit vector."""
    norms_N1 = vectors_ND.norm(dim=-1, keepdim=True)
    fixed = torch.full_like(vectors_ND, vectors_ND.shape[-1] ** -0.5)
    # A row with a NaN keeps it: whoever reads the vectors must see that something is wrong.
    return torch.where(norms_N1 <= 1e-12, fixed, vectors_ND / norms_N1.clamp_min(1e-12))
