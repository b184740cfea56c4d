"""Joining a Ray cluster, or starting one on this machine."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from clusterbatch.config import RayConfig
from clusterbatch.errors import InfrastructureError

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

_kept_by_caller = False
_startup_timeout = 0.0


@contextmanager
def ray_session(config: RayConfig) -> Iterator[None]:
    """A Ray connection for the duration of the block; one that is there already is used and left as it is."""
    global _startup_timeout
    _startup_timeout = config.startup_timeout
    if ray.is_initialized():
        yield
        return
    _start(config)
    try:
        yield
    finally:
        if not _kept_by_caller:
            ray.shutdown()


@contextmanager
def lasting_session() -> Iterator[None]:
    """Whatever Ray the block starts lives until its end: several stages then share one start. Starts none itself."""
    global _kept_by_caller
    if _kept_by_caller or ray.is_initialized():
        yield
        return
    _kept_by_caller = True
    try:
        yield
    finally:
        _kept_by_caller = False
        ray.shutdown()


def startup_timeout() -> float:
    """ray.startup_timeout of the session that was opened last, in seconds."""
    return _startup_timeout


def _start(config: RayConfig) -> None:
    address = config.address or os.environ.get("RAY_ADDRESS")
    for name, value in _LOCAL_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    on_termination = signal.getsignal(signal.SIGTERM)
    with _without_native_stderr():
        _init(config, address)
    if callable(on_termination) and threading.current_thread() is threading.main_thread():
        # Ray takes the signal over, and prints the stack of its core before it exits.
        signal.signal(signal.SIGTERM, on_termination)
    _quieten()


def _init(config: RayConfig, address: str | None) -> None:
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
    # Ray raises a bare Exception where a node does not start in time.
    except Exception as error:
        raise InfrastructureError(f"ray {address or 'local'}: cannot start or join ({_first_line(error)})") from error


@contextmanager
def _without_native_stderr() -> Iterator[None]:
    """Ray's C++ core announces its own log level on standard error when it starts; what matters comes as exceptions."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _quieten() -> None:
    # Ray Data reports each execution at level INFO and advises at WARNING; what users need they hear from us.
    for name in ("ray", "ray.data", "ray.train", "ray.tune"):
        logging.getLogger(name).setLevel(logging.ERROR)
    import ray.data._internal.execution.streaming_executor  # noqa: F401 (its import resets the levels)

    for name in list(logging.root.manager.loggerDict):
        if name.startswith("ray."):
            logging.getLogger(name).setLevel(logging.ERROR)


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
