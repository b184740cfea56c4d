"""AdamW over the trainable parameters, and its learning rate.

The moments are laid out by name, so that they can be saved without pickle. The learning rate is a pure function of the
step, so nothing of it needs to be saved.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from clusterbatch.config import TrainConfig
from clusterbatch.training.lazy_rows import BETA1, BETA2, EPSILON, LazyRows

Schedule = Literal["linear", "cosine", "wsd", "constant"]
_MOMENTS = ("exp_avg", "exp_avg_sq")
# Of a table whose rows are updated lazily: steps that each row's moments have seen, and its weights after them.
_UPDATED, _WEIGHTS = "updated", "weights"


def learning_rate_factor(schedule: Schedule, step: int, steps: int, warmup: float, decay: float) -> float:
    """Return the factor of the peak learning rate at `step` (from 0) of `steps`.

    warmup: share of the steps that rises linearly from 1/n to 1. linear, cosine: falls to 0 after that. wsd
    (warmup-stable-decay, Hu 2024, MiniCPM): stays at 1, then falls linearly over the last share `decay`. constant:
    stays at 1.
    """
    rising = math.ceil(warmup * steps)
    if step < rising:
        return (step + 1) / rising
    if schedule == "constant":
        return 1.0
    if schedule == "wsd":
        falling = max(1, math.ceil(decay * steps))
        return min(1.0, (steps - step) / falling)
    left = (steps - step) / max(1, steps - rising)
    return left if schedule == "linear" else 0.5 * (1.0 - math.cos(math.pi * left))


class Optimizer:
    """Torch's fused AdamW: one pass over parameters and moments, on the CPU too.

    Of `tables` on a CPU, each step updates the rows that its batch touches, and the others when a batch needs them (see
    lazy_rows). So call `catch_up` before a batch reads the parameters; `current` returns tables as they are by now.
    """

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        config: TrainConfig,
        steps: int,
        rate: float,
        tables: Collection[str] = (),
    ) -> None:
        """`rate`: the peak learning rate; `steps`: of the whole run, over which the schedule stretches.

        tables: names of the parameters (V, d) of which a batch touches few rows.
        """
        self._parameters, self._config, self._steps, self._rate = parameters, config, steps, rate
        lazy = [name for name in tables if parameters[name].device.type == "cpu"]
        rates = np.array([self.learning_rate(step) for step in range(steps)]) if lazy else np.empty(0)
        self._tables = {name: LazyRows(parameters[name], rates, config.weight_decay) for name in lazy}
        # Biases, norms and the temperature are not weights to be kept small.
        others = [parameter for name, parameter in parameters.items() if name not in self._tables]
        groups = [
            {"params": [parameter for parameter in others if parameter.ndim > 1], "weight_decay": config.weight_decay},
            {"params": [parameter for parameter in others if parameter.ndim <= 1], "weight_decay": 0.0},
        ]
        self._adamw = torch.optim.AdamW(groups, lr=rate, betas=(BETA1, BETA2), eps=EPSILON, fused=True)
        # AdamW steps that the parameters have seen, those of earlier generations included.
        self._count = 0
        self._rows: Tensor | None = None

    def learning_rate(self, step: int) -> float:
        config = self._config
        factor = learning_rate_factor(config.schedule, step, self._steps, config.warmup, config.decay)
        return self._rate * factor

    def catch_up(self, step: int, rows: Tensor | None) -> None:
        """Bring what step `step` reads and updates up to date: distinct `rows` of the tables, None for all."""
        self._rows = rows
        for table in self._tables.values():
            table.catch_up(table.rows_to_update(rows, self._count), self._count, step)

    def step(self, step: int) -> float:
        """Update the parameters with the gradients of step `step` (from 0); return the learning rate used.

        All rows are up to date after the last step of the run.
        """
        rate = self.learning_rate(step)
        for group in self._adamw.param_groups:
            group["lr"] = rate
        self._adamw.step()
        for table in self._tables.values():
            table.update(table.rows_to_update(self._rows, self._count), self._count, rate)
        self._count += 1
        if step + 1 == self._steps:
            self.catch_up(step + 1, None)
        return rate

    def current(self, steps_done: int) -> dict[str, Tensor]:
        """Return the tables that are not up to date, by name, as they are after `steps_done` steps of the run."""
        return {
            name: table.current(self._count, steps_done)
            for name, table in self._tables.items()
            if not table.is_up_to_date(self._count)
        }

    def state(self) -> dict[str, Tensor]:
        """Return the live moments by '<moment>/<parameter>'; those of tables have a count for each row beside them."""
        return {
            f"{moment}/{name}": tensor for name in self._parameters for moment, tensor in self._moments_of(name).items()
        }

    def saved_state(self) -> dict[str, Tensor]:
        """Return what `load` needs to continue with the same bits: `state`, and the weights of rows not up to date."""
        state = self.state()
        for name, table in self._tables.items():
            if table.is_up_to_date(self._count):
                del state[f"{_UPDATED}/{name}"]
            else:
                state[f"{_WEIGHTS}/{name}"] = table.table.detach()
        return state

    def blank_state(self) -> dict[str, Tensor]:
        """Return moments of zero by the same names, as `state` has them after a step."""
        blank = {}
        for name, parameter in self._parameters.items():
            blank.update({f"{moment}/{name}": torch.zeros_like(parameter) for moment in _MOMENTS})
            if name in self._tables:
                blank[f"{_UPDATED}/{name}"] = torch.zeros_like(self._tables[name].updated)
        return blank

    def load(self, state: dict[str, Tensor], steps_done: int) -> None:
        """Take over copies of the moments `state` or `saved_state`, which have seen `steps_done` steps."""
        self._count = steps_done
        for name, parameter in self._parameters.items():
            if f"{_MOMENTS[0]}/{name}" not in state:
                continue
            moments = [state[f"{moment}/{name}"] for moment in _MOMENTS]
            if name in self._tables:
                updated, weights = state.get(f"{_UPDATED}/{name}"), state.get(f"{_WEIGHTS}/{name}")
                self._tables[name].load(moments[0], moments[1], updated, weights, steps_done)
                continue
            first, second = (moment.to(parameter.device, copy=True) for moment in moments)
            if f"{_UPDATED}/{name}" in state:
                # A table whose rows were updated lazily, on another device: the moments of each have decayed since.
                missed = (steps_done - state[f"{_UPDATED}/{name}"].to(parameter.device))[:, None]
                first *= BETA1**missed
                second *= BETA2**missed
            # Torch counts the steps of each parameter in a float32 tensor beside it.
            count = torch.tensor(float(steps_done), device=parameter.device)
            self._adamw.state[parameter] = {"step": count, _MOMENTS[0]: first, _MOMENTS[1]: second}

    def _moments_of(self, name: str) -> dict[str, Tensor]:
        if name in self._tables:
            table = self._tables[name]
            return {_MOMENTS[0]: table.first_moment, _MOMENTS[1]: table.second_moment, _UPDATED: table.updated}
        state = self._adamw.state.get(self._parameters[name], {})
        return {moment: state[moment] for moment in _MOMENTS if moment in state}
