"""Checks of training against the shards it is given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from clusterbatch.config import load_config
from clusterbatch.errors import UsageError
from clusterbatch.shards.tokenise import Tokenisation
from clusterbatch.store import Counts, Manifest
from clusterbatch.training.checks import check_margins, check_tokens
from tests.batches.indexes import make_index
from tests.encoder.models import make_static


def _clusters(**details: Any) -> Manifest:
    return Manifest(kind="clusters", fingerprint="f", created="", seconds=0, counts=Counts(), parts=[], details=details)


def test_margins_that_no_source_would_use_are_refused() -> None:
    words = ["workspace=/none", "mine.negatives=1", "mine.margins=true", "train.margin_mse=0.5"]
    index, clusters = make_index([[20], [30]]), _clusters(layout={"margins": True})
    one, none = "{source-0: in_batch}", "{source-0: in_batch, source-1: in_batch}"
    check_margins(load_config(None, words), "clusters", clusters, index)
    check_margins(load_config(None, [*words, f"train.negatives={one}"]), "clusters", clusters, index)
    with pytest.raises(UsageError, match=r"margin_mse compares .* train\.negatives leaves out for all sources"):
        check_margins(load_config(None, [*words, f"train.negatives={none}"]), "clusters", clusters, index)
    with pytest.raises(UsageError, match=r"clusters was made without mine\.margins"):
        check_margins(load_config(None, words), "clusters", _clusters(layout={}), index)


@pytest.mark.parametrize("reused", [False, True], ids=["own", "reused"])
def test_shards_for_another_encoder_are_refused_with_advice_that_helps(reused: bool, tmp_path: Path) -> None:
    """Those of another workspace cannot be made again from this one: `--force` would be refused."""
    make_static(["harbour", "volcano"], tmp_path / "one")
    make_static(["guitar", "orchard"], tmp_path / "other")
    words = [f"workspace={tmp_path}/ws", *([f"reuse.clusters={tmp_path}/their"] if reused else [])]
    made = Tokenisation.of(load_config(None, [*words, f"train.model={tmp_path}/one"])).identity
    clusters = _clusters(tokens=made)
    check_tokens(load_config(None, [*words, f"train.model={tmp_path}/one"]), "clusters", clusters)
    with pytest.raises(UsageError, match="clusters holds tokens made with another one") as refused:
        check_tokens(load_config(None, [*words, f"train.model={tmp_path}/other"]), "clusters", clusters)
    assert ("--force" in str(refused.value)) is not reused
    assert ("reuse.clusters" in str(refused.value)) is reused
