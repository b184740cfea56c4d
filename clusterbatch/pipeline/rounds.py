"""Rounds of refresh: what each decided and found, kept beside its generation. Generation 0 needs none.

The records say which generation has to be live; the model is copied after that. A record outlives its generation: what
`clean` removes must not look as if it had never been.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ValidationError

from clusterbatch.errors import DataError
from clusterbatch.store import Artifact
from clusterbatch.store.details import ClustersDetails, details_of
from clusterbatch.store.workspace import Workspace, is_published, live_generation, publish

# Files in `generation=NNN/refresh/`: the record; the model that embeds for new clusters while they are built and
# after; and the sample on which drift is measured.
RECORD = "round.json"
BUILD = "build.json"
SAMPLE = "_sample"


class Round(BaseModel):
    """One generation's round. It is decided when it is first written, and over when `promoted` says yes or no."""

    generation: int
    # The generation whose model was live: training continues from its last checkpoint.
    base: int
    # The generation whose clusters are trained on: its own, or that of `base` where clustering again did not pay.
    clusters: int
    when: str
    # Figures of the sample, see clustering.drift; none of super-batches.
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

    # Whether these clusters have centroids (super-batches: vectors) of their own; or those before, with the rows that
    # the corpus has now.
    reclustered: bool = False
    extended: bool = False


def read_round(workspace: Workspace, generation: int) -> Round | None:
    """Return the record, None if the generation was not decided on. Raises DataError if it is damaged."""
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
    """Return all records, in the order of their generations; one that somebody has removed leaves a gap."""
    records = (read_round(workspace, generation) for generation in workspace.generations() if generation > 0)
    return [record for record in records if record is not None]


def next_generation(workspace: Workspace) -> int:
    """Return the first generation whose round is not over. Numbers are never used again."""
    records = rounds(workspace)
    pending = [record.generation for record in records if record.promoted is None]
    return (
        min(pending) if pending else 1 + max([live_generation(workspace) or 0, *(each.generation for each in records)])
    )


def wanted_generation(workspace: Workspace) -> int | None:
    """Return the generation that has to be live by the records; None if nothing was ever published.

    Records are written first: after an interruption another generation may be live, see `settle`.
    """
    live = live_generation(workspace)
    records = rounds(workspace)
    if live is None or (live and live not in {record.generation for record in records}):
        return live
    return max([0, *_good(records)])


def rollback_target(workspace: Workspace) -> int | None:
    """Return the generation that was live before the one that is; None if there is none."""
    wanted = wanted_generation(workspace)
    good = _good(rounds(workspace))
    return max([0, *(number for number in good if number < wanted)]) if wanted else None


def settle(workspace: Workspace) -> None:
    """Finish a promotion or a rollback that was interrupted after its record and before the model was copied."""
    live, wanted = live_generation(workspace), wanted_generation(workspace)
    if live is None or wanted is None or is_published(workspace, wanted):
        return
    record = read_round(workspace, live)
    if record is not None and record.promoted is None:
        # An older version copied the model first: this round is under way.
        return
    if workspace.train(wanted).manifest() is not None:
        publish(workspace, wanted)


def retire_rounds(workspace: Workspace) -> None:
    """Record that no generation of refresh is to be live any more, as the first one is trained again.

    A round that is under way is removed: the model that it continues from is replaced.
    """
    for record in rounds(workspace):
        if record.promoted is None:
            discard_generation(workspace, record.generation, keep_record=False)
        elif record.promoted and not record.rolled_back:
            write_round(workspace, record.model_copy(update={"rolled_back": True}))


def discard_generation(workspace: Workspace, generation: int, *, keep_record: bool) -> None:
    """Remove what a generation's stages have made; files of others stay. keep_record: its round remains known."""
    for artifact in reversed(workspace.artifacts_of(generation)):
        artifact.remove()
    refresh = workspace.refresh(generation)
    refresh.remove_files(name for name in refresh_files(workspace, generation) if not (keep_record and name == RECORD))


def refresh_files(workspace: Workspace, generation: int) -> list[str]:
    """Return names, relative to `refresh/`, of the files there that a round of refresh writes."""
    folder = workspace.refresh(generation)
    sample = [entry.name for entry in Artifact(folder, "drift").own_files(SAMPLE)]
    return [*(name for name in (RECORD, BUILD) if folder.exists(name)), *sample]


def needed_generations(workspace: Workspace) -> set[int]:
    """Return the generations that must not be cleaned away.

    These are the live one, the one to roll back to, those that a round under way continues from, and those whose
    clusters these have and whose vectors those are made of.
    """
    live, records = live_generation(workspace), rounds(workspace)
    kept = (live, wanted_generation(workspace), rollback_target(workspace))
    needed = {number for number in kept if number is not None}
    needed |= {number for each in records if each.promoted is None for number in (each.generation, each.base)}
    by_number = {record.generation: record for record in records}
    needed |= {by_number[number].clusters for number in needed if number in by_number}
    manifests = [workspace.clusters(number).manifest() for number in needed]
    details = [details_of(each, ClustersDetails) for each in manifests if each]
    return needed | {int(each["vectors"]) for each in details if "vectors" in each}


def _good(records: list[Round]) -> list[int]:
    return [record.generation for record in records if record.promoted and not record.rolled_back]
