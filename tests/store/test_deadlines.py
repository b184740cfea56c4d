"""Storage that does not answer: each operation ends after its attempts, and says what it waits for."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest
from botocore.exceptions import ClientError

from clusterbatch.config import StorageConfig
from clusterbatch.errors import InfrastructureError
from clusterbatch.store import Folder, retries
from clusterbatch.store.retries import with_retries

_VERBS: dict[str, Callable[[Folder], object]] = {
    "read": lambda folder: folder.read("x"),
    "read a range": lambda folder: folder.read("x", 0, 10),
    "open": lambda folder: folder.open("x"),
    "size": lambda folder: folder.size("x"),
    "exists": lambda folder: folder.exists("x"),
    "write": lambda folder: folder.write("x", bytes(3_000_000)),
    "list": lambda folder: folder.list(),
    "find": lambda folder: folder.find(),
    "find a pattern": lambda folder: folder.find("a/*.jsonl"),
    "remove": lambda folder: folder.remove("x"),
}


class _Server(threading.Thread):
    """Accepts connections and never answers: silent, or it hangs up at once or in the middle of the request."""

    def __init__(self, manner: str) -> None:
        super().__init__(daemon=True)
        self.manner = manner
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = []
        self.connections = 0
        self._counted = threading.Condition()

    @property
    def endpoint_url(self) -> str:
        return f"http://127.0.0.1:{self._socket.getsockname()[1]}"

    def run(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._socket.accept()
                with self._counted:
                    self.connections += 1
                    self._counted.notify_all()
                if self.manner == "silent":
                    self._open.append(connection)
                    continue
                if self.manner == "hangs up later":
                    connection.recv(10)
                connection.close()

    def connections_since(self, before: int, least: int) -> int:
        """Return how many have come; on a busy machine a client may give up before this thread has counted it."""
        with self._counted:
            self._counted.wait_for(lambda: self.connections - before >= least, timeout=30)
            return self.connections - before

    def stop(self) -> None:
        self._socket.close()
        for connection in self._open:
            connection.close()


@pytest.fixture(params=["silent", "hangs up", "hangs up later"])
def server(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[_Server]:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
    found = _Server(request.param)
    found.start()
    yield found
    found.stop()


def _folder(server: _Server, **options: float) -> Folder:
    storage = {
        "region": "us-east-1",
        "addressing_style": "path",
        "connect_timeout": 1.0,
        "read_timeout": 0.2,
        **options,
    }
    return Folder("s3://bucket/run", StorageConfig.model_validate({"endpoint_url": server.endpoint_url, **storage}))


@pytest.mark.parametrize("attempts", [1, 3])
def test_attempts_are_counted_in_one_place(server: _Server, attempts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Pauses between attempts are other tests' matter.
    monkeypatch.setattr(retries.time, "sleep", lambda seconds: None)
    # On a busy machine the first request may not even reach the server in a second.
    folder = _folder(server, attempts=attempts, connect_timeout=10.0)
    for name, verb in _VERBS.items():
        before = server.connections
        with pytest.raises(InfrastructureError, match="bucket bucket" if attempts == 1 else f"{attempts} attempts"):
            verb(folder)
        asked = server.connections_since(before, attempts)
        # The HTTP library asks once more by itself, at once, if a connection is closed without an answer.
        assert asked == attempts or (server.manner != "silent" and asked <= 2 * attempts), name


def test_attempts_share_one_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """No attempt may wait beyond the end of the budget, but for the first and the last moment."""
    now = 0.0
    monkeypatch.setattr(retries.time, "monotonic", lambda: now)

    def pause(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(retries.time, "sleep", pause)
    storage = StorageConfig(attempts=100, retry_budget=50.0, connect_timeout=1.0, read_timeout=19.0)
    allowed: list[float] = []

    def silent(seconds: float) -> None:
        nonlocal now
        allowed.append(seconds)
        now += seconds
        raise TimeoutError

    with pytest.raises(InfrastructureError, match="no answer in time"):
        with_retries("s3://bucket/x", storage, silent)
    assert len(allowed) > 2
    assert now <= 50.0 + 1.0


def test_waiting_is_said_once_and_so_is_its_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 1_000_000.0
    for clock in ("monotonic", "time"):
        monkeypatch.setattr(retries.time, clock, lambda: now)

    def pause(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(retries.time, "sleep", pause)
    storage = StorageConfig(endpoint_url="http://127.0.0.1:1", attempts=100)
    failures = iter(range(8))

    def call(seconds: float) -> str:
        if next(failures, None) is not None:
            raise ConnectionResetError
        return "done"

    assert with_retries("s3://bucket/x", storage, call) == "done"
    said = capsys.readouterr().err.splitlines()
    assert "http://127.0.0.1:1 not reachable (ConnectionResetError), trying again since" in said[0]
    assert "answers again" in said[-1]
    assert 2 <= len(said) <= 4
    # A single failure is not worth a line.
    failures = iter(range(1))
    assert with_retries("s3://bucket/x", storage, call) == "done"
    assert capsys.readouterr().err == ""


def test_a_wrong_clock_is_called_so() -> None:
    def refuse(seconds: float) -> None:
        response = {"Error": {"Code": "RequestTimeTooSkewed"}, "ResponseMetadata": {"HTTPStatusCode": 403}}
        raise ClientError(response, "GetObject")

    with pytest.raises(InfrastructureError, match="the clocks of this machine and the server differ"):
        with_retries("s3://bucket/key", StorageConfig(), refuse)
