"""One hook for system calls that can fail, so that tests can inject faults.

Most failures of a node are rare: a full disk, no descriptor left, an interrupted write. That each
of them ends well can only be shown by having each of them happen. So `transport` and `linux` make
every system call that the Linux kernel can refuse through `syscall`, where a test can install a
`SyscallHook`: it counts the calls, refuses one, cuts one short, or ends the program there. Without
a hook, which is always so in production, `syscall` costs one comparison.

What cannot fail does not go through here, nor do the calls that the event loop makes for itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeAlias, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

SyscallHook: TypeAlias = Callable[[Callable[..., Any], tuple[Any, ...], Mapping[str, Any]], Any]
"""Is given a function and its arguments; calls it or does not; returns or raises in its place."""

_hook: SyscallHook | None = None


def syscall(function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
    """
    Make a system call that the Linux kernel can refuse.

    Args:
        function: What of Python's wraps the call: `os.open`, a socket's `connect`, a path's
            `mkdir`.
        args: For it.
        kwargs: For it.

    Returns:
        What it returns.

    Raises:
        OSError: as it does.
    """
    hook = _hook
    if hook is None:
        return function(*args, **kwargs)
    result: R = hook(function, args, kwargs)
    return result


@contextmanager
def hook_syscalls(hook: SyscallHook) -> Iterator[None]:
    """Install a hook while the body runs, for the calls of all threads. For tests."""
    global _hook
    before, _hook = _hook, hook
    try:
        yield
    finally:
        _hook = before
