"""Resource limits of a daemon: raise RLIMIT_NOFILE, fit the provider's limits to it, survive OOM.

A service manager starts daemons with a soft limit of 1,024 descriptors, because select(2) fails
beyond that, and with a hard limit for programs that do not use it. A provider does not, and raises
its soft limit. What it starts gets the limit that the provider was started with.
"""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Final

from statemachine.provider import Limits
from statemachine.record import changed
from transport.calls import syscall

from .syscalls import calling

DESCRIPTORS_RESERVED: Final = 256
"""Descriptors for everything but connections and allocations: images, the journal, hand-offs."""

DESCRIPTORS_PER_CONNECTION: Final = 2
"""The socket, and the pidfd of its peer."""

DESCRIPTORS_PER_ALLOCATION: Final = 2
"""The pidfd of its anchor, and its `cgroup.events`."""

OOM_SCORE_ADJ_MIN: Final = -1000
"""The Linux kernel kills no process with it for want of memory."""

_OOM_SCORE_ADJ: Final = Path("/proc/self/oom_score_adj")

_inherited: tuple[int, int] | None = None
"""The limit of descriptors, soft and hard, before this process raised it."""


def raise_descriptor_limit() -> int:
    """Raise this process's soft limit of open descriptors to its hard limit, and return that."""
    # Keeps DAEMON-1.
    global _inherited
    soft, hard = syscall(resource.getrlimit, resource.RLIMIT_NOFILE)
    if soft != hard:
        _inherited = soft, hard
        syscall(resource.setrlimit, resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def restore_descriptor_limit(pid: int) -> None:
    """
    Give a child process the limit that this process had before it raised its own.

    Raises:
        OSError: there is no such process any more, or it is another user's.
    """
    # Keeps DAEMON-1.
    if _inherited is not None:
        syscall(resource.prlimit, pid, resource.RLIMIT_NOFILE, _inherited)


def fit_to_descriptors(limits: Limits, descriptors: int) -> Limits:
    """
    Lower a provider's limits so that connections and allocations have enough descriptors.

    Args:
        limits: Those that are wanted.
        descriptors: How many this process may have open.

    Returns:
        The same, if they suffice for every allowed user at once. Otherwise connections and
        allocations per user are lowered by the same factor, to 1 at least.
    """
    # Keeps DAEMON-2.
    needed = descriptors_for(limits) - DESCRIPTORS_RESERVED
    there = max(0, descriptors - DESCRIPTORS_RESERVED)
    if needed <= there:
        return limits
    return changed(
        limits,
        connections_per_uid=max(1, limits.connections_per_uid * there // needed),
        allocations_per_uid=max(1, limits.allocations_per_uid * there // needed),
    )


def descriptors_for(limits: Limits) -> int:
    """Count the descriptors that a provider needs when every allowed user is at its limits."""
    per_user = (
        limits.connections_per_uid * DESCRIPTORS_PER_CONNECTION
        + limits.allocations_per_uid * DESCRIPTORS_PER_ALLOCATION
    )
    return DESCRIPTORS_RESERVED + len(limits.allowed_uids) * per_user


def protect_from_oom_killer() -> int:
    """
    Have this process, and what it starts from now on, killed last for want of memory.

    Without CAP_SYS_RESOURCE the value can only be lowered to what a privileged process has set
    last, which is 0 as a rule.

    Returns:
        The value that it has now: -1000 if that was permitted.

    Source:
        proc_pid_oom_score_adj(5).
    """
    # Keeps DAEMON-3.
    for value in (OOM_SCORE_ADJ_MIN, 0):
        now = _oom_score_adj()
        if now <= value:
            return now
        try:
            syscall(_OOM_SCORE_ADJ.write_text, str(value), encoding="ascii")
        except OSError:
            continue
        return value
    return _oom_score_adj()


def _oom_score_adj() -> int:
    with calling("read(2)", _OOM_SCORE_ADJ):
        return int(syscall(_OOM_SCORE_ADJ.read_text, encoding="ascii"))
