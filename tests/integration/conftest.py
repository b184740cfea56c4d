"""Stages without Ray, for tests of what their units do."""

from __future__ import annotations

import pytest

from tests.integration.in_process import without_ray


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages run their units in this process; fits that are spread over workers still need Ray."""
    for module, name, substitute in without_ray():
        monkeypatch.setattr(module, name, substitute)
