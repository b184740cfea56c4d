"""Refresh intervals on a corpus of three subjects that arrive one after the other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from clusterbatch.cli import main
from clusterbatch.config import RunConfig, with_changes
from clusterbatch.errors import UsageError
from clusterbatch.experiments.tune import refresh_interval as module
from clusterbatch.experiments.tune.refresh_interval import RESULT, tune_refresh
from clusterbatch.store.workspace import Workspace
from tests.in_process import OVERRIDES, run_in_process
from tests.integration.subjects import SUBJECTS, subjects_config

_THIRD = "seed soil spade compost hedge rose prune lawn weed pond"
_STEPS = 3


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder = tmp_path_factory.mktemp("stream")
    words = ["refresh.every_steps=3", "refresh.sample=256", "train.steps=3"]
    words += ["train.workers=1", "train.checkpoint_every=3", "embed.model=char-ngrams"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SUBJECTS, "gardening", _THIRD)
        config = subjects_config(folder, [*OVERRIDES, *words])
        subjects = list(SUBJECTS)
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    arrivals = []
    for subject in subjects:
        own = [json.dumps(row) for row in rows if row["source"] == subject]
        (folder / f"{subject}.jsonl").write_text("\n".join(own) + "\n")
        arrivals.append({"paths": [str(folder / f"{subject}.jsonl")], "queries": [subject]})
    stream = {"arrivals": arrivals, "refresh": ["never", 2, 1, "drift > 1"]}
    return with_changes(config, {"tune.stream": stream})


pytestmark = pytest.mark.usefixtures("in_process")


@pytest.fixture(scope="module")
def found(config: RunConfig) -> dict[str, Any]:
    """The result; the first call is killed in the middle of a round, and a second one goes on."""
    with pytest.MonkeyPatch.context() as patch:
        run_in_process(patch)
        original, calls = module.refresh, []

        def cut_off(changed: RunConfig) -> Any:
            calls.append(changed.workspace)
            if len(calls) == 4:
                raise KeyboardInterrupt
            return original(changed)

        patch.setattr(module, "refresh", cut_off)
        with pytest.raises(KeyboardInterrupt):
            tune_refresh(config)
        first = len(calls)
        result = tune_refresh(config)
        # Two months of four policies, and the one call that was cut off.
        assert (first, len(calls)) == (4, 9)
        # It is done: nothing is trained again.
        assert tune_refresh(config) == result
        assert len(calls) == 9
    return result


def test_policies_train_alike_and_differ_in_what_they_take_in(found: dict[str, Any]) -> None:
    policies = found["policies"]
    assert list(policies) == ["never", "every 2", "every 1", "drift > 1"]
    assert {row["steps"] for each in policies.values() for row in each["months"]} == {_STEPS}
    rows = {name: [row["rows"] for row in each["months"]] for name, each in policies.items()}
    assert rows == {"never": [160, 160], "every 2": [160, 480], "every 1": [320, 480], "drift > 1": [320, 480]}
    embedded = {name: [row["embedded"] for row in each["months"]] for name, each in policies.items()}
    # The live model embeds all there is; rows that join clusters are embedded once.
    assert embedded == {"never": [0, 0], "every 2": [0, 480], "every 1": [320, 480], "drift > 1": [160, 160]}
    anew = {name: [row["reclustered"] for row in each["months"]] for name, each in policies.items()}
    assert anew == {"never": [0, 0], "every 2": [0, 1], "every 1": [1, 1], "drift > 1": [0, 0]}
    for name, each in policies.items():
        for row in each["months"]:
            takes_in = row["embedded"] > 0
            assert ("embed" in row["seconds"]) == takes_in
            assert (row["seconds"]["ingest"] > 0) == takes_in
            assert ("drift" in row["seconds"]) == (name == "drift > 1")
            assert row["cost"] > 0
    # Until it takes something in, a policy has done what `never` did, to the last bit.
    assert policies["every 2"]["months"][0]["new"] == policies["never"]["months"][0]["new"]


def test_it_recommends_the_cheapest_that_is_good_enough(found: dict[str, Any], config: RunConfig) -> None:
    policies = found["policies"]
    best = max(each["value"] for each in policies.values())
    good = {name: each for name, each in policies.items() if each["value"] >= best - config.refresh.margin}
    assert found["chosen"] == min(good, key=lambda name: good[name]["cost"])
    root = Workspace(config).root
    assert root.read_json(RESULT) == found
    # Models and corpora of the policies have served.
    assert not root.exists("tune/stream/work")


def test_the_command_prints_every_month(
    found: dict[str, Any], config: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    file = Path(config.workspace).parent / "run.yaml"
    file.write_text(config.model_dump_json())
    assert main(["tune", str(file)]) == 0
    printed = capsys.readouterr().out
    for name, each in found["policies"].items():
        assert name in printed
        for row in each["months"]:
            assert f"{row['new']:.4f}" in printed
    assert f"recommended: {found['chosen']}" in printed


def test_what_cannot_be_compared_is_said_at_once(config: RunConfig) -> None:
    arrivals = config.tune.model_dump()["stream"]["arrivals"]
    for changes, message in (
        ({"refresh.every_steps": None}, "every_steps"),
        ({"evaluate.path": []}, "evaluate.path"),
        ({"batches.super_batch": 4, "batches.stratify": "source"}, "super_batch"),
        ({"reuse.corpus": config.workspace}, "reuse"),
        ({"tune.stream.arrivals": [*arrivals[:2], {**arrivals[2], "queries": ["nobody"]}]}, "arrivals.2.queries"),
        ({"tune.stream.refresh": ["never", 3]}, "3 months never pass"),
        ({"tune.stream.refresh": ["never", "sometimes"]}, "expected always, never"),
    ):
        with pytest.raises(UsageError, match=message):
            tune_refresh(with_changes(config, changes))
