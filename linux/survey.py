"""What an operator wants to know: which allocations there are, and why one is still alive.

Reads the state directory and the Linux kernel, never the daemon: it works while the provider is
down, and changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

PROCESSES_SHOWN_MAX: Final = 8
"""Most processes named in a reason."""

_STATE_WORDS: Final = {
    "D": "in uninterruptible sleep",
    "Z": "a zombie",
    "T": "stopped",
    "R": "running",
    "S": "sleeping",
}


def states_of(pids: Iterable[int]) -> str:
    """Name processes with the state each is in, for a person to read."""
    told = [f"{pid} ({_STATE_WORDS.get(state, state)})" for pid, state, _ in _read_all(pids)]
    return _shortened(told) or "none that can be seen"


def zombies_below(init: int) -> str:
    """
    Say why an init that was killed is still there.

    It waits in the Linux kernel for every process of its namespace. One whose parent is outside,
    and has not reaped it, keeps it waiting for as long as that parent likes. Which namespace a
    zombie was in cannot be read any more, so all that may be meant are named.
    """
    suspects = [
        f"{pid} (child of {parent})"
        for pid, state, parent in _read_all(_all_pids())
        if state == "Z" and _depth_of(pid) > 1
    ]
    waits = f"init {init} is being killed"
    return f"{waits}; not reaped by their parents: {_shortened(suspects)}" if suspects else waits


def _shortened(told: list[str]) -> str:
    more = len(told) - PROCESSES_SHOWN_MAX
    shown = ", ".join(told[:PROCESSES_SHOWN_MAX])
    return f"{shown} and {more} more" if more > 0 else shown


def _all_pids() -> Iterator[int]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            yield int(entry.name)


def _read_all(pids: Iterable[int]) -> Iterator[tuple[int, str, int]]:
    """Read the state and the parent of each process that is still there."""
    for pid in pids:
        try:
            stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        # The name in parentheses may hold anything, parentheses included.
        state, parent, *_ = stat.rpartition(")")[2].split()
        yield pid, state, int(parent)


def _depth_of(pid: int) -> int:
    """Say in how many PID namespaces a process is, from this one down."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return 0
    for line in status.splitlines():
        if line.startswith("NSpid:"):
            return len(line.split()) - 1
    return 1
