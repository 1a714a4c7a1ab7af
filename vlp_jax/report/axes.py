"""From values to places on a drawing: ticks, scales, fewer points."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

MOST_POINTS = 300  # of a curve on the page
_LOG_FROM = 50.0  # ratio of the largest and the smallest value from which a log scale is taken


@dataclasses.dataclass(frozen=True)
class Scale:
    """Values from `low` to `high` on places from `start` to `end`, linear or by their logarithm."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (
            (math.log10(v) for v in (self.low, self.high, value))
            if self.log
            else (self.low, self.high, value)
        )
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self, count: int = 4) -> list[float]:
        """Round values inside, in order."""
        if not self.log:
            return nice_ticks(self.low, self.high, count)
        first, last = math.ceil(math.log10(self.low)), math.floor(math.log10(self.high))
        decades = [10.0**power for power in range(first, last + 1)]
        if len(decades) < 2:
            found = {
                digit * 10.0**power for power in range(first - 1, last + 1) for digit in (1, 2, 5)
            }
            return sorted(value for value in found if self.low <= value <= self.high)
        return decades[:: max(1, len(decades) // count)]


def fit(values: Sequence[float], start: float, end: float, log: bool = False) -> Scale:
    """The scale on which `values`, of which at least one is finite, have room."""
    finite = [v for v in values if math.isfinite(v)]
    low, high = min(finite), max(finite)
    if log and low > 0 and high > low:
        return Scale(low / 1.1, high * 1.1, start, end, log=True)
    if low == high:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    room = 0.04 * (high - low)
    return Scale(0.0 if 0 <= low < 0.5 * high else low - room, high + room, start, end)


def wants_log(values: Sequence[float]) -> bool:
    """Whether values span so much that a linear scale would hide most of them."""
    finite = [v for v in values if math.isfinite(v)]
    return bool(finite) and min(finite) > 0 and max(finite) / min(finite) >= _LOG_FROM


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` multiples of 1, 2 or 5 times a power of ten, from `low` to `high`."""
    rough = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(f * power for f in (1, 2, 5, 10) if f * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(n * step, 12) for n in range(first, last + 1)]


def thinned(
    steps: Sequence[float], values: Sequence[float], most: int = MOST_POINTS
) -> tuple[Float[np.ndarray, " points"], Float[np.ndarray, " points"]]:
    """At most `most` points of a curve, among them its highest and lowest all along.

    Values that are not finite are left out.
    """
    x, y = np.asarray(steps, float), np.asarray(values, float)
    keep = np.isfinite(y)
    x, y = x[keep], y[keep]
    if len(x) <= most:
        return x, y
    chosen = {0, len(x) - 1}
    for part in np.array_split(np.arange(len(x)), (most - 2) // 2):
        chosen |= {int(part[y[part].argmin()]), int(part[y[part].argmax()])}
    order = sorted(chosen)
    return x[order], y[order]
