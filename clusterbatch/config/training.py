"""Sections `train` and `evaluate`."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from clusterbatch.config.base import Address, Device, ModelName, Section, Seed, added, operational
from clusterbatch.config.stages import Paths

# CLIP's limit: below it training gets unstable.
LEAST_LEARNED_TEMPERATURE = 0.01

Negatives = Literal["in_batch", "hard", "both"]
Direction = Literal["query_to_document", "document_to_query", "query_to_query"]


def _as_range(value: object) -> object:
    if isinstance(value, int) and not isinstance(value, bool):
        return [value, value]
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise ValueError(f"expected a number, or [fewest, most] (got {value!r})")
    return value


WorkerRange = Annotated[tuple[int, int], BeforeValidator(_as_range)]


class MaskConfig(Section):
    """Mask of (query, document) pairs of a batch that the loss ignores as likely false negatives.

    Margins are added to the score of the query's own positive; a negative margin ignores more.
    """

    duplicates: bool = True
    """Ignores documents with the same normalised text as the positive, and those of rows with the same normalised
    query."""
    same_document: bool = added(True)
    """Ignores the texts that rows of the same document have, if the corpus says which rows these are
    (`corpus.columns.document_id`)."""
    semantic_duplicates: bool = added(True)
    """Ignores the texts of other rows of the same group of semantic duplicates, if clusters were made with
    `cluster.duplicates`."""
    same_query_is_positive: bool = False
    """Count the documents of all rows with the same query as positives of that query."""
    surrogate_margin: float | None = Field(None, ge=-2, le=2)
    """Ignores documents that the surrogate scores above the query's own positive plus this margin. Unset: off."""
    surrogate_relative: bool = False
    """Take the margin as a share of the positive's score: -0.05 ignores what scores above 95 % of it."""
    own_score_margin: float | None = Field(None, ge=-2, le=2)
    """The same with the scores of the model in training (Qwen3-Embedding: 0.1). Unset: off."""
    teacher_margin: float | None = added(None)
    """The same with the scores of `score.teacher`, of the documents that it has scored for the query (GISTEmbed,
    Solatorio 2024). Unset: off."""
    teacher_relative: bool = added(False)
    """Take that margin as a share of the positive's score, as `surrogate_relative` does."""
    teacher_ranks: int = added(0, ge=0)
    """Ignores this many documents of each query: those that `score.teacher` scores highest among all it has scored for
    it, whether or not they score above the positive."""

    @property
    def needs_teacher(self) -> bool:
        return self.teacher_margin is not None or self.teacher_ranks > 0


class ThresholdsConfig(Section):
    """Least scores (`corpus.columns.score`, `negative_scores`) of what is trained on. What has no score stays."""

    min_score: float | None = None
    """Leaves out pairs that score less. Unset: none."""
    min_margin: float | None = None
    """Leaves out hard negatives that score less than this below their pair. Unset: none."""

    @property
    def is_on(self) -> bool:
        return self.min_score is not None or self.min_margin is not None


class FilterConfig(ThresholdsConfig):
    """Choice of pairs and hard negatives by their scores, at training: the corpus and the shards keep all of them."""

    sources: dict[str, ThresholdsConfig] = {}
    """Thresholds by source, in place of both of the others."""

    def of(self, source: str) -> ThresholdsConfig:
        """Return the thresholds of a source."""
        return self.sources.get(source, self)

    @property
    def all(self) -> list[ThresholdsConfig]:
        """All thresholds."""
        return [self, *self.sources.values()]


class PromptsConfig(Section):
    """Texts put before queries and documents. Unset: the prompts in the model's own files."""

    query: str | None = None
    """Text put before queries."""
    document: str | None = None
    """Text put before documents."""


class LoraConfig(Section):
    """Low-rank adapters instead of all weights (needs `peft`); they are merged into the model that is written."""

    rank: int = Field(16, ge=1)
    """Rank of the adapters."""
    alpha: float = Field(32, gt=0)
    """Scale of the adapters: their output is multiplied by alpha / rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout before the adapters."""
    layers: list[str] | None = None
    """Names of the layers that get adapters. Unset: all linear layers."""


class TrainConfig(Section):
    """The model to train, its optimizer and its loss."""

    model: ModelName = "all-MiniLM-L6-v2"
    """The model to train: a local folder, an s3:// folder, or a name on the hub."""
    encoder: Literal["static", "backbone"] = "static"
    """`static` trains only the model's token embeddings, mean-pooled; `backbone` trains the whole transformer."""
    epochs: int | None = Field(None, ge=1)
    """Length of training in epochs. Give this or `steps`; both unset: one epoch."""
    steps: int | None = Field(None, ge=1)
    """Length of training in optimizer steps."""
    max_query_tokens: int = Field(64, ge=2)
    """Length in tokens to which queries are cut."""
    max_document_tokens: int = Field(256, ge=2)
    """Length in tokens to which documents are cut."""
    prompts: PromptsConfig = PromptsConfig()
    """Texts put before queries and documents."""
    source_prompts: dict[str, PromptsConfig] = {}
    """Prompts by source, for sources whose texts take their own; saved with the model as '<source>-query' and
    '<source>-document'."""
    dropout: float | None = Field(None, ge=0, lt=1)
    """Dropout of a backbone. Unset: the value in the model's own files."""
    lora: LoraConfig | None = None
    """Low-rank adapters (LoRA) instead of all weights; needs the package `peft`. They are merged into the model that is
    written. Unset: all weights are trained."""

    learning_rate: float | None = Field(None, gt=0)
    """Peak learning rate of AdamW. Unset: 5e-3 for a static encoder; for a backbone 1e-4 up to 50 million weights, 5e-5
    up to 200 million, 2e-5 above."""
    schedule: Literal["linear", "cosine", "wsd", "constant"] = "linear"
    """Course of the learning rate after the warmup: `linear` and `cosine` fall to zero, `wsd` (warmup-stable-decay)
    falls over the last share `decay`."""
    warmup: float = Field(0.1, ge=0, lt=1)
    """Share of the steps in which the learning rate rises to its peak."""
    decay: float = Field(0.2, gt=0, le=1)
    """Share of the steps in which `wsd` decays."""
    weight_decay: float = Field(0.01, ge=0)
    """Weight decay of matrices; parameters of one dimension (biases, norms) do not decay."""
    clip_norm: float | None = Field(1.0, gt=0)
    """Largest global norm of the gradient. null: no clipping."""

    temperature: float = Field(0.05, gt=0)
    """Temperature of the contrastive loss."""
    learn_temperature: bool = False
    """Train the temperature with the model, starting at `temperature` and never below 0.01."""
    directions: list[Direction] = ["query_to_document"]
    """Candidates that compete in the loss. `query_to_document`: the batch's documents for each query;
    `query_to_query`: its other queries as well; `document_to_query`: also its queries for each document, and the
    two losses are averaged."""
    matryoshka: list[int] | None = None
    """Sizes of nested vectors that are trained too, including the full size. Unset: the full size only."""
    mask: MaskConfig = MaskConfig()
    """Pairs of a batch that the loss ignores as likely false negatives."""
    negatives: Negatives | dict[str, Negatives] = added("both")
    """Negatives of a query: the other documents of the batch (`in_batch`), its own hard negatives alone (`hard`, for
    example for a source of class labels), or the batch's documents and all of its hard negatives (`both`). A map gives
    sources their own; those not named have both. In mixed batches each row follows its own source."""
    filter: FilterConfig = added(FilterConfig())
    """Pairs and hard negatives to train on, by their scores."""
    margin_mse: float = added(0.0, ge=0)
    """Weight of the Margin-MSE loss (Hofstaetter 2020) added to the contrastive loss: the model learns to score each
    mined negative as far below the positive as the surrogate did. Needs `mine.margins`, or `score.teacher`: then the
    teacher takes the surrogate's place, for all documents of the batch that it has scored for the query. 0: off."""
    teacher_kl: float = added(0.0, ge=0)
    """Weight of a distillation loss added to the contrastive loss: the Kullback-Leibler divergence from the teacher's
    to the model's distribution over a query's own document and those of the batch that `score.teacher` has scored for
    it, both at `temperature`. 0: off."""
    teacher_scale: float = added(1.0, gt=0)
    """Factor on the teacher's scores in `teacher_kl` and `margin_mse`, to make them comparable with cosines: 1 for an
    embedding model; the value of `temperature` takes a cross-encoder's logits as they are."""

    seed: Seed = 0
    """Seed of the initialisation and of dropout."""
    deterministic: bool = False
    """Use deterministic kernels only."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number type in which a backbone computes. `auto`: bfloat16 if the machine has instructions for it. Weights stay
    float32."""
    micro_batch_tokens: int | None = Field(None, ge=64)
    """Tokens that go through the encoder at once, padding included if the encoder has to be padded. Unset: 2,048 for a
    backbone on a CPU, otherwise 65,536."""
    activation_bytes: int | None = operational(None, ge=0)
    """Bytes of activations kept from the forward to the backward pass. A batch that needs more keeps less of each
    token, if the architecture allows it; what is beyond that is computed twice (gradient cache). Same gradient always.
    Unset: 2.5 GiB on a CPU, half of the free memory on a GPU."""
    gradient_checkpointing: bool = operational(False)
    """Keeps only each layer's input and computes the layer again: less memory, a third more work."""

    checkpoint_every: int | None = operational(None, ge=1)
    """Steps between two checkpoints. Unset: about ten per run, but none within a minute of the one before, and at least
    one every half hour."""
    keep_checkpoints: int = operational(2, ge=1)
    """Latest checkpoints to keep."""
    evaluate_path: Address | None = operational(None)
    """Folder in BEIR layout to search during training, every `evaluate_every` steps. The best checkpoint is kept too,
    but the model that is written is that of the last step."""
    evaluate_every: int | None = operational(None, ge=1)
    """Steps between two searches of `evaluate_path`."""
    trackers: list[Literal["tensorboard", "mlflow", "wandb"]] = operational(["tensorboard"])
    """Where metrics go besides the JSON lines. mlflow and wandb need their packages and read their settings from their
    own environment variables."""
    workers: WorkerRange | None = operational(None)
    """Number of workers, or [fewest, most]: as many as there is room for (elastic). Unset: one per GPU, or two."""
    cpus_per_worker: float = operational(0.9, gt=0)
    """CPU cores that each worker asks for; it computes with as many threads, at least one."""
    failures: int = operational(3, ge=-1)
    """How often lost workers are replaced before the run fails. -1: without limit."""
    device: Device = operational("auto")
    """`cpu`, `cuda`, or `auto`: the cluster's GPUs if it has any."""
    collective_timeout: float = operational(120.0, gt=0)
    """Seconds after which a collective operation without an answer fails the run."""

    def needs_teacher(self, scored: bool) -> bool:
        """Return whether training reads the scores of a teacher. scored: whether there are some (`score.teacher`)."""
        return self.mask.needs_teacher or self.teacher_kl > 0 or (scored and self.margin_mse > 0)

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
        if self.matryoshka is not None and len(set(self.matryoshka)) < len(self.matryoshka):
            raise ValueError("matryoshka: one size is named twice")
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
    """Test collections, the models to measure, and the metrics."""

    path: Paths = []
    """Folders in BEIR layout: corpus.jsonl, queries.jsonl, qrels/<split>.tsv. `docstrings://` is the built-in sample's
    collection."""
    split: str = "test"
    """Split of the judgements to measure on."""
    holdout: int = Field(2000, ge=0)
    """Documents to hold out of the corpus, with all queries that ask for them, as development and test queries if no
    collection is given. 0: none. Of documents that are cut into parts, as many parts, all of the same documents."""
    holdout_by: Literal["document", "query"] = added("document")
    """`document`: no pair of a held-out document is trained on, so that documents are as new as queries. `query`: new
    queries for documents that other pairs train, as many as `holdout` says; a document then needs two queries."""
    models: list[str] = Field(["before", "after"], min_length=1)
    """Models to measure. `before`: `train.model` before training, with `train.prompts`; `after`: the trained model;
    `bm25`: word matching, as a reference. Others are a model's folder, a workspace (its model is used) or a name on
    the hub."""
    metrics: list[str] = Field(["NDCG@10", "Recall@100", "MRR@10"], min_length=1)
    """NDCG@k, MRR@k, Recall@k, Precision@k, MAP@k, HitRate@k, or module:function of (answers, grades)."""
    mteb: list[str] = operational([])
    """Names of MTEB tasks to run on the same models; needs the package mteb and a network for its data."""
    top_k: int = Field(100, ge=1)
    """Documents kept per query in the run file."""
    ignore_identical_ids: bool = True
    """BEIR's rule: a document with the query's own id is not an answer to it."""
    max_query_tokens: int = Field(64, ge=2)
    """Length in tokens to which queries are cut, or the model's own limit if that is shorter; `train.max_query_tokens`
    does not apply."""
    max_document_tokens: int = Field(256, ge=2)
    """Length in tokens to which documents are cut, or the model's own limit if that is shorter;
    `train.max_document_tokens` does not apply."""
    unit_bytes: int = Field(2 * 2**20, ge=2**10)
    """Bytes of corpus.jsonl that one unit of work embeds and searches."""
    dtype: Literal["auto", "float32", "bfloat16"] = added("auto")
    """Number type that models compute in. `auto`: bfloat16 if the hardware multiplies it, otherwise float32; scores
    differ in the fourth digit. The evaluation's manifest names the type."""
    workers: int = operational(2, ge=1)
    """Processes that embed and search."""
    device: Device = operational("auto")
    """`cpu`, `cuda`, or `auto`: the cluster's GPUs if it has any."""

    @model_validator(mode="after")
    def _depth(self) -> EvaluateConfig:
        for metric in self.metrics:
            cutoff = re.fullmatch(r"\w+@(\d+)", metric)
            if cutoff and int(cutoff[1]) > self.top_k:
                raise ValueError(f"metrics: {metric} looks deeper than top_k ({self.top_k})")
        return self
