"""Every state of a provider's kernel in an open environment, as `specs/spin/handoff.pml` has it.

The environment feeds every event that can be, in any order: no driver, no node and no peer says
which comes next. What it keeps to is written at the head of the Promela file; the rest the kernel
refuses by its rows and guards. Nothing here is made from that file, nor it from this: the two are
compared by what they reach.

    found = search(OpenEnvironment(allocations=1, connections=2, messages=2))
    len(found), found.script_of(found.number_of(line))

A line of text says what of a state counts; the Promela program prints the same if it is compiled
with `-DDUMP`. A kernel keeps more than that, such as who asked for what has ended. `search` follows
one state of each line; `search_all` follows every state, and checks that those of one line are
followed by the same lines, so that one is as good as another.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

from .. import events as on
from ..effects import CreateNamespaces, Effect, HandOver, Timer
from ..errors import (
    AllocationNotFound,
    CreationFailed,
    FdPassing,
    LocalProtocolError,
    SocketUnavailable,
)
from ..events import ProviderInput
from ..messages import AllocationEnded, NamespaceRequest, NamespaceResponse, NamespaceType
from ..provider import Limits, ProviderKernel
from ..snapshots import AllocationSnapshot, ConnectionSnapshot, MessageSnapshot, ProviderSnapshot
from ..states import AllocationState, MessageState, ServiceState
from .kit import Reached

NAMES: Final = "ab"
FIRST: Final = {name: NamespaceRequest(name, (NamespaceType.NET,)) for name in NAMES}
OTHER: Final = {name: NamespaceRequest(name, ()) for name in NAMES}
"""Two different requests for each name."""

WITH_IMAGE: Final = {
    name: NamespaceRequest(name, (NamespaceType.MOUNT,), "an image.sqfs") for name in NAMES
}
REFUSED: Final = {
    name: NamespaceRequest(name, (NamespaceType.NET,), "an image.sqfs") for name in NAMES
}
"""An image, and no mount namespace to see it in."""

REFUSED_UID: Final = 9


class OpenEnvironment(NamedTuple):
    """What the environment has, and which of its parts."""

    allocations: int
    connections: int
    messages: int
    """Most unanswered messages of a connection and hand-overs to it that are not reported."""
    readiness: bool = False
    """Whether the provider starts and stops; else it is ready, and stays so."""
    crash: bool = False
    """Whether the provider may die at any moment. The next one is told what the journal says."""
    limits: Limits | None = None
    """Limits of the provider, for two users; None: those by default, which none comes near."""
    images: bool = False
    """Whether the second request for a name is for an image; else it is for no namespaces."""
    refusals: bool = False
    """Whether a user connects who may not, and requests come that no provider may grant."""

    @property
    def names(self) -> str:
        return NAMES[: self.allocations]

    @property
    def numbers(self) -> range:
        return range(self.connections)

    def requests(self, name: str) -> tuple[NamespaceRequest, NamespaceRequest]:
        """The two requests for a name that can be granted."""
        return FIRST[name], WITH_IMAGE[name] if self.images else OTHER[name]


class LeftBehind(NamedTuple):
    """What the journal says of an allocation, from the death of a provider to its adoption."""

    state: AllocationState
    request: NamespaceRequest | None


class OpenState(NamedTuple):
    """Where kernel and environment stand."""

    kernel: ProviderSnapshot
    unreported: tuple[tuple[str, int], ...]
    """Hand-overs that the driver has not reported: of which allocation, to which connection."""
    left: tuple[tuple[str, LeftBehind], ...]


class ReachedLines(Reached[str, ProviderInput | None]):
    """The lines that can be reached, and by which event; None: the provider died."""

    def __init__(self, environment: OpenEnvironment) -> None:
        super().__init__()
        self.environment = environment
        self.events: Final = tuple(events_of(environment))
        self.states = 0
        """How many states of the kernel were followed."""


def search(environment: OpenEnvironment) -> ReachedLines:
    """
    Find every line, breadth first, from one state of each.

    Raises:
        AssertionError: a kernel made a second set of namespaces for a name.
    """
    found, start = ReachedLines(environment), first_state(environment)
    found.arrive(line_of(environment, start))
    waiting = deque([start])
    for number in found.in_order():
        found.states += 1
        for event, after in _steps(environment, found.events, waiting.popleft()):
            line = line_of(environment, after)
            if line not in found:
                found.arrive(line, number, event)
                waiting.append(after)
    return found


def search_all(environment: OpenEnvironment) -> ReachedLines:
    """
    Find every line from every state, and compare what follows those of the same line.

    Raises:
        AssertionError: two states of one line are followed by different lines, or as `search`.
    """
    found = ReachedLines(environment)
    states: Reached[OpenState, None] = Reached()
    states.arrive(first_state(environment))
    followed: dict[str, frozenset[str]] = {}
    for number in states.in_order():
        state = states.nodes[number]
        line = line_of(environment, state)
        here = found.arrive(line)
        # A step that changes nothing of the line may be possible in one state only.
        lines = {line}
        for event, after in _steps(environment, found.events, state):
            lines.add(line_of(environment, after))
            found.arrive(line_of(environment, after), here, event)
            states.arrive(after)
        first = followed.setdefault(line, frozenset(lines))
        assert lines == first, f"{line} is followed by {lines} or by {first}"
    found.states = len(states)
    return found


def first_state(environment: OpenEnvironment) -> OpenState:
    kernel = ProviderKernel(environment.limits)
    if not environment.readiness:
        kernel.receive(on.ProviderReady())
    return OpenState(kernel.snapshot(), (), ())


def events_of(environment: OpenEnvironment) -> Iterator[ProviderInput]:
    """List everything that can be reported to a kernel."""
    for number in environment.numbers:
        yield on.ConnectionOpened(number, number % 2 if environment.limits else 0)
        yield on.ConnectionLost(number)
        yield on.FrameRejected("unreadable", number)
        if environment.refusals:
            yield on.ConnectionOpened(number, REFUSED_UID)
        for name in environment.names:
            for request in environment.requests(name):
                yield on.RequestReceived(number, request)
            if environment.refusals:
                yield on.RequestReceived(number, REFUSED[name])
            yield on.EndReceived(number, name)
            yield on.ResponseSent(name, number)
            yield on.ResponseNotSent(name, number, FdPassing("no descriptors"))
    for name in environment.names:
        for request in environment.requests(name):
            yield on.NamespacesCreated(name, response_to(request))
            if environment.readiness:
                yield on.CreatedAdopted(name, request, response_to(request))
                yield on.HandedOffAdopted(name, request, response_to(request))
        yield on.NamespacesNotCreated(name, CreationFailed("no"))
        yield on.ReleaseDelayed(name, "busy")
        if environment.readiness:
            yield on.RemainsFound(name, FIRST[name])
        for kind in _AT_ONCE:
            yield kind(name)
    if environment.readiness:
        yield from (on.ProviderReady(), on.ReadinessOverdue(), on.ProviderStopping())


_AT_ONCE: Final[tuple[type[Any], ...]] = (
    on.NamespacesReleased,
    on.RetryDue,
    on.ReleaseOverdue,
    on.ClaimExpired,
    on.ScopePopulated,
    on.ScopeEmptied,
    on.InitDied,
    on.ReleaseRequested,
)


def response_to(request: NamespaceRequest) -> NamespaceResponse:
    path = None if request.uenv_image is None else "/where it is mounted"
    return NamespaceResponse(request.allocation_id, request.namespaces, path)


def _steps(
    environment: OpenEnvironment, events: tuple[ProviderInput, ...], state: OpenState
) -> Iterator[tuple[ProviderInput | None, OpenState]]:
    kernel = ProviderKernel.restore(state.kernel, environment.limits)
    for event in events:
        if not may_be(environment, state, event):
            continue
        try:
            effects = kernel.receive(event)
        except LocalProtocolError:
            continue  # Nothing has changed: `lockstep` looks after that.
        yield event, after_event(kernel, state, event, effects)
        kernel = ProviderKernel.restore(state.kernel, environment.limits)
    if environment.crash:
        yield None, after_crash(environment, state)


# --- What an environment keeps to ----------------------------------------------------------------


def may_be(environment: OpenEnvironment, state: OpenState, event: ProviderInput) -> bool:
    """Say whether the environment may feed an event: the rules that no row or guard has."""
    match event:
        case on.RequestReceived() | on.EndReceived() | on.FrameRejected():
            return _has_room(environment, state, event.connection)
        case on.ResponseSent() | on.ResponseNotSent():
            return (event.allocation_id, event.connection) in state.unreported
        case on.NamespacesReleased() | on.ReleaseOverdue():
            return all(name != event.allocation_id for name, _ in state.unreported)
        case on.NamespacesCreated():
            return any(
                a.request is not None and response_to(a.request) == event.response
                for a in state.kernel.allocations
            )
        case on.CreatedAdopted() | on.HandedOffAdopted() | on.RemainsFound():
            return _may_adopt(environment, state, event)
        case on.ProviderReady():
            return not state.left
    return True


def _has_room(environment: OpenEnvironment, state: OpenState, number: int) -> bool:
    for connection in state.kernel.connections:
        if connection.number == number:
            handed = sum(to == number for _, to in state.unreported)
            return len(connection.messages) + handed < environment.messages
    return False


def _may_adopt(
    environment: OpenEnvironment,
    state: OpenState,
    event: on.CreatedAdopted | on.HandedOffAdopted | on.RemainsFound,
) -> bool:
    name = event.allocation_id
    if not environment.crash:
        return name not in state.kernel.remembered
    left = dict(state.left).get(name)
    if left is None or isinstance(event, on.RemainsFound):
        return left is not None
    states = {
        on.CreatedAdopted: (AllocationState.REQUESTED, AllocationState.CREATED),
        on.HandedOffAdopted: (AllocationState.HANDED_OFF,),
    }
    return left.state in states[type(event)] and left.request == event.request


def after_event(
    kernel: ProviderKernel, state: OpenState, event: ProviderInput, effects: tuple[Effect, ...]
) -> OpenState:
    unreported, left = list(state.unreported), state.left
    match event:
        case on.ResponseSent() | on.ResponseNotSent():
            unreported.remove((event.allocation_id, event.connection))
        case on.ConnectionLost():
            unreported = [pair for pair in unreported if pair[1] != event.connection]
        case on.CreatedAdopted() | on.HandedOffAdopted() | on.RemainsFound():
            left = tuple(pair for pair in left if pair[0] != event.allocation_id)
    alive = {a.allocation_id for a in state.kernel.allocations}
    for effect in effects:
        if isinstance(effect, HandOver):
            unreported.append((effect.response.allocation_id, effect.connection))
        elif isinstance(effect, CreateNamespaces):
            name = effect.request.allocation_id
            assert name not in alive or isinstance(event, on.NamespacesReleased), "a second set"
    return OpenState(kernel.snapshot(), tuple(sorted(unreported)), left)


def after_crash(environment: OpenEnvironment, state: OpenState) -> OpenState:
    left = dict(state.left)
    for allocation in state.kernel.allocations:
        has_ended = allocation.state is AllocationState.ENDED
        request = None if has_ended else allocation.request
        left[allocation.allocation_id] = LeftBehind(allocation.state, request)
    kernel = ProviderKernel(environment.limits)
    kernel.remember(state.kernel.remembered)
    return OpenState(kernel.snapshot(), (), tuple(sorted(left.items())))


# --- A state as a line ---------------------------------------------------------------------------

_ALLOCATIONS: Final = {
    AllocationState.REQUESTED: 1,
    AllocationState.CREATED: 2,
    AllocationState.HANDED_OFF: 3,
    AllocationState.ENDED: 4,
}
_SERVICES: Final = {
    ServiceState.READY: 0,
    ServiceState.STARTING: 1,
    ServiceState.STOPPING: 2,
    ServiceState.ABORTED: 3,
}
_OWED: Final = {
    MessageState.HELD: 1,
    MessageState.OPEN: 2,
    MessageState.DEFERRED: 3,
    MessageState.GRANTED: 4,
    MessageState.CONFIRMED: 8,
    MessageState.UNREADABLE: 9,
}
_REFUSED: Final[dict[type[Any], int]] = {
    CreationFailed: 5,
    AllocationNotFound: 6,
    SocketUnavailable: 7,
}
_NOTHING: Final = "0" * 9


def line_of(environment: OpenEnvironment, state: OpenState) -> str:
    """Say a state as the Promela program prints it."""
    connections = {c.number: c for c in state.kernel.connections}
    allocations = {a.allocation_id: a for a in state.kernel.allocations}
    parts = [
        _line_of_allocation(environment, state, name, allocations.get(name), connections)
        for name in environment.names
    ]
    parts += [_line_of_connection(environment, connections.get(n)) for n in environment.numbers]
    if environment.readiness:
        held = "".join(str(message.connection) for message in state.kernel.held)
        parts.append(f"{_SERVICES[state.kernel.service]}{bool(held):d}:{held}")
    return " ".join(parts)


def _line_of_allocation(
    environment: OpenEnvironment,
    state: OpenState,
    name: str,
    allocation: AllocationSnapshot | None,
    connections: dict[int, ConnectionSnapshot],
) -> str:
    if allocation is None:
        remembered = f"{name in state.kernel.remembered:d}"
        line = _NOTHING[:3] + remembered + _NOTHING[4:] + "0" * (environment.limits is not None)
    else:
        line = _line_of_life(allocation) + _owner(environment, allocation)
    if environment.crash:
        left = dict(state.left).get(name)
        line += "00" if left is None else f"{_ALLOCATIONS[left.state]}{_which(left.request)}"
    asked: frozenset[int] = frozenset()
    holders: frozenset[int] = frozenset()
    deferred = ""
    if allocation is not None:
        holders = allocation.holders
        if allocation.state is AllocationState.ENDED:
            deferred = "".join(
                str(number)
                for number in allocation.deferred
                if _has_deferred(connections[number], name)
            )
        else:
            asked = allocation.asked
    unreported = Counter(state.unreported)
    pairs = ""
    for n in environment.numbers:
        is_held = n in holders and not connections[n].is_closing
        pairs += f"{n in asked:d}{is_held:d}{unreported[name, n]}"
    return f"{line}:{pairs}:{deferred}"


def _line_of_life(allocation: AllocationSnapshot) -> str:
    """Say what is of the allocation alone. Once it has ended, what was before counts no more."""
    timers, has_ended = allocation.timers, allocation.state is AllocationState.ENDED
    bits = (
        allocation.is_populated and not has_ended,
        False,
        allocation.is_being_made,
        has_ended and Timer.RETRY not in timers,
        Timer.CLAIM in timers,
        Timer.RELEASE in timers,
        Timer.RETRY in timers,
    )
    wanted = 0 if has_ended else _which(allocation.request)
    return f"{_ALLOCATIONS[allocation.state]}{wanted}" + "".join(f"{bit:d}" for bit in bits)


def _owner(environment: OpenEnvironment, allocation: AllocationSnapshot) -> str:
    if environment.limits is None:
        return ""
    return "0" if allocation.uid is None else str(allocation.uid + 1)


def _which(request: NamespaceRequest | None) -> int:
    return 0 if request is None else 1 if request == FIRST[request.allocation_id] else 2


def _has_deferred(connection: ConnectionSnapshot, name: str) -> bool:
    return any(
        message.state is MessageState.DEFERRED
        and isinstance(message.question, NamespaceRequest)
        and message.question.allocation_id == name
        for message in connection.messages
    )


def _line_of_connection(environment: OpenEnvironment, connection: ConnectionSnapshot | None) -> str:
    messages: tuple[MessageSnapshot, ...] = ()
    link = 0
    if connection is not None:
        # One that was too many is not processed, and stands there until the loss is reported.
        messages = tuple(m for m in connection.messages if m.state is not MessageState.ARRIVED)
        is_unreadable = bool(messages) and messages[-1].question is None
        link = 3 if connection.is_closing else 2 if is_unreadable else 1
    line = "".join(_line_of_message(message) for message in messages)
    return f"{link}:{line:0<{3 * environment.messages}}"


def _line_of_message(message: MessageSnapshot) -> str:
    owed = _REFUSED[type(message.error)] if message.state is MessageState.REFUSED else 0
    owed = owed or _OWED[message.state]
    match message.question:
        case None:
            return f"40{owed}"
        case AllocationEnded(allocation_id=name):
            return f"3{NAMES.index(name)}{owed}"
        case request:
            return f"{_which(request)}{NAMES.index(request.allocation_id)}{owed}"
