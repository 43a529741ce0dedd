"""What a campaign says first: what was not reached or not run, and what was found of which kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from tests.campaign.outcome import Culprit
from tests.campaign.report_goals import GoalStatus, goals_of, is_good
from tests.campaign.report_summary import Summary

NAMED_MAX: Final = 4
"""So many figures are named in the first line; of more it is said how many."""

FINDINGS: Final[dict[Culprit, tuple[str, str]]] = {
    "promise": ("1 promise is broken", "{} promises are broken"),
    "simulation": (
        "1 difference between the simulation and Linux",
        "{} differences between the simulation and Linux",
    ),
    "campaign": (
        "1 fault of the campaign itself, which may hide others",
        "{} faults of the campaign itself, which may hide others",
    ),
}


@dataclass(frozen=True)
class OpeningLines:
    """The first lines of the page, and the colour that they deserve."""

    missing: str
    """What was not reached, not measured, not run; empty: nothing is missing."""
    found: str
    """What was found."""
    colour: Literal["good", "short", "bad"]


def opening_of(summary: Summary, not_run: Sequence[str] = ()) -> OpeningLines:
    """
    Say what is missing and what was found.

    Args:
        summary: of the campaign.
        not_run: the parts that were not asked for.
    """
    goals = goals_of(summary)
    missing = [
        f"{status.value}: {_named([goal.figure for goal in goals if goal.verdict is status])}"
        for status in (GoalStatus.NOT_REACHED, GoalStatus.NOT_MEASURED)
        if any(goal.verdict is status for goal in goals)
    ]
    if not_run:
        missing.append(f"not run: {_named(not_run)}")
    said = "; ".join(missing)
    colour: Literal["good", "short", "bad"] = "short" if missing else "good"
    if not is_good(summary):
        colour = "bad"
    return OpeningLines(said[:1].upper() + said[1:], _found(summary), colour)


def _named(names: Sequence[str]) -> str:
    if len(names) <= NAMED_MAX:
        return ", ".join(names)
    return f"{', '.join(names[:NAMED_MAX])} and {len(names) - NAMED_MAX} more"


def _found(summary: Summary) -> str:
    said = []
    for culprit, (one, more) in FINDINGS.items():
        count = sum(found.discovery.culprit == culprit for found in summary.found)
        if count:
            said.append(one if count == 1 else more.format(f"{count:,}"))
    missed = sum(map(len, summary.missed.values()))
    if missed:
        said.append(f"{missed:,} cells of the tables were never hit that were to be")
    return "; ".join(said) or "Of what was run, every promise held"
