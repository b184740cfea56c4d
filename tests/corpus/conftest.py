"""Ingest without Ray: its units one after the other in this process, for tests of what the units do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import pytest

from clusterbatch.corpus import ingest as stage
from clusterbatch.corpus import passes
from clusterbatch.runtime import Unit
from clusterbatch.store import Receipt


def run_units(
    title: str,
    units: Sequence[Unit],
    worker: type,
    arguments: Mapping[str, Any],
    pool: Any,
    *,
    done: Mapping[int, Receipt] | None = None,
    measured_in: str = "rows",
) -> list[Receipt]:
    receipts = dict(done or {})
    one = worker(**arguments)
    for unit in units:
        if unit.number not in receipts:
            receipts[unit.number] = one.process(unit)
    return [receipts[unit.number] for unit in units]


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "run_units", run_units)
    monkeypatch.setattr(stage, "ray_session", lambda config: nullcontext())
