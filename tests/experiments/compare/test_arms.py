"""Which configuration each arm runs with, and which arms share their clusters."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from clusterbatch.batches.curriculum import make_plan
from clusterbatch.batches.plan import BatchPlan
from clusterbatch.batches.strategies import STRATEGIES, Strategy, clusters_of
from clusterbatch.clustering.cells import mean_size
from clusterbatch.config import BatchesConfig, RunConfig, load_config, with_changes
from clusterbatch.config.compare import BUILT_IN, recipes
from clusterbatch.errors import OtherWorkError, UsageError
from clusterbatch.experiments.compare import stage as compare
from clusterbatch.experiments.compare.arms import Arm, arms_of, clustered_layout, with_phases
from clusterbatch.experiments.compare.hardness import with_groups
from clusterbatch.experiments.compare.stage import _steps
from clusterbatch.experiments.tune import stage as tune
from tests.batches.indexes import make_index


def configured(arms: str, *overrides: str) -> RunConfig:
    return load_config(None, ["workspace=/tmp/none", f"compare.arms={arms}", "batches.size=128", *overrides])


def arms_by_name(config: RunConfig) -> dict[str, Arm]:
    return {arm.name: arm for arm in arms_of(config)[0]}


def test_arms_share_clusters_where_they_can():
    names = ["random", "source", "cluster", "random-groups", "random-4x", "random-masked", "cluster-masked"]
    arms, layouts = arms_of(configured(str(names)))
    assert len(layouts) == 1
    assert {arm.layout for arm in arms} == set(layouts)
    assert [arm.uses_clusters for arm in arms] == [False, False, True, True, False, False, True]
    assert [arm.uses_embeddings for arm in arms] == [False, False, True, True, False, True, True]


def test_arms_with_a_teacher_share_the_clusters_of_those_without():
    config = load_config(
        None,
        [
            "workspace=/tmp/none",
            "score.teacher=some",
            "compare.arms={random: {batches.stratify: random}, taught: {batches.stratify: random, "
            "train.mask.teacher_margin: -0.1}, cluster: {batches.stratify: cluster, train.teacher_kl: 1.0}}",
        ],
    )
    arms, layouts = arms_of(config)
    assert len(layouts) == 1
    assert [arm.uses_scores for arm in arms] == [False, True, True]
    assert [arm.uses_embeddings for arm in arms] == [False, True, True]
    assert [arm.uses_clusters for arm in arms] == [False, False, True]


def test_arms_without_outliers_have_clusters_of_their_own():
    config = configured("[random,cluster,random-no-outliers,source-no-outliers,cluster-no-outliers]")
    arms, layouts = arms_of(config)
    layout = {arm.name: arm.layout for arm in arms}
    assert layout["random"] == layout["cluster"]
    assert len({layout[name] for name in layout if name.endswith("no-outliers")}) == 1
    assert layout["random-no-outliers"] != layout["random"]
    # To know what to leave out the corpus has to be clustered, also for random batches.
    assert arms_by_name(config)["random-no-outliers"].uses_clusters
    assert layouts[layout["random-no-outliers"]].batches.stratify == "cluster"


def test_arms_may_be_nested_as_files_are_and_change_what_they_name():
    flat, nested = (
        "{batches.stratify: source, batches.random_share: 0.1}",
        "{batches: {stratify: source, random_share: 0.1}}",
    )
    one, other = (arms_by_name(configured(f"{{random: {{}}, own: {own}}}"))["own"] for own in (flat, nested))
    assert one.config.batches == other.config.batches
    assert (one.config.batches.size, one.config.batches.stratify) == (128, "source")
    # As the report and its verdict read them.
    assert other.changes == one.changes == {"batches.stratify": "source", "batches.random_share": 0.1}


def test_a_nested_arm_changes_nothing_that_is_the_same_for_all():
    with pytest.raises(UsageError, match=r"compare\.arms\.own: train\.steps is the same for all arms"):
        arms_of(configured("{random: {}, own: {train: {steps: 5}}}"))


def test_arms_with_semantic_duplicates_have_clusters_that_know_them():
    duplicates = "cluster.duplicates: {threshold: 0.9}"
    config = configured(f"{{random: {{}}, cluster: {{}}, other: {{batches.stratify: random, {duplicates}}}}}")
    arms, layouts = arms_of(config)
    layout = {arm.name: arm.layout for arm in arms}
    assert layout["random"] == layout["cluster"] != layout["other"]
    assert layouts[layout["other"]].batches.stratify == "cluster"
    assert arms_by_name(config)["other"].uses_clusters


def test_clusters_do_not_grow_with_the_batches_of_an_arm():
    arms = arms_by_name(configured("[random,cluster,random-4x,random-8x]"))
    assert [arms[name].config.batches.size for name in ("random", "random-4x", "random-8x")] == [128, 512, 1024]
    assert arms["random-4x"].config.cluster.mean_size == arms["cluster"].config.cluster.mean_size


def test_groups_matched_in_hardness_are_small_and_not_what_is_shown():
    arms, layouts = arms_of(configured("[random,hardness-matched,cluster]", "cluster.clusters=7"))
    matched = next(arm for arm in arms if arm.name == "hardness-matched")
    assert matched.matched
    assert layouts[matched.layout].cluster.mean_size == 16
    assert layouts[matched.layout].cluster.clusters is None
    assert clustered_layout(arms) == next(arm.layout for arm in arms if arm.name == "cluster")
    assert with_groups(matched, 8).config.batches.clusters_per_batch == 8


def test_a_curriculum_of_halves_follows_the_steps():
    arms = arms_by_name(configured("[random,cluster,cluster-first,cluster-last,cluster-mixed]"))
    assert len({arm.layout for arm in arms.values()}) == 1
    first, last = (with_phases(arms[name], 41).config.batches for name in ("cluster-first", "cluster-last"))
    assert [phase.steps for phase in first.curriculum] == [20, None]
    assert [phase.stratify for phase in first.phases] == ["cluster", "random"]
    assert [phase.stratify for phase in last.phases] == ["random", "cluster"]
    assert with_phases(arms["cluster-mixed"], 41) is arms["cluster-mixed"]
    own = "{random: , own: {batches.stratify: cluster, batches.curriculum: [{steps: 5, stratify: source}, {}]}}"
    assert [phase.steps for phase in arms_by_name(configured(own))["own"].config.batches.curriculum] == [5, None]


def test_the_arms_for_the_order_have_clusters_when_they_say():
    index = make_index([[128, 128, 128, 128]])
    arms = arms_by_name(configured("[random,cluster-first,cluster-last,cluster-mixed]", "batches.size=32"))
    purity = {}
    for name, arm in arms.items():
        plan = make_plan(index, with_phases(arm, 6).config.batches)
        purity[name] = np.array([plan.batch(step).purity for step in range(6)])
    assert (purity["cluster-first"] == 1).tolist() == [True] * 3 + [False] * 3
    assert (purity["cluster-last"] == 1).tolist() == [False] * 3 + [True] * 3
    assert purity["random"].max() < purity["cluster-mixed"].min() < purity["cluster-mixed"].max() < 1


def test_every_built_in_arm_and_recipe_is_a_valid_arm():
    arms = arms_by_name(configured(str([*BUILT_IN, *recipes()])))
    assert set(arms) == {*BUILT_IN, *recipes()}
    assert not set(BUILT_IN) & set(recipes())


def test_names_of_arms_mean_what_they_always_meant():
    mask = {"train.mask.surrogate_margin": -0.05, "train.mask.surrogate_relative": True}
    topics = {
        "batches.stratify": "cluster",
        "batches.uniform_clusters": True,
        "batches.clusters_per_batch": 1,
        "cluster.features": "query",
        "cluster.clusters": 2000,
    }
    balanced = {**topics, "mine.negatives": 1, "mine.pick": "balanced"}
    arms = {
        "group": ("group", {}),
        "random-groups": ("random_groups", {}),
        "random-groups-masked": ("random_groups", mask),
        "cluster-query": ("cluster", {"cluster.features": "query"}),
        "cluster-both": ("cluster", {"cluster.features": "both"}),
        "cluster-corpus": ("cluster", {"cluster.scope": "corpus"}),
        "random-mined": ("random", {"mine.negatives": 1}),
        "cluster-consistent": ("cluster", {"mine.consistency": 20}),
        "tas": ("cluster", topics),
        "tas-balanced": ("cluster", balanced),
        "tas-b": ("cluster", {**balanced, "mine.margins": True, "train.margin_mse": 0.1}),
        "communities": (
            "cluster",
            {"cluster.method": "communities", "cluster.mean_size": 32, "cluster.run_rows": 32},
        ),
        "cluster-first": ("cluster", {"batches.curriculum": [{"steps": "half"}, {"stratify": "random"}]}),
        "cluster-last": (
            "cluster",
            {"batches.curriculum": [{"steps": "half", "stratify": "random"}, {"stratify": "cluster"}]},
        ),
        "cluster-mixed": ("cluster", {"batches.random_share": 0.5}),
        "hardness-matched": ("cluster", {"cluster.mean_size": "matched", "batches.clusters_per_batch": "matched"}),
        **{f"cluster-{times}x": ("cluster", {"cluster.mean_size": f"{times}x"}) for times in (8, 16)},
        **{f"random-{times}x": ("random", {"batches.size": f"{times}x"}) for times in (2, 4, 8)},
        **{f"super-{times}x": ("source", {"batches.super_batch": times}) for times in (4, 16, 32, 64)},
        "super-16x-last": ("source", {"batches.curriculum": [{"steps": "half"}, {"super_batch": 16}]}),
    }
    for name in ("random", "source", "cluster"):
        arms |= {name: (name, {}), f"{name}-masked": (name, mask)}
        arms[f"{name}-no-outliers"] = (name, {"cluster.drop_outliers": 0.05})
    expected = {name: {"batches.stratify": strategy, **changes} for name, (strategy, changes) in arms.items()}
    found = configured(str(list(expected))).compare.arms
    assert {name: found[name] for name in expected} == expected
    assert len(BUILT_IN) == 10
    assert set(expected) == {*BUILT_IN, *recipes()}


@pytest.mark.parametrize("arms", ["[random,clutser]", "{random: , clutser: }"])
def test_an_unknown_name_is_refused_with_those_that_are_known(arms: str):
    with pytest.raises(UsageError, match=r"'clutser' \(built in: random, .*; recipes: cluster-16x, .*tas-b") as error:
        configured(arms)
    assert "compare.arms" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_strategy_of_ones_own_has_clusters_of_its_own_and_their_price(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(STRATEGIES, "source", Strategy(clusters_of, layouts=("cluster",)))
    small = "{cluster: , own: {batches.stratify: source, cluster.mean_size: 64}, random: }"
    config = configured(small)
    arms = arms_by_name(config)
    assert arms["own"].uses_clusters
    assert arms["own"].uses_embeddings
    assert arms["own"].layout != arms["cluster"].layout
    layout = arms_of(config)[1][arms["own"].layout]
    assert (layout.batches.stratify, layout.cluster.mean_size) == ("cluster", 64)
    # With the same clusters as another arm: the same shards.
    arms = arms_by_name(configured("{cluster: , own: {batches.stratify: source}}"))
    assert arms["own"].layout == arms["cluster"].layout


def test_what_is_the_same_for_all_cannot_be_changed_by_an_arm():
    with pytest.raises(UsageError, match=r"compare.arms.other: embed.max_tokens is the same for all arms"):
        arms_of(configured("{random: , other: {embed.max_tokens: 8}}"))


@pytest.mark.parametrize(
    ("arm", "named"),
    [
        ("{batches.sise: 8}", r"batches\.sise: unknown key"),
        ("{batches.size: 1}", r"batches\.size"),
        ("{corpus.seed: 1}", r"compare\.arms\.own: corpus\.seed"),
        ("{train.steps: 100}", r"compare\.arms\.own: train\.steps is the same for all arms"),
        ("{batches.seed: 1}", r"compare\.arms\.own: batches\.seed is the same for all arms"),
        ("{batches.curriculum: [{steps: half}, {stratify: none}]}", r"batches\.curriculum"),
    ],
)
def test_an_arm_that_cannot_be_is_refused_before_any_work(arm: str, named: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compare, "ingest", _work)
    with pytest.raises(UsageError, match=named):
        compare.compare(configured(f"{{random: , own: {arm}}}"))


def test_a_candidate_that_cannot_be_is_refused_before_any_work(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tune, "ingest", _work)
    with pytest.raises(UsageError, match=r"cluster\.mean_sise: unknown key"):
        tune.tune(load_config(None, ["workspace=/tmp/none", "tune.candidates={cluster.mean_sise: [64, 128]}"]))


def _work(config: RunConfig) -> None:
    raise AssertionError("work has begun")


def test_a_long_comparison_has_three_times_the_steps():
    plan = BatchPlan(make_index([[320]]), BatchesConfig(size=32))
    assert plan.steps_per_epoch == 10
    assert _steps(configured("[random,cluster]", "compare.steps=40"), plan) == 40
    assert _steps(configured("[random,cluster]", "compare.steps=40", "compare.long=true"), plan) == 120
    assert _steps(configured("[random,cluster]", "train.epochs=2", "compare.long=true"), plan) == 60


def test_force_replaces_what_a_layout_has_of_another_sample():
    config, calls = configured("[random,cluster]"), []

    def stage(layout: RunConfig, *, force: bool = False) -> str:
        calls.append(force)
        if not force:
            raise OtherWorkError("of another sample")
        return "made"

    with pytest.raises(OtherWorkError):
        compare.made_or_replaced(stage, config, force=False)
    assert compare.made_or_replaced(stage, config, force=True) == "made"
    assert calls == [False, False, True]
    # What is of this sample is kept.
    assert compare.made_or_replaced(lambda layout: "kept", config, force=True) == "kept"


@pytest.mark.parametrize(
    "word", ["compare.learning_rates=[0.01,0]", "compare.temperatures=[-0.05]", "predict.sizes=[0,64]"]
)
def test_values_that_no_run_can_have_are_refused_at_once(word: str):
    with pytest.raises(UsageError, match=word.partition("=")[0].replace(".", r"\.")):
        configured("[random,cluster]", word)


@pytest.mark.parametrize("queries", [["q1"], []])
def test_a_sweep_needs_queries_to_choose_by_and_others_to_judge_by(queries: list[str]):
    collection = SimpleNamespace(name="few", read_judgements=lambda: {query: {} for query in queries})
    with pytest.raises(UsageError, match=r"compare\.learning_rates.* of few are in the same"):
        compare._check_halves(configured("[random,cluster]", "compare.learning_rates=[0.01,0.02]"), [collection])
    # Without a sweep all queries judge.
    compare._check_halves(configured("[random,cluster]", "compare.learning_rates=[0.01]"), [collection])


def test_a_candidate_is_tried_with_the_clusters_that_the_choice_would_have():
    config = load_config(None, ["workspace=/tmp/none", "batches.size=64", "cluster.mean_size=null"])
    candidates = {str(size): {"batches.size": size} for size in (32, 128)}
    arms, _ = tune._arms(config, candidates)
    assert [arm.config.cluster.mean_size for arm in arms] == [128, 512]
    assert [mean_size(with_changes(config, changes)) for changes in candidates.values()] == [128, 512]


def test_arms_whose_batches_are_the_same_are_named(caplog: pytest.LogCaptureFixture) -> None:
    """Sources of four batches: super-batches of eight and of more hold all of a source."""
    random = np.random.default_rng(0)
    vectors = random.standard_normal((2, 256, 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=2, keepdims=True)
    index = make_index([[128], [128]])
    arms, plans = [], {}
    for name, size in {"one": 1, "two": 2, "eight": 8, "many": 64, "masked": 64}.items():
        changes = {"train.mask.own_score_margin": 0.1} if name == "masked" else {}
        config = with_changes(configured("[random,source]"), changes)
        arms.append(Arm(name, config, "layout"))
        batches = BatchesConfig(size=32, stratify="source", super_batch=size)
        plans[name] = make_plan(index, batches, "source", lambda piece, row: tuple(vectors[:, 128 * piece + row]))
    alike = compare.same_batches(arms, plans, 8)
    assert alike == [["eight", "many"]]
    compare._say_same_batches(alike)
    assert caplog.text.count("the same batches as") == 1
    assert "many: the same batches as eight" in caplog.text
