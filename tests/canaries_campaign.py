"""The part of a campaign that seeds bugs: each is found out by its layer, and how soon."""

from __future__ import annotations

from typing import Final

from canaries import BY_NAME, CANARIES, Canary
from outcome import Discovery, Outcome, Task

SEEDS: Final = 20
"""How often a layer that draws at random is tried, each time with another seed."""


def tasks(scale: float) -> list[Task]:
    """One for each canary; with more time, more seeds."""
    seeds = max(1, round(SEEDS * min(scale, 1.0)))
    return [
        Task(canary.name, {"name": canary.name, "seeds": seeds if canary.layer.is_seeded else 1})
        for canary in CANARIES
    ]


def run(seed: int, name: str, seeds: int) -> Outcome:
    """Let a canary's layer loose on the source as it is, and then on the canary."""
    canary = BY_NAME[name]
    clean = canary.layer.unleash(seed=seed)
    found = [canary.layer.unleash(canary.changes, seed + number) for number in range(seeds)]
    caught = [verdict for verdict in found if verdict.finding is not None]
    is_killed = clean.finding is None and len(caught) == len(found)
    outcome = Outcome(
        figures={"canaries": 1, "canaries caught": is_killed, "hunts for canaries": len(found)},
        rows=[
            {
                "canary": name,
                "where it comes from": canary.origin,
                "layer": canary.layer.name,
                "caught": f"{len(caught)} of {len(found)}" if is_killed else "SURVIVED",
                "seconds, at most": f"{max(verdict.seconds for verdict in found):.2f}",
                "finding": caught[0].finding or "" if caught else "",
            }
        ],
        seconds=clean.seconds + sum(verdict.seconds for verdict in found),
    )
    if clean.finding is not None:
        outcome.discoveries.append(_discovery(canary, f"finds something, too: {clean.finding}"))
    elif not is_killed:
        outcome.discoveries.append(_discovery(canary, "does not see a bug that was seeded"))
    return outcome


def _discovery(canary: Canary, what: str) -> Discovery:
    command = f"pytest tests/test_canaries.py -k {canary.name!r}"
    return Discovery(f"the layer {canary.layer.name} {what}", command)
