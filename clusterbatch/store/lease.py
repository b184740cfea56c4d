"""One run at a time on a workspace: a lease that names its owner and expires when the owner is gone.

Commits are safe without it (parts have unique names, manifests come last); removing or replacing files is not. The
lease also prevents two runs from doing the same work. No storage is trusted to decide a race: a writer waits a moment,
reads the lease back to see whose it is, and keeps reading it while renewing. A lease that is gone or has expired is
lost: meanwhile another run may have come and left.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType

from pydantic import BaseModel, ValidationError

from clusterbatch.config import RunConfig
from clusterbatch.errors import ClusterbatchError, InfrastructureError
from clusterbatch.store.folder import Folder
from clusterbatch.store.workspace import Workspace, check_workspace

LEASE = "_lease.json"
_SECONDS = 60.0
_RENEWALS = 4
# Storage that fails for as long as requests are repeated must not cost the lease: it lasts that much longer.
_SECONDS_BEYOND_RETRIES = 30.0
# How long a rival that has looked before us may take to write.
_PAUSE_LOCAL = 0.1
_PAUSE_REMOTE = 1.0


class Lease(BaseModel):
    """Owner of a workspace, and the time (seconds since 1970) at which its claim ends unless renewed."""

    owner: str
    host: str
    process: int
    # Tells apart processes that got the same number one after the other.
    started: str
    until: float
    # The source of `process`, see `_numbering`; empty in leases of earlier versions.
    numbering: str = ""

    @property
    def is_over(self) -> bool:
        """Return whether it has expired or its process is gone, which is known only if process numbers mean the same
        here."""
        here = self.numbering != "" and self.numbering == _numbering()
        return time.time() > self.until or (here and _start_of(self.process) != self.started)


class _Lost(BaseException):
    """Raised in the main thread; like KeyboardInterrupt, nothing that handles errors may swallow it."""


@contextmanager
def workspace_lease(config: RunConfig) -> Iterator[None]:
    """Hold the workspace for the duration of the block.

    Raises UsageError if it is a folder of other data (check_workspace); InfrastructureError if another run holds it, as
    trying again later helps, and if it was lost: in the middle of the block in the main thread, at its end in others.
    """
    check_workspace(config)
    folder = Workspace(config).root
    is_new = folder.is_local and not folder.exists()
    lease = _acquire(folder)
    with _interruptible() as interrupt:
        keeper = _Keeper(folder, lease, interrupt)
        keeper.start()
        try:
            try:
                yield
            finally:
                keeper.stop()
                if is_new:
                    # A command that was refused before it wrote anything leaves no empty folder.
                    with suppress(OSError):
                        os.rmdir(folder.path())
        except _Lost:
            pass
    if keeper.lost:
        raise InfrastructureError(f"{folder.uri}: the lease was lost: {keeper.lost}; this run has stopped")


@contextmanager
def _interruptible() -> Iterator[Callable[[], None]]:
    """Yield a function with which other threads stop the main thread, even in the middle of a wait.

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
        until=time.time() + _seconds(folder),
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
    """Renew the lease, and stop the run if the lease is lost."""

    def __init__(self, folder: Folder, lease: Lease, interrupt: Callable[[], None]) -> None:
        super().__init__(name="workspace-lease", daemon=True)
        self._folder = folder
        self._lease = lease
        self._interrupt = interrupt
        self._stopped = threading.Event()
        # How the lease was lost; empty while it is held.
        self.lost = ""

    def run(self) -> None:
        while not self._stopped.wait(_SECONDS / _RENEWALS):
            try:
                self.lost = self._loss(_read(self._folder))
                if self.lost:
                    self._interrupt()
                    return
                self._lease = self._lease.model_copy(update={"until": time.time() + _seconds(self._folder)})
                _write(self._folder, self._lease)
            except ClusterbatchError:
                # Storage that fails for a while; the run itself will say so if it lasts.
                continue

    def stop(self) -> None:
        """Stop renewing and give the lease back; if it was lost in the meantime, `lost` says so."""
        self._stopped.set()
        self.join(_SECONDS)
        if self.lost:
            return
        try:
            found = _read(self._folder)
            self.lost = self._loss(found)
            if found is not None and found.owner == self._lease.owner:
                self._folder.remove(LEASE)
        except ClusterbatchError:
            # It expires by itself.
            return

    def _loss(self, found: Lease | None) -> str:
        """Compare the stored lease with our own, as it was written last."""
        if found is None:
            return "its file is gone"
        if found.owner != self._lease.owner:
            return f"process {found.process} on {found.host} has it"
        if time.time() > self._lease.until:
            return "it could not be renewed in time"
        return ""


def _seconds(folder: Folder) -> float:
    """Seconds that a lease lasts unless renewed."""
    return _SECONDS if folder.is_local else max(_SECONDS, folder.storage.retry_budget + _SECONDS_BEYOND_RETRIES)


def _read(folder: Folder) -> Lease | None:
    try:
        return Lease.model_validate_json(folder.read(LEASE))
    except (FileNotFoundError, ValidationError):
        # A damaged lease cannot say that somebody is here.
        return None


def _write(folder: Folder, lease: Lease) -> None:
    folder.write(LEASE, lease.model_dump_json().encode())


def _start_of(process: int) -> str | None:
    """Return when a process began, as the kernel counts; None if there is no such process, or no /proc (macOS)."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return None
    return stat.rpartition(")")[2].split()[19]


def _numbering() -> str:
    """Identify the numbering of processes here: this boot of the kernel, in this PID namespace. Empty if unknown.

    A host's name would not do: containers on its network share the name, but not the numbers.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""
