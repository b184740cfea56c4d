"""The learning rate as a pure function of the step, so that nothing of it needs to be saved."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["linear", "cosine", "wsd", "constant"]


def learning_rate_factor(schedule: Schedule, step: int, steps: int, warmup: float, decay: float) -> float:
    """What the peak learning rate is multiplied with at `step` (from 0) of `steps`.

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
