"""Sessions: joining a Ray cluster, starting one on this machine, or doing without.

Ray is imported only by sessions that use it: that takes longer than a small command.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from clusterbatch.config import RayConfig
from clusterbatch.errors import InfrastructureError
from clusterbatch.log import say
from clusterbatch.runtime.executor import InProcessExecutor, installed_executor, using
from clusterbatch.runtime.local_executor import LocalExecutor

# Workers of a local cluster share the cores: one thread each is what two workers on two cores need, and a fixed
# number of threads is also what makes sums come out the same every time.
_LOCAL_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_V2_ENABLED": "1",
    # The C++ core prints advice about actors at level ERROR; failures reach us as exceptions.
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
}

_RAY_CLIENT_PORT = 10001
_CONNECT_TRIES, _CONNECT_SECONDS = 3, 5.0

# Present if this machine has a GPU that this process may use (NVIDIA, AMD, Windows' subsystem for Linux).
_GPU_DEVICES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")

_kept_by_caller = False
_kept_local: LocalExecutor | None = None


def chosen_mode(config: RayConfig) -> Literal["cluster", "local", "in-process"]:
    """Return `ray.mode`, or what `auto` means here: processes of this machine, if there is no reason for Ray.

    Ray is needed to reach other machines, to share GPUs, and to make a `ray.runtime_env`.
    """
    if config.mode != "auto":
        return config.mode
    wants_ray = config.address or os.environ.get("RAY_ADDRESS") or config.runtime_env or config.object_store_memory
    # Forking is safe on Linux alone.
    if wants_ray or _is_connected() or sys.platform != "linux" or any(Path(path).exists() for path in _GPU_DEVICES):
        return "cluster"
    return "local"


@contextmanager
def ray_session(config: RayConfig) -> Iterator[None]:
    """Open a session for the duration of the block, with an executor as `ray.mode` says.

    An existing Ray connection is used and left as it is; so is a session without Ray that is open already, unless it
    is one of several processes and this one asks for a cluster.

    Raises InfrastructureError if a cluster cannot be started or joined.
    """
    existing = installed_executor()
    if isinstance(existing, InProcessExecutor) or (
        isinstance(existing, LocalExecutor) and chosen_mode(config) != "cluster"
    ):
        yield
        return
    mode = chosen_mode(config)
    if mode == "in-process":
        with _one_thread(), using(InProcessExecutor()):
            yield
        return
    _set_environment()
    if mode == "local":
        with _local(config) as local, using(local):
            yield
        return
    import ray

    from clusterbatch.runtime.ray_executor import RayExecutor

    executor = RayExecutor(config.startup_timeout)
    if ray.is_initialized():
        with using(executor):
            yield
        return
    _start(config)
    try:
        with using(executor):
            yield
    finally:
        if not _kept_by_caller:
            ray.shutdown()


@contextmanager
def lasting_session() -> Iterator[None]:
    """Keep what sessions in the block start until its end, so that several stages share one start. Starts nothing."""
    global _kept_by_caller, _kept_local
    if _kept_by_caller or _is_connected():
        yield
        return
    _kept_by_caller = True
    try:
        yield
    finally:
        _kept_by_caller = False
        if _kept_local is not None:
            _kept_local.close()
            _kept_local = None
        if _is_connected():
            sys.modules["ray"].shutdown()


def _is_connected() -> bool:
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


@contextmanager
def _local(config: RayConfig) -> Iterator[LocalExecutor]:
    global _kept_local
    if _kept_local is not None:
        yield _kept_local
        return
    executor = LocalExecutor(config.num_cpus)
    if _kept_by_caller:
        _kept_local = executor
    try:
        yield executor
    finally:
        if _kept_local is None:
            executor.close()


def _set_environment() -> None:
    for name, value in _LOCAL_ENVIRONMENT.items():
        os.environ.setdefault(name, value)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute with the threads that a local worker would have: sums then come out the same as there."""
    # Imported here, as every worker imports this file and those that only move rows need no torch.
    import torch

    _set_environment()
    before = torch.get_num_threads()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _start(config: RayConfig) -> None:
    address = config.address or os.environ.get("RAY_ADDRESS")
    if address == "local":
        # As if unset: Ray itself would start what `ray.num_cpus` does not bound, with a dashboard.
        address = None
    if address:
        key = "ray.address" if config.address else "RAY_ADDRESS"
        say(f"ray: joining the cluster at {address} ({key})")
        _check_port(key, address)
    on_termination = signal.getsignal(signal.SIGTERM)
    with _without_native_stderr(), _daemons_in_groups_of_their_own():
        _init(config, address)
    if callable(on_termination) and threading.current_thread() is threading.main_thread():
        # Ray takes the signal over, and prints the stack of its core before it exits.
        signal.signal(signal.SIGTERM, on_termination)
    _quieten()


def _init(config: RayConfig, address: str | None) -> None:
    import ray

    try:
        if address:
            ray.init(address, runtime_env=config.runtime_env or None, log_to_driver=False, logging_level="error")
        else:
            ray.init(
                "local",
                num_cpus=config.num_cpus,
                object_store_memory=config.object_store_memory,
                runtime_env=config.runtime_env or None,
                include_dashboard=False,
                log_to_driver=False,
                logging_level="error",
            )
    # Ray raises a bare Exception if a node does not start in time.
    except Exception as error:
        raise InfrastructureError(f"ray {address or 'local'}: cannot start or join ({_reason(error)})") from error


def _check_port(key: str, address: str) -> None:
    """Raise InfrastructureError if nothing listens at `address`. Ray itself would try for many minutes."""
    if address == "auto":
        # Ray itself knows where.
        return
    parts = urlsplit(address if "://" in address else f"//{address}")
    try:
        host, port = parts.hostname, parts.port or (_RAY_CLIENT_PORT if parts.scheme == "ray" else None)
    except ValueError:
        host = port = None
    if host is None or port is None:
        raise InfrastructureError(f"{key} {address}: expected auto, host:port or ray://host:port")
    for attempt in range(1, _CONNECT_TRIES + 1):
        try:
            socket.create_connection((host, port), timeout=_CONNECT_SECONDS).close()
            return
        except OSError as error:
            if attempt == _CONNECT_TRIES:
                raise InfrastructureError(f"{key} {address}: nothing answers there ({error})") from None
            time.sleep(1)


@contextmanager
def _without_native_stderr() -> Iterator[None]:
    """Silence standard error: Ray's C++ core announces its log level there. What matters comes as exceptions."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@contextmanager
def _daemons_in_groups_of_their_own() -> Iterator[None]:
    """Keep what is sent to the group of this process, as `timeout` and terminals do, from the Ray started in the block.

    If its daemons end, Ray's core ends this process at once, without a word and before training has written its
    checkpoint. Nothing public says how Ray starts processes; the kernel ends those with this one all the same.
    """
    from ray._private import services

    popen = getattr(services, "ConsolePopen", None)
    # Elsewhere Ray itself ends its processes by their common group.
    if popen is None or sys.platform != "linux":
        yield
        return
    services.ConsolePopen = partial(popen, process_group=0)
    try:
        yield
    finally:
        services.ConsolePopen = popen


def _quieten() -> None:
    # Ray Data reports each execution at level INFO and advises at WARNING; this package tells users what they need.
    for name in ("ray", "ray.data", "ray.train", "ray.tune"):
        logging.getLogger(name).setLevel(logging.ERROR)
    import ray.data._internal.execution.streaming_executor  # noqa: F401 (its import resets the levels)

    for name in list(logging.root.manager.loggerDict):
        if name.startswith("ray."):
            # What Ray Data has to say of a failed task reaches us as an exception, or as an item that is missing.
            level = logging.CRITICAL if name.startswith("ray.data") else logging.ERROR
            logging.getLogger(name).setLevel(level)


def _reason(error: BaseException) -> str:
    import ray

    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if isinstance(error, ray.exceptions.AuthenticationError) or "auth" in str(error).lower():
        return f"{lines[0]}; the cluster asks for its token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"
    return lines[0]
