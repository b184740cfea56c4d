"""`train`: the model to be pretrained and how."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from clusterbatch.config.base import Address, ModelName, Section, added, operational

# CLIP's limit: below it training gets unstable.
LEAST_LEARNED_TEMPERATURE = 0.01

Direction = Literal["query_to_document", "document_to_query", "query_to_query"]


def _as_range(value: object) -> object:
    return [value, value] if isinstance(value, int) else value


WorkerRange = Annotated[tuple[int, int], BeforeValidator(_as_range)]


class MaskConfig(Section):
    """Which (query, document) pairs of a batch are left out of the loss as likely false negatives.

    Margins are added to the score of the query's own positive; a negative margin ignores more.
    """

    # Same normalised document text, same normalised query text.
    duplicates: bool = True
    # The documents of all rows with the same query text count as positives of that query.
    same_query_is_positive: bool = False
    # Leave out what the surrogate scores above the pair's own positive plus this margin; unset: off.
    surrogate_margin: float | None = Field(None, ge=-2, le=2)
    # The margin is a share of the positive's score: -0.05 leaves out what scores above 95 % of it.
    surrogate_relative: bool = False
    # The same with the scores of the model in training (Qwen3-Embedding: 0.1); unset: off.
    own_score_margin: float | None = Field(None, ge=-2, le=2)


class PromptsConfig(Section):
    """What is put before texts. Unset: the prompts that the model's own files name."""

    query: str | None = None
    document: str | None = None


class LoraConfig(Section):
    """Low-rank adapters instead of all weights (needs `peft`); they are merged into the model that is written."""

    rank: int = Field(16, ge=1)
    alpha: float = Field(32, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    # Names of the layers that get adapters; unset: all linear ones.
    layers: list[str] | None = None


class TrainConfig(Section):
    model: ModelName = "all-MiniLM-L6-v2"
    # static: only the model's token embeddings, mean-pooled; backbone: the whole transformer.
    encoder: Literal["static", "backbone"] = "static"
    # One of the two; both unset: one epoch.
    epochs: int | None = Field(None, ge=1)
    steps: int | None = Field(None, ge=1)
    max_query_tokens: int = Field(64, ge=2)
    max_document_tokens: int = Field(256, ge=2)
    prompts: PromptsConfig = PromptsConfig()
    # By source, where its texts take prompts of their own; saved with the model as '<source>-query' and so on.
    source_prompts: dict[str, PromptsConfig] = {}
    # Dropout of a backbone; unset: what its own files say.
    dropout: float | None = Field(None, ge=0, lt=1)
    lora: LoraConfig | None = None

    # AdamW. linear and cosine fall to zero after the warmup, wsd (warmup-stable-decay) over the last share `decay`.
    learning_rate: float = Field(2e-5, gt=0)
    schedule: Literal["linear", "cosine", "wsd", "constant"] = "linear"
    # Share of the steps in which the rate rises to learning_rate.
    warmup: float = Field(0.1, ge=0, lt=1)
    decay: float = Field(0.2, gt=0, le=1)
    # Of matrices only: parameters of one dimension (biases, norms) do not decay.
    weight_decay: float = Field(0.01, ge=0)
    # Largest global gradient norm; null: no clipping.
    clip_norm: float | None = Field(1.0, gt=0)

    temperature: float = Field(0.05, gt=0)
    # The temperature is trained with the model, from `temperature` on and never below 0.01.
    learn_temperature: bool = False
    # What competes. query_to_document: the batch's documents for each query; query_to_query: its other queries with
    # them; document_to_query: also its queries for each document, and the two losses are averaged.
    directions: list[Direction] = ["query_to_document"]
    # Sizes of the nested vectors that are trained as well, the full size among them; unset: the full size only.
    matryoshka: list[int] | None = None
    mask: MaskConfig = MaskConfig()
    # Weight of the Margin-MSE loss (Hofstaetter 2020) that is added to the contrastive one: the model is to score each
    # mined negative as far below the positive as the surrogate did. Needs mine.margins; 0: off.
    margin_mse: float = added(0.0, ge=0)

    seed: int = 0
    deterministic: bool = False
    # What a backbone computes in: auto takes bfloat16 where the machine has instructions for it. Weights stay float32.
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    # Tokens (padding included) that go through the encoder at once; unset: 2,048 for a backbone on a CPU, else 65,536.
    micro_batch_tokens: int | None = Field(None, ge=64)
    # Activations kept from the forward to the backward pass; micro-batches beyond it are computed twice (gradient
    # cache). The gradient is the same. Unset: 2 GiB on a CPU, half of what is free on a GPU.
    activation_bytes: int | None = operational(None, ge=0)
    # Keeps each layer's input only and computes the layer again: less memory, a third more work.
    gradient_checkpointing: bool = operational(False)

    # Steps between two checkpoints; unset: about ten in a run.
    checkpoint_every: int | None = operational(None, ge=1)
    keep_checkpoints: int = operational(2, ge=1)
    # Folder in BEIR layout that is searched every so many steps (give both). The checkpoint that does best there is
    # kept too, but the model that is written is that of the last step.
    evaluate_path: Address | None = operational(None)
    evaluate_every: int | None = operational(None, ge=1)
    # Where figures go beside the JSON lines; mlflow and wandb need their packages and take their own settings from
    # their environment variables.
    trackers: list[Literal["tensorboard", "mlflow", "wandb"]] = operational(["tensorboard"])
    # A number, or [fewest, most]: Ray then takes what the cluster has (elastic). Unset: one for each GPU, else two.
    workers: WorkerRange | None = operational(None)
    # CPU cores that a worker asks for; it computes with as many threads, at least one.
    cpus_per_worker: float = operational(0.9, gt=0)
    # How often lost workers are replaced before the run fails; -1: always.
    failures: int = operational(3, ge=-1)
    device: str = operational("auto")
    # Seconds after which a collective that does not answer fails the run.
    collective_timeout: float = operational(120.0, gt=0)

    @property
    def named_prompts(self) -> dict[str, str]:
        """The prompts that are set, by the names under which they are saved with the model."""
        named = {"": self.prompts, **{f"{source}-": own for source, own in self.source_prompts.items()}}
        both = {
            f"{prefix}{kind}": getattr(own, kind) for prefix, own in named.items() for kind in ("query", "document")
        }
        return {name: prompt for name, prompt in both.items() if prompt is not None}

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        if self.learn_temperature and self.temperature < LEAST_LEARNED_TEMPERATURE:
            raise ValueError(f"temperature: a learned one begins at {LEAST_LEARNED_TEMPERATURE} or above")
        if self.epochs is not None and self.steps is not None:
            raise ValueError("give epochs or steps, not both")
        if "query_to_document" not in self.directions:
            raise ValueError("directions: query_to_document must be among them")
        if len(set(self.directions)) < len(self.directions):
            raise ValueError("directions: one is named twice")
        if self.matryoshka is not None and (not self.matryoshka or min(self.matryoshka) < 1):
            raise ValueError("matryoshka: expected sizes of at least 1")
        if (self.evaluate_path is None) != (self.evaluate_every is None):
            raise ValueError("evaluate_path and evaluate_every go together")
        if self.encoder == "static" and (self.lora or self.gradient_checkpointing):
            raise ValueError("lora and gradient_checkpointing need encoder: backbone")
        if self.mask.same_query_is_positive and not self.mask.duplicates:
            raise ValueError("mask.same_query_is_positive needs mask.duplicates")
        if self.workers is not None and not 1 <= self.workers[0] <= self.workers[1]:
            raise ValueError(f"workers: expected a number of at least 1, or [fewest, most] (got {list(self.workers)})")
        return self
