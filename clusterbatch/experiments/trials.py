"""Which trials a comparison consists of, under numbers that do not depend on which of them are run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product

import xxhash

from clusterbatch.config import RunConfig, fingerprint, with_changes
from clusterbatch.experiments.arms import Arm
from clusterbatch.experiments.trial import Trial
from clusterbatch.runtime import Unit

UNTRAINED = "untrained"

# (learning rate, temperature)
Setting = tuple[float, float]


class Trials:
    """Trial 0 is the model as training starts from it; then come arms x settings x seeds."""

    def __init__(
        self, config: RunConfig, arms: Sequence[Arm], layouts: Mapping[str, RunConfig], steps: int, identity: str
    ) -> None:
        self._config, self._arms, self._layouts = config, arms, layouts
        self._steps, self._identity = steps, identity

    def settings(self, arm: Arm) -> list[Setting]:
        """What an arm's sweep goes through; without a sweep the one setting it has."""
        compare, train = self._config.compare, arm.config.train
        return list(
            product(compare.learning_rates or [train.learning_rate], compare.temperatures or [train.temperature])
        )

    def sweep(self) -> list[Unit]:
        """One seed of every setting, where there is more than one."""
        return [
            self._unit(position, choice, 0)
            for position, arm in enumerate(self._arms)
            for choice in range(len(self.settings(arm)))
            if len(self.settings(arm)) > 1
        ]

    def main(self, chosen: Mapping[str, Setting]) -> list[Unit]:
        """The untrained model, and every arm with its setting and all seeds."""
        reference = next(arm for arm in self._arms if arm.name == self._config.compare.reference)
        untrained = self._trial(reference, self.settings(reference)[0], 0, UNTRAINED, 0)
        units = [Unit(0, 0, untrained)]
        # Seed by seed: an interrupted comparison then has whole seeds of all arms.
        for seed in range(self._config.compare.seeds):
            for position, arm in enumerate(self._arms):
                units.append(self._unit(position, self.settings(arm).index(chosen[arm.name]), seed))
        return units

    def _unit(self, position: int, choice: int, seed: int) -> Unit:
        arm = self._arms[position]
        setting = self.settings(arm)[choice]
        seeds, settings = self._config.compare.seeds, len(self.settings(arm))
        name = f"{arm.name}.seed={seed}" if settings == 1 else f"{arm.name}.setting={choice}.seed={seed}"
        number = 1 + (position * settings + choice) * seeds + seed
        return Unit(number, self._steps, self._trial(arm, setting, seed, name, self._steps))

    def _trial(self, arm: Arm, setting: Setting, seed: int, name: str, steps: int) -> Trial:
        config = with_changes(
            arm.config,
            {
                "workspace": f"{self._config.workspace}/compare/runs/{name}",
                "reuse.clusters": self._layouts[arm.layout].workspace,
                "train.seed": seed,
                "batches.seed": seed,
                "train.learning_rate": setting[0],
                "train.temperature": setting[1],
            },
        )
        return Trial(name, arm.name, seed, steps, config, fingerprint("trial", self._identity, name))


def is_for_tuning(query: str) -> bool:
    """Whether a query belongs to the half on which settings are chosen; the verdict then rests on the other half."""
    return xxhash.xxh3_64_intdigest(query.encode()) % 2 == 0
