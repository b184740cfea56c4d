"""`report`: how results are shown. Nothing here changes one.

`predict`: what clusters would be like on this corpus, before anything is trained.

`tune`: which settings to try, and how long; or how often to refresh while a corpus grows.

`refresh`: the next generation, and when it is worth making and keeping.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from clusterbatch.config.base import Address, ModelName, Section, operational
from clusterbatch.config.stages import Paths


class PredictConfig(Section):
    # Rows that are embedded; of each source at least 2,048, or all.
    rows: int = Field(20_000, ge=256)
    # Rows per cluster that are tried; those below two batches, or too large for the sample, are left out, and said.
    sizes: list[int] = Field([256, 512, 1024, 2048, 4096, 8192], min_length=1)
    # What the mask would leave out, as train.mask.surrogate_margin with surrogate_relative: above 95 % of the positive.
    mask_share: float = Field(0.95, gt=0, le=1)
    # A file (JSON, local or s3://): `compare` adds what every arm gained, source by source, and what was known of it
    # before; `predict` says what the rows of other corpora foretell, and how far they miss each other. It needs at
    # least 8 rows of the same baseline (compare.baseline) and metric (compare.decide.metric).
    experience: Address | None = operational(None)


_SECTIONS = ("batches", "cluster", "mine", "train")
_MOST_CANDIDATES = 256


@dataclass(frozen=True)
class Policy:
    """When a corpus that grows month by month is taken in and clustered anew.

    every: months between two refreshes, None for a policy that asks `when`, a value of refresh.when, every month.
    """

    name: str
    every: int | None
    when: str

    @property
    def measures_drift(self) -> bool:
        return self.every is None and self.when != "never"

    def takes_in(self, month: int) -> bool:
        """Whether what has arrived until `month` joins the corpus in it."""
        return self.measures_drift or (self.every is not None and month % self.every == 0)

    def when_in(self, month: int) -> str:
        """refresh.when of that month's round."""
        if self.every is None:
            return self.when
        return "always" if self.takes_in(month) else "never"


class ArrivalConfig(Section):
    """What arrives in one month."""

    # As corpus.paths.
    paths: Paths = Field(min_length=1)
    # Whose answers are in it: collections of evaluate.path, or segments of queries (report.segment_pattern).
    queries: list[str] = Field(min_length=1)


class StreamConfig(Section):
    """A corpus that arrives in parts, one a month, and the refresh intervals to try on it."""

    # The first is what the first model is trained on.
    arrivals: list[ArrivalConfig] = Field(min_length=2)
    # never (trains on with the first clusters); months between two refreshes; or a figure of drift and what it must
    # exceed (as refresh.when): then new rows join the clusters there are every month, and clusters are made anew where
    # they drift. `drift > 1` never makes them anew.
    refresh: list[int | str] = Field(["never", 2, 1, "drift > 0.05"], min_length=2)

    @field_validator("refresh")
    @classmethod
    def _known(cls, refresh: list[int | str]) -> list[int | str]:
        for each in refresh:
            if isinstance(each, int):
                if each < 1:
                    raise ValueError(f"an interval is at least 1 month (got {each})")
            elif each == "always":
                raise ValueError("always: give it as 1, every month")
            else:
                RefreshConfig(when=each)
        if len(set(refresh)) < len(refresh):
            raise ValueError("one is named twice")
        return refresh

    @model_validator(mode="after")
    def _reached(self) -> StreamConfig:
        longest = max((each for each in self.refresh if isinstance(each, int)), default=0)
        if longest >= len(self.arrivals):
            raise ValueError(f"refresh: {longest} months never pass, {len(self.arrivals) - 1} follow the first arrival")
        return self

    @property
    def policies(self) -> list[Policy]:
        return [
            Policy(f"every {each}", each, "always") if isinstance(each, int) else Policy(each, None, each)
            for each in self.refresh
        ]


class TuneConfig(Section):
    # Values to try, by dotted key of batches, cluster, mine or train; every combination is a candidate.
    candidates: dict[str, list[Any]] = {
        "cluster.mean_size": [512, 1024, 2048, 4096],
        "cluster.features": ["document", "query"],
        "train.mask.surrogate_margin": [None, -0.05],
    }
    # Candidates that are trained at all: the best of a cheap ranking by a sample's vectors. The others are only ranked.
    keep: int = Field(6, ge=2)
    # Successive halving: each rung trains `reduction` times the steps of the one before, with 1 / `reduction` of its
    # candidates; the last rung trains `steps`. Unset: what train.steps or train.epochs say.
    steps: int | None = Field(None, ge=1)
    reduction: int = Field(3, ge=2)
    rungs: int = Field(2, ge=1)
    # Runs of each candidate, of which the mean counts; they take 0 to n - 1 in place of train.seed and batches.seed.
    seeds: int = Field(1, ge=1)
    # What decides, as a mean over the collections of evaluate.path.
    metric: str = "NDCG@10"
    # Set: `tune` compares refresh intervals on it, in place of the candidates.
    stream: StreamConfig | None = None
    # Runs side by side.
    workers: int = operational(2, ge=1)

    @model_validator(mode="after")
    def _consistent(self) -> TuneConfig:
        for key, values in self.candidates.items():
            if key.split(".")[0] not in _SECTIONS:
                raise ValueError(f"candidates: {key} cannot be tuned (only {', '.join(_SECTIONS)})")
            if not values:
                raise ValueError(f"candidates: {key} has no values")
        if not 2 <= len(self.combinations) <= _MOST_CANDIDATES:
            raise ValueError(f"candidates: {len(self.combinations)} combinations, expected 2 to {_MOST_CANDIDATES}")
        return self

    @property
    def combinations(self) -> list[dict[str, Any]]:
        """The candidates, as changes of the configuration."""
        return [dict(zip(self.candidates, values, strict=True)) for values in product(*self.candidates.values())]


# Figures of the drift on a sample that `refresh.when` can ask for.
DRIFT_FIGURES = ("drift", "movement", "hardness")


class RefreshConfig(Section):
    """Each round re-embeds, re-clusters and goes on training from the live model's last checkpoint."""

    # Generations that one call makes.
    rounds: int = Field(1, ge=1)
    # Optimizer steps of a round, with train.schedule over them; unset: one epoch of its batches.
    every_steps: int | None = Field(None, ge=1)
    # What embeds the corpus anew. Unset: the live model; else a fixed one, by name or folder.
    surrogate: ModelName | None = None
    # New clusters are built while a round trains, for the first round that begins after they are whole; a round never
    # waits. Training and building then share the cluster: see cpus_per_worker of the stages.
    asynchronous: bool = False
    # Share of the rows, drawn anew in every round, that stay where the generation before put them: all batches changing
    # at once can make a model forget (ANCE-Tele, Sun 2022).
    keep_fraction: float = Field(0.0, ge=0, lt=1)
    # always, never (goes on training with the old clusters: the control), or a figure of the sample and what it must
    # exceed: drift > 0.1 (share of rows that change clusters, beyond chance), movement, hardness.
    when: str = "always"
    # Rows that drift is measured on, at least; 32 of each cluster where that is more.
    sample: int = Field(16_384, ge=256)
    # A round's model goes live when its metric, averaged over the collections, is no more than `margin` below that of
    # the live one, and of the best that went before it: small losses do not add up.
    metric: str = "NDCG@10"
    margin: float = Field(0.005, ge=0)
    # Documents that are indexed with the live model elsewhere, whose re-indexing a promotion costs; unset: the corpus'.
    production_documents: int | None = Field(None, ge=0)

    @field_validator("when")
    @classmethod
    def _known(cls, when: str) -> str:
        if when not in ("always", "never") and _condition(when) is None:
            raise ValueError(f"expected always, never, or one of {', '.join(DRIFT_FIGURES)} and '> number'")
        return when

    def wants_clusters(self, figures: dict[str, Any]) -> bool:
        """Whether a round with these figures of drift clusters anew."""
        condition = _condition(self.when)
        if condition is None:
            return self.when == "always"
        name, limit = condition
        return float(figures[name]) > limit


def _condition(when: str) -> tuple[str, float] | None:
    match = re.fullmatch(rf"\s*({'|'.join(DRIFT_FIGURES)})\s*>\s*(-?\d*\.?\d+)\s*", when)
    return (match[1], float(match[2])) if match else None


class ReportConfig(Section):
    language: Literal["en", "ja"] = operational("en")
    # Its first group, found in a query's id, names the segment (source) the query belongs to; the built-in sample's ids
    # are <source>-q<16 hex digits>. Gains are shown by segment where ids match.
    segment_pattern: str = operational(r"^(.+?)-[dq]?[0-9a-f]{16}$")
