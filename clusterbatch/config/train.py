"""`train`: the model to be pretrained and how."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from clusterbatch.config.base import Section, operational


class MaskConfig(Section):
    """Which (query, document) pairs of a batch are left out of the loss as likely false negatives."""

    # Same normalised document text, same normalised query text.
    duplicates: bool = True
    # Leave out what the surrogate scores above the pair's own positive minus this margin; unset: off.
    surrogate_margin: float | None = None
    surrogate_relative: bool = False


class TrainConfig(Section):
    model: str = "all-MiniLM-L6-v2"
    # static: only the model's token embeddings, mean-pooled; backbone: the whole transformer.
    encoder: Literal["static", "backbone"] = "static"
    epochs: int | None = Field(None, ge=1)
    steps: int | None = Field(None, ge=1)
    max_query_tokens: int = Field(64, ge=2)
    max_document_tokens: int = Field(256, ge=2)
    learning_rate: float = Field(2e-5, gt=0)
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup: float = Field(0.1, ge=0, lt=1)
    weight_decay: float = Field(0.01, ge=0)
    clip_norm: float = Field(1.0, gt=0)
    temperature: float = Field(0.05, gt=0)
    mask: MaskConfig = MaskConfig()
    seed: int = 0
    deterministic: bool = False
    # Tokens (padding included) of one micro-batch of the gradient cache.
    micro_batch_tokens: int = Field(16_384, ge=64)
    # Steps between two checkpoints; unset: about ten in a run.
    checkpoint_every: int | None = operational(None, ge=1)
    keep_checkpoints: int = operational(2, ge=1)
    workers: int = operational(2, ge=1)
    device: str = operational("auto")
    # Seconds after which a collective that does not answer fails the run.
    collective_timeout: float = operational(120.0, gt=0)

    @model_validator(mode="after")
    def _length(self) -> TrainConfig:
        if self.epochs is not None and self.steps is not None:
            raise ValueError("give epochs or steps, not both")
        return self
