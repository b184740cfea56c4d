"""`embed`: the surrogate, the existing model whose vectors decide clusters and masks."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from clusterbatch.config.base import Section, operational


class EmbedConfig(Section):
    model: str = "all-MiniLM-L6-v2"
    # Longer texts are cut. Unset: what the model's own files say.
    max_tokens: int | None = Field(256, ge=2)
    # Tokens (padding included) that go through the backbone at once.
    batch_tokens: int = Field(4096, ge=64)
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    device: str = operational("auto")
    workers: int = operational(2, ge=1)
