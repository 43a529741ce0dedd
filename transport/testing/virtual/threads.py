"""`threading` in a virtual world: what a module uses of it, as steps of a scheduler.

    with replaced(work, "threading", VirtualThreading(world)): ...

A thread that takes a lock is not preempted while it has it: what others see is the same, as long as
they take it as well. It is, as soon as it has let go.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType

from .world import VirtualThread, VirtualWorld


@contextmanager
def replaced(module: ModuleType, name: str, value: object) -> Iterator[None]:
    """Let a name of a module mean something else meanwhile."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


class VirtualThreading:
    """Stands where a module has imported `threading`."""

    def __init__(self, world: VirtualWorld, program: object = None) -> None:
        self._world = world
        self.program = program
        self._idents = itertools.count(1)

    def Condition(self) -> VirtualCondition:  # noqa: N802  as in `threading`
        return VirtualCondition(self._world)

    def Thread(  # noqa: N802  as in `threading`
        self, *, target: Callable[[], object], name: str, daemon: bool
    ) -> WorldThread:
        return WorldThread(self._world, self.program, self._idents, target, name)

    def current_thread(self) -> object:
        running = self._world.running
        return getattr(running, "of", running)


class WorldThread:
    """A thread, as `threading.Thread` shows it."""

    def __init__(
        self,
        world: VirtualWorld,
        program: object,
        idents: Iterator[int],
        target: Callable[[], object],
        name: str,
    ) -> None:
        self.ident: int | None = None
        self._world, self._program = world, program
        self._idents, self._target, self._name = idents, target, name
        self._thread: VirtualThread | None = None

    def start(self) -> None:
        self.ident = next(self._idents)
        thread = self._world.start(self._target, self._name, self._program)
        self._thread = thread
        setattr(thread, "of", self)  # noqa: B010  found again by `current_thread`

    def join(self) -> None:
        thread = self._thread
        assert thread is not None
        if not thread.is_done:
            self._world.switch("joins a thread", lambda: thread.is_done)


class VirtualCondition:
    """A condition and its lock."""

    def __init__(self, world: VirtualWorld) -> None:
        self._world = world
        self._holder: object = None
        self._waiting: list[list[bool]] = []

    def __enter__(self) -> VirtualCondition:
        if self._holder is not None:
            self._world.switch("takes a lock", lambda: self._holder is None)
        self._holder = self._world.running or self
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._holder = None
        if exc_info[0] is None:
            self._world.switch("has let go of a lock")

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is None, "nothing that is tried here waits for a time"
        ticket = [False]
        self._waiting.append(ticket)
        self._holder = None
        self._world.switch("is woken", lambda: ticket[0] and self._holder is None)
        self._holder = self._world.running or self
        return True

    def notify(self, count: int = 1) -> None:
        woken, self._waiting = self._waiting[:count], self._waiting[count:]
        for ticket in woken:
            ticket[0] = True

    def notify_all(self) -> None:
        self.notify(len(self._waiting))
