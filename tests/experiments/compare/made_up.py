"""A comparison with known differences, without training anything."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from clusterbatch.config.compare import DecideConfig
from clusterbatch.experiments.compare.costs import Cost
from clusterbatch.experiments.compare.results import ArmResult, Comparison
from clusterbatch.experiments.compare.statistics import (
    Training,
    decide,
    difference,
    holm,
    mean_spread,
    randomisation_p,
)
from clusterbatch.store.traffic import Traffic

METRIC = "NDCG@10"


def made_up_comparison(effects: dict[str, float], hours: dict[str, float] | None = None, **options: Any) -> Comparison:
    """Arms by name with their true gains over the first, on two collections; ids name the sources `one` and `two`.

    hours: of training, by arm. options: those of `_made_up`. Made once for the same arguments, as the statistics take
    a second.
    """
    return _made_up(tuple(effects.items()), tuple((hours or {}).items()), **options)


@cache
def _made_up(
    of_arms: tuple[tuple[str, float], ...],
    of_training: tuple[tuple[str, float], ...],
    *,
    seeds: int = 3,
    queries: int = 400,
    rule: DecideConfig | None = None,
    noise: float = 1.0,
    training: Training | None = None,
    priced: bool = True,
) -> Comparison:
    effects, hours = dict(of_arms), dict(of_training)
    rng = np.random.default_rng(0)
    collections = ["indoors", "outdoors"]
    # Without noise no difference varies, not even in its last bits.
    ability = {name: rng.beta(2, 2, queries) if noise else np.full(queries, 0.5) for name in collections}
    scores = {
        arm: {
            (name, METRIC): np.clip(
                ability[name]
                + effect
                + noise * 0.05 * rng.normal(size=(1, queries))
                + noise * 0.002 * rng.normal(size=(seeds, queries)),
                0,
                1,
            )
            for name in collections
        }
        for arm, effect in effects.items()
    }
    reference = next(iter(effects))

    def of(arm: str) -> list[np.ndarray]:
        return [scores[arm][name, METRIC] for name in collections]

    gains = {arm: difference(of(arm), of(reference)) for arm in effects if arm != reference}
    corrected = dict(zip(gains, holm([gain.p_value() for gain in gains.values()]), strict=True))
    steps = np.array([0, 40, 80, 120])
    arms = [
        ArmResult(
            name=arm,
            spread=mean_spread(of(arm)),
            gain=gains.get(arm),
            verdict=decide(gains[arm], 0.4, len(gains), rule or DecideConfig(), training) if arm in gains else None,
            p_randomisation=randomisation_p(of(arm), of(reference)) if arm in gains else None,
            p_corrected=corrected.get(arm),
            by_collection={
                name: difference([a], [b]) for name, a, b in zip(collections, of(arm), of(reference), strict=True)
            },
            curve=np.stack(
                [np.full(seeds, 0.4) + share * (mean_spread(of(arm)).mean - 0.4) for share in (0, 0.6, 0.9, 1)]
            ),
            losses=[[40.0, 2.0], [120.0, 1.0]],
            training=training or Training(2.0, rising=False),
            stratify="random" if arm.startswith("random") else "source" if arm == "source" else "cluster",
            pairs=120 * 64,
            batch=64,
            purity=0.9,
            hardness=0.5,
            setting={"learning_rate": 0.005, "temperature": 0.05},
            changes={},
            cost=Cost(
                60.0,
                0.0 if arm == reference else 30.0,
                hours.get(arm, 0.02),
                0.0,
                0.05 * hours.get(arm, 0.02) if priced else None,
                0.0008 if priced else None,
                Traffic(reads=900, writes=40, bytes_read=3 * 2**20),
                "cpu",
            ),
        )
        for arm, effect in effects.items()
    ]
    ids = [f"{'one' if number % 2 else 'two'}-q{number:016x}" for number in range(queries)]
    return Comparison(
        METRIC,
        reference,
        collections,
        steps,
        0.4,
        arms,
        scores,
        dict.fromkeys(collections, ids),
        False,
        rule or DecideConfig(),
    )
