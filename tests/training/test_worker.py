"""Single workers, to the end of a short run, with the options that change what is computed or kept."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clusterbatch import training
from clusterbatch.config import RunConfig
from clusterbatch.encoder.load import load_encoder
from clusterbatch.encoder.model import Encoder
from clusterbatch.errors import DataError, UsageError
from clusterbatch.evaluation.collection import Collection
from clusterbatch.evaluation.measure import LoadedCollection
from clusterbatch.evaluation.metrics import parse_metric
from clusterbatch.store import Folder
from clusterbatch.training import worker
from clusterbatch.training.collectives import World
from clusterbatch.training.validation import Validation
from clusterbatch.training.worker import Continuation, TrainingJob
from tests.training.small_run import (
    WORDS,
    metric_lines,
    model_weights,
    same_bits,
    small_config,
    small_job,
    train_on_rank,
    write_clusters,
)
from tests.training.worlds import run_world


def _run(tmp_path: Path, name: str, train: dict[str, Any], **sections: Any) -> Any:
    config = small_config(tmp_path, workspace=str(tmp_path / name), train={"steps": 8, **train}, **sections)
    write_clusters(config)
    job = small_job(config)
    train_on_rank(World(), job)
    return job


def test_memory_saved_by_computing_twice_changes_nothing(tmp_path: Path) -> None:
    plain = _run(tmp_path, "plain", {"activation_bytes": 2**30})
    weights = model_weights(plain)
    assert same_bits(weights, model_weights(_run(tmp_path, "cached", {"activation_bytes": 0})))
    again = model_weights(_run(tmp_path, "checkpointing", {"gradient_checkpointing": True}))
    assert same_bits(weights, again)


def test_a_static_encoder_learns_its_sources(tmp_path: Path) -> None:
    job = _run(tmp_path, "static", {"encoder": "static", "steps": 60, "learning_rate": 0.05})
    lines = metric_lines(job)
    assert [line["step"] for line in lines] == list(range(60))
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert lines[0]["mfu"] is None
    assert lines[0]["padding"] == 0.0
    assert model_weights(job)["embedding.weight"].shape[1] == 32


def test_figures_of_a_step_are_there_and_make_sense(tmp_path: Path) -> None:
    line = metric_lines(_run(tmp_path, "figures", {"mask": {"own_score_margin": -1.9}}))[0]
    assert line["pairs"] == 32
    assert 0 <= line["accuracy"] <= 1
    assert -1 <= line["hardness"] <= 1
    # Nearly every document scores above the positive minus 1.9.
    assert line["mask_rate"] > 0.95
    assert 0 < line["purity"] <= 1
    assert line["pairs_per_second"] == pytest.approx(32 / line["seconds"])
    assert 0 <= line["data_wait"] <= 1
    assert line["learning_rate"] == pytest.approx(1e-2)


def test_prompts_are_saved_with_the_model(tmp_path: Path) -> None:
    prompts = {"prompts": {"query": "ask: "}, "source_prompts": {"first": {"query": "first ask: "}}}
    job = _run(tmp_path, "prompts", prompts)
    saved = json.loads(job.folder.read("model/config_sentence_transformers.json"))["prompts"]
    assert saved == {"document": "", "first-query": "first ask: ", "query": "ask: "}


def test_matryoshka_sizes_must_end_with_the_models_own(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"matryoshka.*32"):
        _run(tmp_path, "wrong", {"matryoshka": [8, 16]})
    _run(tmp_path, "right", {"matryoshka": [8, 32], "steps": 1})


def _collection(folder: Path) -> str:
    """30 documents of three words from a few; the query of each is two of them, which others share."""
    (folder / "qrels").mkdir(parents=True)
    random = np.random.default_rng(0)
    documents = [random.choice(WORDS[:8], 3, replace=False).tolist() for _ in range(30)]
    lines = [json.dumps({"_id": f"d{number:02d}", "text": " ".join(words)}) for number, words in enumerate(documents)]
    (folder / "corpus.jsonl").write_text("\n".join(lines) + "\n")
    lines = [json.dumps({"_id": f"q{number}", "text": " ".join(words[:2])}) for number, words in enumerate(documents)]
    (folder / "queries.jsonl").write_text("\n".join(lines) + "\n")
    judged = [f"q{number}\td{number:02d}\t1" for number in range(30)]
    (folder / "qrels" / "test.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *judged]) + "\n")
    return str(folder)


def _validation(config: RunConfig, encoder: Encoder, world: World) -> Validation:
    assert config.train.evaluate_path is not None
    return Validation(Folder(config.train.evaluate_path), config.evaluate, encoder, world, 256)


def _measure(world: World, config: RunConfig, model: str | None = None) -> float:
    encoder = load_encoder(model or config.train.model, "backbone")
    return _validation(config, encoder, world).measure(encoder)


def test_the_score_does_not_depend_on_how_many_share_the_search(tmp_path: Path) -> None:
    path = _collection(tmp_path / "collection")
    config = small_config(tmp_path, train={"evaluate_path": path, "evaluate_every": 3})
    scores = [run_world(size, _measure, config) for size in (1, 3)]
    assert 0.1 < scores[0][0] < 1
    assert scores[1] == pytest.approx(scores[0] * 3, rel=1e-6)


@pytest.mark.parametrize("ignored", [True, False])
def test_a_document_with_the_querys_own_id_is_judged_as_in_the_stage(tmp_path: Path, ignored: bool) -> None:
    path = _collection(tmp_path / "collection")
    # Queries are called like the documents that answer them; another one is the right answer, too.
    for name in ("queries.jsonl", "qrels/test.tsv"):
        file = Path(path, name)
        file.write_text(re.sub(r"\bq(\d+)", lambda found: f"d{int(found[1]):02d}", file.read_text()))
    with Path(path, "qrels/test.tsv").open("a") as file:
        file.writelines(f"\nd{number:02d}\td{(number + 1) % 30:02d}\t1" for number in range(30))
    train = {"evaluate_path": path, "evaluate_every": 3}
    config = small_config(tmp_path, train=train, evaluate={"ignore_identical_ids": ignored})
    encoder = load_encoder(config.train.model, "backbone")
    loaded = LoadedCollection(Collection("collection", Folder(path)), 64, 256, ignored)
    expected = loaded.measure(encoder, [parse_metric("NDCG@10")], 10, 256)["NDCG@10"].mean()
    assert _validation(config, encoder, World()).measure(encoder) == pytest.approx(expected)


def test_the_best_checkpoint_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _collection(tmp_path / "collection")
    # A rate this high makes the model worse and worse: the first score is the best.
    train = {
        "evaluate_path": path,
        "evaluate_every": 2,
        "keep_checkpoints": 1,
        "steps": 12,
        "learning_rate": 0.3,
        "warmup": 0.9,
    }
    job = _run(tmp_path, "best", train)
    scores = {line["step"] + 1: line["score"] for line in metric_lines(job) if "score" in line}
    assert list(scores) == [2, 4, 6, 8, 10, 12]
    best = max(scores, key=lambda step: scores[step])
    assert best < 12
    assert [checkpoint.manifest.step for checkpoint in job.checkpoints.whole()] == [best, 12]
    # What the page beside the code says makes a model of it.
    page = Path(training.__file__).with_name("README.md").read_text()
    code = re.search(r"```python\n(from clusterbatch.*?)```", page, re.DOTALL)
    assert code
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(job.config.model_dump_json())
    exec(compile(code[1], "training/README.md", "exec"), {})
    assert _measure(World(), job.config, "best-model") == pytest.approx(scores[best])


def test_adapters_are_trained_alone_and_merged_into_the_model(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    job = _run(tmp_path, "lora", {"lora": {"rank": 4}})
    latest = job.checkpoints.latest()
    assert latest is not None
    parameters, _ = latest.load()
    assert all("lora_" in name for name in parameters)
    before = load_encoder(job.config.train.model, "backbone").backbone.state_dict()
    after = model_weights(job)
    assert after.keys() == before.keys()
    changed = {name for name, value in after.items() if not torch.equal(torch.from_numpy(value), before[name])}
    assert changed
    assert all("weight" in name and "embeddings" not in name and "LayerNorm" not in name for name in changed)


def test_a_learned_temperature_outlives_the_adapters_of_a_round(tmp_path: Path) -> None:
    """Adapters are merged and begin anew in the next generation; the temperature belongs to the model."""
    pytest.importorskip("peft")
    job = _run(tmp_path, "first", {"lora": {"rank": 4}, "learn_temperature": True})
    learned = metric_lines(job)[-1]["temperature"]
    assert abs(learned - job.config.train.temperature) > 1e-4
    follow = TrainingJob(job.config, 1, 1, job.config.train.model, "next", Continuation(0, 0, 1, 8))
    train_on_rank(World(), follow)
    first = metric_lines(follow)[0]
    # One step of warmup-free Adam moves the logarithm by about the learning rate.
    assert first["temperature"] == pytest.approx(learned, rel=0.02)


def test_checkpoints_follow_the_clock_if_their_steps_are_left_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def steps_of(name: str, seconds: tuple[float, float], every: int | None = None) -> list[int]:
        monkeypatch.setattr(worker, "_SECONDS_BETWEEN_CHECKPOINTS", seconds)
        job = _run(tmp_path, name, {"steps": 12, "checkpoint_every": every, "keep_checkpoints": 20})
        return [checkpoint.manifest.step for checkpoint in job.checkpoints.whole()]

    # A run that is over in no time leaves the last one alone.
    assert steps_of("short", (60.0, 1800.0)) == [12]
    assert steps_of("slow", (0.0, 1800.0)) == [2, 4, 6, 8, 10, 12]
    assert steps_of("slower", (0.0, 0.0)) == list(range(1, 13))
    assert steps_of("asked", (60.0, 1800.0), 5) == [5, 10, 12]


def test_a_loss_that_is_no_number_ends_the_run_and_leaves_the_checkpoints_before_it(tmp_path: Path) -> None:
    train = {"steps": 40, "checkpoint_every": 2, "learning_rate": 1e30, "clip_norm": None, "warmup": 0.0}
    config = small_config(tmp_path, train=train)
    write_clusters(config)
    job = small_job(config)
    with pytest.raises(DataError, match=r"loss nan.* in step \d+.*learning_rate"):
        train_on_rank(World(), job)
    for checkpoint in job.checkpoints.whole():
        parameters, _ = checkpoint.load()
        assert all(bool(torch.isfinite(tensor).all()) for tensor in parameters.values())
