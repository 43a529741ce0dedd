"""The provider's kernel: the state machine of a namespace provider, without I/O.

What it decides are rows of `lifecycle`: `SERVICE` for the provider as a whole, `ALLOCATION` for
each allocation, `MESSAGE` for each message. This module takes events in, checks the guards and
names what an event is; the modules beside it carry out what the rows ask for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Final

from .. import events as on
from ..effects import Effect, Order, Timer
from ..errors import LocalProtocolError, NamespaceError
from ..events import ConnectionId, Event, ProviderInput
from ..lifecycle import (
    EXPIRIES,
    IS_BEING_MADE,
    IS_BEING_RELEASED,
    IS_MADE,
    IS_NEW,
    IS_OPEN,
    IS_READ,
    IS_RUNNING,
    PROVIDER_GUARDS,
    Guard,
)
from ..messages import AllocationEnded, NamespaceRequest, NamespaceResponse, objection_to_size
from ..messages import Message as AnyMessage
from ..snapshots import ProviderSnapshot
from ..states import AllocationState, ServiceState
from . import allocations, answers, service
from .limits import Limits
from .models import Allocation, Message, Question, Service
from .state import Handler, State


class ProviderKernel:
    """
    Decides for a provider; performs nothing.

    Feed it every event, in the order of happening, and perform the effects of each in the order
    given before feeding the next. Equal inputs give equal outputs. After an exception the state is
    what it was before.

    Args:
        limits: who may use the provider, and how much of it.
    """

    orders: ClassVar[Mapping[Order, Handler]] = {
        **service.ORDERS,
        **answers.ORDERS,
        **allocations.ORDERS,
    }
    """What carries out each order of a row; a test replaces some in a subclass."""

    def __init__(self, limits: Limits | None = None) -> None:
        self._state = State(limits or Limits(), self.orders)

    # --- Looking at it ---------------------------------------------------------------------------

    @property
    def service(self) -> ServiceState:
        """Where the provider as a whole stands: whether messages are answered."""
        return self._state.service.state

    @property
    def states(self) -> dict[str, AllocationState]:
        """The state of every allocation that is neither unknown nor forgotten."""
        return {name: a.state for name, a in sorted(self._state.allocations.items())}

    def state_of(self, allocation_id: str) -> AllocationState:
        """Say where an allocation stands; remembered ones are released, others unknown."""
        return self._state.find(allocation_id).state

    def user_of(self, allocation_id: str) -> int | None:
        """Say which user asked for an allocation first; None for an adopted or unknown one."""
        return self._state.find(allocation_id).uid

    def response_of(self, allocation_id: str) -> NamespaceResponse | None:
        """Return the response, the very object, that an allocation is handed over with now."""
        allocation = self._state.find(allocation_id)
        is_alive = allocation.state in (AllocationState.CREATED, AllocationState.HANDED_OFF)
        return allocation.response if is_alive else None

    def objection_to(self, uid: int) -> NamespaceError | None:
        """Say why a connection of a user would be refused now, or None if it would not."""
        return service.objection_to_peer(self._state, uid)

    def drain_of(self, allocation_id: str) -> str:
        """Say what keeps an ended allocation from being released; empty when nothing is known."""
        return self._state.find(allocation_id).drain

    def __repr__(self) -> str:
        states = ", ".join(f"{name}: {state.value}" for name, state in self.states.items())
        count = len(self._state.connections)
        return f"<ProviderKernel {self.service.value}, {count} connections, {{{states}}}>"

    def snapshot(self) -> ProviderSnapshot:
        """Take the whole state as values with names; equal states give equal snapshots."""
        return self._state.freeze()

    @classmethod
    def restore(cls, snapshot: ProviderSnapshot, limits: Limits | None = None) -> ProviderKernel:
        """Make a kernel that goes on exactly where the snapshot was taken."""
        kernel = cls(limits)
        kernel._state.thaw(snapshot)
        return kernel

    def remember(self, names: Iterable[str]) -> None:
        """Take up the names of allocations released before a restart, oldest first."""
        self._state.remember(names)

    # --- Moving it -------------------------------------------------------------------------------

    def receive(self, event: ProviderInput) -> tuple[Effect, ...]:
        """
        Take in what happened and say what shall be done.

        Returns:
            The effects, in the order in which to perform them.

        Raises:
            LocalProtocolError: the driver or the backend reported what cannot be. Nothing changed.
        """
        state, kind = self._state, type(event)
        state.effects = []
        receiver = _RECEIVERS.get(kind)
        if receiver is None:
            raise LocalProtocolError(kind.__name__, state.service.state.value, "the provider")
        receiver(state, event)
        return tuple(state.effects)


def event_of(connection: ConnectionId, message: AnyMessage) -> ProviderInput:
    """Name what it means for a provider that a message has arrived."""
    # Keeps END-19, WIRE-11.
    match message:
        case NamespaceRequest():
            return on.RequestReceived(connection, message)
        case AllocationEnded(allocation_id=allocation_id):
            # Its answer repeats the id, and would not fit into a frame if the id hardly did.
            reason = objection_to_size(allocation_id)
            if reason is not None:
                return on.FrameRejected(reason, connection)
            return on.EndReceived(connection, allocation_id)
        case _:
            name = type(message).__name__
            return on.FrameRejected(f"{name} is not for the provider", connection)


# --- What an event is ----------------------------------------------------------------------------


def _receive_for_service(state: State, event: Any) -> None:
    state.check_service(type(event))
    _check(state, state.service, event)
    if type(event) is on.ReadinessOverdue:
        state.service.timers.discard(Timer.READINESS)
    state.fire_service(type(event), event)


def _receive_connection(state: State, event: on.ConnectionOpened) -> None:
    _check(state, state.service, event)
    error = service.objection_to_peer(state, event.uid)
    state.fire_service(on.PeerRefused if error else on.ConnectionOpened, event)


def _receive_message(
    state: State, event: on.RequestReceived | on.EndReceived | on.FrameRejected
) -> None:
    """Queue a message, and name what it is to the provider as a whole."""
    _check(state, state.service, event)
    connection = state.connections[event.connection]
    message = Message(event.connection, _question_of(event))
    name, message.error = service.judge(state, connection, event)
    connection.messages.append(message)
    state.usage[connection.uid].messages += 1
    state.fire_service(name, message)


def _question_of(event: ProviderInput) -> Question | None:
    if isinstance(event, on.RequestReceived):
        return event.request
    return AllocationEnded(event.allocation_id) if isinstance(event, on.EndReceived) else None


def _receive_adoption(
    state: State, event: on.CreatedAdopted | on.HandedOffAdopted | on.RemainsFound
) -> None:
    """Take up what is alive from before; only while the provider starts."""
    kind, name = type(event), event.allocation_id
    state.check_service(kind)
    # A name that was released before may have been given to the incarnation adopted now.
    allocation = state.allocations.get(name) or Allocation(name)
    state.check_allocation(allocation, kind)
    allocation.request = event.request
    if not isinstance(event, on.RemainsFound):
        allocation.response = event.response
    state.enter(allocation)
    state.fire_service(kind)
    state.fire_allocation(allocation, kind)


def _receive_for_allocation(state: State, event: Any) -> None:
    kind = type(event)
    allocation = state.find(event.allocation_id)
    state.check_allocation(allocation, kind)
    _check(state, allocation, event)
    note = _NOTES.get(kind)
    if note is not None:
        note(state, allocation, event)
    state.fire_allocation(allocation, kind)


_RECEIVERS: Final[dict[type[Event], Callable[[State, Any], None]]] = {
    on.ConnectionOpened: _receive_connection,
    **dict.fromkeys((on.RequestReceived, on.EndReceived, on.FrameRejected), _receive_message),
    **dict.fromkeys(
        (on.ConnectionLost, on.ProviderReady, on.ReadinessOverdue, on.ProviderStopping),
        _receive_for_service,
    ),
    **dict.fromkeys((on.CreatedAdopted, on.HandedOffAdopted, on.RemainsFound), _receive_adoption),
    **dict.fromkeys(
        (
            on.NamespacesCreated,
            on.NamespacesNotCreated,
            on.ResponseSent,
            on.ResponseNotSent,
            on.ClaimExpired,
            on.ScopePopulated,
            on.ScopeEmptied,
            on.InitDied,
            on.ReleaseRequested,
            on.NamespacesReleased,
            on.ReleaseDelayed,
            on.RetryDue,
            on.ReleaseOverdue,
        ),
        _receive_for_allocation,
    ),
}
"""What takes in which event. An event that is missing here cannot be fed."""

# --- What an event says of an allocation; it is kept before the row is taken ---------------------


def _note_created(_: State, allocation: Allocation, event: on.NamespacesCreated) -> None:
    allocation.response, allocation.is_being_made = event.response, False


def _note_not_created(_: State, allocation: Allocation, event: on.NamespacesNotCreated) -> None:
    allocation.failure, allocation.is_being_made = event.error.reason, False


def _note_sent(state: State, allocation: Allocation, event: on.ResponseSent) -> None:
    connection = state.connections.get(event.connection)
    if connection is not None:
        allocation.holders.add(event.connection)
        connection.concerns.add(allocation.allocation_id)


def _note_populated(_: State, allocation: Allocation, event: on.ScopePopulated) -> None:
    allocation.is_populated = True


def _note_delay(_: State, allocation: Allocation, event: on.ReleaseDelayed) -> None:
    allocation.drain = event.reason


def _note_expiry(_: State, allocation: Allocation, event: on.AllocationEvent) -> None:
    allocation.timers.remove(EXPIRIES[type(event)])


_NOTES: Final[dict[type[Event], Callable[[State, Allocation, Any], None]]] = {
    on.NamespacesCreated: _note_created,
    on.NamespacesNotCreated: _note_not_created,
    on.ResponseSent: _note_sent,
    on.ScopePopulated: _note_populated,
    on.ReleaseDelayed: _note_delay,
    on.ClaimExpired: _note_expiry,
    on.RetryDue: _note_expiry,
    on.ReleaseOverdue: _note_expiry,
}

# --- Guards --------------------------------------------------------------------------------------

_HOLDS: Final[dict[Guard, Callable[[State, Any, Any], bool]]] = {
    IS_RUNNING: lambda state, model, event: EXPIRIES[type(event)] in model.timers,
    IS_BEING_MADE: lambda state, allocation, event: allocation.is_being_made,
    IS_MADE: lambda state, allocation, event: not allocation.is_being_made,
    IS_BEING_RELEASED: lambda state, allocation, event: Timer.RETRY not in allocation.timers,
    IS_NEW: lambda state, model, event: event.connection not in state.connections,
    IS_OPEN: lambda state, model, event: event.connection in state.connections,
    IS_READ: lambda state, model, event: state.connections[event.connection].is_read,
}
"""Whether a guard holds."""

_CHECKS: Final[dict[type[Event], list[tuple[Guard, Callable[[State, Any, Any], bool]]]]] = {
    event: [(guard, _HOLDS[guard]) for guard in PROVIDER_GUARDS if event in guard.events]
    for event in _RECEIVERS
}


def _check(state: State, model: Service | Allocation, event: Any) -> None:
    """Check what an event must meet besides its row; raise, and change nothing, if it does not."""
    for guard, holds in _CHECKS[type(event)]:
        if not holds(state, model, event):
            raise _violation(guard, model, event)


def _violation(guard: Guard, model: Service | Allocation, event: Any) -> LocalProtocolError:
    kind = type(event)
    if hasattr(event, "connection"):
        return LocalProtocolError(kind.__name__, guard.violation, f"connection {event.connection}")
    timer = EXPIRIES[kind].value if kind in EXPIRIES else ""
    violation = f"{model.state.value} {guard.violation.format(timer=timer)}"
    return LocalProtocolError(kind.__name__, violation, model.subject)
