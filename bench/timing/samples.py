"""What a list of measured times comes to. Pure: no clock, no device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """Median and the 20th and 80th percentile: what lies outside them is a machine's hiccups."""

    median: float
    low: float
    high: float
    samples: int


def percentile(values: Sequence[float], share: float) -> float:
    """Between the two nearest values, in proportion."""
    if not values or not 0 <= share <= 1:
        raise ValueError(f"expected values and a share of 0 to 1, got {len(values)} and {share}")
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def spread(values: Sequence[float]) -> Spread:
    low, median, high = (percentile(values, share) for share in (0.2, 0.5, 0.8))
    return Spread(median, low, high, len(values))
