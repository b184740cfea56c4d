"""`compare`: batch strategies on the same data, steps and masks; and what decides between them."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from clusterbatch.config.base import Section, operational

# As a value of cluster.mean_size and batches.clusters_per_batch: batches as hard as those of clusters.
MATCHED = "matched"
# As the steps of a phase of batches.curriculum: half of the comparison's steps.
HALF = "half"
_MASK = {"train.mask.surrogate_margin": -0.05, "train.mask.surrogate_relative": True}
# Share of each source's rows that arms without outliers leave out.
_OUTLIERS = 0.05
# How many times the steps a long comparison has.
_LONG = 3

# Query clusters, each as often as any other (topic-aware sampling).
_TAS = {
    "batches.stratify": "cluster",
    "batches.uniform_clusters": True,
    "batches.clusters_per_batch": 1,
    "cluster.features": "query",
    "cluster.clusters": 2000,
}

# Arms by name: what each changes in the configuration.
PRESETS: dict[str, dict[str, Any]] = {
    "random": {"batches.stratify": "random"},
    "source": {"batches.stratify": "source"},
    "cluster": {"batches.stratify": "cluster"},
    # The user's own labels (corpus.columns.group) in place of clusters.
    "group": {"batches.stratify": "group"},
    "cluster-query": {"batches.stratify": "cluster", "cluster.features": "query"},
    "cluster-both": {"batches.stratify": "cluster", "cluster.features": "both"},
    "cluster-corpus": {"batches.stratify": "cluster", "cluster.scope": "corpus"},
    # Masks for every strategy: if only one had them, it would gain by the mask, not by its batches.
    "random-masked": {"batches.stratify": "random", **_MASK},
    "source-masked": {"batches.stratify": "source", **_MASK},
    "cluster-masked": {"batches.stratify": "cluster", **_MASK},
    # One mined hard negative a row beside random in-batch ones: the method to compare clusters with (ANCE).
    "random-mined": {"batches.stratify": "random", "mine.negatives": 1},
    "cluster-consistent": {"batches.stratify": "cluster", "mine.consistency": 20},
    # Query clusters, each as often as any other; and with one negative a row from all over the range of margins.
    "tas": _TAS,
    "tas-balanced": {
        **_TAS,
        "mine.negatives": 1,
        "mine.pick": "balanced",
    },
    # The same, and the surrogate's margins of those negatives are learned (TAS-B, but the contrastive loss stays).
    "tas-b": {
        **_TAS,
        "mine.negatives": 1,
        "mine.pick": "balanced",
        "mine.margins": True,
        "train.margin_mse": 0.1,
    },
    # Batches of several small groups of rows that find each other's documents (B3, Thirukovalluru 2025). A run is a
    # group, so that the derived clusters_per_batch takes whole ones.
    "communities": {
        "batches.stratify": "cluster",
        "cluster.method": "communities",
        "cluster.mean_size": 32,
        "cluster.run_rows": 32,
    },
    # Is it the order? Clusters in the first half of the steps, in the second, or half of every batch.
    "cluster-first": {
        "batches.stratify": "cluster",
        "batches.curriculum": [{"steps": HALF}, {"stratify": "random"}],
    },
    "cluster-last": {
        "batches.stratify": "cluster",
        "batches.curriculum": [{"steps": HALF, "stratify": "random"}, {"stratify": "cluster"}],
    },
    "cluster-mixed": {"batches.stratify": "cluster", "batches.random_share": 0.5},
    # Groups of the clusters' sizes with any rows of the source: tells hardness from grouping.
    "random-groups": {"batches.stratify": "random_groups"},
    # Batches of many small groups of neighbours, about as hard as clusters, but of no common subject.
    "hardness-matched": {
        "batches.stratify": "cluster",
        "cluster.mean_size": MATCHED,
        "batches.clusters_per_batch": MATCHED,
    },
    # Do clusters gain because they gather rows that belong nowhere? Without the rows farthest from their centroids.
    "random-no-outliers": {"batches.stratify": "random", "cluster.drop_outliers": _OUTLIERS},
    "source-no-outliers": {"batches.stratify": "source", "cluster.drop_outliers": _OUTLIERS},
    "cluster-no-outliers": {"batches.stratify": "cluster", "cluster.drop_outliers": _OUTLIERS},
    # The same number of steps, more pairs: what the money would buy without clusters.
    "random-2x": {"batches.stratify": "random", "batches.size": "2x"},
    "random-4x": {"batches.stratify": "random", "batches.size": "4x"},
    "random-8x": {"batches.stratify": "random", "batches.size": "8x"},
}


def _arms(value: object) -> object:
    names = [value] if isinstance(value, str) else value
    if isinstance(names, list):
        unknown = [name for name in names if name not in PRESETS]
        if unknown:
            raise ValueError(f"no arm is called {unknown[0]!r} (known: {', '.join(PRESETS)}; or name: overrides)")
        return {name: PRESETS[name] for name in names}
    if isinstance(names, dict):
        return {
            name: PRESETS[name] if changes is None and name in PRESETS else changes for name, changes in names.items()
        }
    return value


def _seconds(value: object) -> object:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", value.strip()) if isinstance(value, str) else None
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]] if match else value


class DecideConfig(Section):
    """Rule for what pays: the smallest gain over the baseline, and the largest extra cost."""

    metric: str = "NDCG@10"
    """Metric that decides, as a mean over the collections."""
    min_gain: float = Field(0.005, ge=0)
    """Smallest gain in `metric` that is worth the trouble."""
    max_cost: float | None = Field(None, ge=0)
    """Largest extra cost as a share of the baseline's own (1.0: twice as much in total), at `compare.prices`,
    embedding and clustering included. Unset: cost does not decide."""
    confidence: float = Field(0.95, gt=0.5, lt=1)
    """Confidence of the intervals of all arms together; each arm's own level is higher, the more arms there are."""


class PricesConfig(Section):
    """Prices of units in `currency`, for the report and for `decide.max_cost`, which only needs their ratios."""

    cpu_hour: float = operational(0.05, ge=0)
    """Price of an hour of one CPU worker."""
    gpu_hour: float = operational(2.0, ge=0)
    """Price of an hour of one GPU worker."""
    million_reads: float = operational(0.0, ge=0)
    """Price of a million read requests to storage; about 0.4 for a bucket in the workers' region."""
    million_writes: float = operational(0.0, ge=0)
    """Price of a million write requests to storage; about 5 for a bucket in the workers' region."""
    gibibyte_read: float = operational(0.0, ge=0)
    """Price of a gibibyte read from storage; 0 for a bucket in the workers' region."""
    currency: str = operational("USD")
    """Currency of all prices."""


class CompareConfig(Section):
    """Arms, seeds and length of a comparison, and the rule that decides."""

    arms: Annotated[dict[str, dict[str, Any]], BeforeValidator(_arms)] = Field(
        ["random", "source", "cluster", "random-groups"], validate_default=True
    )
    """Names of built-in arms, or name: {dotted.key: value}."""
    baseline: str | None = None
    """Arm that the others are measured against. Unset: the first."""
    seeds: int = Field(3, ge=1)
    """Runs of each arm; seeds 0 to n - 1 replace `train.seed` and `batches.seed`."""
    sample: float | None = Field(None, gt=0, le=1)
    """Share of the corpus to compare on. Unset: all of it."""
    sample_by: Literal["neighbourhoods", "uniform"] = "neighbourhoods"
    """`neighbourhoods` takes whole coarse neighbourhoods of every source, as dense as in the corpus; `uniform` takes
    any rows."""
    budget: Annotated[float | None, BeforeValidator(_seconds)] = Field(None, ge=60)
    """Seconds (or 15m, 2h) that the comparison may take: sample, steps and points are then chosen to fit this machine.
    """
    steps: int | None = Field(None, ge=1)
    """Optimizer steps of every run. Unset: the baseline's `train.steps` or `train.epochs`."""
    long: bool = False
    """Whether to train three times the steps: late gains need time to show."""
    points: int = Field(5, ge=1)
    """Points of the learning curves, evenly spaced; the last is the end."""
    learning_rates: list[float] = []
    """Learning rates of each arm's own sweep: the best pair on half of the queries, which then do not count, is used.
    """
    temperatures: list[float] = []
    """Temperatures of the same sweep."""
    decide: DecideConfig = DecideConfig()
    """The rule that decides."""
    prices: PricesConfig = PricesConfig()
    """Prices of units, for costs in the report."""
    workers: int = operational(2, ge=1)
    """Runs side by side."""

    @model_validator(mode="after")
    def _consistent(self) -> CompareConfig:
        if len(self.arms) < 2:
            raise ValueError("arms: give at least two")
        if self.baseline is not None and self.baseline not in self.arms:
            raise ValueError(f"baseline: {self.baseline!r} is not among the arms ({', '.join(self.arms)})")
        for name in self.arms:
            if not re.fullmatch(r"[\w.+-]+", name):
                raise ValueError(f"arms: {name!r} may hold letters, digits and . + - only")
        return self

    @property
    def steps_of_each(self) -> int:
        """Steps made for each configured one."""
        return _LONG if self.long else 1

    @property
    def reference(self) -> str:
        return self.baseline or next(iter(self.arms))
