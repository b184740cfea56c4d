"""Whole runs: what is refused before anything begins, what `--force` replaces, and that what is reused is only read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from clusterbatch.cli import main
from clusterbatch.config import RunConfig, load_config, with_changes
from clusterbatch.errors import ClusterbatchError, DataError, InfrastructureError, OtherWorkError, UsageError
from clusterbatch.experiments.capacity.calibrate import measure
from clusterbatch.pipeline.run import STAGES, run, run_stage
from clusterbatch.store.lease import workspace_lease
from clusterbatch.store.workspace import STAGE_ARTIFACTS, Workspace
from tests.encoder.models import make_static
from tests.in_process import OVERRIDES as ONE_PROCESS
from tests.in_process import run_in_process

WORDS = ["harbour", "volcano", "guitar", "orchard", "glacier", "tractor", "lantern", "falcon", "compass", "bakery"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 300 pairs and a static model of a few words."""
    folder = tmp_path_factory.mktemp("inputs")
    make_static(WORDS, folder / "model")
    pairs = [
        {"query": f"{WORDS[n % 10]} {n}", "document": f"{WORDS[n % 10]} and {WORDS[n // 10 % 10]} {n}"}
        for n in range(300)
    ]
    (folder / "pairs.jsonl").write_text("".join(f"{json.dumps(pair)}\n" for pair in pairs))
    return folder


@pytest.fixture
def config(tmp_path: Path, inputs: Path) -> RunConfig:
    """An n-gram surrogate and the static model; a tenth is held out. Nothing has run yet."""
    return _config(tmp_path / "own", inputs)


def _config(workspace: Path, inputs: Path) -> RunConfig:
    words = [
        f"workspace={workspace}",
        f"corpus.paths={inputs}/pairs.jsonl",
        "embed.model=char-ngrams",
        "cluster.clusters=3",
        "cluster.workers=1",
        "batches.size=16",
        f"train.model={inputs}/model",
        "train.steps=3",
        "train.workers=1",
    ]
    return load_config(None, [*words, *ONE_PROCESS])


@pytest.fixture(scope="module")
def finished_once(inputs: Path) -> Path:
    config = _config(inputs / "finished", inputs)
    with pytest.MonkeyPatch.context() as patch:
        run_in_process(patch)
        run(config)
    return inputs / "finished"


def test_run_from_python_leaves_a_workspace_to_the_run_that_holds_it(config: RunConfig) -> None:
    with workspace_lease(config):
        with pytest.raises(InfrastructureError, match="in use by process"):
            run(config)
        assert Workspace(config).corpus.manifest() is None


@pytest.fixture
def finished(config: RunConfig, finished_once: Path) -> RunConfig:
    """The same after a whole run, in a copy that the test may change."""
    shutil.copytree(finished_once, config.workspace)
    return config


def _made(config: RunConfig) -> dict[str, list[str]]:
    """The files of every stage; each attempt gives them other names."""
    manifests = {stage.name: stage.artifact(Workspace(config), 0).require() for stage in STAGES}
    return {name: [part.path for part in manifest.parts] for name, manifest in manifests.items()}


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_finished_run_is_measured_by_the_clocks_of_its_workers(finished: RunConfig) -> None:
    found = measure(finished)
    assert set(found.seconds) == set(found.worker_seconds) == set(STAGE_ARTIFACTS)
    for stage in STAGE_ARTIFACTS:
        assert 0 < found.worker_seconds[stage] <= found.model.workers(stage) * found.seconds[stage]
    # Three steps; loading the model and saving it again are no steps.
    [lines] = (Path(finished.workspace) / "generation=000" / "train").glob("*.jsonl")
    steps = map(json.loads, lines.read_text().splitlines())
    assert found.worker_seconds["train"] == pytest.approx(sum(step["seconds"] for step in steps))
    assert found.worker_seconds["train"] < found.seconds["train"]


def test_force_replaces_what_does_not_match_and_keeps_the_rest(finished: RunConfig, in_process: None) -> None:
    first = _made(finished)
    run(finished, force=True)
    assert _made(finished) == first
    changed = with_changes(finished, {"cluster.clusters": 4})
    with pytest.raises(UsageError, match="--force"):
        run(changed)
    run(changed, force=True)
    second = _made(finished)
    assert [name for name in first if first[name] == second[name]] == ["ingest", "embed"]
    # A stage by itself is made anew.
    run_stage(next(stage for stage in STAGES if stage.name == "embed"), changed, force=True)
    assert _made(finished)["embed"] != second["embed"]


def test_an_interrupted_force_is_noticed_before_the_rest_is_done(finished: RunConfig, in_process: None) -> None:
    workspace = Workspace(finished)
    changed = with_changes(finished, {"train.learning_rate": 1e-3, "train.temperature": 0.07})
    # `run --force` has come as far as the beginning of training; the evaluation is still that of the model before.
    workspace.train().remove()
    with pytest.raises(UsageError, match=r"holds evaluation .*--force redoes evaluate$"):
        run(changed)
    assert not workspace.train().own_files()
    # With the former configuration all goes on.
    run(finished)
    # As far as the beginning of clustering.
    workspace.clusters().remove()
    with pytest.raises(UsageError, match=r"holds training run .*--force redoes train, evaluate$"):
        run(with_changes(finished, {"cluster.clusters": 4}))
    assert not workspace.clusters().own_files()
    run(finished)


@pytest.mark.parametrize("damage", ["missing", "cut off"])
@pytest.mark.parametrize(
    ("command", "made", "damaged"),
    [
        ("embed", "generation=000/embeddings", "corpus/part-*.parquet"),
        ("cluster", "generation=000/clusters", "corpus/part-*.parquet"),
        ("cluster", "generation=000/clusters", "generation=000/embeddings/unit-*.parquet"),
        ("train", "generation=000/train", "generation=000/clusters/*-training-*"),
        ("evaluate", "generation=000/evaluation", "generation=000/train/model/model.safetensors"),
        ("predict", "predict", "corpus/part-*.parquet"),
    ],
)
def test_a_damaged_input_is_named_before_a_stage_begins(
    damage: str,
    command: str,
    made: str,
    damaged: str,
    finished: RunConfig,
    in_process: None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output, file = Path(finished.workspace, made), next(Path(finished.workspace).glob(damaged))
    shutil.rmtree(output, ignore_errors=True)
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-1])
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(finished.model_dump(mode="json")))
    capsys.readouterr()
    assert main([command, str(tmp_path / "config.yaml")]) == 3
    assert not output.exists()
    # Not even a title of a pass.
    (line,) = capsys.readouterr().err.splitlines()
    assert file.name in line
    assert "with --force" in line


def test_a_collection_that_was_held_out_and_is_gone_is_named(finished: RunConfig, in_process: None) -> None:
    Workspace(finished).evaluation().remove()
    Path(finished.workspace, "corpus/holdout/corpus.jsonl").unlink()
    with pytest.raises(DataError, match=r"holdout/corpus.jsonl: missing, but named"):
        run(finished)


def test_keys_that_differ_are_named_with_both_values(finished: RunConfig, in_process: None) -> None:
    for changes, message in [
        ({"embed.max_tokens": 7}, r"embed\.max_tokens was \d+, is 7\); --force redoes embed, cluster, train, evaluate"),
        ({"cluster.clusters": 4}, r"\(cluster\.clusters was 3, is 4\); --force redoes cluster, train, evaluate"),
        (
            {"train.mask.own_score_margin": 0.5},
            r"\(train\.mask\.own_score_margin was .*, is 0\.5\); --force redoes train, evaluate",
        ),
        ({"batches.seed": 5}, r"batches\.seed was 0, is 5"),
        ({"evaluate.top_k": 150}, r"\(evaluate\.top_k was \d+, is 150\); --force redoes evaluate$"),
    ]:
        with pytest.raises(OtherWorkError, match=message):
            run(with_changes(finished, changes))
    cluster = next(stage for stage in STAGES if stage.name == "cluster")
    with pytest.raises(OtherWorkError, match=r"\(cluster\.clusters was 3, is 4\)$"):
        run_stage(cluster, with_changes(finished, {"cluster.clusters": 4}))
    # What decides only how fast it is, or has not changed, is not another configuration.
    run(with_changes(finished, {"embed.workers": 2}))


def test_another_trainings_checkpoints_are_replaced_by_force(finished: RunConfig, in_process: None) -> None:
    # As where a run was cut off after its first checkpoint.
    Workspace(finished).train().folder.remove("manifest.json")
    changed = with_changes(finished, {"train.learning_rate": 1e-3})
    with pytest.raises(UsageError, match="checkpoints of another configuration"):
        run(changed)
    run(changed, force=True)
    assert Workspace(finished).train().require().config["train"]["learning_rate"] == 1e-3


def test_what_is_reused_is_never_written(finished: RunConfig, tmp_path: Path, in_process: None) -> None:
    before = _files(tmp_path / "own")
    reuse = dict.fromkeys(["reuse.corpus", "reuse.embeddings", "reuse.clusters"], finished.workspace)
    other = with_changes(finished, {"workspace": f"{tmp_path}/other", **reuse})
    for stage in STAGES[:3]:
        with pytest.raises(UsageError, match=rf"reuse\..*: --force replaces nothing in .*{tmp_path}/own"):
            run_stage(stage, other, force=True)
    # What matches is read, forced or not.
    run(other, force=True)
    mismatches: list[tuple[str, dict[str, Any]]] = [
        ("reuse.corpus", {"corpus.max_characters": 50}),
        ("reuse.embeddings", {"embed.max_tokens": 7}),
        ("reuse.clusters", {"cluster.clusters": 5}),
    ]
    for force in (False, True):
        for key, changes in mismatches:
            with pytest.raises(UsageError, match=f"{key}: .* is read, not written"):
                run(with_changes(other, changes), force=force)
    with pytest.raises(UsageError, match=r"reuse\.embeddings: .* is read, not written"):
        run(with_changes(other, {"reuse.embeddings": f"{tmp_path}/nowhere"}))
    assert _files(tmp_path / "own") == before
    assert not (tmp_path / "nowhere").exists()


def test_a_corpus_that_is_reused_is_not_appended_to(inputs: Path, tmp_path: Path, in_process: None) -> None:
    shutil.copy(inputs / "pairs.jsonl", tmp_path)
    words = [f"corpus.paths={tmp_path}/*.jsonl", "evaluate.holdout=0"]
    assert main(["ingest", f"workspace={tmp_path}/own", *words]) == 0
    before = _files(tmp_path / "own")
    (tmp_path / "more.jsonl").write_text('{"query": "another", "document": "answer"}\n')
    reusing = [f"workspace={tmp_path}/other", f"reuse.corpus={tmp_path}/own", *words]
    assert main(["ingest", "--append", *reusing]) == 2
    assert _files(tmp_path / "own") == before


def _collection(folder: Path, *, without: str = "", judgements: str = "q1\td1\t1\n") -> Path:
    files = {
        "corpus.jsonl": '{"_id": "d1", "text": "a document"}\n',
        "queries.jsonl": '{"_id": "q1", "text": "a query"}\n',
        "qrels/test.tsv": f"query-id\tcorpus-id\tscore\n{judgements}",
    }
    for name, text in files.items():
        if name != without:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evaluate.metrics": ["NDGC@10"]}, r"evaluate\.metrics: 'NDGC@10'"),
        ({"evaluate.models": ["before", "after", "./nowhere"]}, r"evaluate\.models: .*nowhere: no such model"),
        ({"evaluate.models": ["before", "before"]}, r"evaluate\.models: before stands there twice"),
        ({"evaluate.path": ["{}/nowhere"]}, r"evaluate\.path: .*nowhere .*no corpus\.jsonl"),
        ({"evaluate.path": ["{}/without"]}, r"evaluate\.path: .*without .*no queries\.jsonl"),
        ({"evaluate.path": ["{}/whole"], "evaluate.split": "dev"}, r"evaluate\.split: .* no judgements called dev"),
        ({"evaluate.path": ["{}/unjudged"]}, "no judgements in it"),
        ({"evaluate.path": ["docstrings://"]}, r"evaluate\.path: docstrings:// is the built-in sample's"),
        ({"evaluate.holdout": 0}, r"evaluate\.path: give at least one collection"),
        ({"train.workers": 17}, r"train\.workers: 17"),
    ],
)
def test_what_would_fail_after_training_is_refused_before_anything_begins(
    config: RunConfig, changes: dict[str, Any], message: str, tmp_path: Path, in_process: None
) -> None:
    _collection(tmp_path / "whole")
    _collection(tmp_path / "without", without="queries.jsonl")
    _collection(tmp_path / "unjudged", judgements="")
    if "evaluate.path" in changes:
        changes = {**changes, "evaluate.path": [path.format(tmp_path) for path in changes["evaluate.path"]]}
    with pytest.raises(ClusterbatchError, match=message):
        run(with_changes(config, changes))
    assert not (tmp_path / "own").exists()


def test_a_holdout_that_finds_nothing_is_refused_before_embedding(
    config: RunConfig, tmp_path: Path, in_process: None
) -> None:
    with pytest.raises(UsageError, match=r"evaluate\.split: .* has no judgements called train"):
        run(with_changes(config, {"evaluate.split": "train"}))
    assert Workspace(config).embeddings().manifest() is None


def test_a_batch_larger_than_the_corpus_is_refused_before_embedding(config: RunConfig, in_process: None) -> None:
    with pytest.raises(UsageError, match=r"batches\.size: a batch of 100000 pairs, but the corpus has only \d+$"):
        run(with_changes(config, {"batches.size": 100_000}))
    assert Workspace(config).embeddings().manifest() is None


@pytest.mark.parametrize("command", ["compare", "tune"])
def test_experiments_want_their_collections_first(
    command: str, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], in_process: None
) -> None:
    words = [f"workspace={tmp_path}/own", f"corpus.paths={inputs}/pairs.jsonl", f"evaluate.path={tmp_path}/none"]
    assert main([command, *words]) == 2
    assert "evaluate.path" in capsys.readouterr().err
    assert not (tmp_path / "own").exists()


def test_refresh_looks_for_its_collections_before_it_embeds_again(
    finished: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(str(path) for path in Path(finished.workspace).rglob("*"))
    path = Path(finished.workspace).parent / "run.yaml"
    changed = with_changes(finished, {"evaluate.path": ["/no/such/collection"]})
    path.write_text(yaml.safe_dump(changed.model_dump(mode="json")))
    assert main(["refresh", str(path)]) == 2
    assert "evaluate.path: /no/such/collection" in capsys.readouterr().err.replace("file://", "")
    assert sorted(str(path) for path in Path(finished.workspace).rglob("*")) == before
