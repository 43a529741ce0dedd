"""
The golden cases about time: what a provider and a consumer do next, event by event.

The lives are found by walking the kernels: breadth first, so that whatever can happen happens in as
few events as possible, and at length with a fixed generator of numbers. A driver and a backend that
keep their word are simulated, so that no life is one that cannot be. Nothing of the model is used:
the tests hold these cases to it.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Final, TypeAlias

from specs._build.golden.wire import VectorCase
from statemachine import effects as do
from statemachine import events as on
from statemachine.consumer import ConsumerKernel
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
from statemachine.states import ServiceState
from statemachine.messages import NamespaceRequest, NamespaceResponse, NamespaceType
from statemachine.provider import Limits, ProviderKernel
from statemachine.snapshots import ConsumerSnapshot, ProviderSnapshot
from transport.trace import encode_effect, encode_event

PID, NET, MOUNT = NamespaceType
REASON: Final = "it did not work"

EventScript: TypeAlias = Sequence[Event]


def request_for(name: str, *types: NamespaceType) -> NamespaceRequest:
    """Ask for namespaces, by default a PID namespace."""
    return NamespaceRequest(name, types or (PID,))


def response_to(request: NamespaceRequest) -> NamespaceResponse:
    """Make the response to a request."""
    path = request.uenv_image and f"/run/pact/uenv/{request.uenv_image.removesuffix('.sqfs')}"
    return NamespaceResponse(request.allocation_id, request.namespaces, path)


def plain_effect(effect: Effect) -> Any:
    """Write an effect; the text of a reason, which no contract prescribes, as null."""
    ((name, content),) = encode_effect(effect).items()
    if "reason" in content:
        content["reason"] = None
    error = content.get("error")
    if error is not None and "AllocationNotFound" not in error:
        content["error"] = dict.fromkeys(error)
    return {name: content}


# --- The provider: a world around it -------------------------------------------------------------

_EXPIRES: Final = {
    Timer.READINESS: lambda name: on.ReadinessOverdue(),
    Timer.CLAIM: on.ClaimExpired,
    Timer.RELEASE: on.ReleaseOverdue,
    Timer.RETRY: on.RetryDue,
}


@dataclass(frozen=True, slots=True)
class DrivenProvider:
    """A provider's kernel, and what its driver and its backend have under way."""

    kernel: ProviderSnapshot
    open: frozenset[int] = frozenset()
    read_closed: frozenset[int] = frozenset()
    """Connections that are not read from any more: closed, or to be closed in their turn."""
    creating: tuple[NamespaceRequest, ...] = ()
    releasing: tuple[str, ...] = ()
    handing: tuple[tuple[int, str], ...] = ()
    """Responses on their way, oldest first."""
    timers: frozenset[tuple[Timer, str]] = frozenset()
    alive: frozenset[str] = frozenset()
    """What is watched."""
    used: frozenset[str] = frozenset()

    def after(
        self, event: Event, kernel: ProviderSnapshot, effects: Iterable[Effect]
    ) -> DrivenProvider:
        """Say what is under way after an event."""
        world = _reported(replace(self, kernel=kernel), event)
        for effect in effects:
            world = _begun(world, effect)
        return world


def _reported(world: DrivenProvider, event: Event) -> DrivenProvider:
    match event:
        case on.ConnectionOpened(connection=c):
            return replace(world, open=world.open | {c})
        case on.ConnectionLost(connection=c):
            left = tuple(h for h in world.handing if h[0] != c)
            return replace(world, open=world.open - {c}, read_closed=world.read_closed - {c}, handing=left)
        case on.FrameRejected(connection=c):
            return replace(world, read_closed=world.read_closed | {c})
        case on.NamespacesCreated() | on.NamespacesNotCreated():
            left_to_make = tuple(
                r for r in world.creating if r.allocation_id != event.allocation_id
            )
            return replace(world, creating=left_to_make)
        case on.ResponseSent() | on.ResponseNotSent():
            return replace(world, handing=world.handing[1:])
        case on.NamespacesReleased(allocation_id=name):
            return replace(
                world,
                releasing=_without(world.releasing, name),
                alive=world.alive - {name},
                used=world.used - {name},
            )
        case on.ReleaseDelayed(allocation_id=name):
            return replace(world, releasing=_without(world.releasing, name))
        case on.ScopePopulated(allocation_id=name):
            return replace(world, used=world.used | {name})
        case _:
            over = {(timer, name) for timer, name in world.timers if _EXPIRES[timer](name) == event}
            return replace(world, timers=world.timers - over)


def _begun(world: DrivenProvider, effect: Effect) -> DrivenProvider:
    match effect:
        case do.CreateNamespaces(request=request):
            return replace(world, creating=(*world.creating, request))
        case do.ReleaseNamespaces(allocation_id=name):
            return replace(world, releasing=(*world.releasing, name))
        case do.HandOver(connection=c, response=response):
            return replace(world, handing=(*world.handing, (c, response.allocation_id)))
        case do.Watch(allocation_id=name):
            return replace(world, alive=world.alive | {name})
        case do.StartTimer(timer=timer, allocation_id=name):
            return replace(world, timers=world.timers | {(timer, name)})
        case do.StopTimer(timer=timer, allocation_id=name):
            return replace(world, timers=world.timers - {(timer, name)})
        case do.CloseConnection(connection=c):
            return replace(world, read_closed=world.read_closed | {c})
        case _:
            return world


def _without(names: tuple[str, ...], name: str) -> tuple[str, ...]:
    return tuple(other for other in names if other != name)


@dataclass(frozen=True, slots=True)
class Cast:
    """Who may do what to a provider."""

    connections: tuple[tuple[int, int], ...]
    """Each with its user."""
    requests: tuple[NamespaceRequest, ...]
    adoptions: tuple[Event, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Every allocation that is asked for."""
        return tuple(dict.fromkeys(request.allocation_id for request in self.requests))


def possible(cast: Cast, world: DrivenProvider, kernel: ProviderKernel) -> Iterator[Event]:
    """Yield what can happen next."""
    for c, uid in cast.connections:
        if c not in world.open:
            yield on.ConnectionOpened(c, uid)
            continue
        yield on.ConnectionLost(c, "the peer closed the connection")
        if c not in world.read_closed:
            yield from (on.RequestReceived(c, request) for request in cast.requests)
            yield from (on.EndReceived(c, name) for name in cast.names)
            yield on.FrameRejected("not a message", c)
    if kernel.service is ServiceState.STARTING:
        yield on.ProviderReady()
        for adoption in cast.adoptions:
            if isinstance(adoption, on.AllocationEvent):
                state = kernel.state_of(adoption.allocation_id).value
                if state in ("unknown", "released"):
                    yield adoption
    if not kernel.service.is_stopping:
        yield on.ProviderStopping()
    yield from _of_the_driver(world)
    for name, state in kernel.states.items():
        yield from _of_the_machine(world, name, state.value)


def _of_the_driver(world: DrivenProvider) -> Iterator[Event]:
    if world.handing:
        c, name = world.handing[0]
        yield on.ResponseSent(name, c)
        yield on.ResponseNotSent(name, c, FdPassing(REASON))
    for timer, name in sorted(world.timers, key=str):
        is_due = timer is not Timer.RELEASE or all(n != name for _, n in world.handing)
        if is_due:
            yield _EXPIRES[timer](name)


def _of_the_machine(world: DrivenProvider, name: str, state: str) -> Iterator[Event]:
    yield on.ReleaseRequested(name)
    creating = {request.allocation_id: request for request in world.creating}
    if name in creating:
        yield on.NamespacesCreated(name, response_to(creating[name]))
        yield on.NamespacesNotCreated(name, CreationFailed(REASON))
        return
    if name in world.releasing and all(n != name for _, n in world.handing):
        yield on.NamespacesReleased(name)
        yield on.ReleaseDelayed(name, "a process is in uninterruptible sleep")
    if name in world.alive:
        yield on.ScopePopulated(name)
        yield on.InitDied(name)
        if name in world.used:
            yield on.ScopeEmptied(name)


def take(world: DrivenProvider, event: Event, limits: Limits) -> tuple[DrivenProvider, tuple[Effect, ...]]:
    """Let something happen."""
    kernel = ProviderKernel.restore(world.kernel, limits)
    effects = kernel.receive(event)
    return world.after(event, kernel.snapshot(), effects), effects


# --- The provider: lives -------------------------------------------------------------------------

STEPS_MAX: Final = 14_000
"""Where the breadth-first search stops: no step is new any more that is not longer only."""

_ADOPTABLE: Final = request_for("a")

_SMALL: Final = Cast(
    connections=((1, 0), (2, 0)),
    requests=(request_for("a"), request_for("a", NET, MOUNT), request_for("a", PID, PID)),
    adoptions=(
        on.CreatedAdopted("a", _ADOPTABLE, response_to(_ADOPTABLE)),
        on.HandedOffAdopted("a", _ADOPTABLE, response_to(_ADOPTABLE)),
        on.RemainsFound("a", _ADOPTABLE),
    ),
)


def shortest_lives() -> Iterator[tuple[str, EventScript]]:
    """Yield for every kind of step that a provider takes the shortest life with it."""
    limits = Limits()
    start = DrivenProvider(ProviderKernel(limits).snapshot())
    lives: dict[DrivenProvider, tuple[Event, ...]] = {start: ()}
    queue, seen, steps = deque([start]), set(), 0
    while queue and steps < STEPS_MAX:
        world = queue.popleft()
        kernel = ProviderKernel.restore(world.kernel, limits)
        before = kernel.state_of("a").value
        for event in possible(_SMALL, world, kernel):
            if isinstance(event, on.ConnectionOpened) and event.connection > len(world.open) + 1:
                continue
            steps += 1
            after, effects = take(world, event, limits)
            life = (*lives[world], event)
            kind = (type(event), kernel.service, before, tuple(map(_kind_of, effects)))
            if kind not in seen:
                seen.add(kind)
                yield f"step-{kernel.service.value}-{before}-{type(event).__name__}", life
            if after not in lives:
                lives[after] = life
                queue.append(after)


def _kind_of(effect: Effect) -> tuple[object, ...]:
    error = getattr(effect, "error", None)
    timer = getattr(effect, "timer", None)
    return (type(effect), getattr(effect, "connection", None), type(error), timer)


WALKS: Final = 30
WALK_EVENTS: Final = 32

_LARGE: Final = Cast(
    connections=((1, 0), (2, 0), (3, 1000)),
    requests=(
        request_for("a"),
        request_for("a", NET),
        request_for("b", MOUNT, PID, NET),
        NamespaceRequest("c", (MOUNT,), "pytorch-2.5.sqfs"),
        NamespaceRequest("c", (), "pytorch-2.5.sqfs"),
    ),
    adoptions=(
        on.CreatedAdopted("a", _ADOPTABLE, response_to(_ADOPTABLE)),
        on.HandedOffAdopted("a", _ADOPTABLE, response_to(_ADOPTABLE)),
        on.RemainsFound("b", request_for("b", MOUNT, PID, NET)),
    ),
)
_LIMITS: Final = (
    Limits(allowed_uids=frozenset({0, 1000})),
    Limits(),
    Limits(frozenset({0, 1000}), 2, allocations_per_uid=2, connections_per_uid=1, remembered=1),
)


def long_lives() -> Iterator[tuple[str, Limits, EventScript]]:
    """
    Yield lives in which much happens at once, under three sets of limits in turn.

    The limits on unanswered messages have lives of their own, in `_lives_at_limits`.
    """
    for number in range(WALKS):
        limits = _LIMITS[number % len(_LIMITS)]
        draw = _numbers_from(number)
        world, life = DrivenProvider(ProviderKernel(limits).snapshot()), []
        for _ in range(WALK_EVENTS):
            kernel = ProviderKernel.restore(world.kernel, limits)
            event = _drawn([*possible(_LARGE, world, kernel)], draw)
            world, _ = take(world, event, limits)
            life.append(event)
        yield f"long-{number:03d}", limits, life


def _drawn(events: Sequence[Event], draw: Callable[[int], int]) -> Event:
    """Draw a kind of event, then one of its kind; what ends everything comes seldom."""
    kinds = dict.fromkeys(type(event) for event in events)
    rare = (on.ProviderStopping, on.ConnectionLost, on.FrameRejected, on.ReadinessOverdue)
    common = [kind for kind in kinds if kind not in rare] or [*kinds]
    kind = [*kinds][draw(len(kinds))] if draw(5) == 0 else common[draw(len(common))]
    alike = [event for event in events if type(event) is kind]
    return alike[draw(len(alike))]


def _numbers_from(seed: int) -> Callable[[int], int]:
    """Make a linear congruential generator: the same numbers on every machine, for ever."""
    state = seed * 2_654_435_761 + 12_345

    def draw(count: int) -> int:
        nonlocal state
        state = (state * 6_364_136_223_846_793_005 + 1_442_695_040_888_963_407) % (1 << 64)
        return (state >> 33) % count

    return draw


ToldLife: TypeAlias = tuple[str, Limits, tuple[str, ...], EventScript]
"""A name; the limits and the remembered names that a provider starts with; and what happens to it."""

_A: Final = request_for("a")
_B: Final = request_for("b", NET)
_READY: Final = (on.ConnectionOpened(1, 0), on.ProviderReady())


def told_lives() -> Iterator[ToldLife]:
    """Yield lives written by hand: limits, order of answers, restarts, memory."""
    for lives in (_whole_lives(), _lives_in_order(), _lives_with_ends(), _lives_with_timers()):
        yield from ((name, Limits(), (), (*_READY, *life)) for name, life in lives.items())
    yield from _lives_that_remember()
    yield from _lives_at_limits()
    yield from _lives_that_stop()


def _alive(c: int, request: NamespaceRequest) -> tuple[Event, ...]:
    name = request.allocation_id
    return (
        on.RequestReceived(c, request),
        on.NamespacesCreated(name, response_to(request)),
        on.ResponseSent(name, c),
    )


def _dead(c: int, name: str) -> tuple[Event, ...]:
    return (on.EndReceived(c, name), on.NamespacesReleased(name))


def _emptied(name: str) -> tuple[Event, ...]:
    return (on.ScopeEmptied(name), on.NamespacesReleased(name))


def _whole_lives() -> dict[str, EventScript]:
    return {
        "whole-life": (*_alive(1, _A), on.ScopePopulated("a"), *_emptied("a")),
        "second-incarnation": (*_alive(1, _A), *_dead(1, "a"), *_alive(1, _A)),
    }


def _lives_in_order() -> dict[str, EventScript]:
    """Tell lives with more than one answer to give: each waits for its turn."""
    return {
        "answers-keep-their-order": (
            on.RequestReceived(1, _A),
            on.RequestReceived(1, _B),
            on.EndReceived(1, "never"),
            on.NamespacesCreated("b", response_to(_B)),
            on.NamespacesCreated("a", response_to(_A)),
        ),
        "the-unreadable-waits-for-its-turn": (
            on.RequestReceived(1, _A),
            on.FrameRejected("not a message", 1),
            on.NamespacesCreated("a", response_to(_A)),
            on.ResponseSent("a", 1),
            on.ConnectionLost(1),
        ),
    }


def _lives_with_ends() -> dict[str, EventScript]:
    """Tell lives with ends that cross, that are told to several, and that others wait for."""
    return {
        "ends-cross": (
            *_alive(1, _A),
            on.ScopePopulated("a"),
            *_emptied("a"),
            on.EndReceived(1, "a"),
            on.EndReceived(1, "a"),
        ),
        "all-that-hold-it-are-told": (
            on.ConnectionOpened(2, 0),
            on.ConnectionOpened(3, 0),
            *_alive(1, _A),
            on.RequestReceived(2, _A),
            on.ResponseSent("a", 2),
            *_dead(3, "a"),
        ),
        "early-requests-are-served-by-the-next": (
            on.ConnectionOpened(2, 0),
            *_alive(1, _A),
            on.EndReceived(1, "a"),
            on.RequestReceived(2, _A),
            on.RequestReceived(1, request_for("a", NET)),
            on.NamespacesReleased("a"),
            on.NamespacesCreated("a", response_to(_A)),
        ),
    }


def _lives_with_timers() -> dict[str, EventScript]:
    """Tell lives in which something takes longer than its timer."""
    return {
        "a-drain-is-announced-and-goes-on": (
            *_alive(1, _A),
            on.EndReceived(1, "a"),
            on.RequestReceived(1, _A),
            on.ReleaseDelayed("a", "a process is in uninterruptible sleep"),
            on.RetryDue("a"),
            on.ReleaseOverdue("a"),
            on.EndReceived(1, "a"),
            on.RequestReceived(1, _A),
            on.ReleaseDelayed("a", "a process is in uninterruptible sleep"),
            on.RetryDue("a"),
            on.NamespacesReleased("a"),
            *_alive(1, _A),
        ),
        "unclaimed": (
            *_alive(1, _A),
            on.ConnectionLost(1),
            on.ConnectionOpened(2, 0),
            on.RequestReceived(2, _A),
            on.ResponseSent("a", 2),
            on.ConnectionLost(2),
            on.ClaimExpired("a"),
            on.NamespacesReleased("a"),
        ),
    }


def _lives_that_remember() -> Iterator[ToldLife]:
    adopted = on.HandedOffAdopted("a", _A, response_to(_A))
    again = (
        adopted,
        on.RemainsFound("b", _B),
        on.ConnectionOpened(1, 0),
        on.RequestReceived(1, _A),
        on.EndReceived(1, "old"),
        on.ProviderReady(),
        on.ResponseSent("a", 1),
        on.NamespacesReleased("b"),
        on.EndReceived(1, "b"),
        on.EndReceived(1, "never"),
    )
    yield "adopted-and-handed-over-again", Limits(), ("old",), again
    few, ends = Limits(remembered=2), [on.EndReceived(1, name) for name in "123a"]
    life = (*_READY, *ends[:3], *_alive(1, _A), *_dead(1, "a"), *ends)
    yield "memory-is-bounded", few, ("1", "2", "3"), life


def _lives_at_limits() -> Iterator[ToldLife]:
    yield "another-user", Limits(), (), (*_READY, on.ConnectionOpened(2, 1000), on.ConnectionLost(2))
    opened = [on.ConnectionOpened(c, 0) for c in (2, 3)]
    most = Limits(connections_per_uid=2)
    life = (*_READY, *opened, on.ConnectionLost(3), on.ConnectionLost(1), on.ConnectionOpened(4, 0))
    yield "limit-connections-per-uid", most, (), life
    most = Limits(waiting=2)
    waiting = [on.RequestReceived(1, request_for(name)) for name in "abc"]
    yield "limit-waiting", most, (), (on.ConnectionOpened(1, 0), *waiting, on.ProviderReady())
    life = (_READY[0], *waiting, on.ReadinessOverdue(), *waiting, on.ProviderReady())
    yield "limit-waiting-and-time", most, (), life
    most = Limits(allocations_per_uid=1)
    made = on.NamespacesCreated("a", response_to(_A))
    asked = [on.RequestReceived(1, _A), on.RequestReceived(1, _B), on.RequestReceived(1, _A)]
    sent, ended = on.ResponseSent("a", 1), on.EndReceived(1, "a")
    gone = (sent, sent, ended, on.NamespacesReleased("a"), on.RequestReceived(1, _B))
    yield "limit-allocations-per-uid", most, (), (*_READY, *asked, made, *gone)
    most = Limits(open_per_connection=2)
    many = [on.RequestReceived(1, request_for(name)) for name in "abcde"]
    for count in range(1, 6):
        yield f"limit-open-per-connection-{count}", most, (), (*_READY, *many[:count], made)
    most = Limits(open_per_uid=2)
    other = on.ConnectionOpened(2, 0)
    more = [
        on.RequestReceived(c, request_for(n)) for c, n in zip((1, 2, 2, 1), "abcd", strict=True)
    ]
    yield "limit-open-per-uid", most, (), (*_READY, other, *more, made, on.ConnectionLost(2))


def _lives_that_stop() -> Iterator[ToldLife]:
    waiting = [on.RequestReceived(1, request_for(name)) for name in "abc"]
    made = on.NamespacesCreated("a", response_to(_A))
    life = (*_READY, on.ProviderStopping(), on.RequestReceived(1, _A), on.EndReceived(1, "a"))
    yield "stopping", Limits(), (), life
    life = (on.ConnectionOpened(1, 0), *waiting, on.ProviderStopping(), on.EndReceived(1, "a"))
    yield "stopping-before-it-was-ready", Limits(), (), life
    yield "a-granted-response-is-overtaken", Limits(), (), (
        *_READY, on.RequestReceived(1, _B), on.RequestReceived(1, _A), made,
        on.ScopeEmptied("a"), on.NamespacesReleased("a"),
        on.NamespacesCreated("b", response_to(_B)),
    )  # fmt: skip
    few = Limits(open_per_connection=1, open_per_uid=3)
    begins: dict[str, EventScript] = {
        "starting": (),
        "ready": (on.ProviderReady(),),
        "stopping": (on.ProviderReady(), on.RequestReceived(1, _A), on.ProviderStopping()),
        "aborted": (on.ProviderStopping(),),
    }
    for state, begin in begins.items():
        names = {"stopping": "ab", "aborted": "a"}.get(state, "abc")
        asked = [on.RequestReceived(1, request_for(name)) for name in names]
        life = (on.ConnectionOpened(1, 0), *begin, on.ConnectionOpened(2, 1000), *asked)
        yield f"limits-while-{state}", few, (), life
    # What is left over on a closed connection counts for its user until the connection is lost.
    opened = (on.ConnectionOpened(1, 0), on.ConnectionOpened(2, 0))
    flood = (on.RequestReceived(1, request_for(name)) for name in "abc")
    life = (*opened, *flood, on.ProviderStopping(), on.RequestReceived(2, _A))
    yield "over-a-limit-while-aborted", few, (), life


def provider() -> Iterator[VectorCase]:
    """Yield a provider's lives."""
    for name, limits, remembered, life in told_lives():
        yield _provider_case(f"told-{name}", limits, remembered, life)
    for name, life in shortest_lives():
        yield _provider_case(f"{name}-{_print_of(life)}", Limits(), (), life)
    for name, limits, life in long_lives():
        yield _provider_case(name, limits, (), life)


def _print_of(life: EventScript) -> str:
    """Tell lives apart by what is in them, so that a case keeps its name when others come."""
    events = json.dumps([encode_event(event) for event in life])
    return hashlib.sha256(events.encode()).hexdigest()[:8]


def _provider_case(name: str, limits: Limits, remembered: Sequence[str], life: EventScript) -> VectorCase:
    kernel = ProviderKernel(limits)
    kernel.remember(remembered)
    names = dict.fromkeys(remembered)
    steps = []
    for event in life:
        effects = [plain_effect(effect) for effect in kernel.receive(event)]
        names |= dict.fromkeys(filter(None, [_named_by(event)]))
        states = {each: kernel.state_of(each).value for each in sorted(names)}
        steps.append({"event": encode_event(event), "effects": effects, "states": states})
    plain = Limits()
    differing = {
        field.name: getattr(limits, field.name)
        for field in fields(limits)
        if getattr(limits, field.name) != getattr(plain, field.name)
    }
    if "allowed_uids" in differing:
        differing["allowed_uids"] = sorted(differing["allowed_uids"])
    return {
        "id": f"provider/{name}",
        "limits": differing,
        "remembered": [*remembered],
        "steps": steps,
    }


def _named_by(event: Event) -> str | None:
    if isinstance(event, on.RequestReceived):
        return event.request.allocation_id
    name: str | None = getattr(event, "allocation_id", None)
    return name


# --- The consumer --------------------------------------------------------------------------------

_WANTED: Final = NamespaceRequest("a", (PID, MOUNT), "pytorch.sqfs")
_GIVEN: Final = response_to(_WANTED)

_CONSUMER_EVENTS: Final[tuple[Event, ...]] = (
    on.NamespacesWanted(),
    on.Connected(),
    on.ProviderUnreachable(SocketUnavailable(REASON)),
    on.ResponseReceived(_GIVEN),
    on.ResponseMismatched(REASON),
    on.CreationRefused(CreationFailed(REASON)),
    on.NotFoundReceived(AllocationNotFound("a")),
    on.ProviderUnavailable(SocketUnavailable(REASON)),
    on.PassingFailed(FdPassing(REASON)),
    on.FrameRejected(REASON),
    on.EndAnnounced(),
    on.ConnectionLost(0, REASON),
    on.AnswerOverdue(),
    on.SelfServed(_GIVEN),
    on.SelfServiceFailed(CreationFailed(REASON)),
    on.EndWanted(),
    on.NoticeOverdue(),
    on.NoticeDue(),
)


def consumer() -> Iterator[VectorCase]:
    """Yield for every step that a consumer can take the shortest life that ends with it."""
    start = ConsumerKernel(_WANTED).snapshot()
    lives: dict[ConsumerSnapshot, tuple[Event, ...]] = {start: ()}
    queue = deque([start])
    while queue:
        snapshot = queue.popleft()
        for event in _CONSUMER_EVENTS:
            kernel = ConsumerKernel.restore(snapshot)
            where = f"{kernel.state.value}-{kernel.notice.value}"
            if kernel.is_connected:
                where += "-connected"
            life = (*lives[snapshot], event)
            try:
                kernel.receive(event)
            except RemoteProtocolError:
                if not kernel.is_connected:
                    continue
            except ProtocolError:
                continue
            yield _consumer_case(f"{where}-{type(event).__name__}", life)
            if kernel.snapshot() not in lives:
                lives[kernel.snapshot()] = life
                queue.append(kernel.snapshot())


def _consumer_case(name: str, life: EventScript) -> VectorCase:
    kernel = ConsumerKernel(_WANTED)
    steps = []
    for event in life:
        effects: list[Any] | None
        try:
            effects = [plain_effect(effect) for effect in kernel.receive(event)]
        except RemoteProtocolError:
            effects = None
        steps.append(
            {
                "event": encode_event(event),
                "effects": effects,
                "state": kernel.state.value,
                "notice": kernel.notice.value,
            }
        )
    request = {
        "allocation_id": _WANTED.allocation_id,
        "namespaces": [kind.value for kind in _WANTED.namespaces],
        "uenv_image": _WANTED.uenv_image,
    }
    return {"id": f"consumer/{name}", "request": request, "steps": steps}
