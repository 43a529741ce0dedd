"""A counterexample of the explorer as a provider's trace, for `nshandoff trace`."""

from __future__ import annotations

from statemachine.provider import Limits
from statemachine.testing.explore import Broken

from ..trace import Entry, Recovery, Start, Turn, encode_line


def trace_of(broken: Broken) -> bytes:
    """Return what the provider would have written down that was started with `--trace`."""
    start = Start(broken.bounds.limits or Limits())
    lines = []
    for remembered, turns in broken.lives:
        entries: list[Entry] = [start, Recovery(remembered), *(Turn(*turn) for turn in turns)]
        lines += [encode_line(number, entry) for number, entry in enumerate(entries)]
    return b"".join(lines)
