"""A counterexample of the explorer as a provider's trace, for `nshandoff trace`."""

from __future__ import annotations

from statemachine.provider import Limits
from statemachine.testing.explore import Counterexample

from ..trace import Recovered, Start, TraceEntry, Turn, encode_line


def trace_of(broken: Counterexample) -> bytes:
    """Return what the provider would have written down that was started with `--trace`."""
    start = Start(broken.bounds.limits or Limits())
    lines = []
    for remembered, turns in broken.lives:
        entries: list[TraceEntry] = [start, Recovered(remembered), *(Turn(*turn) for turn in turns)]
        lines += [encode_line(number, entry) for number, entry in enumerate(entries)]
    return b"".join(lines)
