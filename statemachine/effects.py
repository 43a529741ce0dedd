"""Effects: what a driver shall do, in the imperative. The only output of a kernel.

A driver performs the effects of one `receive` in the order in which they stand, and reports what
came of each as a later event. The obligations of the driver stand on the effect that brings them.

An *order* is what a row of a table asks for: an effect, a timer (`start`, `stop`), or a
`KernelOrder`, which the kernel carries out itself because it concerns more than one message.
"""

from __future__ import annotations

from enum import Enum
from typing import TypeAlias

from .errors import NamespaceError
from .events import ConnectionId
from .messages import NamespaceRequest, NamespaceResponse
from .record import Typed, record


class Timer(Enum):
    """The spans a driver measures. Kernels know which, never how long."""

    READINESS = "readiness"
    """How long a request may wait for the provider to be ready. Expires as `ReadinessOverdue`."""
    CLAIM = "claim"
    """How long an unused allocation is kept without an asker. Expires as `ClaimExpired`."""
    RELEASE = "release"
    """How long an end may go unannounced. Expires as `ReleaseOverdue`."""
    RETRY = "retry"
    """The pause before the next try to release. Expires as `RetryDue`."""
    ANSWER = "answer"
    """How long a consumer waits for an answer. Expires as `AnswerOverdue`."""
    NOTICE = "notice"
    """How long a consumer waits for its end to be confirmed. Expires as `NoticeOverdue`."""
    REDIAL = "redial"
    """The pause before a consumer connects again to tell an end. Expires as `NoticeDue`."""


@record
class Effect(Typed):
    """Something to be done by the driver."""


@record
class StartTimer(Effect):
    """Measure a span. Starting a running timer starts it anew."""

    timer: Timer
    allocation_id: str


@record
class StopTimer(Effect):
    """Stop measuring: the expiry must not be reported any more."""

    timer: Timer
    allocation_id: str


@record
class Timing(Typed):
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


class KernelOrder:
    """What a kernel does itself for a row; it never leaves the kernel. A name, not a value."""


Order: TypeAlias = type[Effect] | type[KernelOrder] | Timing
"""What the last column of a table holds."""


def order_name(order: Order) -> str:
    """Name an order as tables, diagrams and errors print it."""
    return str(order) if isinstance(order, Timing) else order.__name__


# --- The provider's ----------------------------------------------------------------------------


@record
class CreateNamespaces(Effect):
    """
    Have the backend make an allocation.

    Report `NamespacesCreated` or `NamespacesNotCreated`, once. Work for one allocation is done in
    the order in which it was asked for; work for different allocations does not wait.
    """

    request: NamespaceRequest


@record
class Watch(Effect):
    """
    Report `ScopePopulated`, `ScopeEmptied` and `InitDied` from now on, also what is so already.

    The watch ends by itself when the allocation is released.
    """

    allocation_id: str


@record
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


@record
class RecordHandoff(Effect):
    """Note durably that the allocation has been handed over."""

    allocation_id: str


@record
class Refuse(Effect):
    """Send an error as the answer to the connection's oldest open message."""

    connection: ConnectionId
    error: NamespaceError


@record
class AnnounceEnd(Effect):
    """Send `AllocationEnded`, as the answer to an end or pushed to a holder."""

    connection: ConnectionId
    allocation_id: str


@record
class CloseConnection(Effect):
    """
    Send what is still queued, read nothing more, close.

    Report `ConnectionLost` when done, as for any connection.
    """

    connection: ConnectionId


@record
class ReleaseNamespaces(Effect):
    """
    Have the backend try to release an allocation.

    That it is over is noted durably at once, before anything else is performed: its end may be
    announced while the work is still queued behind the creation. Report `NamespacesReleased`, or
    `ReleaseDelayed` with what is still there.
    """

    allocation_id: str


# --- The consumer's ----------------------------------------------------------------------------


@record
class Connect(Effect):
    """Connect to the provider. Report `Connected`, or `ProviderUnreachable` at the deadline."""


@record
class SendRequest(Effect):
    """Send the request."""

    request: NamespaceRequest


@record
class SendEnd(Effect):
    """Send `AllocationEnded`."""

    allocation_id: str


@record
class SendFault(Effect):
    """Send `FdPassing` with what was wrong with the peer's frame."""

    reason: str


@record
class CloseChannel(Effect):
    """
    Close the connection, or give up the attempt to connect that is under way.

    Nothing is reported of either: no `ConnectionLost`, no `Connected`, no `ProviderUnreachable`.
    """


@record
class DeliverDescriptors(Effect):
    """Give the caller the response and its bundle; from here the caller owns them."""

    response: NamespaceResponse
    is_degraded: bool
    """True when they were made by self-service."""


@record
class DiscardDescriptors(Effect):
    """Close every descriptor that came with the message just reported."""


@record
class ReportFallback(Effect):
    """Be loud: a warning and the audit event `namespace.handoff_failed`."""

    allocation_id: str
    error: NamespaceError


@record
class ServeSelf(Effect):
    """Make the namespaces here. Report `SelfServed` or `SelfServiceFailed`."""

    request: NamespaceRequest


@record
class ReleaseOwn(Effect):
    """Release what self-service made."""

    allocation_id: str


@record
class ReportRefusal(Effect):
    """Raise the error to the caller; there are no namespaces."""

    error: NamespaceError


@record
class ReportEnd(Effect):
    """Tell the caller that the allocation is over."""

    allocation_id: str


# --- What the provider's kernel does itself ----------------------------------------------------


class AddConnection(KernelOrder):
    """Know a connection, and count it for its user."""


class RefusePeer(KernelOrder):
    """Send the reason why this user may not connect; nothing is read from the connection."""


class ForgetConnection(KernelOrder):
    """Drop a lost connection with its messages; name what is unclaimed now `Unclaimed`."""


class HoldMessage(KernelOrder):
    """Keep the message until the provider is ready; the first one starts the readiness timer."""


class DispatchMessage(KernelOrder):
    """Put the message to the allocation it is about, under the name of what it means there."""


class DispatchHeld(KernelOrder):
    """Put every held message to its allocation, in the order of arrival."""


class RefuseMessage(KernelOrder):
    """Answer the message with the limit that it is over."""


class RefuseLate(KernelOrder):
    """Answer the message with `SocketUnavailable`: the provider is shutting down."""


class RefuseUnready(KernelOrder):
    """Answer every held message with `SocketUnavailable`: the provider is not ready in time."""


class RefuseHeld(KernelOrder):
    """Answer every held message with `SocketUnavailable`: the provider is shutting down."""


class RefuseDeferred(KernelOrder):
    """Answer every deferred request with `SocketUnavailable`: the provider is shutting down."""


class RefuseFlood(KernelOrder):
    """Send `FdPassing` at once, before the answers that are due: the connection is flooded."""


class RefuseFrame(KernelOrder):
    """Let the unreadable frame take its turn among the messages of its connection."""


class AddAsker(KernelOrder):
    """Count the connection among those that asked for the allocation."""


class DeferRequest(KernelOrder):
    """Keep the request until the allocation is released."""


class WithdrawDeferred(KernelOrder):
    """Refuse the deferred requests of the connection that sends this end after them."""


class GrantAskers(KernelOrder):
    """Grant every request for the allocation that is open; each response leaves in its turn."""


class WithdrawGrants(KernelOrder):
    """Take back each grant whose response has not left."""


class CheckClaim(KernelOrder):
    """Name the allocation `Unclaimed` if it is not used and no connection asks for it."""


class RefuseConflict(KernelOrder):
    """Answer the request with `CreationFailed`: the allocation is alive with another request."""


class RefuseDraining(KernelOrder):
    """Answer the request with `CreationFailed`: the allocation before it is still draining."""


class RefuseUnknown(KernelOrder):
    """Answer the end with `AllocationNotFound`."""


class ConfirmEnd(KernelOrder):
    """Answer the end with `AllocationEnded`."""


class AnswerEnd(KernelOrder):
    """Confirm every open end of the allocation; its sender needs no push, and is no holder now."""


class PushEnd(KernelOrder):
    """Push `AllocationEnded` to each holder; then send the answers whose turn has come. Once."""


class FailAskers(KernelOrder):
    """Answer every open request for the allocation with `CreationFailed`."""


class FailAllAskers(KernelOrder):
    """Answer every open and every deferred request for the allocation with `CreationFailed`."""


class Forget(KernelOrder):
    """Keep only the name of the allocation, and dispatch the requests that were deferred."""


# --- What the consumer's kernel does itself ----------------------------------------------------


class OweEnd(KernelOrder):
    """Name what the notice's table is to be told: `EndOwed` or `EndOwedApart`."""
