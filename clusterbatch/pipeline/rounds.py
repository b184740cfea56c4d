"""Rounds of refresh: what each decided and found, kept beside its generation. Generation 0 needs none."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ValidationError

from clusterbatch.errors import DataError
from clusterbatch.store.workspace import Workspace, live_generation

RECORD = "round.json"


class Round(BaseModel):
    """One generation's round. It is decided when it is written first, and over when `promoted` says yes or no."""

    generation: int
    # The generation whose model was live: training goes on from its last checkpoint.
    base: int
    # The generation whose clusters are trained on: its own, or that of `base` where clustering again did not pay.
    clusters: int
    when: str
    # Figures of the sample, see clustering.drift.
    drift: dict[str, Any]
    # Steps that were trained while these clusters were built; 0 where training waited for them.
    steps_meanwhile: int = 0
    steps: int = 0
    pairs: int = 0
    metric: str = ""
    live_value: float | None = None
    own_value: float | None = None
    # The best that this model and those it was trained on from have had, and a fingerprint of what that was measured
    # on, and how: losses within the margin must not add up over the rounds.
    best_value: float | None = None
    measured_on: str = ""
    margin: float = 0.0
    promoted: bool | None = None
    rolled_back: bool = False
    seconds: dict[str, float] = {}
    # Documents that a promotion makes somebody embed again, and seconds that takes one process of this machine.
    reindex_documents: int = 0
    reindex_seconds: float = 0.0

    # Whether these clusters have centroids of their own; or those before, with the rows that the corpus has now.
    reclustered: bool = False
    extended: bool = False


def read_round(workspace: Workspace, generation: int) -> Round | None:
    """The record, None where the generation was not decided on. Raises DataError where it is damaged."""
    folder = workspace.refresh(generation)
    try:
        return Round.model_validate_json(folder.read(RECORD))
    except FileNotFoundError:
        return None
    except ValidationError:
        raise DataError(f"{folder.uri}/{RECORD}: damaged, not a round of refresh") from None


def write_round(workspace: Workspace, record: Round) -> None:
    workspace.refresh(record.generation).write(RECORD, record.model_dump_json(indent=1).encode())


def rounds(workspace: Workspace) -> list[Round]:
    """All that were decided, in their order; they are numbered from 1 without a gap."""
    found: list[Round] = []
    while (record := read_round(workspace, len(found) + 1)) is not None:
        found.append(record)
    return found


def next_generation(workspace: Workspace) -> int:
    """The first whose round is not over."""
    return 1 + sum(record.promoted is not None for record in rounds(workspace))


def rollback_target(workspace: Workspace) -> int | None:
    """The generation that was live before the one that is; None where there is none."""
    live = live_generation(workspace) or 0
    good = [record.generation for record in rounds(workspace) if record.promoted and not record.rolled_back]
    return max([0, *(number for number in good if number < live)]) if live else None


def needed_generations(workspace: Workspace) -> set[int]:
    """What must not be cleaned away: the live generation, the one to roll back to, whose clusters these have, and whose
    vectors those are of."""
    needed = {number for number in (live_generation(workspace), rollback_target(workspace)) if number is not None}
    by_number = {record.generation: record for record in rounds(workspace)}
    needed |= {by_number[number].clusters for number in needed if number in by_number}
    manifests = [workspace.clusters(number).manifest() for number in needed]
    return needed | {int(each.details["vectors"]) for each in manifests if each and "vectors" in each.details}
