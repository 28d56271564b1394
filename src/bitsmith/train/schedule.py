"""Learning-rate schedules as pure functions of (step, steps): a factor in (0, 1] of the peak rate.

Unlike torch.optim.lr_scheduler there is no state, so that a resumed run needs none, and the factor is never
0: a step at rate 0 would be paid for and do nothing. Warm-up is linear and the same for all schedules.
"""

from __future__ import annotations

import math
from collections.abc import Callable


def cosine(position: float, cooldown: float) -> float:
    """(1 + cos πt)/2, t = position."""
    return (1 + math.cos(math.pi * position)) / 2


def warmup_stable_decay(position: float, cooldown: float) -> float:
    """1, then linear to 0 over the last ``cooldown`` of the steps."""
    return min(1.0, (1 - position) / cooldown) if cooldown > 0 else 1.0


def constant(position: float, cooldown: float) -> float:
    """1."""
    return 1.0


SCHEDULES: dict[str, Callable[[float, float], float]] = {
    "cosine": cosine,
    "wsd": warmup_stable_decay,
    "constant": constant,
}


def learning_rate_factor(schedule: str, step: int, steps: int, *, warmup: float, cooldown: float) -> float:
    """Factor of the peak learning rate at ``step`` (from 0) of ``steps``.

    Warm-up of w = round(warmup·steps) steps: (step + 1)/(w + 1). Then the schedule at
    t = (step - w)/(steps - w) in [0, 1): the peak is reached at step w, and 0 would be at step ``steps``.
    ``cooldown`` is a share of all steps, so it is rescaled to the part after the warm-up.
    """
    rise = min(round(warmup * steps), steps - 1)
    if step < rise:
        return (step + 1) / (rise + 1)
    rest = steps - rise
    return SCHEDULES[schedule]((step - rise) / rest, min(1.0, cooldown * steps / rest))
