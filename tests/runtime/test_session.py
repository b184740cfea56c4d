"""Sessions: addresses where nothing answers, sessions without Ray, words while waiting."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time

import pytest
import ray

from clusterbatch.config import RayConfig, RunConfig, fingerprint, load_config
from clusterbatch.cores import available_cores
from clusterbatch.errors import InfrastructureError, UsageError
from clusterbatch.runtime import LocalExecutor, current_executor, lasting_session, ray_executor, ray_session, session
from clusterbatch.runtime.executor import InProcessExecutor, using
from clusterbatch.runtime.ray_executor import RayExecutor, announced_wait
from clusterbatch.runtime.resources import device_for, gpus_for
from clusterbatch.training.checks import check_workers


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture
def not_connected(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that has not joined a cluster, whatever tests before this one did."""
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr(session, "_CONNECT_TRIES", 1)

    def no_init(*_: object, **__: object) -> None:
        raise AssertionError("ray.init was called")

    monkeypatch.setattr("ray.init", no_init)


@pytest.mark.parametrize("form", ["127.0.0.1:{}", "ray://127.0.0.1:{}"])
@pytest.mark.parametrize("key", ["ray.address", "RAY_ADDRESS"])
@pytest.mark.usefixtures("not_connected")
def test_an_address_where_nothing_listens_is_told_before_ray_is_asked(
    form: str, key: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    address = form.format(_free_port())
    monkeypatch.setenv("RAY_ADDRESS", address)
    config = RayConfig(address=address if key == "ray.address" else None)
    with pytest.raises(InfrastructureError, match=f"^{key} {address}: nothing answers there"), ray_session(config):
        pass
    # And which cluster was meant, also where it does answer.
    assert capsys.readouterr().err.splitlines()[0].endswith(f"ray: joining the cluster at {address} ({key})")


@pytest.mark.usefixtures("not_connected")
@pytest.mark.parametrize("address", [None, "local"])
def test_a_cluster_of_this_machine_is_as_configured_and_has_no_dashboard(
    address: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, object]] = []
    monkeypatch.setattr("ray.init", lambda *_, **settings: asked.append(settings))
    monkeypatch.setattr("ray.shutdown", lambda: None)
    with ray_session(RayConfig(address=address, num_cpus=3, object_store_memory=2**27)):
        pass
    [settings] = asked
    assert (settings["num_cpus"], settings["object_store_memory"]) == (3, 2**27)
    assert settings["include_dashboard"] is False


@pytest.mark.usefixtures("not_connected")
@pytest.mark.parametrize("address", ["head", "head:port", "ray://", ":6379"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(InfrastructureError, match=r"expected auto, host:port or ray://host:port"):
        session._check_port("ray.address", address)


def test_a_cluster_that_asks_for_a_token_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ray.exceptions.AuthenticationError("Unauthenticated: no token.\nMore words.")

    monkeypatch.setattr("ray.init", refuse)
    with pytest.raises(InfrastructureError, match=r"Unauthenticated.*RAY_AUTH_TOKEN") as caught:
        session._init(RayConfig(), "head:6379")
    assert "\n" not in str(caught.value)


def test_in_process_sessions_start_nothing_and_nest() -> None:
    config = RayConfig(mode="in-process")
    with pytest.raises(RuntimeError, match="no session"), using(None):  # type: ignore[arg-type]
        current_executor()
    with lasting_session(), ray_session(config):
        outer = current_executor()
        assert isinstance(outer, InProcessExecutor)
        assert outer.resources()["CPU"] == available_cores()
        assert not outer.several_processes
        # A session inside, of a configuration that does not say so, does not start Ray either.
        with ray_session(RayConfig()):
            assert current_executor() is outer
        outer.check_room("train", [{"CPU": 10_000.0}])
        assert outer.call(len, [1, 2], None) == 2  # type: ignore[arg-type]
        if "GPU" not in outer.resources():
            assert (device_for("auto"), gpus_for("auto", 2)) == ("cpu", 0.0)


_WITHOUT_RAY = """
import sys
from clusterbatch.config import RayConfig
from clusterbatch.runtime import lasting_session, ray_session

for mode in ("in-process", "local"):
    with lasting_session(), ray_session(RayConfig(mode=mode)):
        # Nor is it imported: that takes longer than a small pass.
        assert "ray" not in sys.modules
"""


def test_sessions_without_ray_leave_it_alone() -> None:
    # Not even a cluster that is named is joined.
    environment = {**os.environ, "RAY_ADDRESS": f"127.0.0.1:{_free_port()}"}
    subprocess.run([sys.executable, "-c", _WITHOUT_RAY], check=True, env=environment)


def test_the_mode_changes_no_fingerprint() -> None:
    config = RunConfig(workspace="w")
    assert fingerprint(RayConfig()) == fingerprint(RayConfig(mode="in-process"))
    assert config.ray.mode == "cluster"


@pytest.mark.parametrize(
    ("keys", "mode"),
    [
        ({}, "cluster"),
        ({"mode": "auto"}, "local"),
        ({"mode": "auto", "num_cpus": 3}, "local"),
        ({"mode": "auto", "address": "head:6379"}, "cluster"),
        ({"mode": "auto", "runtime_env": {"pip": ["x"]}}, "cluster"),
        ({"mode": "auto", "object_store_memory": 2**30}, "cluster"),
        ({"mode": "local", "address": "head:6379"}, "local"),
        ({"mode": "in-process"}, "in-process"),
    ],
)
@pytest.mark.usefixtures("not_connected")
def test_ray_is_used_where_there_is_a_reason_for_it(
    keys: dict[str, object], mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(session, "_GPU_DEVICES", ())
    monkeypatch.setattr("sys.platform", "linux")
    config = RayConfig.model_validate(keys)
    assert session.chosen_mode(config) == mode
    if config.mode == "auto":
        monkeypatch.setattr(session, "_GPU_DEVICES", ("/dev/null",))
        assert session.chosen_mode(config) == "cluster"
        monkeypatch.setattr(session, "_GPU_DEVICES", ())
        monkeypatch.setenv("RAY_ADDRESS", "auto")
        assert session.chosen_mode(config) == "cluster"
        monkeypatch.delenv("RAY_ADDRESS")
        monkeypatch.setattr("ray.is_initialized", lambda: True)
        assert session.chosen_mode(config) == "cluster"


@pytest.mark.usefixtures("not_connected")
def test_stages_of_a_lasting_session_share_one_local_executor(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[LocalExecutor] = []
    monkeypatch.setattr(LocalExecutor, "close", lambda executor: closed.append(executor))
    monkeypatch.setattr("clusterbatch.runtime.executor._current", None)
    config = RayConfig(mode="local", num_cpus=3)
    executors = []
    with lasting_session():
        for _ in range(2):
            with ray_session(config), ray_session(config):
                executors.append(current_executor())
        assert closed == []
    first, second = executors
    assert first is second
    assert closed == [first]
    assert first.resources() == {"CPU": 3.0}
    with ray_session(config):
        assert current_executor() is not first
    assert len(closed) == 2


def test_several_training_workers_need_a_cluster() -> None:
    for workers, fits in ((None, True), (1, True), ([1, 2], True), (2, False)):
        words = ["workspace=w", "ray.mode=in-process", *([f"train.workers={workers}"] if workers else [])]
        config = load_config(None, words)
        if fits:
            check_workers(config)
        else:
            with pytest.raises(UsageError, match=r"train\.workers: 2 .* ray\.mode"):
                check_workers(config)


@ray.remote(num_cpus=1.5)
class _Holder:
    def ready(self) -> bool:
        return True


@pytest.mark.usefixtures("ray_local")
def test_a_wait_for_what_others_hold_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_executor, "_SECONDS_BEFORE_FIRST_WORD", 0.2)
    monkeypatch.setattr(ray_executor, "_SECONDS_BETWEEN_LOOKS", 0.2)
    said: list[str] = []
    holder = _Holder.remote()  # type: ignore[attr-defined]

    def say(line: str) -> None:
        said.append(line)
        # What is held is freed once it has been said.
        ray.kill(holder)

    monkeypatch.setattr(ray_executor, "say", say)
    ray.get(holder.ready.remote())
    function = ray.remote(num_cpus=1)(lambda: "done")
    with using(RayExecutor()), announced_wait("fit", [{"CPU": 1.0}]):
        assert ray.get(function.remote()) == "done"
    # More than once where Ray took its time to end the holder.
    assert said
    for line in said:
        assert "fit: 1 of 1 workers waiting since" in line
        assert "for 1 CPU, which the cluster has but others hold" in line
    # Ray's view of its demands is a little old.
    deadline = time.monotonic() + 30
    while ray_executor._pending({"CPU": 1.0}) and time.monotonic() < deadline:
        time.sleep(0.1)
    said.clear()
    with announced_wait("fit", [{"CPU": 1.0}]):
        time.sleep(1)
    assert not said
