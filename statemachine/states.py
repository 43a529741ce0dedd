"""The states of every table of `lifecycle`, and what each means.

Apart from the tables, because a program that shows or stores a state moves none.
"""

from __future__ import annotations

from enum import Enum


class AllocationState(Enum):
    """Where an allocation stands, in the provider's view."""

    UNKNOWN = "unknown"
    """It was never asked for, or it is forgotten."""
    REQUESTED = "requested"
    """The backend is making it."""
    CREATED = "created"
    """It exists; its descriptors have not left yet."""
    HANDED_OFF = "handed_off"
    """At least one consumer has its descriptors."""
    ENDED = "ended"
    """It is over; the backend is releasing it, or has not managed to yet."""
    RELEASED = "released"
    """Nothing of it is left on the machine; only the name is remembered."""


class ConsumerState(Enum):
    """Where an allocation stands, in the consumer's view."""

    IDLE = "idle"
    """Nothing has been asked."""
    CONNECTING = "connecting"
    """The consumer is connecting to the provider."""
    ASKING = "asking"
    """The request is on its way, or the answer is."""
    HELD = "held"
    """The caller has the provider's namespaces."""
    SERVING_SELF = "serving_self"
    """The consumer is making its own."""
    SELF_HELD = "self_held"
    """The caller has the consumer's own namespaces: degraded."""
    ENDING = "ending"
    """The caller is done; the provider has not confirmed yet."""
    REFUSED = "refused"
    """The provider cannot grant this request; there are no namespaces."""
    FAILED = "failed"
    """Neither the provider nor self-service could; there are no namespaces."""
    ENDED = "ended"
    """The allocation is over."""


class NoticeState(Enum):
    """Where the `AllocationEnded` stands that a consumer may have to send."""

    SILENT = "silent"
    """Nothing is to be sent."""
    OWED = "owed"
    """It is to be sent at the next attempt to connect."""
    DIALLING = "dialling"
    """The consumer is connecting to send it."""
    TOLD = "told"
    """It is sent; the provider has not confirmed."""
    HEARD = "heard"
    """The provider has confirmed."""


class ServiceState(Enum):
    """Where the provider as a whole stands."""

    STARTING = "starting"
    """It does not know yet what is alive from before; messages are held."""
    READY = "ready"
    """Messages are answered."""
    STOPPING = "stopping"
    """Requests are refused; ends are still taken."""
    ABORTED = "aborted"
    """Stopped before it was ready: every message is refused."""

    @property
    def is_stopping(self) -> bool:
        """Whether the provider was told to stop."""
        return self in (ServiceState.STOPPING, ServiceState.ABORTED)


class MessageState(Enum):
    """Where a message of a consumer stands, between its arrival and its answer."""

    ARRIVED = "arrived"
    """It has been read."""
    HELD = "held"
    """It waits for the provider to be ready."""
    OPEN = "open"
    """It has been put to its allocation, which has no answer yet."""
    DEFERRED = "deferred"
    """A request that waits for the release of the allocation before it."""
    GRANTED = "granted"
    """A request whose namespaces exist."""
    REFUSED = "refused"
    """Its answer is an error."""
    CONFIRMED = "confirmed"
    """Its answer is `AllocationEnded`."""
    UNREADABLE = "unreadable"
    """A frame that is no message; its answer closes the connection."""
    ANSWERED = "answered"
    """Its answer has left."""
