"""Every world there can be, within bounds: the real kernels, breadth first, to the last state.

A *world* is a provider, its consumers, the connections between them, and the node, as one tuple of
small integers. A *move* is one thing that the environment may let happen to it: a message arrives,
a timer expires, a job of the backend succeeds or fails, the provider dies between two effects. The
kernels are not modelled: a move restores the real one from its snapshot, feeds it the event, takes
the snapshot again, and performs the effects as the drivers do. Each distinct step of a kernel is
computed once, however many worlds share it, and can be held against another model (`lockstep`).

    explorer = Explorer(Bounds(consumers=2))
    result = explorer.explore()          # raises Broken with the shortest script
    result.states, result.rows, result.seen

*Safety* is checked in every move and in every state. *Liveness* is checked at the end, on the
graph of what happens by itself (`Move`s that are no fault, no wish and no deadline): from every
world one can come to rest, every world at rest has kept its promises, and there is no fair circle
in which somebody waits for ever.

Worlds that differ only in names are one world: connections are numbered anew in the order of their
age (the order in which the kernels look at them), consumers are interchangeable, and allocations
are, too, if their requests are; then also the order counts for nothing in which the provider
remembers their names, of which there are too few for any to be forgotten.
"""

from __future__ import annotations

import gc
import itertools
from array import array
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, Generic, NamedTuple, TypeAlias, TypeVar

from specs import invariants as always
from statemachine import consumer as consumer_module
from statemachine import effects as do
from statemachine import events as on
from statemachine import provider as provider_module
from statemachine.consumer import ConsumerKernel
from statemachine.consumer import event_of as consumer_event_of
from statemachine.effects import Effect, Timer
from statemachine.errors import (
    AllocationNotFound,
    CreationFailed,
    FdPassing,
    ProtocolError,
    RemoteProtocolError,
    SocketUnavailable,
)
from statemachine.events import Event
from statemachine.lifecycle import (
    CONSUMER,
    NOTICE,
    PROVIDER,
    AllocationState,
    ConsumerState,
    NoticeState,
)
from statemachine.messages import (
    AllocationEnded,
    Message,
    NamespaceRequest,
    NamespaceResponse,
    NamespaceType,
)
from statemachine.provider import Limits, Phase, ProviderKernel, Snapshot
from statemachine.provider import event_of as provider_event_of
from statemachine.table import Table

Move: TypeAlias = tuple[Any, ...]
"""What happens: a word, and to whom. `("crash in", n, *move)`: a move, cut off after n effects."""

Lockstep: TypeAlias = Callable[[Snapshot, Event, Snapshot, tuple[Effect, ...]], list[str]]
"""Judges one step of a provider's or a consumer's kernel: before, event, after, effects."""

# What the journal says of an allocation's life.
NOTHING, HALF_MADE, CREATED, HANDED_OFF, ENDED = range(5)
UNUSED, POPULATED, EMPTIED = range(3)
SAW_POPULATED, SAW_EMPTIED, SAW_INIT_DIE = range(3)
SOUND, CUT, MISMATCHED, NOT_FOUND, FAILED_TO_PASS = range(5)
"""What can become of a response on its way; the last two are lies of a broken provider."""
RELEASE_JOB: Final = 0

_LIVE: Final = frozenset(
    {AllocationState.REQUESTED, AllocationState.CREATED, AllocationState.HANDED_OFF}
)
_OBSERVED: Final = frozenset(
    {AllocationState.CREATED, AllocationState.HANDED_OFF, AllocationState.ENDED}
)
_DONE: Final = frozenset({ConsumerState.REFUSED, ConsumerState.FAILED, ConsumerState.ENDED})
_ENDABLE: Final = frozenset(
    {
        ConsumerState.CONNECTING,
        ConsumerState.ASKING,
        ConsumerState.HELD,
        ConsumerState.SELF_HELD,
    }
)
_TIMERS: Final = tuple(Timer)
_TIMER_EVENTS: Final[dict[Timer, Callable[[str], Event]]] = {
    Timer.READINESS: lambda name: on.ReadinessOverdue(),
    Timer.CLAIM: on.ClaimExpired,
    Timer.RELEASE: on.ReleaseOverdue,
    Timer.RETRY: on.RetryDue,
    Timer.ANSWER: lambda name: on.AnswerOverdue(),
    Timer.NOTICE: lambda name: on.NoticeOverdue(),
    Timer.REDIAL: lambda name: on.NoticeDue(),
}

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
"""The moves that happen by themselves once nothing fails and nobody wishes for anything."""

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
_B: Final = NamespaceRequest("b", (NamespaceType.NET, NamespaceType.PID))


@dataclass(frozen=True)
class Bounds:
    """How large a world may become. Every bound that is None is none."""

    consumers: int = 1
    requests: tuple[NamespaceRequest, ...] = (_A,)
    """What a caller may want; their ids are the allocations there are."""
    wishes: int = 1
    """How many requests each consumer may make, one after the other."""
    connections: int = 2
    """How many connections there may be at a time, dying ones included."""
    in_flight: int = 2
    """How many messages a connection carries toward the provider before none is duplicated."""
    crashes: int = 0
    """How often the provider may die."""
    faults: int | None = 0
    """How many of the moves in `SPENDS` may be made."""
    spoils: tuple[int, ...] = (CUT,)
    """What may become of a response on its way."""
    without: frozenset[str] = frozenset()
    """Moves that are never made."""
    limits: Limits | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The allocations' ids."""
        return tuple(sorted({request.allocation_id for request in self.requests}))


class Client(NamedTuple):
    """One consumer's program; `kernel` is 0 while there is none."""

    kernel: int = 0
    link: int = 0
    is_calling: int = 0
    is_serving: int = 0
    has_own: int = 0
    timers: int = 0
    has_outcome: int = 0
    has_end: int = 0
    is_handed: int = 0
    """Whether the current incarnation was handed over for this wish."""
    wishes: int = 0


class Link(NamedTuple):
    """One connection: both ends, what is on its way, and what is open on it."""

    number: int
    client: int
    """Whose wish it belongs to, counted from 1; 0 once that wish is over."""
    is_accepted: int = 0
    has_provider: int = 1
    has_consumer: int = 1
    is_broken: int = 0
    is_deaf: int = 0
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
    is_whole: int = 0
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


class World(NamedTuple):
    """Everything there is. `provider` is 0 while its program is dead."""

    provider: int
    clients: tuple[Client, ...]
    links: tuple[Link, ...]
    nodes: tuple[Node, ...]
    is_waiting: int = 0
    """Whether the readiness timer runs."""
    crashes: int = 0
    faults: int = 0


T = TypeVar("T", bound=Hashable)


class _Numbers(Generic[T]):
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


class Finding(AssertionError):
    """A promise is broken in the move that is being made."""


class _Crash(Exception):
    """The provider's program dies here."""


@dataclass(frozen=True)
class _ProviderView:
    phase: Phase
    states: tuple[AllocationState, ...]
    announced: tuple[bool, ...]
    numbers: tuple[int, ...]
    """Every connection that the snapshot mentions."""


@dataclass(frozen=True)
class _ConsumerView:
    request: NamespaceRequest
    name: int
    hold: ConsumerState
    notice: NoticeState
    is_connected: bool
    is_in_debt: bool


class _Recording:
    """A table that notes which of its rows are taken."""

    def __init__(self, table: Table, hits: set[tuple[str, str, str]]) -> None:
        self._table = table
        self._hits = hits

    def row(self, event: type[Event], state: Any) -> Any:
        return self._table.row(event, state)

    def fire(self, model: Any, event: type[Event], subject: str) -> Any:
        state = model.state
        orders = self._table.fire(model, event, subject)
        self._hits.add((self._table.name, event.__name__, str(state.value)))
        return orders


class Broken(AssertionError):
    """A promise can be broken; `script` is a shortest way to do it."""

    def __init__(self, bounds: Bounds, script: tuple[Move, ...], finding: str, chart: str) -> None:
        super().__init__(f"{finding}\n\n{as_python(bounds, script, finding)}\n{chart}")
        self.bounds = bounds
        self.script = script
        self.finding = finding
        self.chart = chart
        """A Mermaid sequence diagram of the script."""


@dataclass
class Result:
    """What was found in a space that is finished."""

    states: int = 0
    moves: int = 0
    at_rest: int = 0
    kernel_steps: int = 0
    rows: set[tuple[str, str, str]] = field(default_factory=set)
    """Every row that was taken: table, event, state."""
    seen: dict[str, int] = field(default_factory=dict)
    """Every situation that came about, and the number of the world in which it first did."""
    is_complete: bool = True
    """False: `states_max` was reached first, and liveness was not checked."""


def as_python(bounds: Bounds, script: tuple[Move, ...], finding: str) -> str:
    """Write a script as a program."""
    moves = "".join(f"        {move!r},\n" for move in script)
    return (
        f"def test_counterexample() -> None:  # {finding.splitlines()[0]}\n"
        f"    Explorer({_code(bounds)}).replay([\n{moves}    ])\n"
    )


def _code(bounds: Bounds) -> str:
    given = [
        f"{name}={getattr(bounds, name)!r}"
        for name, spec in Bounds.__dataclass_fields__.items()
        if getattr(bounds, name) != spec.default
    ]
    return f"Bounds({', '.join(given)})"


def only(*moves: str) -> frozenset[str]:
    """Say for `Bounds.without`: nothing but these, and what happens by itself."""
    return MOVES - BY_ITSELF - set(moves)


def all_rows(*tables: Table) -> set[tuple[str, str, str]]:
    """List the rows of tables in the way in which `Result.rows` names them."""
    return {
        (table.name, row.event.__name__, str(row.source.value))
        for table in tables
        for row in table.rows
    }


class Explorer:
    """
    Visits every world within bounds, the nearest first.

    Args:
        bounds: how large a world may become.
        provider: the provider's kernel, or a mutant of it.
        consumer: the consumer's kernel, or a mutant of it.
        tables: the tables that the kernels use, to be replaced by mutants.
        lockstep: judges every distinct step of a kernel as well.
        is_exact: keep whole worlds and not only their hashes.
        has_symmetry: take worlds that differ only in names for one.
    """

    def __init__(
        self,
        bounds: Bounds,
        *,
        provider: type[ProviderKernel] = ProviderKernel,
        consumer: type[ConsumerKernel] = ConsumerKernel,
        tables: tuple[Table, Table, Table] = (PROVIDER, CONSUMER, NOTICE),
        lockstep: Lockstep | None = None,
        is_exact: bool = False,
        has_symmetry: bool = True,
    ) -> None:
        self.bounds = bounds
        self.names = bounds.names
        self.lockstep = lockstep
        self._index = {name: i for i, name in enumerate(self.names)}
        self._provider = provider
        self._consumer = consumer
        self._tables = tables
        self._is_exact = is_exact
        self._messages: _Numbers[Message] = _Numbers()
        self._providers: _Numbers[Snapshot] = _Numbers()
        self._consumers: _Numbers[Snapshot] = _Numbers()
        self._provider_views: list[Any] = [None]
        self._consumer_views: list[Any] = [None]
        self._provider_steps: dict[tuple[int, Event], tuple[int, tuple[Effect, ...]]] = {}
        self._consumer_steps: dict[tuple[int, Event], Any] = {}
        self._renamed: dict[Any, int] = {}
        self._has_symmetry = has_symmetry
        self._swaps = self._find_swaps() if has_symmetry else []
        self.result = Result()
        self._chart: list[str] | None = None
        self._now = 0

    # --- Exploring -----------------------------------------------------------------------------

    def explore(
        self,
        *,
        states_max: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Result:
        """
        Visit every world.

        Args:
            states_max: stop when there are so many.
            progress: told every 10,000 worlds how many are found and how many wait.

        Raises:
            Broken: with a shortest script.
        """
        with self._recording():
            return _Search(self, states_max, progress).run()

    def replay(self, script: list[Move]) -> World:
        """
        Make moves one after the other, from the beginning.

        Raises:
            Finding, InvariantBroken: a promise is broken, by a move or by coming to rest.
        """
        with self._recording():
            world = self.initial()
            for move in script:
                world, _ = self.make(world, move)
            if not any(move[0] in BY_ITSELF for move in self.moves(world)):
                _check_at_rest(self, world)
        return world

    def chart(self, script: tuple[Move, ...]) -> str:
        """Draw a script as a Mermaid sequence diagram."""
        self._chart = ["sequenceDiagram"]
        for index in range(self.bounds.consumers):
            self._chart.append(f"    participant C{index} as consumer {index}")
        self._chart += ["    participant P as provider", "    participant N as node"]
        try:
            world = self.initial()
            for move in script:
                self._draw(_note_of(move))
                world, _ = self.make(world, move)
        except (Finding, AssertionError) as error:
            self._draw(f"Note over P: BROKEN {str(error).splitlines()[0]}".replace(";", ","))
        chart, self._chart = self._chart, None
        return "\n".join(["```mermaid", *chart, "```"])

    def _draw(self, line: str) -> None:
        if self._chart is not None:
            self._chart.append("    " + line)

    @contextmanager
    def _recording(self) -> Iterator[None]:
        hits = self.result.rows
        homes = (provider_module, consumer_module, consumer_module)
        places = list(zip(homes, ("PROVIDER", "CONSUMER", "NOTICE"), strict=True))
        before = [vars(module)[name] for module, name in places]
        # A collector of circles finds none here, and looks at millions of tuples for them.
        is_collecting = gc.isenabled()
        gc.disable()
        try:
            for (module, name), table in zip(places, self._tables, strict=True):
                vars(module)[name] = _Recording(table, hits)
            yield
        finally:
            for (module, name), table in zip(places, before, strict=True):
                vars(module)[name] = table
            if is_collecting:
                gc.enable()

    def initial(self) -> World:
        """Make the world in which nothing has happened yet."""
        provider = self._number_provider(self._provider(self.bounds.limits))
        clients = (Client(),) * self.bounds.consumers
        return World(provider, clients, (), (Node(),) * len(self.names))

    # --- The moves -----------------------------------------------------------------------------

    def moves(self, world: World) -> list[Move]:
        """List what may happen now."""
        found: list[Move] = []
        for index in range(len(world.clients)):
            self._moves_of_client(world, index, found)
        for link in world.links:
            self._moves_of_link(world, link, found)
        for index in range(len(world.nodes)):
            self._moves_of_node(world, index, found)
        self._moves_of_provider(world, found)
        without = self.bounds.without
        faults = self.bounds.faults
        is_safe = faults is not None and world.faults >= faults
        return [m for m in found if m[0] not in without and not (is_safe and m[0] in SPENDS)]

    def _moves_of_client(self, world: World, index: int, found: list[Move]) -> None:
        client = world.clients[index]
        view: _ConsumerView | None = self._consumer_views[client.kernel]
        is_free = view is None or (view.hold in _DONE and not view.is_in_debt)
        if is_free and client.wishes < self.bounds.wishes:
            for number in range(len(self.bounds.requests)):
                found.append(("want", index, number))
                found.append(("end by name", index, number))
        if view is None:
            return
        if client.is_calling:
            if not world.provider:
                found.append(("unreached", index))
            else:
                found.append(("refuse call", index))
                if len(world.links) < self.bounds.connections:
                    found.append(("connect", index))
        if client.link and _has_news_for_consumer(_link(world, client.link)):
            found.append(("hear", index))
        if client.is_serving:
            found.append(("serve self", index))
            found.append(("fail self", index))
        if view.hold in _ENDABLE:
            found.append(("end", index))
        for timer in _timers_of(client.timers):
            word = "redial" if timer is Timer.REDIAL else "overdue"
            found.append((word, index, timer.value))
        found.append(("die", index))

    def _moves_of_link(self, world: World, link: Link, found: list[Move]) -> None:
        if world.provider and _has_news_for_provider(link):
            found.append(("read", link.number))
        if link.is_broken:
            return
        if link.has_provider and link.has_consumer:
            found.append(("lose", link.number))
            if len(link.to_provider) < self.bounds.in_flight and any(
                isinstance(self._messages.things[m], NamespaceRequest)
                for m in link.to_provider[-1:]
            ):
                found.append(("duplicate", link.number))
        for message, fate in link.to_consumer:
            if isinstance(self._messages.things[message], NamespaceResponse):
                if not fate:
                    found.extend(("spoil", link.number, spoil) for spoil in self.bounds.spoils)
                break

    def _moves_of_node(self, world: World, index: int, found: list[Move]) -> None:
        node = world.nodes[index]
        if node.life in (CREATED, HANDED_OFF):
            if node.scope != POPULATED and not node.scope:
                found.append(("populate", index))
            elif node.scope == POPULATED:
                found.append(("empty", index))
        if node.has_init:
            found.append(("init dies", index))
        if not world.provider:
            return
        if node.jobs:
            found.append(("work", index))
            found.append(("fail", index))
        if node.sightings:
            found.append(("observe", index))
        for timer in _timers_of(node.timers):
            word = "retry" if timer is Timer.RETRY else "expire"
            found.append((word, index, timer.value))
        view = self._provider_views[world.provider]
        if view.states[index] in (*_LIVE, AllocationState.ENDED):
            found.append(("release", index))

    def _moves_of_provider(self, world: World, found: list[Move]) -> None:
        if not world.provider:
            found.append(("recover",))
            return
        phase = self._provider_views[world.provider].phase
        if phase is Phase.STARTING:
            found.append(("ready",))
        if phase is Phase.STOPPING:
            found.append(("exit",))
        else:
            found.append(("stop",))
        if world.is_waiting:
            found.append(("unready",))
        if world.crashes < self.bounds.crashes:
            found.append(("crash", 0))
            if any(node.jobs and node.jobs[0] != RELEASE_JOB for node in world.nodes):
                found.append(("crash", 1))

    def make(self, world: World, move: Move) -> tuple[World, int]:
        """
        Make a move.

        Returns:
            The world after it, and how many effects the provider's driver performed.

        Raises:
            Finding, InvariantBroken: a promise is broken.
        """
        draft = _Draft(self, world)
        kind = move[0]
        try:
            if kind == "crash in":
                draft.crash_after = move[1]
                kind, move = move[2], move[2:]
            draft.faults += kind in SPENDS and self.bounds.faults is not None
            _MAKERS[kind](draft, *move[1:])
            if draft.crash_after is not None:
                draft.crash(0)
        except _Crash:
            self.see("crash between two effects")
            draft.crash(0)
        draft.check()
        return self._canonical(draft.freeze()), draft.performed

    def see(self, situation: str) -> None:
        """Note that a situation has come about."""
        self.result.seen.setdefault(situation, self._now)

    # --- The kernels ---------------------------------------------------------------------------

    def _number_provider(self, kernel: ProviderKernel) -> int:
        snapshot = kernel.snapshot()
        number = self._providers.of(snapshot)
        if number == len(self._provider_views):
            again = self._provider.restore(snapshot, self.bounds.limits)
            if again.snapshot() != snapshot:
                raise Finding("a snapshot of the provider's kernel does not restore it")
            states = tuple(kernel.state_of(name) for name in self.names)
            announced = {frozen[0]: frozen[10] for frozen in snapshot[2]}
            numbers = {c for c, _ in snapshot[1]}
            for frozen in snapshot[2]:
                numbers.update(*frozen[5:8], frozen[8])
            self._provider_views.append(
                _ProviderView(
                    kernel.phase,
                    states,
                    tuple(announced.get(name, False) for name in self.names),
                    tuple(sorted(numbers)),
                )
            )
        return number

    def _number_consumer(self, kernel: ConsumerKernel) -> int:
        snapshot = kernel.snapshot()
        number = self._consumers.of(snapshot)
        if number == len(self._consumer_views):
            if self._consumer.restore(snapshot).snapshot() != snapshot:
                raise Finding("a snapshot of the consumer's kernel does not restore it")
            self._consumer_views.append(
                _ConsumerView(
                    kernel.request,
                    self._index[kernel.request.allocation_id],
                    kernel.state,
                    kernel.notice,
                    kernel.is_connected,
                    kernel.is_in_debt,
                )
            )
        return number

    def step_provider(self, number: int, event: Event) -> tuple[int, tuple[Effect, ...]]:
        """Feed the provider's kernel, once for each distinct question."""
        key = (number, event)
        known = self._provider_steps.get(key)
        if known is not None:
            return known
        before = self._providers.things[number]
        kernel = self._provider.restore(before, self.bounds.limits)
        try:
            effects = kernel.receive(event)
        except ProtocolError as error:
            always.require(always.an_error_changes_nothing(before, kernel.snapshot()))
            raise Finding(f"the provider's kernel refuses its driver: {error}") from error
        after = self._number_provider(kernel)
        self._judge(before, event, self._providers.things[after], effects)
        self._provider_steps[key] = after, effects
        self.result.kernel_steps += 1
        return after, effects

    def step_consumer(self, number: int, event: Event) -> tuple[int, tuple[Effect, ...]] | None:
        """Feed a consumer's kernel; None: the provider may not say that now."""
        key = (number, event)
        if key in self._consumer_steps:
            known: tuple[int, tuple[Effect, ...]] | None = self._consumer_steps[key]
            return known
        before = self._consumers.things[number]
        kernel = self._consumer.restore(before)
        found: tuple[int, tuple[Effect, ...]] | None
        try:
            effects = kernel.receive(event)
        except RemoteProtocolError:
            always.require(always.an_error_changes_nothing(before, kernel.snapshot()))
            found = None
        except ProtocolError as error:
            raise Finding(f"the consumer's kernel refuses its driver: {error}") from error
        else:
            found = self._number_consumer(kernel), effects
            self._judge(before, event, self._consumers.things[found[0]], effects)
        self._consumer_steps[key] = found
        self.result.kernel_steps += 1
        return found

    def _judge(
        self, before: Snapshot, event: Event, after: Snapshot, effects: tuple[Effect, ...]
    ) -> None:
        if self.lockstep is not None:
            always.require(self.lockstep(before, event, after, effects))

    # --- Worlds that are one -------------------------------------------------------------------

    def _find_swaps(self) -> list[tuple[int, ...]]:
        """Find the ways to exchange allocations that leave the set of requests as it is."""
        requests = set(self.bounds.requests)
        swaps = []
        for order in itertools.permutations(range(len(self.names))):
            new = {old: self.names[order[i]] for i, old in enumerate(self.names)}
            renamed = {
                NamespaceRequest(new[r.allocation_id], r.namespaces, r.uenv_image) for r in requests
            }
            if renamed == requests and order != tuple(range(len(self.names))):
                swaps.append(order)
        return swaps

    def _canonical(self, world: World) -> World:
        world = self._number_connections(world)
        best = self._order_clients(world)
        for swap in self._swaps:
            other = self._order_clients(self._swap(world, swap))
            best = min(best, other)
        return best

    def _number_connections(self, world: World) -> World:
        numbers = {link.number for link in world.links}
        if world.provider:
            numbers.update(self._provider_views[world.provider].numbers)
        old = sorted(numbers)
        if not old or old[-1] == len(old):
            return world
        new = {number: i for i, number in enumerate(old, 1)}
        provider = world.provider
        if provider:
            provider = self._rename_provider(provider, tuple(old), ())
        clients = tuple(
            c._replace(link=new[c.link]) if c.link and new[c.link] != c.link else c
            for c in world.clients
        )
        links = tuple(link._replace(number=new[link.number]) for link in world.links)
        return world._replace(provider=provider, clients=clients, links=links)

    def _order_clients(self, world: World) -> World:
        clients = world.clients
        if len(clients) == 1 or not self._has_symmetry:
            return world
        links: dict[int, tuple[int, ...]] = {}
        for link in world.links:
            links[link.client] = (*links.get(link.client, ()), link.number)
        keys = [(client, links.get(i, ())) for i, client in enumerate(clients, 1)]
        order = sorted(range(len(clients)), key=keys.__getitem__)
        if order == list(range(len(clients))):
            return world
        new = {0: 0, **{old + 1: i for i, old in enumerate(order, 1)}}
        return world._replace(
            clients=tuple(clients[old] for old in order),
            links=tuple(link._replace(client=new[link.client]) for link in world.links),
        )

    def _swap(self, world: World, swap: tuple[int, ...]) -> World:
        nodes = list(world.nodes)
        for old, node in enumerate(world.nodes):
            nodes[swap[old]] = node._replace(
                request=self._rename_message(node.request, swap),
                jobs=tuple(self._rename_message(job, swap) for job in node.jobs),
            )
        provider = world.provider and self._rename_provider(world.provider, (), swap)
        clients = tuple(
            c._replace(kernel=self._rename_consumer(c.kernel, swap)) if c.kernel else c
            for c in world.clients
        )
        links = tuple(self._swap_link(link, swap) for link in world.links)
        return world._replace(provider=provider, clients=clients, links=links, nodes=tuple(nodes))

    def _swap_link(self, link: Link, swap: tuple[int, ...]) -> Link:
        return link._replace(
            to_provider=tuple(self._rename_message(m, swap) for m in link.to_provider),
            to_consumer=tuple((self._rename_message(m, swap), s) for m, s in link.to_consumer),
            open=tuple(self._rename_message(m, swap) for m in link.open),
            handed=_rename_bits(link.handed, swap),
            told=_rename_bits(link.told, swap),
            pushed=_rename_bits(link.pushed, swap),
        )

    def _rename_message(self, number: int, swap: tuple[int, ...]) -> int:
        key = ("message", number, swap)
        if number and key not in self._renamed:
            renamed = _Renaming({}, self._new_names(swap)).of(self._messages.things[number])
            self._renamed[key] = self._messages.of(renamed)
        return self._renamed[key] if number else 0

    def _rename_consumer(self, number: int, swap: tuple[int, ...]) -> int:
        key = ("consumer", number, swap)
        if key not in self._renamed:
            snapshot = _Renaming({}, self._new_names(swap)).of(self._consumers.things[number])
            self._renamed[key] = self._number_consumer(self._consumer.restore(snapshot))
        return self._renamed[key]

    def _rename_provider(self, number: int, old: tuple[int, ...], swap: tuple[int, ...]) -> int:
        key = ("provider", number, old, swap)
        if key not in self._renamed:
            new = {number: i for i, number in enumerate(old, 1)}
            snapshot = _Renaming(new, self._new_names(swap)).of_provider(
                self._providers.things[number]
            )
            kernel = self._provider.restore(snapshot, self.bounds.limits)
            self._renamed[key] = self._number_provider(kernel)
        return self._renamed[key]

    def _new_names(self, swap: tuple[int, ...]) -> dict[str, str]:
        return {name: self.names[swap[i]] for i, name in enumerate(self.names)} if swap else {}


class _Renaming:
    """Other numbers for connections and other names for allocations, throughout a snapshot."""

    def __init__(self, numbers: dict[int, int], names: dict[str, str]) -> None:
        self._numbers = numbers
        self._names = names

    def of(self, thing: Any) -> Any:
        """Rename what a message, an error or a tuple says."""
        name = self._name
        match thing:
            case tuple():
                return tuple(self.of(part) for part in thing)
            case NamespaceRequest():
                return NamespaceRequest(
                    name(thing.allocation_id), thing.namespaces, thing.uenv_image
                )
            case NamespaceResponse():
                mount = thing.uenv_mount_path
                return NamespaceResponse(name(thing.allocation_id), thing.fd_types, mount)
            case AllocationEnded():
                return AllocationEnded(name(thing.allocation_id))
            case AllocationNotFound():
                return AllocationNotFound(name(thing.allocation_id))
            case CreationFailed():
                return CreationFailed(self._text(thing.reason))
            case _:
                return thing

    def of_provider(self, snapshot: Snapshot) -> Snapshot:
        """Rename what a provider's snapshot says; the names it remembers are put in order."""
        phase, connections, allocations, waiting, remembered, has_been_ready = snapshot
        number = self._number
        return (
            phase,
            tuple(
                (number(c), (uid, is_closing, self.of(slots)))
                for c, (uid, is_closing, slots) in connections
            ),
            tuple(sorted((self._allocation(frozen) for frozen in allocations), key=_first)),
            tuple((number(c), index) for c, index in waiting),
            tuple(sorted(self._name(name) for name in remembered)),
            has_been_ready,
        )

    def _allocation(self, frozen: Snapshot) -> Snapshot:
        name, request, response, uid, state, *sets, early = frozen[:9]
        return (
            self._name(name),
            self.of(request),
            self.of(response),
            uid,
            state,
            *(frozenset(map(self._number, numbers)) for numbers in sets),
            tuple(map(self._number, early)),
            *frozen[9:12],
            self._text(frozen[12]),
            frozen[13],
        )

    def _number(self, number: int) -> int:
        return self._numbers.get(number, number)

    def _name(self, name: str) -> str:
        return self._names.get(name, name)

    def _text(self, text: str) -> str:
        words = text.split(" ")
        for i, word in enumerate(words[:-1]):
            if word == "allocation":
                words[i + 1] = self._name(words[i + 1])
        return " ".join(words)


class _Draft:
    """A world while a move is made: what the drivers, the backend and the node do."""

    def __init__(self, explorer: Explorer, world: World) -> None:
        self.explorer = explorer
        self.provider = world.provider
        self.clients = list(world.clients)
        self.links = {link.number: link for link in world.links}
        self.nodes = list(world.nodes)
        self.is_waiting = world.is_waiting
        self.crashes = world.crashes
        self.faults = world.faults
        self.performed = 0
        self.crash_after: int | None = None
        self.events: deque[Event] = deque()
        self.has_parcel = False

    def freeze(self) -> World:
        links = [x for _, x in sorted(self.links.items()) if x.has_provider or x.has_consumer]
        return World(
            self.provider,
            tuple(self.clients),
            tuple(links),
            tuple(self.nodes),
            self.is_waiting,
            self.crashes,
            self.faults,
        )

    def set_link(self, number: int, **changes: Any) -> None:
        self.links[number] = self.links[number]._replace(**changes)

    def set_node(self, index: int, **changes: Any) -> None:
        self.nodes[index] = self.nodes[index]._replace(**changes)

    def set_client(self, index: int, **changes: Any) -> None:
        self.clients[index] = self.clients[index]._replace(**changes)

    @property
    def view(self) -> _ProviderView:
        view: _ProviderView = self.explorer._provider_views[self.provider]
        return view

    def view_of(self, index: int) -> _ConsumerView:
        view: _ConsumerView = self.explorer._consumer_views[self.clients[index].kernel]
        return view

    # --- The provider's program ----------------------------------------------------------------

    def feed(self, event: Event) -> None:
        self.events.append(event)
        while self.events:
            before = self.view.states
            self.provider, effects = self.explorer.step_provider(
                self.provider, self.events.popleft()
            )
            self._note_ends(before, self.view.states)
            for effect in effects:
                if self.crash_after == self.performed:
                    raise _Crash
                self.performed += 1
                _PERFORMERS[type(effect)](self, effect)

    def _note_ends(
        self, before: tuple[AllocationState, ...], after: tuple[AllocationState, ...]
    ) -> None:
        if before is after:
            return
        for index, state in enumerate(after):
            if state is AllocationState.ENDED and before[index] is not state:
                if before[index] in _LIVE:
                    ends = [index] * (1 + self.nodes[index].is_over)
                    always.require(always.ended_at_most_once(ends))
                self.set_node(index, is_over=1)

    def start_timer(self, effect: do.StartTimer) -> None:
        if effect.timer is Timer.READINESS:
            self.is_waiting = 1
        else:
            index = self._index(effect.allocation_id)
            self.set_node(index, timers=self.nodes[index].timers | _bit(effect.timer))

    def stop_timer(self, effect: do.StopTimer) -> None:
        if effect.timer is Timer.READINESS:
            is_running, self.is_waiting = self.is_waiting, 0
        else:
            index = self._index(effect.allocation_id)
            timers = self.nodes[index].timers
            is_running = timers & _bit(effect.timer)
            self.set_node(index, timers=timers & ~_bit(effect.timer))
        if not is_running:
            raise Finding(f"{effect} stops what does not run")

    def create(self, effect: do.CreateNamespaces) -> None:
        index = self._index(effect.request.allocation_id)
        bit = 1 << index
        # The incarnation before it is over for good; who had it must know by now.
        for number, link in self.links.items():
            is_open = link.has_provider and link.has_consumer and not link.is_broken
            if link.handed & bit and is_open:
                told = [(number, index)] if link.told & bit else []
                always.require(
                    always.every_holder_has_heard([(number, index)], told, [index], [number])
                )
            if (link.handed | link.told | link.pushed) & bit:
                self.set_link(
                    number,
                    handed=link.handed & ~bit,
                    told=link.told & ~bit,
                    pushed=link.pushed & ~bit,
                )
        for number, client in enumerate(self.clients):
            if client.is_handed and self.view_of(number).name == index:
                self.set_client(number, is_handed=0)
        job = self.explorer._messages.of(effect.request)
        self.set_node(index, jobs=(*self.nodes[index].jobs, job), is_over=0, is_released=0)

    def release(self, effect: do.ReleaseNamespaces) -> None:
        index = self._index(effect.allocation_id)
        node = self.nodes[index]
        life = ENDED if node.life else NOTHING
        # One step may begin a life and end it, or end it and begin the next.
        if self.view.states[index] in _LIVE and not node.is_over:
            raise Finding(f"{effect.allocation_id} is to be released before its end")
        jobs = (*node.jobs, RELEASE_JOB)
        self.set_node(index, life=life, is_watched=0, jobs=jobs, is_over=1)

    def watch(self, effect: do.Watch) -> None:
        index = self._index(effect.allocation_id)
        if self.nodes[index].life not in (CREATED, HANDED_OFF, ENDED):
            raise Finding(f"{effect.allocation_id} is to be watched and does not exist")
        self.set_node(index, is_watched=1)
        if not self.nodes[index].has_init:
            self.sight(index, SAW_INIT_DIE)
        self.see_scope(index)

    def see_scope(self, index: int) -> None:
        scope = self.nodes[index].scope
        if scope:
            self.sight(index, SAW_POPULATED if scope == POPULATED else SAW_EMPTIED)

    def sight(self, index: int, sighting: int) -> None:
        node = self.nodes[index]
        if node.is_watched and sighting not in node.sightings:
            self.set_node(index, sightings=(*node.sightings, sighting))

    def record(self, effect: do.RecordHandoff) -> None:
        index = self._index(effect.allocation_id)
        if self.nodes[index].life == CREATED:
            self.set_node(index, life=HANDED_OFF)

    def hand_over(self, effect: do.HandOver) -> None:
        response, number = effect.response, effect.connection
        index = self._index(response.allocation_id)
        node, link = self.nodes[index], self.links[number]
        if node.life not in (CREATED, HANDED_OFF):
            raise Finding(f"{response.allocation_id} is handed over and is not alive on the node")
        if not node.has_init:
            failure = FdPassing("the descriptors cannot be had")
            self.send(number, failure)
            self.events.append(on.ResponseNotSent(response.allocation_id, number, failure))
            self.explorer.see("descriptors cannot be had")
            return
        is_taken = link.has_consumer and not link.is_broken
        self.send(number, response)
        if not is_taken:
            return
        self.set_link(number, handed=self.links[number].handed | 1 << index)
        if link.client:
            self.set_client(link.client - 1, is_handed=1)
        self.events.append(on.ResponseSent(response.allocation_id, number))

    def refuse(self, effect: do.Refuse) -> None:
        self.send(effect.connection, effect.error)

    def announce(self, effect: do.AnnounceEnd) -> None:
        number, index = effect.connection, self._index(effect.allocation_id)
        node, link, bit = self.nodes[index], self.links[number], 1 << index
        if self.view.states[index] in _LIVE and not node.is_over:
            raise Finding(f"the end of {effect.allocation_id} is told while it is alive")
        if node.life not in (NOTHING, ENDED):
            raise Finding(f"the end of {effect.allocation_id} is told before it is durable")
        ended = AllocationEnded(effect.allocation_id)
        is_answer = bool(link.open) and self.message(link.open[0]) == ended
        if not is_answer:
            item = (number, effect.allocation_id)
            pushes = [item] * (1 + bool(link.pushed & bit))
            handed = [item] if link.handed & bit else []
            self.explorer.see("an end is pushed")
            always.require(
                always.end_is_pushed_at_most_once(pushes),
                always.end_is_told_only_to_whom_it_concerns(pushes, handed),
            )
            if any(self.message(m) == ended for m in link.to_provider):
                self.explorer.see("ends cross")
        self.send(number, ended)
        link = self.links[number]
        pushed = link.pushed if is_answer else link.pushed | bit
        self.set_link(number, told=link.told | bit, pushed=pushed)

    def message(self, number: int) -> Message | None:
        message: Message | None = self.explorer._messages.things[number]
        return message

    def send(self, number: int, message: Message) -> None:
        link = self.links[number]
        if not link.has_provider:
            always.require(always.nothing_follows_a_close(["closed", "sent"]))
        reply = self.explorer._messages.of(message)
        oldest = self.message(link.open[0]) if link.open else None
        if isinstance(message, AllocationEnded) and message != oldest:
            pass
        elif link.open:
            talk: list[always.Spoken] = [("read", oldest), ("sent", message)]
            always.require(always.answers_come_in_order(talk, is_closed=False))
            self.set_link(number, open=link.open[1:])
        elif isinstance(message, Exception):
            self.set_link(number, surplus=1)
        else:
            always.require(always.answers_come_in_order([("sent", message)], is_closed=False))
        if link.has_consumer and not link.is_broken:
            self.set_link(number, to_consumer=(*link.to_consumer, (reply, SOUND)))

    def close(self, effect: do.CloseConnection) -> None:
        number = effect.connection
        self.set_link(number, has_provider=0, to_provider=(), open=(), surplus=0)
        self.events.append(on.ConnectionLost(number, "closed"))

    def crash(self, half: int, *, is_counted: bool = True) -> None:
        self.provider = self.is_waiting = 0
        self.crashes += is_counted
        self.events.clear()
        for index, node in enumerate(self.nodes):
            life, request = node.life, node.request
            if half and not life and node.jobs and node.jobs[0] != RELEASE_JOB:
                life, request = HALF_MADE, node.jobs[0]
            # A decision that was neither noted nor told dies with the program.
            is_over = node.is_over and life not in (CREATED, HANDED_OFF)
            self.set_node(
                index,
                life=life,
                request=request,
                is_over=int(is_over),
                jobs=(),
                timers=0,
                sightings=(),
                is_watched=0,
            )
        for number in self.links:
            self.set_link(number, has_provider=0, to_provider=(), open=(), surplus=0)

    def recover(self) -> None:
        explorer = self.explorer
        kernel = explorer._provider(explorer.bounds.limits)
        kernel.remember(
            name
            for name, node in zip(explorer.names, self.nodes, strict=True)
            if node.is_remembered
        )
        self.provider = explorer._number_provider(kernel)
        for index, name in enumerate(explorer.names):
            node = self.nodes[index]
            request = self.message(node.request)
            if not node.life or not isinstance(request, NamespaceRequest):
                continue
            response = NamespaceResponse(name, request.namespaces)
            if node.life in (HALF_MADE, ENDED) or not node.has_init:
                explorer.see("remains are found")
                self.feed(on.RemainsFound(name, request))
            elif node.life == CREATED:
                explorer.see("what was created is adopted")
                self.feed(on.CreatedAdopted(name, request, response))
            else:
                explorer.see("what was handed off is adopted")
                self.feed(on.HandedOffAdopted(name, request, response))

    def _index(self, name: str) -> int:
        return self.explorer._index[name]

    # --- The node ------------------------------------------------------------------------------

    def work(self, index: int, *, is_able: bool) -> None:
        node = self.nodes[index]
        job, name = node.jobs[0], self.explorer.names[index]
        self.set_node(index, jobs=node.jobs[1:])
        self.explorer._draw(f"N-->>P: {'done' if is_able else 'FAILED'}")
        if job != RELEASE_JOB:
            self._create(index, job, is_able)
        elif is_able:
            if node.life:
                always.require(
                    always.released_at_most_once([index] * (1 + node.is_released)),
                    always.released_only_after_its_end(
                        [index], [index] if self.view.states[index] in _LIVE else []
                    ),
                )
            self.set_node(
                index,
                life=NOTHING,
                request=0,
                is_whole=0,
                has_init=0,
                scope=UNUSED,
                sightings=(),
                is_watched=0,
                is_remembered=1,
                is_released=1,
            )
            self.feed(on.NamespacesReleased(name))
        else:
            self.set_node(index, has_init=0)
            self.feed(on.ReleaseDelayed(name, "1 process does not die"))

    def _create(self, index: int, job: int, is_able: bool) -> None:
        name = self.explorer.names[index]
        request = self.message(job)
        assert isinstance(request, NamespaceRequest)
        if not is_able:
            self.feed(on.NamespacesNotCreated(name, CreationFailed("unshare: ENOSPC")))
            return
        is_over = self.view.states[index] is AllocationState.ENDED
        if is_over:
            self.explorer.see("a creation is overtaken by the end")
        life = ENDED if is_over else CREATED
        self.set_node(index, life=life, request=job, is_whole=1, has_init=1)
        self.feed(on.NamespacesCreated(name, NamespaceResponse(name, request.namespaces)))

    def observe(self, index: int) -> None:
        node, name = self.nodes[index], self.explorer.names[index]
        sighting = node.sightings[0]
        self.set_node(index, sightings=node.sightings[1:])
        if self.view.states[index] not in _OBSERVED:
            return
        if sighting == SAW_POPULATED:
            self.feed(on.ScopePopulated(name))
        elif sighting == SAW_INIT_DIE:
            self.feed(on.InitDied(name))
        elif node.scope == EMPTIED:
            self.feed(on.ScopeEmptied(name))

    def set_scope(self, index: int, scope: int) -> None:
        self.set_node(index, scope=scope)
        self.see_scope(index)

    def kill_init(self, index: int) -> None:
        self.set_node(index, has_init=0)
        self.sight(index, SAW_INIT_DIE)

    # --- The link ------------------------------------------------------------------------------

    def read(self, number: int) -> None:
        link = self.links[number]
        who = f"C{link.client - 1}" if link.client else "C0"
        if not link.is_accepted:
            self.set_link(number, is_accepted=1)
            self.feed(on.ConnectionOpened(number, 0))
        elif link.to_provider:
            message = self.message(link.to_provider[0])
            assert message is not None
            self.explorer._draw(f"{who}->>P: {_label(message)}")
            event = provider_event_of(number, message)
            if isinstance(event, on.FrameRejected):
                self.set_link(number, is_deaf=1, to_provider=(), open=(*link.open, 0))
            else:
                opened = (*link.open, link.to_provider[0])
                self.set_link(number, to_provider=link.to_provider[1:], open=opened)
            self._note_read(event)
            self.feed(event)
        else:
            self.explorer._draw(f"{who}--xP: gone")
            self.set_link(number, has_provider=0, open=())
            self.feed(on.ConnectionLost(number, "closed by the consumer"))

    def _note_read(self, event: Event) -> None:
        if isinstance(event, on.EndReceived):
            state = self.view.states[self._index(event.allocation_id)]
            self.explorer.see(f"an end is read of what is {state.value}")
        elif isinstance(event, on.RequestReceived):
            index = self._index(event.request.allocation_id)
            self.explorer.see(f"a request is read for what is {self.view.states[index].value}")

    def lose(self, number: int) -> None:
        self.set_link(number, is_broken=1, to_provider=(), to_consumer=())

    def spoil(self, number: int, fate: int) -> None:
        link = self.links[number]
        if fate in (NOT_FOUND, FAILED_TO_PASS) and link.client:
            # Lied to, a consumer may believe that all is well.
            self.set_client(link.client - 1, is_handed=0)
            self.set_link(number, client=0)
        parcels = list(link.to_consumer)
        for i, (message, _) in enumerate(parcels):
            if isinstance(self.message(message), NamespaceResponse):
                parcels[i] = (message, fate)
                break
        self.set_link(number, to_consumer=tuple(parcels))

    def duplicate(self, number: int) -> None:
        # No consumer of ours asks twice; of one that does, nobody vouches for how many sets it has.
        doubled = (*self.links[number].to_provider, self.links[number].to_provider[-1])
        self.set_link(number, to_provider=doubled, client=0)

    # --- The consumers' programs ---------------------------------------------------------------

    def join(self, index: int, request: int, event: Event) -> None:
        self._disown(index)
        explorer = self.explorer
        kernel = explorer._consumer(explorer.bounds.requests[request])
        wishes = self.clients[index].wishes + 1
        if wishes > 1:
            explorer.see("another wish")
        self.clients[index] = Client(explorer._number_consumer(kernel), wishes=wishes)
        self.tell(index, event)

    def _disown(self, index: int) -> None:
        self.hang_up(index)
        for number, link in self.links.items():
            if link.client == index + 1:
                self.set_link(number, client=0)

    def die(self, index: int) -> None:
        self._disown(index)
        self.clients[index] = Client(wishes=self.clients[index].wishes)

    def tell(self, index: int, event: Event) -> None:
        explorer = self.explorer
        step = explorer.step_consumer(self.clients[index].kernel, event)
        if step is None:
            explorer.see("the provider says what it may not say now")
            step = explorer.step_consumer(self.clients[index].kernel, on.FrameRejected("not now"))
            if step is None:
                raise Finding(f"a consumer can neither take {event} nor reject it")
        kernel, effects = step
        self.set_client(index, kernel=kernel)
        for effect in effects:
            self._perform(index, effect)

    def _perform(self, index: int, effect: Effect) -> None:
        match effect:
            case do.Connect():
                self.set_client(index, is_calling=1)
            case do.SendRequest(request=request):
                self._post(index, request)
            case do.SendEnd(allocation_id=name):
                self._post(index, AllocationEnded(name))
            case do.SendFault(reason=reason):
                self._post(index, FdPassing(reason))
            case do.CloseChannel():
                self.hang_up(index)
                self.set_client(index, is_calling=0)
            case do.StartTimer(timer=timer):
                self.set_client(index, timers=self.clients[index].timers | _bit(timer))
            case do.StopTimer(timer=timer):
                if not self.clients[index].timers & _bit(timer):
                    raise Finding(f"{effect} stops what does not run")
                self.set_client(index, timers=self.clients[index].timers & ~_bit(timer))
            case do.ServeSelf():
                self.set_client(index, is_serving=1)
            case do.ReleaseOwn():
                if not self.clients[index].has_own:
                    raise Finding("what was never made by self-service is released")
                self.set_client(index, has_own=0)
            case do.DeliverDescriptors():
                self._deliver(index, effect)
            case do.DiscardDescriptors():
                self.has_parcel = False
            case do.ReportRefusal(error=error):
                is_over = self.view_of(index).hold is ConsumerState.ENDED
                if not (is_over and isinstance(error, AllocationNotFound)):
                    self._tell_outcome(index)
            case do.ReportEnd():
                if self.clients[index].has_end:
                    raise Finding("a caller is told twice of the end")
                self.set_client(index, has_end=1)
            case do.ReportFallback(error=error):
                self.explorer.see(f"fallback: {error.kind}")

    def _deliver(self, index: int, effect: do.DeliverDescriptors) -> None:
        self._tell_outcome(index)
        if not effect.is_degraded:
            self.has_parcel = False
            request = self.view_of(index).request
            always.require(always.response_answers_its_request(request, effect.response))

    def _tell_outcome(self, index: int) -> None:
        if self.clients[index].has_outcome:
            raise Finding("a caller is told of two outcomes")
        self.set_client(index, has_outcome=1)

    def _post(self, index: int, message: Message) -> None:
        number = self.clients[index].link
        if not number:
            raise Finding(f"{message} is to be sent, and there is no connection")
        link = self.links[number]
        if link.has_provider and not link.is_broken and not link.is_deaf:
            sent = self.explorer._messages.of(message)
            self.set_link(number, to_provider=(*link.to_provider, sent))

    def hang_up(self, index: int) -> None:
        number = self.clients[index].link
        if number:
            self.set_client(index, link=0)
            self.set_link(number, has_consumer=0, to_consumer=())

    def connect(self, index: int) -> None:
        number = 1 + max((*self.links, *self.view.numbers), default=0)
        self.links[number] = Link(number, index + 1)
        self.set_client(index, is_calling=0, link=number)
        self.tell(index, on.Connected())

    def miss(self, index: int) -> None:
        self.set_client(index, is_calling=0)
        self.tell(index, on.ProviderUnreachable(SocketUnavailable("connection refused")))

    def hear(self, index: int) -> None:
        number = self.clients[index].link
        link = self.links[number]
        if not link.to_consumer:
            self.explorer._draw(f"P--xC{index}: gone")
            self.hang_up(index)
            self.tell(index, on.ConnectionLost(reason="closed by the provider"))
            return
        (arrived, fate), *rest = link.to_consumer
        self.set_link(number, to_consumer=tuple(rest))
        message = self.message(arrived)
        assert message is not None
        self.explorer._draw(f"P->>C{index}: {_label(message)}{_FATES[fate]}")
        view = self.view_of(index)
        if isinstance(message, Exception):
            self.explorer.see(f"{type(message).__name__} reaches a consumer")
        if fate:
            self.tell(index, _spoilt(view.request, fate))
            return
        self.has_parcel = isinstance(message, NamespaceResponse)
        if self.has_parcel and view.hold in (ConsumerState.SERVING_SELF, ConsumerState.SELF_HELD):
            self.explorer.see("an answer after the fallback")
        is_end = isinstance(message, AllocationEnded)
        if is_end and any(self.message(m) == message for m in link.to_provider):
            self.explorer.see("ends cross")
        before = self.clients[index].kernel
        self.tell(index, consumer_event_of(view.request, message))
        has_refused = (before, consumer_event_of(view.request, message))
        if self.has_parcel and self.explorer._consumer_steps[has_refused] is not None:
            # A driver closes what a refused message brought; of a taken one it is told what to do.
            raise Finding("descriptors are neither delivered nor discarded")

    def serve_self(self, index: int, *, is_able: bool) -> None:
        self.set_client(index, is_serving=0, has_own=int(is_able))
        request = self.view_of(index).request
        if is_able:
            response = NamespaceResponse(request.allocation_id, request.namespaces)
            self.tell(index, on.SelfServed(response))
        else:
            self.tell(index, on.SelfServiceFailed(CreationFailed("not allowed")))

    def end(self, index: int) -> None:
        self.tell(index, on.EndWanted())

    def expire(self, index: int, timer: str) -> None:
        which = Timer(timer)
        self.explorer._draw(f"Note over P: {timer} timer expires")
        self.set_node(index, timers=self.nodes[index].timers & ~_bit(which))
        self.feed(_TIMER_EVENTS[which](self.explorer.names[index]))

    def expire_for(self, index: int, timer: str) -> None:
        which = Timer(timer)
        self.explorer._draw(f"Note over C{index}: {timer} timer expires")
        self.set_client(index, timers=self.clients[index].timers & ~_bit(which))
        self.tell(index, _TIMER_EVENTS[which](""))

    def miss_readiness(self) -> None:
        self.is_waiting = 0
        self.feed(on.ReadinessOverdue())

    # --- What is true in every world -----------------------------------------------------------

    def check(self) -> None:
        for link in self.links.values():
            if link.surplus and link.has_provider:
                raise Finding("an error answers nothing, and the connection stays open")
        for index, client in enumerate(self.clients):
            if client.kernel:
                self._check_client(index, client)
        if self.provider:
            states = self.view.states
            for index, node in enumerate(self.nodes):
                if states[index] in _LIVE and (node.is_over or node.is_released):
                    raise Finding(f"{self.explorer.names[index]} lives on after its end")
                if node.timers & _bit(Timer.CLAIM) and self._is_claimed(index):
                    raise Finding(f"the claim timer of {self.explorer.names[index]} runs in vain")

    def _is_claimed(self, index: int) -> bool:
        """Whether somebody whom the provider handed it to is still connected."""
        return any(x.handed >> index & 1 and x.has_provider for x in self.links.values())

    def _check_client(self, index: int, client: Client) -> None:
        view = self.view_of(index)
        if view.is_connected != bool(client.link):
            raise Finding("a consumer's kernel is wrong about its connection")
        is_expecting = view.hold in (ConsumerState.ASKING, ConsumerState.HELD)
        if client.link and not is_expecting and view.notice is not NoticeState.TOLD:
            raise Finding("a connection is kept on which nothing is expected")
        if (client.has_own or client.is_serving) and not view.is_in_debt:
            item = (index, view.request.allocation_id)
            provided = [item] if self._is_provided(index, client, view) else []
            always.require(always.at_most_one_live_set([item], [], provided))

    def _is_provided(self, index: int, client: Client, view: _ConsumerView) -> bool:
        if not self.provider:
            return False
        coming = [
            self.message(m)
            for link in self.links.values()
            if link.client == index + 1 and link.has_provider
            for m in (*link.open, *link.to_provider)
        ]
        if any(isinstance(m, AllocationEnded) for m in coming):
            return False
        is_alive = self.view.states[view.name] in _LIVE
        return any(isinstance(m, NamespaceRequest) for m in coming) or bool(
            client.is_handed and is_alive
        )


_PERFORMERS: Final[dict[type[Effect], Callable[[_Draft, Any], None]]] = {
    do.StartTimer: _Draft.start_timer,
    do.StopTimer: _Draft.stop_timer,
    do.CreateNamespaces: _Draft.create,
    do.ReleaseNamespaces: _Draft.release,
    do.Watch: _Draft.watch,
    do.RecordHandoff: _Draft.record,
    do.HandOver: _Draft.hand_over,
    do.Refuse: _Draft.refuse,
    do.AnnounceEnd: _Draft.announce,
    do.CloseConnection: _Draft.close,
}

_MAKERS: Final[dict[str, Callable[..., None]]] = {
    "want": lambda d, c, r: d.join(c, r, on.NamespacesWanted()),
    "end by name": lambda d, c, r: d.join(c, r, on.EndWanted()),
    "end": _Draft.end,
    "die": _Draft.die,
    "connect": _Draft.connect,
    "unreached": _Draft.miss,
    "refuse call": _Draft.miss,
    "hear": _Draft.hear,
    "serve self": lambda d, c: d.serve_self(c, is_able=True),
    "fail self": lambda d, c: d.serve_self(c, is_able=False),
    "overdue": _Draft.expire_for,
    "redial": _Draft.expire_for,
    "read": _Draft.read,
    "lose": _Draft.lose,
    "spoil": _Draft.spoil,
    "duplicate": _Draft.duplicate,
    "work": lambda d, a: d.work(a, is_able=True),
    "fail": lambda d, a: d.work(a, is_able=False),
    "observe": _Draft.observe,
    "populate": lambda d, a: d.set_scope(a, POPULATED),
    "empty": lambda d, a: d.set_scope(a, EMPTIED),
    "init dies": _Draft.kill_init,
    "expire": _Draft.expire,
    "retry": _Draft.expire,
    "release": lambda d, a: d.feed(on.ReleaseRequested(d.explorer.names[a])),
    "ready": lambda d: d.feed(on.ProviderReady()),
    "unready": _Draft.miss_readiness,
    "stop": lambda d: d.feed(on.ProviderStopping()),
    "exit": lambda d: d.crash(0, is_counted=False),
    "crash": _Draft.crash,
    "recover": _Draft.recover,
}

MOVES: Final = frozenset(_MAKERS)
"""Every move there is, but for dying in the middle of one, which "crash" stands for, too."""

_FATES: Final = (
    "",
    ", cut off",
    ", mismatched",
    ", turned into NotFound",
    ", turned into FdPassing",
)


class _Search:
    """Breadth first through the worlds, and then once over the graph of what happens by itself."""

    def __init__(
        self,
        explorer: Explorer,
        states_max: int | None,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self.explorer = explorer
        self.states_max = states_max
        self.progress = progress
        self.numbers: dict[Hashable, int] = {}
        self.parents = array("I")
        self.via = array("I")
        self.moves: _Numbers[Move] = _Numbers()
        self.waits = array("B")
        """What somebody waits for in each world, as bits of `_WAITS`."""
        self.sources, self.targets, self.labels = array("I"), array("I"), array("I")
        self.at_rest: list[int] = []
        self.queue: deque[tuple[int, World]] = deque()

    def run(self) -> Result:
        explorer, result = self.explorer, self.explorer.result
        self._found(explorer.initial(), 0, 0)
        while self.queue:
            if self.states_max is not None and len(self.parents) >= self.states_max:
                result.is_complete = False
                break
            index, world = self.queue.popleft()
            explorer._now = index
            self._expand(index, world)
            if self.progress is not None and index % 10_000 == 0:
                self.progress(len(self.parents), len(self.queue))
        result.states, result.at_rest = len(self.parents), len(self.at_rest)
        if result.is_complete:
            self._check_liveness()
        return result

    def _expand(self, index: int, world: World) -> None:
        explorer = self.explorer
        can_crash = bool(world.provider) and world.crashes < explorer.bounds.crashes
        can_crash = can_crash and "crash" not in explorer.bounds.without
        is_resting = True
        for move in explorer.moves(world):
            performed = self._try(index, world, move)
            is_resting = is_resting and move[0] not in BY_ITSELF
            if can_crash and move[0] != "crash":
                for n in range(performed):
                    self._try(index, world, ("crash in", n, *move))
        if is_resting:
            self.at_rest.append(index)
            try:
                _check_at_rest(explorer, world)
            except AssertionError as error:
                raise self._broken(index, None, error) from error

    def _try(self, index: int, world: World, move: Move) -> int:
        try:
            after, performed = self.explorer.make(world, move)
        except AssertionError as error:
            raise self._broken(index, move, error) from error
        self.explorer.result.moves += 1
        label = self.moves.of(move)
        target = self._found(after, index, label)
        if move[0] in BY_ITSELF:
            self.sources.append(index)
            self.targets.append(target)
            self.labels.append(label)
        return performed

    def _found(self, world: World, parent: int, via: int) -> int:
        key: Hashable = world if self.explorer._is_exact else hash(world)
        number = self.numbers.get(key)
        if number is None:
            number = self.numbers[key] = len(self.parents)
            self.parents.append(parent)
            self.via.append(via)
            self.waits.append(_waits_of(self.explorer, world))
            self.queue.append((number, world))
        return number

    def path(self, index: int) -> tuple[Move, ...]:
        """Find the moves that first led to a world."""
        script = []
        while index:
            script.append(self.moves.things[self.via[index]])
            index = self.parents[index]
        return tuple(reversed(script))

    def _broken(self, index: int, move: Move | None, error: AssertionError) -> Broken:
        script = self.path(index) + ((move,) if move else ())
        self.explorer.lockstep = None
        return Broken(self.explorer.bounds, script, str(error), self.explorer.chart(script))

    # --- Liveness ------------------------------------------------------------------------------

    def _check_liveness(self) -> None:
        lost = self._first_that_never_rests()
        if lost is not None:
            finding = AssertionError("from here on nothing ever comes to rest")
            raise self._broken(lost, None, finding)
        for bit, what in enumerate(_WAITS):
            for circle in self._circles(1 << bit):
                if self._is_fair(circle):
                    finding = AssertionError(f"{what}, for ever: a circle of {len(circle)} worlds")
                    raise self._broken(min(circle), None, finding)

    def _first_that_never_rests(self) -> int | None:
        back: list[list[int]] = [[] for _ in self.parents]
        for source, target in zip(self.sources, self.targets, strict=True):
            back[target].append(source)
        can_rest = bytearray(len(self.parents))
        todo = list(self.at_rest)
        for index in todo:
            can_rest[index] = 1
        while todo:
            for source in back[todo.pop()]:
                if not can_rest[source]:
                    can_rest[source] = 1
                    todo.append(source)
        first = can_rest.find(0)
        return None if first < 0 else first

    def _circles(self, bit: int) -> list[set[int]]:
        """Find the strongly connected parts, with a move inside, of the worlds that wait."""
        forward: dict[int, list[int]] = {}
        loops = set()
        for source, target in zip(self.sources, self.targets, strict=True):
            if self.waits[source] & bit and self.waits[target] & bit:
                forward.setdefault(source, []).append(target)
                if source == target:
                    loops.add(source)
        return [c for c in _components(forward) if len(c) > 1 or c <= loops]

    def _is_fair(self, circle: set[int]) -> bool:
        """Say whether a circle can be kept up though nothing that can always happen is put off."""
        offered: dict[int, set[int]] = {index: set() for index in circle}
        taken = set()
        for source, target, label in zip(self.sources, self.targets, self.labels, strict=True):
            if source in circle:
                offered[source].add(label)
                if target in circle:
                    taken.add(label)
        return set.intersection(*offered.values()) <= taken


_WAITS: Final = ("a request is unanswered", "an end is unannounced", "a consumer is in debt")


def _waits_of(explorer: Explorer, world: World) -> int:
    bits = 0
    if world.provider:
        states = explorer._provider_views[world.provider].states
        bits |= (AllocationState.ENDED in states) << 1
    for client in world.clients:
        view = explorer._consumer_views[client.kernel]
        if view is not None:
            bits |= view.hold is ConsumerState.ASKING
            bits |= view.is_in_debt << 2
    return bits | any(link.open or link.to_provider for link in world.links)


def _check_at_rest(explorer: Explorer, world: World) -> None:
    """Hold a world in which nothing happens by itself any more to what it must have come to."""
    view = explorer._provider_views[world.provider]
    if view is None or view.phase is not Phase.READY:
        raise Finding("at rest without a provider that is ready")
    for link in world.links:
        numbers = range(len(world.nodes))
        bits = {i: (link.number, i) for i in numbers}
        always.require(
            always.every_holder_has_heard(
                [bits[i] for i in numbers if link.handed >> i & 1],
                [bits[i] for i in numbers if link.told >> i & 1],
                [i for i in numbers if world.nodes[i].is_over],
                [link.number] if link.has_provider and link.has_consumer else [],
            ),
            always.every_message_is_answered(
                [("read", explorer._messages.things[m]) for m in link.open]
            ),
        )
    for node, state in zip(world.nodes, view.states, strict=True):
        if state in (AllocationState.REQUESTED, AllocationState.ENDED):
            raise Finding(f"at rest, an allocation is {state.value}")
        is_alive = state in (AllocationState.CREATED, AllocationState.HANDED_OFF)
        if is_alive != bool(node.life):
            raise Finding("at rest, the kernel and the node disagree on what is alive")
        is_claimed = any(link.handed for link in world.links) or node.scope or node.timers
        if is_alive and not is_claimed:
            raise Finding("at rest, an allocation is alive that nobody holds and nothing will end")
    for client in world.clients:
        consumer = explorer._consumer_views[client.kernel]
        if consumer is None:
            continue
        if consumer.hold not in (*_DONE, ConsumerState.HELD, ConsumerState.SELF_HELD):
            raise Finding(f"at rest, a consumer is {consumer.hold.value}")
        if consumer.is_in_debt:
            raise Finding("at rest, a consumer is in debt")
        if client.timers:
            raise Finding("at rest, a consumer's timer runs")


def _components(forward: dict[int, list[int]]) -> list[set[int]]:
    """Find strongly connected components, without recursion (Tarjan)."""
    order: dict[int, int] = {}
    low: dict[int, int] = {}
    stack: list[int] = []
    is_on_stack: set[int] = set()
    found: list[set[int]] = []
    for root in sorted(forward):
        if root in order:
            continue
        work = [(root, iter(forward.get(root, ())))]
        order[root] = low[root] = len(order)
        stack.append(root)
        is_on_stack.add(root)
        while work:
            node, targets = work[-1]
            for target in targets:
                if target not in order:
                    order[target] = low[target] = len(order)
                    stack.append(target)
                    is_on_stack.add(target)
                    work.append((target, iter(forward.get(target, ()))))
                    break
                if target in is_on_stack:
                    low[node] = min(low[node], order[target])
            else:
                work.pop()
                if work:
                    above = work[-1][0]
                    low[above] = min(low[above], low[node])
                if low[node] == order[node]:
                    component = set()
                    while node not in component:
                        top = stack.pop()
                        is_on_stack.discard(top)
                        component.add(top)
                    found.append(component)
    return found


def _first(frozen: Snapshot) -> Any:
    return frozen[0]


def _bit(timer: Timer) -> int:
    return 1 << _TIMERS.index(timer)


def _timers_of(bits: int) -> list[Timer]:
    return [timer for i, timer in enumerate(_TIMERS) if bits >> i & 1] if bits else []


def _rename_bits(bits: int, swap: tuple[int, ...]) -> int:
    return sum(1 << swap[i] for i in range(len(swap)) if bits >> i & 1)


def _link(world: World, number: int) -> Link:
    return next(link for link in world.links if link.number == number)


def _has_news_for_consumer(link: Link) -> bool:
    return bool(link.to_consumer or not link.has_provider or link.is_broken)


def _has_news_for_provider(link: Link) -> bool:
    if not link.has_provider or link.is_deaf:
        return False
    return bool(not link.is_accepted or link.to_provider or not link.has_consumer or link.is_broken)


def _spoilt(request: NamespaceRequest, fate: int) -> Event:
    if fate == CUT:
        return on.FrameRejected("descriptors were cut off")
    if fate == MISMATCHED:
        return on.ResponseMismatched("fd_types is another")
    if fate == NOT_FOUND:
        return on.NotFoundReceived(AllocationNotFound(request.allocation_id))
    return on.PassingFailed(FdPassing("no descriptor is left"))


def _label(message: Message) -> str:
    return f"{type(message).__name__}({getattr(message, 'allocation_id', '')})"


def _note_of(move: Move) -> str:
    words = " ".join(map(str, move))
    return f"Note over P: {words}"
