"""Training texts are tokenised as the model that is written says its texts are: with the prompts of their source."""

import pyarrow as pa
import pytest

from clusterbatch.config import RunConfig
from clusterbatch.encoder.resolve import resolve_model
from clusterbatch.encoder.tokenizer import Tokenizer
from clusterbatch.encoder.tokens import Tokens
from clusterbatch.shards.tokenise import Tokenisation

MODEL = resolve_model("all-MiniLM-L6-v2")

ROWS = pa.table(
    {
        "source": ["first", "second", "first"],
        "query": ["how to bake", "what is steel", "who wrote it"],
        "document": ["bread", "an alloy", "a poet"],
        "negatives": [["stone", "wood"], [], ["glass"]],
    }
)


@pytest.mark.parametrize("encoder", ["static", "backbone"])
def test_prompts_of_the_configuration_stand_before_texts(encoder: str) -> None:
    train = {
        "model": MODEL,
        "encoder": encoder,
        "max_document_tokens": 8,
        "prompts": {"query": "ask: ", "document": "text: "},
        "source_prompts": {"first": {"document": "first text: "}},
    }
    config = RunConfig.model_validate({"workspace": "w", "train": train})
    found = Tokenisation.of(config).columns(ROWS)
    tokenizer = Tokenizer(MODEL, special_tokens=encoder == "backbone")

    def expected(texts: list[str]) -> list[list[int]]:
        tokens = tokenizer.encode(texts, 8)
        return [tokens[row].tolist() for row in range(len(tokens))]

    queries = [f"ask: {text}" for text in ROWS["query"].to_pylist()]
    assert found["query_tokens"].to_pylist() == expected(queries)
    assert found["document_tokens"].to_pylist() == expected(
        ["first text: bread", "text: an alloy", "first text: a poet"]
    )
    negatives = Tokens.from_arrow(found["negative_tokens"].flatten())
    assert [negatives[row].tolist() for row in range(3)] == expected(
        ["first text: stone", "first text: wood", "first text: glass"]
    )
    assert [len(of_row) for of_row in found["negative_tokens"].to_pylist()] == [2, 0, 1]


@pytest.mark.parametrize("limit", [256, 1024])
def test_texts_are_cut_where_the_model_ends(limit: int) -> None:
    """MiniLM says 256; a transformer has no position for what lies beyond its own, and fails there."""
    train = {"model": MODEL, "encoder": "backbone", "max_document_tokens": limit}
    config = RunConfig.model_validate({"workspace": "w", "train": train})
    rows = pa.table({"source": ["long"], "query": ["short"], "document": ["word " * 2000]})
    assert len(Tokenisation.of(config).columns(rows)["document_tokens"][0]) == 256


def test_without_prompts_texts_are_as_they_are() -> None:
    config = RunConfig.model_validate({"workspace": "w", "train": {"model": MODEL}})
    plain = Tokenizer(MODEL, special_tokens=False).encode(ROWS["query"].to_pylist())
    found = Tokens.from_arrow(Tokenisation.of(config).columns(ROWS)["query_tokens"])
    assert (found.values == plain.values).all()
    assert (found.offsets == plain.offsets).all()
