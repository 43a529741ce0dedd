"""What the explorer's worlds consist of: plain values for everything in which two may differ.

A *world* is a *server state* and its *clients*. The server state is what the provider's side sees:
the provider itself, the connections, and the node. A client is one consumer's program. Both know
the kernels only by number (`kernels`). What happens to a server state is the same for all worlds
that have it; whatever a client does changes itself, and its connection in the server state.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, Final, Generic, NamedTuple, TypeAlias, TypeVar

from ...effects import Timer
from ...messages import NamespaceRequest, NamespaceType
from ...provider import Limits

Move: TypeAlias = tuple[Any, ...]
"""What happens: a word, and to whom. `("crash in", n, *move)`: a move, cut off after n effects."""

# What the journal says of an allocation's life.
NOTHING, HALF_MADE, CREATED, HANDED_OFF, ENDED = range(5)
UNUSED, POPULATED, EMPTIED = range(3)
SAW_POPULATED, SAW_EMPTIED, SAW_INIT_DIE = range(3)
SOUND, CUT, MISMATCHED, NOT_FOUND, FAILED_TO_PASS = range(5)
"""What can become of a response on its way; the last two are lies of a broken provider."""
RELEASE_JOB: Final = 0
STRANGER: Final = -1
"""Who is at the other end of a connection that is no client's."""

BY_ITSELF: Final = frozenset(
    {
        "connect",
        "unreached",
        "hear",
        "read",
        "work",
        "observe",
        "serve self",
        "ready",
        "recover",
        "exit",
        "redial",
        "retry",
    }
)
"""The moves that happen by themselves once nothing fails and no caller wants more."""

SPENDS: Final = frozenset(
    {
        "refuse call",
        "fail self",
        "fail",
        "lose",
        "spoil",
        "duplicate",
        "init dies",
        "die",
        "stop",
        "release",
    }
)
"""The moves that use up `Bounds.faults`."""

_A: Final = NamespaceRequest("a", (NamespaceType.NET, NamespaceType.PID))


class Violation(AssertionError):
    """A promise is violated by the move that is being made."""


@dataclass(frozen=True)
class Bounds:
    """How large a world may become. A bound that is None is none, and nothing is counted."""

    consumers: int = 1
    requests: tuple[NamespaceRequest, ...] = (_A,)
    """What a caller may want; their ids are the allocations there are."""
    requests_each: int | None = 1
    """How many requests each consumer may make, one after the other."""
    strangers: int = 0
    """How many may be connected at a time who say and do whatever a peer can."""
    connections: int = 2
    """How many connections there may be at a time, dying ones included."""
    in_flight: int = 2
    """
    How many messages a connection carries toward the provider before none is duplicated; and how
    many a stranger leaves unanswered before it says no more.
    """
    crashes: int | None = 0
    """How often the provider may die."""
    faults: int | None = 0
    """How many of the moves in `SPENDS` may be made."""
    spoils: tuple[int, ...] = (CUT,)
    """What may become of a response on its way."""
    without: frozenset[str] = frozenset()
    """Moves that are never made."""
    has_losses_first: bool = True
    """Whether drivers keep the rule that stands on `events.ConnectionOpened`."""
    limits: Limits | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The allocations' ids."""
        return tuple(sorted({request.allocation_id for request in self.requests}))


class Client(NamedTuple):
    """One consumer's program; `kernel` is 0 while there is none, or its request is over."""

    kernel: int = 0
    is_calling: int = 0
    is_serving: int = 0
    has_own: int = 0
    timers: int = 0
    has_outcome: int = 0
    has_end: int = 0
    requests_made: int = 0


class Link(NamedTuple):
    """One connection: both ends, what is on its way, and what is open on it."""

    number: int
    client: int
    """Whose request it belongs to, counted from 1; 0 once that is over; or `STRANGER`."""
    is_accepted: int = 0
    has_provider: int = 1
    has_consumer: int = 1
    is_broken: int = 0
    is_read_closed: int = 0
    is_doubtful: int = 0
    """A message was doubled or falsified: then the number of sets is not checked."""
    to_provider: tuple[int, ...] = ()
    to_consumer: tuple[tuple[int, int], ...] = ()
    open: tuple[int, ...] = ()
    """Messages that the provider has read and not answered; 0 for an unreadable one."""
    handed: int = 0
    """Allocations whose current incarnation was handed over on it, as bits."""
    told: int = 0
    """Allocations of which it was told that their current incarnation has ended, as bits."""
    pushed: int = 0
    """The same, unasked."""
    surplus: int = 0


class Node(NamedTuple):
    """One allocation on the node: its line in the journal, its processes, the work on it."""

    life: int = NOTHING
    request: int = 0
    has_init: int = 0
    scope: int = UNUSED
    is_watched: int = 0
    sightings: tuple[int, ...] = ()
    jobs: tuple[int, ...] = ()
    timers: int = 0
    is_remembered: int = 0
    is_over: int = 0
    """The current incarnation has ended."""
    is_released: int = 0
    holders: int = 0
    """Clients to whose request the current incarnation was handed over, as bits."""


class ServerState(NamedTuple):
    """The provider's side of a world. `provider` is 0 while its program is dead."""

    provider: int
    links: tuple[Link, ...]
    nodes: tuple[Node, ...]
    is_waiting: int = 0
    """Whether the readiness timer runs."""
    crashes: int = 0
    faults: int = 0


class GlobalState(NamedTuple):
    """A world: everything there is."""

    server: ServerState
    clients: tuple[Client, ...]


T = TypeVar("T", bound=Hashable)


class Numbers(Generic[T]):
    """Gives equal things the same number, from 1 on, in the order in which they are met."""

    def __init__(self) -> None:
        self.things: list[Any] = [None]
        self._numbers: dict[T, int] = {}

    def of(self, thing: T) -> int:
        number = self._numbers.get(thing)
        if number is None:
            number = self._numbers[thing] = len(self.things)
            self.things.append(thing)
        return number


_TIMERS: Final = tuple(Timer)
_BITS: Final = {timer.value: 1 << i for i, timer in enumerate(_TIMERS)}


def bit_of(timer: Timer) -> int:
    """Say where a timer stands among the bits of those that run."""
    return _BITS[timer.value]


def timers_in(bits: int) -> list[Timer]:
    """List the timers that run."""
    return [timer for i, timer in enumerate(_TIMERS) if bits >> i & 1] if bits else []


def has_news_for_consumer(link: Link) -> bool:
    """Whether there is something to be heard at the consumer's end, its own end included."""
    return bool(link.to_consumer or not link.has_provider or link.is_broken)


def has_news_for_provider(link: Link) -> bool:
    """Whether there is something to be read at the provider's end, its own end included."""
    if not link.has_provider or link.is_read_closed:
        return False
    return bool(not link.is_accepted or link.to_provider or is_lost(link))


def is_lost(link: Link) -> bool:
    """Whether the provider's end is all that is left of a connection."""
    return bool(link.has_provider and (link.is_broken or not link.has_consumer))
