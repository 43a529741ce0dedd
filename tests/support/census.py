"""What this test session has open, running and made: counted before a test and after it.

A leak is whatever a test adds and does not take away. Some of it belongs to the whole machine, on
which others work too: other test sessions, perhaps a provider with real allocations. Isolation (see
`isolation.py`) hides nearly all of theirs, but needs root. So everything is counted by what proves
whose it is, and nothing is removed without that proof:

    descriptors, threads    this process's own
    processes               those in the session's own UTS namespace, which every descendant keeps,
                            however often it forks, changes its session or loses its parent
    scopes                  named for this session, see `SCOPE_PREFIX`; in the slices, or a test's
                            own root of slices
    loop devices            with a file below the session's directories
    mounts                  with a path below the session's directories

A scope or mount that bears no session's name is still reported when it appears during a test and
stays, and is left alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import gc
import os
import re
import select
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from linux.testing.worlds import SCOPE_PREFIX
from tests.support.isolation import find_cgroup2

SETTLE_S: Final = 30.0
"""How long the kernel may take over what it frees asynchronously: namespaces, loop devices."""
POLL_S: Final = 0.005

SLICES: Final = ("workload.slice", "pact.slice")
CLONE_NEWUTS: Final = 0x04000000
LOOP_CLR_FD: Final = 0x4C01
MNT_DETACH: Final = 2

_SCOPE_OF_ANY_SESSION: Final = re.compile(r"nsh-test-\d+-")
_PATH_OF_ANY_SESSION: Final = re.compile(r"/pytest-of-[^/]+/pytest-\d+/")
_libc: Final = ctypes.CDLL(None, use_errno=True)

MACHINE_WIDE: Final = ("processes", "mounts", "scopes", "loops")
"""What outlives this process; in the order in which it is taken away."""
SORTS: Final = ("descriptors", "threads", *MACHINE_WIDE)

Found = Mapping[str, str]
"""What was found, by the kernel's name for it, with what tells it from a namesake."""


@dataclass(frozen=True)
class Census:
    """What is there at one moment, sort by sort."""

    descriptors: Found
    threads: Found
    processes: Found
    scopes: Found
    loops: Found
    mounts: Found

    def since(self, before: Census, sorts: tuple[str, ...] = SORTS) -> dict[str, Found]:
        """What is here now and was not, or was something else, `before`; without empty sorts."""
        grown: dict[str, Found] = {}
        for sort in sorts:
            then: Found = getattr(before, sort)
            new = {key: what for key, what in getattr(self, sort).items() if then.get(key) != what}
            if new:
                grown[sort] = new
        return grown


class Session:
    """
    Counts for one test session, and removes what the session provably made itself.

    Construct it early: only processes started afterwards carry the session's mark.
    """

    def __init__(self) -> None:
        self.directories: tuple[str, ...] = ()
        """Below these are the session's images and mount points; set when they are known."""
        self.patience_s = SETTLE_S
        self.overlooked: frozenset[str] = frozenset()
        """Sorts that are not to be counted."""
        self.cgroup2: Final = find_cgroup2()
        # Its own UTS namespace costs nothing, changes nothing (the host name is copied) and needs
        # root; without root there is nothing to attribute but plain children.
        self.is_marked: Final = os.geteuid() == 0 and _libc.unshare(CLONE_NEWUTS) == 0
        self._mark: Final = os.readlink("/proc/self/ns/uts")
        self._foreign: set[str] = set()

    def census(self) -> Census:
        """Count everything now; about half a millisecond."""
        return Census(
            descriptors=_descriptors(),
            threads=_threads(),
            processes=dict(self._processes()),
            scopes=dict(self._scopes()),
            loops=dict(self._loops()),
            mounts=dict(self._mounts()),
        )

    def left_since(
        self, before: Census, sorts: tuple[str, ...] = SORTS, patience_s: float | None = None
    ) -> dict[str, Found]:
        """What `before` did not have and does not go away by itself; at once when there is none."""
        sorts = tuple(sort for sort in sorts if sort not in self.overlooked)
        left = self.census().since(before, sorts)
        if left:
            gc.collect()
        deadline = time.monotonic() + (self.patience_s if patience_s is None else patience_s)
        while left and time.monotonic() < deadline:
            time.sleep(POLL_S)
            left = self.census().since(before, sorts)
        return left

    def clean(self, left: Mapping[str, Found]) -> list[str]:
        """
        Remove what is provably ours of `left`, and say of every single thing what became of it.

        Descriptors and threads stay: closing a number behind its owner's back does harm later.
        """
        account = [f"descriptor {fd}: {what}" for fd, what in left.get("descriptors", {}).items()]
        account += [f"thread {task}: {name}" for task, name in left.get("threads", {}).items()]
        for pid, started in left.get("processes", {}).items():
            what = _describe_process(pid)
            account.append(f"process {pid}: {what}: {_kill(int(pid), started)}")
        for target in left.get("mounts", {}).values():
            account.append(f"mount {target}: {self._unmount(target)}")
        for scope in left.get("scopes", {}):
            account.append(f"scope {scope}: {_remove_scope(Path(scope))}")
        for device, image in left.get("loops", {}).items():
            account.append(f"loop device {device}: {image}: {self._detach(device, image)}")
        return account

    def _processes(self) -> Iterator[tuple[str, str]]:
        """All that carry our mark, and the dead children that were not waited for."""
        own = str(os.getpid())
        present = {name for name in os.listdir("/proc") if name.isdigit()}
        # Whose a process is, is settled at its birth, so one look at a stranger is enough.
        self._foreign &= present
        if self.is_marked:
            for pid in present - self._foreign:
                try:
                    mark = os.readlink(f"/proc/{pid}/ns/uts")
                except OSError:
                    continue
                if mark != self._mark:
                    self._foreign.add(pid)
                elif pid != own:
                    yield pid, _started(pid)
        for task in os.listdir("/proc/self/task"):
            for pid in _read(f"/proc/self/task/{task}/children").split():
                yield pid, _started(pid)

    def _scopes(self) -> Iterator[tuple[str, str]]:
        if self.cgroup2 is None:
            return
        for slice_ in SLICES:
            for scope in _directories(self.cgroup2 / slice_):
                if SCOPE_PREFIX in scope.name or not _SCOPE_OF_ANY_SESSION.search(scope.name):
                    yield scope.path, ""
        for root in _directories(self.cgroup2):
            if root.name.startswith(SCOPE_PREFIX):
                yield root.path, ""

    def _loops(self) -> Iterator[tuple[str, str]]:
        for name in os.listdir("/sys/block"):
            if name.startswith("loop"):
                image = _read(f"/sys/block/{name}/loop/backing_file").strip()
                if image.startswith(self.directories):
                    yield f"/dev/{name}", image

    def _mounts(self) -> Iterator[tuple[str, str]]:
        for line in _read("/proc/self/mountinfo").splitlines():
            number, _, _, _, target, _, tags = (line.partition(" - ")[0] + " ").split(" ", 6)
            # What is mounted outside of the isolation, and so here as well, has a master there.
            is_foreign = "master:" in tags or _PATH_OF_ANY_SESSION.search(target)
            if target.startswith(self.directories) or not is_foreign:
                yield number, target

    def _unmount(self, target: str) -> str:
        if not target.startswith(self.directories):
            return "left alone, not provably ours"
        failed = _libc.umount2(os.fsencode(target), MNT_DETACH)
        return os.strerror(ctypes.get_errno()) if failed else "unmounted"

    def _detach(self, device: str, image: str) -> str:
        try:
            with Path(device).open("rb") as loop:
                fcntl.ioctl(loop, LOOP_CLR_FD)
        except OSError as error:
            return "gone" if error.errno == errno.ENXIO else str(error)
        return "detached"


def _directories(parent: Path) -> Iterator[os.DirEntry[str]]:
    with contextlib.suppress(FileNotFoundError), os.scandir(parent) as entries:
        yield from (entry for entry in entries if entry.is_dir(follow_symlinks=False))


def _descriptors() -> Found:
    found = {}
    for number in os.listdir("/proc/self/fd"):
        # The listing's own descriptor is among the names and is gone by now.
        with contextlib.suppress(FileNotFoundError):
            found[number] = os.readlink(f"/proc/self/fd/{number}")
    return found


def _threads() -> Found:
    names = {str(thread.native_id): thread.name for thread in threading.enumerate()}
    return {task: names.get(task, "not Python's") for task in os.listdir("/proc/self/task")}


def _started(pid: str) -> str:
    """When a process was born, in ticks since boot; tells it from a later one of the same pid."""
    after_name = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return after_name[19] if after_name else ""


def _describe_process(pid: str) -> str:
    """The command line, and for an anchor its token; a dead process has neither."""
    command = _read(f"/proc/{pid}/cmdline").replace("\0", " ").strip()
    token = re.search(r"NSHANDOFF_ANCHOR=([^\0]*)", _read(f"/proc/{pid}/environ"))
    if token:
        return f"anchor {token[1]} ({command})"
    return command or "dead, and its parent has not waited for it"


def _kill(pid: int, started: str) -> str:
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return "gone"
    try:
        # The pin comes first: what is asked now is asked of the one that will be signalled.
        if _started(str(pid)) != started:
            return "gone"
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        died, _, _ = select.select([pidfd], [], [], SETTLE_S)
    finally:
        os.close(pidfd)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
    return "killed" if died else "killed, and still dying"


def remove_scopes_of(pid: int) -> list[str]:
    """
    Remove the scopes that bear the name of a session which is over; for the one that started it.

    Returns:
        Those that are still there.
    """
    prefix, left = f"nsh-test-{pid}-", []
    for slice_ in SLICES if (root := find_cgroup2()) else ():
        for scope in sorted((root / slice_).glob(f"{prefix}*")):
            said = _remove_scope(scope, prefix)
            if scope.exists():
                left.append(f"{scope}: {said}")
    return left


def kill_all(cgroup: Path) -> None:
    """Kill every process in a cgroup and below; before Linux 5.14 it has no file for that."""
    try:
        with (cgroup / "cgroup.kill").open("r+") as file:
            file.write("1")
    except FileNotFoundError:
        # Threads, because not every cgroup can say what processes are in it.
        for threads in cgroup.glob("**/cgroup.threads"):
            for thread in map(int, threads.read_text().split()):
                with suppress(ProcessLookupError):
                    os.kill(thread, signal.SIGKILL)


def _remove_scope(scope: Path, prefix: str = SCOPE_PREFIX) -> str:
    if prefix not in scope.name:
        return "left alone, not provably ours"
    try:
        kill_all(scope)
        deadline = time.monotonic() + SETTLE_S
        while "populated 1" in _read(scope / "cgroup.events") and time.monotonic() < deadline:
            time.sleep(POLL_S)
        for directory, _, _ in os.walk(scope, topdown=False):
            os.rmdir(directory)  # noqa: PTH106  os.walk gives text
    except FileNotFoundError:
        return "gone"
    except OSError as error:
        return str(error)
    return "killed and removed"


def _read(path: str | Path) -> str:
    """A file of the kernel's as text; empty when it, or what it tells of, is gone."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""
