from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from clusterbatch.encoder.check import check_model
from clusterbatch.errors import UsageError


def test_a_limit_that_special_tokens_fill_is_refused_before_any_work(tiny: Callable[[str], Path]) -> None:
    folder = str(tiny("bert"))
    check_model(folder, load=False, limits={"embed.max_tokens": 3, "train.max_query_tokens": None})
    with pytest.raises(UsageError) as caught:
        check_model(folder, key="train.model", load=False, limits={"train.max_query_tokens": 2})
    message = "train.model: train.max_query_tokens: 2 tokens leave no room for text beside 2 special ones"
    assert str(caught.value) == message
    # A static encoder has no special tokens.
    check_model(folder, kind="static", load=False, limits={"train.max_query_tokens": 2})
