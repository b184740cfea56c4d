"""Scores in bfloat16 are those of float32, and say so; trials of a comparison are measured alike."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from clusterbatch.config import load_config
from clusterbatch.encoder.load import drop_padding, load_encoder
from clusterbatch.encoder.resolve import resolve_model
from clusterbatch.evaluation import search_worker
from clusterbatch.evaluation.measure import LoadedCollection
from clusterbatch.evaluation.metrics import parse_metric
from clusterbatch.evaluation.models import measuring_dtype
from clusterbatch.evaluation.stage import evaluate
from clusterbatch.experiments.compare import trial
from tests.data_folder import data_folder
from tests.encoder.models import make_model, make_static

MINILM = "all-MiniLM-L6-v2"


@pytest.mark.skipif(data_folder() is None, reason="needs CLUSTERBATCH_DATA")
@pytest.mark.usefixtures("in_process")
def test_scores_of_both_types_agree_on_real_texts(tmp_path: Path, write_collection):
    folder = Path(str(data_folder())) / "eval/cranfield"
    judgements: dict[str, dict[str, int]] = {}
    for line in (folder / "qrels/test.tsv").read_text().splitlines()[1:]:
        query, document, grade = line.split("\t")
        judgements.setdefault(query, {})[document] = int(grade)
    judgements = dict(list(judgements.items())[:100])
    documents, queries = (
        {each["_id"]: each["text"] for each in map(json.loads, (folder / name).read_text().splitlines())}
        for name in ("corpus.jsonl", "queries.jsonl")
    )
    documents = {name: documents[name] for name in list(documents)[:300]}
    queries = {name: queries[name] for name in judgements}
    write_collection("some", documents, queries, judgements)
    words = [f"evaluate.path={tmp_path}/some", f"train.model={MINILM}", "train.encoder=backbone"]
    words += ["evaluate.models=[before]", "evaluate.metrics=[NDCG@10]", "evaluate.max_document_tokens=96"]
    found = {}
    for dtype in ("float32", "bfloat16"):
        own = load_config(None, [*words, f"workspace={tmp_path}/{dtype}", f"evaluate.dtype={dtype}"])
        details = evaluate(own).details
        assert details["dtypes"] == [dtype]
        found[dtype] = details["table"][0]["value"]
    assert 0.05 < found["float32"] < 1
    assert found["bfloat16"] == pytest.approx(found["float32"], abs=1e-3)
    # The reference: transformers with padding, in one piece.
    encoder = load_encoder(resolve_model(MINILM))
    collection = LoadedCollection(write_collection("again", documents, queries, judgements), 64, 96)
    padded = np.mean(collection.measure(encoder, [parse_metric("NDCG@10")], 10, 4096)["NDCG@10"])
    assert found["bfloat16"] == pytest.approx(padded, abs=1e-3)


@pytest.mark.usefixtures("in_process")
def test_the_types_of_models_that_do_not_fit_into_memory_together_are_named(
    tmp_path: Path, write_collection, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(search_worker, "_KEPT_BYTES", 0)
    write_collection("c", {"d1": "apple", "d2": "pear"}, {"q1": "apple"}, {"q1": {"d1": 1}})
    models = [make_model("bert", tmp_path / "backbone"), make_static(["apple", "pear"], tmp_path / "static")]
    words = [f"evaluate.path={tmp_path}/c", f"evaluate.models=[{models[0]},{models[1]}]", "evaluate.dtype=bfloat16"]
    details = evaluate(load_config(None, [*words, f"workspace={tmp_path}/ws"])).details
    assert details["dtypes"] == ["bfloat16", "float32"]


def test_a_trial_is_measured_as_an_evaluation_would(tmp_path: Path):
    folder = make_model("bert", tmp_path / "model")
    words = [f"train.model={folder}", "train.encoder=backbone", "train.device=cpu", "train.precision=float32"]
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        config = load_config(None, [*words, f"workspace={tmp_path}/ws", f"evaluate.dtype={name}"])
        start = trial.starting_encoder(config, torch.device("cpu"))
        weights = {f"encoder.{key}": each.detach().clone() for key, each in start.named_parameters()}
        trainable = {key: each for key, each in weights.items() if "pooler" not in key}
        encoder = trial._trained_encoder(config, torch.device("cpu"), trainable)
        assert encoder.dtype == measuring_dtype(config, encoder) == dtype
        # Without padding wherever an evaluation's model is; bfloat16 differs too much on some CPUs that emulate it.
        evaluated = load_encoder(folder)
        drop_padding(evaluated, dtype)
        assert encoder.unpadded == evaluated.unpadded
        assert encoder.unpadded or dtype != torch.float32
        tokens = start.tokenizer.encode(["the quick brown fox", "a lazy dog sleeps"], 16)
        cosines = (encoder.encode(tokens, 64) * start.encode(tokens, 64)).sum(axis=1)
        assert cosines.min() > 0.999
