"""Rounds of refresh without clusters: super-batches are divided by the vectors of the live model."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pytest

from clusterbatch.batches.super_batches import SuperBatchPlan
from clusterbatch.config import RunConfig, with_changes
from clusterbatch.corpus.ingest import ingest
from clusterbatch.encoder.load import load_encoder
from clusterbatch.encoder.resolve import resolve_model
from clusterbatch.errors import UsageError
from clusterbatch.pipeline.refresh import refresh
from clusterbatch.pipeline.report import write_report
from clusterbatch.pipeline.run import STAGES, run_stage
from clusterbatch.store.workspace import Workspace
from clusterbatch.training.worker import open_plan
from tests.in_process import OVERRIDES, run_in_process
from tests.integration.subjects import SUBJECTS, copy_workspace, subjects_config
from tests.integration.test_cluster_stage import text_rows

_ROUNDS = ["refresh.rounds=1", "refresh.every_steps=6", "refresh.margin=1.0", "train.steps=6", "train.workers=1"]
_BATCHES = ["batches.stratify=source", "batches.super_batch=4", "batches.size=8"]


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A workspace with its first generation. Not to be changed."""
    config = subjects_config(tmp_path_factory.mktemp("first"), [*OVERRIDES, *_ROUNDS, *_BATCHES])
    with pytest.MonkeyPatch.context() as patch:
        run_in_process(patch)
        for stage in STAGES:
            run_stage(stage, config)
    return config


@pytest.fixture
def config(first: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """A copy of it that a test may change."""
    run_in_process(monkeypatch)
    return copy_workspace(first, tmp_path)


def _batches(config: RunConfig, generation: int) -> list[set[tuple[int, int]]]:
    """Return the rows of each batch of the first epoch, by piece and row, over the shards of a generation."""
    clusters = Workspace(config).clusters(generation)
    plan = open_plan(config, clusters, clusters.require())
    assert isinstance(plan, SuperBatchPlan)
    found = map(plan.batch, range(plan.steps_of(1)))
    return [set(zip(batch.piece.tolist(), batch.row.tolist(), strict=True)) for batch in found]


def test_a_round_divides_batches_by_vectors_of_the_live_model(config: RunConfig) -> None:
    workspace = Workspace(config)
    [record] = refresh(config)
    assert (record.base, record.clusters, record.reclustered, record.extended) == (0, 1, True, False)
    assert record.drift == {}
    assert record.promoted
    assert set(record.seconds) == {"drift", "embed", "cluster", "train", "evaluate"}
    embeddings, clusters = workspace.embeddings(1).require(), workspace.clusters(1).require()
    assert embeddings.details["model"] != workspace.embeddings(0).require().details["model"]
    assert clusters.inputs["embeddings"] == embeddings.fingerprint
    assert workspace.train(1).require().inputs["clusters"] == clusters.fingerprint
    # The same rows in the same super-batches, for one and the same seed, but some are divided otherwise.
    rows = [text_rows(workspace.clusters(number))["pair_id"].to_pylist() for number in (0, 1)]
    assert rows[0] == rows[1]
    before, after = _batches(config, 0), _batches(config, 1)
    assert len(before) == len(after) > 10
    assert [len(batch) for batch in before] == [len(batch) for batch in after]
    assert before != after
    # A second call takes the new vectors in turn.
    [_, second] = refresh(config)
    assert (second.base, second.clusters) == (1, 2)


def test_never_trains_on_the_vectors_there_are(config: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    workspace = Workspace(config)
    [record] = refresh(with_changes(config, {"refresh.when": "never"}))
    assert (record.clusters, record.reclustered) == (0, False)
    assert workspace.embeddings(1).manifest() is None
    assert workspace.clusters(1).manifest() is None
    assert workspace.train(1).require().inputs["clusters"] == workspace.clusters(0).require().fingerprint
    assert "generation 1 keeps the vectors of generation 0 (refresh.when: never)\n" in capsys.readouterr().err


def test_rows_that_have_come_are_embedded_as_the_others_were(config: RunConfig, tmp_path: Path) -> None:
    terms = SUBJECTS["sailing"].split()
    more = [
        {"query": f"{terms[n % 10]} news {n}", "document": f"today {terms[n % 10]} and {n}", "source": "sailing"}
        for n in range(39)
    ]
    (tmp_path / "more.jsonl").write_text("".join(json.dumps(row) + "\n" for row in more))
    config = with_changes(config, {"corpus.paths": [*config.corpus.paths, str(tmp_path / "more.jsonl")]})
    corpus = ingest(config, append=True)
    workspace = Workspace(config)
    [record] = refresh(with_changes(config, {"refresh.when": "never"}))
    assert (record.clusters, record.reclustered, record.extended) == (1, False, True)
    assert workspace.embeddings(1).manifest() is None
    clusters = workspace.clusters(1).require()
    assert clusters.counts.written == corpus.counts.written
    assert clusters.inputs["embeddings"] == workspace.embeddings(0).require().fingerprint
    trained = text_rows(workspace.clusters(1))
    news = pc.sum(pc.match_substring(trained["query"], "news")).as_py()
    assert news == len(more)


def test_a_build_beside_training_is_for_the_next_round(config: RunConfig) -> None:
    found = refresh(with_changes(config, {"refresh.rounds": 2, "refresh.asynchronous": True}))
    assert found[0].clusters == 0
    assert found[1].clusters in (0, 1)
    assert Workspace(config).clusters(1).manifest() is not None
    assert all(record.drift == {} for record in found)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"refresh.when": "drift > 0.1"}, r"refresh\.when: drift > 0\.1 is measured of clusters"),
        ({"refresh.keep_fraction": 0.25}, r"refresh\.keep_fraction"),
        ({"batches.super_batch": 1}, r"batches\.super_batch\); these batches are by source"),
        ({"batches.super_batch": 1, "batches.stratify": "cluster"}, "there is nothing to cluster again"),
    ],
)
def test_what_needs_clusters_is_refused_at_once(config: RunConfig, changes: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        refresh(with_changes(config, changes))
    assert Workspace(config).embeddings(1).manifest() is None


def test_the_last_phase_of_a_curriculum_decides(config: RunConfig) -> None:
    """A round trains by it alone."""
    phases = [{"steps": 3, "stratify": "cluster"}, {"stratify": "source"}]
    changes = {"batches.super_batch": 1, "batches.stratify": "cluster", "batches.curriculum": phases}
    with pytest.raises(UsageError, match="these batches are by source"):
        refresh(with_changes(config, changes))


def test_its_super_batches_alone_need_no_others_before(config: RunConfig) -> None:
    """Batches of sources first; a round divides super-batches by the model that those have trained."""
    phases = [{"steps": 6}, {"super_batch": 4}]
    config = with_changes(config, {"batches.super_batch": 1, "batches.curriculum": phases})
    with pytest.raises(UsageError, match=r"refresh\.when"):
        refresh(with_changes(config, {"refresh.when": "drift > 0.1"}))
    [record] = refresh(config)
    assert (record.clusters, record.reclustered, record.drift) == (1, True, {})
    batches = Workspace(config).train(1).require().config["batches"]
    assert (batches["super_batch"], batches["curriculum"]) == (4, [])


def test_vectors_of_a_round_are_those_of_the_live_model(config: RunConfig) -> None:
    """Encoding the texts again gives those of queries and of documents."""
    refresh(config)
    workspace = Workspace(config)
    clusters = workspace.clusters(1)
    plan = open_plan(config, clusters, clusters.require())
    assert isinstance(plan, SuperBatchPlan)
    assert plan._vectors is not None
    of_first_piece = np.arange(int(plan.index.rows[0]))
    stored = plan._vectors(np.zeros_like(of_first_piece), of_first_piece)
    texts = text_rows(clusters).slice(0, len(of_first_piece))
    encoder = load_encoder(resolve_model(workspace.trained_model(0).uri))
    for side, vectors in zip(("query", "document"), stored, strict=True):
        expected = encoder.encode(encoder.tokenizer.encode(texts[side].to_pylist(), 16), 4096)
        assert (vectors * expected).sum(1).min() > 0.999


def test_the_report_names_no_clusters(config: RunConfig) -> None:
    """Its batches are of super-batches, and none is said to be of one cluster."""
    page = Path(write_report(config)).read_text(encoding="utf-8")
    assert re.search(r"<summary>random: batch of step \d+</summary>", page)
    assert re.search(r"<summary>source, super_batch 4: batch of step \d+</summary>", page)
    assert "from one cluster" not in page


def test_the_report_shows_batches_of_the_last_phase(config: RunConfig) -> None:
    """They are trained on longest."""
    phases = [{"steps": 3}, {"super_batch": 4}]
    late = with_changes(config, {"batches.super_batch": 1, "batches.curriculum": phases})
    page = Path(write_report(late)).read_text(encoding="utf-8")
    assert re.search(r"<summary>source, super_batch 4: batch of step \d+</summary>", page)
