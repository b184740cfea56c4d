"""Masks and distillation by a teacher's scores, at any number of ranks, against a dense computation in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import log_softmax, normalize

from clusterbatch.batches.loader import TeacherScores
from clusterbatch.config import MaskConfig, TrainConfig, load_config
from clusterbatch.encoder.tokens import Tokens
from clusterbatch.errors import UsageError
from clusterbatch.training.collectives import World, gather_batch
from clusterbatch.training.loss import ContrastiveLoss
from clusterbatch.training.masks import IGNORED, Relation
from tests.training.batches import plain_batch
from tests.training.worlds import run_world

_ROWS, _SIZE = 24, 6
_NEGATIVES = np.array([(row * 7) % 3 for row in range(_ROWS)])
_TEMPERATURE = 0.07
_ALL = ["query_to_document", "document_to_query", "query_to_query"]
MASKS = {
    "absolute": {"teacher_margin": -0.1},
    "relative": {"teacher_margin": -0.2, "teacher_relative": True},
    "ranks": {"teacher_ranks": 2},
    "both": {"teacher_margin": 0.05, "teacher_ranks": 1},
}
LOSSES = {
    "masked": {"mask": MASKS["absolute"]},
    "masked both ways": {"mask": MASKS["both"], "directions": _ALL},
    "kl": {"teacher_kl": 0.4, "teacher_scale": 0.5},
    "margins": {"margin_mse": 0.3, "teacher_scale": 2.0},
    "all": {"teacher_kl": 0.4, "margin_mse": 0.3, "mask": MASKS["relative"], "directions": _ALL},
}


class _Data:
    """A global batch: two rows share a document, lists name documents inside and outside of the batch."""

    def __init__(self) -> None:
        random = np.random.default_rng(4)
        total = int(_NEGATIVES.sum())
        # The top bit is set in some: hashes are unsigned.
        self.document = np.arange(_ROWS).astype(np.uint64) + np.uint64(2**63 - 10)
        self.document[9] = self.document[4]
        self.negative = random.integers(1, 2**64, total, dtype=np.uint64)
        # The negative of one row is the document of another.
        self.negative[2] = self.document[17]
        self.bounds = np.concatenate([[0], np.cumsum(_NEGATIVES)])
        self.positive = random.uniform(-0.2, 0.9, _ROWS).astype(np.float32)
        known = np.unique(np.concatenate([self.document, self.negative, np.arange(5, dtype=np.uint64)]))
        # By row: score by document; some rows have none.
        self.scores: list[dict[int, np.float32]] = []
        for row in range(_ROWS):
            some = random.permutation(known)[: 0 if row % 6 == 5 else random.integers(3, 14)].tolist()
            of_row = {name: np.float32(random.uniform(-0.3, 0.9)) for name in some if name != int(self.document[row])}
            self.scores.append(of_row)
        generator = torch.Generator().manual_seed(3)
        vectors = torch.randn(2 * _ROWS + total, _SIZE, generator=generator, dtype=torch.float64)
        self.vectors = normalize(vectors, dim=1).split([_ROWS, _ROWS, total])

    @property
    def columns(self) -> list[int]:
        return [*self.document.tolist(), *self.negative.tolist()]

    def slice(self, rows: slice) -> TeacherScores:
        lists = [sorted(each.items(), key=lambda item: (-item[1], item[0])) for each in self.scores[rows]]
        return TeacherScores(
            self.positive[rows],
            np.array([len(each) for each in lists]),
            np.array([name for each in lists for name, _ in each], np.uint64),
            np.array([score for each in lists for _, score in each], np.float32),
            self.negative[self.bounds[rows.start] : self.bounds[rows.stop]],
        )

    def answers(self, mask: dict[str, Any]) -> np.ndarray:
        """(rows, columns) bool, computed densely in float64."""
        found = np.zeros((_ROWS, len(self.columns)), bool)
        for row, scores in enumerate(self.scores):
            positive = np.float64(self.positive[row])
            ranked = sorted(scores, key=lambda name: (-scores[name], name))
            for column, name in enumerate(self.columns):
                if name not in scores:
                    continue
                found[row, column] = ranked.index(name) < mask.get("teacher_ranks", 0)
                if "teacher_margin" in mask:
                    factor = abs(positive) if mask.get("teacher_relative") else 1.0
                    found[row, column] |= np.float64(scores[name]) > positive + mask["teacher_margin"] * factor
        return found


def _bounds(size: int) -> np.ndarray:
    bounds = np.linspace(0, _ROWS, size + 1).astype(int)
    bounds[1:-1] += 1
    return bounds


def _gathered(world: World, data: _Data, config: TrainConfig) -> tuple[slice, Any]:
    bounds = _bounds(world.size)
    own = slice(int(bounds[world.rank]), int(bounds[world.rank + 1]))
    rows = np.arange(_ROWS)[own]
    tokens = Tokens.from_lists([[int(row)] for row in rows])
    negatives = data.negative[data.bounds[own.start] : data.bounds[own.stop]]
    batch = replace(
        plain_batch(0, tokens, tokens, rows, np.diff(bounds).tolist()),
        document_hash=data.document[own],
        negative_tokens=Tokens.from_lists([[int(name % 90_000) + 100] for name in negatives]),
        negative_counts=_NEGATIVES[own],
        teacher=data.slice(own),
    )
    return own, gather_batch(batch, world, torch.device("cpu"), config)


def _masked(world: World) -> list[np.ndarray]:
    data, found = _Data(), []
    for mask in MASKS.values():
        config = TrainConfig(mask={**mask, "duplicates": False}, directions=_ALL)
        own, gathered = _gathered(world, data, config)
        relation = Relation(config.mask, gathered.facts)
        scores = torch.zeros(own.stop - own.start, _ROWS)
        # In blocks, as large batches are.
        middle = own.start + 3
        blocks = [slice(own.start, middle), slice(middle, own.stop)]
        pairs = torch.cat([relation.block(rows, slice(0, _ROWS), scores[: rows.stop - rows.start]) for rows in blocks])
        total = int(_NEGATIVES.sum())
        zeros = torch.zeros(own.stop - own.start, total)
        negatives = relation.block(own, slice(_ROWS, _ROWS + total), zeros)
        # Queries of every rank against this rank's documents.
        others = relation.block(slice(0, _ROWS), own, torch.zeros(_ROWS, own.stop - own.start))
        found += [(torch.cat([pairs, negatives], 1) == IGNORED).numpy(), (others == IGNORED).numpy()]
    return found


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_mask_is_that_of_a_dense_computation(size: int) -> None:
    data, ranks = _Data(), run_world(size, _masked)
    for number, mask in enumerate(MASKS.values()):
        expected = data.answers(mask)
        assert 0 < expected.sum() < expected.size / 2
        assert np.array_equal(np.concatenate([rank[2 * number] for rank in ranks]), expected)
        others = np.concatenate([rank[2 * number + 1] for rank in ranks], axis=1)
        assert np.array_equal(others, expected[:, :_ROWS])


def _losses(world: World) -> list[tuple[float, list[np.ndarray]]]:
    data, found = _Data(), []
    for settings in LOSSES.values():
        config = _config(settings)
        own, gathered = _gathered(world, data, config)
        bounds = slice(data.bounds[own.start], data.bounds[own.stop])
        parts = [data.vectors[0][own], data.vectors[1][own], data.vectors[2][bounds]]
        query, document, negative = (vectors.clone().requires_grad_() for vectors in parts)
        loss, _ = ContrastiveLoss(config).double()(query, document, negative, gathered)
        loss.backward()
        found.append((loss.item(), [query.grad.numpy(), document.grad.numpy(), negative.grad.numpy()]))
    return found


def _config(settings: dict[str, Any]) -> TrainConfig:
    mask = {**settings.get("mask", {}), "duplicates": False}
    return TrainConfig(temperature=_TEMPERATURE, **{**settings, "mask": mask})


def _reference(data: _Data, settings: dict[str, Any]) -> tuple[float, list[Tensor]]:
    config = _config(settings)
    query, document, negative = (vectors.clone().requires_grad_() for vectors in data.vectors)
    columns = torch.cat([document, negative])
    cosines = query @ columns.T
    scale = float(torch.tensor(1 / _TEMPERATURE).log().double().exp())
    answers = torch.from_numpy(data.answers(settings.get("mask", {})))
    # A row's own document is its positive, whatever else is masked.
    answers[torch.arange(_ROWS), torch.arange(_ROWS)] = False
    logits = (cosines * scale).masked_fill(answers, -torch.inf)
    total = torch.zeros((), dtype=torch.float64)
    others = query @ query.T * scale
    for row in range(_ROWS):
        candidates = [logits[row]]
        if "query_to_query" in config.directions:
            candidates.append(torch.cat([others[row, :row], others[row, row + 1 :]]))
        loss = torch.cat(candidates).logsumexp(0) - logits[row, row]
        if "document_to_query" in config.directions:
            loss = (loss + logits[:, row].logsumexp(0) - logits[row, row]) / 2
        known = [data.columns.index(name) for name in data.scores[row] if name in data.columns]
        if known and config.margin_mse:
            for column in known:
                student = cosines[row, row] - cosines[row, column]
                score = data.scores[row][data.columns[column]]
                teacher = config.teacher_scale * (float(data.positive[row]) - float(score))
                loss = loss + config.margin_mse / len(known) * ((student - teacher) / _TEMPERATURE) ** 2
        if known and config.teacher_kl:
            of_teacher = [float(data.positive[row]), *(float(data.scores[row][data.columns[c]]) for c in known)]
            wanted = log_softmax(torch.tensor(of_teacher, dtype=torch.float64) * config.teacher_scale / _TEMPERATURE, 0)
            student = log_softmax(torch.stack([cosines[row, c] for c in (row, *known)]) / _TEMPERATURE, 0)
            loss = loss + config.teacher_kl * (wanted.exp() * (wanted - student)).sum()
        total = total + loss / _ROWS
    total.backward()
    return total.item(), [query.grad, document.grad, negative.grad]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_losses_and_gradients_are_those_of_a_dense_computation(size: int) -> None:
    data, ranks = _Data(), run_world(size, _losses)
    for number, settings in enumerate(LOSSES.values()):
        loss, gradients = _reference(data, settings)
        assert sum(rank[number][0] for rank in ranks) == pytest.approx(loss, rel=1e-6)
        for kind, expected in enumerate(gradients):
            found = np.concatenate([rank[number][1][kind] for rank in ranks])
            assert np.allclose(found, expected.numpy(), rtol=1e-5, atol=1e-7)


def test_nothing_is_read_or_changed_without_a_teacher() -> None:
    config = load_config(None, ["workspace=/none"])
    assert not config.needs_teacher
    assert not {"teacher_kl", "teacher_scale"} & config.train.identity().keys()
    assert not {"teacher_margin", "teacher_relative", "teacher_ranks"} & MaskConfig().identity().keys()
    for key in ("train.mask.teacher_margin=-0.1", "train.mask.teacher_ranks=3", "train.teacher_kl=1"):
        with pytest.raises(UsageError, match=rf"{key.split('=')[0]} needs score\.teacher"):
            load_config(None, ["workspace=/none", key])
        assert load_config(None, ["workspace=/none", "score.teacher=some", key]).needs_teacher
    with pytest.raises(UsageError, match=r"score\.nearest needs the surrogate's vectors"):
        load_config(None, ["workspace=/none", "score.teacher=some", "cluster.surrogate=none"])
