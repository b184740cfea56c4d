"""AdamW over the trainable parameters, and its learning rate.

The moments are laid out by name, so that they can be saved without pickle. The learning rate is a pure function of the
step, so nothing of it needs to be saved.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from clusterbatch.config import TrainConfig

Schedule = Literal["linear", "cosine", "wsd", "constant"]
_MOMENTS = ("exp_avg", "exp_avg_sq")


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
    """Torch's fused AdamW: one pass over parameters and moments, on the CPU too."""

    def __init__(self, parameters: dict[str, nn.Parameter], config: TrainConfig, steps: int, rate: float) -> None:
        """`rate`: the peak learning rate; `steps`: of the whole run, over which the schedule stretches."""
        self._parameters, self._config, self._steps, self._rate = parameters, config, steps, rate
        # Biases, norms and the temperature are not weights to be kept small.
        decayed = [parameter for parameter in parameters.values() if parameter.ndim > 1]
        others = [parameter for parameter in parameters.values() if parameter.ndim <= 1]
        groups = [
            {"params": decayed, "weight_decay": config.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        self._adamw = torch.optim.AdamW([group for group in groups if group["params"]], lr=rate, fused=True)

    def learning_rate(self, step: int) -> float:
        config = self._config
        factor = learning_rate_factor(config.schedule, step, self._steps, config.warmup, config.decay)
        return self._rate * factor

    def step(self, step: int) -> float:
        """Update the parameters with the gradients of step `step` (from 0); return the learning rate used."""
        rate = self.learning_rate(step)
        for group in self._adamw.param_groups:
            group["lr"] = rate
        self._adamw.step()
        return rate

    def state(self) -> dict[str, Tensor]:
        """Return the live moments by '<moment>/<parameter>'; empty before the first step."""
        return {
            f"{moment}/{name}": self._adamw.state[parameter][moment]
            for name, parameter in self._parameters.items()
            if parameter in self._adamw.state
            for moment in _MOMENTS
        }

    def blank_state(self) -> dict[str, Tensor]:
        """Return moments of zero by the same names, as `state` has them after a step."""
        return {
            f"{moment}/{name}": torch.zeros_like(parameter)
            for name, parameter in self._parameters.items()
            for moment in _MOMENTS
        }

    def load(self, state: dict[str, Tensor], steps_done: int) -> None:
        """Take over copies of the moments `state`, which have seen `steps_done` steps."""
        for name, parameter in self._parameters.items():
            if f"{_MOMENTS[0]}/{name}" not in state:
                continue
            moments = {moment: state[f"{moment}/{name}"].to(parameter.device, copy=True) for moment in _MOMENTS}
            # Torch counts the steps of each parameter in a float32 tensor beside it.
            count = torch.tensor(float(steps_done), device=parameter.device)
            self._adamw.state[parameter] = {"step": count, **moments}
