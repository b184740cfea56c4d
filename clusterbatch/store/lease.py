"""One run at a time on a workspace: a lease that names its owner and ends by itself when the owner is gone.

Commits are safe without it (parts have unique names, manifests come last); the lease spares two runs from doing the
same work and a user from a puzzle. No storage is trusted to decide a race: whoever writes waits a moment and reads back
whose lease it is, and goes on reading it while renewing.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType

from pydantic import BaseModel, ValidationError

from clusterbatch.config import RunConfig
from clusterbatch.errors import ClusterbatchError, InfrastructureError
from clusterbatch.store.folder import Folder
from clusterbatch.store.workspace import Workspace

LEASE = "_lease.json"
_SECONDS = 60.0
_RENEWALS = 4
# How long a rival that has looked before us may take to write.
_PAUSE_LOCAL = 0.1
_PAUSE_REMOTE = 1.0


class Lease(BaseModel):
    """Who works on a workspace, and until when (seconds since 1970) unless renewed."""

    owner: str
    host: str
    process: int
    # Tells apart processes that got the same number one after the other.
    started: str
    until: float
    # What gave `process` its number, see `_numbering`; empty in leases of earlier versions.
    numbering: str = ""

    @property
    def is_over(self) -> bool:
        """Expired, or of a process that is gone, which can be told only where its number means the same as here."""
        here = self.numbering != "" and self.numbering == _numbering()
        return time.time() > self.until or (here and _start_of(self.process) != self.started)


class _Lost(BaseException):
    """Raised in the main thread; like KeyboardInterrupt, nothing that handles errors may swallow it."""


@contextmanager
def workspace_lease(config: RunConfig) -> Iterator[None]:
    """Holds the workspace for the duration of the block.

    Raises InfrastructureError where another run holds it, as trying again later helps; and where it was lost: in the
    middle of the block in the main thread, at its end in others.
    """
    folder = Workspace(config).root
    lease = _acquire(folder)
    with _interruptible() as interrupt:
        keeper = _Keeper(folder, lease, interrupt)
        keeper.start()
        try:
            try:
                yield
            finally:
                keeper.stop()
        except _Lost:
            pass
    if keeper.lost_to:
        raise InfrastructureError(
            f"{folder.uri}: the lease was lost to {keeper.lost_to}; this run has stopped, nothing is damaged"
        )


@contextmanager
def _interruptible() -> Iterator[Callable[[], None]]:
    """Gives a function for other threads that stops the main thread, in the middle of a wait too.

    By SIGUSR1: processes that a shell has put in the background ignore SIGINT.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    ended = False

    def stop(number: int, frame: FrameType | None) -> None:
        if not ended:
            raise _Lost

    before = signal.signal(signal.SIGUSR1, stop)
    main = threading.get_ident()
    try:
        yield lambda: signal.pthread_kill(main, signal.SIGUSR1)
    finally:
        ended = True
        signal.signal(signal.SIGUSR1, before)


def _acquire(folder: Folder) -> Lease:
    _refuse(folder, _read(folder))
    owner = uuid.uuid4().hex
    process = os.getpid()
    lease = Lease(
        owner=owner,
        host=socket.gethostname(),
        process=process,
        started=_start_of(process) or "",
        until=time.time() + _SECONDS,
        numbering=_numbering(),
    )
    _write(folder, lease)
    time.sleep(_PAUSE_LOCAL if folder.is_local else _PAUSE_REMOTE)
    found = _read(folder)
    if found is None or found.owner != owner:
        _refuse(folder, found)
        raise InfrastructureError(f"{folder.uri}: another run has just begun here; try again when it has ended")
    return lease


def _refuse(folder: Folder, lease: Lease | None) -> None:
    if lease is None or lease.is_over:
        return
    until = datetime.fromtimestamp(lease.until, UTC).strftime("%H:%M:%S")
    raise InfrastructureError(
        f"{folder.uri}: in use by process {lease.process} on {lease.host}; if that run is gone, its lease ends at "
        f"{until} UTC"
    )


class _Keeper(threading.Thread):
    """Renews the lease, and stops the run where somebody else has taken it."""

    def __init__(self, folder: Folder, lease: Lease, interrupt: Callable[[], None]) -> None:
        super().__init__(name="workspace-lease", daemon=True)
        self._folder = folder
        self._lease = lease
        self._interrupt = interrupt
        self._stopped = threading.Event()
        self.lost_to = ""

    def run(self) -> None:
        while not self._stopped.wait(_SECONDS / _RENEWALS):
            try:
                found = _read(self._folder)
                if found is not None and found.owner != self._lease.owner:
                    self.lost_to = f"process {found.process} on {found.host}"
                    self._interrupt()
                    return
                self._lease = self._lease.model_copy(update={"until": time.time() + _SECONDS})
                _write(self._folder, self._lease)
            except ClusterbatchError:
                # Storage that fails for a while; the run itself will say so if it lasts.
                continue

    def stop(self) -> None:
        self._stopped.set()
        self.join(_SECONDS)
        try:
            found = _read(self._folder)
            if found is not None and found.owner == self._lease.owner:
                self._folder.remove(LEASE)
        except ClusterbatchError:
            # It ends by itself.
            return


def _read(folder: Folder) -> Lease | None:
    try:
        return Lease.model_validate_json(folder.read(LEASE))
    except (FileNotFoundError, ValidationError):
        # A damaged lease cannot say that somebody is here.
        return None


def _write(folder: Folder, lease: Lease) -> None:
    folder.write(LEASE, lease.model_dump_json().encode())


def _start_of(process: int) -> str | None:
    """When a process began, as the kernel counts; None where there is none with this number, or no /proc (macOS)."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return None
    return stat.rpartition(")")[2].split()[19]


def _numbering() -> str:
    """What numbers processes here: this start of the kernel, in this PID namespace. Empty where that cannot be told.

    A host's name would not do: containers on its network share the name, but not the numbers.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""
