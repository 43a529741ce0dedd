"""What shall be done: the kernels' only output, in the imperative.

A driver performs the effects of one `receive` in the order in which they stand, and reports what
came of each as a later event. The obligations of the driver stand on the effect that brings them.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias

from .errors import NamespaceError
from .events import ConnectionId
from .messages import NamespaceRequest, NamespaceResponse


class Timer(Enum):
    """The spans a driver measures. Kernels know which, never how long."""

    READINESS = "readiness"
    """How long a request may wait for the provider to be ready. Expires as `ReadinessOverdue`."""
    CLAIM = "claim"
    """How long an unused allocation is kept with nobody there. Expires as `ClaimExpired`."""
    RELEASE = "release"
    """How long an end may go unannounced. Expires as `ReleaseOverdue`."""
    RETRY = "retry"
    """The pause before the next try to release. Expires as `RetryDue`."""
    ANSWER = "answer"
    """How long a consumer waits for an answer. Expires as `AnswerOverdue`."""
    NOTICE = "notice"
    """How long a consumer waits for an end to be confirmed. Expires as `NoticeOverdue`."""
    REDIAL = "redial"
    """The pause before a consumer calls again to tell of an end. Expires as `NoticeDue`."""


@dataclass(frozen=True, slots=True)
class Effect:
    """Something to be done by the driver."""


@dataclass(frozen=True, slots=True)
class StartTimer(Effect):
    """Measure a span. Starting a running timer starts it anew."""

    timer: Timer
    allocation_id: str


@dataclass(frozen=True, slots=True)
class StopTimer(Effect):
    """Stop measuring: the expiry must not be reported any more."""

    timer: Timer
    allocation_id: str


@dataclass(frozen=True, slots=True)
class Timing:
    """How a row of a table asks for a timer; the kernel adds the allocation."""

    timer: Timer
    starts: bool
    """Whether it is started; else it is stopped, if it runs."""

    def __str__(self) -> str:
        return f"{'start' if self.starts else 'stop'} {self.timer.value} timer"


def start(timer: Timer) -> Timing:
    """Ask for `StartTimer` in a row."""
    return Timing(timer, starts=True)


def stop(timer: Timer) -> Timing:
    """Ask for `StopTimer` in a row; the kernel leaves it out when the timer does not run."""
    return Timing(timer, starts=False)


Order: TypeAlias = type[Effect] | Timing
"""What the last column of a table holds."""


def order_name(order: Order) -> str:
    """Name an order as tables, diagrams and errors print it."""
    return str(order) if isinstance(order, Timing) else order.__name__


# --- The provider's ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CreateNamespaces(Effect):
    """
    Have the backend make an allocation.

    Report `NamespacesCreated` or `NamespacesNotCreated`, once. Work for one allocation is done in
    the order in which it was asked for; work for different allocations does not wait.
    """

    request: NamespaceRequest


@dataclass(frozen=True, slots=True)
class Watch(Effect):
    """
    Report `ScopePopulated`, `ScopeEmptied` and `InitDied` from now on, also what is so already.

    The watch ends by itself when the allocation is released.
    """

    allocation_id: str


@dataclass(frozen=True, slots=True)
class HandOver(Effect):
    """
    Send a response with its descriptors, in one `sendmsg`.

    Report `ResponseSent`, or, if the descriptors cannot be had, send `FdPassing` in the response's
    place (answers are matched by order) and report `ResponseNotSent`. If the connection is lost,
    report only that. Whichever it is, report it before any `NamespacesReleased` or
    `ReleaseOverdue` of the allocation: who is told of an end is who has been sent a response.
    """

    connection: ConnectionId
    response: NamespaceResponse


@dataclass(frozen=True, slots=True)
class RecordHandoff(Effect):
    """Note durably that the allocation has been handed over."""

    allocation_id: str


@dataclass(frozen=True, slots=True)
class Refuse(Effect):
    """Send an error as the answer to the connection's oldest open message."""

    connection: ConnectionId
    error: NamespaceError


@dataclass(frozen=True, slots=True)
class AnnounceEnd(Effect):
    """Send `AllocationEnded`, as an answer or unasked."""

    connection: ConnectionId
    allocation_id: str


@dataclass(frozen=True, slots=True)
class CloseConnection(Effect):
    """
    Send what is still queued, read nothing more, close.

    Report `ConnectionLost` when done, as for any connection.
    """

    connection: ConnectionId


@dataclass(frozen=True, slots=True)
class ReleaseNamespaces(Effect):
    """
    Have the backend try to release an allocation.

    That it is over is noted durably at once, before anything else is performed: its end may be
    announced while the work is still queued behind the creation. Report `NamespacesReleased`, or
    `ReleaseDelayed` with what is still there.
    """

    allocation_id: str


# --- The consumer's ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Connect(Effect):
    """Call the provider. Report `Connected` or, at the connect deadline, `ProviderUnreachable`."""


@dataclass(frozen=True, slots=True)
class SendRequest(Effect):
    """Send the request."""

    request: NamespaceRequest


@dataclass(frozen=True, slots=True)
class SendEnd(Effect):
    """Send `AllocationEnded`."""

    allocation_id: str


@dataclass(frozen=True, slots=True)
class SendFault(Effect):
    """Send `FdPassing` with what was wrong with the peer's frame."""

    reason: str


@dataclass(frozen=True, slots=True)
class CloseChannel(Effect):
    """
    Close the connection, or give up the call that is under way.

    Nothing is reported of either: no `ConnectionLost`, no `Connected`, no `ProviderUnreachable`.
    """


@dataclass(frozen=True, slots=True)
class DeliverDescriptors(Effect):
    """Give the caller the response and its bundle; from here the caller owns them."""

    response: NamespaceResponse
    is_degraded: bool
    """True when they were made by self-service."""


@dataclass(frozen=True, slots=True)
class DiscardDescriptors(Effect):
    """Close every descriptor that came with the message just reported."""


@dataclass(frozen=True, slots=True)
class ReportFallback(Effect):
    """Be loud: a warning and the audit event `namespace.handoff_failed`."""

    allocation_id: str
    error: NamespaceError


@dataclass(frozen=True, slots=True)
class ServeSelf(Effect):
    """Make the namespaces here. Report `SelfServed` or `SelfServiceFailed`."""

    request: NamespaceRequest


@dataclass(frozen=True, slots=True)
class ReleaseOwn(Effect):
    """Release what self-service made."""

    allocation_id: str


@dataclass(frozen=True, slots=True)
class ReportRefusal(Effect):
    """Raise the error to the caller; there are no namespaces."""

    error: NamespaceError


@dataclass(frozen=True, slots=True)
class ReportEnd(Effect):
    """Tell the caller that the allocation is over."""

    allocation_id: str


@dataclass(frozen=True, slots=True)
class OweEnd(Effect):
    """Performed by the consumer's kernel itself: its notice table sets off."""
