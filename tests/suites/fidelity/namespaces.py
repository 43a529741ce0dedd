"""A worker that makes and enters namespaces, and processes in them: simulated, and on Linux."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import re
import select
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

from linux import syscalls
from linux.anchor import Anchor
from linux.features import Features
from linux.namespaces import CLONE_FLAGS, KINDS, PROC_NAMES, KernelInspector, open_namespace
from linux.simulated.namespaces import (
    SimulatedNamespace,
    SimulatedNamespaces,
    SimulatedTask,
    TaskState,
)
from linux.syscalls import Ioctl, SyscallError
from statemachine.messages import NamespaceType
from tests.suites.fidelity.machines import (
    OPEN_TO_READ,
    PATIENCE_S,
    SLEEP,
    SimulatedMachine,
)
from transport.descriptors import Descriptor, close_all
from transport.testing.peer import DEADLINE_S

Kind: TypeAlias = NamespaceType | None


class SimulatedWorker(SimulatedMachine):
    """
    A worker that enters and makes namespaces, and starts processes which stay where they are.

    Processes and descriptors are numbered as they come. What asks for one that does not exist does
    nothing and returns None.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._worker = SimulatedNamespaces().boot()
        self._home = [self._worker.namespace(kind) for kind in NamespaceType]
        self._processes: list[SimulatedTask] = []
        self._open: list[SimulatedNamespace] = []

    def unshare(self, kind: NamespaceType) -> None:
        self._worker.unshare(kind)

    def enter(self, descriptor: int, kind: Kind) -> None:
        if descriptor < len(self._open):
            self._worker.setns(self._open[descriptor], kind)

    def go_home(self) -> None:
        for namespace in self._home:
            self._worker.setns(namespace, namespace.kind)

    def fork(self) -> int:
        """Start a process; its pid in its own PID namespace, or 0 at home."""
        task = self._worker.fork()
        self._processes.append(task)
        is_home = self._worker.pid_for_children is self._worker.namespace(NamespaceType.PID)
        return 0 if is_home else task.number

    def open(self, process: int, kind: NamespaceType) -> bool | None:
        """Open a namespace that a process is in."""
        if process >= len(self._processes):
            return None
        self._open.append(self._processes[process].namespace(kind))
        return True

    def open_own(self, kind: NamespaceType) -> bool:
        """Open a namespace that the worker's next child will be in, by /proc."""
        is_pid = kind is NamespaceType.PID
        self._open.append(self._worker.pid_for_children if is_pid else self._worker.namespace(kind))
        return True

    def kind_of(self, descriptor: int) -> Kind:
        return self._open[descriptor].kind if descriptor < len(self._open) else None

    def are_same(self, one: int, other: int) -> tuple[bool, bool] | None:
        """Whether their ids are the same, and their inode numbers."""
        if max(one, other) >= len(self._open):
            return None
        first, second = self._open[one], self._open[other]
        return first.unique_id == second.unique_id, first.inode == second.inode

    def find_init(self, descriptor: int) -> bool | None:
        """NS_GET_PID_FROM_PIDNS of pid 1."""
        if self.kind_of(descriptor) is not NamespaceType.PID:
            return None
        if not self._open[descriptor].has_init:
            raise ProcessLookupError(errno.ESRCH, "no init")
        return True

    def kill(self, process: int) -> None:
        if process < len(self._processes):
            self._processes[process].kill()

    def is_dead(self, process: int) -> bool | None:
        """Whether its pidfd is readable."""
        if process >= len(self._processes):
            return None
        return self._processes[process].state in (TaskState.DEAD, TaskState.REAPED)

    def reap(self, process: int) -> None:
        if process < len(self._processes):
            self._processes[process].reap()


@dataclass(slots=True)
class _WorkerChild:
    """A process that the worker started."""

    pid: int
    pidfd: Descriptor
    home: int
    """The inode number of its PID namespace, which is pinned while the machine has processes."""
    is_reaped: bool = False
    is_killed: bool = False


class LinuxWorker:
    """A thread that shares its root with no other thread, and so may enter mount namespaces."""

    def __init__(self) -> None:
        self._features: Final = Features.probe()
        self._thread: Final = ThreadPoolExecutor(1)
        self._do(syscalls.unshare, syscalls.CLONE_FS)
        self._home: Final = [self._open_own(kind, "") for kind in NamespaceType]
        self._children: Final[list[_WorkerChild]] = []
        self._open: Final[list[Descriptor]] = []

    def reset(self) -> None:
        # An init comes before what is in its namespace, and is not dead before that is reaped.
        for child in reversed(self._children):
            if not child.is_reaped:
                os.kill(child.pid, signal.SIGKILL)
        for child in reversed(self._children):
            if not child.is_reaped:
                os.waitpid(child.pid, 0)
            child.pidfd.close()
        close_all(self._open)
        self._children.clear()
        self._open.clear()
        self.go_home()

    def close(self) -> None:
        self.reset()
        self._thread.shutdown()
        close_all(self._home)

    def _do(self, call: Callable[..., Any], *arguments: object) -> Any:
        return self._thread.submit(call, *arguments).result()

    def unshare(self, kind: NamespaceType) -> None:
        self._do(syscalls.unshare, CLONE_FLAGS[kind])

    def enter(self, descriptor: int, kind: Kind) -> None:
        if descriptor < len(self._open):
            flag = 0 if kind is None else CLONE_FLAGS[kind]
            self._do(syscalls.setns, self._open[descriptor], flag)

    def go_home(self) -> None:
        for namespace in self._home:
            self._do(syscalls.setns, namespace, 0)

    def fork(self) -> int:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            pid = self._do(os.posix_spawn, SLEEP, [SLEEP, "infinity"], {})
            child = _WorkerChild(
                pid, syscalls.pidfd_open(pid), Path(f"/proc/{pid}/ns/pid").stat().st_ino
            )
            # A killed init is told first and refuses later; who is born between dies with it.
            if not self._has_killed_init(child) or time.monotonic() > deadline:
                break
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            child.pidfd.close()
        self._children.append(child)
        numbers = re.search(r"^NSpid:(.*)", Path(f"/proc/{pid}/status").read_text(), re.M)
        assert numbers is not None
        inside = numbers[1].split()[1:]
        return int(inside[0]) if inside else 0

    def _has_killed_init(self, child: _WorkerChild) -> bool:
        others = [each for each in self._children if each.home == child.home]
        return bool(others) and others[0].is_killed and child.home != self._home_inode

    @functools.cached_property
    def _home_inode(self) -> int:
        return os.fstat(self._home[list(NamespaceType).index(NamespaceType.PID)].fileno()).st_ino

    def open(self, process: int, kind: NamespaceType) -> bool | None:
        if process >= len(self._children):
            return None
        child = self._children[process]
        anchor = Anchor(child.pid, child.pidfd, "")
        self._open.append(open_namespace(anchor, kind, self._features))
        return True

    def open_own(self, kind: NamespaceType) -> bool:
        self._open.append(self._open_own(kind, "_for_children"))
        return True

    def _open_own(self, kind: NamespaceType, which: str) -> Descriptor:
        name = PROC_NAMES[kind] + (which if kind is NamespaceType.PID else "")
        return Descriptor(self._do(os.open, f"/proc/thread-self/ns/{name}", OPEN_TO_READ))

    def kind_of(self, descriptor: int) -> Kind:
        if descriptor >= len(self._open):
            return None
        return KINDS[syscalls.ioctl(self._open[descriptor], Ioctl.NS_GET_NSTYPE)]

    def are_same(self, one: int, other: int) -> tuple[bool, bool] | None:
        if max(one, other) >= len(self._open):
            return None
        fds = [self._open[which].fileno() for which in (one, other)]
        first, second = (KernelInspector(self._features).inspect(fd) for fd in fds)
        inodes = [os.fstat(fd).st_ino for fd in fds]
        return first == second, inodes[0] == inodes[1]

    def find_init(self, descriptor: int) -> bool | None:
        if self.kind_of(descriptor) is not NamespaceType.PID:
            return None
        syscalls.ioctl(self._open[descriptor], Ioctl.NS_GET_PID_FROM_PIDNS, 1)
        return True

    def kill(self, process: int) -> None:
        if process >= len(self._children) or self._children[process].is_reaped:
            return
        child = self._children[process]
        os.kill(child.pid, signal.SIGKILL)
        child.is_killed = True
        # It has died as far as its namespaces go; an init may have to wait for the others.
        self._await_end_of(child)
        if self._is_init(child):
            for other in self._children:
                if other.home == child.home and other is not child:
                    _wait_readable(other.pidfd)

    def _is_init(self, child: _WorkerChild) -> bool:
        first = next(each for each in self._children if each.home == child.home)
        return first is child and child.home != self._home_inode

    def _await_end_of(self, child: _WorkerChild) -> None:
        with contextlib.suppress(SyscallError):
            while True:
                syscalls.ioctl_descriptor(child.pidfd, Ioctl.PIDFD_GET_NET_NAMESPACE).close()
                time.sleep(0)

    def is_dead(self, process: int) -> bool | None:
        if process >= len(self._children):
            return None
        return _is_readable(self._children[process].pidfd)

    def reap(self, process: int) -> None:
        if process >= len(self._children):
            return
        child = self._children[process]
        if child.is_reaped:
            raise ChildProcessError(errno.ECHILD, "it is reaped")
        if os.waitpid(child.pid, os.WNOHANG) == (0, 0):
            raise BlockingIOError(errno.EAGAIN, "it is not dead")
        child.is_reaped = True

    def number_mount_namespaces(self, until_again: int) -> tuple[list[int], list[int]]:
        """Make one after the other, until an inode number comes again; inode numbers and ids."""
        inodes: list[int] = []
        ids: list[int] = []
        while len(inodes) < until_again and len(set(inodes)) == len(inodes):
            self.unshare(NamespaceType.MOUNT)
            with self._open_own(NamespaceType.MOUNT, "") as namespace:
                inodes.append(os.fstat(namespace.fileno()).st_ino)
                answer = bytearray(8)
                syscalls.ioctl(namespace, Ioctl.NS_GET_MNTNS_ID, answer)
                ids.append(int.from_bytes(answer, "little"))
        return inodes, ids


Namespaces: TypeAlias = SimulatedWorker | LinuxWorker


def _is_readable(descriptor: Descriptor, patience_ms: int = 0) -> bool:
    poll = select.poll()
    poll.register(descriptor.fileno(), select.POLLIN)
    return bool(poll.poll(patience_ms))


def _wait_readable(descriptor: Descriptor) -> None:
    assert _is_readable(descriptor, int(DEADLINE_S * 1000)), "it does not die"


@contextlib.contextmanager
def linux_worker() -> Iterator[LinuxWorker]:
    machine = LinuxWorker()
    try:
        yield machine
    finally:
        machine.close()
