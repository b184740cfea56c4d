from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from clusterbatch.encoder.tokenizer import Tokenizer
from clusterbatch.errors import UsageError
from tests.encoder.models import ARCHITECTURES


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("max_tokens", [8, 128])
def test_same_ids_as_transformers(
    architecture: str, max_tokens: int, tiny: Callable[[str], Path], awkward_texts: list[str]
) -> None:
    folder = tiny(architecture)
    tokens = Tokenizer(folder).encode(awkward_texts, max_tokens)
    expected = AutoTokenizer.from_pretrained(folder)(awkward_texts, truncation=True, max_length=max_tokens)
    assert [tokens[row].tolist() for row in range(len(tokens))] == expected["input_ids"]


def test_texts_far_over_the_limit_are_not_tokenised_whole(minilm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer(minilm)
    seen: list[int] = []
    encode = tokenizer._ids
    monkeypatch.setattr(tokenizer, "_ids", lambda texts: seen.extend(map(len, texts)) or encode(texts))
    tokenizer.encode(["some words of a long text " * 50_000], 256)
    assert max(seen) < 5_000


def test_prompt_comes_first(minilm: str) -> None:
    tokenizer = Tokenizer(minilm)
    assert np.array_equal(tokenizer.encode(["b c"], 16, "a ").values, tokenizer.encode(["a b c"], 16).values)


def test_without_special_tokens_and_without_limit(minilm: str) -> None:
    with_special = Tokenizer(minilm).encode(["one two three"])
    without = Tokenizer(minilm, special_tokens=False).encode(["one two three", ""])
    assert np.array_equal(with_special[0][1:-1], without[0])
    assert without.lengths.tolist() == [3, 0]
    assert Tokenizer(minilm).encode([]).offsets.tolist() == [0]


def test_travels_by_folder(minilm: str) -> None:
    tokenizer = Tokenizer(minilm, special_tokens=False)
    assert len(pickle.dumps(tokenizer)) < 1000
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.fingerprint == tokenizer.fingerprint != Tokenizer(minilm).fingerprint
    assert np.array_equal(copy.encode(["a b"]).values, tokenizer.encode(["a b"]).values)


@pytest.mark.parametrize("architecture", ["bert", "xlm-roberta", "mpnet"])
def test_knows_what_it_does_not_know(architecture: str, tiny: Callable[[str], Path]) -> None:
    tokenizer = Tokenizer(tiny(architecture))
    assert tokenizer.unknown in tokenizer.encode(["\U0001f9ff 龘 ᚠ"]).values
    assert tokenizer.unknown not in tokenizer.encode(["the fox"]).values


def test_no_room_beside_special_tokens(minilm: str) -> None:
    with pytest.raises(UsageError, match="no room"):
        Tokenizer(minilm).encode(["a"], 2)


def test_a_padding_token_of_minus_one_is_none(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny("qwen2"), tmp_path / "copy"))
    declared = Tokenizer(folder).padding
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "pad_token_id": -1}))
    assert Tokenizer(folder).padding == declared
