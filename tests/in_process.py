"""Stages without their worker processes: what takes most of a small run's time is starting those."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest

from clusterbatch.clustering import stage
from clusterbatch.runtime import Ahead, Pool, Unit, units
from clusterbatch.store import Receipt


def run_in_process(patch: pytest.MonkeyPatch) -> None:
    """Units are then done by this process, one after the other, by a worker that comes and goes through pickle."""

    def stream(
        title: str,
        pending: Sequence[Unit],
        worker: type,
        arguments: Mapping[str, Any],
        pool: Pool,
        ahead: Ahead | None,
    ) -> Iterator[tuple[Receipt, int]]:
        assert ahead is None
        made = worker(**pickle.loads(pickle.dumps(dict(arguments))))
        for unit in pending:
            yield made.process(pickle.loads(pickle.dumps(unit))), unit.rows

    patch.setattr(units, "_stream", stream)
    patch.setattr(stage, "run_on_worker", lambda function, argument, pool: function(argument))
