"""Losses far above what was usual: pure functions of the last losses.

Usual is the median of the last iterations, give or take robust standard deviations (1.4826 times
the median distance from the median, which outliers do not move). A curve that falls never rises
above its own past, so the start of a training gives no alarm.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

MIN_LOSSES = 20
"""Losses that are needed before one is judged."""

_NORMAL = 1.4826  # standard deviations of a normal distribution in its median distance
_LEAST_SPREAD = 0.01  # of the median: on a curve without noise a tiny rise is no spike


@dataclass(frozen=True, kw_only=True)
class Usual:
    """What the losses of the last iterations were like."""

    median: float
    spread: float
    """Robust standard deviation, at least a hundredth of the median."""
    num_losses: int
    """How many were looked at."""

    def limit(self, factor: float) -> float:
        """The loss above which it is a spike."""
        return self.median + factor * self.spread


def usual_losses(losses: Sequence[float]) -> Usual | None:
    """Say what is usual; None where there are fewer than `MIN_LOSSES`.

    Args:
        losses: of the last iterations; those that are not finite are left out.
    """
    finite = [loss for loss in losses if math.isfinite(loss)]
    if len(finite) < MIN_LOSSES:
        return None
    middle = median(finite)
    distance = median(abs(loss - middle) for loss in finite)
    spread = max(_NORMAL * distance, _LEAST_SPREAD * abs(middle))
    return Usual(median=middle, spread=spread, num_losses=len(finite))


def find_spike(losses: Sequence[float], loss: float, factor: float) -> Usual | None:
    """Judge a loss by those before it.

    Args:
        losses: of the iterations before, any number.
        loss: of this one.
        factor: robust standard deviations above the median that are too much; 0: none is.

    Returns:
        What is usual, if the loss is a spike; otherwise None. A loss that is not finite is none:
        its iteration is left out, and reported elsewhere.
    """
    usual = usual_losses(losses) if factor > 0 and math.isfinite(loss) else None
    return usual if usual is not None and loss > usual.limit(factor) else None
