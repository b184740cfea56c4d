"""Lines of progress: what is left is estimated from the work alone."""

from __future__ import annotations

import pytest

from clusterbatch.runtime import ProgressLine, progress


def test_the_start_of_workers_is_not_taken_for_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 1000.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with ProgressLine("evaluate", total=40, unit="KiB of documents") as line:
        # Ninety seconds until the workers are there, then ten for each piece.
        now += 100
        line.advance(10, seconds=10.0)
        now += 10
        line.advance(10, seconds=10.0)
        now += 20
        line.advance(20, seconds=20.0)
    assert capsys.readouterr().err.splitlines() == [
        "evaluate: 40 KiB of documents",
        "evaluate: 10/40 KiB of documents, 1 KiB/s, 30 s left",
        "evaluate: 20/40 KiB of documents, 1 KiB/s, 20 s left",
        "evaluate: 40/40 KiB of documents, 1 KiB/s, 0 s left",
        "evaluate: 40 KiB of documents in 130.0 s",
    ]


def test_nothing_is_foretold_before_anything_is_done(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 1000.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with ProgressLine("embed", total=40) as line:
        now += 100
        # All rows of its piece are copies of others.
        line.advance(0)
    assert "embed: 0/40 rows, 0 rows/s" in capsys.readouterr().err.splitlines()


def test_rates_below_one_are_no_zeros(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = 1000.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with ProgressLine("compare", total=1_200, unit="steps") as line:
        for steps, seconds in ((40, 1000.0), (800, 40.0)):
            now += seconds
            line.advance(steps, "source seed 0")
    assert capsys.readouterr().err.splitlines()[1:3] == [
        "compare: 40/1,200 steps, 0.04 steps/s, 29,000 s left, source seed 0",
        "compare: 840/1,200 steps, 0.81 steps/s, 446 s left, source seed 0",
    ]
