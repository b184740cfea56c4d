"""`train.negatives` at any number of ranks against a dense loss in float64, and what of it is refused."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from clusterbatch.batches.loader import SliceLoader
from clusterbatch.batches.negatives import BOTH, HARD, IN_BATCH, NegativeChoice
from clusterbatch.config import TrainConfig, load_config, with_changes
from clusterbatch.errors import UsageError
from clusterbatch.shards.reader import ShardReader
from clusterbatch.shards.stage import cluster
from clusterbatch.store.workspace import Workspace
from clusterbatch.training.checks import check_negatives
from clusterbatch.training.collectives import World, gather_batch
from clusterbatch.training.grad_cache import CachedEmbedding, RandomKey
from clusterbatch.training.loss import ContrastiveLoss, LossStatistics
from clusterbatch.training.worker import open_plan
from tests.clustering.embedded import embedded_workspace
from tests.training.batches import plain_batch
from tests.training.parity import Batch, SmallEncoder, make_batch, ragged_slices
from tests.training.worlds import run_world

_DIRECTIONS = ["query_to_document", "document_to_query", "query_to_query"]


@dataclass(frozen=True)
class Case:
    """A global batch, the mode of each of its rows, and how much of the graph is kept."""

    batch: Batch
    mode: np.ndarray
    activation_bytes: int
    directions: tuple[str, ...]

    @property
    def config(self) -> TrainConfig:
        return TrainConfig(temperature=0.07, directions=list(self.directions), micro_batch_tokens=64)


def _cases() -> list[Case]:
    batch = make_batch(15, with_negatives=True)
    mixed = np.array([BOTH, HARD, IN_BATCH] * 5, np.uint8)
    modes = [np.full(15, mode, np.uint8) for mode in (IN_BATCH, HARD)] + [mixed]
    return [
        Case(batch, mode, kept, tuple(directions))
        for mode in modes
        for kept in (2**30, 0)
        for directions in (_DIRECTIONS[:1], _DIRECTIONS)
    ]


def _taken(case: Case) -> np.ndarray:
    """Return the numbers of the negatives that the loader would have left in."""
    counts = np.diff(case.batch.bounds)
    return np.flatnonzero(np.repeat(case.mode != IN_BATCH, counts))


def _product(world: World, case: Case) -> tuple[float, dict[str, np.ndarray], np.ndarray]:
    encoder, batch = SmallEncoder(), case.batch
    bounds = ragged_slices(len(batch.queries), world.size)
    start, end = bounds[world.rank], bounds[world.rank + 1]
    owner = np.repeat(np.arange(len(batch.queries)), np.diff(batch.bounds))
    taken = [number for number in _taken(case) if start <= owner[number] < end]
    kinds = [
        batch.queries.slice(start, end),
        batch.documents.slice(start, end),
        batch.negatives.take(np.array(taken, int)),
    ]
    slice_batch = replace(
        plain_batch(0, kinds[0], kinds[1], np.arange(start, end), np.diff(bounds)),
        query_hash=batch.query_hash[start:end].astype(np.uint64),
        document_hash=batch.document_hash[start:end].astype(np.uint64),
        weight=batch.weight[start:end],
        negative_tokens=kinds[2],
        negative_counts=np.bincount(owner[taken], minlength=len(batch.queries))[start:end]
        if taken
        else np.zeros(end - start, int),
        mode=case.mode[start:end],
    )
    embedding = CachedEmbedding(
        encoder,
        type(batch.queries).concatenate(kinds),
        RandomKey(0, 0, world.rank),
        micro_batch_tokens=64,
        activation_bytes=case.activation_bytes,
    )
    vectors = embedding.vectors.split([len(kind) for kind in kinds])
    gathered = gather_batch(slice_batch, world, torch.device("cpu"), case.config)
    loss, statistics = ContrastiveLoss(case.config).double()(*vectors, gathered)
    loss.backward()
    embedding.backward()
    gradients = {name: parameter.grad.to_dense().numpy() for name, parameter in encoder.named_parameters()}
    return float(loss.detach()), gradients, statistics.stack().numpy()


def _reference(case: Case) -> tuple[float, dict[str, Tensor], int]:
    """Return loss, gradients and the number of candidates that are not positive, row by row and by plain autograd."""
    encoder, batch, mode = SmallEncoder(), case.batch, case.mode
    encoder.table.sparse = False
    query, document, negative = (encoder(texts) for texts in (batch.queries, batch.documents, batch.negatives))
    owner = np.repeat(np.arange(len(query)), np.diff(batch.bounds))
    scale = float(torch.tensor(1 / 0.07).log().double().exp())
    weight = batch.weight / batch.weight.sum()
    hashes = batch.negatives.hashes, batch.documents.hashes
    asking = [np.flatnonzero(batch.query_hash == each) for each in batch.query_hash]

    def loss_of(row: int, anchor: Tensor, own: Tensor, candidates: list[Tensor]) -> Tensor:
        logits = torch.stack([anchor @ own, *(anchor @ each for each in candidates)]) * scale
        return weight[row] * (logits.logsumexp(0) - logits[0])

    total, backward, considered = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64), 0
    for row in range(len(query)):
        others = [
            other
            for other in range(len(query))
            if batch.query_hash[other] != batch.query_hash[row]
            and batch.document_hash[other] != batch.document_hash[row]
        ]
        others = [] if mode[row] == HARD else others
        hard = [
            number
            for number in range(len(negative))
            if mode[owner[number]] != IN_BATCH and (mode[row] == BOTH or (mode[row] == HARD and owner[number] == row))
        ]
        considered += len(hard) + (0 if mode[row] == HARD else len(query) - 1)
        answers = set(hashes[1][asking[row]].tolist())
        hard = [number for number in hard if int(hashes[0][number]) not in answers]
        queries = [query[other] for other in others] if "query_to_query" in case.directions else []
        considered += (0 if mode[row] == HARD else len(query)) if "query_to_query" in case.directions else 0
        candidates = [document[other] for other in others] + [negative[number] for number in hard] + queries
        total = total + loss_of(row, query[row], document[row], candidates)
        backward = backward + loss_of(row, document[row], query[row], [query[other] for other in others])
    loss = (total + backward) / 2 if "document_to_query" in case.directions else total
    loss.backward()
    return float(loss.detach()), {name: each.grad for name, each in encoder.named_parameters()}, considered


def _all(world: World, cases: list[Case]) -> list[tuple[float, dict[str, np.ndarray], np.ndarray]]:
    return [_product(world, case) for case in cases]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_loss_is_the_dense_one_at_any_number_of_ranks(size: int) -> None:
    cases = _cases()
    ranks = run_world(size, _all, cases)
    for number, case in enumerate(cases):
        loss, gradients, considered = _reference(case)
        assert sum(rank[number][0] for rank in ranks) == pytest.approx(loss, rel=1e-9)
        for name, wanted in gradients.items():
            found = sum(rank[number][1][name] for rank in ranks)
            np.testing.assert_allclose(found, wanted.numpy(), atol=1e-9)
        fields = list(LossStatistics.__dataclass_fields__)
        assert sum(rank[number][2][fields.index("considered")] for rank in ranks) == considered


def test_hard_without_any_is_refused_with_the_configuration() -> None:
    for choice in ("hard", "{one: hard}"):
        with pytest.raises(UsageError, match=r"train\.negatives: hard needs corpus\.columns\.negatives or mine"):
            load_config(None, ["workspace=/none", f"train.negatives={choice}"])
    with pytest.raises(UsageError, match="margin_mse compares hard negatives"):
        load_config(
            None,
            ["workspace=/n", "mine.negatives=1", "mine.margins=true", "train.margin_mse=1", "train.negatives=in_batch"],
        )
    # A teacher scores the documents of the batch as well.
    load_config(
        None, ["workspace=/n", "score.teacher=all-MiniLM-L6-v2", "train.margin_mse=1", "train.negatives=in_batch"]
    )


def test_the_default_leaves_fingerprints_alone() -> None:
    assert "negatives" not in TrainConfig().identity()
    assert TrainConfig(negatives={"one": "hard"}).identity()["negatives"] == {"one": "hard"}


@pytest.mark.usefixtures("in_process")
def test_sources_train_with_what_they_are_told_to(tmp_path: Path) -> None:
    settings = {
        "corpus": {"columns": {"negatives": "negatives"}},
        "cluster": {"mean_size": 40, "run_rows": 8, "device": "cpu"},
        "batches": {"size": 16},
        "train": {"negatives": {"wiki": "hard", "forum": "in_batch"}},
    }
    config = embedded_workspace(str(tmp_path), {"forum": 120, "wiki": 90}, optional=["negatives"], settings=settings)
    manifest = cluster(config)
    artifact = Workspace(config).clusters()
    # Batches of both sources.
    config = with_changes(config, {"batches.stratify": "random"})
    plan, reader = open_plan(config, artifact, manifest), ShardReader(artifact)
    choice = NegativeChoice.of(config.train, plan.index)
    check_negatives(config, artifact, manifest, plan.index)
    names = np.array(plan.index.sources)
    lists = dict.fromkeys(names, 0)
    for step in range(plan.steps_per_epoch):
        batch = plan.batch(step)
        (read,) = SliceLoader(plan, reader, 0, 1, step, step + 1, negatives=choice)
        (whole,) = SliceLoader(plan, reader, 0, 1, step, step + 1)
        source = names[plan.index.source[batch.piece]]
        wanted = np.where(source == "forum", 0, whole.negative_counts)
        assert read.negative_counts.tolist() == wanted.tolist()
        owner = np.repeat(np.arange(len(batch)), whole.negative_counts)
        kept = np.flatnonzero(source[owner] == "wiki")
        assert read.negative_tokens.hashes.tolist() == whole.negative_tokens.hashes[kept].tolist()
        assert read.mode.tolist() == np.where(source == "wiki", HARD, IN_BATCH).tolist()
        for name in names:
            lists[name] += int(read.negative_counts[source == name].sum())
    assert lists["forum"] == 0 < lists["wiki"]


@pytest.mark.usefixtures("in_process")
def test_a_source_without_hard_negatives_or_of_another_name_is_refused(tmp_path: Path) -> None:
    settings = {"cluster": {"mean_size": 40, "device": "cpu"}, "corpus": {"columns": {"negatives": "negatives"}}}
    # Every fourth row has none, and so all rows of this source.
    rows = {"forum": 120, "wiki": 90}
    config = embedded_workspace(
        str(tmp_path), rows, optional=["negatives"], settings=settings, without_negatives=["wiki"]
    )
    manifest = cluster(config)
    artifact = Workspace(config).clusters()
    index = ShardReader(artifact).index
    for negatives, message in (
        ("hard", "the source wiki has no hard negatives"),
        ({"wiki": "hard"}, "the source wiki has no hard negatives"),
        ({"wiky": "hard"}, r"train\.negatives\.wiky: the shards have no such source"),
    ):
        changed = config.model_copy(update={"train": config.train.model_copy(update={"negatives": negatives})})
        with pytest.raises(UsageError, match=message):
            check_negatives(changed, artifact, manifest, index)
    check_negatives(
        config.model_copy(update={"train": config.train.model_copy(update={"negatives": {"forum": "hard"}})}),
        artifact,
        manifest,
        index,
    )
