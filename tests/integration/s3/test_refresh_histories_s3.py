"""Random histories of a workspace in a bucket, with folder markers among its files."""

from __future__ import annotations

from pathlib import Path

import pytest

from clusterbatch.config import StorageConfig
from tests.integration.test_refresh_histories import history_config, play_history

pytestmark = pytest.mark.s3

# A request costs a hundred times what it does on disk: short histories, and the longer ones beside the tests of faults.
_LONG = [pytest.param(seed, 10, marks=pytest.mark.faults) for seed in range(20)]


@pytest.mark.parametrize(("seed", "steps"), [(0, 5), (1, 5), (2, 5), *_LONG])
def test_in_a_bucket_a_history_ends_as_the_model_says(
    seed: int,
    steps: int,
    tmp_path: Path,
    storage: StorageConfig,
    bucket: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    play_history(seed, history_config(tmp_path, f"s3://{bucket}/run", storage), monkeypatch, steps)
