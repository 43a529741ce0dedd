"""Events: what has happened, in the past tense. The only input of a kernel.

`ProviderInput` and `ConsumerInput` are what a driver may feed to the kernel of its side; every
event of them is a `PeerEvent` (the other side did it) or a `LocalEvent` (this side's driver or
backend reports it). The class decides who is to blame when a table has no row for the event.

A `KernelEvent` is *named by a kernel* and never fed: a driver reports that a request arrived, and
the kernel, which knows what is alive, names what that means (`RequestRepeated`,
`RequestConflicting`, ...). So every decision is the choice of a name, and every branch of the
protocol is a row of a table.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from operator import attrgetter
from typing import TypeAlias

from .errors import CreationFailed, FdPassing, NamespaceError, SocketUnavailable
from .messages import NamespaceRequest, NamespaceResponse
from .record import Typed, record

ConnectionId: TypeAlias = int
"""A driver's number for one connection; never reused while the kernel knows it."""


@record
class Event(Typed):
    """Something that has happened."""


@record
class PeerEvent(Event):
    """The other side did it."""


@record
class LocalEvent(Event):
    """This side's driver or backend reports it."""


class KernelEvent(LocalEvent):
    """A kernel names it, for one of its tables; a driver cannot feed it. A name, not a value."""


def allocation_of(something: Typed) -> str:
    """Return the id of the allocation that an event or an effect concerns; empty if none."""
    return _id_in(type(something).__match_args__)(something)


@cache
def _id_in(fields: tuple[str, ...]) -> Callable[[Typed], str]:
    # Drivers ask it of every event and effect: what only depends on the class is found out once.
    for path in ("allocation_id", "request.allocation_id", "response.allocation_id"):
        if path.partition(".")[0] in fields:
            return attrgetter(path)
    return lambda _: ""


# --- The provider: its peers -------------------------------------------------------------------


@record
class ConnectionOpened(PeerEvent):
    """
    A consumer connected.

    A driver reports known connection losses before any message from a newer connection. A consumer
    that connects again has closed its earlier connection; else the end that it sends now could be
    read before the loss of the connection whose request it takes back.
    """

    connection: ConnectionId
    uid: int
    """The peer's user id, as the Linux kernel vouches for it (SO_PEERCRED)."""


@record
class ConnectionLost(PeerEvent):
    """A connection is gone, closed by either side. The provider's carries a number."""

    connection: ConnectionId = 0
    reason: str = ""


@record
class FrameRejected(PeerEvent):
    """
    A frame could not be read, brought wrong descriptors, or is not for this side.

    Nothing that comes after it on its connection is read.
    """

    reason: str
    connection: ConnectionId = 0


@record
class RequestReceived(PeerEvent):
    """A request arrived."""

    connection: ConnectionId
    request: NamespaceRequest


@record
class EndReceived(PeerEvent):
    """A consumer says that an allocation is over."""

    connection: ConnectionId
    allocation_id: str


# --- The provider: its backend and its driver --------------------------------------------------


@record
class ProviderReady(LocalEvent):
    """What was alive is adopted; requests can be served."""


@record
class ReadinessOverdue(LocalEvent):
    """The first waiting request has waited for `READINESS_TIMEOUT_S`."""


@record
class ProviderStopping(LocalEvent):
    """The provider shuts down; what is alive stays alive."""


@record
class AllocationEvent(LocalEvent):
    """Something happened to one allocation."""

    allocation_id: str


@record
class CreatedAdopted(AllocationEvent):
    """After a restart: alive, and never handed over as far as the journal knows."""

    request: NamespaceRequest
    response: NamespaceResponse


@record
class HandedOffAdopted(AllocationEvent):
    """After a restart: alive, and handed over before."""

    request: NamespaceRequest
    response: NamespaceResponse


@record
class RemainsFound(AllocationEvent):
    """After a restart: half made, half released, or dead meanwhile."""

    request: NamespaceRequest


@record
class NamespacesCreated(AllocationEvent):
    """The backend has made all of it."""

    response: NamespaceResponse


@record
class NamespacesNotCreated(AllocationEvent):
    """The backend could not, and has undone what it had made; a release follows all the same."""

    error: CreationFailed


@record
class ResponseSent(AllocationEvent):
    """The response and its descriptors have left for a connection."""

    connection: ConnectionId


@record
class ResponseNotSent(AllocationEvent):
    """The descriptors could not be taken from the backend or put on the way."""

    connection: ConnectionId
    error: FdPassing


@record
class ClaimExpired(AllocationEvent):
    """Unused for the claim timeout, and no connection that asked for it is left."""


@record
class ScopePopulated(AllocationEvent):
    """The allocation's cgroup has processes, or is proved to have had some."""


@record
class ScopeEmptied(AllocationEvent):
    """The allocation's cgroup was used and is empty, for as long as the grace asks."""


@record
class InitDied(AllocationEvent):
    """The process that holds the allocation's namespaces is dead."""


@record
class ReleaseRequested(AllocationEvent):
    """An operator, or the machine's own program, ends the allocation."""


@record
class NamespacesReleased(AllocationEvent):
    """Processes, mounts, cgroup and descriptors are gone."""


@record
class ReleaseDelayed(AllocationEvent):
    """Something cannot go yet."""

    reason: str
    """What is still there, and why."""


@record
class RetryDue(AllocationEvent):
    """Time to try the release again."""


@record
class ReleaseOverdue(AllocationEvent):
    """The release has taken longer than the release deadline."""


# --- The consumer: its caller, its driver and self-service -------------------------------------


@record
class NamespacesWanted(LocalEvent):
    """The caller wants the namespaces of its request."""


@record
class EndWanted(LocalEvent):
    """The caller is done with the allocation."""


@record
class Connected(LocalEvent):
    """The connection to the provider is established, within the connect deadline."""


@record
class ProviderUnreachable(LocalEvent):
    """The connection could not be established within the connect deadline."""

    error: SocketUnavailable


@record
class AnswerOverdue(LocalEvent):
    """No whole answer within the answer deadline."""


@record
class SelfServed(LocalEvent):
    """This side has made the namespaces itself."""

    response: NamespaceResponse


@record
class SelfServiceFailed(LocalEvent):
    """This side could not make them either, or may not."""

    error: NamespaceError


@record
class NoticeDue(LocalEvent):
    """Time to try again to tell the provider that the allocation is over."""


@record
class NoticeOverdue(LocalEvent):
    """The provider was told, and did not confirm within the answer deadline."""


# --- The consumer: its provider ----------------------------------------------------------------


@record
class ResponseReceived(PeerEvent):
    """A response with the right id, types, mount path and descriptors."""

    response: NamespaceResponse


@record
class ResponseMismatched(PeerEvent):
    """A response that is not what was asked for."""

    reason: str


@record
class CreationRefused(PeerEvent):
    """The provider answered `CreationFailed`."""

    error: NamespaceError


@record
class NotFoundReceived(PeerEvent):
    """The provider answered `AllocationNotFound`."""

    error: NamespaceError


@record
class ProviderUnavailable(PeerEvent):
    """The provider answered `SocketUnavailable`: it cannot serve, and made nothing."""

    error: NamespaceError


@record
class PassingFailed(PeerEvent):
    """The provider answered `FdPassing`: what it made, if anything, is not known."""

    error: NamespaceError


@record
class EndAnnounced(PeerEvent):
    """The provider says that the allocation has ended."""


# --- Named by the provider's kernel ------------------------------------------------------------


class PeerRefused(KernelEvent):
    """A connection was opened by a user who may not connect, or has too many connections."""


class RequestOverLimit(KernelEvent):
    """A request arrived on a connection, or from a user, with too many unanswered messages."""


class QueueFull(KernelEvent):
    """A message arrived while as many as may already wait for the provider to be ready."""


class ConnectionFlooded(KernelEvent):
    """More unanswered messages arrived on a connection than it may have in any case."""


class MessageHeld(KernelEvent):
    """A message waits for the provider to be ready."""


class MessageDispatched(KernelEvent):
    """A message is put to the allocation it is about."""


class MessageDeferred(KernelEvent):
    """A request waits until the allocation before it, of the same name, is released."""


class MessageGranted(KernelEvent):
    """The namespaces that a request asks for exist."""


class GrantWithdrawn(KernelEvent):
    """The allocation ended before the response could leave."""


class MessageRefused(KernelEvent):
    """An error is the answer to a message."""


class EndConfirmed(KernelEvent):
    """`AllocationEnded` is the answer to an `AllocationEnded`."""


class TurnCame(KernelEvent):
    """Every message before it on its connection is answered."""


class RequestAdmitted(KernelEvent):
    """A request for an allocation that does not exist."""


class RequestRepeated(KernelEvent):
    """The same request for an allocation that is alive."""


class RequestConflicting(KernelEvent):
    """Another request for an allocation that is alive."""


class RequestEarly(KernelEvent):
    """A request while the allocation before it, of the same name, is being released."""


class RequestDuringDrain(KernelEvent):
    """A request while the allocation before it has missed its release deadline."""


class EndRepeated(KernelEvent):
    """A consumer ends what has already been announced as ended."""


class Unclaimed(KernelEvent):
    """Never populated, and no connection that asked for it is left."""


# --- Named by the consumer's kernel ------------------------------------------------------------


class EndOwed(KernelEvent):
    """The provider is to be told of the end, and is connected."""


class EndOwedApart(KernelEvent):
    """The provider is to be told of the end, and is not connected."""


# --- What may be fed ---------------------------------------------------------------------------

ProviderInput: TypeAlias = (
    ConnectionOpened
    | ConnectionLost
    | FrameRejected
    | RequestReceived
    | EndReceived
    | ProviderReady
    | ReadinessOverdue
    | ProviderStopping
    | CreatedAdopted
    | HandedOffAdopted
    | RemainsFound
    | NamespacesCreated
    | NamespacesNotCreated
    | ResponseSent
    | ResponseNotSent
    | ClaimExpired
    | ScopePopulated
    | ScopeEmptied
    | InitDied
    | ReleaseRequested
    | NamespacesReleased
    | ReleaseDelayed
    | RetryDue
    | ReleaseOverdue
)
"""What a provider's driver may feed to its kernel."""

ConsumerInput: TypeAlias = (
    NamespacesWanted
    | EndWanted
    | Connected
    | ProviderUnreachable
    | AnswerOverdue
    | SelfServed
    | SelfServiceFailed
    | NoticeDue
    | NoticeOverdue
    | ConnectionLost
    | FrameRejected
    | ResponseReceived
    | ResponseMismatched
    | CreationRefused
    | NotFoundReceived
    | ProviderUnavailable
    | PassingFailed
    | EndAnnounced
)
"""What a consumer's driver may feed to its kernel."""
