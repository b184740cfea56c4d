"""The fast trainer of the study of batch sizes ends where this project's own training takes the same batches."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("numba", reason="the fast trainer is compiled (pip install '.[bench]')")

from clusterbatch.config import MaskConfig, TrainConfig
from clusterbatch.encoder.load import load_encoder
from clusterbatch.encoder.tokens import Tokens
from clusterbatch.training.collectives import World
from clusterbatch.training.step import TrainingStep
from tests.benchmarks.grid_masks import Known, kept_of_batches
from tests.benchmarks.static_trainer import Pairs, encode, rates_of, train
from tests.training.batches import plain_batch
from tests.training.small_run import VOCABULARY, tiny_model

_STEPS, _PAIRS, _BATCH = 150, 60, 12


def _pairs() -> Pairs:
    """Pairs of which some share a query or a document; rare tokens wait for their moves."""
    random = np.random.default_rng(4)
    share = np.geomspace(1, 0.01, VOCABULARY - 5)
    texts = [
        [5 + random.choice(VOCABULARY - 5, random.integers(2, 7), p=share / share.sum()) for _ in range(_PAIRS)]
        for _ in range(2)
    ]
    vectors = random.standard_normal((2, _PAIRS, 6)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=2, keepdims=True)
    hashes = [np.arange(_PAIRS, dtype=np.uint64) // each for each in (4, 3)]
    return Pairs(*(Tokens.from_lists(each, np.int32) for each in texts), *hashes, *vectors)


@pytest.mark.parametrize("margin", [None, -0.05])
def test_ends_with_the_weights_of_the_training_step(tmp_path: Path, margin: float | None) -> None:
    encoder, pairs = load_encoder(tiny_model(tmp_path / "tiny"), "static"), _pairs()
    table = encoder.backbone.weight.detach().numpy().copy()
    random = np.random.default_rng(5)
    batches = np.array([random.choice(_PAIRS, _BATCH, replace=False) for _ in range(_STEPS)])
    mask = MaskConfig(surrogate_margin=margin, surrogate_relative=True)
    config = TrainConfig(encoder="static", learning_rate=5e-3, mask=mask)
    training = TrainingStep(encoder, config, _STEPS, World())
    losses = []
    for step, rows in enumerate(batches):
        batch = replace(
            plain_batch(step, pairs.query.take(rows), pairs.document.take(rows)),
            query_hash=pairs.query_hash[rows],
            document_hash=pairs.document_hash[rows],
            query_vector=pairs.query_vector[rows],
            document_vector=pairs.document_vector[rows],
        )
        losses.append(training.run(batch).loss)
    kept = None if margin is None else kept_of_batches(pairs, batches, mask, Known())[0]
    found, own_losses = train(table, pairs, batches, rates_of(5e-3, _STEPS), kept=kept)
    wanted = encoder.backbone.weight.detach().numpy()
    moved = np.abs(wanted - table)
    assert moved.max() > 0.05
    # AdamW moves a weight by the sign of its gradient: where that is near zero, rounding shows.
    apart = np.abs(found - wanted) / moved.max()
    assert np.quantile(apart, 0.99) < 2e-3
    assert apart.max() < 2e-2
    np.testing.assert_allclose(own_losses, losses, rtol=1e-2, atol=1e-3)
    vectors = encoder.encode(pairs.document, 4096)
    np.testing.assert_allclose(encode(wanted, pairs.document), vectors, atol=1e-6)
