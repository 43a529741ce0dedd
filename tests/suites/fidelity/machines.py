"""What the machines of all families of facts have in common.

Each family of facts that the simulation models is one class of operations, and two that perform
them: in memory, and on the Linux kernel that runs this. What an operation returns is what a program
can see of it and nothing else, with names for what has no name of its own on Linux (which file,
which namespace, which image). What fails raises `OSError`.

    sockets      descriptors, their limit, SCM_RIGHTS
    cgroups      populated, frozen, kill, remove, notification
    namespaces   types, ids, entering, inits that die
    mounts       propagation, what is busy, images and their loop devices

`test_fidelity` has one test for each fact, `differential` draws programs of all operations.
"""

from __future__ import annotations

import os
import shutil
from typing import Any, Final, NamedTuple

PATIENCE_S: Final = 0.3
"""How long Linux may take with what it does in a moment; a wake-up of a cgroup takes 20 ms."""

OPEN_TO_READ: Final = os.O_RDONLY | os.O_CLOEXEC

SLEEP: Final = shutil.which("sleep") or "/bin/sleep"
"""What processes of these tests execute."""


class Operation(NamedTuple):
    """One operation of a family, with its arguments."""

    name: str
    arguments: tuple[Any, ...] = ()

    def __str__(self) -> str:
        return f"{self.name}({', '.join(map(repr, self.arguments))})"


class SimulatedMachine:
    """What the machines in memory have in common."""

    def told(self, call: Operation, answer: object) -> None:
        """Learn what Linux answered to the call that comes next, if that cannot be known."""

    def close(self) -> None:
        """There is nothing to close."""
