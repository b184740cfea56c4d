"""Tasks of MTEB on a model of this project: by its protocol, and by MTEB itself where it is installed."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from clusterbatch.config import RunConfig, load_config, with_changes
from clusterbatch.encoder.load import load_encoder
from clusterbatch.encoder.resolve import resolve_model
from clusterbatch.errors import DataError, UsageError
from clusterbatch.evaluation.mteb import MtebEncoder, evaluate_mteb, load_task

MODEL = "all-MiniLM-L6-v2"
DOCUMENTS = ["how to bake bread at home", "an anchor holds a ship in the harbour"]


@pytest.fixture(scope="module")
def wrapped() -> MtebEncoder:
    return MtebEncoder(load_encoder(resolve_model(MODEL), "static"), "static", "1", 64, 256, 2048)


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    overrides = ["evaluate.mteb=[Tiny]", "evaluate.models=[before]", "evaluate.device=cpu"]
    return load_config(None, [f"workspace={tmp_path}", *overrides])


def fake_mteb() -> ModuleType:
    """One task, `Tiny`, scored by whether the right document of two is nearest."""

    def get_task(name: str) -> SimpleNamespace:
        if name != "Tiny":
            raise KeyError(f"KeyError: {name} not found")
        return SimpleNamespace(metadata=SimpleNamespace(name="Tiny", main_score="accuracy"))

    def evaluate(model: MtebEncoder, task: SimpleNamespace, **options: object) -> SimpleNamespace:
        queries = model.encode([{"text": ["bake bread"]}, {"text": ["ship anchor"]}], prompt_type="query")
        documents = model.encode([{"text": DOCUMENTS}], prompt_type="document")
        score = float((model.similarity(queries, documents).argmax(1) == [0, 1]).mean())
        return SimpleNamespace(task_results=[SimpleNamespace(get_score=lambda: score)])

    module = ModuleType("mteb")
    module.get_task, module.evaluate = get_task, evaluate  # type: ignore[attr-defined]
    return module


@pytest.mark.usefixtures("in_process")
def test_tasks_are_run_once_and_their_main_score_kept(config: RunConfig, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "mteb", fake_mteb())
    manifest = evaluate_mteb(config)
    assert manifest.details["table"] == [{"task": "Tiny", "model": "before", "metric": "accuracy", "value": 1.0}]
    assert evaluate_mteb(config).created == manifest.created
    with pytest.raises(UsageError, match="no task 'Huge'"):
        load_task("Huge")


@pytest.mark.usefixtures("in_process")
def test_another_number_type_is_another_result(config: RunConfig, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "mteb", fake_mteb())
    before = evaluate_mteb(config).fingerprint
    assert evaluate_mteb(with_changes(config, {"evaluate.dtype": "float32"}), force=True).fingerprint != before


@pytest.mark.usefixtures("in_process")
def test_before_stands_behind_the_prompts_of_training(config: RunConfig, monkeypatch: pytest.MonkeyPatch):
    seen = []
    fake = fake_mteb()
    own = fake.evaluate
    fake.evaluate = lambda model, task, **options: (  # type: ignore[attr-defined]
        seen.append(dict(model._encoder.prompts)) or own(model, task, **options)
    )
    monkeypatch.setitem(sys.modules, "mteb", fake)
    evaluate_mteb(with_changes(config, {"train.prompts.document": "read: "}))
    assert seen == [{"query": "", "document": "read: "}]


def test_without_the_package_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "mteb", None)
    with pytest.raises(UsageError, match="pip install mteb"):
        load_task("SciFact")


def test_queries_and_documents_are_cut_as_in_the_evaluation(wrapped: MtebEncoder):
    short = MtebEncoder(wrapped._encoder, "static", "1", 2, 256, 2048)
    text = [{"text": ["bread bread anchor anchor"]}]
    as_query, as_document = short.encode(text, prompt_type="query"), short.encode(text)
    assert np.allclose(as_query, wrapped.encode([{"text": ["bread bread"]}]), atol=1e-6)
    assert np.allclose(as_document, wrapped.encode(text), atol=1e-6)
    assert not np.allclose(as_query, as_document, atol=1e-3)


def test_a_model_of_vectors_that_are_not_finite_is_refused():
    encoder = load_encoder(resolve_model(MODEL), "static")
    with torch.no_grad():
        encoder.backbone.weight.fill_(torch.nan)
    broken = MtebEncoder(encoder, "static", "1", 64, 256, 2048)
    with pytest.raises(DataError, match="2 of 2 document vectors are not finite"):
        broken.encode([{"text": DOCUMENTS}])


def test_a_task_of_mteb_itself(wrapped: MtebEncoder):
    mteb = pytest.importorskip("mteb", reason="mteb is not installed (pip install mteb)")
    from mteb.mocks.mock_tasks.retrieval import MockRetrievalTask
    from mteb.models.models_protocols import EncoderProtocol

    assert isinstance(wrapped, EncoderProtocol)
    task = MockRetrievalTask()
    result = mteb.evaluate(wrapped, task, cache=None, co2_tracker=False, show_progress_bar=False)
    assert 0 < result.task_results[0].get_score() <= 1
