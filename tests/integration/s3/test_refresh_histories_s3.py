"""Random histories of a workspace in a bucket, with folder markers among its files."""

from __future__ import annotations

from pathlib import Path

import pytest

from clusterbatch.config import StorageConfig
from tests.integration.test_refresh_histories import history_config, plain, play_history

pytestmark = pytest.mark.s3

__all__ = ["plain"]


@pytest.mark.parametrize("seed", [*range(3), *(pytest.param(seed, marks=pytest.mark.faults) for seed in range(3, 20))])
def test_in_a_bucket_a_history_ends_as_the_model_says(
    seed: int, tmp_path: Path, storage: StorageConfig, bucket: str, plain: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    play_history(seed, history_config(tmp_path, f"s3://{bucket}/run", storage), monkeypatch)
