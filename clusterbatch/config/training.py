"""`evaluate`: the test collections, the models and the measures.

`batches`: which rows stand together in a global batch, and how that changes while training goes on.

`train`: the model to be pretrained and how.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from clusterbatch.config.base import Address, ModelName, Section, added, operational
from clusterbatch.config.stages import Paths

# group: the user's own segments (corpus.columns.group), inside each source. random_groups: the control for cluster,
# groups of the same sizes made of any rows of the source.
Stratify = Literal["random", "source", "cluster", "group", "random_groups"]


class PhaseConfig(Section):
    """A stretch of the curriculum; keys that are not set are those of `batches`.

    It lasts so many epochs or steps; the last phase, and only that, may leave both open and lasts to the end.
    """

    epochs: int | None = Field(None, ge=1)
    steps: int | None = Field(None, ge=1)
    stratify: Stratify | None = None
    clusters_per_batch: int | None = Field(None, ge=1)
    merged_clusters: int | None = Field(None, ge=1)
    random_share: float | None = Field(None, ge=0, le=0.5)

    @model_validator(mode="after")
    def _consistent(self) -> PhaseConfig:
        if self.epochs is not None and self.steps is not None:
            raise ValueError("give epochs or steps, not both")
        return self

    @property
    def changes(self) -> dict[str, Any]:
        """The keys of `batches` that it sets."""
        return self.model_dump(exclude={"epochs", "steps"}, exclude_none=True)


class BatchesConfig(Section):
    stratify: Stratify = "cluster"
    # Pairs in one global batch, over all ranks.
    size: int = Field(256, ge=2)
    # Unset: derived for each source from its clusters' sizes, so that at most about a quarter of the rows is packed.
    clusters_per_batch: int | None = Field(None, ge=1)
    # So many neighbouring clusters count as one: coarser clusters without clustering again.
    merged_clusters: int = Field(1, ge=1)
    # Share of each batch that is exchanged for rows of any other batches of its source.
    random_share: float = Field(0.0, ge=0, le=0.5)
    # Each cluster as often as any other, however many rows it has (TAS, Hofstaetter 2021). Unset: by its rows.
    uniform_clusters: bool = False
    # Phases one after the other, for instance from easy batches to hard ones. Unset: the same from the first step on.
    curriculum: list[PhaseConfig] = []
    # Sources smaller than a batch: pooled with each other, or left out (then their rows are never trained on).
    small_sources: Literal["pool", "leave_out"] = "pool"
    # Multiplies how often a source's batches are drawn (1 for sources not named, 0 leaves a source out); an epoch is
    # then about as many batches as without. Unset: every row once an epoch.
    source_weights: dict[str, float] | None = None
    seed: int = 0
    # What a worker reads ahead, and what it keeps decoded where a strategy moves single rows.
    prefetch_bytes: int = operational(64 * 2**20, ge=2**16)
    cache_bytes: int = operational(256 * 2**20, ge=2**16)

    @model_validator(mode="after")
    def _by_cluster(self) -> BatchesConfig:
        if self.uniform_clusters and any(phase.stratify != "cluster" for phase in self.phases):
            raise ValueError("uniform_clusters needs stratify: cluster, in all phases")
        return self

    @model_validator(mode="after")
    def _open_end(self) -> BatchesConfig:
        for number, phase in enumerate(self.curriculum[:-1]):
            if phase.epochs is None and phase.steps is None:
                raise ValueError(f"curriculum: phase {number + 1} must say how many epochs or steps it lasts")
        if self.curriculum and (self.curriculum[-1].epochs or self.curriculum[-1].steps):
            raise ValueError("curriculum: the last phase lasts to the end; give it neither epochs nor steps")
        return self

    @property
    def phases(self) -> list[BatchesConfig]:
        """The batches of each phase, without a curriculum of their own; one where there is none."""
        return [
            self.model_copy(update={"curriculum": [], **phase.changes}) for phase in self.curriculum or [PhaseConfig()]
        ]


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


class EvaluateConfig(Section):
    # Folders in BEIR layout: corpus.jsonl, queries.jsonl, qrels/<split>.tsv; docstrings:// means the sample's own.
    path: Paths = []
    split: str = "test"
    # Where no collection is given: so many documents, with all queries that ask for them, are held out of the corpus as
    # development and test queries. 0: none.
    holdout: int = Field(2000, ge=0)
    # before: train.model as training starts, behind train.prompts; after: the trained model; bm25: word matching, as a
    # reference. Others are a model's folder, a workspace (its model is meant) or a name on the hub.
    models: list[str] = Field(["before", "after"], min_length=1)
    # NDCG@k, MRR@k, Recall@k, Precision@k, MAP@k, HitRate@k, or module:function of (answers, grades).
    metrics: list[str] = Field(["NDCG@10", "Recall@100", "MRR@10"], min_length=1)
    # Names of MTEB tasks to run on the same models (needs the package mteb and, for its data, a network).
    mteb: list[str] = operational([])
    # Documents kept for each query in the run file.
    top_k: int = Field(100, ge=1)
    # BEIR's rule: a document with the query's own id is not an answer to it.
    ignore_identical_ids: bool = True
    # What texts are cut to here, or to the model's own limit where that is shorter; train.max_*_tokens do not count.
    max_query_tokens: int = Field(64, ge=2)
    max_document_tokens: int = Field(256, ge=2)
    # Bytes of corpus.jsonl that one unit of work embeds and searches.
    unit_bytes: int = Field(2 * 2**20, ge=2**10)
    workers: int = operational(2, ge=1)
    device: str = operational("auto")

    @model_validator(mode="after")
    def _depth(self) -> EvaluateConfig:
        for metric in self.metrics:
            cutoff = re.fullmatch(r"\w+@(\d+)", metric)
            if cutoff and int(cutoff[1]) > self.top_k:
                raise ValueError(f"metrics: {metric} looks deeper than top_k ({self.top_k})")
        return self
