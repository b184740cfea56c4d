"""What a step costs: memory, and the share of the machine's arithmetic that training uses (MFU)."""

from __future__ import annotations

import resource
import sys
import time

import torch

from clusterbatch.encoder.model import Encoder

# Dense bfloat16 peak of accelerators, FLOP/s, from their data sheets; matched by name.
_PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "A10": 125e12}
_GEMM_SIZE = 1024
_GEMM_ROUNDS = 8


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the device: its data sheet's where it is known, else the best of a few matrix products."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for key, peak in _PEAKS.items():
            if key in name:
                return peak
    left = torch.randn(_GEMM_SIZE, _GEMM_SIZE, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(_GEMM_ROUNDS):
        start = time.perf_counter()
        left @ left
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * _GEMM_SIZE**3 / best


def training_flops_per_token(encoder: Encoder) -> float | None:
    """FLOP of forward and backward per token: 6 per weight that a token passes (Kaplan 2020), attention scores left
    out (a few per cent at these lengths). None for a static encoder, whose work is moving memory, and for two towers,
    each of which only part of the tokens pass."""
    if encoder.kind != "backbone":
        return None
    table = encoder.backbone.get_input_embeddings()  # type: ignore[operator]
    weights = sum(parameter.numel() for parameter in encoder.parameters() if parameter.ndim > 1)
    return 6.0 * (weights - table.weight.numel())


def peak_memory_bytes(device: torch.device) -> int:
    """The most that this process has held so far: of the accelerator's memory, or resident on the CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
