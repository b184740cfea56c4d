"""Limits that special tokens and a prompt alone fill leave nothing of a text: they are refused before any work."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clusterbatch.config import RunConfig, load_config, with_changes
from clusterbatch.embedding.stage import embed
from clusterbatch.encoder.check import check_model
from clusterbatch.encoder.limits import TextLimit, check_limits
from clusterbatch.encoder.sides import SideTokenizer
from clusterbatch.encoder.tokenizer import Tokenizer
from clusterbatch.errors import UsageError
from clusterbatch.evaluation.checks import check_models, check_text_limits
from clusterbatch.experiments.compare.stage import compare
from clusterbatch.experiments.predict.stage import predict
from clusterbatch.experiments.tune.stage import tune
from clusterbatch.scoring.teacher import check_teacher
from clusterbatch.shards.stage import cluster
from clusterbatch.store.workspace import Workspace
from clusterbatch.training.checks import check_tokens
from tests.clustering.embedded import embedded_workspace
from tests.encoder.models import make_static

EIGHT = "fox " * 8


@pytest.fixture
def static(tmp_path: Path) -> str:
    return str(make_static(["fox", "dog"], tmp_path / "static"))


def _with_prompts(folder: Path | str, place: Path, **prompts: str) -> str:
    """Return a copy of a model whose own files name these prompts."""
    shutil.copytree(folder, place)
    (place / "config_sentence_transformers.json").write_text(json.dumps({"prompts": prompts}))
    return str(place)


def test_a_limit_that_special_tokens_fill_is_refused(tiny: Callable[[str], Path]) -> None:
    folder = str(tiny("bert"))
    check_model(folder, load=False, limits=[TextLimit("embed.max_tokens", 3, "query")])
    limits = [TextLimit("train.max_query_tokens", 2, "query")]
    with pytest.raises(UsageError) as caught:
        check_model(folder, key="train.model", load=False, limits=limits)
    message = "train.model: train.max_query_tokens: 2 tokens leave no room for text beside 2 special ones"
    assert str(caught.value) == message
    # A static encoder has no special tokens.
    check_model(folder, kind="static", load=False, limits=limits)


@pytest.mark.parametrize("architecture", ["bert", "roberta", "xlm-roberta"])
def test_a_limit_that_a_prompt_fills_is_refused(tiny: Callable[[str], Path], architecture: str) -> None:
    """At the limit of the message every text has the same tokens; one more, and texts differ."""
    folder, prompt = str(tiny(architecture)), "search the query for the fox: "
    tokenizer = Tokenizer(folder)
    texts = ["a", "jumps", "埼"]
    unlimited = SideTokenizer(tokenizer, {"query": prompt}, {"query": None})
    tokens = [unlimited.tokens([text], "query")[0].tolist() for text in texts]
    same = next(n for n in range(99) if len({ids[n] for ids in tokens}) > 1) - len(tokenizer._prefix)
    filled = tokenizer.added + same
    with pytest.raises(UsageError, match=f": {filled} tokens leave no room .* {same} of the prompt 'search the"):
        check_limits(folder, None, [TextLimit("embed.max_tokens", filled, "query", {"query": prompt})])
    with pytest.raises(UsageError, match="leave no room"):
        tokenizer.encode(texts, filled, prompt)
    for sources in (None, ["a", "b", "a"]):
        sides = SideTokenizer(tokenizer, {"query": "", "b-query": prompt}, {"query": filled})
        if sources:
            with pytest.raises(UsageError, match="leave no room"):
                sides.tokens(texts, "query", sources)
        else:
            sides.tokens(texts, "query")
    check_limits(folder, None, [TextLimit("embed.max_tokens", filled + 1, "query", {"query": prompt})])
    encoded = tokenizer.encode(texts, filled + 1, prompt)
    assert len({tuple(encoded[row].tolist()) for row in range(3)}) > 1


def test_the_limit_of_the_model_and_its_own_prompts_count(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    folder = _with_prompts(tiny("bert"), tmp_path / "own", query="fox " * 200)
    for tokens in (None, 512):
        with pytest.raises(UsageError, match=r"own \(its longest input\): \d+ tokens leave no room"):
            check_limits(folder, None, [TextLimit("embed.max_tokens", tokens, "query")])
        check_limits(folder, None, [TextLimit("embed.max_tokens", tokens, "query", {"query": "fox "})])
        check_limits(folder, None, [TextLimit("embed.max_tokens", tokens, "document")])


REFUSED: dict[str, dict[str, Any]] = {
    "embed.model: embed.max_tokens": {"embed.max_tokens": 8, "embed.document_prompt": EIGHT},
    "train.model: train.max_query_tokens": {"train.max_query_tokens": 8, "train.prompts.query": EIGHT},
    "train.model: train.max_document_tokens": {
        "train.max_document_tokens": 8,
        "train.source_prompts": {"wiki": {"document": EIGHT}},
    },
    # Its default.
    "train.model: evaluate.max_query_tokens": {"train.max_query_tokens": 128, "train.prompts.query": "fox " * 64},
}


@pytest.mark.parametrize("place", REFUSED)
def test_prompts_of_every_section_are_checked_with_its_limits(static: str, tmp_path: Path, place: str) -> None:
    words = [f"workspace={tmp_path}/w", f"train.model={static}", f"embed.model={static}"]
    base = load_config(None, [*words, "evaluate.path=[]"])
    check_models(base)
    check_text_limits([base])
    config = with_changes(base, REFUSED[place])
    with pytest.raises(UsageError, match=f"^{place}: .* tokens leave no room for text beside 0 special ones and "):
        check_models(config)
    for command in (lambda: check_text_limits([base, config]), lambda: compare(config), lambda: tune(config)):
        with pytest.raises(UsageError, match=f"^{place}: .* leave no room"):
            command()
    assert not (tmp_path / "w").exists()


def test_models_that_are_only_read_are_checked_with_their_own_prompts(static: str, tmp_path: Path) -> None:
    own = _with_prompts(static, tmp_path / "own", query="fox " * 64)
    words = [f"workspace={tmp_path}/w", f"train.model={static}", f"embed.model={static}", "evaluate.path=[]"]
    with pytest.raises(UsageError, match=r"^evaluate.models: evaluate.max_query_tokens: 64 tokens leave no room"):
        check_models(load_config(None, [*words, f"evaluate.models=[before,{own}]"]))
    with pytest.raises(UsageError, match=r"^score.teacher: score.max_tokens: 32 tokens leave no room"):
        check_teacher(load_config(None, [*words, f"score.teacher={own}", "score.max_tokens=32"]))
    with pytest.raises(UsageError, match=r"^embed.model: evaluate.max_query_tokens: 64 tokens leave no room"):
        compare(load_config(None, [*words, f"embed.model={own}"]))


@pytest.mark.usefixtures("in_process")
def test_stages_refuse_before_they_begin(static: str, tmp_path: Path) -> None:
    models = {"train": {"model": static}, "embed": {"model": static}}
    config: RunConfig = embedded_workspace(str(tmp_path / "w"), {"wiki": 40}, settings=models)
    before = sorted(tmp_path.rglob("*"))
    full = with_changes(config, REFUSED["train.model: train.max_query_tokens"] | {"mine.negatives": 1})
    with pytest.raises(UsageError, match=r"^train.max_query_tokens: 8 tokens leave no room"):
        cluster(full)
    # Shards of an earlier version may hold such tokens.
    with pytest.raises(UsageError, match=r"^train.max_query_tokens: 8 tokens leave no room"):
        check_tokens(full, "shards", Workspace(config).corpus.require())
    full = with_changes(config, REFUSED["embed.model: embed.max_tokens"])
    for stage in (lambda: embed(full, generation=1), lambda: predict(full)):
        with pytest.raises(UsageError, match=r"^embed.max_tokens: 8 tokens leave no room"):
            stage()
    assert sorted(tmp_path.rglob("*")) == before
