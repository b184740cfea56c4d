"""Arms of a comparison: one configuration each, over shared corpus, embeddings and, where they can, clusters."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from clusterbatch.batches.strategies import STRATEGIES, Strategy
from clusterbatch.clustering.cells import mean_size
from clusterbatch.config import RunConfig, dotted, fingerprint, with_changes
from clusterbatch.config.compare import ALIKE, HALF, MATCHED
from clusterbatch.errors import UsageError
from clusterbatch.training.starting_model import with_learning_rate

# Sections that an arm may change: everything else is the same for all, or the comparison means nothing.
_SECTIONS = ("batches", "cluster", "mine", "train")
_PER_BATCH, _CURRICULUM = "batches.clusters_per_batch", "batches.curriculum"

# Groups of an arm that is matched in hardness have this share of a batch, at least so many rows.
_MATCHED_SHARE, _LEAST_MATCHED = 1 / 8, 16


@dataclass(frozen=True)
class Arm:
    """One arm; `config`: of its runs but for seed and workspace; `layout`: name of the clusters artifact it reads.

    matched: its clusters_per_batch is yet to be chosen (hardness.py); phases: its curriculum, until its length in steps
    is known (with_phases); changes: what it was asked to change, by dotted keys.
    """

    name: str
    config: RunConfig
    layout: str
    matched: bool = False
    phases: tuple[Mapping[str, Any], ...] = ()
    changes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def uses_clusters(self) -> bool:
        """Return whether embedding and clustering are part of its price."""
        return _strategy(self.config).needs_clusters or _knows_rows_by_clusters(self.config)

    @property
    def uses_embeddings(self) -> bool:
        mask, batches = self.config.train.mask, self.config.batches
        by_vectors = mask.surrogate_margin is not None or batches.largest_super_batch > 1
        return self.uses_clusters or self.config.mine.is_on or by_vectors or self.uses_scores

    @property
    def uses_scores(self) -> bool:
        """Return whether a teacher's scores are part of its price, and with them the clusters in which it scores."""
        return self.config.needs_teacher


def _strategy(config: RunConfig) -> Strategy:
    return STRATEGIES[config.batches.stratify]


def arms_of(config: RunConfig) -> tuple[list[Arm], dict[str, RunConfig]]:
    """Return the arms, and the configuration of every cluster layout they need, by name.

    Raises UsageError if an arm changes a section that must be the same for all.
    """
    base = _base(config)
    asked = {name: dotted(changes) for name, changes in config.compare.arms.items()}
    configs = {name: _with_arm(base, name, changes) for name, changes in asked.items()}
    layouts: dict[str, RunConfig] = {}
    names: dict[str, str] = {}
    # Arms with a layout of their own first: random and source batches can then be read from any of theirs.
    for name, arm in configs.items():
        if _knows_rows_by_clusters(arm):
            names[name] = _add(layouts, config, arm, "cluster")
        elif _strategy(arm).layouts:
            names[name] = _add(layouts, config, arm, _strategy(arm).layouts[0])
    for name, arm in configs.items():
        if name not in names:
            usable = (key for key, layout in layouts.items() if _serves(layout, arm))
            names[name] = next(usable, None) or _add(layouts, config, arm, arm.batches.stratify)
    arms = [
        Arm(
            name,
            with_learning_rate(arm),
            names[name],
            asked[name].get(_PER_BATCH) == MATCHED,
            _open_phases(asked[name]),
            asked[name],
        )
        for name, arm in configs.items()
    ]
    return arms, layouts


def check_arms(config: RunConfig) -> None:
    """Raise UsageError for an arm's impossible keys or values, before the corpus is read and embedded."""
    for arm in arms_of(config)[0]:
        with_phases(arm, 2)


def with_phases(arm: Arm, steps: int) -> Arm:
    """Return the arm with its curriculum, for a comparison of so many steps; unchanged if it has no phase of `half`."""
    if not arm.phases:
        return arm
    half = max(1, steps // 2)
    phases = [{**phase, "steps": half} if phase.get("steps") == HALF else dict(phase) for phase in arm.phases]
    return replace(arm, config=with_changes(arm.config, {_CURRICULUM: phases}), phases=())


def _open_phases(changes: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    phases = changes.get(_CURRICULUM) or []
    return tuple(phases) if any(phase.get("steps") == HALF for phase in phases) else ()


def clustered_layout(arms: Sequence[Arm]) -> str | None:
    """Return the layout that is shown for all: that of the first arm with clusters."""
    return next((arm.layout for arm in arms if arm.uses_clusters and not arm.matched), None)


def _base(config: RunConfig) -> RunConfig:
    """Fix cluster sizes that follow from the batch size, which must not change with an arm's own batch size."""
    if config.cluster.clusters is not None:
        return config
    return with_changes(config, {"cluster.mean_size": mean_size(config)})


def _with_arm(base: RunConfig, name: str, changes: Mapping[str, Any]) -> RunConfig:
    for key in changes:
        if key.split(".")[0] not in _SECTIONS or key in ALIKE:
            raise UsageError(
                f"compare.arms.{name}: {key} is the same for all arms (one may change {', '.join(_SECTIONS)})"
            )
    changed = dict(changes)
    changed["batches.size"] = _times(changed.get("batches.size", base.batches.size), base.batches.size)
    if "cluster.mean_size" in changed:
        changed["cluster.mean_size"] = _times(changed["cluster.mean_size"], changed["batches.size"])
    if changed.get("cluster.mean_size") == MATCHED:
        changed["cluster.mean_size"] = max(_LEAST_MATCHED, round(_MATCHED_SHARE * base.batches.size))
        changed["cluster.clusters"] = None
    elif "cluster.mean_size" in changed:
        changed.setdefault("cluster.clusters", None)
    if changed.get(_PER_BATCH) == MATCHED:
        changed[_PER_BATCH] = None
    if _open_phases(changes):
        del changed[_CURRICULUM]
    if "cluster.clusters" in changed:
        changed.setdefault("cluster.mean_size", None)
    return with_changes(base, changed)


def _times(value: Any, unit: int) -> Any:
    """Return so many of `unit` for a text like `4x`, any other value as it is."""
    return int(value[:-1]) * unit if isinstance(value, str) and re.fullmatch(r"\d+x", value) else value


def _serves(layout: RunConfig, arm: RunConfig) -> bool:
    """Return whether an arm whose strategy takes any layout can read shards made for clusters."""
    return (
        layout.batches.stratify == "cluster"
        and not _knows_rows_by_clusters(layout)
        and layout.mine == arm.mine
        and (not _strategy(arm).by_source or layout.cluster.scope == "source")
        and _tokenised_alike(layout, arm)
    )


def _knows_rows_by_clusters(config: RunConfig) -> bool:
    """Return whether clusters are needed to tell which rows are outliers or semantic duplicates."""
    return config.cluster.drop_outliers is not None or config.cluster.duplicates.threshold is not None


def _tokenised_alike(one: RunConfig, other: RunConfig) -> bool:
    keys = ("model", "encoder", "max_query_tokens", "max_document_tokens", "named_prompts")
    return all(getattr(one.train, key) == getattr(other.train, key) for key in keys)


def _add(layouts: dict[str, RunConfig], config: RunConfig, arm: RunConfig, stratify: str) -> str:
    tokens = [arm.train.model, arm.train.encoder, arm.train.max_query_tokens, arm.train.max_document_tokens]
    mined = [arm.mine] if arm.mine.is_on else []
    prompts = [arm.train.named_prompts] if arm.train.named_prompts else []
    key = fingerprint(arm.cluster, stratify, tokens, *mined, *prompts)
    if key not in layouts:
        layouts[key] = with_changes(
            arm,
            {
                "workspace": f"{_layouts_home(config)}/{key}",
                "batches.stratify": stratify,
                "reuse.corpus": config.reuse.corpus or config.workspace,
                "reuse.embeddings": config.reuse.embeddings or config.workspace,
            },
        )
    return key


def _layouts_home(config: RunConfig) -> str:
    """Return the folder of layouts. Those of a sample are beside it: they must not replace those of the corpus."""
    compared, rows = f"{config.workspace}/compare", config.reuse.corpus or ""
    return f"{rows if rows.startswith(f'{compared}/samples/') else compared}/layouts"
