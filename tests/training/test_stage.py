"""What the stage refuses before any worker starts: a run that could not be what was asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clusterbatch.batches.loader import SliceLoader
from clusterbatch.config import with_changes
from clusterbatch.errors import UsageError
from clusterbatch.shards.reader import ShardReader
from clusterbatch.shards.tokenise import Tokenisation
from clusterbatch.store.workspace import Workspace
from clusterbatch.training import checks
from clusterbatch.training.stage import train
from clusterbatch.training.worker import open_plan
from tests.training.small_run import small_config, write_clusters


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"train.max_document_tokens": 12}, "train.max_document_tokens"),
        ({"train.max_query_tokens": 8}, "train.max_query_tokens"),
        ({"train.encoder": "static"}, "train.encoder"),
        ({"train.prompts.query": "ask: "}, "train.prompts"),
    ],
)
def test_shards_of_other_tokens_are_refused_by_the_name_of_the_key(
    tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    """Token ids of one model or length mean nothing to another, and training on them raises nothing by itself."""
    config = small_config(tmp_path)
    write_clusters(config, tokens=Tokenisation.of(config).identity)
    with pytest.raises(UsageError, match=rf"{named}.*clusterbatch cluster"):
        train(with_changes(config, changes))


def test_a_limit_beyond_the_models_own_makes_no_difference(tmp_path: Path) -> None:
    """The tiny model has 64 positions."""
    config = small_config(tmp_path, train={"max_document_tokens": 64})
    longer = with_changes(config, {"train.max_document_tokens": 300})
    assert Tokenisation.of(longer).identity == Tokenisation.of(config).identity
    assert Tokenisation.of(config).too_long == []
    assert "train.max_document_tokens: 300" in Tokenisation.of(longer).too_long[0]


@pytest.mark.parametrize("first", [{"steps": 10}, {"epochs": 1}])
def test_a_run_that_would_end_before_the_last_phase_of_its_curriculum_is_refused(
    tmp_path: Path, first: dict[str, int]
) -> None:
    phases = [{**first, "stratify": "random"}, {"stratify": "cluster"}]
    config = small_config(tmp_path, train={"steps": None, "epochs": 1}, batches={"curriculum": phases})
    write_clusters(config)
    with pytest.raises(UsageError, match=r"batches\.curriculum.*train\.epochs"):
        train(config)


def test_more_workers_than_a_batch_has_rows_are_refused(tmp_path: Path) -> None:
    config = small_config(tmp_path, train={"workers": [2, 33]})
    write_clusters(config)
    with pytest.raises(UsageError, match=r"train\.workers: 33 workers.*32 pairs"):
        train(config)


def test_near_copies_of_a_row_are_other_documents_that_nearly_equal_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Random vectors are never nearer.
    monkeypatch.setattr(checks, "_NEARLY_EQUAL", 0.5)
    config = small_config(tmp_path)
    write_clusters(config)
    clusters = Workspace(config).clusters()
    plan, reader = open_plan(config, clusters, clusters.require()), ShardReader(clusters)
    found = []
    # As many steps as are looked at.
    for batch in SliceLoader(plan, reader, 0, 1, 0, 4, vectors=True):
        assert batch.document_vector is not None
        vectors = batch.document_vector.astype(np.float64)
        copies = 0
        for one in range(len(vectors)):
            for other in range(len(vectors)):
                if batch.document_hash[one] != batch.document_hash[other]:
                    cosine = (
                        vectors[one] @ vectors[other] / np.linalg.norm(vectors[one]) / np.linalg.norm(vectors[other])
                    )
                    copies += cosine >= 0.5 and batch.query_hash[one] != batch.query_hash[other]
        found.append(copies / len(vectors))
    assert np.mean(found) > 0
    assert checks.near_copies(plan, reader, 4) == pytest.approx(np.mean(found))


def test_answers_that_repeat_in_clusters_are_said_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(tmp_path)
    write_clusters(config)
    clusters = Workspace(config).clusters()
    made = clusters.require()
    said: list[str] = []
    monkeypatch.setattr(checks, "say", lambda text, **_: said.append(text))

    def warned(copies: float, changes: dict[str, Any]) -> bool:
        monkeypatch.setattr(checks, "near_copies", lambda *_: copies)
        said.clear()
        own = with_changes(config, changes)
        checks.warn_of_copies(own, made, open_plan(own, clusters, made), ShardReader(clusters), 4)
        return bool(said)

    assert warned(2.5, {})
    assert not warned(0.5, {})
    assert not warned(2.5, {"batches.stratify": "source"})
    assert not warned(2.5, {"train.mask.surrogate_margin": -0.05})
