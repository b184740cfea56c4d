"""Report on a plan before training starts: purity, packing, repeats, reading, and warnings.

Computed from stretches of groups instead of rows, so that 10^9 rows in 10^5 clusters take seconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clusterbatch.batches.curriculum import CurriculumPlan, Plan
from clusterbatch.batches.plan import BatchPlan
from clusterbatch.batches.sequence import HARDLY_LARGER, Stretches
from clusterbatch.batches.strata import POOL, Stratum, packed_rows
from clusterbatch.batches.strategies import STRATEGIES
from clusterbatch.shards.index import LeftOut

# Parts of batches that are looked at together: bounds the memory.
_PARTS_AT_ONCE = 2**19
_SAMPLED_STEPS = 128
# The vectors of each are read.
_SAMPLED_SUPER_BATCHES = 8
# Strata that are walked through. With as many sources as a corpus of web pages has domains, all would take minutes.
_SAMPLED_STRATA = 2048
_MUCH_PACKED = 0.3
_MUCH_HARDLY_LARGER = 0.05
_MUCH_READ = 1.1
_MUCH_CROWDED = 0.5
_NAMES = 3
_SUMMED = ("rows", "clusters", "batches", "batches_per_epoch", "leftovers", "repeats")
_AVERAGED = ("purity", "packed_share", "read_amplification")


@dataclass
class _Tally:
    """Sums over batches of one stratum."""

    batches: int = 0
    rows: int = 0
    packed: int = 0
    fetched: float = 0.0
    purity: float = 0.0


def plan_report(plan: Plan, epochs: int = 1) -> dict[str, Any]:
    """Describe steps, composition and reading of the first `epochs` epochs, as plain JSON values.

    steps_per_epoch, rows, pooled, left_out and mixed (names of sources), warnings (sentences), and, for the whole plan
    and under `sources` for each source (or pool):

    purity              mean share of a batch from its main cluster of the index, whatever the strategy; None if the
                        layout knows no clusters, and for single sources if groups are not clusters or rows move singly
                        (the plan's is then the mean of a sample of steps)
    packed_share        share of the rows that are in batches of several clusters' remains
    leftovers           rows that remain of their clusters when all whole parts of a batch are taken
    repeats             rows that come twice in one pass over the source
    read_amplification  rows fetched / rows used, by one worker that keeps nothing it has read

    Of thousands of sources some are measured, and purity, packed share and reading of the others estimated from them.
    If thresholds leave something out: `filtered`, counts by source (shards.index.LeftOut).

    For a curriculum: the last phase's report with `phases`, {first_step, strategy, purity, packed_share,
    read_amplification} of each; warnings name the phase that they are about.
    """
    if isinstance(plan, CurriculumPlan):
        return _curriculum_report(plan, epochs)
    assert isinstance(plan, BatchPlan)
    # Each stands for those that follow it.
    every = -(-len(plan.strata) // _SAMPLED_STRATA)
    sampled = [_tally(plan, stratum, epochs) for stratum in plan.strata[::every]]
    tallies = [sampled[number // every] for number in range(len(plan.strata))]
    strata = [_describe(plan, stratum, tally) for stratum, tally in zip(plan.strata, tallies, strict=True)]
    # With weights, strata count as often as their batches are drawn.
    share = plan.quotas / plan.quotas.sum()
    report = {
        "strategy": plan.config.stratify,
        "layout": plan.layout,
        "batch": plan.config.size,
        "epochs": epochs,
        "steps_per_epoch": plan.steps_per_epoch,
        "steps": epochs * plan.steps_per_epoch,
        "rows": sum(stratum.rows for stratum in plan.strata),
        "purity": _purity(plan, tallies, share),
        "packed_share": float(share @ [each["packed_share"] for each in strata]),
        "leftovers": sum(each["leftovers"] for each in strata),
        "repeats": sum(each["repeats"] for each in strata),
        "read_amplification": float(share @ [each["read_amplification"] for each in strata]),
        "pooled": next((list(stratum.sources) for stratum in plan.strata if stratum.name == POOL), []),
        "left_out": plan.left_out,
        "mixed": [stratum.name for stratum in plan.strata if stratum.mixed],
        "sources": _by_source([stratum.name for stratum in plan.strata], strata),
    }
    if plan.index.left_out:
        report["filtered"] = plan.index.left_out
    return {**report, "warnings": _warnings(plan, report)}


def left_out_sentences(left_out: Mapping[str, LeftOut]) -> list[str]:
    """Return a sentence for each source of what thresholds leave out of it."""
    sentences = []
    for source, counts in left_out.items():
        of_rows = f"{counts['rows_left_out']:,} of {counts['rows']:,} pairs"
        if counts["rows_without_score"]:
            of_rows += f" ({counts['rows_without_score']:,} have no score)"
        sentence = f"leaves out {of_rows}"
        if counts["negatives"]:
            sentence += f" and {counts['negatives_left_out']:,} of {counts['negatives']:,} hard negatives of the others"
            if counts["negatives_without_score"]:
                sentence += f" ({counts['negatives_without_score']:,} have no score)"
        sentences.append(f"{sentence} of {source}")
    return sentences


def _curriculum_report(plan: CurriculumPlan, epochs: int) -> dict[str, Any]:
    reports = [plan_report(each, epochs) for each in plan.plans]
    keys = ("strategy", "steps_per_epoch", "purity", "packed_share", "read_amplification")
    phases = [
        {"first_step": int(first), **{key: report[key] for key in keys}}
        for first, report in zip(plan.first_steps, reports, strict=True)
    ]
    warnings = [
        f"phase {number}: {text}" for number, report in enumerate(reports, start=1) for text in report["warnings"]
    ]
    return {**reports[-1], "phases": phases, "warnings": warnings}


def _tally(plan: BatchPlan, stratum: Stratum, epochs: int) -> _Tally:
    tally = _Tally()
    # Runs are kept until all batches of a super-batch are read.
    size = plan.config.size * plan.config.super_batch
    batches = -(-stratum.rows // size)
    at_once = max(1, _PARTS_AT_ONCE // stratum.groups_per_batch)
    for epoch in range(epochs):
        sequence = plan.sequence(stratum, epoch)
        for first in range(0, batches, at_once):
            start, end = first * size, min((first + at_once) * size, stratum.rows)
            _count(tally, stratum, sequence.stretches(start, end), size)
        missing = batches * size - stratum.rows
        if missing and plan.config.super_batch == 1:
            _count_filled(tally, plan, stratum, epoch, missing)
        if stratum.whole_runs:
            # A run for each row that is exchanged.
            tally.fetched += stratum.rows // size * plan.exchanged * (stratum.run_rows - 1)
    return tally


def _count(tally: _Tally, stratum: Stratum, found: Stretches, size: int) -> None:
    """Add consecutive batches; a short last one counts by its own rows."""
    batch = (np.cumsum(found.rows) - found.rows) // size
    key = batch * len(stratum.group_rows) + found.group
    order = np.argsort(key, kind="stable")
    starts = np.flatnonzero(np.diff(key[order], prepend=-1))
    rows_of_group = np.add.reduceat(found.rows[order], starts)
    batch_of_group = batch[order][starts]
    first = np.flatnonzero(np.diff(batch_of_group, prepend=-1))
    largest = np.maximum.reduceat(rows_of_group, first)
    whole = np.add.reduceat(rows_of_group, first)
    tally.purity += float((largest / whole).sum())
    tally.batches += len(whole)
    tally.rows += int(whole.sum())
    tally.packed += int(found.rows[found.packed].sum())
    tally.fetched += _fetched_in_runs(stratum, found, batch) if stratum.whole_runs else _fetched_singly(stratum, whole)


def _count_filled(tally: _Tally, plan: BatchPlan, stratum: Stratum, epoch: int, missing: int) -> None:
    """Correct the tally for the last batch, which is filled up."""
    lender, start = plan.filler(stratum, epoch)
    size = plan.config.size
    own = plan.sequence(stratum, epoch).stretches(stratum.rows - (size - missing), stratum.rows)
    more = plan.sequence(lender, epoch).stretches(start, start + missing)
    rows_of_group: dict[int, int] = {}
    for found, sign in ((own, 1), (more, 1 if lender is stratum else -1)):
        for group, rows in zip(found.group.tolist(), found.rows.tolist(), strict=True):
            name = group if sign > 0 else -1 - group
            rows_of_group[name] = rows_of_group.get(name, 0) + rows
    alone = _Tally()
    _count(alone, stratum, own, size)
    filler = _Tally()
    _count(filler, lender, more, size)
    tally.purity += max(rows_of_group.values()) / size - alone.purity
    tally.rows += missing
    tally.packed += filler.packed
    tally.fetched += filler.fetched


def _fetched_in_runs(stratum: Stratum, found: Stretches, batch: np.ndarray) -> float:
    """Count the rows of all runs that the stretches touch, a run once for each batch."""
    run_rows = stratum.run_rows
    full = stratum.group_runs[found.group] * run_rows
    begin, end = found.member, found.member + found.rows
    first, last = np.minimum(begin, full) // run_rows, -(-np.minimum(end, full) // run_rows)
    in_full = float((last - first).sum()) * run_rows
    # A stretch that continues the one before it, in the same batch, shares the run that lies across.
    continues = (batch[1:] == batch[:-1]) & (found.group[1:] == found.group[:-1]) & (begin[1:] == end[:-1])
    in_full -= float((continues & (begin[1:] < full[1:]) & (begin[1:] % run_rows > 0)).sum()) * run_rows
    short = end > full
    base = stratum.tail_start[stratum.first_piece[found.group[short]]]
    begin_short, end_short = base + np.maximum(begin - full, 0)[short], base + (end - full)[short]
    first_piece = np.searchsorted(stratum.tail_start, begin_short, side="right") - 1
    last_piece = np.searchsorted(stratum.tail_start, end_short, side="left")
    in_short = float((stratum.tail_start[last_piece] - stratum.tail_start[first_piece]).sum())
    cut = begin_short - stratum.tail_start[first_piece] > 0
    shared = cut[1:] & continues[np.flatnonzero(short)[1:] - 1]
    tails = np.diff(stratum.tail_start)
    return in_full + in_short - float(tails[first_piece[1:]][shared].sum())


def _fetched_singly(stratum: Stratum, rows: np.ndarray) -> float:
    """Return the expected rows of the distinct runs that hold `rows` (batches,) rows drawn from the whole stratum."""
    runs = int(np.sum(-(-stratum.piece_rows // stratum.run_rows)))
    sizes, counts = np.unique(rows, return_counts=True)
    return float(counts @ (stratum.rows * (1 - (1 - 1 / runs) ** sizes)))


def _counts_clusters(plan: BatchPlan, stratum: Stratum) -> bool:
    """Return whether the groups that a tally counts are clusters of the index, in every batch of the stratum."""
    knows_clusters = plan.layout in ("cluster", "group")
    return knows_clusters and stratum.whole_runs and not plan.exchanged and plan.config.merged_clusters == 1


def _purity(plan: BatchPlan, tallies: Sequence[_Tally], share: np.ndarray) -> float | None:
    if plan.layout not in ("cluster", "group"):
        return None
    if all(_counts_clusters(plan, stratum) for stratum in plan.strata):
        return float(share @ [tally.purity / tally.batches for tally in tallies])
    most = _SAMPLED_SUPER_BATCHES if plan.config.super_batch > 1 else _SAMPLED_STEPS
    steps = np.linspace(0, plan.steps_per_epoch - 1, min(most, plan.steps_per_epoch)).astype(int)
    return float(np.mean([plan.batch(step).purity for step in steps.tolist()]))


def _describe(plan: BatchPlan, stratum: Stratum, tally: _Tally) -> dict[str, Any]:
    part = plan.part_rows(stratum)
    batches = int(plan.batches_of_stratum[stratum.number])
    return {
        "rows": stratum.rows,
        "clusters": stratum.clusters,
        "batches": batches,
        "batches_per_epoch": int(plan.quotas[stratum.number]),
        "clusters_per_batch": stratum.groups_per_batch,
        "purity": tally.purity / tally.batches if _counts_clusters(plan, stratum) else None,
        "packed_share": tally.packed / tally.rows,
        "leftovers": packed_rows(stratum.group_rows, part),
        "repeats": batches * plan.config.size - stratum.rows,
        "read_amplification": tally.fetched / tally.rows,
    }


def _by_source(names: Sequence[str], strata: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Join the strata of each source into one description: sums, and means over their batches."""
    found: dict[str, dict[str, Any]] = {}
    for name, each in zip(names, strata, strict=True):
        before = found.get(name)
        found[name] = each if before is None else _joined(before, each)
    return found


def _joined(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    joined = {key: one[key] + other[key] for key in _SUMMED}
    joined["clusters_per_batch"] = max(one["clusters_per_batch"], other["clusters_per_batch"])
    for key in _AVERAGED:
        known = one[key] is not None and other[key] is not None
        total = sum(each[key] * each["batches"] for each in (one, other)) if known else None
        joined[key] = None if total is None else total / joined["batches"]
    return {key: joined[key] for key in one}


def _warnings(plan: BatchPlan, report: dict[str, Any]) -> list[str]:
    config, run_rows = plan.config, plan.index.run_rows
    found = []
    unmixed = [stratum for stratum in plan.strata if not stratum.mixed]
    if not all(stratum.whole_runs for stratum in unmixed):
        found.append(
            f"batches.stratify: {config.stratify} on shards laid out by {plan.layout} moves single rows, reading "
            f"up to {report['read_amplification']:.0f} times the bytes used; less if batches.cache_bytes holds them"
        )
    elif plan.exchanged:
        found.append(
            f"batches.random_share: {plan.exchanged} rows of each batch are read one by one, "
            f"{report['read_amplification']:.1f} times the bytes used; less if batches.cache_bytes holds their runs"
        )
    elif report["read_amplification"] > _MUCH_READ and any(_cuts_runs(plan, stratum) for stratum in unmixed):
        found.append(
            f"reading: {report['read_amplification']:.2f} times the bytes used are read; batches.size should be a "
            f"multiple of cluster.run_rows ({run_rows}) times clusters_per_batch"
        )
    if STRATEGIES[config.stratify].groups is not None:
        found += _about_clusters(plan, report)
    found += _about_repeats(plan, report)
    if report["pooled"]:
        found.append(f"small sources: batches mix {_names(report['pooled'])}, each smaller than a batch")
    if report["left_out"]:
        found.append(f"left out, never trained on: {_names(report['left_out'])}")
    return found


def _cuts_runs(plan: BatchPlan, stratum: Stratum) -> bool:
    return plan.part_rows(stratum) % stratum.run_rows != 0


def _about_repeats(plan: BatchPlan, report: dict[str, Any]) -> list[str]:
    """Return warnings about texts that repeat so much that batches have few negatives."""
    found = []
    if report["mixed"]:
        rows = sum(stratum.rows for stratum in plan.strata if stratum.mixed)
        found.append(
            f"repeats: clusters of {_names(report['mixed'])} mostly repeat one query or document, so {rows:,} rows "
            f"({rows / report['rows']:.0%}) are mixed with each other and with neighbouring clusters, one by one"
        )
    crowded = [stratum for stratum in plan.strata if stratum.crowding > _MUCH_CROWDED]
    if crowded:
        share = max(stratum.crowding for stratum in crowded)
        found.append(
            f"repeats: up to {share:.0%} of the negatives in batches of {_names([each.name for each in crowded])} have "
            "the query or document of their positive: there is little to learn from them"
        )
    return found


def _about_clusters(plan: BatchPlan, report: dict[str, Any]) -> list[str]:
    found = []
    size = plan.config.size
    if plan.config.clusters_per_batch is None:
        derived = {s.name: s.groups_per_batch for s in plan.strata if s.groups_per_batch > 1}
        if derived:
            found.append(
                f"batches.clusters_per_batch: up to {max(derived.values())}, derived because clusters are small "
                f"against batches of {size}: {_names(list(derived))}"
            )
    packed = [name for name, each in report["sources"].items() if each["packed_share"] > _MUCH_PACKED]
    if report["packed_share"] > _MUCH_PACKED:
        found.append(
            f"packing: {report['packed_share']:.0%} of the rows are in batches of several clusters' remains "
            f"({_names(packed)}); larger clusters (cluster.mean_size) or smaller batches would be purer"
        )
    narrow = 0
    for stratum in plan.strata:
        part = plan.part_rows(stratum)
        hardly = (stratum.group_rows >= part) & (stratum.group_rows < HARDLY_LARGER * part)
        narrow += int(stratum.group_rows[hardly].sum()) if len(stratum.group_rows) > 1 else 0
    if narrow > _MUCH_HARDLY_LARGER * report["rows"]:
        found.append(
            f"clusters hardly larger than their part of a batch hold {narrow / report['rows']:.0%} of the rows: they "
            "would make the same batches in every epoch, so their runs are mixed with those of neighbouring clusters"
        )
    return found


def _names(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMES} more" if len(names) > _NAMES else ""
    return ", ".join(names[:_NAMES]) + more
