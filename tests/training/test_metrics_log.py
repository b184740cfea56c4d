from __future__ import annotations

import json
from pathlib import Path

import pytest

from clusterbatch.store import Folder
from clusterbatch.training import metrics as metrics_log
from clusterbatch.training.metrics import MetricsLog, read_metrics


def _steps(folder: Folder) -> list[int]:
    return [json.loads(line)["step"] for line in read_metrics(folder).splitlines()]


def _log(log: MetricsLog, start: int, end: int, every: int = 10) -> None:
    for step in range(start, end):
        log.add({"step": step})
        if (step + 1) % every == 0:
            log.cut(step + 1)


def test_lines_beyond_the_last_whole_checkpoint_are_dropped_and_none_comes_twice(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    first = MetricsLog(folder, 0)
    _log(first, 0, 27)
    # The lines since the checkpoint of step 20 are on storage too when the process dies.
    first._write()
    assert _steps(folder) == list(range(27))
    # The checkpoint of step 20 never became whole: the run goes on from 10.
    second = MetricsLog(folder, 10)
    assert _steps(folder) == list(range(10))
    _log(second, 10, 40)
    assert _steps(folder) == list(range(40))


def test_order_is_that_of_the_steps_not_of_the_names(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    _log(MetricsLog(folder, 0), 0, 300, every=3)
    assert _steps(folder) == list(range(300))


def test_a_large_segment_is_not_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_log, "_SEGMENT_BYTES", 100)
    written: list[int] = []
    write = Folder.write
    monkeypatch.setattr(Folder, "write", lambda self, name, data: (written.append(len(data)), write(self, name, data)))
    folder = Folder(str(tmp_path))
    log = MetricsLog(folder, 0)
    _log(log, 0, 60, every=1000)
    log.cut(60)
    assert _steps(folder) == list(range(60))
    # Every line once: what was written before is left as it is.
    assert sum(written) == len(read_metrics(folder))
    assert max(written) < 200
    MetricsLog(folder, 60)
    assert _steps(folder) == list(range(60))


def test_a_figure_that_is_no_number_is_null(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    log = MetricsLog(folder, 0)
    log.add({"step": 0, "score": float("nan"), "loss": 1.5})
    log.cut(1)
    # Python alone would read NaN.
    strict = json.loads(read_metrics(folder), parse_constant=lambda name: pytest.fail(name))
    assert strict == {"step": 0, "score": None, "loss": 1.5}
