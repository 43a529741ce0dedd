"""Round robin in two levels: users take turns, and of each user its connections.

One that was idle comes before those that go on, as a new flow does in fq_codel (RFC 8290): so a
request on a connection of its own does not wait for the hundreds that others have sent before.

What waits is bounded by the caller that puts it in. Nothing here knows what an item is.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any, Final, Generic, Protocol, TypeAlias, TypeVar

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
K = TypeVar("K")
W = TypeVar("W", bound="_InTurn[Any]")

Lane: TypeAlias = tuple[int | None, int]
"""A user and one of its connections. None is no user's, 0 no connection's."""

IDLE_IN_A_ROW_MAX: Final = 4
"""How often in a row one that was idle comes first: those that go on get their share all the same.
"""


class Turns(Generic[T]):
    """
    Items that wait for their turn.

    Every user that has any is served once before one is served twice; so is every connection of a
    user, whenever it is the user's turn. The items of one connection stay in their order. A user or
    a connection that had nothing to do since its last turn is served before those that had.
    """

    # Keeps PEER-12.

    def __init__(self) -> None:
        self._users: _Round[int | None, _Round[int, _Queue[T], T], T] = _Round()
        self._count = 0

    def __bool__(self) -> bool:
        return self._count > 0

    def put(self, lane: Lane, item: T) -> None:
        """Let an item wait, behind those of its connection."""
        user, connection = lane
        lanes = self._users.find(user) or self._users.add(user, _Round())
        queue = lanes.find(connection)
        if queue is None:
            queue = lanes.add(connection, _Queue())
        queue.append(item)
        self._count += 1

    def take(self, may: Callable[[T], bool] = lambda _: True) -> T | None:
        """
        Take the next item; None if there is none.

        Args:
            may: says whether an item may be taken now. One that may not keeps its place, and what
                is behind it on its connection waits too.
        """
        item = self._users.take(may)
        if item is not None:
            self._leave(1)
        return item

    def remove(self, lane: Lane, item: T) -> bool:
        """Take an item out of its turn; say whether it still waited."""
        user, connection = lane
        lanes = self._users.find(user)
        queue = None if lanes is None else lanes.find(connection)
        if queue is None or item not in queue:
            return False
        queue.remove(item)
        self._leave(1)
        return True

    def clear(self) -> None:
        """Take everything out."""
        self._leave(self._count)

    def _leave(self, count: int) -> None:
        self._count -= count
        if not self._count:
            # All are idle now.
            self._users = _Round()


class _InTurn(Protocol[T_co]):
    def __len__(self) -> int: ...

    def take(self, may: Callable[[T_co], bool]) -> T_co | None: ...


class _Queue(deque[T]):
    def take(self, may: Callable[[T], bool]) -> T | None:
        return self.popleft() if self and may(self[0]) else None


class _Round(Generic[K, W, T]):
    """An order of turns: what was served goes to its end, and leaves it if it is idle by then."""

    def __init__(self) -> None:
        self._idle_before: Final[OrderedDict[K, W]] = OrderedDict()
        """What has come into this order since, and was not served yet."""
        self._others: Final[OrderedDict[K, W]] = OrderedDict()
        self._in_a_row = 0
        """How often one of the first was served last."""

    def __len__(self) -> int:
        return len(self._idle_before) + len(self._others)

    def find(self, key: K) -> W | None:
        found = self._idle_before.get(key)
        return self._others.get(key) if found is None else found

    def add(self, key: K, waiting: W) -> W:
        self._idle_before[key] = waiting
        return waiting

    def take(self, may: Callable[[T], bool]) -> T | None:
        idle: list[K] = []
        item: T | None = None
        for key, waiting in self._in_order():
            item = waiting.take(may)
            if item is not None:
                self._move_to_end(key)
                break
            if not waiting:
                idle.append(key)
        for key in idle:
            self._idle_before.pop(key, None)
            self._others.pop(key, None)
        return item

    def _in_order(self) -> Iterator[tuple[K, W]]:
        first, then = self._idle_before, self._others
        if self._in_a_row >= IDLE_IN_A_ROW_MAX:
            first, then = then, first
        return chain(first.items(), then.items())

    def _move_to_end(self, key: K) -> None:
        if key in self._idle_before:
            self._others[key] = self._idle_before.pop(key)
            self._in_a_row += 1
        else:
            self._others.move_to_end(key)
            self._in_a_row = 0
