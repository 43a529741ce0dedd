"""The consumer's kernel: the state machine of a namespace consumer, for one allocation.

Two tables run side by side. `lifecycle.CONSUMER` is the allocation as the caller sees it;
`lifecycle.NOTICE` is the `AllocationEnded` that the provider may have to be sent. Every event is
put to both; it is refused only if neither has a row for it, or if the provider is said to have sent
something and there is no connection to it. `OweEnd`, an order of the first table, sets off the
second.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, Generic, TypeAlias, TypeVar

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
from .record import expect
from .snapshots import ConsumerSnapshot
from .states import ConsumerState, NoticeState
from .table import Table, refusal

S = TypeVar("S", ConsumerState, NoticeState)


class _PlainModel(Generic[S]):
    """What a table moves: what the caller has, or what the provider is to be told."""

    __slots__ = ("state", "subject")

    def __init__(self, state: S, subject: str) -> None:
        self.state: S = state
        self.subject = subject


class ConsumerKernel:
    """
    Decides for one allocation of a consumer; performs nothing.

    Feed it every event in the order of happening, and perform the effects of each in the order
    given before feeding the next. After an exception the state is what it was before.

    Args:
        request: what the caller wants. It is not judged here: `objection` says beforehand whether
            a provider could grant it.

    Raises:
        TypeError: it is no request.
    """

    def __init__(self, request: NamespaceRequest) -> None:
        expect("request", request, NamespaceRequest)
        self._state = _ConsumerData(request)

    @property
    def request(self) -> NamespaceRequest:
        """What the caller wants."""
        return self._state.request

    @property
    def state(self) -> ConsumerState:
        """Where the allocation stands, for the caller."""
        return self._state.hold.state

    @property
    def notice(self) -> NoticeState:
        """Where the end notice to the provider stands."""
        return self._state.notice.state

    @property
    def is_connected(self) -> bool:
        """Whether there is a connection to the provider."""
        return self._state.is_connected

    @property
    def owes_end(self) -> bool:
        """Whether the provider still has to be told of the end."""
        return self._state.notice.state not in (NoticeState.SILENT, NoticeState.HEARD)

    def __repr__(self) -> str:
        state = self._state
        name, end = state.request.allocation_id, state.notice.state.value
        return f"<ConsumerKernel {name}: {state.hold.state.value}, end notice {end}>"

    def snapshot(self) -> ConsumerSnapshot:
        """Take the whole state as values with names; equal states give equal snapshots."""
        state = self._state
        return ConsumerSnapshot(
            state.request,
            state.hold.state,
            state.notice.state,
            state.is_connected,
            state.is_calling,
            frozenset(state.timers),
        )

    @classmethod
    def restore(cls, snapshot: ConsumerSnapshot) -> ConsumerKernel:
        """Make a kernel that goes on exactly where the snapshot was taken."""
        kernel = cls(snapshot.request)
        state = kernel._state
        state.hold.state, state.notice.state = snapshot.state, snapshot.notice
        state.is_connected, state.is_calling = snapshot.is_connected, snapshot.is_calling
        state.timers = set(snapshot.timers)
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
        state, kind = self._state, type(event)
        state.effects = []
        # Which tables know the event is decided before either moves: `OweEnd`, an order of the
        # first, moves the second, which may then have a row for this very event, or no longer.
        moves_hold = CONSUMER.row(kind, state.hold.state) is not None
        moves_notice = NOTICE.row(kind, state.notice.state) is not None
        is_fed = not issubclass(kind, KernelEvent)
        holds = state.is_connected or kind not in HAS_PROVIDER.events
        if not (is_fed and holds and (moves_hold or moves_notice)):
            raise refusal(kind, state.hold)
        note = _NOTES.get(kind)
        if note is not None:
            note(state, event)
        if moves_hold:
            state.fire_hold(event)
        if moves_notice:
            state.fire_notice(event)
        return tuple(state.effects)


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


# --- What it knows -------------------------------------------------------------------------------


class _ConsumerData:
    """What a consumer knows, and what it has decided in the step that is under way."""

    def __init__(self, request: NamespaceRequest) -> None:
        subject = f"allocation {request.allocation_id}"
        self.request = request
        self.hold = _PlainModel(ConsumerState.IDLE, subject)
        self.notice = _PlainModel(NoticeState.SILENT, subject)
        self.is_connected = False
        self.is_calling = False
        self.timers: set[Timer] = set()
        self.effects: list[Effect] = []

    def fire_hold(self, event: Event) -> None:
        """Move what the caller has."""
        self._fire(CONSUMER, self.hold, event)

    def fire_notice(self, event: Event) -> None:
        """Move what the provider is to be told."""
        self._fire(NOTICE, self.notice, event)

    def _fire(self, table: Table, model: _PlainModel[Any], event: Event) -> None:
        for order in table.fire(model, type(event)):
            if isinstance(order, Timing):
                self._time(order)
            else:
                _ORDERS[order](self, event)

    def _time(self, order: Timing) -> None:
        name = self.request.allocation_id
        if order.starts:
            self.timers.add(order.timer)
            self.effects.append(do.StartTimer(order.timer, name))
        elif order.timer in self.timers:
            self.timers.discard(order.timer)
            self.effects.append(do.StopTimer(order.timer, name))


_ConsumerHandler: TypeAlias = Callable[[_ConsumerData, Any], None]
"""Carries out an order, because of this event; or notes what the event says."""

# --- What an event says; it is kept before the rows are taken ------------------------------------


def _note_connected(state: _ConsumerData, _: object) -> None:
    state.is_connected, state.is_calling = True, False


def _note_unreachable(state: _ConsumerData, _: object) -> None:
    state.is_calling = False


def _note_lost(state: _ConsumerData, _: object) -> None:
    state.is_connected = False


def _note_expiry(state: _ConsumerData, event: Event) -> None:
    state.timers.discard(EXPIRIES[type(event)])


_NOTES: Final[Mapping[type[Event], _ConsumerHandler]] = {
    on.Connected: _note_connected,
    on.ProviderUnreachable: _note_unreachable,
    on.ConnectionLost: _note_lost,
    on.AnswerOverdue: _note_expiry,
    on.NoticeOverdue: _note_expiry,
    on.NoticeDue: _note_expiry,
}

# --- What the rows ask for -----------------------------------------------------------------------


def _connect(state: _ConsumerData, _: object) -> None:
    state.is_calling = True
    state.effects.append(do.Connect())


def _close(state: _ConsumerData, _: object) -> None:
    # Keeps FD-10.
    if state.is_connected or state.is_calling:
        state.is_connected = state.is_calling = False
        state.effects.append(do.CloseChannel())


def _owe_end(state: _ConsumerData, _: object) -> None:
    state.fire_notice(on.EndOwed() if state.is_connected else on.EndOwedApart())


def _send_request(state: _ConsumerData, _: object) -> None:
    state.effects.append(do.SendRequest(state.request))


def _send_end(state: _ConsumerData, _: object) -> None:
    state.effects.append(do.SendEnd(state.request.allocation_id))


def _send_fault(state: _ConsumerData, event: Event) -> None:
    state.effects.append(do.SendFault(_error_of(event).text))


def _deliver(state: _ConsumerData, event: on.ResponseReceived | on.SelfServed) -> None:
    is_degraded = isinstance(event, on.SelfServed)
    state.effects.append(do.DeliverDescriptors(event.response, is_degraded))


def _discard(state: _ConsumerData, _: object) -> None:
    state.effects.append(do.DiscardDescriptors())


def _serve_self(state: _ConsumerData, _: object) -> None:
    state.effects.append(do.ServeSelf(state.request))


def _release_own(state: _ConsumerData, _: object) -> None:
    state.effects.append(do.ReleaseOwn(state.request.allocation_id))


def _report_fallback(state: _ConsumerData, event: Event) -> None:
    state.effects.append(do.ReportFallback(state.request.allocation_id, _error_of(event)))


def _report_refusal(state: _ConsumerData, event: Event) -> None:
    state.effects.append(do.ReportRefusal(_error_of(event)))


def _report_end(state: _ConsumerData, _: object) -> None:
    state.effects.append(do.ReportEnd(state.request.allocation_id))


_ORDERS: Final[Mapping[Order, _ConsumerHandler]] = {
    do.Connect: _connect,
    do.CloseChannel: _close,
    do.OweEnd: _owe_end,
    do.SendRequest: _send_request,
    do.SendEnd: _send_end,
    do.SendFault: _send_fault,
    do.DeliverDescriptors: _deliver,
    do.DiscardDescriptors: _discard,
    do.ServeSelf: _serve_self,
    do.ReleaseOwn: _release_own,
    do.ReportFallback: _report_fallback,
    do.ReportRefusal: _report_refusal,
    do.ReportEnd: _report_end,
}

# --- Which of the seed's errors an event amounts to ----------------------------------------------


def _said(event: Any) -> NamespaceError:
    error: NamespaceError = event.error
    return error


def _not_understood(event: on.FrameRejected | on.ResponseMismatched) -> FdPassing:
    return FdPassing(event.reason)


def _lost(event: on.ConnectionLost) -> SocketUnavailable:
    return SocketUnavailable(event.reason or "the connection was lost before a whole answer")


def _overdue(_: object) -> SocketUnavailable:
    return SocketUnavailable("no whole answer within the answer deadline")


_ERRORS: Final[Mapping[type[Event], Callable[[Any], NamespaceError]]] = {
    on.ProviderUnreachable: _said,
    on.ProviderUnavailable: _said,
    on.PassingFailed: _said,
    on.CreationRefused: _said,
    on.NotFoundReceived: _said,
    on.SelfServiceFailed: _said,
    on.FrameRejected: _not_understood,
    on.ResponseMismatched: _not_understood,
    on.ConnectionLost: _lost,
    on.AnswerOverdue: _overdue,
}


def _error_of(event: Event) -> NamespaceError:
    return _ERRORS[type(event)](event)
