"""The spaces of the explorer, one task each: how many worlds there are, and what is never true.

The same whatever the seed. At a larger scale the larger spaces come in.
"""

from __future__ import annotations

import time

from statemachine.testing.explore import Counterexample, Explorer, Result
from tests.campaign.outcome import Discovery, Outcome, Task
from tests.campaign.report_summary import EXPLORER
from tests.explore.spaces import LARGE, SPACES, Space
from transport.testing.explored import trace_of

ALL = {**SPACES, **LARGE}
AGAIN = "pytest tests/explore/test_explore.py -k every_world"


def tasks(scale: float) -> list[Task]:
    """The longest first, so that no core is idle in the end."""
    found = [name for name, space in ALL.items() if space.scale <= scale]
    return [Task(name, {"name": name}) for name in sorted(found, key=lambda n: -ALL[n].seconds)]


def run(seed: int, name: str) -> Outcome:
    """Explore a space to its end."""
    started = time.monotonic()
    try:
        result = Explorer(ALL[name].bounds).explore()
    except Counterexample as broken:
        told = f"{broken.test}\n# The provider's trace:\n{_commented(trace_of(broken))}"
        return Outcome(
            discoveries=[Discovery(f"{name}: {broken.finding}", told, _bare(broken.chart))]
        )
    return _outcome(name, ALL[name], result, time.monotonic() - started)


def _outcome(name: str, space: Space, result: Result, seconds: float) -> Outcome:
    hits = {
        f"{table} {state} {event}": count for (table, event, state), count in result.hits.items()
    }
    is_short = result.states < space.states or not result.at_rest
    smaller = Discovery(f"{name} is smaller than it was", AGAIN, culprit="campaign")
    return Outcome(
        discoveries=[smaller] if is_short else [],
        figures={
            "worlds": result.states,
            "moves": result.moves,
            "kernel steps": result.kernel_steps,
            "spaces": 1,
            "spaces finished": result.is_complete,
        },
        cells={EXPLORER: hits},
        rows=[
            {
                "space": name,
                "worlds": f"{result.states:,}",
                "moves": f"{result.moves:,}",
                "seconds": f"{seconds:.1f}",
                "worlds a second": f"{result.states / seconds:,.0f}",
                "complete": "yes" if result.is_complete else "no",
                "kernel steps": f"{result.kernel_steps:,}",
            }
        ],
    )


def _commented(trace: bytes) -> str:
    return "".join(f"# {line}\n" for line in trace.decode().splitlines())


def _bare(chart: str) -> str:
    """Take a diagram out of its Markdown."""
    return "\n".join(chart.splitlines()[1:-1])
