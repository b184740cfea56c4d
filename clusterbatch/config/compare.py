"""`compare`: batch strategies on the same data, steps and masks; and what decides between them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field, model_validator

from clusterbatch.config.base import Section, added, operational

# As a value of cluster.mean_size and batches.clusters_per_batch: batches as hard as those of clusters.
MATCHED = "matched"
# As the steps of a phase of batches.curriculum: half of the comparison's steps.
HALF = "half"
# Keys of which all runs of a comparison, and of a rung of `tune`, have the same value, whatever an arm says.
ALIKE = ("train.steps", "train.epochs", "train.seed", "batches.seed")
# Times the steps that a long comparison has.
_LONG = 3
_MASK = {"train.mask.surrogate_margin": -0.05, "train.mask.surrogate_relative": True}
_STRATEGIES = {"random": "random", "source": "source", "cluster": "cluster", "random-groups": "random_groups"}

# Built-in arms by name, each with its changes of the configuration. Masks for every strategy: if only one had them, it
# would gain by the mask, not by its batches. random-groups: groups of the clusters' sizes with any rows of the source,
# which tells hardness from grouping. random-mined: one mined hard negative a row beside random in-batch ones (ANCE),
# the method to compare clusters with. random-4x: more pairs in the same number of steps, for the money of clusters.
BUILT_IN: Mapping[str, dict[str, Any]] = {
    **{name: {"batches.stratify": strategy} for name, strategy in _STRATEGIES.items()},
    **{f"{name}-masked": {"batches.stratify": strategy, **_MASK} for name, strategy in _STRATEGIES.items()},
    "random-mined": {"batches.stratify": "random", "mine.negatives": 1},
    "random-4x": {"batches.stratify": "random", "batches.size": "4x"},
}


@cache
def recipes() -> Mapping[str, dict[str, Any]]:
    """Return the arms that are kept as files, `arms/NAME.yaml` beside this module, by name, sorted."""
    folder = files("clusterbatch.config") / "arms"
    named = {file.name.removesuffix(".yaml"): file for file in folder.iterdir() if file.name.endswith(".yaml")}
    return {name: yaml.safe_load(named[name].read_text(encoding="utf-8")) for name in sorted(named)}


def _changes(name: object) -> dict[str, Any]:
    """Return what the arm of that name changes. Raises ValueError, which pydantic reports, for an unknown name."""
    if isinstance(name, str) and (name in BUILT_IN or name in recipes()):
        return dict(BUILT_IN.get(name) or recipes()[name])
    raise ValueError(
        f"no arm is called {name!r} (built in: {', '.join(BUILT_IN)}; recipes: {', '.join(recipes())}; "
        "or give name: overrides)"
    )


def _arms(value: object) -> object:
    names = [value] if isinstance(value, str) else value
    if isinstance(names, list):
        return {str(name): _changes(name) for name in names}
    if isinstance(names, dict):
        return {name: _changes(name) if changes is None else changes for name, changes in names.items()}
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
    """Largest extra cost as a share of the baseline's own (1.0: twice as much in total), embedding and clustering
    included: at `compare.prices`, or in worker hours if nothing has a price. Unset: cost does not decide."""
    confidence: float = Field(0.95, gt=0.5, lt=1)
    """Confidence of the intervals of all arms together; each arm's own level is higher, the more arms there are."""


class PricesConfig(Section):
    """Prices in `currency`, for `--dry-run`, `compare` and `tune`; without any, costs are worker hours and requests.

    Once one is given, those that are unset count as nothing. `decide.max_cost` only needs their ratios.
    """

    cpu_hour: float | None = operational(None, ge=0)
    """Price of an hour of one CPU worker."""
    gpu_hour: float | None = operational(None, ge=0)
    """Price of an hour of one GPU worker."""
    million_reads: float | None = operational(None, ge=0)
    """Price of a million read requests to storage."""
    million_writes: float | None = operational(None, ge=0)
    """Price of a million write requests to storage."""
    gibibyte_read: float | None = operational(None, ge=0)
    """Price of a gibibyte read from storage; none for a bucket in the workers' region."""
    terabyte_month: float | None = operational(None, ge=0)
    """Price of storing a terabyte (10^12 bytes) for a month."""
    currency: str = operational("USD")
    """Currency of all prices."""

    @property
    def known(self) -> bool:
        """Return whether any work or request has a price; the price of storing decides nothing."""
        return any((self.cpu_hour, self.gpu_hour, self.million_reads, self.million_writes, self.gibibyte_read))

    def of(self, seconds: float, *, gpu: bool, reads: float = 0, writes: float = 0, bytes_read: float = 0) -> float:
        """Return the price of so many worker seconds and requests; unset prices count as nothing."""
        hourly = (self.gpu_hour if gpu else self.cpu_hour) or 0.0
        requests = reads / 1e6 * (self.million_reads or 0.0) + writes / 1e6 * (self.million_writes or 0.0)
        return seconds / 3600 * hourly + requests + bytes_read / 2**30 * (self.gibibyte_read or 0.0)


class CompareConfig(Section):
    """Arms, seeds and length of a comparison, and the rule that decides."""

    arms: Annotated[dict[str, dict[str, Any]], BeforeValidator(_arms)] = Field(
        ["random", "source", "cluster", "random-groups", "super-16x"], validate_default=True
    )
    """Names of built-in arms and recipes, or name: {dotted.key: value}."""
    baseline: str | None = None
    """Arm that the others are measured against. Unset: the first."""
    seeds: int = Field(3, ge=1)
    """Runs of each arm; seeds 0 to n - 1 replace `train.seed` and `batches.seed`."""
    batch_sizes: list[Annotated[int, Field(ge=2)]] = operational([])
    """Batch sizes to compare the arms at, each a comparison of its own with the same epochs; the report shows gain
    against batch size. Unset: `batches.size` alone."""
    sample: float | None = Field(None, gt=0, le=1)
    """Share of the corpus to compare on. Unset: all of it."""
    sample_by: Literal["neighbourhoods", "uniform"] = "neighbourhoods"
    """`neighbourhoods` takes whole coarse neighbourhoods of every source, as dense as in the corpus; `uniform` takes
    any rows."""
    budget: Annotated[float | None, BeforeValidator(_seconds)] = Field(None, ge=60)
    """Seconds (or 15m, 2h) that the comparison may take: steps, points and, if it is unset, `sample` are then chosen to
    fit this machine."""
    steps: int | None = Field(None, ge=1)
    """Optimizer steps of every run. Unset: the baseline's `train.steps` or `train.epochs`."""
    long: bool = False
    """Train three times the steps: late gains need time to show."""
    points: int = Field(5, ge=1)
    """Points of the learning curves, evenly spaced; the last is the end."""
    learning_rates: list[Annotated[float, Field(gt=0)]] = []
    """Learning rates of each arm's own sweep: the best pair on half of the queries, which then do not count, is used.
    """
    temperatures: list[Annotated[float, Field(gt=0)]] = []
    """Temperatures of the same sweep."""
    sweep: Literal["each", "baseline"] = added("each")
    """The sweep that chooses: `each` arm's own, or the `baseline`'s for all arms."""
    decide: DecideConfig = DecideConfig()
    """The rule that decides."""
    prices: PricesConfig = PricesConfig()
    """Prices of hours, requests and storage."""
    workers: int = operational(2, ge=1)
    """Runs side by side."""

    @model_validator(mode="after")
    def _consistent(self) -> CompareConfig:
        if len(self.arms) < 2:
            raise ValueError("arms: give at least two")
        if self.baseline is not None and self.baseline not in self.arms:
            raise ValueError(f"baseline: {self.baseline!r} is not among the arms ({', '.join(self.arms)})")
        if self.batch_sizes and (self.budget is not None or self.steps is not None):
            raise ValueError("batch_sizes: every size trains for the same epochs (train.epochs); no budget, no steps")
        if len(set(self.batch_sizes)) < len(self.batch_sizes):
            raise ValueError("batch_sizes: one is named twice")
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
