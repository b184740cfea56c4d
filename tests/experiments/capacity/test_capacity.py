"""The scale model: its counts against a real run's, its fit, and what it says of sizes nobody has tried."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clusterbatch.batches.strategies import STRATEGIES, Strategy, clusters_of
from clusterbatch.cli import main
from clusterbatch.config import load_config
from clusterbatch.config.compare import PricesConfig
from clusterbatch.errors import UsageError
from clusterbatch.evaluation import stage as evaluation
from clusterbatch.evaluation.collection import Collection
from clusterbatch.evaluation.models import EvaluatedModel
from clusterbatch.experiments.capacity.calibrate import GPUS, Measured, check_writable, fit, load, on_gpu, save
from clusterbatch.experiments.capacity.dry_run import dry_run
from clusterbatch.experiments.capacity.scale_model import CapacityModel, Coefficients, StageEstimate
from clusterbatch.experiments.capacity.sizes import Shape, TeacherShape, Workload
from clusterbatch.experiments.capacity.workload import model_of, shape_of
from clusterbatch.scoring.stage import score
from clusterbatch.shards.stage import cluster
from clusterbatch.store import Folder
from clusterbatch.store.workspace import STAGE_ARTIFACTS
from tests.clustering.embedded import embedded_workspace
from tests.encoder.models import make_model, make_static

WORDS = ["workspace=w", "corpus.row_group_rows=1000", "cluster.mean_size=500", "batches.size=100", "train.epochs=2"]
TRUE = Coefficients(
    "made up",
    {"ingest": 5.0, "embed backbone": 8.0, "cluster": 20.0, "train static": 9.0, "evaluate static": 4.0},
    {"ingest": 1e6, "embed backbone": 5e10, "cluster": 4e3, "train static": 1e5, "evaluate static": 1e5},
    4e10,
    {"ingest": 2e-6, "cluster": 1e-3},
)


def model(rows: int, *words: str) -> CapacityModel:
    workload = Workload(rows, 4, rows * 300, 40.0, 400.0, evaluation_bytes=rows * 30)
    return CapacityModel(load_config(None, [*WORDS, *words]), workload, Shape(), Shape())


def measured(model: CapacityModel) -> Measured:
    """A run on a machine that is as TRUE says."""
    seconds = {stage: model.seconds(stage, TRUE) for stage in STAGE_ARTIFACTS}
    alone = {
        stage: TRUE.fixed[name] + TRUE.serial.get(name, 0.0) * model.work(stage)
        for stage, name in ((stage, model.rate_name(stage)) for stage in STAGE_ARTIFACTS)
    }
    return Measured(
        model, seconds, {stage: (seconds[stage] - alone[stage]) * model.workers(stage) for stage in seconds}
    )


def test_two_runs_foretell_one_fifty_times_larger_and_on_more_workers() -> None:
    found = fit(measured(model(2_000)), measured(model(60_000)), TRUE.matrix_flops)
    for unseen in (model(3_000_000), model(3_000_000, "corpus.workers=16", "cluster.workers=8", "embed.workers=32")):
        for stage in STAGE_ARTIFACTS:
            assert unseen.seconds(stage, found) == pytest.approx(unseen.seconds(stage, TRUE), rel=1e-6)


def test_start_up_that_varies_leaves_the_rates_alone() -> None:
    small, large = measured(model(2_000)), measured(model(6_000))
    slow = replace(small, seconds={stage: seconds + 30 for stage, seconds in small.seconds.items()})
    assert fit(slow, large, TRUE.matrix_flops).rate == fit(small, large, TRUE.matrix_flops).rate


def test_what_a_worker_takes_to_start_is_no_work() -> None:
    """Figures of a machine whose workers each load a model for four seconds, and that waits three in larger runs."""
    runs = [measured(model(rows)) for rows in (2_000, 6_000, 300_000)]
    late = [
        replace(
            run,
            seconds={stage: seconds + 4 + wait for stage, seconds in run.seconds.items()},
            worker_seconds={
                stage: seconds + 4 * run.model.workers(stage) for stage, seconds in run.worker_seconds.items()
            },
        )
        for run, wait in zip(runs, (0, 3, 3), strict=True)
    ]
    found = fit(*late[:2], TRUE.matrix_flops)
    for stage in ("embed", "train", "evaluate"):
        assert runs[2].model.seconds(stage, found) == pytest.approx(late[2].seconds[stage], rel=1e-6)


def test_objects_of_a_search_are_those_that_the_stage_makes(tmp_path: Path) -> None:
    """At 10^8 documents as well: candidates do not grow with them, however the collection is cut."""

    class Documents(Collection):
        def documents_bytes(self) -> int:
            return int(self.split)

    config = load_config(None, ["workspace=w", "evaluate.models=[before,after,bm25]"])
    labels = [EvaluatedModel(name, name, None, name) for name in ("before", "after")]
    labels.append(EvaluatedModel("bm25", "", None, "bm25"))
    found = []
    for rows in (10**4, 10**6, 10**8):
        items, _ = evaluation._items(config, labels, [Documents("d", Folder(str(tmp_path)), str(rows * 400))])
        written = sum(1 if item.payload.lexical else 2 for item in items) + len(items)
        read = sum(len(item.payload.ranges) for item in items if not item.payload.lexical)
        workload = Workload(rows, 1, 0, 40.0, 400.0, evaluation_bytes=rows * 400, evaluation_queries=6_980)
        stay, _, puts, gets = CapacityModel(config, workload, Shape(), Shape())._storage()["evaluate"]
        blocks = -(-6_980 // items[0].payload.query_block)
        assert (stay, puts) == (6 * blocks + 1, written + stay)
        assert gets == 4 * read + blocks * (written - len(items))
        found.append(puts)
    assert found[2] <= 3 * 256 + 1 + 1 + stay


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("size", [60, 1500])
def test_objects_of_scores_are_those_that_the_stage_makes(tmp_path: Path, size: int) -> None:
    rows = {"forum": 3000, "wiki": 3000}
    teacher = make_static(["about"], tmp_path / "teacher")
    settings = {
        "cluster": {"mean_size": size, "device": "cpu"},
        "score": {"teacher": str(teacher), "device": "cpu", "window": 1280},
    }
    config = embedded_workspace(str(tmp_path / "w"), rows, centres=100, settings=settings)
    cluster(config)
    made = score(config)
    workload = Workload(sum(rows.values()), len(rows), 0, 40.0, 400.0)
    estimate = CapacityModel(config, workload, Shape(), Shape(), TeacherShape(Shape(), reads_pairs=False))
    objects, stored, puts, _ = estimate._storage()["score"]
    # Clusters are of different sizes, so units are not filled alike.
    assert objects == pytest.approx(len(made.parts), rel=0.35)
    assert puts == 1.5 * objects + 1
    assert stored == pytest.approx(sum(part.bytes for part in made.parts), rel=0.3)


def test_a_cross_encoder_reads_every_pair_and_an_embedding_model_every_text() -> None:
    plan = model(10**6, "score.teacher=any", "score.nearest=9")
    by_text, by_pair = (
        replace(plan, teacher=TeacherShape(Shape(), reads_pairs=reads_pairs)) for reads_pairs in (False, True)
    )
    assert by_text.work("score") == plan.work("embed")
    assert by_pair.work("score") == 10 * by_text.work("score")
    assert [each.stage for each in plan.estimate(TRUE, PricesConfig())] == list(STAGE_ARTIFACTS)
    seconds = {each.stage: each.seconds for each in by_pair.estimate(TRUE, PricesConfig())}
    assert list(seconds) == ["ingest", "embed", "cluster", "score", "train", "evaluate"]
    assert seconds["score"] > 9 * seconds["embed"]


def test_a_dry_run_of_score_estimates_it_and_runs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"query": "q" * 40, "document": "d" * 400}) + "\n")
    words = [f"workspace={tmp_path}/w", f"corpus.paths={tmp_path}/pairs.jsonl", "--dry-run", "--json"]
    teacher = f"score.teacher={make_model('bert', tmp_path / 'teacher')}"
    assert main(["score", *words, teacher]) == 0
    [found] = json.loads(capsys.readouterr().out)["stages"]
    assert (found["stage"], found["workers"]) == ("score", 2)
    assert found["seconds"] > 0
    assert main(["run", *words, teacher]) == 0
    assert "score" in [row["stage"] for row in json.loads(capsys.readouterr().out)["stages"]]
    assert main(["score", *words]) == 2
    assert "set score.teacher" in capsys.readouterr().err
    assert not (tmp_path / "w").exists()


def test_which_strategies_need_clusters_is_said_by_their_table(monkeypatch: pytest.MonkeyPatch) -> None:
    clustered = model(100_000).clusters
    assert model(100_000, "batches.stratify=source").clusters == 4 < clustered
    monkeypatch.setitem(STRATEGIES, "source", Strategy(clusters_of, layouts=("cluster",)))
    assert model(100_000, "batches.stratify=source").clusters == clustered


def test_super_batches_are_read_by_every_worker() -> None:
    def train(*words: str) -> StageEstimate:
        estimates = model(10**6, "batches.stratify=source", *words).estimate(TRUE, PricesConfig())
        return next(each for each in estimates if each.stage == "train")

    plain = train()
    for workers in (1, 4):
        found = train("batches.super_batch=16", f"train.workers={workers}")
        assert found.gets == pytest.approx(2 * workers * plain.gets, rel=1e-6)
        # 1,600 rows of two vectors of 384 numbers in two and in four bytes.
        assert found.worker_bytes - plain.worker_bytes == 1600 * 2 * 384 * 6


def test_a_larger_run_that_took_no_longer_leaves_no_negative_time() -> None:
    found = []
    for rows, seconds in ((2_000, 10.0), (6_000, 9.0)):
        found.append(Measured(model(rows), *(dict.fromkeys(STAGE_ARTIFACTS, each) for each in (seconds, seconds - 3))))
    fitted = fit(*found, TRUE.matrix_flops)
    assert all(value >= 0 for value in (*fitted.fixed.values(), *fitted.serial.values()))
    assert all(value > 0 for value in fitted.rate.values())
    with pytest.raises(UsageError, match=r"1\.5 times"):
        fit(found[0], found[0], TRUE.matrix_flops)


def test_everything_grows_with_the_rows_and_nothing_of_a_worker_does() -> None:
    words = ["cluster.clusters=16", "train.epochs=1", "score.window=1000"]
    teacher = TeacherShape(Shape(), reads_pairs=False)
    few = CapacityModel(load_config(None, [WORDS[0], *words]), model(10**5).workload, Shape(), Shape(), teacher)
    many = replace(few, workload=replace(few.workload, rows=10**7, input_bytes=few.workload.input_bytes * 100))
    for small, large in zip(few.estimate(TRUE, PricesConfig()), many.estimate(TRUE, PricesConfig()), strict=True):
        assert large.worker_bytes == small.worker_bytes
        if small.stage != "evaluate":
            assert large.seconds > 5 * small.seconds
            assert large.gets > 10 * small.gets


def test_gpus_speed_up_what_runs_on_them() -> None:
    fast = on_gpu(TRUE, GPUS["l4"], Shape(), Shape())
    plan = model(10**6)
    for stage in STAGE_ARTIFACTS:
        faster = plan.seconds(stage, fast) < 0.1 * plan.seconds(stage, TRUE)
        assert faster == (stage == "embed")
    assert {"train backbone", "evaluate backbone"} <= fast.rate.keys()


def test_costs_follow_the_prices_of_the_configuration_and_are_unknown_without_any() -> None:
    plan = model(10**6)
    unpriced = plan.estimate(TRUE, PricesConfig(), on_gpu=True)
    assert {stage.cost for stage in unpriced} == {None}
    for stage in unpriced:
        assert stage.worker_hours == pytest.approx(stage.seconds * stage.workers / 3600)
        assert stage.gpu_hours == (stage.worker_hours if stage.stage in ("embed", "train", "evaluate") else 0)
    prices = PricesConfig(cpu_hour=0.1, gpu_hour=2.0, million_reads=0.4, million_writes=5.0)
    for stage in plan.estimate(TRUE, prices, on_gpu=True):
        hours = 2.0 * stage.gpu_hours + 0.1 * (stage.worker_hours - stage.gpu_hours)
        # Requests are rounded to whole ones.
        assert stage.cost == pytest.approx(hours + 5e-6 * stage.puts + 4e-7 * stage.gets, abs=1e-5)


def test_an_estimate_has_a_column_of_money_only_with_prices(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"query": "q" * 40, "document": "d" * 400}) + "\n")
    words = ["run", f"workspace={tmp_path}/w", f"corpus.paths={tmp_path}/pairs.jsonl", "--dry-run"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "No prices are configured" in shown
    assert "EUR" not in shown
    assert main([*words, "compare.prices={cpu_hour: 1.0, terabyte_month: 20.0, currency: EUR}"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("EUR") == 2
    assert "a month" in shown


@pytest.mark.parametrize("columns", ["60", "200"])
def test_no_figure_is_cut_off_in_a_narrow_terminal(
    columns: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("FORCE_COLOR", "1")
    dry_run(load_config(None, WORDS), rows=10**9)
    assert "…" not in capsys.readouterr().out


def test_coefficients_of_two_kinds_of_training_meet_in_one_file(tmp_path: Path) -> None:
    path = str(tmp_path / "mine.json")
    save(TRUE, path)
    save(replace(TRUE, rate={"train backbone": 3e10}, fixed={"train backbone": 2.0}), path)
    found = load(path)
    assert found.rate == {**load().rate, **TRUE.rate, "train backbone": 3e10}
    assert found.serial == TRUE.serial
    assert found.fixed.keys() == found.rate.keys()
    # Files of earlier versions name no kind of encoder where it is not trained.
    (tmp_path / "older.json").write_text(
        json.dumps({"machine": "m", "fixed": {"embed": 1.0}, "rate": {"embed": 2e10}, "matrix_flops": 1e10})
    )
    assert load(str(tmp_path / "older.json")).rate == {**load().rate, "embed backbone": 2e10}
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(UsageError, match="not a file of coefficients"):
        load(str(tmp_path / "broken.json"))


def test_the_package_brings_coefficients_for_every_stage() -> None:
    found = load()
    kinds = {f"{stage} {kind}" for stage in ("embed", "train", "evaluate") for kind in ("static", "backbone")}
    assert found.rate.keys() == kinds | {"ingest", "cluster"}
    assert found.rate.keys() == found.fixed.keys()


def test_sizes_come_from_the_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lengths = np.arange(1, 3001)
    for source in ("one", "two"):
        documents = ["x" * int(length % 100 + 1) for length in lengths]
        table = pa.table({"query": ["what is it"] * len(lengths), "document": documents})
        pq.write_table(table, tmp_path / f"{source}.parquet")
    (tmp_path / "three.jsonl").write_text(
        "".join(json.dumps({"query": "q" * 40, "document": "d" * 400}) + "\n" for _ in range(500))
    )
    found = model_of(load_config(None, [f"workspace={tmp_path}/w", f"corpus.paths={tmp_path}"])).workload
    assert found.rows == pytest.approx(6_500, rel=0.02)
    assert found.sources == 3
    assert found.query_characters == pytest.approx((6000 * 10 + 500 * 50) / 6500, rel=0.02)
    assert found.document_characters == pytest.approx((6000 * 50.5 + 500 * 400) / 6500, rel=0.05)
    words = [f"workspace={tmp_path}/w", f"corpus.paths={tmp_path}"]
    assert main(["run", *words, "--dry-run", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [row["stage"] for row in shown["stages"]] == list(STAGE_ARTIFACTS)
    assert main(["embed", *words, "--dry-run", "--json"]) == 0
    assert [row["stage"] for row in json.loads(capsys.readouterr().out)["stages"]] == ["embed"]
    # Nothing was done.
    assert not (tmp_path / "w").exists()


def test_a_broken_file_is_left_to_the_ingest(tmp_path: Path) -> None:
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more of it")
    config = load_config(
        None, [f"workspace={tmp_path}/w", f"corpus.paths={tmp_path}/broken.parquet", "evaluate.path=[]"]
    )
    assert model_of(config).workload.rows < 10


def test_a_static_surrogate_is_foretold_by_its_tokens_and_not_as_a_transformer(tmp_path: Path) -> None:
    config = load_config(None, WORDS)
    static = shape_of(str(make_static(["about", "tables"], tmp_path / "static")), config)
    assert static.static
    assert static.weights == 0
    assert (static.hidden, static.vocabulary) == (32, 4)
    assert shape_of("char-ngrams", config).static
    plan = replace(model(10**6), surrogate=static)
    assert plan.rate_name("embed") == "embed static"
    # A transformer of MiniLM's size takes a hundred times as long.
    assert plan.seconds("embed", load()) < 0.05 * model(10**6).seconds("embed", load())


@pytest.mark.parametrize("name", ["pairs.csv", "pairs.jsonl.gz", "pairs.jsonl.zst", "pairs.jsonl"])
def test_rows_are_estimated_in_quoted_cells_and_compressed_files(tmp_path: Path, name: str) -> None:
    random = np.random.default_rng(0)
    rows = [("what is it", " ".join(f"{word:05d}" for word in random.integers(0, 99_999, 40))) for _ in range(2000)]
    if name.endswith("csv"):
        body = "query,document\n" + "".join(f'{query},"{text}\n\nand\nmore"\n' for query, text in rows)
    else:
        body = "".join(json.dumps({"query": query, "document": text}) + "\n" for query, text in rows)
    data = body.encode()
    if name.endswith(("gz", "zst")):
        data = bytes(pa.compress(data, codec="gzip" if name.endswith("gz") else "zstd", asbytes=True))
    (tmp_path / name).write_bytes(data)
    found = model_of(load_config(None, [f"workspace={tmp_path}/w", f"corpus.paths={tmp_path}/{name}"])).workload
    assert found.rows == pytest.approx(2000, rel=0.03)


@pytest.mark.parametrize("rows", [b"", b"\n"])
def test_an_empty_corpus_has_an_estimate(tmp_path: Path, rows: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.jsonl").write_bytes(rows)
    assert main(["run", f"workspace={tmp_path}/w", f"corpus.paths={tmp_path}/empty.jsonl", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["workload"]["rows"] <= 1


def test_approximate_mining_and_what_is_held_out_are_counted(tmp_path: Path) -> None:
    exact = model(10**7, "mine.negatives=1")
    approximate = model(10**7, "mine.negatives=1", "mine.approximate_above=100000")
    assert approximate.clustering_flops() < 0.05 * exact.clustering_flops()
    assert model(10**4, "mine.negatives=1", "mine.approximate_above=100000").clustering_flops() == pytest.approx(
        model(10**4, "mine.negatives=1").clustering_flops()
    )
    config = load_config(None, [f"workspace={tmp_path}", "corpus.paths=none", "evaluate.path=[]"])
    known = {"rows": 10**6, "sources": 1, "document_characters": 400.0}
    held_out = model_of(config, **known)
    assert held_out.workload.evaluation_bytes > 4e8
    assert held_out.seconds("evaluate", TRUE) > 0.1 * held_out.seconds("ingest", TRUE)


def test_a_comparison_says_what_it_will_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [json.dumps({"query": "q" * 40, "document": "d" * 400}) for _ in range(6400)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    words = [f"workspace={tmp_path}/w", f"corpus.paths={tmp_path}/pairs.jsonl", "batches.size=64"]
    words += ["compare.arms=[random,source,cluster]", "compare.seeds=3"]
    assert main(["compare", *words, "train.epochs=2", "--dry-run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["arms"], found["seeds"], found["runs"]) == (3, 3, 9)
    assert found["steps"] == pytest.approx(200, rel=0.02)
    assert found["epochs"] == pytest.approx(2, rel=0.02)
    assert main(["compare", *words, "compare.steps=20", "compare.sample=0.5", "--dry-run", "--json"]) == 0
    fewer = json.loads(capsys.readouterr().out)
    assert fewer["epochs"] == pytest.approx(0.4, rel=0.02)
    assert fewer["minutes"] < found["minutes"]
    assert main(["compare", *words, "--dry-run"]) == 0
    assert "9 runs of 100 steps (1 epochs)" in capsys.readouterr().out
    slow = ["compare", *words, "train.epochs=20", "compare.workers=1", "--dry-run", "--json"]
    assert main(slow) == 0
    whole = json.loads(capsys.readouterr().out)
    assert whole["minutes"] > 10
    for given in ([], ["compare.sample=0.5"]):
        assert main([*slow, *given, "--budget", "10m"]) == 0
        fits = json.loads(capsys.readouterr().out)
        # The time is used, and not exceeded.
        assert 4 < fits["minutes"] < 10
        assert fits["rows"] == 3200 if given else fits["rows"] < whole["rows"]
        assert fits["steps"] < whole["steps"]
    assert not (tmp_path / "w").exists()


@pytest.fixture
def plan_capacity(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The script, with its words."""
    script = runpy.run_path(str(Path(__file__).parents[3] / "jobs" / "plan_capacity.py"))

    def run(*words: str) -> int:
        monkeypatch.setattr("sys.argv", ["plan_capacity.py", "workspace=w", *words])
        return script["main"]()

    return run


@pytest.mark.parametrize("words", [("--rows", "nan"), ("--rows=-5",), ("--rows", "inf"), ("--query-characters=-1",)])
def test_sizes_that_there_cannot_be_are_refused(
    words: tuple[str, ...], plan_capacity: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        plan_capacity(*words)
    assert "expected a number that is not negative" in capsys.readouterr().err


def test_static_models_alone_have_an_estimate_on_gpus() -> None:
    static = Shape(weights=0, static=True)
    coefficients = load()
    assert on_gpu(coefficients, GPUS["l4"], static, static).rate["embed static"] == coefficients.rate["embed static"]


def test_where_coefficients_cannot_go_is_said_before_anything_is_measured(
    tmp_path: Path, plan_capacity: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other.json").write_text("no coefficients")
    for path, reason in (
        (tmp_path / "other.json", "not a file of coefficients"),
        (tmp_path / "no" / "c.json", "folder"),
    ):
        # No run has been in these workspaces, which measuring would say.
        assert plan_capacity("--calibrate", "small", "large", "--coefficients", str(path)) == 2
        assert reason in capsys.readouterr().err
        with pytest.raises(UsageError, match=reason):
            check_writable(str(path))
    check_writable(str(tmp_path / "new.json"))
