"""Limits of a provider: who may use it, and how much of it.

A limit is on what one connection or one user takes up, so that no peer can use up what is there
for all. A request over a limit is refused by name; ends are not limited, because they free
something.
"""

from __future__ import annotations

from typing import Final

from ..errors import CreationFailed
from ..record import record

WAITING_MAX: Final = 128
"""Most messages that wait for the provider to be ready."""

REMEMBERED_MAX: Final = 1024
"""Most names of released allocations that are remembered; the oldest is forgotten first."""

OPEN_MESSAGES_PER_CONNECTION_MAX: Final = 64
"""Most unanswered messages of one connection; more than twice as many close it."""

OPEN_MESSAGES_PER_UID_MAX: Final = 1024
"""Most unanswered messages of all connections of one user."""

ALLOCATIONS_PER_UID_MAX: Final = 4096
"""Most allocations of one user that are alive."""

CONNECTIONS_PER_UID_MAX: Final = 4096
"""Most connections of one user."""


@record
class Limits:
    """Who may use the provider, and how much of it. The defaults are the constants above."""

    allowed_uids: frozenset[int] = frozenset({0})
    """Users whose connections are served; the driver puts its own first."""
    waiting: int = WAITING_MAX
    """Most messages that wait for the provider to be ready."""
    open_per_connection: int = OPEN_MESSAGES_PER_CONNECTION_MAX
    """Most unanswered messages of a connection."""
    open_per_uid: int = OPEN_MESSAGES_PER_UID_MAX
    """Most unanswered messages of a user."""
    allocations_per_uid: int = ALLOCATIONS_PER_UID_MAX
    """Most allocations of a user that are not released."""
    connections_per_uid: int = CONNECTIONS_PER_UID_MAX
    """Most connections of a user."""
    remembered: int = REMEMBERED_MAX
    """Most names of released allocations."""

    @property
    def flood(self) -> int:
        """Most unanswered messages of a connection that stays open, refused ones included."""
        return 2 * self.open_per_connection


class Usage:
    """
    What one user takes up.

    Attributes:
        connections: Open ones, those included that the provider has closed.
        messages: Of these connections, those whose answers have not left.
        allocations: Those that this user asked for first, and that are not released.
    """

    __slots__ = ("allocations", "connections", "messages")

    def __init__(self) -> None:
        self.connections = 0
        self.messages = 0
        self.allocations = 0


def over(what: str, most: int) -> CreationFailed:
    """Make the refusal that names a limit."""
    return CreationFailed(f"limit reached: {what}, at most {most}")
