"""A tree of cgroups, and processes in it: simulated, and on Linux."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import select
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Final, TypeAlias

from linux.cgroups import find_cgroup2
from linux.simulated.cgroups import SimulatedCgroup, SimulatedMember
from linux.testing.worlds import SCOPE_PREFIX
from tests.suites.fidelity.machines import OPEN_TO_READ, SLEEP, SimulatedMachine

PROCESSES: Final = 3
"""How many processes there are to be moved about."""

UNUSED_PID: Final = 2**22 + 1
"""A number that no process has: beyond the highest there can be."""

PATHS: Final = ("a", "a/b", "a/c", "d")
"""Which cgroups there may be."""


class SimulatedCgroups(SimulatedMachine):
    """A tree of cgroups and some processes, all of which are at its top to begin with."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._top = SimulatedCgroup()
        self._members = [SimulatedMember() for _ in range(PROCESSES)]
        for member in self._members:
            self._top.enter(member)
        self._noticed: dict[SimulatedCgroup, int] = {}

    def make(self, path: str) -> None:
        above, _, name = path.rpartition("/")
        made = self._find(above).make(name)
        self._noticed[made] = made.changes

    def remove(self, path: str) -> None:
        above, _, name = path.rpartition("/")
        self._find(above).remove(name)

    def enter(self, path: str, process: int) -> None:
        self._find(path).enter(self._members[process])

    def exit(self, process: int) -> None:
        """Let a process die, and wait until it is a zombie."""
        self._members[process].exit()

    def reap(self, process: int) -> None:
        member = self._members[process]
        if member.is_alive or member.is_reaped:
            raise ChildProcessError(errno.ECHILD, "nothing to reap")
        member.reap()

    def kill(self, path: str) -> None:
        """Kill everything in a cgroup, and wait until it is dead."""
        cgroup = self._find(path)
        cgroup.kill()
        cgroup.settle()

    def freeze(self, path: str, is_told: bool) -> None:
        self._find(path).freeze(is_told)

    def populated(self, path: str) -> bool:
        """Read `populated`; what changed before counts as noticed."""
        cgroup = self._find(path)
        self._noticed[cgroup] = cgroup.changes
        return cgroup.is_populated

    def frozen(self, path: str) -> bool:
        return self._find(path).is_frozen

    def processes(self, path: str) -> list[int]:
        return sorted(self._members.index(member) for member in self._find(path).members)

    def has_changed(self, path: str) -> bool:
        """Whether `cgroup.events` has changed since it was read."""
        cgroup = self._find(path)
        return cgroup.changes != self._noticed[cgroup]

    def _find(self, path: str) -> SimulatedCgroup:
        cgroup = self._top
        for name in filter(None, path.split("/")):
            cgroup = cgroup.find(name)
        return cgroup


class LinuxCgroups:
    """
    Below a cgroup of its own.

    Args:
        top: that cgroup's directory, which it makes and removes.
    """

    def __init__(self, top: Path) -> None:
        self._top: Final = top
        self._pids: Final[dict[int, int]] = {}
        self._dead: Final[set[int]] = set()
        self._events: Final[dict[str, int]] = {}
        top.mkdir()

    def reset(self) -> None:
        for process in self._dead - self._reaped():
            os.waitpid(self._pids[process], 0)
        for process in self._dead:
            del self._pids[process]
        self._dead.clear()
        for process in range(PROCESSES):
            if process not in self._pids:
                self._pids[process] = os.posix_spawn(SLEEP, [SLEEP, "infinity"], {})
            self.enter("", process)
        for path in reversed(PATHS):
            self._forget(path)
            with contextlib.suppress(FileNotFoundError):
                (self._top / path).rmdir()

    def close(self) -> None:
        for process, pid in self._pids.items():
            if process not in self._reaped():
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
        for path in reversed(PATHS):
            self._forget(path)
            with contextlib.suppress(FileNotFoundError):
                (self._top / path).rmdir()
        self._top.rmdir()

    def make(self, path: str) -> None:
        (self._top / path).mkdir()
        self._events[path] = os.open(self._top / path / "cgroup.events", OPEN_TO_READ)
        self._read(path)

    def remove(self, path: str) -> None:
        (self._top / path).rmdir()
        self._forget(path)

    def enter(self, path: str, process: int) -> None:
        # The number of a process that was reaped may be another's by now.
        is_there = process not in self._dead or _is_there(self._pids[process])
        self._write(path, "cgroup.procs", str(self._pids[process] if is_there else UNUSED_PID))

    def exit(self, process: int) -> None:
        if process not in self._dead:
            os.kill(self._pids[process], signal.SIGKILL)
            self._see_dead(process)

    def reap(self, process: int) -> None:
        if process not in self._dead:
            raise ChildProcessError(errno.ECHILD, "nothing to reap")
        os.waitpid(self._pids[process], 0)

    def kill(self, path: str) -> None:
        doomed = [process for each in PATHS if each.startswith(path) for process in self._in(each)]
        self._write(path, "cgroup.kill", "1")
        for process in doomed:
            self._see_dead(process)

    def freeze(self, path: str, is_told: bool) -> None:
        self._write(path, "cgroup.freeze", str(int(is_told)))

    def populated(self, path: str) -> bool:
        return "populated 1" in self._read(path)

    def frozen(self, path: str) -> bool:
        return "frozen 1" in (self._top / path / "cgroup.events").read_text()

    def processes(self, path: str) -> list[int]:
        numbers = {pid: process for process, pid in self._pids.items()}
        pids = (self._top / path / "cgroup.procs").read_text().split()
        return sorted(numbers[int(pid)] for pid in pids)

    def has_changed(self, path: str) -> bool:
        poll = select.poll()
        poll.register(self._event(path), select.POLLPRI)
        return bool(poll.poll(0))

    def _in(self, path: str) -> list[int]:
        try:
            return self.processes(path)
        except OSError:
            return []

    def _see_dead(self, process: int) -> None:
        os.waitid(os.P_PID, self._pids[process], os.WEXITED | os.WNOWAIT)
        self._dead.add(process)

    def _reaped(self) -> set[int]:
        return {process for process in self._dead if not _is_there(self._pids[process])}

    def _event(self, path: str) -> int:
        if path not in self._events:
            raise FileNotFoundError(errno.ENOENT, path)
        return self._events[path]

    def _read(self, path: str) -> str:
        return os.pread(self._event(path), 4096, 0).decode()

    def _write(self, path: str, name: str, text: str) -> None:
        fd = os.open(self._top / path / name, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, text.encode())
        finally:
            os.close(fd)

    def _forget(self, path: str) -> None:
        with contextlib.suppress(KeyError):
            os.close(self._events.pop(path))


Cgroups: TypeAlias = SimulatedCgroups | LinuxCgroups

_tops: Final = itertools.count(1)


def _is_there(pid: int) -> bool:
    """Whether there is such a child, dead or alive."""
    try:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
    except ChildProcessError:
        return False
    return True


@contextlib.contextmanager
def linux_cgroups() -> Iterator[LinuxCgroups]:
    machine = LinuxCgroups(find_cgroup2() / f"{SCOPE_PREFIX}fidelity-{next(_tops)}")
    try:
        machine.reset()
        yield machine
    finally:
        machine.close()
