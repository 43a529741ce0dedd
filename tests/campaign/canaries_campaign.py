"""The part of a campaign that seeds bugs: each is found out by its layer, and how soon."""

from __future__ import annotations

import shlex
from typing import Final

from tests.campaign.canaries import BY_NAME, CANARIES, Canary, Layer
from tests.campaign.outcome import Discovery, Outcome, Task

SEEDS: Final = 20
"""How often a layer that draws at random is tried, each time with another seed."""


def tasks(scale: float) -> list[Task]:
    """One for each canary and layer; with less time, fewer seeds."""
    seeds = max(1, round(SEEDS * min(scale, 1.0)))
    found = [Task(canary.name, {"name": canary.name, "seeds": 1}) for canary in CANARIES]
    return found + [
        Task(f"{canary.name}, at random", {"name": canary.name, "seeds": seeds, "is_also": True})
        for canary in CANARIES
        if canary.also is not None
    ]


def run(seed: int, name: str, seeds: int, is_also: bool = False) -> Outcome:
    """Let a canary's layer loose on the source as it is, and then on the canary."""
    canary = BY_NAME[name]
    layer = canary.also if is_also and canary.also is not None else canary.layer
    clean = layer.run(seed=seed)
    found = [layer.run(canary.changes, seed + number) for number in range(seeds)]
    caught = [verdict for verdict in found if verdict.finding is not None]
    is_killed = clean.finding is None and len(caught) == len(found)
    outcome = Outcome(
        figures={
            "canaries": float(not is_also),
            "survived": float(not is_killed),
            "hunts": float(len(found)),
        },
        rows=[
            {
                "canary": name,
                "where it comes from": canary.origin,
                "layer": layer.name,
                "caught": f"{len(caught)} of {len(found)}" if is_killed else "SURVIVED",
                "seconds, at most": f"{max(verdict.seconds for verdict in found):.2f}",
                "finding": caught[0].finding or "" if caught else "",
            }
        ],
        seconds=clean.seconds + sum(verdict.seconds for verdict in found),
    )
    if clean.finding is not None:
        outcome.discoveries.append(_discovery(canary, layer, f"finds something: {clean.finding}"))
    elif not is_killed:
        outcome.discoveries.append(_discovery(canary, layer, "does not see a bug that was seeded"))
    return outcome


def _discovery(canary: Canary, layer: Layer, what: str) -> Discovery:
    return Discovery(f"the layer {layer.name} {what}", again(canary))


def again(canary: Canary) -> str:
    """Say how to run one canary alone, for a shell."""
    test = f"tests/campaign/test_canaries.py::test_a_canary_is_caught[{canary.name}]"
    return f"pytest {shlex.quote(test)}"
