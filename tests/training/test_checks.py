"""Checks of training against the shards it is given."""

from __future__ import annotations

from pathlib import Path

import pytest

from clusterbatch.config import load_config
from clusterbatch.errors import UsageError
from clusterbatch.shards.tokenise import Tokenisation
from clusterbatch.store import Counts, Manifest
from clusterbatch.training.checks import check_tokens
from tests.encoder.models import make_static


@pytest.mark.parametrize("reused", [False, True], ids=["own", "reused"])
def test_shards_for_another_encoder_are_refused_with_advice_that_helps(reused: bool, tmp_path: Path) -> None:
    """Those of another workspace cannot be made again from this one: `--force` would be refused."""
    make_static(["harbour", "volcano"], tmp_path / "one")
    make_static(["guitar", "orchard"], tmp_path / "other")
    words = [f"workspace={tmp_path}/ws", *([f"reuse.clusters={tmp_path}/their"] if reused else [])]
    made = Tokenisation.of(load_config(None, [*words, f"train.model={tmp_path}/one"])).identity
    clusters = Manifest(
        kind="clusters",
        fingerprint="f",
        created="",
        seconds=0,
        counts=Counts(),
        parts=[],
        details={"tokens": made},
    )
    check_tokens(load_config(None, [*words, f"train.model={tmp_path}/one"]), "clusters", clusters)
    with pytest.raises(UsageError, match="clusters holds tokens made with another one") as refused:
        check_tokens(load_config(None, [*words, f"train.model={tmp_path}/other"]), "clusters", clusters)
    assert ("--force" in str(refused.value)) is not reused
    assert ("reuse.clusters" in str(refused.value)) is reused
