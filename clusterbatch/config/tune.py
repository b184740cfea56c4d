"""`tune`: which settings to try, and how long; or how often to refresh while a corpus grows."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

from pydantic import Field, field_validator, model_validator

from clusterbatch.config.base import Section, operational
from clusterbatch.config.corpus import Paths
from clusterbatch.config.refresh import RefreshConfig

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
