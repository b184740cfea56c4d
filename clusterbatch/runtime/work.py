"""Work items, the workers that process them, and the runner that turns a worker's result into a receipt.

A work item is small and has a number. What it produces is on storage (parts and a receipt); only the receipt comes back
to the driver. So the driver's memory does not grow with the corpus, a crash repeats only items without a receipt, and
the outcome does not depend on which worker did what when.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from clusterbatch.store.artifact import Artifact, Counts, Part, Receipt, Stopwatch
from clusterbatch.store.shuffle import BUNDLE_BYTES, bundle_buckets
from clusterbatch.store.traffic import since_last

# What one worker asks for, by Ray's names.
Bundle = dict[str, float]


@dataclass(frozen=True)
class Pool:
    """A fixed number of workers and the resources that each asks for: autoscaling pools often do not scale."""

    workers: int
    # Below one core by default: on a small machine two workers must leave a sliver for reading and training.
    cpus: float = 0.9
    gpus: float = 0.0

    @property
    def bundle(self) -> Bundle:
        return {name: amount for name, amount in (("CPU", self.cpus), ("GPU", self.gpus)) if amount}


@dataclass(frozen=True)
class WorkItem:
    """One piece of work. `rows` is only for progress; `payload` must be picklable and small.

    covers: numbers of what the item bundles, if it does. A receipt counts only for an item that covers the same: an
    earlier version may have bundled otherwise.
    """

    number: int
    rows: int
    payload: Any
    covers: tuple[int, ...] = ()


@dataclass
class Result:
    """Result of one item: parts that the worker has written, rows by outcome, and anything else in JSON's types.

    `details["progress"]`, if given, is shown on the progress line.
    """

    parts: list[Part] = field(default_factory=list)
    counts: Counts = field(default_factory=Counts)
    details: dict[str, Any] = field(default_factory=dict)


class Worker(Protocol):
    """Built once per process from the pass's arguments (weights are loaded there); then given one item at a time."""

    def process(self, item: WorkItem, output: Artifact) -> Result:
        """Do the item, leaving parts in `output`.

        If the pass has an `Ahead`, the value prepared there is a third argument. If the pass has no output, `output` is
        None. Errors meant for users are `ClusterbatchError`s; anything else counts as a bug.
        """
        ...


class Preparer(Protocol):
    """Built once per process of an `Ahead`."""

    def prepare(self, item: WorkItem) -> Any:
        """Return what the worker needs of the item; picklable."""
        ...


@dataclass(frozen=True)
class Ahead:
    """A pool that prepares items ahead of the workers, as CPUs that read and tokenise do for GPUs.

    `preparer(**arguments).prepare(item)`; Ray Data bounds how much of it waits in the object store.
    """

    preparer: type
    arguments: Mapping[str, Any]
    pool: Pool


@dataclass(frozen=True)
class Work:
    """Description of a pass for an executor. Picklable.

    output: where receipts are written; None: they are only returned.
    """

    title: str
    worker: type
    arguments: Mapping[str, Any]
    pool: Pool
    ahead: Ahead | None = None
    output: Artifact | None = None
    identity: str = ""


class ItemRunner:
    """Run a pass's items in the worker's process."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._worker = work.worker(**work.arguments)

    def run(self, item: WorkItem, *prepared: Any) -> Receipt:
        """Process the item and write its receipt. Raises DataError when a row is unaccounted for."""
        watch = Stopwatch()
        result = self._worker.process(item, self._work.output, *prepared)
        return finish(self._work, item, result, watch.seconds)


def bundle_items(rows: np.ndarray, stored: int, most: float = BUNDLE_BYTES) -> list[WorkItem]:
    """Return work items of neighbouring buckets of a shuffle, which a worker reads together; payload: a range.

    rows: (buckets,) of each bucket, about; stored: bytes of all of them; most: of one item, unless it is one bucket.
    """
    bundles = bundle_buckets(stored * rows / max(1.0, float(rows.sum())), most)
    return [
        WorkItem(bundle.start, max(1, int(rows[bundle.start : bundle.stop].sum())), bundle, (bundle.start, bundle.stop))
        for bundle in bundles
    ]


def finish(work: Work, item: WorkItem, result: Result, seconds: float) -> Receipt:
    """Stamp the result of an item and write it as a receipt, if the work has an output."""
    receipt = Receipt(
        unit=item.number,
        fingerprint=work.identity,
        parts=result.parts,
        counts=result.counts,
        seconds=seconds,
        details={**result.details, **({"covers": list(item.covers)} if item.covers else {})},
    )
    if work.output is None:
        receipt.counts.check(f"{work.title} item {item.number}")
        receipt.traffic = since_last()
    else:
        work.output.write_receipt(receipt)
    return receipt


def packed(value: Any) -> bytes:
    """Pickle what travels between this project's own processes."""
    return pickle.dumps(value)


def unpacked(data: bytes) -> Any:
    """Return what `packed` was given."""
    return pickle.loads(data)
