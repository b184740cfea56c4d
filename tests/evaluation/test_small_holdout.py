"""Corpora too small to hold anything out, or enough for two splits: the line says that, not what it leads to."""

from __future__ import annotations

from pathlib import Path

import pytest

from clusterbatch.config import RunConfig
from clusterbatch.corpus.holdout import SPLITS, split_of
from clusterbatch.corpus.ingest import ingest
from clusterbatch.corpus.normalise import text_hash
from clusterbatch.errors import UsageError
from clusterbatch.evaluation.stage import configured_collections
from tests.corpus.test_ingest import write_lines


def _ingested(tmp_path: Path, pairs: list[tuple[str, str]], **evaluate: object) -> RunConfig:
    write_lines(tmp_path / "in.jsonl", [{"query": query, "document": document} for query, document in pairs])
    config = RunConfig.model_validate(
        {"workspace": str(tmp_path / "ws"), "corpus": {"paths": [str(tmp_path / "in.jsonl")]}, "evaluate": evaluate}
    )
    ingest(config)
    return config


@pytest.mark.parametrize("queries", [["one"], ["one", "two", "three"]])
def test_sources_of_one_document_are_named_as_the_reason(tmp_path: Path, queries: list[str], in_process: None) -> None:
    config = _ingested(tmp_path, [(query, "the document") for query in queries])
    with pytest.raises(UsageError, match=r"evaluate\.path: .* held out none: no source has two different documents"):
        configured_collections(config)


def test_nothing_is_said_of_documents_if_nothing_was_to_be_held_out(tmp_path: Path, in_process: None) -> None:
    config = _ingested(tmp_path, [("one", "first"), ("two", "second")], holdout=0)
    with pytest.raises(UsageError, match=r"ingest has held out none\)"):
        configured_collections(config)


def test_a_split_without_judgements_is_named(tmp_path: Path, in_process: None) -> None:
    config = _ingested(tmp_path, [("one", "first"), ("two", "second")])
    queries = (tmp_path / "ws/corpus/holdout/queries.jsonl").read_text()
    # One of the two is held out, so one of the splits has it and the other has none.
    used = split_of(text_hash("one" if '"one"' in queries else "two"))
    for split in SPLITS:
        asked = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"split": split})})
        if split == used:
            assert [collection.split for collection in configured_collections(asked)] == [split]
        else:
            with pytest.raises(UsageError, match=rf"evaluate\.path: .* too little for the split {split}"):
                configured_collections(asked)
