"""A whole comparison on a small corpus: two arms, two seeds, one layout for both; interrupted, resumed, reported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from clusterbatch.config import RunConfig, with_changes
from clusterbatch.corpus.ingest import ingest
from clusterbatch.embedding.stage import embed
from clusterbatch.encoder.model import Encoder, load_encoder
from clusterbatch.encoder.resolve import resolve_model
from clusterbatch.errors import UsageError
from clusterbatch.evaluation.measure import LoadedCollection
from clusterbatch.evaluation.metrics import parse_metric
from clusterbatch.evaluation.stage import configured_collections
from clusterbatch.experiments.compare import stage as module
from clusterbatch.experiments.compare.arms import arms_of
from clusterbatch.experiments.compare.hardness import hardness, match, with_groups
from clusterbatch.experiments.compare.report import write_comparison
from clusterbatch.experiments.compare.results import read_comparison
from clusterbatch.experiments.compare.stage import compare, comparison_artifact
from clusterbatch.experiments.compare.trial import Trials, TrialWorker
from clusterbatch.shards.stage import cluster
from clusterbatch.store import Artifact, Folder
from clusterbatch.store.workspace import Workspace
from tests.integration.subjects import SUBJECTS, subjects_config
from tests.without_ray import without_ray


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
        without_ray(patch)
        ingest(config)
        embed(config)
        for layout in arms_of(config)[1].values():
            cluster(layout)


@pytest.mark.usefixtures("ray_local", "shared_stages")
def test_a_comparison_from_corpus_to_report(config: RunConfig, monkeypatch: pytest.MonkeyPatch):
    # The first attempt ends after the first trials.
    original = module.run_units

    def interrupted(title, units, *arguments, **options):
        original(title, units[:2], *arguments, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "run_units", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compare(config)
    artifact = comparison_artifact(config)
    assert artifact.manifest() is None
    kept = {name: artifact.folder.read(f"_receipts/{name}") for name in artifact.folder.list("_receipts")}
    assert len(kept) == 2
    ran = []

    def counted(title, units, *arguments, **options):
        ran.extend(unit.number for unit in units if unit.number not in options["done"])
        return original(title, units, *arguments, **options)

    monkeypatch.setattr(module, "run_units", counted)
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
def test_trials_measure_behind_the_prompts_of_training(config: RunConfig, tmp_path: Path):
    words = {"train.prompts.query": "simmer anchor tide bake ", "train.device": "cpu", "train.trackers": []}
    own = with_changes(config, words)
    arms, layouts = arms_of(own)
    for layout in layouts.values():
        cluster(layout)
    [collection] = configured_collections(own)
    trials = Trials(own, arms, layouts, 6, "with prompts")
    worker = TrialWorker(Artifact(Folder(str(tmp_path)), "trials"), "with prompts", [collection], ["NDCG@10"], 1)
    untrained, trained, *_ = trials.main({arm.name: trials.settings(arm)[0] for arm in arms})
    found = [worker.process(unit).details["curve"][-1]["value"] for unit in (untrained, trained)]

    loaded = LoadedCollection(collection, own.evaluate.max_query_tokens, own.evaluate.max_document_tokens)

    def measured(encoder: Encoder) -> float:
        metric = parse_metric("NDCG@10")
        return float(loaded.measure(encoder, [metric], own.evaluate.top_k, own.embed.batch_tokens)["NDCG@10"].mean())

    # What training leaves has the prompts among its files, whoever loads it.
    result = Workspace(trained.payload.config).trained_model()
    assert found[1] == measured(load_encoder(resolve_model(result.uri)))
    start = load_encoder(resolve_model(own.train.model), "static")
    without = measured(start)
    start.prompts["query"] = own.train.prompts.query or ""
    assert found[0] == measured(start) != without


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
