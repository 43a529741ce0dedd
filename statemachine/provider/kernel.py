"""The provider's kernel: which allocations there are, and who waits for what.

The life of each allocation is the business of `lifecycle.PROVIDER`. Around it the kernel keeps what
concerns more than one allocation: the connections, the order of answers on each, the limits, the
requests that wait for the provider to be ready, and the names it remembers.

Answers. Errors carry no id, so a consumer matches answers to messages by their order. Every message
of a connection therefore takes a *slot*; a slot is resolved when its answer is known, and leaves
when all slots before it have left. `AllocationEnded`s that nobody asked for take no slot. (WIRE-14,
WIRE-15, WIRE-16)
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final, TypeAlias

from . import effects as do
from . import events as on
from .effects import Effect, Timer, Timing
from .errors import (
    AllocationNotFound,
    CreationFailed,
    FdPassing,
    LocalProtocolError,
    NamespaceError,
    SocketUnavailable,
)
from .events import ConnectionId, Event
from .lifecycle import PROVIDER, AllocationState
from .messages import (
    AllocationEnded,
    Message,
    NamespaceRequest,
    NamespaceResponse,
    objection,
    objection_to_size,
)
from .table import refusal

WAITING_MAX: Final = 128
"""Most messages that wait for the provider to be ready."""

REMEMBERED_MAX: Final = 1024
"""Most names of released allocations that are remembered; the oldest is forgotten first."""

OPEN_MESSAGES_PER_CONNECTION_MAX: Final = 64
"""Most unanswered messages of one connection; more than twice as many close it."""

OPEN_MESSAGES_PER_UID_MAX: Final = 1024
"""Most unanswered messages of all connections of one user."""

ALLOCATIONS_PER_UID_MAX: Final = 4096
"""Most allocations that are alive at the wish of one user."""

CONNECTIONS_PER_UID_MAX: Final = 4096
"""Most connections of one user."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Who may use the provider, and how much of it. The defaults are the constants above."""

    allowed_uids: frozenset[int] = frozenset({0})
    """Users whose connections are served; the driver puts its own first."""
    waiting: int = WAITING_MAX
    """Most messages that wait for the provider to be ready."""
    open_per_connection: int = OPEN_MESSAGES_PER_CONNECTION_MAX
    """Most unanswered messages of a connection."""
    open_per_uid: int = OPEN_MESSAGES_PER_UID_MAX
    """Most unanswered messages of a user."""
    allocations_per_uid: int = ALLOCATIONS_PER_UID_MAX
    """Most allocations of a user that are not released."""
    connections_per_uid: int = CONNECTIONS_PER_UID_MAX
    """Most connections of a user."""
    remembered: int = REMEMBERED_MAX
    """Most names of released allocations."""


class Phase(Enum):
    """Where the provider as a whole stands."""

    STARTING = "starting"
    READY = "ready"
    STOPPING = "stopping"


Snapshot: TypeAlias = tuple[Any, ...]
"""A kernel's whole state as nested tuples of plain values: comparable, hashable, restorable."""

_Question: TypeAlias = NamespaceRequest | AllocationEnded


class _Stage(Enum):
    """How far a message has come. The order does not matter; the names do."""

    WAITING = "waiting"
    """The provider is not ready."""
    EARLY = "early"
    """The allocation before it is being released."""
    PUT = "put"
    """It has been put to its allocation."""
    GRANTED = "granted"
    """Its namespaces exist and may be handed over."""


@dataclass(slots=True)
class _Slot:
    """One message of a connection, until its answer leaves."""

    question: _Question | None
    """None: a frame that could not be read; its answer closes the connection."""
    answer: NamespaceError | AllocationEnded | None = None
    """None while it is not known, and for a hand-over."""
    stage: _Stage = _Stage.PUT

    def is_request_for(self, allocation_id: str) -> bool:
        question = self.question
        return isinstance(question, NamespaceRequest) and question.allocation_id == allocation_id


@dataclass(slots=True)
class _User:
    """What one user takes up, counted for the limits."""

    connections: int = 0
    messages: int = 0
    allocations: int = 0


@dataclass(slots=True)
class _Connection:
    uid: int
    slots: deque[_Slot] = field(default_factory=deque)
    is_closing: bool = False

    def freeze(self) -> Snapshot:
        slots = tuple((slot.question, slot.answer, slot.stage) for slot in self.slots)
        return (self.uid, self.is_closing, slots)

    @classmethod
    def thaw(cls, frozen: Snapshot) -> _Connection:
        uid, is_closing, slots = frozen
        return cls(uid, deque(_Slot(*slot) for slot in slots), is_closing)


@dataclass(slots=True)
class _Allocation:
    """What the kernel knows about one allocation; the model that the table moves."""

    allocation_id: str
    request: NamespaceRequest | None = None
    response: NamespaceResponse | None = None
    uid: int | None = None
    """Whose wish it was, for the limits; None when adopted."""
    state: AllocationState = AllocationState.UNKNOWN
    asked: set[ConnectionId] = field(default_factory=set)
    """Live connections that asked for it."""
    parties: set[ConnectionId] = field(default_factory=set)
    """Live connections that have sent any message about it."""
    handed: set[ConnectionId] = field(default_factory=set)
    """Live connections that its descriptors were sent to."""
    early: list[ConnectionId] = field(default_factory=list)
    """Whose requests wait for its release, one for each, in the order in which they came."""
    is_being_made: bool = False
    """Whether the backend has not reported yet what came of the creation."""
    is_populated: bool = False
    is_announced: bool = False
    timers: set[Timer] = field(default_factory=set)
    failure: str = ""
    """Why whoever asked gets nothing."""
    drain: str = ""
    """What is still there, and why, while it cannot be released."""

    def freeze(self) -> Snapshot:
        return (
            self.allocation_id,
            self.request,
            self.response,
            self.uid,
            self.state,
            frozenset(self.asked),
            frozenset(self.parties),
            frozenset(self.handed),
            tuple(self.early),
            self.is_being_made,
            self.is_populated,
            self.is_announced,
            frozenset(self.timers),
            self.failure,
            self.drain,
        )

    @classmethod
    def thaw(cls, frozen: Snapshot) -> _Allocation:
        parts: list[Any] = [set(p) if isinstance(p, frozenset) else p for p in frozen]
        allocation = cls(*parts)
        allocation.early = list(allocation.early)
        return allocation


class ProviderKernel:
    """
    Decides for a provider; performs nothing.

    Feed it every event, in the order of happening, and perform the effects of each in the order
    given before feeding the next. Equal inputs give equal outputs. After an exception the state is
    what it was before.

    Args:
        limits: who may use the provider, and how much of it.
    """

    def __init__(self, limits: Limits | None = None) -> None:
        self._limits = limits or Limits()
        self._phase = Phase.STARTING
        # Before that, what is alive is not known: nobody may be told that an allocation is not.
        self._has_been_ready = False
        self._connections: dict[ConnectionId, _Connection] = {}
        self._allocations: dict[str, _Allocation] = {}
        self._waiting: list[tuple[ConnectionId, _Slot]] = []
        self._remembered: dict[str, None] = {}
        # Derived from the above, so in no snapshot.
        self._users: defaultdict[int, _User] = defaultdict(_User)
        # Of the `receive` that is under way.
        self._out: list[Effect] = []

    # --- Looking at it -------------------------------------------------------------------------

    @property
    def phase(self) -> Phase:
        """Whether requests are served."""
        return self._phase

    @property
    def states(self) -> dict[str, AllocationState]:
        """The state of every allocation that is neither unknown nor forgotten."""
        return {name: a.state for name, a in sorted(self._allocations.items())}

    def state_of(self, allocation_id: str) -> AllocationState:
        """Say where an allocation stands; remembered ones are released, others unknown."""
        return self._model(allocation_id).state

    def drain_of(self, allocation_id: str) -> str:
        """Say what keeps an ended allocation from being released; empty when nothing is known."""
        return self._model(allocation_id).drain

    def snapshot(self) -> Snapshot:
        """Take the whole state as plain values; equal states give equal snapshots."""
        return (
            self._phase,
            tuple((c, x.freeze()) for c, x in sorted(self._connections.items())),
            tuple(a.freeze() for _, a in sorted(self._allocations.items())),
            tuple((c, _index_of(slot, self._connections[c].slots)) for c, slot in self._waiting),
            tuple(self._remembered),
            self._has_been_ready,
        )

    @classmethod
    def restore(cls, snapshot: Snapshot, limits: Limits | None = None) -> ProviderKernel:
        """Make a kernel that goes on exactly where the snapshot was taken."""
        phase, connections, allocations, waiting, remembered, has_been_ready = snapshot
        kernel = cls(limits)
        kernel._phase = phase
        kernel._has_been_ready = has_been_ready
        kernel.remember(remembered)
        for number, frozen in connections:
            kernel._connections[number] = connection = _Connection.thaw(frozen)
            kernel._users[connection.uid].connections += 1
            kernel._users[connection.uid].messages += len(connection.slots)
        for frozen in allocations:
            allocation = _Allocation.thaw(frozen)
            kernel._allocations[allocation.allocation_id] = allocation
            kernel._count_allocation(allocation, +1)
        for number, index in waiting:
            kernel._waiting.append((number, kernel._connections[number].slots[index]))
        return kernel

    def remember(self, names: Iterable[str]) -> None:
        """Take up the names of allocations released before a restart, oldest first."""
        # Keeps CRASH-6.
        self._remembered |= dict.fromkeys(names)
        self._trim_remembered()

    def _trim_remembered(self) -> None:
        # Keeps END-18.
        while len(self._remembered) > self._limits.remembered:
            del self._remembered[next(iter(self._remembered))]

    # --- Moving it -----------------------------------------------------------------------------

    def receive(self, event: Event) -> tuple[Effect, ...]:
        """
        Take in what happened and say what shall be done.

        Returns:
            The effects, in the order in which to perform them.

        Raises:
            LocalProtocolError: the driver or the backend reported what cannot be. Nothing changed.
        """
        self._out = []
        receiver = _RECEIVERS.get(type(event))
        if receiver is not None:
            receiver(self, event)
        elif isinstance(event, on.AllocationEvent) and not isinstance(event, on.Unclaimed):
            self._on_allocation_event(event)
        else:
            raise LocalProtocolError(type(event).__name__, self._phase.value, "the provider")
        return tuple(self._out)

    def _on_allocation_event(self, event: on.AllocationEvent) -> None:
        allocation = self._model(event.allocation_id)
        if isinstance(event, _ADOPTIONS):
            if self._phase is not Phase.STARTING:
                raise LocalProtocolError(type(event).__name__, self._phase.value, "the provider")
            if allocation.state is AllocationState.RELEASED:
                # The name was released before, and given to the life that is adopted now.
                allocation.state = AllocationState.UNKNOWN
        if PROVIDER.row(type(event), allocation.state) is None:
            raise refusal(type(event), allocation.state, f"allocation {event.allocation_id}")
        _check_due(allocation, event)
        # Looked up, because most events say nothing more, and an explorer feeds millions.
        if type(event) in _NOTED:
            self._note(allocation, event)
        self._fire(allocation, event)
        if type(event) in _FOLLOWED:
            self._follow(allocation, event)

    def _note(self, allocation: _Allocation, event: on.AllocationEvent) -> None:
        """Keep what an event says about an allocation, before its row is taken."""
        match event:
            case on.NamespacesCreated(response=response):
                allocation.response, allocation.is_being_made = response, False
            case on.NamespacesNotCreated(error=error):
                allocation.failure, allocation.is_being_made = error.reason, False
            case on.ResponseSent(connection=connection):
                if connection in self._connections:
                    allocation.handed.add(connection)
            case on.ScopePopulated():
                allocation.is_populated = True
            case on.ReleaseDelayed(reason=reason):
                allocation.drain = reason
            case on.ClaimExpired() | on.RetryDue() | on.ReleaseOverdue():
                allocation.timers.remove(_EXPIRIES[type(event)])
            case on.CreatedAdopted() | on.HandedOffAdopted():
                allocation.request, allocation.response = event.request, event.response
                self._enter(allocation)
            case on.RemainsFound(request=request):
                allocation.request = request
                self._enter(allocation)
            case _:
                pass

    def _follow(self, allocation: _Allocation, event: on.AllocationEvent) -> None:
        """Do what an event means for more than its allocation, after its row is taken."""
        match event:
            case on.NamespacesCreated():
                self._look_for_claim(allocation)
            case on.ReleaseOverdue():
                allocation.is_announced = True
            case on.NamespacesReleased():
                self._forget(allocation)
            case _:
                pass

    def _forget(self, allocation: _Allocation) -> None:
        """Forget all but the name, and serve who came too early."""
        name = allocation.allocation_id
        del self._allocations[name]
        self._count_allocation(allocation, -1)
        self._remembered.pop(name, None)
        self._remembered[name] = None
        self._trim_remembered()
        for number in allocation.early:
            self._ask_early(number, name)

    def _ask_early(self, number: ConnectionId, name: str) -> None:
        """Put a connection's first early request for a name, if it is still there, to its next."""
        # Keeps LIFE-6.
        slots = self._connections[number].slots if number in self._connections else ()
        for slot in slots:
            if slot.stage is _Stage.EARLY and slot.is_request_for(name):
                self._ask(number, slot)
                return

    # --- Connections ---------------------------------------------------------------------------

    def _on_connection_opened(self, event: on.ConnectionOpened) -> None:
        if event.connection in self._connections:
            raise LocalProtocolError("ConnectionOpened", "open", f"connection {event.connection}")
        objection_to_peer = self._objection_to_peer(event.uid)
        self._connections[event.connection] = _Connection(event.uid)
        self._users[event.uid].connections += 1
        if objection_to_peer is not None:
            self._out.append(do.Refuse(event.connection, objection_to_peer))
            self._close(event.connection)

    def _objection_to_peer(self, uid: int) -> NamespaceError | None:
        # Keeps PEER-2, ERR-3.
        if uid not in self._limits.allowed_uids:
            return SocketUnavailable(f"user {uid} may not use this provider")
        most = self._limits.connections_per_uid
        if self._users[uid].connections >= most:
            return _over("connections of one user", most)
        return None

    def _on_connection_lost(self, event: on.ConnectionLost) -> None:
        # Keeps LIFE-2.
        connection = self._connection(event)
        number = event.connection
        del self._connections[number]
        user = self._users[connection.uid]
        user.connections -= 1
        user.messages -= len(connection.slots)
        self._drop_waiting(number)
        for _, allocation in sorted(self._allocations.items()):
            allocation.handed.discard(number)
            allocation.parties.discard(number)
            allocation.early = [c for c in allocation.early if c != number]
            if number in allocation.asked:
                allocation.asked.discard(number)
                self._look_for_claim(allocation)

    def _drop_waiting(self, number: ConnectionId) -> None:
        left = [(c, slot) for c, slot in self._waiting if c != number]
        if self._waiting and not left:
            self._out.append(do.StopTimer(Timer.READINESS, ""))
        self._waiting = left

    def _on_frame_rejected(self, event: on.FrameRejected) -> None:
        connection = self._open_connection(event)
        self._append(connection, _Slot(None, FdPassing(event.reason)))
        self._flush(event.connection)

    def _look_for_claim(self, allocation: _Allocation) -> None:
        # Keeps END-3.
        if not allocation.asked and not allocation.is_populated:
            self._fire(allocation, on.Unclaimed(allocation.allocation_id))

    # --- Messages ------------------------------------------------------------------------------

    def _on_request_received(self, event: on.RequestReceived) -> None:
        self._on_question(event, event.request)

    def _on_end_received(self, event: on.EndReceived) -> None:
        self._on_question(event, AllocationEnded(event.allocation_id))

    def _on_question(self, event: _PeerSaid, question: _Question) -> None:
        """Give a message its slot, and the answer that the provider as a whole has for it."""
        # Keeps PEER-6.
        connection = self._open_connection(event)
        slot = _Slot(question, self._objection_to_question(connection, question))
        self._append(connection, slot)
        if len(connection.slots) > 2 * self._limits.open_per_connection:
            # Refusals pile up behind an answer that takes its time: the queue must end somewhere.
            # This word is out of turn, so it must not be taken for the oldest message's answer.
            most = 2 * self._limits.open_per_connection
            self._out.append(
                do.Refuse(event.connection, FdPassing(f"over {most} {_OPEN_MESSAGES}"))
            )
            self._close(event.connection)
        elif slot.answer is not None:
            self._flush(event.connection)
        elif self._phase is Phase.STARTING:
            self._wait(event.connection, slot)
        else:
            self._ask(event.connection, slot)

    def _objection_to_question(
        self, connection: _Connection, question: _Question
    ) -> NamespaceError | None:
        # Keeps PEER-4, PEER-5, ERR-4, LIFE-14.
        limits = self._limits
        is_request = isinstance(question, NamespaceRequest)
        # An end frees something: only the flood rule bounds it. (END-20, LIFE-15, LIFE-16)
        if is_request and len(connection.slots) >= limits.open_per_connection:
            return _over(_OPEN_MESSAGES, limits.open_per_connection)
        if is_request and self._users[connection.uid].messages >= limits.open_per_uid:
            return _over("unanswered messages of one user", limits.open_per_uid)
        is_late = is_request or not self._has_been_ready
        if self._phase is Phase.STOPPING and is_late:
            return SocketUnavailable(_STOPPING)
        if self._phase is Phase.STARTING and len(self._waiting) >= limits.waiting:
            return SocketUnavailable(f"{limits.waiting} messages already wait for the provider")
        return None

    def _wait(self, number: ConnectionId, slot: _Slot) -> None:
        # Keeps LIFE-13.
        if not self._waiting:
            self._out.append(do.StartTimer(Timer.READINESS, ""))
        slot.stage = _Stage.WAITING
        self._waiting.append((number, slot))

    def _ask(self, number: ConnectionId, slot: _Slot) -> None:
        """Put a message to the allocation it is about, under the name of what it means."""
        slot.stage = _Stage.PUT
        if isinstance(slot.question, NamespaceRequest):
            self._ask_for_namespaces(number, slot, slot.question)
        elif slot.question is not None:
            self._ask_for_end(number, slot.question.allocation_id)
        self._flush(number)

    def _ask_for_namespaces(
        self, number: ConnectionId, slot: _Slot, request: NamespaceRequest
    ) -> None:
        allocation = self._allocations.get(request.allocation_id)
        slot.answer = self._objection_to_request(number, request, allocation)
        if slot.answer is not None:
            return
        if allocation is None:
            allocation = self._admit(number, request)
        allocation.parties.add(number)
        event = _name_request(allocation, request)
        if event is on.RequestEarly:
            slot.stage = _Stage.EARLY
            allocation.early.append(number)
        elif event in (on.RequestReceived, on.RequestRepeated):
            allocation.asked.add(number)
        self._fire(allocation, event(number, request))

    def _objection_to_request(
        self, number: ConnectionId, request: NamespaceRequest, allocation: _Allocation | None
    ) -> CreationFailed | None:
        # Keeps ERR-1, ERR-4, PEER-3.
        reason = objection(request)
        if reason is not None:
            return CreationFailed(reason)
        most = self._limits.allocations_per_uid
        user = self._users[self._connections[number].uid]
        if allocation is None and user.allocations >= most:
            return _over("live allocations of one user", most)
        return None

    def _admit(self, number: ConnectionId, request: NamespaceRequest) -> _Allocation:
        name = request.allocation_id
        allocation = _Allocation(name, request, uid=self._connections[number].uid)
        self._enter(allocation)
        return allocation

    def _enter(self, allocation: _Allocation) -> None:
        """Take an allocation up among those that are alive."""
        self._allocations[allocation.allocation_id] = allocation
        self._count_allocation(allocation, +1)
        self._remembered.pop(allocation.allocation_id, None)

    def _ask_for_end(self, number: ConnectionId, name: str) -> None:
        allocation = self._model(name)
        allocation.parties.add(number)
        is_over = allocation.is_announced or allocation.state is AllocationState.RELEASED
        event = on.EndRepeated if is_over else on.EndReceived
        self._withdraw_early(number, name)
        self._fire(allocation, event(number, name))

    def _withdraw_early(self, number: ConnectionId, name: str) -> None:
        """An end takes back the requests that its sender sent before it."""
        # Keeps END-17.
        for slot in self._connections[number].slots:
            if slot.stage is _Stage.EARLY and slot.is_request_for(name):
                slot.answer, slot.stage = CreationFailed(_OVERTAKEN), _Stage.PUT
        allocation = self._allocations.get(name)
        if allocation is not None:
            allocation.early = [c for c in allocation.early if c != number]

    # --- The provider as a whole ---------------------------------------------------------------

    def _on_ready(self, event: on.ProviderReady) -> None:
        if self._phase is not Phase.STARTING:
            raise LocalProtocolError("ProviderReady", self._phase.value, "the provider")
        self._phase = Phase.READY
        self._has_been_ready = True
        for number, slot in self._take_waiting():
            self._ask(number, slot)

    def _on_readiness_overdue(self, event: on.ReadinessOverdue) -> None:
        if not self._waiting:
            raise LocalProtocolError("ReadinessOverdue", self._phase.value, "the provider")
        waiting, self._waiting = self._waiting, []
        self._turn_away(waiting, "the provider did not become ready in time")

    def _on_stopping(self, event: on.ProviderStopping) -> None:
        if self._phase is Phase.STOPPING:
            raise LocalProtocolError("ProviderStopping", self._phase.value, "the provider")
        self._phase = Phase.STOPPING
        early = [
            (number, slot)
            for number, connection in sorted(self._connections.items())
            for slot in connection.slots
            if slot.stage is _Stage.EARLY
        ]
        self._turn_away([*self._take_waiting(), *early], _STOPPING)

    def _take_waiting(self) -> list[tuple[ConnectionId, _Slot]]:
        waiting, self._waiting = self._waiting, []
        if waiting:
            self._out.append(do.StopTimer(Timer.READINESS, ""))
        return waiting

    def _turn_away(self, slots: list[tuple[ConnectionId, _Slot]], reason: str) -> None:
        for number, slot in slots:
            slot.answer, slot.stage = SocketUnavailable(reason), _Stage.PUT
            self._flush(number)

    # --- From rows to effects ------------------------------------------------------------------

    def _fire(self, allocation: _Allocation, event: Event) -> None:
        """Take the row, and build what it asks for."""
        orders = PROVIDER.fire(allocation, type(event), f"allocation {allocation.allocation_id}")
        for order in orders:
            if isinstance(order, Timing):
                self._time(allocation, order)
            else:
                _BUILDERS[order](self, allocation, event)

    def _time(self, allocation: _Allocation, order: Timing) -> None:
        if order.starts:
            allocation.timers.add(order.timer)
            self._out.append(do.StartTimer(order.timer, allocation.allocation_id))
        elif order.timer in allocation.timers:
            allocation.timers.discard(order.timer)
            self._out.append(do.StopTimer(order.timer, allocation.allocation_id))

    def _build_create(self, allocation: _Allocation, event: Event) -> None:
        assert allocation.request is not None
        allocation.is_being_made = True
        self._out.append(do.CreateNamespaces(allocation.request))

    def _build_watch(self, allocation: _Allocation, event: Event) -> None:
        self._out.append(do.Watch(allocation.allocation_id))

    def _build_record(self, allocation: _Allocation, event: Event) -> None:
        self._out.append(do.RecordHandoff(allocation.allocation_id))

    def _build_release(self, allocation: _Allocation, event: Event) -> None:
        self._out.append(do.ReleaseNamespaces(allocation.allocation_id))

    def _build_hand_over(self, allocation: _Allocation, event: Event) -> None:
        """Grant whatever has been asked; it leaves when its turn comes."""
        # Keeps LIFE-3, LIFE-4.
        for number in sorted(allocation.asked):
            for slot in self._connections[number].slots:
                is_open = slot.stage is _Stage.PUT and slot.answer is None
                if is_open and slot.is_request_for(allocation.allocation_id):
                    slot.stage = _Stage.GRANTED
            self._flush(number)

    def _build_refuse(self, allocation: _Allocation, event: Event) -> None:
        """Resolve with an error whatever this event leaves without hope."""
        name = allocation.allocation_id
        match event:
            case on.EndReceived(connection=number):
                self._resolve(number, AllocationEnded(name), AllocationNotFound(name))
            case on.RequestConflicting(connection=number, request=request):
                reason = f"allocation {name} is alive with another request"
                self._resolve(number, request, CreationFailed(reason))
            case on.RequestDuringDrain(connection=number, request=request):
                self._resolve(number, request, CreationFailed(_draining(allocation)))
            case on.ReleaseOverdue():
                self._refuse_askers(allocation, early=CreationFailed(_draining(allocation)))
            case _:
                self._refuse_askers(allocation, early=None)

    def _refuse_askers(self, allocation: _Allocation, early: CreationFailed | None) -> None:
        """Tell everyone who asked in time that it failed; and who came early, if so said."""
        failed = CreationFailed(allocation.failure or _OVERTAKEN)
        for number in sorted(allocation.parties):
            for slot in self._connections[number].slots:
                if slot.answer is None and slot.is_request_for(allocation.allocation_id):
                    if slot.stage is _Stage.EARLY:
                        if early is not None:
                            slot.answer, slot.stage = early, _Stage.PUT
                    elif slot.stage is not _Stage.WAITING:
                        slot.answer = failed
            self._flush(number)

    def _build_announce(self, allocation: _Allocation, event: Event) -> None:
        """Answer everyone who asked for the end; tell everyone else who holds the allocation."""
        # Keeps END-12, END-13.
        ended = AllocationEnded(allocation.allocation_id)
        if isinstance(event, on.EndRepeated):
            self._resolve(event.connection, ended, ended)
            return
        for number in sorted(allocation.parties | allocation.handed):
            if self._resolve(number, ended, ended):
                self._flush(number)
            elif number in allocation.handed and not self._connections[number].is_closing:
                self._out.append(do.AnnounceEnd(number, allocation.allocation_id))
        allocation.handed.clear()

    def _resolve(
        self,
        number: ConnectionId,
        question: _Question,
        answer: NamespaceError | AllocationEnded,
    ) -> bool:
        """Give every open slot with this question its answer; say whether there was one."""
        slots = [
            slot
            for slot in self._connections[number].slots
            if slot.stage is _Stage.PUT and slot.answer is None and slot.question == question
        ]
        for slot in slots:
            slot.answer = answer
        return bool(slots)

    # --- Answers in order ----------------------------------------------------------------------

    def _flush(self, number: ConnectionId) -> None:
        """Let every slot leave that is resolved and has none before it that is not."""
        # Keeps WIRE-14.
        connection = self._connections[number]
        while connection.slots and not connection.is_closing:
            if not self._leave(number, connection.slots[0]):
                return
            connection.slots.popleft()
            self._users[connection.uid].messages -= 1

    def _leave(self, number: ConnectionId, slot: _Slot) -> bool:
        if isinstance(slot.answer, AllocationEnded):
            self._out.append(do.AnnounceEnd(number, slot.answer.allocation_id))
        elif slot.answer is not None:
            self._out.append(do.Refuse(number, slot.answer))
            if slot.question is None:
                self._close(number)
        else:
            return self._hand_over(number, slot)
        return True

    def _hand_over(self, number: ConnectionId, slot: _Slot) -> bool:
        # Keeps FD-2.
        if slot.stage is not _Stage.GRANTED or slot.question is None:
            return False
        allocation = self._allocations[slot.question.allocation_id]
        if allocation.state in _OVER:
            return False
        assert allocation.response is not None
        self._out.append(do.HandOver(number, allocation.response))
        return True

    # --- Small things --------------------------------------------------------------------------

    def _append(self, connection: _Connection, slot: _Slot) -> None:
        connection.slots.append(slot)
        self._users[connection.uid].messages += 1

    def _count_allocation(self, allocation: _Allocation, change: int) -> None:
        if allocation.uid is not None:
            self._users[allocation.uid].allocations += change

    def _close(self, number: ConnectionId) -> None:
        self._connections[number].is_closing = True
        self._out.append(do.CloseConnection(number))

    def _connection(self, event: _PeerSaid) -> _Connection:
        connection = self._connections.get(event.connection)
        if connection is None:
            raise LocalProtocolError(
                type(event).__name__, "not open", f"connection {event.connection}"
            )
        return connection

    def _open_connection(self, event: _PeerSaid) -> _Connection:
        """Find a connection that is still read from: no frame of it was unreadable."""
        connection = self._connection(event)
        is_deaf = bool(connection.slots) and connection.slots[-1].question is None
        if connection.is_closing or is_deaf:
            raise LocalProtocolError(
                type(event).__name__, "closing", f"connection {event.connection}"
            )
        return connection

    def _model(self, allocation_id: str) -> _Allocation:
        allocation = self._allocations.get(allocation_id)
        if allocation is not None:
            return allocation
        is_over = allocation_id in self._remembered
        state = AllocationState.RELEASED if is_over else AllocationState.UNKNOWN
        return _Allocation(allocation_id, state=state)


def event_of(connection: ConnectionId, message: Message) -> Event:
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


_PeerSaid: TypeAlias = on.RequestReceived | on.EndReceived | on.FrameRejected | on.ConnectionLost

_ADOPTIONS: Final = (on.CreatedAdopted, on.HandedOffAdopted, on.RemainsFound)

_CREATION_REPORTS: Final = (on.NamespacesCreated, on.NamespacesNotCreated)
_RELEASE_REPORTS: Final = (on.ReleaseDelayed, on.NamespacesReleased)

_NOTED: Final = frozenset(
    {
        *_CREATION_REPORTS,
        *_ADOPTIONS,
        on.ResponseSent,
        on.ScopePopulated,
        on.ReleaseDelayed,
        on.ClaimExpired,
        on.RetryDue,
        on.ReleaseOverdue,
    }
)
"""Events that say something of an allocation besides what their row does."""

_FOLLOWED: Final = frozenset({on.NamespacesCreated, on.ReleaseOverdue, on.NamespacesReleased})
"""Events that mean something for more than their allocation."""

_EXPIRIES: Final[dict[type[Event], Timer]] = {
    on.ClaimExpired: Timer.CLAIM,
    on.RetryDue: Timer.RETRY,
    on.ReleaseOverdue: Timer.RELEASE,
}

_OVER: Final = (AllocationState.ENDED, AllocationState.RELEASED)
"""Nothing of it is handed over any more, though an answer that was granted may still wait."""

_OPEN_MESSAGES: Final = "unanswered messages of one connection"
_STOPPING: Final = "the provider is shutting down"
_OVERTAKEN: Final = "the allocation ended before it could be handed over"

_RECEIVERS: Final[dict[type[Event], Callable[[ProviderKernel, Any], None]]] = {
    on.ConnectionOpened: ProviderKernel._on_connection_opened,
    on.ConnectionLost: ProviderKernel._on_connection_lost,
    on.FrameRejected: ProviderKernel._on_frame_rejected,
    on.RequestReceived: ProviderKernel._on_request_received,
    on.EndReceived: ProviderKernel._on_end_received,
    on.ProviderReady: ProviderKernel._on_ready,
    on.ReadinessOverdue: ProviderKernel._on_readiness_overdue,
    on.ProviderStopping: ProviderKernel._on_stopping,
}

_BUILDERS: Final[dict[type[Effect], Callable[[ProviderKernel, _Allocation, Event], None]]] = {
    do.CreateNamespaces: ProviderKernel._build_create,
    do.Watch: ProviderKernel._build_watch,
    do.HandOver: ProviderKernel._build_hand_over,
    do.RecordHandoff: ProviderKernel._build_record,
    do.Refuse: ProviderKernel._build_refuse,
    do.AnnounceEnd: ProviderKernel._build_announce,
    do.ReleaseNamespaces: ProviderKernel._build_release,
}


def _check_due(allocation: _Allocation, event: on.AllocationEvent) -> None:
    """
    Check that a timer ran that has run out, and that a job was under way that is reported.

    Raises:
        LocalProtocolError: naming what is missing.
    """
    timer = _EXPIRIES.get(type(event))
    missing = ""
    if timer is not None and timer not in allocation.timers:
        missing = f"without a {timer.value} timer"
    elif isinstance(event, _CREATION_REPORTS) and not allocation.is_being_made:
        missing = "and not being made"
    elif isinstance(event, _RELEASE_REPORTS) and allocation.is_being_made:
        missing = "and still being made"
    elif isinstance(event, _RELEASE_REPORTS) and Timer.RETRY in allocation.timers:
        missing = "and not being released"
    if missing:
        state = f"{allocation.state.value} {missing}"
        raise LocalProtocolError(
            type(event).__name__, state, f"allocation {allocation.allocation_id}"
        )


def _name_request(allocation: _Allocation, request: NamespaceRequest) -> type[_Requested]:
    if allocation.state is AllocationState.UNKNOWN:
        return on.RequestReceived
    if allocation.state is AllocationState.ENDED:
        return on.RequestDuringDrain if allocation.is_announced else on.RequestEarly
    return on.RequestRepeated if request == allocation.request else on.RequestConflicting


_Requested: TypeAlias = (
    on.RequestReceived
    | on.RequestRepeated
    | on.RequestConflicting
    | on.RequestEarly
    | on.RequestDuringDrain
)


def _over(what: str, most: int) -> CreationFailed:
    return CreationFailed(f"limit reached: {what}, at most {most}")


def _draining(allocation: _Allocation) -> str:
    why = allocation.drain or "its release takes long"
    return f"the allocation before it has ended but is not released: {why}"


def _index_of(slot: _Slot, slots: Iterable[_Slot]) -> int:
    # By identity: two equal messages of one connection are two slots.
    return next(index for index, other in enumerate(slots) if other is slot)
