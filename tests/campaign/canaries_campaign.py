"""The part of a campaign that seeds bugs: each is found out by its layer, and how soon."""

from __future__ import annotations

import shlex
from typing import Final

from tests.campaign.canaries import BY_NAME, CANARIES, Canary, Layer
from tests.campaign.canaries_tree import CanaryResult
from tests.campaign.outcome import Discovery, Outcome, Task

SEEDS: Final = 20
"""How often a layer that draws at random is tried, each time with another seed."""


def tasks(scale: float) -> list[Task]:
    """One for each layer, with the canaries that it is there for; with less time, fewer seeds."""
    seeds = max(1, round(SEEDS * min(scale, 1.0)))
    found = [
        Task(name_of(layer), {"names": [c.name for c in CANARIES if c.layer == layer]})
        for layer in dict.fromkeys(canary.layer for canary in CANARIES)
    ]
    return found + [
        Task(f"{canary.name}, at random", {"names": [canary.name], "seeds": seeds})
        for canary in CANARIES
        if canary.also is not None
    ]


def run(seed: int, names: list[str], seeds: int = 0) -> Outcome:
    """Let a layer loose on the source as it is, and then on each canary; with seeds its second."""
    first = BY_NAME[names[0]]
    layer = first.also if seeds and first.also is not None else first.layer
    clean = layer.run(seed=seed)
    outcome = Outcome(seconds=clean.seconds)
    if clean.finding is not None:
        outcome.discoveries.append(_discovery(first, layer, f"finds something: {clean.finding}"))
    for canary in map(BY_NAME.__getitem__, names):
        found = [layer.run(canary.changes, seed + number) for number in range(max(1, seeds))]
        survived = _add(outcome, canary, layer, found) or clean.finding is not None
        more = {"canaries": not seeds, "survived": survived, "hunts": len(found)}
        for key, number in more.items():
            outcome.figures[key] = outcome.figures.get(key, 0.0) + float(number)
    return outcome


def _add(outcome: Outcome, canary: Canary, layer: Layer, found: list[CanaryResult]) -> bool:
    """Add what became of a canary, and say whether it survived."""
    caught = [verdict for verdict in found if verdict.finding is not None]
    is_killed = len(caught) == len(found)
    outcome.rows.append(
        {
            "canary": canary.name,
            "where it comes from": canary.origin,
            "layer": layer.name,
            "caught": f"{len(caught)} of {len(found)}" if is_killed else "SURVIVED",
            "seconds, at most": f"{max(verdict.seconds for verdict in found):.2f}",
            "finding": caught[0].finding or "" if caught else "",
        }
    )
    outcome.seconds += sum(verdict.seconds for verdict in found)
    if not is_killed:
        outcome.discoveries.append(_discovery(canary, layer, "does not see a bug that was seeded"))
    return not is_killed


def name_of(layer: Layer) -> str:
    """Name a layer with its arguments."""
    return f"{layer.name} {' '.join(map(str, layer.arguments))}".strip()


def _discovery(canary: Canary, layer: Layer, what: str) -> Discovery:
    return Discovery(f"the layer {layer.name} {what}", again(canary), culprit="campaign")


def again(canary: Canary) -> str:
    """Say how to run one canary alone, for a shell."""
    test = f"tests/campaign/test_canaries.py::test_a_canary_is_caught[{canary.name}]"
    return f"pytest {shlex.quote(test)}"
