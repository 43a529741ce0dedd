"""How fast are the kernels and the check of a trace, on one core?

Whole lives of allocations, six events each, as `bench/trace.py` tells them. What counts is the
processor's time, and of three runs the fastest, so that a neighbour on the same machine is held
against no other.
"""

from __future__ import annotations

import time
from typing import Final

from bench.trace import lives_of
from statemachine import ProviderKernel
from statemachine import events as on
from statemachine.lifecycle import ALLOCATION
from statemachine.provider import Limits
from tests.campaign.outcome import Outcome, Task
from transport.trace import Start, Turn, encode_line
from transport.trace.check import Replay

LIVES: Final = 10_000
"""In each run, at scale 1."""
RUNS: Final = 3

LIFE: Final = (
    on.RequestAdmitted,
    on.NamespacesCreated,
    on.ResponseSent,
    on.ScopePopulated,
    on.ScopeEmptied,
    on.NamespacesReleased,
)


def tasks(scale: float) -> list[Task]:
    lives = max(1, int(LIVES * scale))
    return [Task(what, {"what": what, "lives": lives}) for what in _MEASURES]


def run(seed: int, what: str, lives: int) -> Outcome:
    """Measure one thing; the lives are the same whatever the seed."""
    count, seconds = min((_MEASURES[what](lives) for _ in range(RUNS)), key=lambda run: run[1])
    row = {
        "what": what,
        "how many": f"{count:,}",
        "CPU seconds": f"{seconds:.2f}",
        "a second": f"{count / seconds:,.0f}",
    }
    return Outcome(figures={what: count, f"CPU seconds, {what}": seconds}, rows=[row])


class _RateModel:
    __slots__ = ("state",)
    subject = "a model"


def time_rows(lives: int) -> tuple[int, float]:
    """Take rows of the provider's table, and nothing else."""
    started = time.process_time()
    for _ in range(lives):
        model = _RateModel()
        model.state = ALLOCATION.initial
        for event in LIFE:
            ALLOCATION.fire(model, event)
    return lives * len(LIFE), time.process_time() - started


def time_kernel(lives: int) -> tuple[int, float]:
    """Feed a provider's kernel."""
    events = list(lives_of(lives))
    kernel = ProviderKernel()
    started = time.process_time()
    for event in events:
        kernel.receive(event)
    return len(events), time.process_time() - started


def time_check(lives: int) -> tuple[int, float]:
    """Check a provider's trace."""
    kernel = ProviderKernel()
    lines = [encode_line(0, Start(Limits()))]
    for number, event in enumerate(lives_of(lives), 1):
        lines.append(encode_line(number, Turn(event, kernel.receive(event))))
    replay = Replay()
    started = time.process_time()
    replay.take_all(lines)
    return replay.turns, time.process_time() - started


_MEASURES: Final = {
    "rows through transitions": time_rows,
    "events through the kernel": time_kernel,
    "trace events checked": time_check,
}
