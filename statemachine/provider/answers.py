"""Answers of a provider: known at some time, and sent in the order of the messages.

Errors carry no id, so a consumer matches answers to messages by their order. Every message of a
connection therefore waits in a queue until its answer has left; `lifecycle.MESSAGE` is its life.
Pushed `AllocationEnded`s answer nothing and pass the queue by. (WIRE-14, WIRE-15, WIRE-16)
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from .. import effects as do
from .. import events as on
from ..effects import Order
from ..errors import NamespaceError, SocketUnavailable
from ..events import ConnectionId
from ..states import MessageState
from .models import Message
from .state import Handler, State


def refuse(state: State, message: Message, error: NamespaceError) -> None:
    """Let an error be the answer; it leaves with the next `flush`, in its turn."""
    state.fire_message(message, on.MessageRefused)
    message.error = error


def turn_away(state: State, messages: Iterable[Message], reason: str) -> None:
    """Answer messages with `SocketUnavailable`."""
    for message in messages:
        refuse(state, message, SocketUnavailable(reason))
        flush(state, message.connection)


def flush(state: State, number: ConnectionId) -> None:
    """Send every answer that is known and has none before it that is not."""
    # Keeps WIRE-14.
    connection = state.connections[number]
    while connection.messages and not connection.is_closing:
        message = connection.messages[0]
        state.fire_message(message, on.TurnCame)
        if message.state is not MessageState.ANSWERED:
            return
        connection.messages.popleft()
        state.usage[connection.uid].messages -= 1


def _send_response(state: State, message: Message, _: Message) -> None:
    # Keeps FD-2.
    assert message.question is not None
    response = state.allocations[message.question.allocation_id].response
    assert response is not None
    state.effects.append(do.HandOver(message.connection, response))


def _send_error(state: State, message: Message, _: Message) -> None:
    assert message.error is not None
    state.effects.append(do.Refuse(message.connection, message.error))


def _send_end(state: State, message: Message, _: Message) -> None:
    assert message.question is not None
    state.effects.append(do.AnnounceEnd(message.connection, message.question.allocation_id))


def _close(state: State, _: object, cause: Any) -> None:
    state.connections[cause.connection].is_closing = True
    state.effects.append(do.CloseConnection(cause.connection))


ORDERS: Final[dict[Order, Handler]] = {
    do.HandOver: _send_response,
    do.Refuse: _send_error,
    do.AnnounceEnd: _send_end,
    do.CloseConnection: _close,
}
"""What carries out the orders of `MESSAGE`."""
