"""What the stage refuses before any worker starts: a run that could not be what was asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from clusterbatch.config import BatchesConfig, with_changes
from clusterbatch.errors import UsageError
from clusterbatch.shards.tokenise import Tokenisation
from clusterbatch.training.stage import expected_gain, train
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


@pytest.mark.parametrize(
    ("batches", "rows", "source", "said"),
    [
        ({"size": 256}, 1024, 12_000, "batches of 256 pairs"),
        ({"size": 1024}, None, 12_000, "batches of 1,024 pairs"),
        ({"size": 1024}, None, 99_999, "the largest has 99,999 pairs"),
        ({"size": 1024}, None, 102_400, None),
        ({"size": 128}, 512, 12_000, "batches of 128 pairs"),
        ({"size": 128}, 512, 30_000, None),
        ({"size": 128, "random_share": 0.5}, 512, 12_000, "batches of 128 pairs"),
        ({"size": 64}, 256, 12_000, "batches.super_batch=16"),
        ({"size": 64, "random_share": 0.5}, 256, 12_000, None),
        ({"size": 64}, 1024, 12_000, None),
        ({"size": 64}, None, 12_000, None),
        ({"size": 256, "stratify": "source"}, 1024, 12_000, None),
        ({"size": 64, "stratify": "source", "super_batch": 16}, 256, 12_000, None),
    ],
)
def test_batches_that_are_not_expected_to_gain_from_clusters_are_named(
    batches: dict[str, Any], rows: int | None, source: int, said: str | None
) -> None:
    found = expected_gain(BatchesConfig(**batches), rows, source)
    assert (found is None) == (said is None)
    assert said is None or said in str(found)
