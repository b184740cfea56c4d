"""Many objects, and many who write at once: what must hold on any server, however it decides races.

.ci/run runs these on Ceph as well, whose gateway takes a hundred times as many objects in the same time.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from clusterbatch.config import RunConfig, StorageConfig
from clusterbatch.corpus.ingest import ingest
from clusterbatch.errors import ClusterbatchError, InfrastructureError
from clusterbatch.store import Artifact, Counts, Folder, Receipt
from clusterbatch.store.lease import workspace_lease
from tests.corpus.test_ingest import corpus_rows, write_lines
from tests.integration.s3.server import S3Server

pytestmark = [pytest.mark.s3, pytest.mark.writers]

_WRITERS = 16
_RACERS = 4
_SECONDS_TO_MEET = 120


def test_many_objects_are_written_listed_and_removed(s3_server: S3Server, storage: StorageConfig, bucket: str) -> None:
    folder = Folder(f"s3://{bucket}/many", storage)
    names = [f"{number % 7}/part-{number:06d}" for number in range(s3_server.objects)]
    start = time.monotonic()
    with ThreadPoolExecutor(_WRITERS) as pool:
        list(pool.map(lambda name: folder.write(name, name.encode()), names))
    written = time.monotonic()
    assert [entry.name for entry in folder.find()] == sorted(names)
    listed = time.monotonic()
    assert len(folder.find("3/*")) == sum(name.startswith("3/") for name in names)
    assert folder.list() == [str(number) for number in range(7)]
    with ThreadPoolExecutor(_WRITERS) as pool:
        assert list(pool.map(folder.read, names)) == [name.encode() for name in names]
    print(
        f"{s3_server.name}: {len(names)} objects written in {written - start:.1f} s, listed in {listed - written:.2f} s"
    )
    folder.remove("3")
    assert folder.list() == [str(number) for number in range(7) if number != 3]
    folder.remove()
    assert folder.find() == []


def test_units_that_finish_at_once_all_count(storage: StorageConfig, bucket: str) -> None:
    artifact = Artifact(Folder(f"s3://{bucket}/corpus", storage), "corpus")
    artifact.begin("f")

    def finish(unit: int) -> None:
        # Every unit twice, as after a retry: the parts of both are there, the receipt of one.
        part = artifact.write_part(f"part-{unit % 40:06d}", "bin", os.urandom(2000), 1)
        artifact.write_receipt(Receipt(unit=unit % 40, fingerprint="f", parts=[part], counts=Counts(read=1, written=1)))

    with ThreadPoolExecutor(_WRITERS) as pool:
        list(pool.map(finish, range(80)))
    receipts = artifact.begin("f")
    assert sorted(receipts) == list(range(40))
    with ThreadPoolExecutor(4) as pool:
        commits = [
            pool.submit(artifact.commit, "f", receipts.values(), config={}, inputs={}, seconds=float(number))
            for number in range(4)
        ]
        manifests = [commit.result() for commit in commits]
    found = artifact.require()
    assert found in manifests
    assert found.counts.written == 40
    for part in found.parts:
        artifact.read_part(part)


def test_two_runs_that_ignore_each_other_leave_one_whole_corpus(
    tmp_path: Path, storage: StorageConfig, bucket: str, in_process: None
) -> None:
    """Without the lease, as when its storage decided a race wrongly: what is committed is whole and right."""
    rows: list[Any] = [{"query": f"query {n}", "document": f"document {n % 90}"} for n in range(600)]
    write_lines(tmp_path / "in/pairs.jsonl", rows)

    def configured(workspace: str) -> RunConfig:
        return RunConfig.model_validate(
            {
                "workspace": workspace,
                "corpus": {"paths": [str(tmp_path / "in")], "unit_bytes": 4096, "part_bytes": 2**16},
                "evaluate": {"holdout": 0},
                "storage": storage.model_dump(),
            }
        )

    config = configured(f"s3://{bucket}/run")
    failures: list[Exception] = []

    def attempt() -> None:
        try:
            ingest(config)
        except (ClusterbatchError, FileNotFoundError) as error:
            # The one that comes second may find that the first has tidied up.
            failures.append(error)

    runs = [threading.Thread(target=attempt) for _ in range(2)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert len(failures) < 2
    alone = configured(str(tmp_path / "alone"))
    assert corpus_rows(config, ingest(config)) == corpus_rows(alone, ingest(alone))


def _race(config: RunConfig, begin: Any, end: Any, winners: Any) -> None:
    begin.wait(_SECONDS_TO_MEET)
    try:
        with workspace_lease(config):
            winners.put(os.getpid())
            # Held until all others have tried.
            end.wait(_SECONDS_TO_MEET)
    except InfrastructureError:
        end.wait(_SECONDS_TO_MEET)


def test_of_many_runs_at_once_at_most_one_goes_on(storage: StorageConfig, bucket: str) -> None:
    config = RunConfig(workspace=f"s3://{bucket}/run", storage=storage)
    context = multiprocessing.get_context("spawn")
    winners, begin, end = context.Queue(), context.Barrier(_RACERS), context.Barrier(_RACERS)
    racers = [context.Process(target=_race, args=(config, begin, end, winners)) for _ in range(_RACERS)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
        assert racer.exitcode == 0
    assert winners.qsize() <= 1
    with workspace_lease(config):
        pass
