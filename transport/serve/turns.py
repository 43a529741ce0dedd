"""Round robin in two levels: users take turns, and of each user its connections.

What waits is bounded by the caller that puts it in. Nothing here knows what an item is.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Final, Generic, TypeAlias, TypeVar

T = TypeVar("T")

Lane: TypeAlias = tuple[int | None, int]
"""A user and one of its connections. None is no user's, 0 no connection's."""


class Turns(Generic[T]):
    """
    Items that wait for their turn.

    Every user that has any is served once before one is served twice; so is every connection of a
    user, whenever it is the user's turn. The items of one connection stay in their order.
    """

    # Keeps PEER-12.

    def __init__(self) -> None:
        self._users: Final[OrderedDict[int | None, OrderedDict[int, deque[T]]]] = OrderedDict()

    def __bool__(self) -> bool:
        return bool(self._users)

    def put(self, lane: Lane, item: T) -> None:
        """Let an item wait, behind those of its connection."""
        user, connection = lane
        lanes = self._users.setdefault(user, OrderedDict())
        lanes.setdefault(connection, deque()).append(item)

    def take(self, may: Callable[[T], bool] = lambda _: True) -> T | None:
        """
        Take the next item; None if there is none.

        Args:
            may: says whether an item may be taken now. One that may not keeps its place, and what
                is behind it on its connection waits too.
        """
        for user, lanes in self._users.items():
            for connection, items in lanes.items():
                if may(items[0]):
                    return self._take_first(user, connection)
        return None

    def remove(self, lane: Lane, item: T) -> bool:
        """Take an item out of its turn; say whether it still waited."""
        user, connection = lane
        items = self._users[user].get(connection) if user in self._users else None
        if items is None or item not in items:
            return False
        items.remove(item)
        self._drop_empty(user, connection)
        return True

    def clear(self) -> None:
        """Take everything out."""
        self._users.clear()

    def _take_first(self, user: int | None, connection: int) -> T:
        lanes = self._users[user]
        item = lanes[connection].popleft()
        lanes.move_to_end(connection)
        self._users.move_to_end(user)
        self._drop_empty(user, connection)
        return item

    def _drop_empty(self, user: int | None, connection: int) -> None:
        lanes = self._users[user]
        if not lanes[connection]:
            del lanes[connection]
        if not lanes:
            del self._users[user]
