"""What a provider's kernel keeps: the service, connections, their messages, and allocations.

Each is plain state. Three of them are models of a table of `lifecycle`: `Service` of `SERVICE`,
`Message` of `MESSAGE`, `Allocation` of `ALLOCATION`.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeAlias

from ..effects import Timer
from ..errors import NamespaceError
from ..events import ConnectionId
from ..messages import AllocationEnded, NamespaceRequest, NamespaceResponse
from ..snapshots import AllocationSnapshot, ConnectionSnapshot, MessageSnapshot
from ..states import AllocationState, MessageState, ServiceState

Question: TypeAlias = NamespaceRequest | AllocationEnded
"""What a provider is asked."""


@dataclass(slots=True, eq=False)
class Service:
    """The provider as a whole."""

    subject: ClassVar[str] = "the provider"
    """What the text of an error calls it."""
    allocation_id: ClassVar[str] = ""
    """Its timer belongs to no allocation."""
    state: ServiceState = ServiceState.STARTING
    held: list[Message] = field(default_factory=list)
    """Messages that wait for it to be ready, in the order of their arrival."""
    timers: set[Timer] = field(default_factory=set)
    """Those that run."""


@dataclass(slots=True, eq=False)
class Message:
    """A message that a provider has read, until its answer has left."""

    connection: ConnectionId
    question: Question | None
    """None: a frame that could not be read."""
    state: MessageState = MessageState.ARRIVED
    error: NamespaceError | None = None
    """The answer, if it is an error."""

    @property
    def subject(self) -> str:
        """What the text of an error calls it."""
        return f"a message of connection {self.connection}"

    def is_request_for(self, allocation_id: str) -> bool:
        """Say whether it asks for the namespaces of an allocation."""
        question = self.question
        return isinstance(question, NamespaceRequest) and question.allocation_id == allocation_id

    def is_end_of(self, allocation_id: str) -> bool:
        """Say whether it ends an allocation."""
        question = self.question
        return isinstance(question, AllocationEnded) and question.allocation_id == allocation_id


@dataclass(slots=True, eq=False)
class Connection:
    """A connection of a consumer, from its opening to its loss."""

    uid: int
    messages: deque[Message] = field(default_factory=deque)
    """Those whose answers have not left, in the order of their arrival."""
    is_closing: bool = False
    """Whether the provider has closed it; then nothing is read or answered any more."""
    concerns: set[str] = field(default_factory=set)
    """Names of the allocations that name it in any field. Derived, so in no snapshot."""

    @property
    def is_read(self) -> bool:
        """Whether messages are still read from it: none was unreadable."""
        return not self.is_closing and not (self.messages and self.messages[-1].question is None)

    def freeze(self, number: ConnectionId) -> ConnectionSnapshot:
        """Take its state as values."""
        messages = tuple(MessageSnapshot(m.question, m.state, m.error) for m in self.messages)
        return ConnectionSnapshot(number, self.uid, self.is_closing, messages)

    @classmethod
    def thaw(cls, frozen: ConnectionSnapshot) -> Connection:
        """Make a connection of what `freeze` took."""
        number, uid, is_closing, messages = frozen
        return cls(uid, deque(Message(number, *message) for message in messages), is_closing)


@dataclass(slots=True, eq=False)
class Allocation:
    """One incarnation of an allocation."""

    allocation_id: str
    request: NamespaceRequest | None = None
    response: NamespaceResponse | None = None
    uid: int | None = None
    """Whose limit it counts for: the user that asked first; None when adopted."""
    state: AllocationState = AllocationState.UNKNOWN
    asked: set[ConnectionId] = field(default_factory=set)
    """Live connections that asked for it."""
    parties: set[ConnectionId] = field(default_factory=set)
    """Live connections that have sent any message about it."""
    holders: set[ConnectionId] = field(default_factory=set)
    """Live connections that its descriptors were sent to, and that were not told of its end."""
    deferred: list[ConnectionId] = field(default_factory=list)
    """Connections whose requests wait for its release, one for each, in the order of arrival."""
    is_being_made: bool = False
    """Whether the backend has not reported yet what came of the creation."""
    is_populated: bool = False
    """Whether its cgroup has had processes."""
    is_announced: bool = False
    """Whether its end has been told; then it is draining, and later requests are refused."""
    timers: set[Timer] = field(default_factory=set)
    """Those that run."""
    failure: str = ""
    """Why the creation failed."""
    drain: str = ""
    """What is still there, and why, while it cannot be released."""

    @property
    def subject(self) -> str:
        """What the text of an error calls it."""
        return f"allocation {self.allocation_id}"

    def drop(self, connection: ConnectionId) -> None:
        """Forget a lost connection, but for whether it asked."""
        self.holders.discard(connection)
        self.parties.discard(connection)
        self.withdraw(connection)

    def withdraw(self, connection: ConnectionId) -> None:
        """Forget the deferred requests of a connection."""
        self.deferred = [number for number in self.deferred if number != connection]

    def freeze(self) -> AllocationSnapshot:
        """Take its state as values."""
        return AllocationSnapshot(
            self.allocation_id,
            self.request,
            self.response,
            self.uid,
            self.state,
            frozenset(self.asked),
            frozenset(self.parties),
            frozenset(self.holders),
            tuple(self.deferred),
            self.is_being_made,
            self.is_populated,
            self.is_announced,
            frozenset(self.timers),
            self.failure,
            self.drain,
        )

    @classmethod
    def thaw(cls, frozen: AllocationSnapshot) -> Allocation:
        """Make an allocation of what `freeze` took; the fields of both are in the same order."""
        parts: tuple[Any, ...] = frozen
        allocation = cls(*parts)
        allocation.asked, allocation.parties = set(frozen.asked), set(frozen.parties)
        allocation.holders, allocation.timers = set(frozen.holders), set(frozen.timers)
        allocation.deferred = list(frozen.deferred)
        return allocation
