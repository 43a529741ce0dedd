"""Kernel and model in open environments: a part of a campaign, to the end of larger ones.

The same whatever the seed. At a larger scale the larger environments come in.
"""

from __future__ import annotations

import time
from typing import Final

from statemachine.provider import Limits
from statemachine.testing.kit import ViolatingPath
from statemachine.testing.open_environment import OpenEnvironment
from statemachine.testing.open_lockstep import compare
from tests.campaign.outcome import Discovery, Outcome, Task

LIMITS: Final = Limits(allowed_uids=frozenset({0, 1}), open_per_connection=1, allocations_per_uid=1)
"""So low that two users reach them."""

SPACES: Final[dict[str, tuple[float, OpenEnvironment]]] = {
    "1 x 2, 2": (0.0, OpenEnvironment(1, 2, 2)),
    "1 x 1, 2, starts and stops and dies": (0.0, OpenEnvironment(1, 1, 2, True, True)),
    "2 x 1, 2, limits of two users": (0.0, OpenEnvironment(2, 1, 2, limits=LIMITS)),
    "1 x 2, 1, images, refusals": (0.0, OpenEnvironment(1, 2, 1, images=True, refusals=True)),
    "2 x 1, 2": (1.0, OpenEnvironment(2, 1, 2)),
    "1 x 2, 2, limits, images, refusals": (
        1.0,
        OpenEnvironment(1, 2, 2, limits=LIMITS, images=True, refusals=True),
    ),
    "1 x 2, 1, starts and stops and dies": (1.0, OpenEnvironment(1, 2, 1, True, True)),
    "2 x 2, 1": (4.0, OpenEnvironment(2, 2, 1)),
}
"""By allocations x connections, and messages of a connection: from which scale on, and what."""


def tasks(scale: float) -> list[Task]:
    found = {name: space for name, (least, space) in SPACES.items() if least <= scale}
    return [
        Task(name, {"name": name}, is_long=space.connections > 1) for name, space in found.items()
    ]


def run(seed: int, name: str) -> Outcome:
    """Go through an environment to its end."""
    began = time.monotonic()
    try:
        compared = compare(SPACES[name][1])
    except ViolatingPath as found:
        again = f"python -c 'from tests.campaign.open_campaign import run; run(0, {name!r})'"
        return Outcome(discoveries=[Discovery(f"{name}: {found}", again)])
    seconds = time.monotonic() - began
    return Outcome(
        figures={
            "kernel snapshots": float(compared.snapshots),
            "kernel steps": float(compared.steps),
            "refused events": float(compared.refused),
        },
        rows=[
            {
                "allocations x connections, messages": name,
                "kernel snapshots": f"{compared.snapshots:,}",
                "kernel steps": f"{compared.steps:,}",
                "refused events": f"{compared.refused:,}",
                "pairs": f"{compared.pairs:,}",
                "left out": ", ".join(compared.left_out) or "nothing",
                "seconds": f"{seconds:.1f}",
            }
        ],
        seconds=seconds,
    )
