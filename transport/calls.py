"""Through which door does every system call go that can fail?

Most failures of a node are rare: a full disk, no descriptor left, an interrupted write. That each
of them ends well can only be shown by having each of them happen. So `transport` and `linux` ask
the Linux kernel for nothing that it can refuse but through `syscall`, and whoever wants to see what
becomes of a refusal stands in the door: counts what passes, refuses it, cuts it short, or ends the
program there. In production nobody stands there, and the door is one comparison.

The calls that the event loop makes for itself do not pass here; neither does what cannot fail.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeAlias, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

Doorkeeper: TypeAlias = Callable[[Callable[..., Any], tuple[Any, ...], Mapping[str, Any]], Any]
"""Is given the call and its arguments; makes it, or does not; returns or raises in its place."""

_doorkeeper: Doorkeeper | None = None


def syscall(function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
    """
    Ask the Linux kernel for something that it can refuse.

    Args:
        function: Whatever of Python's wraps the call: `os.open`, a socket's `connect`, a path's
            `mkdir`.
        args: For it.
        kwargs: For it.

    Returns:
        What it returns.

    Raises:
        OSError: as it does.
    """
    doorkeeper = _doorkeeper
    if doorkeeper is None:
        return function(*args, **kwargs)
    result: R = doorkeeper(function, args, kwargs)
    return result


@contextmanager
def guarded_by(doorkeeper: Doorkeeper) -> Iterator[None]:
    """Let somebody stand in the door while the body runs: all calls of all threads. For tests."""
    global _doorkeeper
    before, _doorkeeper = _doorkeeper, doorkeeper
    try:
        yield
    finally:
        _doorkeeper = before
