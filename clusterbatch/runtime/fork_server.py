"""A process that has imported what workers need and forks them: each then starts in milliseconds instead of seconds."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from clusterbatch.errors import InfrastructureError
from clusterbatch.runtime.work import packed, unpacked

# Bytes of a request's length, little-endian, which come before it: a socket may hand over a long one in pieces.
_LENGTH_BYTES = 8


@dataclass(frozen=True)
class ForkedProcess:
    """A worker and the connection to it, which both ends see closed when the other is gone."""

    pid: int
    connection: Connection

    def kill(self) -> None:
        """End the process at once. Only for one that is known to be at work: an ended one's number may be taken."""
        if not self.connection.poll():
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
        self.connection.close()


class ForkServer:
    """A server process of its own session, which ends with all its workers as soon as this process has ended.

    It has one thread, without which forking would not be safe, and computes nothing.
    """

    def __init__(self) -> None:
        self._control, theirs = socket.socketpair()
        # This process's search path, as it may have been changed since its start.
        program = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import serve; serve({theirs.fileno()})"
        self._process = subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )
        theirs.close()
        self._lock = threading.Lock()

    def fork(self, target: Callable[[Connection], None], module: str) -> ForkedProcess:
        """Run `target(connection)` in a new process.

        module: imported by the server first, so that workers after the first find it imported.

        Raises InfrastructureError if the server is gone.
        """
        ours, theirs = multiprocessing.Pipe()
        program, request = packed(target), packed((module, dict(os.environ)))
        with self._lock:
            try:
                length = len(request).to_bytes(_LENGTH_BYTES, "little")
                socket.send_fds(self._control, [length], [theirs.fileno()])
                self._control.sendall(request)
                answer = self._control.recv(64)
            except OSError:
                answer = b""
        theirs.close()
        if not answer:
            raise InfrastructureError("the process that starts workers is gone (out of memory?)")
        # Whoever reads the connection finds out if the process is gone.
        with suppress(BrokenPipeError, ConnectionResetError):
            ours.send_bytes(program)
        return ForkedProcess(int(answer), ours)

    def close(self) -> None:
        """End the server and all its workers, at once: it would notice the closed socket only after its imports."""
        self._control.close()
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def serve(descriptor: int) -> None:
    """Fork a worker for each request that comes on the socket, until its other end is closed."""
    control = socket.socket(fileno=descriptor)
    # Ended workers are not waited for.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        length, descriptors, _, _ = socket.recv_fds(control, _LENGTH_BYTES, 1)
        if not length:
            os.killpg(0, signal.SIGKILL)
        module, environment = unpacked(control.recv(int.from_bytes(length, "little"), socket.MSG_WAITALL))
        # A worker meets the same error, and can report it.
        with suppress(Exception):
            importlib.import_module(module)
        pid = os.fork()
        if pid == 0:
            control.close()
            _work(Connection(descriptors[0]), environment)
        os.close(descriptors[0])
        control.sendall(str(pid).encode())


def _work(connection: Connection, environment: dict[str, str]) -> None:
    code = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.environ.clear()
        os.environ.update(environment)
        target: Any = unpacked(connection.recv_bytes())
        target(connection)
        code = 0
    except (EOFError, OSError):
        # The other end is gone, and with it whoever wanted the result.
        pass
    finally:
        os._exit(code)
