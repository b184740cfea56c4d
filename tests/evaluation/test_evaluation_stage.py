from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clusterbatch.cli import main
from clusterbatch.config import RunConfig, load_config, with_changes
from clusterbatch.encoder.load import load_encoder
from clusterbatch.encoder.resolve import resolve_model
from clusterbatch.encoder.save import save_model
from clusterbatch.errors import DataError, UsageError
from clusterbatch.evaluation import collection as collection_module
from clusterbatch.evaluation import search_worker, stage
from clusterbatch.evaluation.checks import check_collections, check_given_collections
from clusterbatch.evaluation.collection import Collection, Texts
from clusterbatch.evaluation.models import EvaluatedModel, evaluated_models, identities
from clusterbatch.evaluation.mteb import evaluate_mteb
from clusterbatch.evaluation.results import read_scores
from clusterbatch.evaluation.search_worker import CANDIDATES
from clusterbatch.evaluation.stage import configured_collections, evaluate
from clusterbatch.pipeline.run import run
from clusterbatch.store import Artifact, Folder, Part, Receipt
from clusterbatch.store.workspace import Workspace
from tests.encoder.models import make_static

TOPICS = ["harbour", "volcano", "guitar", "orchard", "glacier", "tractor", "lantern", "falcon", "compass", "bakery"]
DOCUMENTS = {f"d{i:03d}": f"{TOPICS[i % 10]} number {i} beside the {TOPICS[(i * 7 + 3) % 10]}" for i in range(120)}
QUERIES = {f"q{i}": f"a {topic}" for i, topic in enumerate(TOPICS)}
QUERIES |= {"d007": "an id that a document has too", "d008": "an id of a document that answers"}
JUDGEMENTS = {f"q{i}": {f"d{i:03d}": 2, f"d{i + 10:03d}": 1} for i in range(10)}
JUDGEMENTS |= {"d007": {"d001": 1}, "d008": {"d008": 1, "d001": 1}}
WORDS = dict.fromkeys(" ".join([*DOCUMENTS.values(), *QUERIES.values(), "one two three"]).split())


@pytest.fixture
def config(tmp_path: Path, write_collection) -> RunConfig:
    """A workspace whose trained model is the first one with its vectors turned and half of its vocabulary forgotten."""
    write_collection("topics", DOCUMENTS, QUERIES, JUDGEMENTS)
    settings = ["evaluate.unit_bytes=2048", "evaluate.top_k=20", "evaluate.metrics=[NDCG@10,Recall@20,HitRate@1]"]
    model = make_static(WORDS, tmp_path / "start")
    words = [f"workspace={tmp_path}/ws", f"evaluate.path={tmp_path}/topics", f"train.model={model}"]
    config = load_config(None, [*words, *settings])
    encoder = load_encoder(resolve_model(config.train.model), "static")
    with torch.no_grad():
        encoder.backbone.weight[::2] = 0.01 * encoder.backbone.weight[::2].flip(1)
    workspace = Workspace(config)
    save_model(encoder, workspace.trained_model().uri)
    workspace.train().commit("0123456789abcdef", [], config={}, inputs={}, seconds=1.0)
    return config


@pytest.mark.usefixtures("ray_local")
def test_both_models_are_measured_and_what_is_measured_is_kept(config: RunConfig):
    manifest = evaluate(config)
    table = manifest.details["table"]
    assert [(row["model"], row["metric"]) for row in table] == [
        (model, metric) for model in ("before", "after") for metric in ("NDCG@10", "Recall@20", "HitRate@1")
    ]
    assert {(row["queries"], row["documents"], row["collection"]) for row in table} == {(12, 120, "topics")}
    assert manifest.counts.read == 120
    before, after = (row["value"] for row in table if row["metric"] == "NDCG@10")
    assert 0.2 < before < 1
    assert after != before
    artifact = Workspace(config).evaluation()
    scores = read_scores(artifact, manifest).to_pylist()
    for row in table:
        of_row = [s["value"] for s in scores if s["model"] == row["model"] and s["metric"] == row["metric"]]
        assert len(of_row) == 12
        assert np.mean(of_row) == pytest.approx(row["value"], abs=1e-12)
    assert CANDIDATES not in artifact.folder.list()


@pytest.mark.usefixtures("in_process")
def test_what_a_crash_behind_the_commit_left_is_removed(config: RunConfig, monkeypatch: pytest.MonkeyPatch):
    artifact = Workspace(config).evaluation()

    def crash(self: Artifact, *names: str) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Artifact, "remove", crash)
        with pytest.raises(KeyboardInterrupt):
            evaluate(config)
    manifest = artifact.require()
    assert CANDIDATES in artifact.folder.list()
    assert evaluate(config).created == manifest.created
    assert CANDIDATES not in artifact.folder.list()
    artifact.check_parts(manifest)


@pytest.mark.usefixtures("in_process")
def test_a_prompt_that_fills_the_limit_is_refused_before_any_work(config: RunConfig):
    """All queries would have the same vector; the limit of queries is 64 tokens unless it is set."""
    full = with_changes(config, {"train.prompts.query": "harbour " * 64})
    message = "evaluate.models: before: evaluate.max_query_tokens: 64 tokens leave no room for text beside 0 special "
    for command in (evaluate, evaluate_mteb):
        with pytest.raises(UsageError, match=message):
            command(full)
    assert Workspace(config).evaluation().folder.list() == []
    assert Workspace(config).mteb().folder.list() == []
    assert evaluate(with_changes(config, {"train.prompts.query": "harbour " * 63})).details["table"]


@pytest.mark.usefixtures("in_process")
def test_run_files_agree_with_a_search_in_one_piece(config: RunConfig):
    manifest = evaluate(config)
    artifact = Workspace(config).evaluation()
    encoder = load_encoder(resolve_model(config.train.model), "static")

    def vectors(texts):
        return encoder.encode(encoder.tokenizer.encode(list(texts), 64), 4096)

    scores = vectors(QUERIES.values()) @ vectors(DOCUMENTS.values()).T
    run = next(part for part in manifest.parts if part.path.startswith("run-topics.before"))
    lines = [line.split() for line in artifact.read_part(run).decode().splitlines()]
    ids = list(DOCUMENTS)
    for row, query in enumerate(JUDGEMENTS):
        found = [(line[2], float(line[4])) for line in lines if line[0] == query]
        assert [int(line[3]) for line in lines if line[0] == query] == list(range(1, 21))
        # BEIR's rule: the document with the query's id is no answer, unless it is judged to be one.
        wanted = sorted(
            (-scores[list(QUERIES).index(query), n], tuple(-byte for byte in ids[n].encode()), ids[n])
            for n in range(len(ids))
            if ids[n] != query or query == "d008"
        )[:20]
        assert [document for document, _ in found] == [document for _, _, document in wanted], row
        np.testing.assert_allclose([score for _, score in found], [-score for score, _, _ in wanted], atol=1e-6)


@pytest.mark.usefixtures("in_process")
def test_the_size_of_units_does_not_change_the_values(config: RunConfig, tmp_path: Path):
    first = evaluate(config).details["table"]
    values = config.model_dump()
    values["evaluate"]["unit_bytes"] = 10**6
    again = evaluate(RunConfig.model_validate(values), force=True).details["table"]
    assert [row["value"] for row in again] == pytest.approx([row["value"] for row in first], abs=1e-12)


@pytest.mark.usefixtures("in_process")
def test_a_finished_evaluation_is_not_repeated_and_another_one_is_refused(config: RunConfig):
    created = evaluate(config).parts
    assert evaluate(config).parts == created
    values = config.model_dump()
    values["evaluate"]["metrics"] = ["NDCG@5"]
    with pytest.raises(UsageError, match="another configuration"):
        evaluate(RunConfig.model_validate(values))


@pytest.mark.usefixtures("in_process")
def test_before_stands_behind_the_prompts_of_training(config: RunConfig):
    def values(table: list[dict]) -> dict[str, float]:
        return {row["model"]: row["value"] for row in table if row["metric"] == "NDCG@10"}

    without = values(evaluate(config).details["table"])
    own = with_changes(config, {"train.prompts.query": "glacier tractor lantern "})
    found = values(evaluate(own, force=True).details["table"])
    # The same prompt among the files of the model that is trained does the same.
    encoder = load_encoder(resolve_model(config.train.model), "static")
    encoder.prompts["query"] = "glacier tractor lantern "
    folder = f"{config.workspace}/behind"
    save_model(encoder, folder)
    given = values(evaluate(with_changes(config, {"evaluate.models": [folder]}), force=True).details["table"])
    assert found["before"] == given["behind"] != without["before"]
    # What was trained has its prompts with it.
    assert found["after"] == without["after"]


def test_an_evaluation_without_prompts_has_the_identity_that_it_always_had(config: RunConfig):
    def identity(**changes: str) -> list[int]:
        models = evaluated_models(with_changes(config, {f"train.{key}": value for key, value in changes.items()}), 0)
        return [len(each) for each in identities(models)]

    assert identity() == identity(learning_rate="0.1") == [3, 3]
    assert identity(**{"prompts.query": ""}) == [4, 3]


def test_a_workspace_may_be_named_by_a_relative_path(config: RunConfig, monkeypatch: pytest.MonkeyPatch):
    workspace = Path(config.workspace)
    save_model(load_encoder(resolve_model(config.train.model), "static"), workspace / "model")
    monkeypatch.chdir(workspace.parent)
    for name, place in (("ws", "ws/model"), ("./ws/", "ws/model"), ("ws/model", "ws/model")):
        [model] = evaluated_models(with_changes(config, {"evaluate.models": [name]}), 0)
        # Absolute: workers have other working directories.
        assert model.name == str(workspace.parent / place)
        assert model.label == Path(name).name


@pytest.mark.usefixtures("in_process")
def test_judged_documents_that_are_not_there_are_counted(config: RunConfig, write_collection, tmp_path: Path):
    write_collection("gaps", {"a": "one"}, {"q": "one"}, {"q": {"a": 1, "gone": 1}})
    config = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"path": [f"{tmp_path}/gaps"]})})
    assert evaluate(config).details["collections"]["gaps"] == {
        "queries": 1, "documents": 1, "judged_documents_missing": 1,
    }  # fmt: skip


@pytest.mark.usefixtures("in_process")
def test_an_id_in_two_ranges_is_found_out(config: RunConfig, tmp_path: Path):
    corpus = tmp_path / "topics" / "corpus.jsonl"
    lines = corpus.read_text().splitlines(keepends=True)
    corpus.write_text("".join([*lines, lines[0]]))
    with pytest.raises(DataError, match="topics: a document id occurs twice"):
        evaluate(config)


@pytest.mark.usefixtures("in_process")
def test_without_collection_or_model_there_is_one_clear_line(config: RunConfig, tmp_path: Path):
    with pytest.raises(UsageError, match=r"evaluate\.path: give at least one collection"):
        evaluate(load_config(None, [f"workspace={tmp_path}/ws"]))
    with pytest.raises(DataError, match="no finished training run here"):
        evaluate(load_config(None, [f"workspace={tmp_path}/empty", f"evaluate.path={tmp_path}/topics"]))


@pytest.mark.usefixtures("in_process")
def test_ranges_share_objects_and_the_values_stay(config: RunConfig, monkeypatch: pytest.MonkeyPatch):
    """As many objects as items and models, however many ranges and blocks of queries a collection has."""
    first = evaluate(config)
    collection = configured_collections(config)
    ranges = len(collection[0].document_ranges(config.evaluate.unit_bytes))
    written: list[str] = []
    original = search_worker.write_parquet

    def counting(output: Artifact, stem: str, *arguments: Any, **details: Any) -> Part:
        written.append(stem)
        return original(output, stem, *arguments, **details)

    monkeypatch.setattr(search_worker, "write_parquet", counting)
    monkeypatch.setattr(collection_module, "_MOST_ITEMS", 2)
    again = evaluate(config, force=True)
    assert ranges > 4
    assert len([stem for stem in written if stem.startswith(CANDIDATES)]) == 2 * 2
    assert again.details == first.details


def test_msmarco_has_few_objects(tmp_path: Path):
    """The development queries over 8.8 million passages: 3 GB in ranges of 2 MiB."""

    class Passages(Collection):
        def documents_bytes(self) -> int:
            return 3_200_000_000

    config = load_config(None, [f"workspace={tmp_path}/ws"])
    models = [EvaluatedModel(name, name, None, name) for name in ("before", "after")]
    items, _ = stage._items(config, models, [Passages("msmarco", Folder(str(tmp_path)))])
    assert len(items) * len(models) <= 512
    read = [pair for item in items for pair in item.payload.ranges]
    assert read == Passages("msmarco", Folder(str(tmp_path))).document_ranges(config.evaluate.unit_bytes)
    # The driver holds the candidates of one block of queries, from all items.
    assert max(item.payload.query_block for item in items) * config.evaluate.top_k * len(items) <= 4_000_000


@pytest.mark.usefixtures("in_process")
def test_what_an_earlier_version_left_unfinished_is_done_again(config: RunConfig):
    """Its receipts have the same numbers and mean other ranges."""
    finished = evaluate(config)
    artifact = Workspace(config).evaluation()
    artifact.begin(finished.fingerprint, force=True)
    artifact.write_receipt(Receipt(unit=0, fingerprint=finished.fingerprint, details={"judged": 0}))
    assert evaluate(config).details == finished.details


def test_equal_texts_are_encoded_once(config: RunConfig):
    encoder = load_encoder(resolve_model(config.train.model), "static")
    encoded: list[int] = []
    original = encoder.encode

    def counting(tokens: Any, batch_tokens: int) -> np.ndarray:
        encoded.append(len(tokens))
        return original(tokens, batch_tokens)

    encoder.encode = counting  # type: ignore[method-assign]
    texts = ["one", "two", "one", "three", "two"]
    vectors = Texts("document", texts, 16).vectors(encoder, 512).numpy()
    assert encoded == [3]
    np.testing.assert_allclose(vectors, original(encoder.tokenizer.encode(texts, 16), 512), atol=1e-6)


def test_models_of_one_name_are_told_apart_by_their_parents(config: RunConfig, tmp_path: Path):
    encoder = load_encoder(resolve_model(config.train.model), "static")
    for parent in ("a", "b"):
        save_model(encoder, tmp_path / parent / "model")
    names = [f"{tmp_path}/a/model", f"{tmp_path}/b/model"]
    found = evaluated_models(with_changes(config, {"evaluate.models": names}), 0)
    assert [model.label for model in found] == ["a/model", "b/model"]
    with pytest.raises(UsageError, match="a/model stands there twice"):
        evaluated_models(with_changes(config, {"evaluate.models": [names[0], names[0]]}), 0)


@pytest.mark.parametrize("key", ["embed.model", "train.model", "evaluate.models"])
def test_models_that_cannot_be_loaded_are_refused_before_any_work(key: str, tmp_path: Path, write_collection):
    write_collection("topics", DOCUMENTS, QUERIES, JUDGEMENTS)
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text("{}")
    (bare / "pytorch_model.bin").write_bytes(b"")
    value = f"[{bare}]" if key == "evaluate.models" else str(bare)
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"query": "a", "document": "b"}\n')
    given = [f"workspace={tmp_path}/new", f"corpus.paths={pairs}", f"evaluate.path={tmp_path}/topics", f"{key}={value}"]
    with pytest.raises(UsageError, match=rf"^{re.escape(key)}: .*weights only as pytorch_model\.bin"):
        run(load_config(None, given))
    assert not (tmp_path / "new" / "corpus").exists()


def test_a_folder_of_collections_is_refused_with_their_names(tmp_path: Path, write_collection):
    write_collection("topics", DOCUMENTS, QUERIES, JUDGEMENTS)
    with pytest.raises(UsageError, match=rf"it holds some: give evaluate\.path=\[{tmp_path}/topics\]"):
        check_collections(load_config(None, [f"workspace={tmp_path}/ws", f"evaluate.path={tmp_path}"]))


def test_white_space_in_an_id_is_found_before_any_work(tmp_path: Path, write_collection):
    write_collection("spaced", {"a b": "text"}, {"q": "one"}, {"q": {"a b": 1}})
    with pytest.raises(DataError, match="must not be empty or hold white space"):
        check_collections(load_config(None, [f"workspace={tmp_path}/ws", f"evaluate.path={tmp_path}/spaced"]))


@pytest.mark.parametrize("command", [["ingest"], ["evaluate"], *([name, "--dry-run"] for name in ("ingest", "run"))])
def test_commands_that_read_a_collection_check_its_ids_first(
    command: list[str], tmp_path: Path, write_collection, capsys: pytest.CaptureFixture[str]
) -> None:
    write_collection("spaced", {"a b": "text"}, {"q": "one"}, {"q": {"a b": 1}})
    (tmp_path / "pairs.jsonl").write_text('{"query": "a", "document": "b"}\n')
    words = [f"workspace={tmp_path}/ws", f"corpus.paths={tmp_path}/pairs.jsonl", f"evaluate.path={tmp_path}/spaced"]
    assert main([*command, *words]) == 3
    assert "spaced/corpus.jsonl byte 0: an _id must not be empty or hold white space" in capsys.readouterr().err
    assert not (tmp_path / "ws" / "corpus").exists()


def test_collections_without_all_files_are_left_to_the_commands_that_need_them(tmp_path: Path):
    given = f"evaluate.path=[{tmp_path}/nowhere,docstrings://]"
    check_given_collections(load_config(None, [f"workspace={tmp_path}/ws", given]))


@pytest.mark.usefixtures("in_process")
def test_a_model_whose_vectors_are_not_finite_gets_no_score(config: RunConfig, tmp_path: Path):
    encoder = load_encoder(resolve_model(config.train.model), "static")
    with torch.no_grad():
        encoder.backbone.weight.fill_(torch.nan)
    save_model(encoder, tmp_path / "broken")
    with pytest.raises(DataError, match=r"evaluate\.models: broken: 12 of 12 query vectors are not finite"):
        evaluate(with_changes(config, {"evaluate.models": [str(tmp_path / "broken")]}))
