"""The clustering stage without Ray, for tests of what its units do."""

from __future__ import annotations

import pytest

from tests.integration.in_process import without_ray


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stage `cluster` runs its units in this process; fits that are spread over workers still need Ray."""
    for module, name, substitute in without_ray():
        monkeypatch.setattr(module, name, substitute)
