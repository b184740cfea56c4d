"""Collections that nobody expects: each is measured, or refused in one line that names the file."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from PIL import Image

from clusterbatch.config import RunConfig, load_config, with_changes
from clusterbatch.corpus.images import data_uri
from clusterbatch.errors import DataError, UsageError
from clusterbatch.evaluation.checks import check_collections
from clusterbatch.evaluation.collection import DOCUMENTS
from clusterbatch.evaluation.stage import evaluate
from clusterbatch.store.workspace import Workspace
from tests.encoder.models import make_static

TEXTS = {f"d{number}": f"apple number {number}" for number in range(5)}


@pytest.fixture
def config(tmp_path: Path, write_collection) -> RunConfig:
    """The untrained model, in a folder whose name has a space, on a collection of five documents and two queries."""
    write_collection("apples", TEXTS, {"q1": "apple", "q2": "number"}, {"q1": {"d1": 1}, "q2": {"d2": 1, "d3": 0}})
    model = make_static(["apple", "number", *"01234"], tmp_path / "my model")
    words = [f"workspace={tmp_path}/ws", f"evaluate.path={tmp_path}/apples", f"evaluate.models=[{model}]"]
    return load_config(None, [*words, "ray.mode=in-process"])


def test_a_collection_without_documents_is_refused_before_any_work(config: RunConfig, tmp_path: Path):
    for content in ("", "\n\n"):
        (tmp_path / "apples" / DOCUMENTS).write_text(content)
        with pytest.raises(DataError, match=r"corpus\.jsonl: no documents in it"):
            check_collections(config)


def test_more_answers_are_asked_for_than_there_are_documents(config: RunConfig):
    table = evaluate(with_changes(config, {"evaluate.top_k": 1000})).details["table"]
    assert {row["value"] for row in table if row["metric"] == "Recall@100"} == {1.0}


def test_a_run_file_has_six_columns_whatever_the_model_is_called(config: RunConfig):
    manifest = evaluate(config)
    assert {row["model"] for row in manifest.details["table"]} == {"my model"}
    artifact = Workspace(config).evaluation()
    [run] = [artifact.read_part(part) for part in manifest.parts if part.path.endswith(".trec")]
    assert {len(line.split()) for line in run.decode().splitlines()} == {6}


@pytest.mark.parametrize("name", ["before", "after", "bm25"])
def test_a_folder_called_like_a_model_of_the_run_is_told_apart_by_its_parent(
    config: RunConfig, tmp_path: Path, name: str
):
    model = make_static(["apple", "number", *"01234"], tmp_path / "runs" / name)
    table = evaluate(with_changes(config, {"evaluate.models": [str(model)]})).details["table"]
    assert {row["model"] for row in table} == {f"runs/{name}"}


def test_a_collection_called_like_the_samples_is_told_apart_by_its_parent(
    config: RunConfig, tmp_path: Path, write_collection
):
    write_collection("ws/sample/collection", {"a": "apple", "b": "number"}, {"q": "apple"}, {"q": {"a": 1}})
    write_collection("mine/sample", TEXTS, {"q": "number 3"}, {"q": {"d3": 1}})
    both = {"evaluate.path": ["docstrings://", str(tmp_path / "mine" / "sample")]}
    manifest = evaluate(with_changes(config, both))
    found = {row["collection"]: row["documents"] for row in manifest.details["table"]}
    assert found == {"sample": 2, "mine/sample": 5}


def test_images_are_no_texts_for_a_model_that_takes_texts_alone(config: RunConfig, tmp_path: Path):
    file = io.BytesIO()
    Image.new("RGB", (2, 2)).save(file, "PNG")
    uri = data_uri(file.getvalue(), "png")
    lines = (json.dumps({"_id": name, "image": uri}) + "\n" for name in TEXTS)
    (tmp_path / "apples" / DOCUMENTS).write_text("".join(lines))
    for models, name in ((config.evaluate.models, "my model"), (["bm25"], "bm25")):
        with pytest.raises(UsageError, match=f"{name} takes texts alone, but the documents .* are images"):
            evaluate(with_changes(config, {"evaluate.models": models}), force=True)


def test_measures_that_are_spelt_in_two_ways_are_one(config: RunConfig):
    table = evaluate(with_changes(config, {"evaluate.metrics": ["NDCG@10", "ndcg@10"]})).details["table"]
    assert [row["metric"] for row in table] == ["NDCG@10"]


def test_half_of_a_character_is_text_like_any_other(config: RunConfig, tmp_path: Path):
    """JSON can hold half of a surrogate pair, which is no text in UTF-8: pieces of texts cut by UTF-16 have it."""
    file = tmp_path / "apples" / DOCUMENTS
    file.write_text("".join(json.dumps({"_id": i, "text": f"{text} \ud83d"}) + "\n" for i, text in TEXTS.items()))
    with (tmp_path / "apples" / "queries.jsonl").open("a") as queries:
        queries.write(json.dumps({"_id": "q3", "text": "\ude00"}) + "\n")
    (tmp_path / "apples" / "qrels" / "test.tsv").open("a").write("q3\td1\t1\n")
    assert evaluate(config).counts.read == len(TEXTS)
