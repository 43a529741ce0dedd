"""Ratio of two medians with a 95 % interval: a bootstrap over rounds.

Values of one round have the same noise (what else the machine did then), so what is drawn again is
rounds, each with both sides, and not single values. With a single round it is values.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from typing import Final, NamedTuple

RESAMPLES: Final = 1000

Rounds = Sequence[Sequence[float]]
"""What was measured, round by round."""


class Interval(NamedTuple):
    """An estimate, and between what it is with a probability of 95 %."""

    value: float
    low: float
    high: float


def pooled(rounds: Rounds) -> list[float]:
    return [value for one in rounds for value in one]


def p99(values: Sequence[float]) -> float:
    if len(values) == 1:
        return values[0]
    return statistics.quantiles(values, n=100, method="inclusive")[98]


def median_interval(rounds: Rounds, rng: random.Random) -> Interval:
    """Estimate a median."""
    return ratio_interval(rounds, [[1.0]] * len(rounds), rng)


def ratio_interval(ours: Rounds, other: Rounds, rng: random.Random) -> Interval:
    """
    Estimate the ratio of our median to another.

    Args:
        ours: The same number of rounds as `other`, each taken at about the same time.
        other: Likewise.
        rng: Draws; the same one gives the same interval.

    Raises:
        ValueError: there is nothing to compare.
    """
    pairs = [(mine, theirs) for mine, theirs in zip(ours, other, strict=False) if mine and theirs]
    if not pairs:
        raise ValueError("nothing was measured")
    draw = _draw_rounds if len(pairs) > 1 else _draw_values
    drawn = sorted(_ratio(draw(pairs, rng)) for _ in range(RESAMPLES))
    low, high = drawn[round(0.025 * (RESAMPLES - 1))], drawn[round(0.975 * (RESAMPLES - 1))]
    return Interval(_ratio(pairs), low, high)


Pairs = list[tuple[Sequence[float], Sequence[float]]]


def _ratio(pairs: Pairs) -> float:
    ours, other = zip(*pairs, strict=True)
    return statistics.median(pooled(ours)) / statistics.median(pooled(other))


def _draw_rounds(pairs: Pairs, rng: random.Random) -> Pairs:
    return rng.choices(pairs, k=len(pairs))


def _draw_values(pairs: Pairs, rng: random.Random) -> Pairs:
    def again(side: Sequence[float]) -> list[float]:
        return rng.choices(side, k=len(side))

    return [(again(mine), again(theirs)) for mine, theirs in pairs]
