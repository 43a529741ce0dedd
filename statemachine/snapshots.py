"""Snapshots of kernels: the whole state of a provider or of a consumer, as values with names.

`ProviderKernel.snapshot()` and `ConsumerKernel.snapshot()` take them, `restore` goes on from them.
Each is a named tuple of values that cannot change: two can be compared and hashed, printed they say
what is what, and `_replace` makes one that differs in a field.
"""

from __future__ import annotations

from typing import NamedTuple

from .effects import Timer
from .errors import NamespaceError
from .events import ConnectionId
from .messages import AllocationEnded, NamespaceRequest, NamespaceResponse
from .states import AllocationState, ConsumerState, MessageState, NoticeState, ServiceState


class ConsumerSnapshot(NamedTuple):
    """What a consumer's kernel knows."""

    request: NamespaceRequest
    """What its caller wants."""
    state: ConsumerState
    """Where the allocation stands, for the caller."""
    notice: NoticeState
    """Where the end notice to the provider stands."""
    is_connected: bool
    """Whether there is a connection to the provider."""
    is_calling: bool
    """Whether it is being connected."""
    timers: frozenset[Timer]
    """Those that run."""


class MessageSnapshot(NamedTuple):
    """A message that a provider has read and not answered."""

    question: NamespaceRequest | AllocationEnded | None
    """What it asks; None: a frame that could not be read."""
    state: MessageState
    """Whether its answer is known, and which it is."""
    error: NamespaceError | None
    """The answer, if it is an error."""


class ConnectionSnapshot(NamedTuple):
    """A connection of a consumer, as its provider knows it."""

    number: ConnectionId
    """Which connection."""
    uid: int
    """The user at its other end."""
    is_closing: bool
    """Whether the provider has closed it; then nothing is read or answered any more."""
    messages: tuple[MessageSnapshot, ...]
    """Those whose answers have not left, in the order of their arrival."""


class AllocationSnapshot(NamedTuple):
    """One incarnation of an allocation, as its provider knows it."""

    allocation_id: str
    request: NamespaceRequest | None
    """What was asked for."""
    response: NamespaceResponse | None
    """What was made for it; None: nothing yet, or nothing at all."""
    uid: int | None
    """Whose limit it counts for: the user that asked first; None when adopted."""
    state: AllocationState
    asked: frozenset[ConnectionId]
    """Live connections that asked for it."""
    parties: frozenset[ConnectionId]
    """Live connections that have sent any message about it."""
    holders: frozenset[ConnectionId]
    """Live connections that its descriptors were sent to, and that were not told of its end."""
    deferred: tuple[ConnectionId, ...]
    """Connections whose requests wait for its release, one for each, in the order of arrival."""
    is_being_made: bool
    """Whether the backend has not reported yet what came of the creation."""
    is_populated: bool
    """Whether its cgroup has had processes."""
    is_announced: bool
    """Whether its end has been told."""
    timers: frozenset[Timer]
    """Those that run."""
    failure: str
    """Why the creation failed; empty: it did not."""
    drain: str
    """What is still there, and why, while it cannot be released."""


class HeldMessage(NamedTuple):
    """Which message it is that waits for the provider to be ready."""

    connection: ConnectionId
    place: int
    """Where it stands among the messages of the connection, from 0."""


class ProviderSnapshot(NamedTuple):
    """What a provider's kernel knows, but for its limits, which are not its own."""

    service: ServiceState
    """Where the provider as a whole stands."""
    connections: tuple[ConnectionSnapshot, ...]
    """Those that are open, by their numbers."""
    allocations: tuple[AllocationSnapshot, ...]
    """Those that are neither unknown nor released, by their names."""
    held: tuple[HeldMessage, ...]
    """Messages that wait for the provider to be ready, in the order of their arrival."""
    remembered: tuple[str, ...]
    """Names of released allocations, the oldest first."""
