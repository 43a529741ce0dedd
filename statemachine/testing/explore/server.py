"""The provider's side of a world: what its driver, its backend, the node and the connections do."""

from __future__ import annotations

import functools
import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from specs import invariants as always

from ... import effects as do
from ... import events as on
from ...effects import Effect, Timer
from ...errors import CreationFailed, FdPassing
from ...events import ProviderInput
from ...messages import (
    AllocationEnded,
    Message,
    NamespaceRequest,
    NamespaceResponse,
)
from ...provider import event_of as provider_event_of
from ...states import AllocationState, ServiceState
from .kernels import Kernels, ProviderView
from .world import (
    CREATED,
    EMPTIED,
    ENDED,
    FAILED_TO_PASS,
    HALF_MADE,
    HANDED_OFF,
    NOT_FOUND,
    NOTHING,
    POPULATED,
    RELEASE_JOB,
    SAW_EMPTIED,
    SAW_INIT_DIE,
    SAW_POPULATED,
    SOUND,
    SPENDS,
    STRANGER,
    UNUSED,
    Bounds,
    Link,
    Move,
    Node,
    ServerState,
    Violation,
    bit_of,
    has_news_for_provider,
    is_lost,
    timers_in,
)

if TYPE_CHECKING:
    from .story import Story

LIVE: Final = frozenset(
    {AllocationState.REQUESTED, AllocationState.CREATED, AllocationState.HANDED_OFF}
)
_OBSERVED: Final = frozenset(
    {AllocationState.CREATED, AllocationState.HANDED_OFF, AllocationState.ENDED}
)
NOT_FOR_A_PROVIDER: Final = FdPassing("not for a provider")

Cut = tuple[type, type]
"""A moment between two effects: what was done last, or the event, and what would come next."""


@dataclass
class Setting:
    """What all moves of an exploration have in common, and what they leave in it."""

    bounds: Bounds
    kernels: Kernels
    seen: dict[str, int] = field(default_factory=dict)
    """Every situation that came about, and the number of the world in which it first did."""
    now: int = 0
    """The number of the world that is looked at."""
    moments: set[Cut] = field(default_factory=set)
    """Every moment at which a provider may die."""
    cuts: set[Cut] = field(default_factory=set)
    """Every moment at which one did."""
    story: Story | None = None
    """Who tells what happens, while a script is replayed."""
    also: Callable[[Setting, ServerState], None] | None = None
    """What else is checked of every server state; raises `AssertionError`."""

    def see(self, situation: str) -> None:
        """Note that a situation has come about."""
        self.seen.setdefault(situation, self.now)

    def message(self, number: int) -> Message | None:
        """Look up a message."""
        message: Message | None = self.kernels.messages.things[number]
        return message


class _Crash(Exception):
    """The provider's program dies here."""


# --- What may happen ---------------------------------------------------------------------------


def server_moves(setting: Setting, server: ServerState) -> list[Move]:
    """List what may happen now on the provider's side."""
    found: list[Move] = []
    _moves_of_strangers(setting, server, found)
    for link in server.links:
        _moves_of_link(setting, server, link, found)
    for index in range(len(server.nodes)):
        _moves_of_node(setting, server, index, found)
    _moves_of_provider(setting, server, found)
    return [move for move in found if may(setting, server, move)]


def may(setting: Setting, server: ServerState, move: Move) -> bool:
    """Whether the bounds allow a move."""
    faults = setting.bounds.faults
    is_safe = faults is not None and server.faults >= faults
    return move[0] not in setting.bounds.without and not (is_safe and move[0] in SPENDS)


def may_crash(setting: Setting, server: ServerState) -> bool:
    """Whether the bounds allow a provider to die."""
    most = setting.bounds.crashes
    is_allowed = most is None or server.crashes < most
    return is_allowed and "crash" not in setting.bounds.without


def _moves_of_strangers(setting: Setting, server: ServerState, found: list[Move]) -> None:
    strangers = [link for link in server.links if link.client == STRANGER]
    bounds = setting.bounds
    is_room = len(server.links) < bounds.connections
    if server.provider and is_room and len(strangers) < bounds.strangers:
        found.append(("call",))
    for link in strangers:
        if not link.has_consumer:
            continue
        found.append(("hang up", link.number))
        if link.has_provider and not link.is_read_closed and len(link.open) < bounds.in_flight:
            for request in range(len(bounds.requests)):
                found.append(("ask", link.number, request))
            for index in range(len(bounds.names)):
                found.append(("tell of end", link.number, index))
            found.append(("send unreadable", link.number))


def _moves_of_link(setting: Setting, server: ServerState, link: Link, found: list[Move]) -> None:
    if server.provider and has_news_for_provider(link) and not _must_wait(setting, server, link):
        found.append(("read", link.number))
    if link.is_broken or link.client == STRANGER:
        return
    if link.has_provider and link.has_consumer:
        found.append(("lose", link.number))
        if len(link.to_provider) < setting.bounds.in_flight and any(
            isinstance(setting.message(m), NamespaceRequest) for m in link.to_provider[-1:]
        ):
            found.append(("duplicate", link.number))
    for message, fate in link.to_consumer:
        if isinstance(setting.message(message), NamespaceResponse):
            if not fate:
                spoils = setting.bounds.spoils
                found.extend(("spoil", link.number, spoil) for spoil in spoils)
            break


def _must_wait(setting: Setting, server: ServerState, link: Link) -> bool:
    """Whether what was said here is read only after the loss of an older connection."""
    if not (setting.bounds.has_losses_first and link.is_accepted and link.to_provider):
        return False
    return any(
        older.number < link.number and not older.is_read_closed and is_lost(older)
        for older in server.links
    )


def _moves_of_node(setting: Setting, server: ServerState, index: int, found: list[Move]) -> None:
    node = server.nodes[index]
    if node.life in (CREATED, HANDED_OFF):
        if node.scope == UNUSED:
            found.append(("populate", index))
        elif node.scope == POPULATED:
            found.append(("empty", index))
    if node.has_init:
        found.append(("init dies", index))
    if not server.provider:
        return
    if node.jobs:
        found.append(("work", index))
        found.append(("fail", index))
    if node.sightings:
        found.append(("observe", index))
    for timer in timers_in(node.timers):
        word = "retry" if timer is Timer.RETRY else "expire"
        found.append((word, index, timer.value))
    view = setting.kernels.provider_views[server.provider]
    if view.states[index] in (*LIVE, AllocationState.ENDED):
        found.append(("release", index))


def _moves_of_provider(setting: Setting, server: ServerState, found: list[Move]) -> None:
    if not server.provider:
        found.extend(("recover", *order) for order in _orders_of_recovery(server))
        return
    service = setting.kernels.provider_views[server.provider].service
    if service is ServiceState.STARTING:
        found.append(("ready",))
    if service.is_stopping:
        found.append(("exit",))
    else:
        found.append(("stop",))
    if server.is_waiting:
        found.append(("unready",))
    if may_crash(setting, server):
        found.append(("crash", 0))
        if any(node.jobs and node.jobs[0] != RELEASE_JOB for node in server.nodes):
            found.append(("crash", 1))


def _orders_of_recovery(server: ServerState) -> list[tuple[int, ...]]:
    """List the orders in which the backend may report what it has found in the journal."""
    lives = [index for index, node in enumerate(server.nodes) if node.life]
    return list(itertools.permutations(lives))


# --- A move is made ----------------------------------------------------------------------------


class ServerDraft:
    """
    A server state while a move is made.

    Args:
        setting, server: what all moves have in common, and how it is before.
        crash_after: after how many effects the provider dies; None: it lives.
        has_forks: note for each effect what were if the provider died before it.
    """

    def __init__(
        self,
        setting: Setting,
        server: ServerState,
        *,
        crash_after: int | None = None,
        has_forks: bool = False,
    ) -> None:
        self.setting = setting
        self.kernels = setting.kernels
        self.provider = server.provider
        self.links = {link.number: link for link in server.links}
        self.nodes = list(server.nodes)
        self.is_waiting = server.is_waiting
        self.crashes = server.crashes
        self.faults = server.faults
        self.performed = 0
        self.crash_after = crash_after
        self.forks: list[ServerState] | None = [] if has_forks else None
        self.last: type = object
        """What was done last, or has just happened."""
        self.events: deque[ProviderInput] = deque()

    def make(self, move: Move) -> None:
        """Make a move; raises `Violation` or `InvariantBroken` if it breaks a promise."""
        try:
            self.spend(move)
            SERVER_MOVES[move[0]](self, *move[1:])
        except _Crash:
            self.crash(0)

    def spend(self, move: Move) -> None:
        """Count what is no longer allowed for ever."""
        if move[0] in SPENDS and self.setting.bounds.faults is not None:
            self.faults += 1

    def freeze(self) -> ServerState:
        """Take what has become of it."""
        links = [x for _, x in sorted(self.links.items()) if _is_of_interest(x)]
        return ServerState(
            self.provider,
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

    @property
    def view(self) -> ProviderView:
        view: ProviderView = self.kernels.provider_views[self.provider]
        return view

    def message(self, number: int) -> Message | None:
        return self.setting.message(number)

    def new_number(self) -> int:
        """Number a connection that is younger than all there are."""
        return 1 + max((*self.links, *self.view.numbers), default=0)

    # --- The provider's program ----------------------------------------------------------------

    def feed(self, event: ProviderInput) -> None:
        """Feed the kernel, and perform what it says, until nothing follows from it any more."""
        self.events.append(event)
        while self.events:
            self._turn(self.events.popleft())

    def _turn(self, event: ProviderInput) -> None:
        before = self.view.states
        try:
            step = self.kernels.step_provider(self.provider, event)
        finally:
            if self.setting.story is not None:
                self.setting.story.turn(event, self.kernels.decided)
        self.provider = step.after
        self._note_ends(before, self.view.states)
        self.last = type(event)
        for effect in step.effects:
            self._perform(effect)

    def _perform(self, effect: Effect) -> None:
        kind = type(effect)
        self.setting.moments.add((self.last, kind))
        if self.crash_after == self.performed:
            raise _Crash
        if self.forks is not None:
            self.setting.cuts.add((self.last, kind))
            self.forks.append(self.crashed(0))
        self.performed += 1
        self.last = kind
        _PERFORMERS[kind](self, effect)

    def _note_ends(
        self, before: tuple[AllocationState, ...], after: tuple[AllocationState, ...]
    ) -> None:
        if before is after:
            return
        for index, state in enumerate(after):
            if state is AllocationState.ENDED and before[index] is not state:
                if before[index] in LIVE:
                    ends = [index] * (1 + self.nodes[index].is_over)
                    always.require(always.ended_at_most_once(ends))
                self.set_node(index, is_over=1)

    def start_timer(self, effect: do.StartTimer) -> None:
        if effect.timer is Timer.READINESS:
            self.is_waiting = 1
        else:
            index = self._index(effect.allocation_id)
            self.set_node(index, timers=self.nodes[index].timers | bit_of(effect.timer))

    def stop_timer(self, effect: do.StopTimer) -> None:
        if effect.timer is Timer.READINESS:
            is_running, self.is_waiting = self.is_waiting, 0
        else:
            index = self._index(effect.allocation_id)
            timers = self.nodes[index].timers
            is_running = timers & bit_of(effect.timer)
            self.set_node(index, timers=timers & ~bit_of(effect.timer))
        if not is_running:
            raise Violation(f"{effect} stops what does not run")

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
        jobs = (*self.nodes[index].jobs, self.kernels.messages.of(effect.request))
        self.set_node(index, jobs=jobs, is_over=0, is_released=0, holders=0)

    def release(self, effect: do.ReleaseNamespaces) -> None:
        index = self._index(effect.allocation_id)
        node = self.nodes[index]
        life = ENDED if node.life else NOTHING
        # One step may begin a life and end it, or end it and begin the next.
        if self.view.states[index] in LIVE and not node.is_over:
            raise Violation(f"{effect.allocation_id} is to be released before its end")
        jobs = (*node.jobs, RELEASE_JOB)
        self.set_node(index, life=life, is_watched=0, jobs=jobs, is_over=1)

    def watch(self, effect: do.Watch) -> None:
        index = self._index(effect.allocation_id)
        if self.nodes[index].life not in (CREATED, HANDED_OFF, ENDED):
            raise Violation(f"{effect.allocation_id} is to be watched and does not exist")
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
            raise Violation(f"{response.allocation_id} is handed over and is not alive on the node")
        if not node.has_init:
            failure = FdPassing("the descriptors cannot be had")
            self.send(number, failure)
            self.events.append(on.ResponseNotSent(response.allocation_id, number, failure))
            self.setting.see("descriptors cannot be had")
            return
        is_taken = link.has_consumer and not link.is_broken
        self.send(number, response)
        if not is_taken:
            gone = FdPassing("the consumer is gone")
            self.events.append(on.ResponseNotSent(response.allocation_id, number, gone))
            return
        self.set_link(number, handed=self.links[number].handed | 1 << index)
        if link.client > 0 and not link.is_doubtful:
            self.set_node(index, holders=node.holders | 1 << link.client - 1)
        self.events.append(on.ResponseSent(response.allocation_id, number))

    def refuse(self, effect: do.Refuse) -> None:
        self.send(effect.connection, effect.error)

    def announce(self, effect: do.AnnounceEnd) -> None:
        number, index = effect.connection, self._index(effect.allocation_id)
        node, link, bit = self.nodes[index], self.links[number], 1 << index
        if self.view.states[index] in LIVE and not node.is_over:
            raise Violation(f"the end of {effect.allocation_id} is told while it is alive")
        if node.life not in (NOTHING, ENDED):
            raise Violation(f"the end of {effect.allocation_id} is told before it is durable")
        ended = AllocationEnded(effect.allocation_id)
        is_answer = bool(link.open) and self.message(link.open[0]) == ended
        if not is_answer:
            item = (number, effect.allocation_id)
            pushes = [item] * (1 + bool(link.pushed & bit))
            handed = [item] if link.handed & bit else []
            self.setting.see("an end is pushed")
            always.require(
                always.end_is_pushed_at_most_once(pushes),
                always.end_is_told_only_to_whom_it_concerns(pushes, handed),
            )
            if any(self.message(m) == ended for m in link.to_provider):
                self.setting.see("ends cross")
        self.send(number, ended)
        link = self.links[number]
        pushed = link.pushed if is_answer else link.pushed | bit
        self.set_link(number, told=link.told | bit, pushed=pushed)

    def send(self, number: int, message: Message) -> None:
        link = self.links[number]
        if not link.has_provider:
            always.require(always.nothing_follows_a_close(["closed", "sent"]))
        oldest = self.message(link.open[0]) if link.open else None
        is_closing = isinstance(message, FdPassing) and isinstance(oldest, AllocationEnded)
        if isinstance(message, AllocationEnded) and message != oldest:
            pass
        elif link.open and not is_closing:
            talk: list[always.Spoken] = [("read", oldest), ("sent", message)]
            always.require(always.answers_come_in_order(talk, is_closed=False))
            self.set_link(number, open=link.open[1:])
        elif isinstance(message, Exception):
            self.set_link(number, surplus=1)
        else:
            always.require(always.answers_come_in_order([("sent", message)], is_closed=False))
        # What a stranger makes of what it hears is its own business.
        if link.has_consumer and not link.is_broken and link.client != STRANGER:
            reply = self.kernels.messages.of(message)
            self.set_link(number, to_consumer=(*link.to_consumer, (reply, SOUND)))

    def close(self, effect: do.CloseConnection) -> None:
        number = effect.connection
        self.set_link(number, has_provider=0, to_provider=(), open=(), surplus=0)
        self.events.append(on.ConnectionLost(number, "closed"))

    def crash(self, half: int, *, is_counted: bool = True) -> None:
        """The program is gone; `half`: the backend had begun to make what it was to make."""
        left = self.crashed(half, is_counted=is_counted)
        self.provider, self.is_waiting, self.crashes = 0, 0, left.crashes
        self.events.clear()
        self.links = {link.number: link for link in left.links}
        self.nodes = list(left.nodes)

    def crashed(self, half: int, *, is_counted: bool = True) -> ServerState:
        """Say what were left if the program died now."""
        is_counted = is_counted and self.setting.bounds.crashes is not None
        links = [left_of_link(link) for _, link in sorted(self.links.items()) if link.has_consumer]
        nodes = tuple([left_of_node(node, half) for node in self.nodes])
        left = [link for link in links if link.client != STRANGER]
        return ServerState(0, tuple(left), nodes, 0, self.crashes + is_counted, self.faults)

    def recover(self, *order: int) -> None:
        """Start it again; `order`: in which order it hears of what the journal knows."""
        nodes = zip(self.kernels.names, self.nodes, strict=True)
        remembered = tuple(name for name, node in nodes if node.is_remembered)
        self.provider = self.kernels.new_provider(remembered)
        if self.setting.story is not None:
            self.setting.story.start(remembered)
        for index in order:
            node, name = self.nodes[index], self.kernels.names[index]
            request = self.message(node.request)
            assert isinstance(request, NamespaceRequest)
            response = NamespaceResponse(name, request.namespaces)
            if node.life in (HALF_MADE, ENDED) or not node.has_init:
                self.setting.see("remains are found")
                self.feed(on.RemainsFound(name, request))
            elif node.life == CREATED:
                self.setting.see("what was created is adopted")
                self.feed(on.CreatedAdopted(name, request, response))
            else:
                self.setting.see("what was handed off is adopted")
                self.feed(on.HandedOffAdopted(name, request, response))

    def _index(self, name: str) -> int:
        return self.kernels.index_of(name)

    # --- The node ------------------------------------------------------------------------------

    def work(self, index: int, *, is_able: bool) -> None:
        node = self.nodes[index]
        job, name = node.jobs[0], self.kernels.names[index]
        self.set_node(index, jobs=node.jobs[1:])
        if self.setting.story is not None:
            self.setting.story.draw(f"N-->>P: {'done' if is_able else 'FAILED'}")
        if job != RELEASE_JOB:
            self._create(index, job, is_able)
        elif is_able:
            self._free(index)
            self.feed(on.NamespacesReleased(name))
        else:
            self.set_node(index, has_init=0)
            self.feed(on.ReleaseDelayed(name, "1 process does not die"))

    def _free(self, index: int) -> None:
        node = self.nodes[index]
        if node.life:
            alive = [index] if self.view.states[index] in LIVE else []
            always.require(
                always.released_at_most_once([index] * (1 + node.is_released)),
                always.released_only_after_its_end([index], alive),
            )
        self.nodes[index] = Node(
            is_remembered=1,
            is_over=node.is_over,
            is_released=1,
            jobs=node.jobs,
            timers=node.timers,
            holders=node.holders,
        )

    def _create(self, index: int, job: int, is_able: bool) -> None:
        name = self.kernels.names[index]
        request = self.message(job)
        assert isinstance(request, NamespaceRequest)
        if not is_able:
            self.feed(on.NamespacesNotCreated(name, CreationFailed("unshare: ENOSPC")))
            return
        is_over = self.view.states[index] is AllocationState.ENDED
        if is_over:
            self.setting.see("a creation is overtaken by the end")
        life = ENDED if is_over else CREATED
        self.set_node(index, life=life, request=job, has_init=1)
        self.feed(on.NamespacesCreated(name, NamespaceResponse(name, request.namespaces)))

    def observe(self, index: int) -> None:
        node, name = self.nodes[index], self.kernels.names[index]
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

    def expire(self, index: int, timer: str) -> None:
        which = Timer(timer)
        self.set_node(index, timers=self.nodes[index].timers & ~bit_of(which))
        self.feed(_EXPIRIES[which](self.kernels.names[index]))

    def miss_readiness(self) -> None:
        self.is_waiting = 0
        self.feed(on.ReadinessOverdue())

    # --- The connections -----------------------------------------------------------------------

    def read(self, number: int) -> None:
        link = self.links[number]
        if not link.is_accepted:
            self.set_link(number, is_accepted=1)
            self.feed(on.ConnectionOpened(number, 0))
        elif link.to_provider:
            message = link.to_provider[0]
            self.set_link(number, to_provider=link.to_provider[1:])
            self.hear(number, message)
        else:
            if self.setting.story is not None:
                self.setting.story.draw(f"{_who(link)}--xP: gone")
            self.set_link(number, has_provider=0, open=())
            self.feed(on.ConnectionLost(number, "closed by the consumer"))

    def hear(self, number: int, arrived: int) -> None:
        """The provider reads a message."""
        link, message = self.links[number], self.message(arrived)
        assert message is not None
        if self.setting.story is not None:
            self.setting.story.say(f"{_who(link)}->>P", message)
        event = provider_event_of(number, message)
        if isinstance(event, on.FrameRejected):
            self.set_link(number, is_read_closed=1, to_provider=(), open=(*link.open, 0))
        else:
            self.set_link(number, open=(*link.open, arrived))
        self._note_read(event)
        self.feed(event)

    def _note_read(self, event: ProviderInput) -> None:
        if isinstance(event, on.EndReceived):
            state = self.view.states[self._index(event.allocation_id)]
            self.setting.see(f"an end is read of what is {state.value}")
        elif isinstance(event, on.RequestReceived):
            index = self._index(event.request.allocation_id)
            self.setting.see(f"a request is read for what is {self.view.states[index].value}")

    def call(self) -> None:
        """A stranger calls, and is accepted."""
        number = self.new_number()
        self.links[number] = Link(number, STRANGER, is_accepted=1)
        self.feed(on.ConnectionOpened(number, 0))

    def say(self, number: int, message: Message) -> None:
        """A stranger sends a message. Only when it is read counts, not when it was sent."""
        self.hear(number, self.kernels.messages.of(message))

    def hang_up(self, number: int) -> None:
        self.set_link(number, has_consumer=0)

    def lose(self, number: int) -> None:
        self.set_link(number, is_broken=1, to_provider=(), to_consumer=())

    def spoil(self, number: int, fate: int) -> None:
        link = self.links[number]
        if fate in (NOT_FOUND, FAILED_TO_PASS):
            # Lied to, a consumer may believe that all is well.
            self.doubt(number)
        parcels = list(link.to_consumer)
        for i, (message, _) in enumerate(parcels):
            if isinstance(self.message(message), NamespaceResponse):
                parcels[i] = (message, fate)
                break
        self.set_link(number, to_consumer=tuple(parcels))

    def duplicate(self, number: int) -> None:
        # No consumer of ours asks twice; of one that does, the number of sets is not checked.
        doubled = (*self.links[number].to_provider, self.links[number].to_provider[-1])
        self.doubt(number)
        self.set_link(number, to_provider=doubled)

    def doubt(self, number: int) -> None:
        client = self.links[number].client
        self.set_link(number, is_doubtful=1)
        if client > 0:
            self.drop_holder(client - 1)

    def drop_holder(self, client: int) -> None:
        """Forget what was handed over to a client's request."""
        for index, node in enumerate(self.nodes):
            if node.holders >> client & 1:
                self.set_node(index, holders=node.holders & ~(1 << client))


def _is_of_interest(link: Link) -> bool:
    """Drop a connection that both ends have left; a stranger's end alone does not matter."""
    return bool(link.has_provider or (link.has_consumer and link.client != STRANGER))


@functools.cache
def left_of_link(link: Link) -> Link:
    """Say what is left of a connection when the provider's program dies."""
    return link._replace(has_provider=0, to_provider=(), open=(), surplus=0)


@functools.cache
def left_of_node(node: Node, half: int) -> Node:
    """Say what is left on the node when the provider's program dies."""
    life, request = node.life, node.request
    if half and not life and node.jobs and node.jobs[0] != RELEASE_JOB:
        life, request = HALF_MADE, node.jobs[0]
    # A decision that was neither noted nor told dies with the program: the life goes on, or one
    # that was to begin never does, and the last one is that which is remembered.
    is_lost = not life and node.is_remembered
    is_over = (node.is_over or is_lost) and life not in (CREATED, HANDED_OFF)
    return node._replace(
        life=life,
        request=request,
        is_over=int(is_over),
        jobs=(),
        timers=0,
        sightings=(),
        is_watched=0,
    )


def check_server(setting: Setting, server: ServerState) -> None:
    """Check what is true of every server state; raises `Violation` if it is not."""
    for link in server.links:
        if link.surplus and link.has_provider:
            raise Violation("an error answers nothing, and the connection stays open")
    if not server.provider:
        return
    states = setting.kernels.provider_views[server.provider].states
    for index, node in enumerate(server.nodes):
        name = setting.kernels.names[index]
        if states[index] in LIVE and (node.is_over or node.is_released):
            raise Violation(f"{name} lives on after its end")
        if node.timers & bit_of(Timer.CLAIM) and _is_claimed(server, index):
            raise Violation(f"the claim timer of {name} runs in vain")
    if setting.also is not None:
        setting.also(setting, server)


def _is_claimed(server: ServerState, index: int) -> bool:
    """Whether a consumer that it was handed to is still connected."""
    return any(link.handed >> index & 1 and link.has_provider for link in server.links)


def _who(link: Link) -> str:
    return f"S{link.number}" if link.client == STRANGER else f"C{max(link.client - 1, 0)}"


_EXPIRIES: Final[dict[Timer, Callable[[str], ProviderInput]]] = {
    Timer.CLAIM: on.ClaimExpired,
    Timer.RELEASE: on.ReleaseOverdue,
    Timer.RETRY: on.RetryDue,
}

_PERFORMERS: Final[dict[type[Effect], Callable[[ServerDraft, Any], None]]] = {
    do.StartTimer: ServerDraft.start_timer,
    do.StopTimer: ServerDraft.stop_timer,
    do.CreateNamespaces: ServerDraft.create,
    do.ReleaseNamespaces: ServerDraft.release,
    do.Watch: ServerDraft.watch,
    do.RecordHandoff: ServerDraft.record,
    do.HandOver: ServerDraft.hand_over,
    do.Refuse: ServerDraft.refuse,
    do.AnnounceEnd: ServerDraft.announce,
    do.CloseConnection: ServerDraft.close,
}

SERVER_MOVES: Final[dict[str, Callable[..., None]]] = {
    "call": ServerDraft.call,
    "ask": lambda d, n, r: d.say(n, d.setting.bounds.requests[r]),
    "tell of end": lambda d, n, a: d.say(n, AllocationEnded(d.kernels.names[a])),
    "send unreadable": lambda d, n: d.say(n, NOT_FOR_A_PROVIDER),
    "hang up": ServerDraft.hang_up,
    "read": ServerDraft.read,
    "lose": ServerDraft.lose,
    "spoil": ServerDraft.spoil,
    "duplicate": ServerDraft.duplicate,
    "work": lambda d, a: d.work(a, is_able=True),
    "fail": lambda d, a: d.work(a, is_able=False),
    "observe": ServerDraft.observe,
    "populate": lambda d, a: d.set_scope(a, POPULATED),
    "empty": lambda d, a: d.set_scope(a, EMPTIED),
    "init dies": ServerDraft.kill_init,
    "expire": ServerDraft.expire,
    "retry": ServerDraft.expire,
    "release": lambda d, a: d.feed(on.ReleaseRequested(d.kernels.names[a])),
    "ready": lambda d: d.feed(on.ProviderReady()),
    "unready": ServerDraft.miss_readiness,
    "stop": lambda d: d.feed(on.ProviderStopping()),
    "exit": lambda d: d.crash(0, is_counted=False),
    "crash": ServerDraft.crash,
    "recover": ServerDraft.recover,
}
"""Every move on the provider's side; "crash" stands also for dying in the middle of one."""
