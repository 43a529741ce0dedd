"""The consumer's kernel: the state machine of a namespace consumer, for one allocation.

Two tables run side by side. `lifecycle.CONSUMER` is the allocation as the caller sees it;
`lifecycle.NOTICE` is the `AllocationEnded` that the provider may have to be sent. Every event is
put to both; it is refused only if neither has a row for it, or if the provider is said to have sent
something and there is no connection to it. `OweEnd`, an order of the first table, sets off the
second.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from . import effects as do
from . import events as on
from .effects import Effect, Order, Timer, Timing
from .errors import (
    AllocationNotFound,
    CreationFailed,
    FdPassing,
    NamespaceError,
    SocketUnavailable,
)
from .events import ConsumerInput, Event, KernelEvent
from .lifecycle import CONSUMER, EXPIRIES, HAS_PROVIDER, NOTICE
from .messages import (
    AllocationEnded,
    Message,
    NamespaceRequest,
    NamespaceResponse,
    shown,
)
from .states import ConsumerState, NoticeState
from .table import Snapshot, Table, refusal


@dataclass(slots=True, eq=False)
class _PlainModel:
    """What a table moves: what the caller has, or what the provider is to be told."""

    state: ConsumerState | NoticeState
    subject: str


class ConsumerKernel:
    """
    Decides for one allocation of a consumer; performs nothing.

    Feed it every event in the order of happening, and perform the effects of each in the order
    given before feeding the next. After an exception the state is what it was before.

    Args:
        request: what the caller wants. It is not judged here: `objection` says beforehand whether
            a provider could grant it.
    """

    def __init__(self, request: NamespaceRequest) -> None:
        subject = f"allocation {request.allocation_id}"
        self._request = request
        self._hold = _PlainModel(ConsumerState.IDLE, subject)
        self._notice = _PlainModel(NoticeState.SILENT, subject)
        self._is_connected = False
        self._is_calling = False
        self._timers: set[Timer] = set()
        self._out: list[Effect] = []

    @property
    def request(self) -> NamespaceRequest:
        """What the caller wants."""
        return self._request

    @property
    def state(self) -> ConsumerState:
        """Where the allocation stands, for the caller."""
        assert isinstance(self._hold.state, ConsumerState)
        return self._hold.state

    @property
    def notice(self) -> NoticeState:
        """Where the end notice to the provider stands."""
        assert isinstance(self._notice.state, NoticeState)
        return self._notice.state

    @property
    def is_connected(self) -> bool:
        """Whether there is a connection to the provider."""
        return self._is_connected

    @property
    def owes_end(self) -> bool:
        """Whether the provider still has to be told of the end."""
        return self._notice.state not in (NoticeState.SILENT, NoticeState.HEARD)

    def __repr__(self) -> str:
        name, end = self._request.allocation_id, self._notice.state.value
        return f"<ConsumerKernel {name}: {self._hold.state.value}, end notice {end}>"

    def snapshot(self) -> Snapshot:
        """Take the whole state as plain values; equal states give equal snapshots."""
        return (
            self._request,
            self._hold.state,
            self._notice.state,
            self._is_connected,
            self._is_calling,
            frozenset(self._timers),
        )

    @classmethod
    def restore(cls, snapshot: Snapshot) -> ConsumerKernel:
        """Make a kernel that goes on exactly where the snapshot was taken."""
        request, hold, notice, is_connected, is_calling, timers = snapshot
        kernel = cls(request)
        kernel._hold.state = hold
        kernel._notice.state = notice
        kernel._is_connected = is_connected
        kernel._is_calling = is_calling
        kernel._timers = set(timers)
        return kernel

    def receive(self, event: ConsumerInput) -> tuple[Effect, ...]:
        """
        Take in what happened and say what shall be done.

        Returns:
            The effects, in the order in which to perform them.

        Raises:
            LocalProtocolError: the driver or the caller reported what cannot be.
            RemoteProtocolError: the provider said what it may not say now; feed `FrameRejected`.
                Nothing changed in either case.
        """
        self._out = []
        kind = type(event)
        # Which tables know the event is decided before either moves: `OweEnd`, an order of the
        # first, moves the second, which may then have a row for this very event, or no longer.
        moves_hold = CONSUMER.row(kind, self._hold.state) is not None
        moves_notice = NOTICE.row(kind, self._notice.state) is not None
        is_fed = not issubclass(kind, KernelEvent)
        holds = self._is_connected or kind not in HAS_PROVIDER.events
        if not (is_fed and holds and (moves_hold or moves_notice)):
            raise refusal(kind, self._hold)
        self._note(event)
        if moves_hold:
            self._fire(CONSUMER, self._hold, event)
        if moves_notice:
            self._fire(NOTICE, self._notice, event)
        return tuple(self._out)

    def _note(self, event: Event) -> None:
        match event:
            case on.Connected():
                self._is_connected, self._is_calling = True, False
            case on.ProviderUnreachable():
                self._is_calling = False
            case on.ConnectionLost():
                self._is_connected = False
            case _ if type(event) in EXPIRIES:
                self._timers.discard(EXPIRIES[type(event)])
            case _:
                pass

    def _fire(self, table: Table, model: _PlainModel, event: Event) -> None:
        for order in table.fire(model, type(event)):
            self._carry_out(order, event)

    def _carry_out(self, order: Order, event: Event) -> None:
        if isinstance(order, Timing):
            self._time(order)
        elif order is do.OweEnd:
            owed = on.EndOwed() if self._is_connected else on.EndOwedApart()
            self._fire(NOTICE, self._notice, owed)
        elif order is do.CloseChannel:
            self._close()
        elif order is do.Connect:
            self._is_calling = True
            self._out.append(do.Connect())
        else:
            self._out.append(_BUILDERS[order](self._request, event))

    def _close(self) -> None:
        # Keeps FD-10.
        if self._is_connected or self._is_calling:
            self._is_connected = self._is_calling = False
            self._out.append(do.CloseChannel())

    def _time(self, order: Timing) -> None:
        name = self._request.allocation_id
        if order.starts:
            self._timers.add(order.timer)
            self._out.append(do.StartTimer(order.timer, name))
        elif order.timer in self._timers:
            self._timers.discard(order.timer)
            self._out.append(do.StopTimer(order.timer, name))


def event_of(request: NamespaceRequest, message: Message) -> ConsumerInput:
    """
    Name what it means for a consumer that a message has arrived.

    Whether the descriptors are what `fd_types` says is the driver's to find out; it reports
    `ResponseMismatched` in place of `ResponseReceived` when they are not.
    """
    # Keeps WIRE-11, WIRE-15.
    match message:
        case NamespaceResponse():
            reason = mismatch(request, message)
            return on.ResponseMismatched(reason) if reason else on.ResponseReceived(message)
        case AllocationEnded(allocation_id=request.allocation_id):
            return on.EndAnnounced()
        case AllocationEnded(allocation_id=other):
            return on.FrameRejected(
                f"AllocationEnded for {shown(other)}, which was never asked for"
            )
        case CreationFailed():
            return on.CreationRefused(message)
        case AllocationNotFound():
            return on.NotFoundReceived(message)
        case SocketUnavailable():
            return on.ProviderUnavailable(message)
        case FdPassing():
            return on.PassingFailed(message)
        case _:
            return on.FrameRejected(f"{type(message).__name__} is not for the consumer")


def mismatch(request: NamespaceRequest, response: NamespaceResponse) -> str | None:
    """Say in what a response differs from what was asked for, or None if it does not."""
    # Keeps FD-2.
    if response.allocation_id != request.allocation_id:
        return f"the response is for {shown(response.allocation_id)}, not {request.allocation_id!r}"
    if response.fd_types != request.namespaces:
        got = [kind.value for kind in response.fd_types[: len(request.namespaces) + 1]]
        return f"fd_types is {got}, not {[kind.value for kind in request.namespaces]}"
    if (response.uenv_mount_path is None) != (request.uenv_image is None):
        return "uenv_mount_path must be there exactly if uenv_image was asked for"
    return None


def _why(event: Any) -> NamespaceError:
    """Say which of the seed's errors an event amounts to."""
    error = getattr(event, "error", None)
    if isinstance(error, NamespaceError):
        return error
    match event:
        case on.AnswerOverdue():
            return SocketUnavailable("no whole answer within the answer deadline")
        case on.ConnectionLost(reason=reason):
            return SocketUnavailable(reason or "the connection was lost before a whole answer")
        case _:
            return FdPassing(event.reason)


def _build_delivery(request: NamespaceRequest, event: Any) -> Effect:
    return do.DeliverDescriptors(event.response, isinstance(event, on.SelfServed))


_BUILDERS: Final[dict[Order, Callable[[NamespaceRequest, Any], Effect]]] = {
    do.SendRequest: lambda request, event: do.SendRequest(request),
    do.SendEnd: lambda request, event: do.SendEnd(request.allocation_id),
    do.SendFault: lambda request, event: do.SendFault(_why(event).text),
    do.DeliverDescriptors: _build_delivery,
    do.DiscardDescriptors: lambda request, event: do.DiscardDescriptors(),
    do.ReportFallback: lambda request, event: do.ReportFallback(request.allocation_id, _why(event)),
    do.ServeSelf: lambda request, event: do.ServeSelf(request),
    do.ReleaseOwn: lambda request, event: do.ReleaseOwn(request.allocation_id),
    do.ReportRefusal: lambda request, event: do.ReportRefusal(_why(event)),
    do.ReportEnd: lambda request, event: do.ReportEnd(request.allocation_id),
}
