"""`select` in a virtual world: a thread that polls lets others go on until there is something."""

from __future__ import annotations

import select

from .world import VirtualWorld


class VirtualSelect:
    """Stands where a module has imported `select`: who polls lets others go on."""

    POLLIN, POLLOUT = select.POLLIN, select.POLLOUT

    def __init__(self, world: VirtualWorld) -> None:
        self._world = world

    def poll(self) -> _VirtualPoll:
        return _VirtualPoll(self._world)


class _VirtualPoll:
    def __init__(self, world: VirtualWorld) -> None:
        self._world = world
        self._poll = select.poll()

    def register(self, fd: int, events: int) -> None:
        self._poll.register(fd, events)

    def poll(self, timeout_ms: float | None = None) -> list[tuple[int, int]]:
        if timeout_ms != 0:
            until = None if timeout_ms is None else self._world.now + timeout_ms / 1000.0
            self._world.switch("polls", lambda: bool(self._poll.poll(0)), lambda: until)
        return self._poll.poll(0)
