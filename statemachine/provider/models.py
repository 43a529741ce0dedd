"""What a provider's kernel keeps: the service, connections, their messages, and allocations.

Each is plain state. Three of them are models of a table of `lifecycle`: `Service` of `SERVICE`,
`Message` of `MESSAGE`, `Allocation` of `ALLOCATION`. None is a dataclass, because `dataclasses`
takes a third of the time in which a kernel is imported.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Final, TypeAlias

from ..effects import Timer
from ..errors import NamespaceError
from ..events import ConnectionId
from ..messages import AllocationEnded, NamespaceRequest, NamespaceResponse
from ..snapshots import AllocationSnapshot, ConnectionSnapshot, MessageSnapshot
from ..states import AllocationState, MessageState, ServiceState

Question: TypeAlias = NamespaceRequest | AllocationEnded
"""What a provider is asked."""


class Service:
    """The provider as a whole."""

    __slots__ = ("held", "state", "timers")

    subject: Final = "the provider"
    """What the text of an error calls it."""
    allocation_id: Final = ""
    """Its timer belongs to no allocation."""

    def __init__(self) -> None:
        self.state = ServiceState.STARTING
        self.held: list[Message] = []
        """Messages that wait for it to be ready, in the order of their arrival."""
        self.timers: set[Timer] = set()
        """Those that run."""


class Message:
    """A message that a provider has read, until its answer has left."""

    __slots__ = ("connection", "error", "question", "state")

    def __init__(
        self,
        connection: ConnectionId,
        question: Question | None,
        state: MessageState = MessageState.ARRIVED,
        error: NamespaceError | None = None,
    ) -> None:
        self.connection = connection
        self.question = question
        """None: a frame that could not be read."""
        self.state = state
        self.error = error
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


class Connection:
    """A connection of a consumer, from its opening to its loss."""

    __slots__ = ("concerns", "is_closing", "messages", "uid")

    def __init__(
        self, uid: int, messages: Iterable[Message] = (), is_closing: bool = False
    ) -> None:
        self.uid = uid
        self.messages = deque(messages)
        """Those whose answers have not left, in the order of their arrival."""
        self.is_closing = is_closing
        """Whether the provider has closed it; then nothing is read or answered any more."""
        self.concerns: set[str] = set()
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
        return cls(uid, (Message(number, *message) for message in messages), is_closing)


class Allocation:
    """One incarnation of an allocation."""

    __slots__ = (
        "allocation_id",
        "asked",
        "deferred",
        "drain",
        "failure",
        "holders",
        "is_announced",
        "is_being_made",
        "is_populated",
        "parties",
        "request",
        "response",
        "state",
        "timers",
        "uid",
    )

    def __init__(
        self,
        allocation_id: str,
        request: NamespaceRequest | None = None,
        *,
        uid: int | None = None,
        state: AllocationState = AllocationState.UNKNOWN,
    ) -> None:
        self.allocation_id = allocation_id
        self.request = request
        self.response: NamespaceResponse | None = None
        self.uid = uid
        """Whose limit it counts for: the user that asked first; None when adopted."""
        self.state = state
        self.asked: set[ConnectionId] = set()
        """Live connections that asked for it."""
        self.parties: set[ConnectionId] = set()
        """Live connections that have sent any message about it."""
        self.holders: set[ConnectionId] = set()
        """Live connections that its descriptors were sent to, and that were not told of its end."""
        self.deferred: list[ConnectionId] = []
        """Connections whose requests wait for its release, one for each, in order of arrival."""
        self.is_being_made = False
        """Whether the backend has not reported yet what came of the creation."""
        self.is_populated = False
        """Whether its cgroup has had processes."""
        self.is_announced = False
        """Whether its end has been told; then it is draining, and later requests are refused."""
        self.timers: set[Timer] = set()
        """Those that run."""
        self.failure = ""
        """Why the creation failed."""
        self.drain = ""
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
        """Make an allocation of what `freeze` took."""
        allocation = cls(frozen.allocation_id)
        (
            _,
            allocation.request,
            allocation.response,
            allocation.uid,
            allocation.state,
            asked,
            parties,
            holders,
            deferred,
            allocation.is_being_made,
            allocation.is_populated,
            allocation.is_announced,
            timers,
            allocation.failure,
            allocation.drain,
        ) = frozen
        allocation.asked, allocation.parties = set(asked), set(parties)
        allocation.holders, allocation.timers = set(holders), set(timers)
        allocation.deferred = list(deferred)
        return allocation
