"""`KeptConnections`: connections whose allocation is over, for the next requests of a consumer.

A connection is kept only when all that was said on it is answered and its allocation is over or was
refused: a provider counts those that asked for an allocation and are connected, and an unused one
lives as long as there are any. One thing may still come on it: where the end of an allocation was
announced and asked for at the same time, the answer to the latter.
"""

from __future__ import annotations

import os
from typing import Final, NamedTuple

from statemachine.errors import AllocationNotFound
from statemachine.messages import AllocationEnded, Message

from ..channel import Channel, Delivery

FORMER_MAX: Final = 64
"""With so many former allocations a connection is closed, because each is remembered."""


class KeptConnection(NamedTuple):
    """A connection, and the ids of the allocations that were had on it."""

    channel: Channel
    """Open, with nothing that waits to be sent."""
    former: frozenset[str]
    """The ids of the allocations that were had on it."""


def is_about(message: Message, former: frozenset[str]) -> bool:
    """Say whether a message is the end of an allocation that was had on its connection before."""
    return (
        isinstance(message, (AllocationEnded, AllocationNotFound))
        and message.allocation_id in former
    )


class KeptConnections:
    """
    Connections that are free again; each belongs to this object until it is taken.

    May be used by several threads. After fork(2) the child has none of them.

    Args:
        count: how many are kept at most; what comes beyond that is closed.
    """

    def __init__(self, count: int) -> None:
        self._count: Final = count
        self._free: list[KeptConnection] = []
        self._pid = os.getpid()
        self._is_closed = False

    def put(self, kept: KeptConnection) -> None:
        """Keep a connection, or close it."""
        is_fit = len(kept.former) < FORMER_MAX and not kept.channel.wants_write
        if not is_fit or self._is_closed or len(self._free) >= self._count:
            kept.channel.close()
            return
        self._free.append(kept)

    def take(self) -> KeptConnection | None:
        """Take the one that was used last and is still connected; the caller owns it."""
        if self._pid != os.getpid():
            self._drop()
            self._pid = os.getpid()
        while self._free:
            kept = self._free.pop()
            if _is_quiet(kept):
                return kept
            kept.channel.close()
        return None

    def close(self) -> None:
        """Close all that are kept, and all that come from here on."""
        self._is_closed = True
        self._drop()

    def _drop(self) -> None:
        while self._free:
            self._free.pop().channel.close()


def _is_quiet(kept: KeptConnection) -> bool:
    """Take in what has come on a connection, and say whether it is as good as new."""
    is_quiet = True
    for received in kept.channel.receive():
        if isinstance(received, Delivery):
            received.bundle.close()
        is_quiet &= isinstance(received, Delivery) and is_about(received.message, kept.former)
    return is_quiet and not kept.channel.is_mid_frame
