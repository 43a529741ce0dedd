"""Two kinds of kernel and a world between them: the provider's, any number of consumers', a link.

Everything that can be late is late until it is asked for: messages, connections, backend work,
what the backend sees, self-service. Timers may expire at any time while they run. A provider's
program can die and be started again on the same node, a consumer's program can die, a response can
arrive spoilt. Nothing here decides anything: what a rule does is one step of somebody's driver.

The drivers here keep the obligations that stand on the effects, and one of an operator: an end is
durable (in the journal) before it is announced.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from typing import Any, Final, TypeAlias

from specs import invariants as always
from specs.invariants import Spoken
from statemachine import effects as do
from statemachine import events as on
from statemachine.consumer import ConsumerKernel
from statemachine.consumer import event_of as consumer_event_of
from statemachine.effects import Effect, Timer
from statemachine.errors import (
    AllocationNotFound,
    CreationFailed,
    FdPassing,
    NamespaceError,
    SocketUnavailable,
)
from statemachine.events import Event
from statemachine.lifecycle import AllocationState, ConsumerState, NoticeState, ServiceState
from statemachine.messages import (
    AllocationEnded,
    Message,
    NamespaceRequest,
    NamespaceResponse,
    NamespaceType,
    mount_path_below,
)
from statemachine.provider import Limits, ProviderKernel
from statemachine.provider import event_of as provider_event_of

LIVE: Final = (AllocationState.REQUESTED, AllocationState.CREATED, AllocationState.HANDED_OFF)
"""States in which an allocation counts."""

STEPS_TO_REST_MAX: Final = 300
"""More steps than any world here needs to come to rest once nothing fails any more."""

Identity: TypeAlias = tuple[NamespaceType, int]


class Standing(Enum):
    """What the journal says of an incarnation."""

    HALF_MADE = "half made"
    CREATED = "created"
    HANDED_OFF = "handed off"
    ENDED = "ended"


@dataclass(slots=True)
class Life:
    """One incarnation on the node, and its line in the journal."""

    incarnation: int
    request: NamespaceRequest
    standing: Standing = Standing.HALF_MADE
    response: NamespaceResponse | None = None
    identities: tuple[Identity, ...] = ()
    is_init_alive: bool = True
    is_populated: bool = False
    was_used: bool = False
    is_hung: bool = False


@dataclass(slots=True)
class Parcel:
    """A message on its way to a consumer, and the namespaces whose descriptors come with it."""

    message: Message
    identities: tuple[Identity, ...] = ()
    is_spoilt: bool = False


@dataclass(slots=True)
class Link:
    """One connection: both directions, both ends, and all that ever went over it."""

    number: int
    session: int
    """Which wish of which consumer it belongs to."""
    to_provider: deque[Message] = field(default_factory=deque)
    to_consumer: deque[Parcel] = field(default_factory=deque)
    is_accepted: bool = False
    has_provider: bool = True
    has_consumer: bool = True
    history: list[Spoken] = field(default_factory=list)
    actions: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Client:
    """One consumer's program, with at most one wish at a time."""

    session: int
    kernel: ConsumerKernel
    link: Link | None = None
    is_calling: bool = False
    is_serving_self: bool = False
    has_own: bool = False
    timers: set[Timer] = field(default_factory=set)
    outcomes: list[Effect] = field(default_factory=list)
    """What the caller was told: deliveries, refusals, ends."""
    parcel: Parcel | None = None
    """The message that is being fed to the kernel."""

    @property
    def is_done(self) -> bool:
        """Whether its caller may have another wish."""
        return self.kernel.state in _DONE and not self.kernel.owes_end


_DONE: Final = frozenset({ConsumerState.REFUSED, ConsumerState.FAILED, ConsumerState.ENDED})
_OBSERVED: Final = frozenset(
    {AllocationState.CREATED, AllocationState.HANDED_OFF, AllocationState.ENDED}
)

_EXPIRIES: Final[dict[Timer, Callable[[str], Event]]] = {
    Timer.READINESS: lambda name: on.ReadinessOverdue(),
    Timer.CLAIM: on.ClaimExpired,
    Timer.RELEASE: on.ReleaseOverdue,
    Timer.RETRY: on.RetryDue,
}
_CONSUMER_EXPIRIES: Final[dict[Timer, Callable[[], Event]]] = {
    Timer.ANSWER: on.AnswerOverdue,
    Timer.NOTICE: on.NoticeOverdue,
    Timer.REDIAL: on.NoticeDue,
}


class World:
    """
    A node with a provider, and its consumers.

    Args:
        clients: how many consumers there are.
        limits: the provider's.
    """

    def __init__(self, clients: int, limits: Limits | None = None) -> None:
        self.limits = limits
        self.clients: list[Client | None] = [None] * clients
        self.links: dict[int, Link] = {}
        self.lives: dict[str, Life] = {}
        self.remembered: list[str] = []
        self.can_open_descriptors = True
        self._numbers = itertools.count(1)
        # What the invariants are about.
        self.incarnations: dict[str, int] = {}
        self.ends: list[int] = []
        self.releases: list[int] = []
        self.handed: list[tuple[int, int]] = []
        self.hand_overs: list[tuple[int, tuple[Identity, ...]]] = []
        self.told: list[tuple[int, int]] = []
        self.pushed: list[tuple[int, int]] = []
        self._start()

    # --- The provider's program ----------------------------------------------------------------

    def _start(self) -> None:
        """Start a provider's program: it adopts what the journal and the node agree on."""
        self.provider: ProviderKernel | None = ProviderKernel(self.limits)
        self.timers: set[tuple[Timer, str]] = set()
        self.lanes: dict[str, deque[Effect]] = {}
        self.watched: set[str] = set()
        self.sightings: deque[on.AllocationEvent] = deque()
        self._events: deque[Event] = deque()
        self.provider.remember(self.remembered)
        for name, life in sorted(self.lives.items()):
            self.incarnations[name] = life.incarnation
            is_whole = life.is_init_alive and life.standing is not Standing.HALF_MADE
            if life.standing is Standing.ENDED or not is_whole or life.response is None:
                self.feed(on.RemainsFound(name, life.request))
            elif life.standing is Standing.CREATED:
                self.feed(on.CreatedAdopted(name, life.request, life.response))
            else:
                self.feed(on.HandedOffAdopted(name, life.request, life.response))

    def restart(self) -> None:
        """Start the provider's program again after it died."""
        self._start()

    def get_ready(self) -> None:
        self.feed(on.ProviderReady())

    def crash(self) -> None:
        """Kill the provider's program; the node goes on."""
        self.provider = None
        self.lanes.clear()
        self.sightings.clear()
        self.timers.clear()
        for link in self.links.values():
            self._shut_provider_end(link)

    @property
    def kernel(self) -> ProviderKernel:
        assert self.provider is not None
        return self.provider

    def feed(self, event: Event) -> None:
        """Give the provider an event, and what comes of its effects, as its driver does."""
        self._events.append(event)
        while self._events:
            before = self.kernel.states
            effects = self.kernel.receive(self._events.popleft())
            self._note_ends(before)
            for effect in effects:
                _PERFORMERS[type(effect)](self, effect)

    def _note_ends(self, before: dict[str, AllocationState]) -> None:
        for name, state in self.kernel.states.items():
            if state is AllocationState.ENDED and before.get(name) in LIVE:
                self.ends.append(self.incarnations[name])

    def _start_timer(self, effect: do.StartTimer) -> None:
        self.timers.add((effect.timer, effect.allocation_id))

    def _stop_timer(self, effect: do.StopTimer) -> None:
        self.timers.remove((effect.timer, effect.allocation_id))

    def _work_later(self, effect: do.CreateNamespaces | do.ReleaseNamespaces) -> None:
        if isinstance(effect, do.CreateNamespaces):
            name = effect.request.allocation_id
            self.incarnations[name] = next(self._numbers)
        else:
            name = effect.allocation_id
            if name in self.lives:
                self.lives[name].standing = Standing.ENDED
            self.watched.discard(name)
        self.lanes.setdefault(name, deque()).append(effect)

    def _watch(self, effect: do.Watch) -> None:
        name = effect.allocation_id
        life = self.lives[name]
        self.watched.add(name)
        if not life.is_init_alive:
            self.sightings.append(on.InitDied(name))
        self._see_population(name)

    def _record(self, effect: do.RecordHandoff) -> None:
        life = self.lives[effect.allocation_id]
        if life.standing is Standing.CREATED:
            life.standing = Standing.HANDED_OFF

    def _hand_over(self, effect: do.HandOver) -> None:
        link, name = self.links[effect.connection], effect.response.allocation_id
        life = self.lives[name]
        if not (life.is_init_alive and self.can_open_descriptors):
            failure = FdPassing("the descriptors cannot be had")
            self._send(link, Parcel(failure))
            self._events.append(on.ResponseNotSent(name, link.number, failure))
            return
        self._send(link, Parcel(effect.response, life.identities))
        self.handed.append((link.number, life.incarnation))
        self.hand_overs.append((life.incarnation, life.identities))
        self._events.append(on.ResponseSent(name, link.number))

    def _refuse(self, effect: do.Refuse) -> None:
        self._send(self.links[effect.connection], Parcel(effect.error))

    def _announce(self, effect: do.AnnounceEnd) -> None:
        link, name = self.links[effect.connection], effect.allocation_id
        unasked_before = len(always.told_unasked(link.history))
        self._send(link, Parcel(AllocationEnded(name)))
        if name in self.incarnations:
            item = (link.number, self.incarnations[name])
            self.told.append(item)
            if len(always.told_unasked(link.history)) > unasked_before:
                self.pushed.append(item)

    def _send(self, link: Link, parcel: Parcel) -> None:
        link.actions.append("sent")
        link.history.append(("sent", parcel.message))
        if link.has_provider and link.has_consumer:
            link.to_consumer.append(parcel)

    def _close(self, effect: do.CloseConnection) -> None:
        link = self.links[effect.connection]
        link.actions.append("closed")
        self._shut_provider_end(link)
        self._events.append(on.ConnectionLost(link.number, "closed"))

    def _shut_provider_end(self, link: Link) -> None:
        link.has_provider = False
        link.to_provider.clear()

    def expire(self, timer: Timer, name: str) -> None:
        self.timers.remove((timer, name))
        self.feed(_EXPIRIES[timer](name))

    def stop(self) -> None:
        self.feed(on.ProviderStopping())

    def listen_to(self, link: Link) -> None:
        """Let the provider take in one thing from a connection."""
        if not link.is_accepted:
            link.is_accepted = True
            self.feed(on.ConnectionOpened(link.number, 0))
        elif link.to_provider:
            message = link.to_provider.popleft()
            event = provider_event_of(link.number, message)
            is_readable = not isinstance(event, on.FrameRejected)
            link.history.append(("read", message if is_readable else None))
            self.feed(event)
        elif not link.has_consumer:
            self._shut_provider_end(link)
            self.feed(on.ConnectionLost(link.number, "closed by the consumer"))

    def has_news_for_provider(self, link: Link) -> bool:
        is_silent = link.is_accepted and not link.to_provider and link.has_consumer
        return self.provider is not None and link.has_provider and not is_silent

    # --- The node ------------------------------------------------------------------------------

    def work(self, name: str, *, is_able: bool = True) -> None:
        """Do the oldest piece of backend work for an allocation."""
        effect = self.lanes[name].popleft()
        if not self.lanes[name]:
            del self.lanes[name]
        if isinstance(effect, do.CreateNamespaces):
            self._create(effect.request, is_able)
        else:
            self._release(name)

    def begin_work(self, name: str) -> None:
        """Do half of a creation: what a crash would leave behind."""
        effect = self.lanes[name][0]
        if isinstance(effect, do.CreateNamespaces) and name not in self.lives:
            self.lives[name] = Life(self.incarnations[name], effect.request)

    def _create(self, request: NamespaceRequest, is_able: bool) -> None:
        name = request.allocation_id
        self.lives.pop(name, None)
        if not is_able:
            self.feed(on.NamespacesNotCreated(name, CreationFailed("unshare: unshare(2): ENOSPC")))
            return
        image = request.uenv_image
        path = None if image is None else mount_path_below("/run/pact/uenv", image)
        response = NamespaceResponse(name, request.namespaces, path)
        identities = tuple((kind, next(self._numbers)) for kind in request.namespaces)
        is_over = self.kernel.state_of(name) is AllocationState.ENDED
        standing = Standing.ENDED if is_over else Standing.CREATED
        life = Life(self.incarnations[name], request, standing, response, identities)
        self.lives[name] = life
        self.feed(on.NamespacesCreated(name, response))

    def _release(self, name: str) -> None:
        life = self.lives.get(name)
        if life is not None and life.is_hung:
            life.is_init_alive = False
            self.feed(on.ReleaseDelayed(name, "1 process does not die"))
            return
        if life is not None:
            del self.lives[name]
            self.releases.append(life.incarnation)
        self.sightings = deque(x for x in self.sightings if x.allocation_id != name)
        self.remembered.append(name)
        self.feed(on.NamespacesReleased(name))

    def populate(self, name: str, *, is_populated: bool) -> None:
        life = self.lives[name]
        life.is_populated = is_populated
        life.was_used |= is_populated
        self._see_population(name)

    def kill_init(self, name: str) -> None:
        self.lives[name].is_init_alive = False
        if self.provider is not None and name in self.watched:
            self.sightings.append(on.InitDied(name))

    def _see_population(self, name: str) -> None:
        life = self.lives[name]
        if self.provider is None or name not in self.watched:
            return
        if life.is_populated:
            self.sightings.append(on.ScopePopulated(name))
        elif life.was_used:
            self.sightings.append(on.ScopeEmptied(name))

    def observe(self) -> None:
        """Let the provider take in the oldest thing that the backend has seen."""
        event = self.sightings.popleft()
        name = event.allocation_id
        if name not in self.watched or self.kernel.state_of(name) not in _OBSERVED:
            return
        life = self.lives[name]
        # Emptied is decided from what is so now, never from the event alone.
        if isinstance(event, on.ScopeEmptied) and (life.is_populated or not life.was_used):
            return
        self.feed(event)

    # --- The consumers' programs ---------------------------------------------------------------

    def want(self, index: int, request: NamespaceRequest) -> None:
        """Let a caller want something, if its consumer is free."""
        self.tell(self._join(index, request), on.NamespacesWanted())

    def end_by_name(self, index: int, request: NamespaceRequest) -> None:
        """Let a caller end an allocation that it does not hold, if its consumer is free."""
        self.tell(self._join(index, request), on.EndWanted())

    def _join(self, index: int, request: NamespaceRequest) -> Client:
        client = Client(next(self._numbers), ConsumerKernel(request))
        self.clients[index] = client
        return client

    def tell(self, client: Client, event: Event) -> tuple[Effect, ...]:
        """Give a consumer an event, and perform its effects, as its driver does."""
        effects = client.kernel.receive(event)
        for effect in effects:
            self._perform(client, effect)
        return effects

    def _perform(self, client: Client, effect: Effect) -> None:
        match effect:
            case do.Connect():
                assert client.link is None
                client.is_calling = True
            case do.SendRequest(request=request):
                self._post(client, request)
            case do.SendEnd(allocation_id=name):
                self._post(client, AllocationEnded(name))
            case do.SendFault(reason=reason):
                self._post(client, FdPassing(reason))
            case do.CloseChannel():
                self._hang_up(client)
            case do.StartTimer(timer=timer):
                client.timers.add(timer)
            case do.StopTimer(timer=timer):
                client.timers.remove(timer)
            case do.ServeSelf():
                client.is_serving_self = True
            case do.ReleaseOwn():
                assert client.has_own
                client.has_own = False
            case do.DeliverDescriptors(is_degraded=is_degraded):
                client.outcomes.append(effect)
                if not is_degraded:
                    self._check_delivery(client, effect)
            case do.DiscardDescriptors():
                client.parcel = None
            case do.ReportRefusal(error=error):
                # That an end found nothing is no outcome of a request.
                if not (client.kernel.state is ConsumerState.ENDED and _is_not_found(error)):
                    client.outcomes.append(effect)
            case do.ReportEnd():
                client.outcomes.append(effect)
            case do.ReportFallback():
                pass
            case _:
                raise AssertionError(f"no consumer performs {effect}")

    def _check_delivery(self, client: Client, effect: do.DeliverDescriptors) -> None:
        parcel, client.parcel = client.parcel, None
        assert parcel is not None
        assert parcel.message == effect.response
        kinds = [kind for kind, _ in parcel.identities]
        always.require(
            always.response_answers_its_request(client.kernel.request, effect.response),
            always.descriptors_are_what_the_response_says(effect.response.fd_types, kinds),
        )

    def _post(self, client: Client, message: Message) -> None:
        link = client.link
        if link is not None and link.has_provider:
            link.to_provider.append(message)

    def _hang_up(self, client: Client) -> None:
        link, client.link = client.link, None
        if link is not None:
            link.has_consumer = False
            link.to_consumer.clear()

    def answer_call(self, client: Client) -> None:
        """Let a consumer's call get through, if there is anybody to be called."""
        client.is_calling = False
        if self.provider is None:
            self.tell(client, on.ProviderUnreachable(SocketUnavailable("connection refused")))
            return
        client.link = link = Link(next(self._numbers), client.session)
        self.links[link.number] = link
        self.tell(client, on.Connected())

    def hear(self, client: Client) -> None:
        """Let a consumer take in one thing from its connection."""
        link = client.link
        assert link is not None
        if not link.to_consumer:
            self._hang_up(client)
            self.tell(client, on.ConnectionLost(reason="closed by the provider"))
            return
        client.parcel = parcel = link.to_consumer.popleft()
        if parcel.is_spoilt:
            client.parcel = None
            self.tell(client, on.FrameRejected("descriptors were cut off"))
            return
        self.tell(client, consumer_event_of(client.kernel.request, parcel.message))
        if isinstance(parcel.message, NamespaceResponse):
            # Delivered or discarded, exactly one of the two.
            assert client.parcel is None

    def has_news_for(self, client: Client) -> bool:
        link = client.link
        return link is not None and bool(link.to_consumer or not link.has_provider)

    def serve_self(self, client: Client, *, is_able: bool) -> None:
        client.is_serving_self = False
        client.has_own = is_able
        request = client.kernel.request
        if is_able:
            response = NamespaceResponse(request.allocation_id, request.namespaces)
            self.tell(client, on.SelfServed(response))
        else:
            self.tell(client, on.SelfServiceFailed(CreationFailed("not allowed")))

    def end(self, client: Client) -> None:
        """Let a caller be done; whoever is still calling the provider stops doing so."""
        if client.kernel.state is ConsumerState.CONNECTING:
            client.is_calling = False
        self.tell(client, on.EndWanted())

    def expire_for(self, client: Client, timer: Timer) -> None:
        client.timers.remove(timer)
        self.tell(client, _CONSUMER_EXPIRIES[timer]())

    def drop(self, index: int) -> None:
        """Kill a consumer's program; what it made itself dies with it."""
        client = self.clients[index]
        if client is not None:
            self._hang_up(client)
            self.clients[index] = None

    @property
    def present(self) -> list[Client]:
        return [client for client in self.clients if client is not None]

    # --- Coming to rest ------------------------------------------------------------------------

    def settle(self) -> None:
        """
        Let nothing fail any more, and go on until nothing happens.

        Timers that only bound a wait do not expire; those that begin the next try do.
        """
        if self.provider is None:
            self.restart()
        self.can_open_descriptors = True
        for life in self.lives.values():
            life.is_hung = False
        assert self.go_on(STEPS_TO_REST_MAX) < STEPS_TO_REST_MAX, "it never comes to rest"

    def go_on(self, steps: int) -> int:
        """Do what is next to be done, as often as said or until there is nothing; count it."""
        for done in range(steps):
            step = next(self._next_steps(), None)
            if step is None:
                return done
            step()
            self.check()
        return steps

    def _next_steps(self) -> Iterator[Callable[[], object]]:
        for link in self.links.values():
            if self.has_news_for_provider(link):
                yield partial(self.listen_to, link)
        if self.provider is not None:
            yield from self._next_steps_of_provider()
        for client in self.present:
            yield from self._next_steps_of(client)

    def _next_steps_of_provider(self) -> Iterator[Callable[[], object]]:
        if self.kernel.service is ServiceState.STARTING:
            yield self.get_ready
        for name in self.lanes:
            yield partial(self.work, name)
        if self.sightings:
            yield self.observe
        for timer, name in sorted(self.timers, key=str):
            if timer is Timer.RETRY:
                yield partial(self.expire, timer, name)

    def _next_steps_of(self, client: Client) -> Iterator[Callable[[], object]]:
        if client.is_calling:
            yield partial(self.answer_call, client)
        if self.has_news_for(client):
            yield partial(self.hear, client)
        if client.is_serving_self:
            yield partial(self.serve_self, client, is_able=True)
        if Timer.REDIAL in client.timers:
            yield partial(self.expire_for, client, Timer.REDIAL)

    def clear(self) -> None:
        """Let everybody go and everything be claimed by nobody; afterwards nothing is left."""
        for index in range(len(self.clients)):
            self.drop(index)
        self.settle()
        for life in self.lives.values():
            life.is_populated = False
        for name in self.lives:
            self._see_population(name)
        self.settle()
        for timer, name in sorted(self.timers, key=str):
            if timer is Timer.CLAIM:
                self.expire(timer, name)
        self.settle()

    # --- What is always true, and what is true at rest -----------------------------------------

    def check(self) -> None:
        """Hold this moment to the invariants."""
        for link in self.links.values():
            self._check_link(link)
        for client in self.present:
            self._check_client(client)
        alive: dict[Hashable, tuple[Identity, ...]] = {
            life.incarnation: life.identities for life in self.lives.values()
        }
        always.require(
            always.allocations_are_isolated(alive),
            always.an_incarnation_is_one_set_of_namespaces(self.hand_overs),
            always.ended_at_most_once(self.ends),
            always.released_at_most_once(self.releases),
            always.released_only_after_its_end(self.releases, self._counting()),
            always.end_is_pushed_at_most_once(self.pushed),
            always.end_is_told_only_to_whom_it_concerns(self.pushed, self.handed),
            always.at_most_one_live_set(self._own(), self._in_debt(), self._provided()),
        )

    def check_at_rest(self) -> None:
        """Hold a world that has come to rest to what it must have come to."""
        self.check()
        always.require(
            always.every_holder_has_heard(self.handed, self.told, self._over(), self._open_links())
        )
        for link in self.links.values():
            if link.has_provider and link.has_consumer:
                always.require(always.every_message_is_answered(link.history))
        assert set(self.kernel.states.values()) <= {
            AllocationState.CREATED,
            AllocationState.HANDED_OFF,
        }
        assert set(self.lives) == set(self.kernel.states)
        for client in self.present:
            assert client.kernel.state in (*_DONE, ConsumerState.HELD, ConsumerState.SELF_HELD)
            assert not client.kernel.owes_end

    def check_cleared(self) -> None:
        """Hold a world that everybody left to having nothing left."""
        assert self.kernel.states == {}
        assert self.lives == {}
        assert self.timers == set()

    def _check_link(self, link: Link) -> None:
        always.require(
            always.answers_come_in_order(link.history, is_closed="closed" in link.actions),
            always.nothing_follows_a_close(link.actions),
        )

    def _check_client(self, client: Client) -> None:
        kernel = client.kernel
        assert kernel.is_connected == (client.link is not None)
        # A connection is only kept for something that is still expected on it.
        if kernel.is_connected:
            is_expecting = kernel.state in (ConsumerState.ASKING, ConsumerState.HELD)
            assert is_expecting or kernel.notice is NoticeState.TOLD
        deliveries = [x for x in client.outcomes if isinstance(x, do.DeliverDescriptors)]
        refusals = [x for x in client.outcomes if isinstance(x, do.ReportRefusal)]
        ends = [x for x in client.outcomes if isinstance(x, do.ReportEnd)]
        # One outcome, and at most one end.
        assert len(deliveries) + len(refusals) <= 1
        assert len(ends) <= 1

    def _counting(self) -> list[int]:
        return [self.incarnations[name] for name in self._counting_names()]

    def _over(self) -> set[int]:
        return set(self.ends) | set(self.releases)

    def _open_links(self) -> list[int]:
        return [x.number for x in self.links.values() if x.has_provider and x.has_consumer]

    def _own(self) -> list[tuple[int, str]]:
        return [
            (client.session, client.kernel.request.allocation_id)
            for client in self.present
            if client.has_own or client.is_serving_self
        ]

    def _in_debt(self) -> list[int]:
        return [client.session for client in self.present if client.kernel.owes_end]

    def _provided(self) -> set[tuple[int, str]]:
        """Find what is alive, or asked for and not taken back, at the wish of each session."""
        if self.provider is None:
            return set()
        counting = {self.incarnations[name]: name for name in self._counting_names()}
        found: set[tuple[int, str]] = set()
        for link in self.links.values():
            coming = [*always.unanswered(link.history), *link.to_provider]
            coming = coming if link.has_provider else []
            names = [x.allocation_id for x in coming if isinstance(x, NamespaceRequest)]
            names += [counting[i] for c, i in self.handed if c == link.number and i in counting]
            # What was handed over on a connection that is lost is alive all the same.
            found |= {(link.session, name) for name in names} - {
                (link.session, x.allocation_id) for x in coming if isinstance(x, AllocationEnded)
            }
        return found

    def _counting_names(self) -> list[str]:
        if self.provider is None:
            return []
        return [n for n, s in self.provider.states.items() if s in LIVE]


def _is_not_found(error: NamespaceError) -> bool:
    return isinstance(error, AllocationNotFound)


_PERFORMERS: Final[dict[type[Effect], Callable[[World, Any], None]]] = {
    do.StartTimer: World._start_timer,
    do.StopTimer: World._stop_timer,
    do.CreateNamespaces: World._work_later,
    do.ReleaseNamespaces: World._work_later,
    do.Watch: World._watch,
    do.RecordHandoff: World._record,
    do.HandOver: World._hand_over,
    do.Refuse: World._refuse,
    do.AnnounceEnd: World._announce,
    do.CloseConnection: World._close,
}
