"""Model of cgroup v2: `populated`, `frozen`, kill, remove, and the changes of `cgroup.events`.

The part of cgroup v2 that decides the end of an allocation. Random programs compare it with Linux.

    cgroup.is_populated      a process is alive in it or below; frozen counts, dead does not
    cgroup.remove()          EBUSY while populated or with cgroups below; the dead do not count
    cgroup.kill()            tells everything below to die, which takes a while
    cgroup.changes           how often `cgroup.events` has changed: one wake-up for any number

Not simulated: threads, controllers, and delegation to other users.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from typing import NoReturn


class SimulatedMember:
    """A process in a cgroup: alive, then dead, then reaped."""

    def __init__(self) -> None:
        self.cgroup: SimulatedCgroup | None = None
        self.is_alive = True
        self.is_reaped = False
        self.is_killed = False
        """Whether it was told to die."""
        self.is_killable = True
        """False in uninterruptible sleep: then it does not die when it is told to."""

    def kill(self) -> None:
        """Tell it to die; it dies in `settle`."""
        self.is_killed = True

    def settle(self) -> None:
        """Let it die if it was told to and can."""
        if self.is_killed and self.is_killable:
            self.exit()

    def exit(self) -> None:
        """Let it exit. Until it is reaped it is a zombie, which counts in no cgroup."""
        cgroup, self.cgroup = self.cgroup, None
        if self.is_alive and cgroup is not None:
            cgroup.leave(self)
        self.is_alive = False

    def reap(self) -> None:
        """Reap it: there is no such process any more."""
        self.is_reaped = True


class SimulatedCgroup:
    """
    One cgroup.

    Args:
        parent: the one it is in; None for the root.
    """

    def __init__(self, parent: SimulatedCgroup | None = None) -> None:
        self.parent = parent
        self.children: dict[str, SimulatedCgroup] = {}
        self.members: list[SimulatedMember] = []
        """The living processes."""
        self.was_used = False
        """Whether anything was in it or below since it was made or adopted, as by `cpu.stat`."""
        self.is_made_here = False
        """Whether a provider made it: the sticky bit of its permissions."""
        self.has_owner = False
        """Whether a provider uses it: the owner's token."""
        self.changes = 0
        self._is_told_to_freeze = False

    @property
    def is_populated(self) -> bool:
        """`populated`: whether a living process is in it or below."""
        return any(cgroup.members for cgroup in self._below())

    @property
    def is_frozen(self) -> bool:
        """`frozen`: whether it, or one above it, was told to freeze."""
        above = self.parent is not None and self.parent.is_frozen
        return self._is_told_to_freeze or above

    @property
    def is_in_use(self) -> bool:
        """Whether a process is in it, or another one below."""
        return bool(self.children or self.members)

    def make(self, name: str) -> SimulatedCgroup:
        """Make one below it; EEXIST."""
        if name in self.children:
            _refuse(errno.EEXIST)
        self.children[name] = made = SimulatedCgroup(self)
        return made

    def find(self, name: str) -> SimulatedCgroup:
        """Return one below it; ENOENT."""
        if name not in self.children:
            _refuse(errno.ENOENT)
        return self.children[name]

    def remove(self, name: str) -> None:
        """Remove one below it; ENOENT, or EBUSY while that is populated or has others below."""
        if self.find(name).is_in_use:
            _refuse(errno.EBUSY)
        del self.children[name]

    def enter(self, member: SimulatedMember) -> None:
        """Move a process here; ESRCH once it is reaped. A dead one does not move."""
        if member.is_reaped:
            _refuse(errno.ESRCH)
        if not member.is_alive or member.cgroup is self:
            return
        before = member.cgroup
        # First in, then out: a cgroup above both is never empty in between.
        with _Noting(self):
            self.members.append(member)
        member.cgroup = self
        for cgroup in self._upward():
            cgroup.was_used = True
        if before is not None:
            before.leave(member)

    def leave(self, member: SimulatedMember) -> None:
        """Remove a process that died or moved."""
        with _Noting(self):
            self.members.remove(member)

    def freeze(self, is_told: bool = True) -> None:
        """Freeze or thaw everything here and below; frozen processes can be killed."""
        before = {cgroup: cgroup.is_frozen for cgroup in self._below()}
        self._is_told_to_freeze = is_told
        for cgroup, was_frozen in before.items():
            cgroup.changes += cgroup.is_frozen is not was_frozen

    def kill(self) -> None:
        """Tell everything here and below to die; it dies in `settle`."""
        for cgroup in self._below():
            for member in cgroup.members:
                member.kill()

    def settle(self) -> None:
        """Let everything die that was told to and can."""
        for cgroup in list(self._below()):
            for member in tuple(cgroup.members):
                member.settle()

    def _below(self) -> Iterator[SimulatedCgroup]:
        yield self
        for child in self.children.values():
            yield from child._below()

    def _upward(self) -> Iterator[SimulatedCgroup]:
        yield self
        if self.parent is not None:
            yield from self.parent._upward()


class _Noting:
    """Counts the changes of `populated` that the body makes, here and above."""

    def __init__(self, cgroup: SimulatedCgroup) -> None:
        self._before = [(each, each.is_populated) for each in cgroup._upward()]

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        for cgroup, was_populated in self._before:
            cgroup.changes += cgroup.is_populated is not was_populated


def _refuse(number: int) -> NoReturn:
    raise OSError(number, os.strerror(number))
