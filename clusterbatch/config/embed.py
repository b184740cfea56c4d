"""`embed`: the surrogate, the existing model whose vectors decide clusters and masks."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from clusterbatch.config.base import ModelName, Section, operational

# The surrogate that needs no model: TF-IDF of character n-grams, reduced by a truncated SVD fitted to the corpus.
CHARACTER_NGRAMS = "char-ngrams"


class EmbedConfig(Section):
    # A folder, an s3:// folder, a name on the hub, or char-ngrams.
    model: ModelName = "all-MiniLM-L6-v2"
    # Longer texts are cut. Unset: what the model's own files say.
    max_tokens: int | None = Field(256, ge=2)
    # Put before every text. Unset: the prompts that the model's own files name.
    query_prompt: str | None = None
    document_prompt: str | None = None
    # Tokens (padding included) that go through the backbone at once. CPUs are fastest while the activations stay in
    # their caches; a GPU wants all that its memory holds (65536 for MiniLM in 24 GB).
    batch_tokens: int = Field(2048, ge=64)
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    # Whether vectors are kept, or computed again in each later pass that needs them.
    persist: bool = True
    # auto: the GPUs of the cluster, where it has any.
    device: str = operational("auto")
    workers: int = operational(2, ge=1)
    # What each worker asks of the cluster. GPUs unset: one; where there are fewer GPUs than workers, they share them.
    cpus_per_worker: float = operational(0.9, gt=0)
    gpus_per_worker: float | None = operational(None, gt=0)
    # Processes that read and tokenise ahead of the workers. Unset: none on CPUs, where workers do it themselves at a
    # few per cent of their time; eight for each GPU worker.
    tokenizers: int | None = operational(None, ge=0)
