"""Two runs on one workspace: the second is refused; a crash does not keep anyone out for ever."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import threading
import time
from itertools import pairwise
from pathlib import Path

import pytest

from clusterbatch.cli import main
from clusterbatch.config import RunConfig
from clusterbatch.errors import InfrastructureError
from clusterbatch.store import lease
from clusterbatch.store.lease import LEASE, workspace_lease


def config(folder: Path) -> RunConfig:
    return RunConfig(workspace=str(folder))


def _hold(folder: Path, seconds: float) -> None:
    with workspace_lease(config(folder)):
        time.sleep(seconds)


def _race(folder: Path, start: float, winners: multiprocessing.Queue) -> None:
    time.sleep(max(0.0, start - time.time()))
    try:
        with workspace_lease(config(folder)):
            entered = time.time()
            time.sleep(1.0)
            winners.put((entered, time.time()))
    except InfrastructureError:
        pass


def test_the_second_run_is_refused_and_the_next_is_not(tmp_path: Path) -> None:
    with workspace_lease(config(tmp_path)):
        with (
            pytest.raises(InfrastructureError, match=f"in use by process {os.getpid()}"),
            workspace_lease(config(tmp_path)),
        ):
            pass
        assert (tmp_path / LEASE).exists()
    assert not (tmp_path / LEASE).exists()
    with workspace_lease(config(tmp_path)):
        pass


def test_a_killed_run_leaves_nothing_in_the_way(tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_hold, args=(tmp_path, 60))
    process.start()
    while not (tmp_path / LEASE).exists():
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with workspace_lease(config(tmp_path)):
        assert json.loads((tmp_path / LEASE).read_text())["process"] == os.getpid()


@pytest.mark.parametrize("other", [{"numbering": "a kernel pid:[1]"}, {}], ids=["container", "older version"])
def test_numbers_of_processes_elsewhere_say_nothing(tmp_path: Path, other: dict[str, str]) -> None:
    """Of another container on this machine's network, which has its name; and of who knows where."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    with workspace_lease(config(tmp_path)):
        lease = json.loads((tmp_path / LEASE).read_text())
    lease |= {"owner": "x", "process": gone.pid, "until": time.time() + 1000}
    # Here it would be over.
    (tmp_path / LEASE).write_text(json.dumps(lease))
    with workspace_lease(config(tmp_path)):
        pass
    del lease["numbering"]
    (tmp_path / LEASE).write_text(json.dumps({**lease, **other}))
    with pytest.raises(InfrastructureError, match=f"in use by process {gone.pid}"), workspace_lease(config(tmp_path)):
        pass


def test_a_lease_of_another_machine_ends_by_itself(tmp_path: Path) -> None:
    foreign = {"owner": "x", "host": "elsewhere", "process": 1, "started": "1", "until": time.time() + 1000}
    (tmp_path / LEASE).write_text(json.dumps(foreign))
    with pytest.raises(InfrastructureError, match="process 1 on elsewhere"), workspace_lease(config(tmp_path)):
        pass
    # An orchestrator may try again: that is no mistake of the configuration.
    assert main(["ingest", f"workspace={tmp_path}", "corpus.paths=nowhere"]) == 4
    (tmp_path / LEASE).write_text(json.dumps({**foreign, "until": time.time() - 1}))
    with workspace_lease(config(tmp_path)):
        pass


def test_of_many_at_once_at_most_one_goes_on(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    winners = context.Queue()
    start = time.time() + 3.0
    racers = [context.Process(target=_race, args=(tmp_path, start, winners)) for _ in range(4)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    # On a busy machine one may come when another has gone.
    times = sorted(winners.get() for _ in range(winners.qsize()))
    assert all(left <= entered for (_, left), (entered, _) in pairwise(times))


class _Thief(threading.Thread):
    """Takes the lease again and again, and whole: a renewal may fall between its writing and our looking."""

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self.folder, self.caught = folder, threading.Event()

    def run(self) -> None:
        lease = {"owner": "x", "host": "elsewhere", "process": 7, "started": "1", "until": time.time() + 1000}
        while not self.caught.wait(0.03):
            (self.folder / "stolen").write_text(json.dumps(lease))
            os.replace(self.folder / "stolen", self.folder / LEASE)


@pytest.mark.parametrize("in_background", [False, True], ids=["in front", "in the background"])
def test_a_run_that_lost_its_lease_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_background: bool) -> None:
    monkeypatch.setattr(lease, "_SECONDS", 0.4)
    # As shells start what they put in the background.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN if in_background else signal.default_int_handler)
    thief = _Thief(tmp_path)

    def work() -> None:
        with workspace_lease(config(tmp_path)):
            thief.start()
            # In the middle of a wait.
            time.sleep(60)

    start = time.monotonic()
    try:
        with pytest.raises(InfrastructureError, match="lost: process 7 on elsewhere"):
            work()
    finally:
        thief.caught.set()
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - start < 50
    thief.join()
    assert json.loads((tmp_path / LEASE).read_text())["owner"] == "x"


def test_an_error_of_the_run_itself_stays_what_it_is(tmp_path: Path) -> None:
    def work() -> None:
        with workspace_lease(config(tmp_path)):
            raise ValueError("its own")

    handler = signal.getsignal(signal.SIGUSR1)
    with pytest.raises(ValueError, match="its own"):
        work()
    assert signal.getsignal(signal.SIGUSR1) == handler


@pytest.mark.parametrize("meanwhile", ["gone", "expired"])
def test_a_lease_that_is_gone_or_expired_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, meanwhile: str
) -> None:
    """Another run may have come and left: whether it has, the file does not say."""
    monkeypatch.setattr(lease, "_RENEWALS", 1e-4)

    def work() -> None:
        with workspace_lease(config(tmp_path)):
            if meanwhile == "gone":
                (tmp_path / LEASE).unlink()
            else:
                monkeypatch.setattr(lease.time, "time", lambda now=time.time: now() + 1000)

    with pytest.raises(InfrastructureError, match=r"lease was lost: .*(gone|not be renewed)"):
        work()
    assert not (tmp_path / LEASE).exists()


def test_a_lease_that_is_gone_stops_a_run_in_the_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "_SECONDS", 4.0)
    reached = []

    def work() -> None:
        with workspace_lease(config(tmp_path)):
            (tmp_path / LEASE).unlink()
            time.sleep(60)
            reached.append("end")

    with pytest.raises(InfrastructureError, match="lease was lost: its file is gone"):
        work()
    assert not reached
