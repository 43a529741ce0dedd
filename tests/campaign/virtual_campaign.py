"""Drivers in a virtual world, as a part of a verification campaign: two preemptions, and chance."""

from __future__ import annotations

import logging
import time
from typing import Final

from tests.campaign.outcome import Discovery, Outcome, Task
from tests.suites.virtual.lives import LIVES
from transport.testing.virtual.choices import BrokenRun, Explored, explore, sample

ORDERS: Final = 1_000
"""Of each life: how many of the orders with at most two preemptions are run at scale 1.0."""

SEEDS: Final = 250
"""And how many at random."""

DEPTH: Final = 1_000
"""More choices than a life has."""

APART: Final = 1_000_000_000
"""How far the seeds of two campaigns are apart."""


def tasks(scale: float) -> list[Task]:
    """Return the lives, each in every order and at random."""
    orders, seeds = max(50, int(ORDERS * scale)), max(20, int(SEEDS * scale))
    return [
        *(Task(f"{name}, in order", {"name": name, "orders": orders}) for name in LIVES),
        *(Task(f"{name}, at random", {"name": name, "seeds": seeds}) for name in LIVES),
    ]


def run(seed: int, name: str, orders: int = 0, seeds: int = 0) -> Outcome:
    """Live one of them often."""
    began, life = time.monotonic(), LIVES[name]
    logging.disable()  # fallbacks and lies by the thousand, all of them meant
    try:
        if orders:
            explored = explore(life.run, 2, DEPTH, orders, life.replay)
        else:
            first = seed * APART
            explored = sample(life.run, range(first, first + seeds), replay=life.replay)
    except BrokenRun as broken:
        return Outcome(discoveries=[Discovery(f"{name}: {broken.finding}", str(broken))])
    return _outcome(name, explored, bool(orders), time.monotonic() - began)


def _outcome(name: str, explored: Explored, is_ordered: bool, seconds: float) -> Outcome:
    return Outcome(
        figures={
            "orders of steps": float(explored.runs),
            "choices": float(explored.choices),
            "lives in every order": float(is_ordered and explored.is_complete),
        },
        rows=[
            {
                "life": name,
                "chosen": "in order" if is_ordered else "at random",
                "runs": f"{explored.runs:,}",
                "choices": f"{explored.choices:,}",
                "all of them": "yes" if is_ordered and explored.is_complete else "no",
                "seconds": f"{seconds:.1f}",
            }
        ],
        seconds=seconds,
    )
