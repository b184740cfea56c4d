"""Passes: many items of one kind of work, resumed from the receipts that an earlier attempt left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clusterbatch.runtime import metrics
from clusterbatch.runtime.executor import current_executor
from clusterbatch.runtime.progress import ProgressLine
from clusterbatch.runtime.work import Ahead, Pool, Result, Work, WorkItem, finish
from clusterbatch.store.artifact import Artifact, Manifest, Receipt, Stopwatch
from clusterbatch.store.traffic import Traffic, carry_over


@dataclass(frozen=True)
class Pass:
    """Run `worker(**arguments).process(item, output)` for every item and keep a receipt of each in `output`.

    Needs an open session (`ray_session`) unless everything is done already.

    output: None if nothing is kept; then every run does all items. identity: the fingerprint stamped on receipts and
    manifest. measured_in: what `WorkItem.rows` counts. temporary: the output is removed when a later artifact is
    committed, so what its items asked of storage counts for that one.
    """

    title: str
    output: Artifact | None
    identity: str
    worker: type
    arguments: Mapping[str, Any]
    pool: Pool
    measured_in: str = "rows"
    ahead: Ahead | None = None
    temporary: bool = False

    def begin(self, *, force: bool = False) -> dict[int, Receipt]:
        """Return the receipts of an earlier attempt, by item. Raises UsageError as `Artifact.begin` does."""
        return {} if self.output is None else self.output.begin(self.identity, force)

    def run(
        self, items: Sequence[WorkItem], *, done: Mapping[int, Receipt] | None = None, force: bool = False
    ) -> list[Receipt]:
        """Run the items that have no receipt in `done`; return those of all items, in the order of `items`.

        done: what `begin` returned, with any that were added since; None: this calls `begin(force=force)`.

        Raises the worker's own ClusterbatchError if one caused the failure, InfrastructureError if workers were lost.
        """
        receipts = run_items(self._work, items, self.begin(force=force) if done is None else done, self.measured_in)
        if self.temporary:
            carry_over(sum((receipt.traffic for receipt in receipts), Traffic()))
        return receipts

    def commit(
        self,
        items: Sequence[WorkItem],
        *,
        done: Mapping[int, Receipt] | None = None,
        force: bool = False,
        details: Mapping[str, Any] | None = None,
    ) -> Manifest:
        """Run the items that have no receipt and write the manifest; return at once if the output is whole already.

        `done` and `force` as for `run`.
        """
        assert self.output is not None, "nothing to commit"
        manifest = self.output.manifest()
        if manifest is None or manifest.fingerprint != self.identity:
            watch = Stopwatch()
            done = self.begin(force=force) if done is None else done
            receipts = run_items(self._work, items, done, self.measured_in)
            manifest = self.output.commit(
                self.identity, receipts, config={}, inputs={}, seconds=watch.seconds, details=details
            )
        if self.temporary:
            carry_over(manifest.traffic)
        return manifest

    @property
    def is_whole(self) -> bool:
        """Return whether the output is committed with this identity."""
        return self.output is not None and self.output.is_done(self.identity)

    def finish(self, item: WorkItem, result: Result, seconds: float) -> Receipt:
        """Write the receipt of an item that was done in this process, without a worker."""
        return finish(self._work, item, result, seconds)

    @property
    def _work(self) -> Work:
        return Work(self.title, self.worker, self.arguments, self.pool, self.ahead, self.output, self.identity)


def run_items(
    work: Work, items: Sequence[WorkItem], done: Mapping[int, Receipt], measured_in: str = "rows"
) -> list[Receipt]:
    """Run the items that are not in `done` on the current executor; return all receipts in the order of `items`."""
    covered = {item.number: list(item.covers) for item in items}
    receipts = {n: receipt for n, receipt in done.items() if receipt.details.get("covers", []) == covered.get(n)}
    pending = [item for item in items if item.number not in receipts]
    rows = {item.number: item.rows for item in items}
    total = sum(rows.values())
    with ProgressLine(work.title, total, measured_in) as line:
        line.start_at(total - sum(item.rows for item in pending))
        if pending:
            metrics.pass_begun(work.title, waiting=len(pending))
            finished = current_executor().run(work, pending)
            for waiting, receipt in zip(reversed(range(len(pending))), finished, strict=True):
                receipts[receipt.unit] = receipt
                metrics.unit_finished(work.title, receipt, waiting)
                line.advance(rows[receipt.unit], receipt.details.get("progress", ""), receipt.seconds)
    return [receipts[item.number] for item in items]
