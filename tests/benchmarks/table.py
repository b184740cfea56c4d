"""The figures of many benchmarks as one table: for the terminal, as Markdown, as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from rich.table import Table

from tests.benchmarks.figures import machine
from tests.benchmarks.running import Outcome

COLUMNS = ("benchmark", "figure", "ours", "peer", "ratio", "promise", "kept")


def as_table(outcomes: Sequence[Outcome], quick: bool) -> Table:
    table = Table(*COLUMNS, title=_title(quick), caption=machine_in_words(machine()), show_lines=False)
    for row in _rows(outcomes, quick):
        table.add_row(*row)
    return table


def as_markdown(outcomes: Sequence[Outcome], quick: bool) -> str:
    """The table, then the command and the seconds of every benchmark."""
    lines = [
        f"{_title(quick)}. Machine: {machine_in_words(machine())}.",
        "",
        _line(COLUMNS),
        _line("---" for _ in COLUMNS),
    ]
    lines += [_line(row) for row in _rows(outcomes, quick)]
    lines += ["", *(f"- {outcome.name}: `{outcome.command}`, {outcome.seconds:.0f} s" for outcome in outcomes), ""]
    return "\n".join(lines)


def as_json(outcomes: Sequence[Outcome], quick: bool) -> str:
    return json.dumps(
        {"machine": machine(), "quick": quick, "benchmarks": [vars(outcome) for outcome in outcomes]}, indent=1
    )


def machine_in_words(found: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    gpu = found["gpu"] or "no GPU"
    hardware = f"{found['cpu']}, {found['cores']} cores, {found['memory_gib']} GiB, {gpu}"
    return f"{hardware}; Python {found['python']}, {versions}"


def _rows(outcomes: Sequence[Outcome], quick: bool) -> Iterator[tuple[str, ...]]:
    for outcome in outcomes:
        if outcome.missing:
            yield outcome.name, f"skipped; needs {outcome.missing}", "", "", "", "", ""
        for line in outcome.figures:
            figure = f"{line['figure']} ({line['case']})" if line["case"] else line["figure"]
            kept = "" if line["promise"] is None else "quick" if quick else "yes" if line["kept"] else "NO"
            ours = f"{_number(line['value'])} {line['unit']}".strip()
            numbers = _number(line["peer"]), _number(line["ratio"])
            yield outcome.name, figure, ours, *numbers, line["promise"] or "", kept
        if outcome.failure:
            yield outcome.name, f"FAILED: {outcome.failure}", "", "", "", "", ""


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _title(quick: bool) -> str:
    return "Benchmarks, quick sizes: no measure of the promises" if quick else "Benchmarks"


def _line(cells: Iterator[str] | Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
