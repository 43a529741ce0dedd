"""What has happened: the kernels' only input, in the past tense.

Every event is either a `PeerEvent` (the other side's doing) or a `LocalEvent` (this side's driver
or backend reports it). The class decides who is to blame when a table has no row for the event.

Some events are *named by the kernel*: a driver reports that a request arrived, and the kernel,
which knows what is alive, names what that means (`RequestRepeated`, `RequestConflicting`, …). So
every decision is the choice of a name, and every branch of the protocol is a row one can point at.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from .errors import CreationFailed, FdPassing, NamespaceError, SocketUnavailable
from .messages import NamespaceRequest, NamespaceResponse

ConnectionId: TypeAlias = int
"""A driver's number for one connection; never reused while the kernel knows it."""


@dataclass(frozen=True, slots=True)
class Event:
    """Something that has happened."""


@dataclass(frozen=True, slots=True)
class PeerEvent(Event):
    """The other side did it."""


@dataclass(frozen=True, slots=True)
class LocalEvent(Event):
    """This side's driver or backend reports it."""


# --- The provider: its peers -------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ConnectionOpened(PeerEvent):
    """
    A consumer connected.

    Whoever calls again has hung up before. So a driver reports the loss of every connection that
    was lost by then before it reports anything that was said on a connection opened after it: else
    the end that is owed could be read before the request that it takes back is gone.
    """

    connection: ConnectionId
    uid: int
    """The peer's user id, as the Linux kernel vouches for it (SO_PEERCRED)."""


@dataclass(frozen=True, slots=True)
class ConnectionLost(PeerEvent):
    """A connection is gone, whoever closed it. The provider's carries a number."""

    connection: ConnectionId = 0
    reason: str = ""


@dataclass(frozen=True, slots=True)
class FrameRejected(PeerEvent):
    """
    A frame could not be read, brought wrong descriptors, or is not for this side.

    Nothing that comes after it on its connection is read.
    """

    reason: str
    connection: ConnectionId = 0


@dataclass(frozen=True, slots=True)
class RequestReceived(PeerEvent):
    """A request arrived. In the table: for an allocation that does not exist."""

    connection: ConnectionId
    request: NamespaceRequest


@dataclass(frozen=True, slots=True)
class RequestRepeated(PeerEvent):
    """Named by the kernel: the same request for an allocation that is alive."""

    connection: ConnectionId
    request: NamespaceRequest


@dataclass(frozen=True, slots=True)
class RequestConflicting(PeerEvent):
    """Named by the kernel: another request for an allocation that is alive."""

    connection: ConnectionId
    request: NamespaceRequest


@dataclass(frozen=True, slots=True)
class RequestEarly(PeerEvent):
    """Named by the kernel: a request while the allocation before it is being released."""

    connection: ConnectionId
    request: NamespaceRequest


@dataclass(frozen=True, slots=True)
class RequestDuringDrain(PeerEvent):
    """Named by the kernel: a request while the allocation before it will not die in time."""

    connection: ConnectionId
    request: NamespaceRequest


@dataclass(frozen=True, slots=True)
class EndReceived(PeerEvent):
    """A consumer says that an allocation is over."""

    connection: ConnectionId
    allocation_id: str


@dataclass(frozen=True, slots=True)
class EndRepeated(PeerEvent):
    """Named by the kernel: a consumer ends what has already been announced as ended."""

    connection: ConnectionId
    allocation_id: str


# --- The provider: its backend and its driver --------------------------------------------------


@dataclass(frozen=True, slots=True)
class ProviderReady(LocalEvent):
    """What was alive is adopted; requests can be served."""


@dataclass(frozen=True, slots=True)
class ReadinessOverdue(LocalEvent):
    """The first waiting request has waited for `READINESS_TIMEOUT_S`."""


@dataclass(frozen=True, slots=True)
class ProviderStopping(LocalEvent):
    """The provider shuts down; what is alive stays alive."""


@dataclass(frozen=True, slots=True)
class AllocationEvent(LocalEvent):
    """Something happened to one allocation."""

    allocation_id: str


@dataclass(frozen=True, slots=True)
class CreatedAdopted(AllocationEvent):
    """After a restart: alive, and never handed over as far as the journal knows."""

    request: NamespaceRequest
    response: NamespaceResponse


@dataclass(frozen=True, slots=True)
class HandedOffAdopted(AllocationEvent):
    """After a restart: alive, and handed over before."""

    request: NamespaceRequest
    response: NamespaceResponse


@dataclass(frozen=True, slots=True)
class RemainsFound(AllocationEvent):
    """After a restart: half made, half released, or dead meanwhile."""

    request: NamespaceRequest


@dataclass(frozen=True, slots=True)
class NamespacesCreated(AllocationEvent):
    """The backend has made all of it."""

    response: NamespaceResponse


@dataclass(frozen=True, slots=True)
class NamespacesNotCreated(AllocationEvent):
    """The backend could not, and has undone what it had made; a release follows all the same."""

    error: CreationFailed


@dataclass(frozen=True, slots=True)
class ResponseSent(AllocationEvent):
    """The response and its descriptors have left for a connection."""

    connection: ConnectionId


@dataclass(frozen=True, slots=True)
class ResponseNotSent(AllocationEvent):
    """The descriptors could not be taken from the backend or put on the way."""

    connection: ConnectionId
    error: FdPassing


@dataclass(frozen=True, slots=True)
class Unclaimed(AllocationEvent):
    """Named by the kernel: never populated, and nobody who asked for it is connected."""


@dataclass(frozen=True, slots=True)
class ClaimExpired(AllocationEvent):
    """It has been unclaimed for the claim timeout."""


@dataclass(frozen=True, slots=True)
class ScopePopulated(AllocationEvent):
    """The allocation's cgroup has processes, or is proved to have had some."""


@dataclass(frozen=True, slots=True)
class ScopeEmptied(AllocationEvent):
    """The allocation's cgroup was used and is empty, for as long as the grace asks."""


@dataclass(frozen=True, slots=True)
class InitDied(AllocationEvent):
    """The process that holds the allocation's namespaces is dead."""


@dataclass(frozen=True, slots=True)
class ReleaseRequested(AllocationEvent):
    """An operator, or the machine's own program, ends the allocation."""


@dataclass(frozen=True, slots=True)
class NamespacesReleased(AllocationEvent):
    """Processes, mounts, cgroup and descriptors are gone."""


@dataclass(frozen=True, slots=True)
class ReleaseDelayed(AllocationEvent):
    """Something cannot go yet."""

    reason: str
    """What is still there, and why."""


@dataclass(frozen=True, slots=True)
class RetryDue(AllocationEvent):
    """Time to try the release again."""


@dataclass(frozen=True, slots=True)
class ReleaseOverdue(AllocationEvent):
    """The release has taken longer than the release deadline."""


# --- The consumer: its caller, its driver and self-service -------------------------------------


@dataclass(frozen=True, slots=True)
class NamespacesWanted(LocalEvent):
    """The caller wants the namespaces of its request."""


@dataclass(frozen=True, slots=True)
class EndWanted(LocalEvent):
    """The caller is done with the allocation."""


@dataclass(frozen=True, slots=True)
class Connected(LocalEvent):
    """The provider's socket answered within the connect deadline."""


@dataclass(frozen=True, slots=True)
class ProviderUnreachable(LocalEvent):
    """It did not."""

    error: SocketUnavailable


@dataclass(frozen=True, slots=True)
class AnswerOverdue(LocalEvent):
    """No whole answer within the answer deadline."""


@dataclass(frozen=True, slots=True)
class SelfServed(LocalEvent):
    """This side has made the namespaces itself."""

    response: NamespaceResponse


@dataclass(frozen=True, slots=True)
class SelfServiceFailed(LocalEvent):
    """This side could not make them either, or may not."""

    error: NamespaceError


@dataclass(frozen=True, slots=True)
class NoticeDue(LocalEvent):
    """Time to try again to tell the provider that the allocation is over."""


@dataclass(frozen=True, slots=True)
class NoticeOverdue(LocalEvent):
    """The provider was told, and did not confirm within the answer deadline."""


@dataclass(frozen=True, slots=True)
class EndOwed(LocalEvent):
    """Named by the kernel: the provider is to be told of the end, and is connected."""


@dataclass(frozen=True, slots=True)
class EndOwedApart(LocalEvent):
    """Named by the kernel: the provider is to be told of the end, and is not connected."""


# --- The consumer: its provider ----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ResponseReceived(PeerEvent):
    """A response with the right id, types, mount path and descriptors."""

    response: NamespaceResponse


@dataclass(frozen=True, slots=True)
class ResponseMismatched(PeerEvent):
    """A response that is not what was asked for."""

    reason: str


@dataclass(frozen=True, slots=True)
class CreationRefused(PeerEvent):
    """The provider answered `CreationFailed`."""

    error: NamespaceError


@dataclass(frozen=True, slots=True)
class NotFoundReceived(PeerEvent):
    """The provider answered `AllocationNotFound`."""

    error: NamespaceError


@dataclass(frozen=True, slots=True)
class ProviderUnavailable(PeerEvent):
    """The provider answered `SocketUnavailable`: it cannot serve, and made nothing."""

    error: NamespaceError


@dataclass(frozen=True, slots=True)
class PassingFailed(PeerEvent):
    """The provider answered `FdPassing`: what it made, if anything, is not known."""

    error: NamespaceError


@dataclass(frozen=True, slots=True)
class EndAnnounced(PeerEvent):
    """The provider says that the allocation has ended."""
