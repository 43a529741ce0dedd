"""The simulation against Linux, as a part of a verification campaign: programs by the thousand."""

from __future__ import annotations

import time
from typing import Final

from tests.campaign.outcome import Discovery, Outcome, Task
from tests.suites.fidelity.differential import FAMILIES, comparing, script, search

PROGRAMS: Final = {
    "sockets": (100_000, 10_000),
    "cgroups": (4_000, 2_000),
    "namespaces": (2_000, 1_000),
    "mounts": (1_500, 500),
    "backends": (800, 50),
}
"""Of each family: how many programs at scale 1.0, and how many a task has."""

SEEDS: Final = 1_000_000_000
"""How far the seeds of two campaigns are apart."""


def tasks(scale: float) -> list[Task]:
    """Return every family's programs, in chunks."""
    return [
        Task(f"{family} {first}", {"family": family, "first": first, "programs": chunk})
        for family, (programs, chunk) in PROGRAMS.items()
        for first in range(0, max(chunk, int(programs * scale)), chunk)
    ]


def run(seed: int, family: str, first: int, programs: int) -> Outcome:
    """Run one chunk."""
    began = time.monotonic()
    kind = FAMILIES[family]
    seeds = range(seed * SEEDS + first, seed * SEEDS + first + programs)
    with comparing(kind) as comparison:
        found = [
            Discovery(
                f"{family}: {finding.difference}",
                f"# seed {finding.seed}\n{script(kind, finding.program)}",
                culprit="simulation",
            )
            for finding in search(comparison, seeds)
        ]
    figures = {
        f"{kind.singular} programs": float(comparison.programs),
        "calls that agreed": float(comparison.cells.total()),
        "differences": float(len(found)),
    }
    return Outcome(figures=figures, discoveries=found, seconds=time.monotonic() - began)
