"""The gradient of a global batch, two ways: as the product computes it over W ranks, and by the book.

The reference shares no code with the product: one process, float64, the whole score matrix, torch's own cross entropy.
The first half compares a small encoder of its own in float64, the second a whole step of a transformer in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from clusterbatch.config import TrainConfig
from clusterbatch.encoder.load import load_encoder
from clusterbatch.encoder.tokens import Tokens
from clusterbatch.training.collectives import FlatGradients, GatheredBatch, World
from clusterbatch.training.grad_cache import CachedEmbedding, RandomKey
from clusterbatch.training.loss import ContrastiveLoss
from clusterbatch.training.margin_mse import TeacherMargins
from clusterbatch.training.masks import BatchFacts
from clusterbatch.training.step import TrainingStep
from tests.training.batches import plain_batch
from tests.training.worlds import run_world

VOCABULARY, WIDTH, DIMENSIONS = 97, 12, 8
TEMPERATURE = 0.07
# train.activation_bytes for a tiny transformer: everything fits, part of it, nothing.
KEPT_BYTES = {"all": 2**30, "less": 500_000, "nothing": 0}


class SmallEncoder(nn.Module):
    """Mean of token embeddings through a layer, unit-norm; float64."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.table = nn.Embedding(VOCABULARY, WIDTH, dtype=torch.float64, sparse=True)
        self.layer = nn.Linear(WIDTH, DIMENSIONS, dtype=torch.float64)

    def forward(self, tokens: Tokens) -> Tensor:
        ids = torch.from_numpy(tokens.values.astype(np.int64))
        row = torch.from_numpy(np.repeat(np.arange(len(tokens)), tokens.lengths))
        summed = torch.zeros(len(tokens), WIDTH, dtype=torch.float64).index_add(0, row, self.table(ids))
        mean = summed / torch.from_numpy(tokens.lengths)[:, None]
        return normalize(torch.tanh(self.layer(mean)), dim=1)


@dataclass(frozen=True)
class Batch:
    """A global batch; row i has negatives [bounds[i], bounds[i + 1])."""

    queries: Tokens
    documents: Tokens
    negatives: Tokens
    bounds: np.ndarray
    # Of each negative by the teacher; NaN where it has none.
    margins: np.ndarray
    weight: np.ndarray
    query_hash: np.ndarray
    document_hash: np.ndarray


def make_batch(rows: int, with_negatives: bool) -> Batch:
    """`rows` pairs of which some share their query or their document; one to three hard negatives each."""
    random = np.random.default_rng(11)

    def texts(count: int) -> Tokens:
        return Tokens.from_lists([random.integers(0, VOCABULARY, random.integers(1, 9)).tolist() for _ in range(count)])

    counts = random.integers(1, 4, rows) if with_negatives else np.zeros(rows, np.int64)
    query_hash, document_hash = np.arange(rows) + 100, np.arange(rows) + 900
    query_hash[3], document_hash[5] = query_hash[1], document_hash[2]
    margins = random.uniform(-0.2, 0.8, int(counts.sum()))
    # One of several negatives of a row, and the only one of another.
    margins[random.random(len(margins)) < 0.3] = np.nan
    return Batch(
        queries=texts(rows),
        documents=texts(rows),
        negatives=texts(int(counts.sum())),
        bounds=np.concatenate([[0], np.cumsum(counts)]),
        margins=margins,
        weight=random.uniform(0.2, 2.0, rows),
        query_hash=query_hash,
        document_hash=document_hash,
    )


def ragged_slices(rows: int, size: int) -> np.ndarray:
    """(size + 1,) bounds of slices that differ in size."""
    return np.array([0, *(rows * (rank + 1) // size - rank % 2 for rank in range(size - 1)), rows])


def product_gradient(world: World, batch: Batch, config: TrainConfig) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of the global batch as this rank has them after the reduction."""
    encoder = SmallEncoder()
    loss_module = ContrastiveLoss(config).double()
    parameters = {**dict(encoder.named_parameters()), "log_scale": loss_module.log_scale}
    trainable = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
    gradients = FlatGradients(list(trainable.values()), [encoder.table.weight], world)
    bounds = ragged_slices(len(batch.queries), world.size)
    start, end = bounds[world.rank], bounds[world.rank + 1]
    negative_bounds = batch.bounds[bounds]
    kinds = [batch.queries.slice(start, end), batch.documents.slice(start, end)]
    has_negatives = len(batch.negatives) > 0
    if has_negatives:
        kinds.append(batch.negatives.slice(negative_bounds[world.rank], negative_bounds[world.rank + 1]))
    tokens = Tokens.concatenate(kinds)
    gradients.begin(tokens.values)
    embedding = CachedEmbedding(
        encoder,
        tokens,
        RandomKey(0, 0, world.rank),
        micro_batch_tokens=config.micro_batch_tokens,
        activation_bytes=config.activation_bytes,
    )
    vectors = embedding.vectors.split([len(kind) for kind in kinds])
    facts = BatchFacts(
        query_hash=torch.from_numpy(batch.query_hash),
        document_hash=torch.from_numpy(batch.document_hash),
        negative_hash=torch.arange(len(batch.negatives)) + 5000 if has_negatives else None,
        document_token_hash=torch.from_numpy(batch.document_hash) if has_negatives else None,
    )
    margins = None
    if config.margin_mse:
        row = np.repeat(np.arange(end - start), np.diff(batch.bounds[start : end + 1]))
        mine = batch.margins[negative_bounds[world.rank] : negative_bounds[world.rank + 1]]
        margins = TeacherMargins(torch.from_numpy(row), torch.from_numpy(mine))
    gathered = GatheredBatch(
        world,
        facts,
        np.diff(bounds).tolist(),
        np.diff(negative_bounds).tolist(),
        torch.from_numpy(batch.weight),
        margins,
    )
    loss, _ = loss_module(vectors[0], vectors[1], vectors[2] if has_negatives else None, gathered)
    loss.backward()
    embedding.backward()
    gradients.reduce()
    total = world.sum_(loss.detach().clone())
    return float(total), {name: parameter.grad.clone() for name, parameter in trainable.items()}


def reference_gradient(batch: Batch, config: TrainConfig) -> tuple[float, dict[str, Tensor]]:
    """The same by plain autograd."""
    encoder = SmallEncoder()
    encoder.table.sparse = False
    log_scale = nn.Parameter(torch.tensor(1 / config.temperature, dtype=torch.float64).log().float().double())
    query, document = encoder(batch.queries), encoder(batch.documents)
    negative = encoder(batch.negatives) if len(batch.negatives) else document[:0]
    columns = torch.cat([document, negative])
    rows, scale = len(query), log_scale.exp()
    same = batch.query_hash[:, None] == batch.query_hash[None, :]
    same |= batch.document_hash[:, None] == batch.document_hash[None, :]
    np.fill_diagonal(same, False)
    duplicate = torch.from_numpy(same)
    weight = torch.from_numpy(batch.weight / batch.weight.sum())

    def entropy(first: Tensor, second: Tensor, extra: Tensor | None = None) -> Tensor:
        logits = first @ second.T * scale
        logits = torch.cat([logits[:, :rows].masked_fill(duplicate, -torch.inf), logits[:, rows:]], 1)
        if extra is not None:
            logits = torch.cat([logits, extra], 1)
        return (cross_entropy(logits, torch.arange(rows), reduction="none") * weight).sum()

    extra = None
    if "query_to_query" in config.directions:
        extra = (query @ query.T * scale).masked_fill(duplicate | torch.eye(rows, dtype=torch.bool), -torch.inf)
    loss = entropy(query, columns, extra)
    if "document_to_query" in config.directions:
        loss = (loss + entropy(document, query)) / 2
    if config.margin_mse:
        loss = loss + config.margin_mse * _margin_loss(batch, query, document, negative, weight)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in encoder.named_parameters()}
    if config.learn_temperature:
        gradients["log_scale"] = log_scale.grad
    return loss.item(), gradients


def _margin_loss(batch: Batch, query: Tensor, document: Tensor, negative: Tensor, weight: Tensor) -> Tensor:
    total = query.new_zeros(())
    for row in range(len(query)):
        own = [n for n in range(batch.bounds[row], batch.bounds[row + 1]) if not np.isnan(batch.margins[n])]
        for n in own:
            student = query[row] @ document[row] - query[row] @ negative[n]
            total = total + weight[row] / len(own) * ((student - batch.margins[n]) / TEMPERATURE) ** 2
    return total


@dataclass(frozen=True)
class Parity:
    """One row of the table; errors are relative to the reference's norm."""

    ranks: int
    backward: str
    data: str
    directions: str
    loss_error: float
    gradient_error: float


def parity_table(sizes: tuple[int, ...] = (1, 2, 4), rows: int = 23) -> list[Parity]:
    """W x direct, cached x pairs, hard negatives, those with margins x one direction, all directions."""
    cases = []
    for data, margin_mse in (("pairs", 0.0), ("hard negatives", 0.0), ("margins", 0.3)):
        batch = make_batch(rows, with_negatives=data != "pairs")
        for directions in (["query_to_document"], ["query_to_document", "document_to_query", "query_to_query"]):
            for backward, activation_bytes in (("direct", 2**30), ("cached", 0)):
                config = TrainConfig(
                    temperature=TEMPERATURE,
                    learn_temperature=True,
                    directions=directions,
                    margin_mse=margin_mse,
                    micro_batch_tokens=64,
                    activation_bytes=activation_bytes,
                )
                cases.append((batch, config, backward, data))
    table = []
    for size in sizes:
        # One world for all cases: starting processes is what costs here.
        ranks = run_world(size, _all_gradients, [(batch, config) for batch, config, _, _ in cases])
        for number, (batch, config, backward, data) in enumerate(cases):
            loss, gradients = reference_gradient(batch, config)
            errors = [_error(rank[number][1], gradients) for rank in ranks]
            table.append(
                Parity(
                    ranks=size,
                    backward=backward,
                    data=data,
                    directions="all" if len(config.directions) > 1 else "q->d",
                    loss_error=max(abs(rank[number][0] - loss) / abs(loss) for rank in ranks),
                    gradient_error=max(errors),
                )
            )
    return table


def _all_gradients(world: World, cases: list[tuple[Batch, TrainConfig]]) -> list[tuple[float, dict[str, Tensor]]]:
    results = [product_gradient(world, batch, config) for batch, config in cases]
    return [(loss, {name: gradient.numpy() for name, gradient in found.items()}) for loss, found in results]


def _error(found: dict[str, np.ndarray], wanted: dict[str, Tensor]) -> float:
    assert found.keys() == wanted.keys()
    difference = sum(float(((found[name] - wanted[name].numpy()) ** 2).sum()) for name in wanted)
    norm = sum(float((wanted[name] ** 2).sum()) for name in wanted)
    return (difference / norm) ** 0.5


TransformerTexts = tuple[list[list[int]], list[list[int]]]


def transformer_texts(vocabulary: int, rows: int = 12, *, with_empty: bool = True) -> TransformerTexts:
    """Return token ids of queries and documents: short and long ones, some of one length, and some without any."""
    random = np.random.default_rng(5)

    def texts(lengths: np.ndarray) -> list[list[int]]:
        return [random.integers(vocabulary // 2, vocabulary, length).tolist() for length in lengths]

    queries, documents = random.integers(1, 6, rows), random.integers(1, 100, rows)
    queries[3], documents[[4, 5, 6]] = int(not with_empty), [int(not with_empty), 70, 70]
    return texts(queries), texts(documents)


def transformer_step(world: World, folder: str, config: TrainConfig, texts: TransformerTexts) -> dict[str, np.ndarray]:
    """Return the gradients of a global batch as this rank has them after a step, by the names of checkpoints."""
    encoder = load_encoder(folder, "backbone")
    training = TrainingStep(encoder, config, 1, world)
    assert encoder.unpadded
    bounds = ragged_slices(len(texts[0]), world.size)
    start, end = bounds[world.rank], bounds[world.rank + 1]
    number = np.arange(start, end, dtype=np.uint64)
    batch = plain_batch(0, *(Tokens.from_lists(part[start:end]) for part in texts), number, np.diff(bounds))
    result = training.run(batch)
    assert result.padded_tokens == result.tokens
    return {name: parameter.grad.numpy().copy() for name, parameter in training.trainable.items()}


def transformer_reference(folder: str, texts: TransformerTexts) -> dict[str, Tensor]:
    """Return the same by plain autograd in float64, one text at a time."""
    encoder = load_encoder(folder, "backbone", dtype=torch.float64)
    padding = encoder.tokenizer.padding

    def vectors(lists: list[list[int]]) -> Tensor:
        found = []
        for ids in lists:
            states = encoder.backbone(input_ids=torch.tensor([ids or [padding]])).last_hidden_state[0]
            pooled = {"mean": states.mean(0), "cls": states[0], "lasttoken": states[-1]}[encoder.pooling]
            found.append(normalize(pooled, dim=0))
        return torch.stack(found)

    logits = vectors(texts[0]) @ vectors(texts[1]).T / TEMPERATURE
    cross_entropy(logits, torch.arange(len(logits))).backward()
    return {f"encoder.{name}": weight.grad for name, weight in encoder.named_parameters() if weight.requires_grad}


def transformer_config(**changes: Any) -> TrainConfig:
    """Return settings under which a step is what `transformer_reference` computes; several micro-batches."""
    settings = {
        "encoder": "backbone",
        "temperature": TEMPERATURE,
        "dropout": 0.0,
        "precision": "float32",
        "clip_norm": None,
        "micro_batch_tokens": 128,
        "mask": {"duplicates": False},
    }
    return TrainConfig.model_validate({**settings, **changes})


def largest_parameter_error(found: dict[str, np.ndarray], wanted: dict[str, Tensor]) -> float:
    """Return the largest error of a parameter's gradient as a share of its norm, or of .01 of the largest norm."""
    assert found.keys() == wanted.keys()
    norms = {name: float(gradient.norm()) for name, gradient in wanted.items()}
    least = 0.01 * max(norms.values())
    return max(float(np.linalg.norm(found[name] - wanted[name].numpy())) / max(norms[name], least) for name in wanted)


def transformer_parity(folder: str, sizes: tuple[int, ...] = (1, 2, 4)) -> dict[tuple[int, str], float]:
    """Return `largest_parameter_error` over all ranks by their number and by what is kept for the backward pass."""
    texts = transformer_texts(load_encoder(folder).tokenizer.vocabulary)
    wanted = transformer_reference(folder, texts)
    errors = {}
    for size in sizes:
        for kept, activation_bytes in KEPT_BYTES.items():
            config = transformer_config(activation_bytes=activation_bytes)
            ranks = run_world(size, transformer_step, folder, config, texts)
            errors[size, kept] = max(largest_parameter_error(rank, wanted) for rank in ranks)
    return errors
