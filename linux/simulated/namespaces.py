"""Model of namespaces and processes: types, ids, setns, fork, and the end of a PID namespace.

The part of namespaces that a hand-over meets. A PID namespace takes longer to end than its init.
Random programs compare it with Linux.

    task.unshare(kind)       PID: the next child's, not its own; a second time EINVAL
    task.setns(ns, kind)     EINVAL if the kind is wrong; a dead PID namespace can be entered
    task.fork()              ENOMEM in a dead PID namespace
    task.kill()              of an init: all die, and it stays until every one of them is reaped

Not simulated: user namespaces, privileges, and threads that share their root.
"""

from __future__ import annotations

import errno
import os
from enum import Enum
from typing import Final, NoReturn

from statemachine.messages import NamespaceType

FIRST_INODE: Final = 0xF0000001
"""The lowest inode number of a namespace, as on Linux."""

PID: Final = NamespaceType.PID
"""The kind of namespace that has an init."""


class TaskState(Enum):
    """The state of a task."""

    RUNNING = "running"
    DYING = "dying"
    """An init that was killed and waits until everything in its namespace is reaped."""
    DEAD = "dead"
    """A zombie."""
    REAPED = "reaped"


class SimulatedNamespace:
    """A namespace; it exists as long as anything refers to it."""

    def __init__(self, kind: NamespaceType, unique_id: int, inode: int) -> None:
        self.kind = kind
        self.unique_id = unique_id
        """Never reused, like NS_GET_ID."""
        self.inode = inode
        """Reused as soon as the namespace is gone."""
        self.init: SimulatedTask | None = None
        """Of a PID namespace: its first task; None before that."""
        self.members: list[SimulatedTask] = []
        """Of a PID namespace: all tasks in it that are not reaped."""
        self.last_number = 0

    @property
    def has_init(self) -> bool:
        """Whether its first task can be found by its pid: also as a zombie."""
        return self.init is not None and self.init.state is not TaskState.REAPED

    @property
    def takes_tasks(self) -> bool:
        """Whether a task can be started in it: its init lives, or is the one to be started."""
        return self.init is None or self.init.state is TaskState.RUNNING


class SimulatedNamespaces:
    """Makes the namespaces of one machine, and numbers them."""

    def __init__(self) -> None:
        self._last_id = 0
        self._next_inode = FIRST_INODE
        self._free_inodes: list[int] = []

    def make(self, kind: NamespaceType) -> SimulatedNamespace:
        """Make one, with a new id and the lowest free inode number."""
        self._last_id += 1
        if self._free_inodes:
            inode = min(self._free_inodes)
            self._free_inodes.remove(inode)
        else:
            inode, self._next_inode = self._next_inode, self._next_inode + 1
        return SimulatedNamespace(kind, self._last_id, inode)

    def drop(self, namespace: SimulatedNamespace) -> None:
        """Free the inode number of one that is gone."""
        self._free_inodes.append(namespace.inode)

    def boot(self) -> SimulatedTask:
        """Start the first task of the machine, in namespaces of its own."""
        home = {kind: self.make(kind) for kind in NamespaceType}
        return SimulatedTask(self, home, home[PID])


class SimulatedTask:
    """One task: its namespaces, those of its children, and its end."""

    def __init__(
        self,
        machine: SimulatedNamespaces,
        namespaces: dict[NamespaceType, SimulatedNamespace],
        for_children: SimulatedNamespace,
    ) -> None:
        self._machine = machine
        self._namespaces = namespaces
        self._for_children = for_children
        self.state = TaskState.RUNNING
        home = namespaces[PID]
        home.last_number += 1
        self.number = home.last_number
        """Its pid in its own PID namespace."""
        home.members.append(self)
        if home.init is None:
            home.init = self

    def namespace(self, kind: NamespaceType) -> SimulatedNamespace:
        """Return one of its namespaces; ESRCH when it is not running any more."""
        if self.state is not TaskState.RUNNING:
            _refuse(errno.ESRCH)
        return self._namespaces[kind]

    @property
    def pid_for_children(self) -> SimulatedNamespace:
        """The PID namespace of its next children; ENOENT before the first of them."""
        if self._for_children.init is None:
            _refuse(errno.ENOENT)
        return self._for_children

    def unshare(self, kind: NamespaceType) -> None:
        """Move into a new namespace; EINVAL if its children have left its PID namespace."""
        if kind is not PID:
            self._namespaces[kind] = self._machine.make(kind)
            return
        if self._for_children is not self._namespaces[PID]:
            _refuse(errno.EINVAL)
        self._for_children = self._machine.make(PID)

    def setns(self, namespace: SimulatedNamespace, kind: NamespaceType | None) -> None:
        """Move into a namespace of that kind, or of any; EINVAL if it is of another."""
        if kind not in (None, namespace.kind):
            _refuse(errno.EINVAL)
        if namespace.kind is PID:
            self._for_children = namespace
        else:
            self._namespaces[namespace.kind] = namespace

    def fork(self) -> SimulatedTask:
        """Start a child; ENOMEM if the init of the PID namespace it would be in has died."""
        if not self._for_children.takes_tasks:
            _refuse(errno.ENOMEM)
        namespaces = {**self._namespaces, PID: self._for_children}
        return SimulatedTask(self._machine, namespaces, self._for_children)

    def kill(self) -> None:
        """Kill it; with an init, everything in its PID namespace."""
        if self.state is not TaskState.RUNNING:
            return
        home = self._namespaces[PID]
        if home.init is not self:
            self.state = TaskState.DEAD
            return
        self.state = TaskState.DYING
        for member in home.members:
            member.kill()
        self._end_if_alone()

    def reap(self) -> None:
        """
        Reap it: afterwards there is no such task.

        Raises:
            OSError: EAGAIN, it is not dead yet; ECHILD, it is reaped.
        """
        if self.state is TaskState.REAPED:
            _refuse(errno.ECHILD)
        if self.state is not TaskState.DEAD:
            _refuse(errno.EAGAIN)
        self.state = TaskState.REAPED
        home = self._namespaces[PID]
        home.members.remove(self)
        if home.init is not None:
            home.init._end_if_alone()

    def _end_if_alone(self) -> None:
        if self.state is TaskState.DYING and self._namespaces[PID].members == [self]:
            self.state = TaskState.DEAD


def _refuse(number: int) -> NoReturn:
    raise OSError(number, os.strerror(number))
