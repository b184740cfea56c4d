"""The stage `score`: what is scored and how, and that it is resumed, read and refused as other stages are."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from clusterbatch.batches.loader import SliceLoader
from clusterbatch.config import RunConfig, with_changes
from clusterbatch.corpus.normalise import text_hash
from clusterbatch.errors import ClusterbatchError, DataError, OtherWorkError, UsageError
from clusterbatch.pipeline.inspect_workspace import inspect_workspace
from clusterbatch.pipeline.run import SCORE, run_stage, stages_of
from clusterbatch.pipeline.summary import finished_stages
from clusterbatch.runtime import executor
from clusterbatch.scoring import stage
from clusterbatch.scoring.stage import ScoreWorker, score, score_units
from clusterbatch.shards.reader import ShardReader
from clusterbatch.shards.stage import cluster
from clusterbatch.store.workspace import Workspace
from clusterbatch.training.checks import check_scores
from clusterbatch.training.collectives import World
from clusterbatch.training.metrics import read_metrics
from clusterbatch.training.stage import planned_fingerprint as planned_training
from clusterbatch.training.worker import TrainingJob, open_plan, run_worker
from tests.clustering.embedded import embedded_workspace
from tests.encoder.models import make_model
from tests.integration.test_cluster_stage import all_runs, text_rows

SOURCES = {"forum": 300, "wiki": 200, "tiny": 9}
CLUSTER = {"mean_size": 60, "run_rows": 16, "shard_bytes": 2**16, "device": "cpu"}
NEAREST = 4

pytestmark = pytest.mark.usefixtures("in_process", "small_units")


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let small clusters make up several units."""
    monkeypatch.setattr(stage, "_UNIT_ROWS", 128)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small models with random weights: an embedding model, and a cross-encoder with one label."""
    root = tmp_path_factory.mktemp("teachers")
    embedding = make_model("bert", root / "embedding")
    tokenizer = transformers.AutoTokenizer.from_pretrained(embedding)
    torch.manual_seed(1)
    config = transformers.AutoConfig.from_pretrained(embedding)
    cross = root / "cross"
    for name, labels in (("cross", 1), ("labels", 3)):
        config.num_labels = labels
        transformers.BertForSequenceClassification(config).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return {"embedding model": embedding, "cross-encoder": cross, "labels": root / "labels"}


def _workspace(folder: Path, teacher: Path, **settings: Any) -> RunConfig:
    given = {"teacher": str(teacher), "nearest": NEAREST, "dtype": "float32", "device": "cpu"}
    return embedded_workspace(
        str(folder), SOURCES, optional=["negatives"], settings={"cluster": CLUSTER, "score": {**given, **settings}}
    )


@pytest.mark.parametrize("kind", ["embedding model", "cross-encoder"])
def test_every_row_has_the_teachers_scores(tmp_path: Path, teachers: dict[str, Path], kind: str) -> None:
    config = _workspace(tmp_path, teachers[kind])
    clusters = cluster(config)
    manifest = score(config)
    total = sum(SOURCES.values())
    assert manifest.counts.read == manifest.counts.written == total
    assert manifest.details["kind"] == kind
    artifact, scores = Workspace(config).clusters(), Workspace(config).scores()
    reader = ShardReader(artifact, scores)
    # Scores are read by the rows they are of, in whichever order runs are asked for.
    assert len(score_units(reader.index, config.score.window)) > 1
    runs, texts = all_runs(reader, vectors=True), text_rows(artifact)
    rows = [
        dict(zip(runs.column_names, values, strict=True)) for values in zip(*runs.to_pydict().values(), strict=True)
    ]
    described = dict(zip(runs["document_hash"].to_pylist(), texts["document"].to_pylist(), strict=True))
    pairs, found = [], []
    start = 0
    for entry in range(len(reader.index)):
        of_cluster = rows[start : start + int(reader.index.rows[entry])]
        of_texts = texts.slice(start, len(of_cluster)).to_pylist()
        start += len(of_cluster)
        hashes = {row["document_hash"] for row in of_cluster}
        query = np.array([row["query_vector"] for row in of_cluster], np.float32)
        document = np.array([row["document_vector"] for row in of_cluster], np.float32)
        cosines = query @ document.T
        for number, (row, text) in enumerate(zip(of_cluster, of_texts, strict=True)):
            negatives = {text_hash(each): each for each in text["negatives"] or []}
            assert row["negative_text_hash"] == [text_hash(each) for each in text["negatives"] or []]
            listed = dict(zip(row["teacher_document"], row["teacher_score"], strict=True))
            assert len(listed) == len(row["teacher_document"])
            assert row["teacher_score"] == sorted(row["teacher_score"], reverse=True)
            assert row["document_hash"] not in listed
            # Hard negatives, and the nearest documents of the cluster that do not answer the query.
            answers = {each["document_hash"] for each in of_cluster if each["query_hash"] == row["query_hash"]}
            nearest = set(listed) - set(negatives)
            assert set(negatives) <= set(listed) | {row["document_hash"]}
            assert nearest <= hashes - answers
            others = {
                each["document_hash"]: cosines[number, place]
                # Of a repeated document the first row counts.
                for place, each in reversed(list(enumerate(of_cluster)))
                if each["document_hash"] not in answers
            }
            assert len(nearest | (set(negatives) & set(others))) >= min(NEAREST, len(others))
            best = sorted(others.values(), reverse=True)[:NEAREST]
            assert all(others[each] >= best[-1] - 1e-3 for each in nearest)
            pairs.append((text["query"], text["document"]))
            found.append(row["teacher_positive"])
            for name, value in listed.items():
                pairs.append((text["query"], negatives.get(name) or described[name]))
                found.append(value)
    assert len(pairs) == total + manifest.details["candidates"]
    assert clusters.fingerprint == manifest.inputs["clusters"]
    assert np.allclose(found, _by_sentence_transformers(kind, teachers[kind], pairs), atol=2e-3)


def _by_sentence_transformers(kind: str, folder: Path, pairs: list[tuple[str, str]]) -> np.ndarray:
    """Return the scores by the library that the folders are made for."""
    import sentence_transformers

    if kind == "cross-encoder":
        return sentence_transformers.CrossEncoder(str(folder), device="cpu").predict(pairs)
    model = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    distinct = sorted({text for pair in pairs for text in pair})
    vectors = dict(zip(distinct, model.encode(distinct, normalize_embeddings=True), strict=True))
    return np.array([vectors[query] @ vectors[document] for query, document in pairs])


def test_a_cross_encoder_as_sentence_transformers_saves_it_scores_alike(
    tmp_path: Path, teachers: dict[str, Path]
) -> None:
    import sentence_transformers

    from clusterbatch.encoder.cross_encoder import CrossEncoder, is_cross_encoder

    pairs = [("what is a river", "water that flows"), ("bread", "a market " * 80), ("x", "")]
    for name, activation in (("sigmoid", torch.nn.Sigmoid()), ("identity", torch.nn.Identity())):
        saved = tmp_path / name
        model = sentence_transformers.CrossEncoder(
            str(teachers["cross-encoder"]), activation_fn=activation, device="cpu"
        )
        model.save_pretrained(str(saved))
        assert is_cross_encoder(saved)
        found = CrossEncoder(saved).scores(*map(list, zip(*pairs, strict=True)), 64)
        assert np.allclose(found, model.predict(pairs), atol=1e-5)
    assert not is_cross_encoder(teachers["embedding model"])


def test_a_killed_stage_ends_with_the_same_bytes(
    tmp_path: Path, teachers: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []
    for name in ("whole", "killed"):
        config = _workspace(tmp_path / name, teachers["embedding model"], window=64)
        cluster(config)
        if name == "killed":
            process, calls = ScoreWorker.process, []

            def fails(self, item, output, process=process, calls=calls):
                calls.append(item.number)
                if len(calls) == 3:
                    raise KeyboardInterrupt
                return process(self, item, output)

            with monkeypatch.context() as patch:
                patch.setattr(ScoreWorker, "process", fails)
                with pytest.raises(KeyboardInterrupt):
                    score(config)
            assert Workspace(config).scores().manifest() is None
            before = len(Workspace(config).scores().begin(_identity(tmp_path / "whole")))
            assert before == 2
        manifest = score(config)
        assert score(config).created == manifest.created
        folder = Workspace(config).scores().folder
        parts = sorted(manifest.parts, key=lambda part: (part.details["unit"], part.details["content"]))
        written.append([(part.details, folder.read(part.path)) for part in parts])
    assert written[0] == written[1]


def _identity(workspace: Path) -> str:
    return Workspace(RunConfig.model_validate({"workspace": str(workspace)})).scores().require().fingerprint


def test_a_large_cluster_is_searched_in_windows_of_whole_runs(tmp_path: Path, teachers: dict[str, Path]) -> None:
    config = with_changes(
        _workspace(tmp_path, teachers["embedding model"], window=72), {"cluster.clusters": 1, "cluster.mean_size": None}
    )
    cluster(config)
    reader = ShardReader(Workspace(config).clusters())
    units = [item.payload for item in score_units(reader.index, 72)]
    assert sum(sum(unit.windows) for unit in units) == sum(SOURCES.values())
    # 72 rows are four runs of 16 and a half, so windows have 64 at most.
    assert max(rows for unit in units for rows in unit.windows) == 64
    assert max(sum(unit.windows) for unit in units) <= 128
    for shard in np.unique(reader.index.shard).tolist():
        of_shard = [unit for unit in units if unit.shard == shard]
        runs = [sum(-(-rows // 16) for rows in unit.windows) for unit in of_shard]
        assert [unit.first_run for unit in of_shard] == [sum(runs[:place]) for place in range(len(runs))]
    score(config)
    scored = all_runs(ShardReader(Workspace(config).clusters(), Workspace(config).scores()))
    start = 0
    for rows in [rows for unit in units for rows in unit.windows]:
        window = scored.slice(start, rows)
        listed = set(window["teacher_document"].combine_chunks().flatten().to_pylist())
        negatives = set(window["negative_text_hash"].combine_chunks().flatten().to_pylist())
        assert listed <= set(window["document_hash"].to_pylist()) | negatives
        start += rows


def test_batches_of_every_strategy_carry_the_scores_of_their_rows(tmp_path: Path, teachers: dict[str, Path]) -> None:
    config = _workspace(tmp_path, teachers["embedding model"])
    manifest = cluster(config)
    score(config)
    artifact = Workspace(config).clusters()
    reader = ShardReader(artifact, Workspace(config).scores())
    runs = all_runs(reader)
    known = {
        (query, document): (positive, listed)
        for query, document, positive, listed in zip(
            *(
                runs[name].to_pylist()
                for name in ("query_hash", "document_hash", "teacher_positive", "teacher_document")
            ),
            strict=True,
        )
    }
    for stratify in ("random", "source", "cluster"):
        changed = with_changes(config, {"batches.stratify": stratify, "batches.size": 32})
        plan = open_plan(changed, artifact, manifest)
        for rank in range(2):
            loader = SliceLoader(plan, pickle.loads(pickle.dumps(reader)), rank, 2, 0, 3)
            for batch in loader:
                assert batch.teacher is not None
                lists = np.split(batch.teacher.document, np.cumsum(batch.teacher.counts)[:-1])
                for row, (query, document) in enumerate(zip(batch.query_hash, batch.document_hash, strict=True)):
                    positive, listed = known[int(query), int(document)]
                    assert batch.teacher.positive[row] == np.float32(positive)
                    assert lists[row].tolist() == listed
                assert len(batch.teacher.negative_hash) == batch.negative_counts.sum()


def test_training_masks_and_learns_by_the_scores(tmp_path: Path, teachers: dict[str, Path]) -> None:
    config = _workspace(tmp_path, teachers["embedding model"])
    train = {"model": str(teachers["embedding model"]), "learning_rate": 1e-3, "steps": 3, "trackers": []}
    config = with_changes(config, {**{f"train.{key}": value for key, value in train.items()}, "batches.size": 32})
    cluster(config)
    with pytest.raises(DataError, match="run that stage first"):
        check_scores(
            with_changes(config, {"train.teacher_kl": 1.0}),
            Workspace(config).scores(),
            Workspace(config).clusters().require(),
        )
    score(config)
    found: dict[str, list[dict[str, float]]] = {}
    arms = {
        "plain": {},
        "masked": {"train.mask.teacher_margin": -0.01},
        "kl": {"train.teacher_kl": 1.0},
        "margins": {"train.margin_mse": 1.0},
    }
    for name, changes in arms.items():
        changed = with_changes(config, {**changes, "workspace": str(tmp_path / name), "reuse.clusters": str(tmp_path)})
        job = TrainingJob(changed, 0, 3, changed.train.model, "a run")
        run_worker(job, World(), torch.device("cpu"))
        found[name] = [json.loads(line) for line in read_metrics(job.folder).splitlines()]
    assert found["masked"][0]["mask_rate"] > found["plain"][0]["mask_rate"] == found["kl"][0]["mask_rate"]
    assert found["masked"][0]["loss"] < found["plain"][0]["loss"]
    assert found["kl"][0]["loss"] > found["plain"][0]["loss"] < found["margins"][0]["loss"]


def test_a_run_scores_only_if_a_teacher_is_named(tmp_path: Path, teachers: dict[str, Path]) -> None:
    config = _workspace(tmp_path, teachers["embedding model"])
    assert [each.name for each in stages_of(config)] == ["ingest", "embed", "cluster", "score", "train", "evaluate"]
    assert "score" not in [each.name for each in stages_of(with_changes(config, {"score.teacher": None}))]
    cluster(config)
    run_stage(SCORE, config)
    [row] = [row for row in inspect_workspace(config) if row["stage"] == "score"]
    assert (row["state"], row["written"]) == ("done", sum(SOURCES.values()))
    assert "score" in [name for name, _, _ in finished_stages(config)]
    with pytest.raises(OtherWorkError, match=r"score\.nearest was 4, is 5"):
        run_stage(SCORE, with_changes(config, {"score.nearest": NEAREST + 1}))


def test_shards_and_trainings_without_a_teacher_keep_their_fingerprints(
    tmp_path: Path, teachers: dict[str, Path]
) -> None:
    config = _workspace(tmp_path, teachers["embedding model"])
    plain = with_changes(config, {"score.teacher": None, "train.model": str(teachers["embedding model"])})
    made = cluster(plain)
    alone = planned_training(plain)
    config = with_changes(plain, {"score.teacher": str(teachers["embedding model"])})
    scores = score(config)
    assert cluster(config).created == made.created
    # Scores that training does not read change nothing; those that it reads are among its inputs.
    assert planned_training(config) == alone
    masked = with_changes(config, {"train.mask.teacher_margin": -0.1})
    assert planned_training(masked) != alone
    other = with_changes(masked, {"score.nearest": NEAREST + 1})
    score(other, force=True)
    assert Workspace(other).scores().require().fingerprint != scores.fingerprint
    with pytest.raises(UsageError, match="holds scores made with another configuration"):
        score(config)


def test_scores_of_other_clusters_are_refused(tmp_path: Path, teachers: dict[str, Path]) -> None:
    config = _workspace(tmp_path, teachers["embedding model"])
    cluster(config)
    score(config)
    cluster(with_changes(config, {"cluster.mean_size": 90}), force=True)
    with pytest.raises(DataError, match="scores of other clusters"):
        ShardReader(Workspace(config).clusters(), Workspace(config).scores())


def _damaged(folder: Path, place: Path, change: Any) -> Path:
    shutil.copytree(folder, place)
    change(place)
    return place


def _with_config(**values: Any) -> Any:
    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    return change


CODE = {"AutoModelForSequenceClassification": "modeling.OwnForSequenceClassification"}
BAD = {
    "several labels": ("labels", lambda folder: None, "gives 3 labels, but a teacher gives one score"),
    "own code": ("cross-encoder", _with_config(auto_map=CODE), r"needs code of its own \(modeling\.Own"),
    "own model": ("embedding model", _with_config(model_type="own", auto_map={"AutoModel": "m.Own"}), "needs code of"),
    "activation": (
        "cross-encoder",
        _with_config(sentence_transformers={"activation_fn": "own.Activation"}),
        "activation own.Activation is not supported",
    ),
    "no weights": ("cross-encoder", lambda folder: (folder / "model.safetensors").unlink(), "no weights in the safe"),
    "half of the weights": (
        "cross-encoder",
        lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:2000]),
        "transformer cannot be loaded",
    ),
    "not a model": ("embedding model", lambda folder: (folder / "config.json").unlink(), "no model here"),
    "no folder": ("embedding model", shutil.rmtree, "no such model folder"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_teacher_that_cannot_score_is_one_line_before_any_work(
    tmp_path: Path, teachers: dict[str, Path], case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, change, message = BAD[case]
    config = _workspace(tmp_path / "ws", _damaged(teachers[kind], tmp_path / "teacher", change))
    cluster(config)
    monkeypatch.setattr(executor._current, "run", lambda *arguments: pytest.fail("work began"))
    with pytest.raises(ClusterbatchError, match=rf"^score\.teacher: .*{message}") as raised:
        score(config)
    assert "\n" not in str(raised.value)
    assert not Workspace(config).scores().folder.find()


def test_without_a_teacher_the_stage_says_what_to_set(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"set score\.teacher"):
        score(RunConfig.model_validate({"workspace": str(tmp_path)}))
