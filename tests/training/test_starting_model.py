"""What follows from the files of the model that training starts from, before a weight is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from clusterbatch.config import RunConfig, fingerprint, with_changes
from clusterbatch.encoder.load import load_encoder
from clusterbatch.errors import UsageError
from clusterbatch.pipeline.run import run
from clusterbatch.store.workspace import Workspace
from clusterbatch.training.stage import train
from clusterbatch.training.starting_model import (
    check_starting_model,
    default_learning_rate,
    read_starting_model,
    with_learning_rate,
)
from tests.in_process import run_in_process
from tests.training.small_run import small_config, write_clusters


def _open_rate(folder: Path, **train: Any) -> RunConfig:
    return small_config(folder, train={"learning_rate": None, "steps": 2, "device": "cpu", **train})


def test_files_say_what_the_loaded_model_says(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    encoder = load_encoder(config.train.model, "backbone")
    model = read_starting_model(config)
    assert model.dimensions == encoder.dimensions == 32
    assert model.weights == sum(parameter.numel() for parameter in encoder.parameters())


def test_a_matryoshka_that_does_not_fit_is_refused_before_the_corpus_is_read(tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"query": "a question", "document": "an answer"}\n')
    changes = {"train.matryoshka": [8, 16], "evaluate.path": []}
    config = with_changes(small_config(tmp_path, corpus={"paths": [str(pairs)]}), changes)
    with pytest.raises(UsageError, match=r"train\.matryoshka.*32"):
        run(config)
    check_starting_model(with_changes(config, {"train.matryoshka": [8, 32]}))


def test_the_default_rate_follows_the_kind_and_size_of_the_encoder(tmp_path: Path) -> None:
    config = _open_rate(tmp_path)
    assert with_learning_rate(config).train.learning_rate == 1e-4
    assert with_learning_rate(with_changes(config, {"train.encoder": "static"})).train.learning_rate == 5e-3
    rates = [default_learning_rate(config.train, weights) for weights in (20_000_000, 110_000_000, 560_000_000)]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == 2e-5
    asked = with_changes(config, {"train.learning_rate": 0.3})
    assert with_learning_rate(asked) == asked


def test_a_run_of_the_former_default_is_done_and_a_new_one_gets_the_new_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_in_process(monkeypatch)
    config = _open_rate(tmp_path)
    write_clusters(config)
    # As a version that had one default for all encoders made it.
    former = train(with_changes(config, {"train.learning_rate": 2e-5}))
    assert train(config) == former
    other = with_changes(config, {"workspace": str(tmp_path / "other")})
    write_clusters(other)
    assert train(other).config["train"]["learning_rate"] == 1e-4
    assert Workspace(config).train().require().config["train"]["learning_rate"] == 2e-5


def test_fingerprints_of_explicit_rates_are_what_they_were() -> None:
    """The key stays where it was in the identity, so that only its value counts."""
    identity = RunConfig(workspace="/none").train.model_copy(update={"learning_rate": 2e-5}).identity()
    assert list(identity).index("learning_rate") == list(identity).index("schedule") - 1
    assert fingerprint(identity) != fingerprint({**identity, "learning_rate": 1e-4})
