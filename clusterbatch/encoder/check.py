"""Checks of a model by name before any work starts, so that a run does not fail at its second or third stage."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clusterbatch.config import StorageConfig
from clusterbatch.encoder.model_files import Kind, check_weight_files, read_layout
from clusterbatch.encoder.resolve import resolve_model
from clusterbatch.errors import UsageError, about

# Weights of this many bytes are loaded to see that they are all there; loading more takes the driver too long.
_LOADED_BYTES = 2 * 2**30
# No tokenizer puts so many special tokens around a text.
_SPECIAL_TOKENS = 32


def check_model(
    name: str,
    storage: StorageConfig | None = None,
    *,
    key: str = "",
    kind: Kind | None = None,
    load: bool = True,
    int8: bool = False,
    limits: Mapping[str, int | None] | None = None,
) -> None:
    """Raise the error that a worker would raise on loading the model called `name`.

    key: configuration key that names the model, put before the message. kind: as for `load_encoder`. load: False:
    look at the settings and names of its files only, which needs no torch; weights above 2 GiB are never loaded here.
    int8: whether it has to compute with 8-bit integers. limits: tokens to which its texts are cut, by configuration
    key.

    Raises UsageError if there is no such model, it is not supported or a limit leaves no room for text, DataError if
    its files are damaged or do not hold all weights, InfrastructureError if it cannot be fetched.
    """
    with about(key):
        folder = resolve_model(name, storage)
        layout = read_layout(folder)
        if kind == "backbone" and layout.kind == "static":
            raise UsageError(f"{folder}: holds a static encoder, not a transformer")
        check_weight_files(layout)
        if (kind or layout.kind) != "static":
            _check_limits(folder, limits or {})
        if load and is_light(layout.module):
            from clusterbatch.encoder.load import load_encoder

            options: dict[str, Any] = {}
            if int8:
                import torch

                options = {"dtype": torch.int8}
            load_encoder(folder, kind, **options)


def _check_limits(folder: str, limits: Mapping[str, int | None]) -> None:
    """Raise UsageError if the special tokens of a transformer take all of a limit."""
    short = {key: limit for key, limit in limits.items() if limit is not None and limit <= _SPECIAL_TOKENS}
    if not short:
        return
    # Takes seconds, for it imports transformers.
    from clusterbatch.encoder.tokenizer import Tokenizer

    added = Tokenizer(folder).added
    for key, limit in short.items():
        if limit <= added:
            raise UsageError(f"{key}: {limit} tokens leave no room for text beside {added} special ones")


def is_light(folder: Path) -> bool:
    """Return whether the weights in a folder are few enough to be loaded by the driver, only to check them."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) <= _LOADED_BYTES
