"""A whole comparison on a small corpus: two arms, two seeds, one layout for both; interrupted, resumed, reported."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clusterbatch.config import RunConfig, with_changes
from clusterbatch.corpus.ingest import ingest
from clusterbatch.embedding.stage import embed
from clusterbatch.encoder.load import load_encoder
from clusterbatch.encoder.model import Encoder
from clusterbatch.encoder.resolve import resolve_model
from clusterbatch.errors import UsageError
from clusterbatch.evaluation.measure import LoadedCollection
from clusterbatch.evaluation.metrics import parse_metric
from clusterbatch.evaluation.stage import configured_collections
from clusterbatch.experiments.compare import stage as module
from clusterbatch.experiments.compare.arms import arms_of
from clusterbatch.experiments.compare.breakdown import query_segments
from clusterbatch.experiments.compare.hardness import hardness, match, with_groups
from clusterbatch.experiments.compare.report import write_comparison
from clusterbatch.experiments.compare.results import read_comparison
from clusterbatch.experiments.compare.stage import compare, comparison_artifact
from clusterbatch.experiments.compare.trial import Trials, TrialWorker, _trained_encoder, starting_encoder
from clusterbatch.runtime import Pass, WorkItem
from clusterbatch.shards.reader import read_index
from clusterbatch.shards.stage import cluster
from clusterbatch.store import Artifact, Folder, Receipt
from clusterbatch.store.workspace import Workspace
from tests.in_process import run_in_process
from tests.integration.subjects import SUBJECTS, subjects_config
from tests.integration.test_cluster_stage import text_rows


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> RunConfig:
    # So few steps have to change something.
    learning = ["train.learning_rate=0.3"]
    compared = ["compare.arms=[random,cluster]", "compare.seeds=2", "compare.steps=6", "compare.points=2"]
    return subjects_config(tmp_path_factory.mktemp("compare"), ["train.max_document_tokens=32", *learning, *compared])


@pytest.fixture
def shared_stages(config: RunConfig) -> None:
    """Corpus, embeddings and clusters, made without worker processes: other tests are about those."""
    with pytest.MonkeyPatch.context() as patch:
        run_in_process(patch)
        ingest(config)
        embed(config)
        for layout in arms_of(config)[1].values():
            cluster(layout)


@pytest.mark.usefixtures("ray_local", "shared_stages")
def test_a_comparison_from_corpus_to_report(config: RunConfig, monkeypatch: pytest.MonkeyPatch):
    # The first attempt, without Ray, ends after the first trials.
    original = Pass.run

    def interrupted(self: Pass, items: Sequence[WorkItem], **options: Any) -> None:
        original(self, items[:2], **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(Pass, "run", interrupted)
    with pytest.MonkeyPatch.context() as patch:
        run_in_process(patch)
        with pytest.raises(KeyboardInterrupt):
            compare(config)
    artifact = comparison_artifact(config)
    assert artifact.manifest() is None
    kept = {name: artifact.folder.read(f"_receipts/{name}") for name in artifact.folder.list("_receipts")}
    assert len(kept) == 2
    ran = []

    def counted(self: Pass, items: Sequence[WorkItem], **options: Any) -> list[Receipt]:
        ran.extend(item.number for item in items if item.number not in options["done"])
        return original(self, items, **options)

    monkeypatch.setattr(Pass, "run", counted)
    manifest = compare(config)
    assert len(ran) == 3

    found = read_comparison(config, artifact, manifest)
    assert [arm.name for arm in found.arms] == ["random", "cluster"]
    # One set of clusters serves both arms, and both made the same number of steps on the same number of pairs.
    assert len({arm["layout"] for arm in manifest.details["arms"].values()}) == 1
    assert {arm.pairs for arm in found.arms} == {6 * 32}
    assert found.steps.tolist() == [0, 3, 6]
    assert found.arms[0].curve.shape == (3, 2)
    # Batches of clusters are purer than random ones, and the arms do differ.
    assert found.arm("cluster").purity > found.arm("random").purity
    assert found.arm("cluster").cost.hours > found.arm("random").cost.hours
    # What an arm may cost more is judged by the prices, here of requests alone.
    prices = {"compare.prices": {"cpu_hour": 0.0, "gpu_hour": 0.0, "million_reads": 1.0}}
    priced = read_comparison(with_changes(config, prices), artifact, manifest)
    asked = [priced.arm(name).cost.traffic.reads for name in ("cluster", "random")]
    assert priced.arm("cluster").verdict.extra_cost == pytest.approx(asked[0] / asked[1] - 1)
    assert found.scores["random"]["topics", "NDCG@10"].shape == (2, 40)
    assert (found.scores["random"]["topics", "NDCG@10"] != found.scores["cluster"]["topics", "NDCG@10"]).any()

    page = Path(write_comparison(config))
    assert "cluster" in page.read_text(encoding="utf-8")
    data = json.loads((page.parent / "comparison.json").read_text())
    assert {row["segment"] for row in data["segments"]} == set(SUBJECTS)
    # Again: nothing to do. With another number of seeds: refused.
    assert compare(config).created == manifest.created
    with pytest.raises(UsageError, match="another configuration"):
        compare(config.model_copy(update={"compare": config.compare.model_copy(update={"seeds": 3})}))


@pytest.mark.usefixtures("in_process", "shared_stages")
@pytest.mark.parametrize("lora", [False, True])
def test_trials_measure_what_training_leaves_with_its_prompts(
    config: RunConfig, tmp_path: Path, tiny: Callable[[str], Path], lora: bool
):
    words: dict[str, Any] = {"train.prompts.query": "simmer anchor tide bake ", "train.device": "cpu"}
    words |= {"train.trackers": [], "train.precision": "float32"}
    if lora:
        pytest.importorskip("peft")
        # Adapters: what a checkpoint holds has other names than the parameters of the model it was made from.
        words |= {"train.model": str(tiny("bert")), "train.encoder": "backbone", "train.lora": {"rank": 4}}
    own = with_changes(config, words)
    arms, layouts = arms_of(own)
    for layout in layouts.values():
        cluster(layout)
    [collection] = configured_collections(own)
    trials = Trials(own, arms, layouts, 6, "with prompts")
    output = Artifact(Folder(str(tmp_path)), "trials")
    worker = TrialWorker([collection], ["NDCG@10"], 1)
    untrained, trained, *_ = trials.main({arm.name: trials.settings(arm)[0] for arm in arms})
    found = [worker.process(item, output).details["curve"][-1]["value"] for item in (untrained, trained)]

    loaded = LoadedCollection(collection, own.evaluate.max_query_tokens, own.evaluate.max_document_tokens)

    def measured(encoder: Encoder) -> float:
        metric = parse_metric("NDCG@10")
        return float(loaded.measure(encoder, [metric], own.evaluate.top_k, own.embed.batch_tokens)["NDCG@10"].mean())

    # What training leaves has the prompts among its files, whoever loads it.
    result = Workspace(trained.payload.config).trained_model()
    assert found[1] == measured(load_encoder(resolve_model(result.uri)))
    start = load_encoder(resolve_model(own.train.model), own.train.encoder)
    without = measured(start)
    start.prompts["query"] = own.train.prompts.query or ""
    assert found[0] == measured(start) != without
    assert found[0] != found[1]


def test_a_checkpoint_of_another_model_is_not_measured(config: RunConfig):
    device = torch.device("cpu")
    parameters = {
        f"encoder.{name}": parameter.detach() for name, parameter in starting_encoder(config, device).named_parameters()
    }
    _trained_encoder(config, device, parameters)
    with pytest.raises(AssertionError, match="another model"):
        _trained_encoder(config, device, {f"{name}.lora": each for name, each in parameters.items()})


@pytest.mark.usefixtures("in_process")
def test_queries_are_put_into_clusters_with_the_models_own_prompts(config: RunConfig, tmp_path: Path):
    """Queries of the corpus, whose clusters are known, as a test collection."""
    folder = shutil.copytree(resolve_model(config.embed.model), tmp_path / "prompted")
    (folder / "config_sentence_transformers.json").write_text(
        json.dumps({"prompts": {"query": "simmer onion butter pepper oven roast "}})
    )
    changes = {"workspace": f"{tmp_path}/ws", "embed.model": str(folder), "cluster.features": "query"}
    own = with_changes(config, changes)
    ingest(own)
    embed(own)
    cluster(own)
    artifact = Workspace(own).clusters()
    rows = text_rows(artifact)
    index, of_row = read_index(artifact, artifact.require()), []
    for source, number, size in zip(index.source, index.cluster, index.rows, strict=True):
        of_row += [(index.sources[source], int(number))] * int(size)
    collection = tmp_path / "own"
    (collection / "qrels").mkdir(parents=True)
    lines = [json.dumps({"_id": f"q{n}", "text": text}) for n, text in enumerate(rows["query"].to_pylist())]
    (collection / "queries.jsonl").write_text("\n".join(lines))
    (collection / "corpus.jsonl").write_text(json.dumps({"_id": "d", "text": "anchor"}))
    judged = "".join(f"q{n}\td\t1\n" for n in range(rows.num_rows))
    (collection / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + judged)

    def share_put_back(run: RunConfig) -> float:
        found = query_segments(run, artifact, configured_collections(run)).to_pylist()
        assert len(found) == rows.num_rows
        return float(np.mean([(row["source"], row["cluster"]) == of_row[int(row["query_id"][1:])] for row in found]))

    own = with_changes(own, {"evaluate.path": str(collection)})
    assert share_put_back(own) > 0.9
    # Without them, queries land elsewhere.
    assert share_put_back(with_changes(own, {"embed.query_prompt": ""})) < share_put_back(own) - 0.05


@pytest.mark.usefixtures("in_process", "shared_stages")
@pytest.mark.parametrize("force", [False, True])
def test_what_a_budget_was_turned_into_is_decided_anew_by_force(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, force: bool
):
    class Decided(Exception):
        pass

    def choose(config: RunConfig, spent: float, *, force: bool = False) -> RunConfig:
        raise Decided(force)

    monkeypatch.setattr(module, "choose_sample", choose)
    with pytest.raises(Decided, match=str(force)):
        compare(config, force=force)


@pytest.mark.usefixtures("in_process", "shared_stages")
def test_small_groups_are_made_as_hard_as_clusters(config: RunConfig):
    chosen = ["random", "cluster", "hardness-matched"]
    own = with_changes(config, {"compare": {**config.compare.model_dump(), "arms": dict.fromkeys(chosen)}})
    arms, layouts = arms_of(own)
    for layout in layouts.values():
        cluster(layout)
    found = {arm.name: arm for arm in match(arms, layouts)}
    hard = {name: hardness(arm.config, layouts[arm.layout]) for name, arm in found.items()}
    # Of all numbers of groups the one that comes nearest to the clusters' hardness, which random batches do not have.
    assert hard["random"] < hard["cluster"]
    matched = found["hardness-matched"]
    others = [with_groups(matched, groups) for groups in (2, 4, 8, 16)]
    distances = [abs(hardness(each.config, layouts[matched.layout]) - hard["cluster"]) for each in others]
    assert abs(hard["hardness-matched"] - hard["cluster"]) == pytest.approx(min(distances))
