"""The provider as a whole: connections, messages that it cannot put to an allocation, readiness."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from .. import effects as do
from .. import events as on
from ..effects import Order, Timer, start, stop
from ..errors import FdPassing, NamespaceError, SocketUnavailable
from ..events import Event
from ..states import MessageState, ServiceState
from .allocations import check_claim, dispatch
from .answers import flush, refuse, turn_away
from .limits import over
from .models import Connection, Message, Service
from .state import Handler, State

_OPEN_MESSAGES: Final = "unanswered messages of one connection"
_STOPPING: Final = "the provider is shutting down"


def objection_to_peer(state: State, uid: int) -> NamespaceError | None:
    """Say why a user may not connect, or None if it may."""
    # Keeps PEER-2, PEER-19, ERR-3.
    if uid not in state.limits.allowed_uids:
        return SocketUnavailable(f"user {uid} may not use this provider")
    most = state.limits.connections_per_uid
    if state.usage[uid].connections >= most:
        return over("connections of one user", most)
    return None


def judge(
    state: State, connection: Connection, event: Any
) -> tuple[type[Event], NamespaceError | None]:
    """Name the event of `SERVICE` that a message is, and the error if it is over a limit."""
    # Keeps PEER-4, PEER-5, PEER-6, ERR-4, LIFE-14.
    limits, count = state.limits, len(connection.messages)
    if isinstance(event, on.FrameRejected):
        return on.FrameRejected, FdPassing(event.reason)
    if count >= limits.flood:
        return on.ConnectionFlooded, None
    if isinstance(event, on.RequestReceived):
        if count >= limits.open_per_connection:
            return on.RequestOverLimit, over(_OPEN_MESSAGES, limits.open_per_connection)
        if state.usage[connection.uid].messages >= limits.open_per_uid:
            most = limits.open_per_uid
            return on.RequestOverLimit, over("unanswered messages of one user", most)
    if state.service.state is ServiceState.STARTING and len(state.service.held) >= limits.waiting:
        reason = f"{limits.waiting} messages already wait for the provider"
        return on.QueueFull, SocketUnavailable(reason)
    return type(event), None


def _add_connection(state: State, _: Service, event: on.ConnectionOpened) -> None:
    state.connections[event.connection] = Connection(event.uid)
    state.usage[event.uid].connections += 1


def _refuse_peer(state: State, _: Service, event: on.ConnectionOpened) -> None:
    error = objection_to_peer(state, event.uid)
    assert error is not None
    state.effects.append(do.Refuse(event.connection, error))


def _forget_connection(state: State, service: Service, event: on.ConnectionLost) -> None:
    # Keeps LIFE-2.
    number = event.connection
    connection = state.connections.pop(number)
    usage = state.usage[connection.uid]
    usage.connections -= 1
    usage.messages -= len(connection.messages)
    service.held = [message for message in service.held if message.connection != number]
    if not service.held:
        state.time(service, stop(Timer.READINESS))
    # Only those that it has to do with: a loss costs what the connection held, not what is alive.
    concerned = (state.allocations.get(name) for name in sorted(connection.concerns))
    for allocation in filter(None, concerned):
        allocation.drop(number)
        if number in allocation.asked:
            allocation.asked.discard(number)
            check_claim(state, allocation)


def _hold(state: State, service: Service, message: Message) -> None:
    # Keeps LIFE-13.
    if not service.held:
        state.time(service, start(Timer.READINESS))
    state.fire_message(message, on.MessageHeld)
    service.held.append(message)


def _dispatch_held(state: State, service: Service, _: object) -> None:
    held, service.held = service.held, []
    for message in held:
        dispatch(state, service, message)


def _refuse_over_limit(state: State, _: Service, message: Message) -> None:
    assert message.error is not None
    refuse(state, message, message.error)
    flush(state, message.connection)


def _refuse_late(state: State, _: Service, message: Message) -> None:
    turn_away(state, [message], _STOPPING)


def _refuse_unready(state: State, service: Service, _: object) -> None:
    held, service.held = service.held, []
    turn_away(state, held, "the provider did not become ready in time")


def _refuse_held(state: State, service: Service, _: object) -> None:
    held, service.held = service.held, []
    turn_away(state, held, _STOPPING)


def _refuse_deferred(state: State, _: Service, __: object) -> None:
    connections = sorted(state.connections.items())
    messages = [message for _, connection in connections for message in connection.messages]
    deferred = [message for message in messages if message.state is MessageState.DEFERRED]
    turn_away(state, deferred, _STOPPING)


def _refuse_flood(state: State, _: Service, message: Message) -> None:
    # Refusals pile up behind an answer that takes its time: the queue must end somewhere. This
    # frame is out of turn, so it must not be taken for the oldest message's answer.
    error = FdPassing(f"over {state.limits.flood} {_OPEN_MESSAGES}")
    state.effects.append(do.Refuse(message.connection, error))


def _refuse_frame(state: State, _: Service, message: Message) -> None:
    state.fire_message(message, on.FrameRejected)
    flush(state, message.connection)


ORDERS: Final[Mapping[Order, Handler]] = {
    do.AddConnection: _add_connection,
    do.RefusePeer: _refuse_peer,
    do.ForgetConnection: _forget_connection,
    do.HoldMessage: _hold,
    do.DispatchHeld: _dispatch_held,
    do.RefuseMessage: _refuse_over_limit,
    do.RefuseLate: _refuse_late,
    do.RefuseUnready: _refuse_unready,
    do.RefuseHeld: _refuse_held,
    do.RefuseDeferred: _refuse_deferred,
    do.RefuseFlood: _refuse_flood,
    do.RefuseFrame: _refuse_frame,
}
"""What carries out the orders of `SERVICE`: because of a message, or of an event."""
