"""Device and number type that a machine computes vectors with if the configuration says `auto`."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from typing import Literal

import torch

from clusterbatch.errors import UsageError


def resolve_device(name: str) -> torch.device:
    """Return the device for 'auto', 'cpu', 'cuda' or 'cuda:1'. Raises UsageError if there is no such device."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"device {name!r}: expected auto, cpu or cuda") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"device {name!r}: no GPU is visible here")
    return device


def visible_device(name: str) -> torch.device:
    """Return what `resolve_device` returns, or the CPU if no GPU is visible here: for small work of the driver.

    The driver does such work, on a head node that seldom has a GPU.
    """
    return resolve_device(name if torch.cuda.is_available() or not name.startswith("cuda") else "cpu")


def inference_dtype(name: Literal["auto", "float32", "bfloat16", "int8"], device: torch.device) -> torch.dtype:
    """Return the type to compute in: 'auto' is bf16 if the hardware has it (emulation is slower), otherwise float32.

    Raises UsageError for 'int8' on a device that does not multiply 8-bit integers fast.
    """
    if name == "int8":
        if device.type != "cpu" or not torch.cpu._is_vnni_supported():
            raise UsageError("dtype int8: needs a CPU with VNNI instructions (take auto)")
        return torch.int8
    if name != "auto":
        return torch.bfloat16 if name == "bfloat16" else torch.float32
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


def bound_kernel_caches(kernels: int = 32) -> None:
    """Let oneDNN and torch keep few of the kernels that they compile for products on this process's CPU.

    Texts of all lengths need another kernel for nearly every micro-batch; a thousand of them, the usual bound, are a
    gigabyte. Those of one micro-batch are still shared by its layers. Without effect if the process has computed such
    a product before; values that are set already stay.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(kernels))


def return_freed_memory() -> None:
    """Give memory that was freed, but that the C library keeps, back to the system; without effect if it cannot.

    Texts of all lengths leave holes of all sizes between what is still in use, more of them with every piece of work.
    """
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def keep_freed_memory() -> None:
    """Let this process's memory allocator, if it is glibc's, keep what is freed for what is allocated next.

    Otherwise the activations of a training step return to the system at its end, and the next step waits for as many
    pages of zeros.
    """
    with suppress(OSError, AttributeError):
        set_option = ctypes.CDLL(None).mallopt
        # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD, in bytes.
        for option in (-3, -1):
            set_option(option, 2**31 - 1)
