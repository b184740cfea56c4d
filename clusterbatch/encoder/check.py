"""Checks of a model by name before any work starts, so that a run does not fail at its second or third stage."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clusterbatch.config import StorageConfig
from clusterbatch.encoder.model_files import Kind, check_weight_files, read_layout
from clusterbatch.encoder.resolve import resolve_model
from clusterbatch.errors import UsageError, about

if TYPE_CHECKING:
    # Its imports, the tokenizers', take a while, and most checks have no limits.
    from clusterbatch.encoder.limits import TextLimit

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
    limits: Sequence[TextLimit] = (),
) -> None:
    """Raise the error that a worker would raise on loading the model called `name`.

    key: configuration key that names the model, put before the message. kind: as for `load_encoder`. load: False:
    look at the settings and names of its files only, which needs no torch; weights above 2 GiB are never loaded here.
    int8: whether it has to compute with 8-bit integers. limits: on the tokens of its texts.

    Raises UsageError if there is no such model, it is not supported or a prompt or special tokens leave no room for
    text within a limit, DataError if its files are damaged or do not hold all weights, InfrastructureError if it
    cannot be fetched.
    """
    with about(key):
        folder = resolve_model(name, storage)
        layout = read_layout(folder)
        if kind == "backbone" and layout.kind == "static":
            raise UsageError(f"{folder}: holds a static encoder, not a transformer")
        check_weight_files(layout)
        if limits:
            from clusterbatch.encoder.limits import check_limits

            check_limits(folder, storage, limits, kind)
        if load and is_light(layout.module):
            from clusterbatch.encoder.load import load_encoder

            options: dict[str, Any] = {}
            if int8:
                import torch

                options = {"dtype": torch.int8}
            load_encoder(folder, kind, **options)


def is_light(folder: Path) -> bool:
    """Return whether the weights in a folder are few enough to be loaded by the driver, only to check them."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) <= _LOADED_BYTES
