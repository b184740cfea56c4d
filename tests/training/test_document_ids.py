"""The loss of a batch with rows that are no negatives of each other, at any number of ranks, against a dense one.

They are chunks of one document, or semantic duplicates; the reference is in float64.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from clusterbatch.config import TrainConfig
from clusterbatch.encoder.tokens import Tokens
from clusterbatch.training.collectives import World, gather_batch
from clusterbatch.training.loss import ContrastiveLoss
from tests.training.batches import plain_batch
from tests.training.worlds import run_world

_ROWS = 12
_CONFIG = TrainConfig(directions=["query_to_document", "document_to_query", "query_to_query"])
_DOCUMENTS = np.array([1, 1, 2, 3, 1, 4, 5, 3, 6, 7, 8, 2], np.uint64)


def _vectors() -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(3)
    query, document = torch.randn(2, _ROWS, 6, generator=random, dtype=torch.float64)
    return normalize(query, dim=1), normalize(document, dim=1)


def _loss_and_gradients(world: World, key: str) -> tuple[float, np.ndarray, np.ndarray]:
    bounds = np.linspace(0, _ROWS, world.size + 1).astype(int)
    bounds[1:-1] += 1
    own = slice(bounds[world.rank], bounds[world.rank + 1])
    number = np.arange(_ROWS, dtype=np.uint64)[own]
    tokens = Tokens.from_lists([np.array([1])] * len(number), np.uint8)
    batch = plain_batch(0, tokens, tokens, number, np.diff(bounds))
    batch = replace(batch, **{key: _DOCUMENTS[own]})
    query, document = (vectors[own].clone().requires_grad_() for vectors in _vectors())
    gathered = gather_batch(batch, world, torch.device("cpu"), TrainConfig())
    loss, _ = ContrastiveLoss(_CONFIG).double()(query, document, None, gathered)
    loss.backward()
    return float(loss.detach()), query.grad.numpy(), document.grad.numpy()


def _reference() -> tuple[float, Tensor, Tensor]:
    query, document = (vectors.clone().requires_grad_() for vectors in _vectors())
    identity = torch.from_numpy(_DOCUMENTS.astype(np.int64))
    other = identity[:, None] != identity[None, :]
    scale = float(torch.tensor(1 / _CONFIG.temperature).log().double().exp())
    total = torch.zeros((), dtype=torch.float64)
    for row in range(_ROWS):
        own = scale * (query[row] @ document[row])
        kept = other[row]
        to_documents = torch.cat([own[None], scale * (document[kept] @ query[row]), scale * (query[kept] @ query[row])])
        to_queries = torch.cat([own[None], scale * (query[kept] @ document[row])])
        total = total + (to_documents.logsumexp(0) + to_queries.logsumexp(0)) / 2 - own
    loss = total / _ROWS
    loss.backward()
    return float(loss.detach()), query.grad, document.grad


@pytest.mark.parametrize("key", ["document_id_hash", "duplicate_group"])
def test_rows_of_one_key_are_left_out_at_any_number_of_ranks(key: str) -> None:
    loss, query, document = _reference()
    for size in (1, 2, 4):
        results = run_world(size, _loss_and_gradients, key)
        assert abs(sum(result[0] for result in results) - loss) < 1e-9
        np.testing.assert_allclose(np.concatenate([result[1] for result in results]), query, atol=1e-9)
        np.testing.assert_allclose(np.concatenate([result[2] for result in results]), document, atol=1e-9)
