"""`AnchorPool`: anchors with namespaces that are made before an allocation wants them.

An anchor of the pool is as fresh as one that is made for a request: no process was ever in its
namespaces, none of its descriptors was ever given away, and it is dropped when the node's mounts
have changed since it was made. It is taken once, for one allocation, whose token is the anchor's
from then on. So a provider that is killed leaves nothing that its successor could mistake: an
anchor without an entry in the journal was handed to no one, and is killed.

The pool gives way. Anchors are made while no creation was begun for a while; a kind that is not
asked for is let go, until it is asked for again; and when tasks of the node wait for memory, all.
"""

from __future__ import annotations

import logging
import math
import os
import re
import select
import threading
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeAlias

from statemachine.messages import NamespaceType
from transport.calls import syscall
from transport.descriptors import Descriptor, Owner

from .anchor import Anchor
from .forge.plan import ForgeError
from .mountinfo import MountWatch
from .syscalls import SyscallError, calling

POOL_TOKEN_PREFIX: Final = "pool-"
"""How the tokens of anchors begin that were made for the pool."""

POOL_MAX: Final = 64
"""Most anchors in a pool, of all types: each takes some 100 kB and a descriptor."""

QUIET_S: Final = 0.02
"""How long no creation must have begun before the next anchor is made ahead."""

UNUSED_S: Final = 600.0
"""An anchor that waits for so long is let go; and no more of its kind are made before one is asked
for, when none was for so long."""

CHANGED_S: Final = 1.0
"""How long after a change of the node's mounts no mount namespace is made ahead."""

FAILED_S: Final = 5.0
"""How long nothing is made after it could not be."""

PRESSURE_MAX: Final = 10.0
"""Percent of the last ten seconds in which some task waited for memory: with more, all are let go,
and none is made."""

PRESSURE_LOOK_S: Final = 10.0
"""How often that is looked at, while there is an anchor to let go."""

MEMORY_PRESSURE: Final = Path("/proc/pressure/memory")
"""Where the Linux kernel says for how long tasks wait for memory, if it is built to."""

DYING_MS: Final = 200
"""How long to wait for the end of each anchor when a provider stops; it takes a millisecond."""

NamespaceTypes: TypeAlias = frozenset[NamespaceType]
"""Which namespaces an anchor has."""

_log: Final = logging.getLogger(__name__)


@dataclass(slots=True)
class _Shelf:
    """The anchors of one kind."""

    most: int
    asked_at: float
    """When one was asked for last, or the pool began."""
    ready: deque[tuple[Anchor, float]] = field(default_factory=deque)
    """The oldest first, each with the time when it was made."""


class AnchorPool(Owner):
    """
    Anchors that wait for their allocation. Usable from any thread.

    Args:
        most: How many of each kind are kept ready.
        make: Makes an anchor of a kind, with the given token; raises `ForgeError`.
        clock: Monotonic seconds.
        pressure: Where the Linux kernel says how long tasks wait for memory; it need not be there.

    Raises:
        ValueError: it would have more than `POOL_MAX`.
        SyscallError: no descriptor is left.
    """

    def __init__(
        self,
        most: Mapping[NamespaceTypes, int],
        make: Callable[[NamespaceTypes, str], Anchor],
        clock: Callable[[], float],
        pressure: Path = MEMORY_PRESSURE,
    ) -> None:
        # Keeps DAEMON-14.
        if sum(most.values()) > POOL_MAX:
            raise ValueError(f"a pool has at most {POOL_MAX} anchors, not {sum(most.values())}")
        self._make: Final = make
        self._clock: Final = clock
        self._pressure: Final = pressure
        self._guard: Final = threading.Lock()
        now = clock()
        self._shelves: Final = {types: _Shelf(count, now) for types, count in most.items() if count}
        # Before these no anchor is made ahead, and none with a mount namespace.
        self._not_before = self._mounts_not_before = now
        self._look_at = now
        self._changes = 0
        self._is_closed = False
        self._thread: threading.Thread | None = None
        with ExitStack() as undo:
            with calling("eventfd(2)"):
                self._wake: Final = Descriptor(syscall(os.eventfd, 0))
            undo.callback(self._wake.close)
            # One for each that looks: a look takes the news away from the next one.
            self._mounts: Final = undo.enter_context(MountWatch())
            self._mounts_of_thread: Final = MountWatch()
            undo.pop_all()

    def __len__(self) -> int:
        with self._guard:
            return sum(len(shelf.ready) for shelf in self._shelves.values())

    def start(self) -> None:
        """Fill the pool from now on, in a thread of its own; without one it stays empty."""
        thread = threading.Thread(target=self._work, name="pool", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # all that Python says of it
            _log.warning("no anchors are made ahead: %s", error)
        else:
            self._thread = thread

    def take(self, types: NamespaceTypes) -> Anchor | None:
        """
        Take an anchor that has exactly these namespaces.

        Returns:
            The anchor, owned by the caller; None if none is ready. It may have been killed since.
        """
        # Keeps DAEMON-13.
        dropped: list[Anchor] = []
        with self._guard:
            now = self._clock()
            self._not_before = max(self._not_before, now + QUIET_S)
            shelf = self._shelves.get(types)
            if shelf is None:
                return None
            if self._mounts.has_changed():
                dropped += self._drop_mounts()
            shelf.asked_at = now
            taken = shelf.ready.popleft()[0] if shelf.ready else None
        _end(dropped)
        self._rouse()
        return taken

    def fill(self, *, at_once: bool = False) -> bool:
        """
        Make one anchor that is missing.

        Args:
            at_once: Also if it is not time for one yet.

        Returns:
            Whether one was made.
        """
        with self._guard:
            types = self._missing(math.inf if at_once else 0.0)
            changes = self._changes
        if types is None or not self._has_memory():
            return False
        try:
            anchor = self._make(types, new_pool_token())
        except (ForgeError, SyscallError) as error:
            _log.warning("no anchor can be made ahead: %s", error)
            with self._guard:
                self._not_before = self._clock() + FAILED_S
            return False
        with self._guard:
            is_fresh = changes == self._changes or NamespaceType.MOUNT not in types
            if is_fresh and not self._is_closed:
                self._shelves[types].ready.append((anchor, self._clock()))
                return True
        _end([anchor])
        return False

    def tend(self, *, is_changed: bool = False) -> bool:
        """
        Let go what is not to wait any longer, and make one anchor that is missing.

        Args:
            is_changed: Whether the node's mounts have changed.

        Returns:
            Whether one was made.
        """
        with self._guard:
            dropped = self._drop_mounts() if is_changed else self._drop_old()
        _end(dropped)
        if self._clock() >= self._look_at:
            self._has_memory()
        return self.fill()

    def _has_memory(self) -> bool:
        """Look whether tasks wait for memory; then let all anchors go."""
        self._look_at = self._clock() + PRESSURE_LOOK_S
        waiting = _waiting_for_memory(self._pressure)
        if waiting <= PRESSURE_MAX:
            return True
        self.drop(f"tasks waited for memory in {waiting:g} % of the time", PRESSURE_LOOK_S)
        return False

    def drop(self, why: str, pause_s: float = 0.0, *, patience_ms: int = 0) -> None:
        """Let all anchors go, and make none for a while; wait for the end of each, if told to."""
        with self._guard:
            self._not_before = max(self._not_before, self._clock() + pause_s)
            dropped = [each for shelf in self._shelves.values() for each, _ in shelf.ready]
            for shelf in self._shelves.values():
                shelf.ready.clear()
        if dropped:
            _log.info("%d anchors that were made ahead are let go: %s", len(dropped), why)
        _end(dropped, patience_ms)

    def close(self) -> None:
        """End all anchors that were not taken, and the thread. Idempotent."""
        with self._guard:
            was_closed, self._is_closed = self._is_closed, True
        if was_closed:
            return
        self._rouse()
        if self._thread is not None:
            self._thread.join()
        # Else the cgroup that they are in could not be removed.
        self.drop("the provider stops", patience_ms=DYING_MS)
        for owner in (self._wake, self._mounts, self._mounts_of_thread):
            owner.close()

    def __enter__(self) -> AnchorPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # With the guard held.

    def _due_s(self, types: NamespaceTypes) -> float | None:
        """Say in how many seconds an anchor is to be made; None: there are enough."""
        now, shelf = self._clock(), self._shelves[types]
        if len(shelf.ready) >= shelf.most or now >= shelf.asked_at + UNUSED_S:
            return None
        is_mount = NamespaceType.MOUNT in types
        return max(0.0, self._not_before - now, self._mounts_not_before - now if is_mount else 0.0)

    def _missing(self, within_s: float) -> NamespaceTypes | None:
        """Say of which kind an anchor is to be made by then."""
        for types in self._shelves:
            due_s = self._due_s(types)
            if due_s is not None and due_s <= within_s:
                return types
        return None

    def _next_s(self) -> float | None:
        """Say in how many seconds there is something to do; None: not by itself."""
        now = self._clock()
        times = [due for due in map(self._due_s, self._shelves) if due is not None]
        for shelf in self._shelves.values():
            if shelf.ready:
                times += [shelf.ready[0][1] + UNUSED_S - now, self._look_at - now]
        return max(0.0, min(times)) if times else None

    def _drop_mounts(self) -> list[Anchor]:
        """Give up every anchor that has a mount namespace: it would not have the node's mounts."""
        self._mounts_not_before = self._clock() + CHANGED_S
        self._changes += 1
        dropped = []
        for types, shelf in self._shelves.items():
            if NamespaceType.MOUNT in types:
                dropped += [anchor for anchor, _ in shelf.ready]
                shelf.ready.clear()
        return dropped

    def _drop_old(self) -> list[Anchor]:
        latest = self._clock() - UNUSED_S
        dropped = []
        for shelf in self._shelves.values():
            while shelf.ready and shelf.ready[0][1] <= latest:
                dropped.append(shelf.ready.popleft()[0])
        return dropped

    # In its own thread.

    def _work(self) -> None:
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        poll.register(self._mounts_of_thread, select.POLLPRI)
        while not self._is_closed:
            self._turn(poll)

    def _turn(self, poll: select.poll) -> None:
        """Wait until there is something to do, and do it."""
        with self._guard:
            next_s = self._next_s()
        # One millisecond more: poll rounds down, and would return just before.
        ready = [number for number, _ in poll.poll(None if next_s is None else next_s * 1e3 + 1)]
        if self._wake.fileno() in ready:
            syscall(os.eventfd_read, self._wake.fileno())
        self.tend(is_changed=self._mounts_of_thread.fileno() in ready)

    def _rouse(self) -> None:
        if self._thread is not None:
            with suppress(ValueError):  # closed meanwhile
                syscall(os.eventfd_write, self._wake.fileno(), 1)


def new_pool_token() -> str:
    """Return a token that no other anchor ever has."""
    return POOL_TOKEN_PREFIX + os.urandom(16).hex()


def _end(anchors: list[Anchor], patience_ms: int = 0) -> None:
    for anchor in anchors:
        with suppress(SyscallError):
            anchor.kill()
    for anchor in anchors:
        with anchor:
            anchor.is_alive(patience_ms)


def _waiting_for_memory(pressure: Path) -> float:
    """Read how many percent of the last ten seconds some task waited; 0 where that is not said."""
    try:
        text = syscall(pressure.read_text, encoding="ascii")
    except OSError:
        return 0.0
    found = re.search(r"^some avg10=([0-9.]+)", text)
    return float(found[1]) if found else 0.0
