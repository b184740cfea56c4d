"""Checks of a model by name before any work starts, so that a run does not fail at its second or third stage."""

from __future__ import annotations

from typing import Any

from clusterbatch.config import StorageConfig
from clusterbatch.encoder.model_files import Kind, check_weight_files, read_layout
from clusterbatch.encoder.resolve import resolve_model
from clusterbatch.errors import ClusterbatchError, UsageError

# Weights of this many bytes are loaded to see that they are all there; loading more takes the driver too long.
_LOADED_BYTES = 2 * 2**30


def check_model(
    name: str,
    storage: StorageConfig | None = None,
    *,
    key: str = "",
    kind: Kind | None = None,
    load: bool = True,
    int8: bool = False,
) -> None:
    """Raise the error that a worker would raise on loading the model called `name`.

    key: configuration key that names the model, put before the message. kind: as for `load_encoder`. load: False:
    look at the settings and names of its files only, which needs no torch; weights above 2 GiB are never loaded here.
    int8: whether it has to compute with 8-bit integers.

    Raises UsageError if there is no such model or it is not supported, DataError if its files are damaged or do not
    hold all weights, InfrastructureError if it cannot be fetched.
    """
    try:
        folder = resolve_model(name, storage)
        layout = read_layout(folder)
        if kind == "backbone" and layout.kind == "static":
            raise UsageError(f"{folder}: holds a static encoder, not a transformer")
        check_weight_files(layout)
        size = sum(file.stat().st_size for file in layout.module.glob("*.safetensors"))
        if load and size <= _LOADED_BYTES:
            from clusterbatch.encoder.load import load_encoder

            options: dict[str, Any] = {}
            if int8:
                import torch

                options = {"dtype": torch.int8}
            load_encoder(folder, kind, **options)
    except ClusterbatchError as error:
        if not key or str(error).startswith(f"{key}: "):
            raise
        raise type(error)(f"{key}: {error}") from error
