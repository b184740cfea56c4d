"""Work items, the workers that process them, and the runner that turns a worker's result into a receipt.

A work item is small and has a number. What it produces is on storage (parts and a receipt); only the receipt comes back
to the driver. So the driver's memory does not grow with the corpus, a crash repeats only items without a receipt, and
the outcome does not depend on which worker did what when.
"""

from __future__ import annotations

import pickle
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from clusterbatch import errors
from clusterbatch.errors import ClusterbatchError
from clusterbatch.store.artifact import Artifact, Counts, Part, Receipt, Stopwatch
from clusterbatch.store.shuffle import BUNDLE_BYTES, bundle_buckets
from clusterbatch.store.traffic import since_last

# What one worker asks for, by Ray's names.
Bundle = dict[str, float]

# How often an item is tried whose worker dies of it.
TRIES = 3
# Items that may be lost with their workers before the pass stops: the others are finished first, so that the message
# names those that are to blame.
MOST_LOST = 16
_NAMED = 8
_BUG = "bug"


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


def attempt(work: Callable[[], Any]) -> tuple[Any, str]:
    """Return the result, or the error as data: between processes its type and message would be wrapped or lost."""
    try:
        return work(), ""
    except ClusterbatchError as error:
        return None, f"{type(error).__name__}: {error}"
    except Exception:
        return None, f"{_BUG}: {traceback.format_exc()}"


def raise_error(title: str, error: str) -> None:
    """Raise what `attempt` has caught, if anything; a bug as RuntimeError with its traceback."""
    if not error:
        return
    kind, _, message = error.partition(": ")
    if kind == _BUG:
        raise RuntimeError(f"{title}: a worker failed\n{message}")
    raise getattr(errors, kind, ClusterbatchError)(message)


def lost_items(title: str, numbers: set[int]) -> str:
    """Return the message for items whose workers died in every try."""
    return (
        f"{title}: {named(numbers)} lost with the worker in each of {TRIES} tries (out of memory, or a crash in native "
        "code); all others are done"
    )


def named(numbers: set[int]) -> str:
    """Return the numbers of items in words, the first few of many."""
    shown = ", ".join(map(str, sorted(numbers)[:_NAMED]))
    more = f" and {len(numbers) - _NAMED} more" if len(numbers) > _NAMED else ""
    return f"{'unit' if len(numbers) == 1 else 'units'} {shown}{more}"


def in_words(bundle: Bundle) -> str:
    """Return what a worker asks for, in words."""
    return " and ".join(f"{amount:g} {name}" for name, amount in bundle.items())


def shortage(bundles: Sequence[Bundle], nodes: Sequence[Bundle], place: str) -> str | None:
    """Return what is missing on `nodes` of `place`, in words; None if all workers find room at once."""
    for bundle in bundles:
        for name, amount in bundle.items():
            if not any(node.get(name, 0) >= amount for node in nodes):
                return f"a worker needs {amount:g} {name}, no node of {place} has that"
    room = _room(bundles, nodes)
    if room == len(bundles):
        return None
    kinds = Counter(map(in_words, bundles))
    wanted = " beside ".join(f"{workers} workers of {kind} each" for kind, workers in kinds.items())
    return f"{wanted}, {place} has room for {room}; ask for fewer workers"


def _room(bundles: Sequence[Bundle], nodes: Sequence[Bundle]) -> int:
    """Count the bundles that find a place, each on the first node that has what it wants.

    The largest first: those that want GPUs, which few nodes have, then those that want many CPUs.
    """
    free = [dict(node) for node in nodes]
    room = 0
    for bundle in sorted(bundles, key=lambda bundle: (bundle.get("GPU", 0), bundle.get("CPU", 0)), reverse=True):
        # Shares of a CPU or a GPU that add up to a whole one may do so only nearly.
        fits = (node for node in free if all(node.get(name, 0) >= amount - 1e-9 for name, amount in bundle.items()))
        node = next(fits, None)
        if node is not None:
            room += 1
            for name, amount in bundle.items():
                node[name] -= amount
    return room
