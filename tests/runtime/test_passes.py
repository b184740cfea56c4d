"""Passes on both executors: the same receipts and artifacts, errors in their own words, nothing done twice."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from clusterbatch.errors import DataError, InfrastructureError, OtherWorkError, UsageError
from clusterbatch.runtime import Ahead, InProcessExecutor, Pass, Pool, Result, WorkItem
from clusterbatch.runtime.executor import using
from clusterbatch.runtime.ray_executor import RayExecutor, _Adapter, _AheadAdapter, _read_row
from clusterbatch.runtime.work import TRIES, Work, packed
from clusterbatch.store import Artifact, Counts, Folder, Manifest, Receipt
from clusterbatch.store.traffic import since_last

POOL = Pool(1, cpus=0.5)
# The mark keeps the second with all other tests of Ray: their session is started in one process.
ON_RAY = pytest.param("ray", marks=pytest.mark.xdist_group("ray_local"))
BOTH = pytest.mark.parametrize("executor", ["in-process", ON_RAY], indirect=True)
ADAPTERS = pytest.mark.parametrize("executor", ["in-process", "adapters"], indirect=True)


class Squares:
    """Writes an item's number squared; some numbers fail, kill their worker, or lose a row."""

    def __init__(self, folder: Folder, unusable: Exception | None = None, **numbers: int) -> None:
        if unusable:
            raise unusable
        self.folder, self.numbers = folder, numbers

    def process(self, item: WorkItem, output: Artifact, prepared: str = "") -> Result:
        if item.number == self.numbers.get("bad"):
            raise DataError(f"file.csv: row {item.number} is no number")
        if item.number == self.numbers.get("bug"):
            raise KeyError("no such key")
        if item.number == self.numbers.get("deadly"):
            self._die(tries=1)
        if item.number == self.numbers.get("always_deadly"):
            self._die(tries=1000)
        written = int(item.number != self.numbers.get("lossy"))
        part = output.write_part(f"item-{item.number}", "txt", f"{item.number**2}{prepared}".encode(), rows=1)
        return Result([part], Counts(read=1, written=written), {"half": item.number / 2})

    def _die(self, tries: int) -> None:
        marker = Path(self.folder.path("died"))
        marker.parent.mkdir(exist_ok=True)
        died = len(marker.read_bytes()) if marker.exists() else 0
        if died < tries:
            marker.write_bytes(b"x" * (died + 1))
            os._exit(1)


class Words:
    """Prepares an item's number in words; one number cannot be."""

    def __init__(self, bad: int | None = None, unusable: Exception | None = None) -> None:
        if unusable:
            raise unusable
        self.bad = bad

    def prepare(self, item: WorkItem) -> str:
        if item.number == self.bad:
            raise DataError(f"item {item.number} cannot be prepared")
        return f" of {item.payload}"


class AdaptersExecutor(RayExecutor):
    """The calls of Ray's workers and of the driver, without the starts of workers."""

    def run(self, work: Work, items: Sequence[WorkItem]) -> Iterator[Receipt]:
        prepare = _AheadAdapter(work.ahead.preparer, dict(work.ahead.arguments)) if work.ahead else None
        adapter = _Adapter(work)
        for item in items:
            batch: dict[str, Any] = {"item": [packed(item)]}
            [receipt], [error] = adapter(prepare(batch) if prepare else batch).values()
            yield _read_row(work.title, {"receipt": receipt, "error": error})


@pytest.fixture
def executor(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "ray":
        request.getfixturevalue("ray_local")
    executors = {"ray": RayExecutor(), "adapters": AdaptersExecutor(), "in-process": InProcessExecutor(reverse=True)}
    with using(executors[request.param]):
        yield request.param


def squares(tmp_path: Path, *, name: str = "squares", identity: str = "f", **options: Any) -> Pass:
    ahead, pool = options.pop("ahead", None), options.pop("pool", POOL)
    folder = Folder(str(tmp_path / name))
    arguments = {"folder": Folder(str(tmp_path)), **options}
    return Pass("squares", Artifact(folder, "squares"), identity, Squares, arguments, pool, ahead=ahead)


def items(count: int) -> list[WorkItem]:
    return [WorkItem(number, 1, f"item {number}") for number in range(count)]


def values(output: Artifact, manifest: Manifest) -> list[bytes]:
    return [output.read_part(part) for part in manifest.parts]


def comparable(manifest: Manifest) -> dict[str, Any]:
    """Everything but times, random names, and requests, which the driver's share belongs to."""
    found = manifest.model_dump(exclude={"created", "seconds", "worker_seconds", "traffic"})
    for part in found["parts"]:
        part["path"] = part["path"].split("-")[:2]
    return found


@pytest.mark.parametrize("ahead", [None, Ahead(Words, {}, POOL)])
@pytest.mark.usefixtures("ray_local")
def test_both_executors_leave_the_same_artifact(
    tmp_path: Path, ahead: Ahead | None, recwarn: pytest.WarningsRecorder
) -> None:
    made = []
    for name, executor in (
        ("ray", RayExecutor()),
        ("here", InProcessExecutor()),
        ("r", InProcessExecutor(reverse=True)),
    ):
        step = squares(tmp_path, name=name, ahead=ahead)
        assert step.output is not None
        with using(executor):
            manifest = step.commit(items(4))
        made.append((comparable(manifest), values(step.output, manifest)))
    assert made[0] == made[1] == made[2]
    assert made[0][0]["counts"]["written"] == 4
    assert made[0][1] == [f"{n**2}{f' of item {n}' if ahead else ''}".encode() for n in range(4)]
    # They would be printed in the middle of every stage.
    assert [str(warning.message) for warning in recwarn if "ray_remote_args" in str(warning.message)] == []


@BOTH
def test_a_failed_item_is_told_in_its_own_words_and_the_rest_is_kept(tmp_path: Path, executor: str) -> None:
    with pytest.raises(DataError, match=r"^file.csv: row 4 is no number$"):
        squares(tmp_path, bad=4).run(items(8))
    step = squares(tmp_path)
    done = step.begin()
    assert 0 < len(done) < 8
    # What one executor has left the other continues.
    with using(InProcessExecutor()):
        receipts = step.run(items(8), done=done)
    assert [receipt.unit for receipt in receipts] == list(range(8))
    assert step.output is not None
    assert [int(step.output.read_part(receipt.parts[0])) for receipt in receipts] == [n**2 for n in range(8)]
    # What had a receipt was not done again.
    assert all(receipts[number].parts == done[number].parts for number in done)
    assert {receipt.fingerprint for receipt in receipts} == {"f"}
    assert [receipt.details["half"] for receipt in receipts] == [n / 2 for n in range(8)]


@ADAPTERS
def test_what_goes_wrong_in_a_constructor_is_told_alike(tmp_path: Path, executor: str) -> None:
    with pytest.raises(UsageError, match=r"^model: no tokenizer$"):
        squares(tmp_path, unusable=UsageError("model: no tokenizer")).run(items(2))
    ahead = Ahead(Words, {"unusable": UsageError("model: no tokenizer")}, POOL)
    with pytest.raises(UsageError, match=r"^model: no tokenizer$"):
        squares(tmp_path, ahead=ahead).run(items(2))
    with pytest.raises(DataError, match=r"^item 1 cannot be prepared$"):
        squares(tmp_path, ahead=Ahead(Words, {"bad": 1}, POOL)).run(items(2))


@pytest.mark.parametrize("options", [{"unusable": KeyError("no such key")}, {"bug": 1}])
def test_a_bug_on_ray_has_its_traceback_once(tmp_path: Path, options: dict[str, Any]) -> None:
    with using(AdaptersExecutor()), pytest.raises(RuntimeError, match="squares: a worker failed") as caught:
        squares(tmp_path, **options).run(items(2))
    assert str(caught.value).count("Traceback") == 1
    assert "KeyError: 'no such key'" in str(caught.value)


@ADAPTERS
def test_a_row_that_is_lost_fails_the_pass(tmp_path: Path, executor: str) -> None:
    with pytest.raises(DataError, match="unit 2: 1 rows read but 0 accounted for"):
        squares(tmp_path, lossy=2).commit(items(3))
    assert squares(tmp_path).begin().keys() <= {0, 1}
    without_output = Pass("squares", None, "f", _Losing, {}, POOL)
    with pytest.raises(DataError, match="squares item 0: 1 rows read but 0 accounted for"):
        without_output.run(items(1))


class _Losing:
    def process(self, item: WorkItem, output: None) -> Result:
        return Result(counts=Counts(read=1))


def test_a_whole_pass_does_nothing_and_needs_no_session(tmp_path: Path) -> None:
    step = squares(tmp_path)
    with using(InProcessExecutor()):
        manifest = step.commit(items(3), details={"kept": True})
    assert manifest.details == {"kept": True}
    assert step.is_whole
    assert squares(tmp_path, unusable=UsageError("never made")).commit(items(3)) == manifest
    with pytest.raises(OtherWorkError, match="--force"):
        squares(tmp_path, identity="other").commit(items(3))
    with using(InProcessExecutor()):
        replaced = squares(tmp_path, identity="other").commit(items(2), force=True)
    assert (replaced.fingerprint, replaced.counts.written) == ("other", 2)


def test_what_a_temporary_pass_asked_of_storage_goes_to_the_next_artifact(tmp_path: Path) -> None:
    first, second = (squares(tmp_path, name=name) for name in "ab")
    temporary = Pass(first.title, first.output, "f", Squares, first.arguments, POOL, temporary=True)
    since_last()
    with using(InProcessExecutor()):
        receipts = temporary.run(items(3))
        written = sum(receipt.traffic.writes for receipt in receipts)
        assert written >= 3
        assert since_last().writes >= written
        second.run(items(3))
        # Its own stay with its receipts, but for writing those.
        assert since_last().writes < written
        manifest = temporary.commit(items(3))
        since_last()
        # A pass that was whole already is counted as well.
        temporary.commit(items(3))
    assert since_last().writes >= manifest.traffic.writes


def test_an_item_that_the_driver_does_is_as_one_of_a_worker(tmp_path: Path) -> None:
    step = squares(tmp_path)
    assert step.output is not None
    done = step.begin()
    part = step.output.write_part("item-1", "txt", b"1", rows=1)
    done[1] = step.finish(items(3)[1], Result([part], Counts(read=1, written=1), {"half": 0.5}), seconds=3.0)
    with using(InProcessExecutor()):
        manifest = step.commit(items(3), done=done)
    assert values(step.output, manifest) == [b"0", b"1", b"4"]
    assert manifest.parts[1] == part


_KILLED = """
import os, signal, sys
from pathlib import Path
from clusterbatch.runtime import InProcessExecutor, metrics
from clusterbatch.runtime.executor import using
from tests.runtime.test_passes import items, squares

def killing(title, receipt, waiting):
    if waiting == 2:
        os.kill(os.getpid(), signal.SIGKILL)

metrics.unit_finished = killing
with using(InProcessExecutor()):
    squares(Path(sys.argv[1])).commit(items(5))
"""


def test_a_killed_process_costs_no_finished_item(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", _KILLED, str(tmp_path)], check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL
    step = squares(tmp_path)
    before = step.begin()
    assert sorted(before) == [0, 1, 2]
    with using(InProcessExecutor()):
        manifest = step.commit(items(5))
    assert [part.path for part in manifest.parts[:3]] == [before[number].parts[0].path for number in range(3)]
    assert manifest.counts.written == 5


def test_in_process_arguments_and_items_are_copies(tmp_path: Path) -> None:
    given: dict[str, list[int]] = {"seen": []}

    with using(InProcessExecutor()):
        receipts = Pass("keep", None, "f", _Keeping, given, POOL).run([WorkItem(0, 1, [1]), WorkItem(1, 1, [2])])
    assert given == {"seen": []}
    assert [receipt.details["seen"] for receipt in receipts] == [[1], [1, 2]]
    with using(InProcessExecutor()), pytest.raises((AttributeError, TypeError), match="pickle"):
        Pass("keep", None, "f", _Keeping, {"seen": lambda: None}, POOL).run([WorkItem(0, 1, [1])])


class _Keeping:
    def __init__(self, seen: list[int]) -> None:
        self.seen = seen

    def process(self, item: WorkItem, output: None) -> Result:
        self.seen += item.payload
        return Result(details={"seen": list(self.seen)})


@pytest.mark.usefixtures("ray_local")
def test_a_worker_that_is_killed_once_costs_no_item(tmp_path: Path) -> None:
    with using(RayExecutor()):
        receipts = squares(tmp_path, deadly=2).run(items(6))
    assert (tmp_path / "died").read_bytes() == b"x"
    assert [receipt.unit for receipt in receipts] == list(range(6))


@pytest.mark.usefixtures("ray_local")
def test_an_item_that_kills_every_worker_is_named_after_a_few_tries(tmp_path: Path) -> None:
    step = squares(tmp_path, always_deadly=3)
    with using(RayExecutor()), pytest.raises(InfrastructureError, match=r"^squares: units? .*3.* lost with") as caught:
        step.run(items(6))
    assert len((tmp_path / "died").read_bytes()) <= TRIES
    # All others are kept; those that shared the worker with it may be lost, too.
    named = {int(number) for number in re.findall(r"\b\d\b", str(caught.value).split(" lost ")[0])}
    assert step.begin().keys() == set(range(6)) - named


@pytest.mark.usefixtures("ray_local")
@pytest.mark.parametrize(("pool", "words"), [(Pool(1, gpus=1), "needs 1 GPU"), (Pool(50), "ask for fewer workers")])
def test_what_can_never_be_scheduled_fails_in_one_line(tmp_path: Path, pool: Pool, words: str) -> None:
    with using(RayExecutor()), pytest.raises(InfrastructureError, match=words):
        squares(tmp_path, pool=pool).run(items(60))


def test_workers_and_those_who_prepare_for_them_each_want_a_place(tmp_path: Path) -> None:
    class Full(RayExecutor):
        def check_room(self, title: str, bundles: Any) -> None:
            raise InfrastructureError(f"{title}: {bundles}")

    ahead = Ahead(Words, {}, Pool(3, cpus=0.5))
    wanted = [{"CPU": 2.0, "GPU": 1.0}, *[{"CPU": 0.5}] * 3]
    with using(Full()), pytest.raises(InfrastructureError, match=re.escape(f"squares: {wanted}")):
        squares(tmp_path, ahead=ahead, pool=Pool(1, 2.0, 1.0)).run(items(9))


@pytest.mark.usefixtures("ray_local")
def test_a_call_fails_in_words_on_ray_as_elsewhere() -> None:
    executor = RayExecutor()
    assert executor.call(abs, -3, POOL) == 3
    with pytest.raises(InfrastructureError, match=r"^_exit: its process was lost"):
        executor.call(os._exit, 1, POOL)
    with pytest.raises(DataError, match=r"^no such number$"):
        executor.call(_refuse, "no such number", POOL)
    with pytest.raises(RuntimeError, match=r"a worker failed\n(.|\n)*TypeError"):
        executor.call(abs, "x", POOL)


def _refuse(what: str) -> None:
    raise DataError(what)
