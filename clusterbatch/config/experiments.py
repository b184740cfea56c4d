"""Sections `predict`, `tune`, `refresh` and `report`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import product
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from clusterbatch.config.base import ModelName, Section, operational
from clusterbatch.config.compare import ALIKE
from clusterbatch.config.stages import Paths


class PredictConfig(Section):
    """Figures of clustered batches on a sample, before any training."""

    rows: int = Field(20_000, ge=256)
    """Rows to embed; of each source at least 2,048, or all."""
    sizes: list[Annotated[int, Field(ge=1)]] = Field([256, 512, 1024, 2048, 4096, 8192], min_length=1)
    """Mean cluster sizes to try, in rows. Sizes below two batches or too large for the sample are left out, and
    reported."""
    mask_share: float = Field(0.95, gt=0, le=1)
    """Share of the positive's score above which a document would be masked, as `train.mask.surrogate_margin` with
    `surrogate_relative` does."""

    @model_validator(mode="before")
    @classmethod
    def _without_experience(cls, values: object) -> object:
        # Configurations that were written down by earlier versions name the key.
        if isinstance(values, dict) and "experience" in values:
            values = dict(values)
            if values.pop("experience") is not None:
                raise ValueError("experience: removed, its estimates were no better than guessing; delete the key")
        return values


_SECTIONS = ("batches", "cluster", "mine", "train")
_MOST_CANDIDATES = 256


@dataclass(frozen=True)
class Policy:
    """Policy that says in which months a growing corpus is ingested and its clusters are rebuilt.

    every: months between two refreshes, None for a policy that asks `when`, a value of refresh.when, every month.
    """

    name: str
    every: int | None
    when: str

    @property
    def measures_drift(self) -> bool:
        return self.every is None and self.when != "never"

    def takes_in(self, month: int) -> bool:
        """Return whether everything that has arrived until `month` joins the corpus in that month."""
        return self.measures_drift or (self.every is not None and month % self.every == 0)

    def when_in(self, month: int) -> str:
        """refresh.when of that month's round."""
        if self.every is None:
            return self.when
        return "always" if self.takes_in(month) else "never"


class ArrivalConfig(Section):
    """Files that arrive in one month, and the queries they answer."""

    paths: Paths = Field(min_length=1)
    """Files that arrive, as in `corpus.paths`."""
    queries: list[str] = Field(min_length=1)
    """Queries whose answers arrive: collections of `evaluate.path`, or segments of queries (`report.segment_pattern`).
    """


class StreamConfig(Section):
    """A corpus that arrives in parts, one a month, and the refresh intervals to try on it."""

    arrivals: list[ArrivalConfig] = Field(min_length=2)
    """The corpus of each month; the first model is trained on the first."""
    refresh: list[int | str] = Field(["never", 2, 1, "drift > 0.05"], min_length=2)
    """Policies to compare: `never` (continue training with the first clusters), a number of months between two
    refreshes, or a drift figure and its limit (as in `refresh.when`). With a limit, new rows join the existing
    clusters every month, and clusters are rebuilt only when they drift; `drift > 1` never rebuilds them."""

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
    """Candidate settings, and how long each is tried; or refresh intervals for a growing corpus."""

    candidates: dict[str, list[Any]] = {
        "cluster.mean_size": [512, 1024, 2048, 4096],
        "cluster.features": ["document", "query"],
        "train.mask.surrogate_margin": [None, -0.05],
    }
    """Values to try, by dotted key of batches, cluster, mine or train; every combination is a candidate."""
    keep: int = Field(6, ge=2)
    """Candidates that are trained: the best of a cheap ranking by a sample's vectors. The others are only ranked."""
    steps: int | None = Field(None, ge=1)
    """Steps of the last rung of successive halving; candidates with another `batches.size` than the configured one make
    as many pairs in more or fewer steps. Unset: `train.steps` or `train.epochs`."""
    reduction: int = Field(3, ge=2)
    """Factor between rungs: each trains this many times the steps of the rung before, with 1 / reduction of its
    candidates."""
    rungs: int = Field(2, ge=1)
    """Number of rungs."""
    seeds: int = Field(1, ge=1)
    """Runs per candidate, of which the mean counts; seeds 0 to n - 1 replace `train.seed` and `batches.seed`."""
    metric: str = "NDCG@10"
    """Metric that decides, as a mean over the collections of `evaluate.path`."""
    stream: StreamConfig | None = None
    """If set, `tune` compares refresh intervals on this stream instead of candidates."""
    workers: int = operational(2, ge=1)
    """Runs side by side."""

    @model_validator(mode="after")
    def _consistent(self) -> TuneConfig:
        for key, values in self.candidates.items():
            if key.split(".")[0] not in _SECTIONS:
                raise ValueError(f"candidates: {key} cannot be tuned (only {', '.join(_SECTIONS)})")
            if "." not in key:
                raise ValueError(f"candidates: {key} is a section; name one of its keys, such as batches.size")
            if key in ALIKE:
                raise ValueError(f"candidates: {key} cannot be tuned (all candidates train alike)")
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
    """Rounds that embed and cluster again and continue training from the live model's last checkpoint."""

    rounds: int = Field(1, ge=1)
    """Generations that one call makes."""
    every_steps: int | None = Field(None, ge=1)
    """Optimizer steps per round, with `train.schedule` over them. Unset: one epoch."""
    surrogate: ModelName | None = None
    """Model that embeds the corpus again. Unset: the live model."""
    asynchronous: bool = False
    """Build new clusters while a round trains, for the first round that begins after they are complete; a
    round never waits. Training and building then share the cluster: see `cpus_per_worker` of the stages."""
    keep_fraction: float = Field(0.0, ge=0, lt=1)
    """Share of the rows, drawn again in every round, that stay in their previous clusters: if all batches change at
    once, a model can forget (ANCE-Tele, Sun 2022)."""
    when: str = "always"
    """When a round rebuilds the clusters: `always`, `never` (continue training with the old ones: the control), or a
    figure measured on a sample and its limit, for example `drift > 0.1` (share of rows that change clusters, beyond
    chance), `movement` or `hardness`. Super-batches have no clusters: `always` (embeds again) or `never`."""
    sample: int = Field(16_384, ge=256)
    """Rows on which drift is measured, at least; 32 per cluster if that is more."""
    metric: str = "NDCG@10"
    """Metric that decides whether a round's model goes live, as a mean over the collections."""
    margin: float = Field(0.005, ge=0)
    """A round's model goes live if its metric is at most this much below the live model's and below the best earlier
    live model's, so that small losses do not add up."""
    production_documents: int | None = Field(None, ge=0)
    """Documents indexed elsewhere with the live model, whose re-indexing a promotion costs. Unset: the corpus'
    documents."""

    @field_validator("when")
    @classmethod
    def _known(cls, when: str) -> str:
        if when not in ("always", "never") and _condition(when) is None:
            raise ValueError(f"expected always, never, or one of {', '.join(DRIFT_FIGURES)} and '> number'")
        return when

    def wants_clusters(self, figures: dict[str, Any]) -> bool:
        """Return whether a round with these figures of drift rebuilds the clusters."""
        condition = _condition(self.when)
        if condition is None:
            return self.when == "always"
        name, limit = condition
        return float(figures[name]) > limit


def _condition(when: str) -> tuple[str, float] | None:
    match = re.fullmatch(rf"\s*({'|'.join(DRIFT_FIGURES)})\s*>\s*(-?\d*\.?\d+)\s*", when)
    return (match[1], float(match[2])) if match else None


Language = Literal["en", "ja"]


class ReportConfig(Section):
    """Presentation of results. No key here changes a result."""

    language: Language = operational("en")
    """Language of the reports."""
    segment_pattern: str = operational(r"^(.+?)-[dq]?[0-9a-f]{16}$")
    """Regular expression, matched from the beginning of a query's id, whose first group names the segment (source) of
    the query. The built-in sample's ids are <source>-q<16 hex digits>. Gains are shown by segment if ids match."""

    @field_validator("segment_pattern")
    @classmethod
    def _has_a_group(cls, pattern: str) -> str:
        try:
            groups = re.compile(pattern).groups
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from None
        if not groups:
            raise ValueError("expected a group in parentheses, which names the segment")
        return pattern
