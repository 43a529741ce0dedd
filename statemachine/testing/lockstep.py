"""The reference model beside anything with `receive`, event by event: the same effects, or a bug.

A kernel is put the same events as the model of `specs.model`. Where the model says that an event is
impossible, the kernel must raise the `ProtocolError` of whose fault that is, and stay as it was.

    explore_consumer(Mine)                  every event in every state that a consumer can come to
    explore_provider(Mine)                  the same of a provider, up to a number of states
    walk_provider(1, "ab", 10_000, Mine)    events at random, mostly such as can be

`Mine(request)` makes a consumer's kernel, `Mine(limits)` a provider's. All it needs is `receive`,
which takes an event of `statemachine.events` and returns effects of `statemachine.effects`, and
that `copy.deepcopy` can copy it. With a `snapshot` that can be hashed it is quicker, and what an
impossible event has changed is seen at once.
"""

from __future__ import annotations

import copy
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import fields
from enum import Enum
from types import BuiltinFunctionType, FunctionType
from typing import Any, Final, Protocol, TypeVar, cast

from specs import model

from .. import events as on
from ..consumer import ConsumerKernel
from ..effects import Effect
from ..errors import (
    AllocationNotFound,
    CreationFailed,
    FdPassing,
    LocalProtocolError,
    ProtocolError,
    RemoteProtocolError,
    SocketUnavailable,
)
from ..events import Event
from ..messages import NamespaceRequest, NamespaceResponse, NamespaceType
from ..provider import Limits, ProviderKernel

NET, PID, MOUNT = NamespaceType.NET, NamespaceType.PID, NamespaceType.MOUNT
REQUESTS: Final = {
    "a": (NamespaceRequest("a", (NET,)), NamespaceRequest("a", (PID, NET))),
    "b": (NamespaceRequest("b", ()), NamespaceRequest("b", (MOUNT,), "x.sqfs")),
    "c": (NamespaceRequest("c", (PID,)),),
}
INVALID: Final = NamespaceRequest("a", (NET, NET))
"""One that is refused at sight."""
LIMITS: Final = Limits(
    allowed_uids=frozenset({0, 1}),
    waiting=4,
    open_per_connection=2,
    open_per_uid=5,
    allocations_per_uid=2,
    connections_per_uid=2,
    remembered=1,
)


def model_limits(limits: Limits) -> model.Limits:
    """Say limits as the model has them."""
    return model.Limits(**{f.name: getattr(limits, f.name) for f in fields(limits)})


MODEL_LIMITS: Final = model_limits(LIMITS)
CONNECTIONS: Final = (1, 2, 3)
PROVIDER_WALK: Final = 200
"""Steps from one new start to the next."""
IMPOSSIBLE_SHARE: Final = 0.05
"""How often an event is fed that cannot be, when it comes up."""


def response_to(request: NamespaceRequest) -> NamespaceResponse:
    mount = None if request.uenv_image is None else "/run/pact/uenv/x"
    return NamespaceResponse(request.allocation_id, request.namespaces, mount)


def provider_events(names: str) -> list[Event]:
    """Everything that can be reported, and what cannot, weighted so that lives get on."""
    requests = [r for name in names for r in REQUESTS[name]]
    events: list[Event] = [INVALID_ASKED, on.FrameRejected("x", 1), on.FrameRejected("x", 3)]
    for c in CONNECTIONS:
        events += [on.ConnectionOpened(c, c % 2)] * 3 + [on.ConnectionOpened(c, 7)]
        events += [on.ConnectionLost(c)] * 2
        events += [on.RequestReceived(c, r) for r in requests] * 2
        events += [on.EndReceived(c, name) for name in (*names, "nobody")]
        events += [on.EndRepeated(), on.RequestRepeated()]
    for r in requests:
        name, response = r.allocation_id, response_to(r)
        events += [on.NamespacesCreated(name, response)] * 3
        events += [on.CreatedAdopted(name, r, response), on.HandedOffAdopted(name, r, response)]
    for name in names:
        events += [on.ResponseSent(name, c) for c in CONNECTIONS]
        events += [on.ResponseNotSent(name, 1, FdPassing("x"))]
        events += [on.RemainsFound(name, REQUESTS[name][0])]
        events += [on.NamespacesNotCreated(name, CreationFailed("x")), on.Unclaimed()]
        events += [on.ReleaseDelayed(name, "x"), on.NamespacesReleased(name)] * 2
        for kind in AT_ONCE:
            events.append(kind(name))
    events += [on.ProviderReady()] * 3 + [on.ReadinessOverdue()] * 2
    return [*events, on.ProviderStopping(), on.EndAnnounced(), on.Connected()]


INVALID_ASKED: Final = on.RequestReceived(2, INVALID)
AT_ONCE: Final[tuple[type[on.AllocationEvent], ...]] = (
    *[on.ClaimExpired] * 6,
    on.ScopePopulated,
    on.ScopeEmptied,
    on.InitDied,
    on.ReleaseRequested,
    on.RetryDue,
    on.RetryDue,
    on.ReleaseOverdue,
)
CONSUMED: Final = REQUESTS["a"][0]
CONSUMER_EVENTS: Final[list[Event]] = [
    on.NamespacesWanted(),
    *[on.Connected()] * 3,
    on.ProviderUnreachable(SocketUnavailable("x")),
    on.ConnectionLost(),
    on.FrameRejected("x"),
    on.AnswerOverdue(),
    on.NoticeOverdue(),
    on.NoticeDue(),
    on.SelfServed(response_to(CONSUMED)),
    on.SelfServiceFailed(CreationFailed("x")),
    on.EndWanted(),
    on.ResponseReceived(response_to(CONSUMED)),
    on.ResponseMismatched("x"),
    on.CreationRefused(CreationFailed("x")),
    on.NotFoundReceived(AllocationNotFound("a")),
    on.ProviderUnavailable(SocketUnavailable("x")),
    on.PassingFailed(FdPassing("x")),
    on.EndAnnounced(),
    on.EndOwed(),
    on.EndOwedApart(),
    on.Unclaimed(),
    on.EndReceived(1, "a"),
]


class Receiver(Protocol):
    """A kernel: ours, or yours."""

    def receive(self, event: Any, /) -> Sequence[Effect]:
        """Take an event; return what shall be done, or raise `ProtocolError` and change nothing."""


K = TypeVar("K", bound=Receiver)
S = TypeVar("S", model.Provider, model.Consumer)


class Difference(AssertionError):
    """The kernel and the model do not agree."""


def step(kernel: K, state: S, event: Event) -> tuple[K, S]:
    """
    Put an event to a kernel and to the model.

    Returns:
        Both afterwards. The kernel is the one that was given, and has changed.

    Raises:
        Difference: they do not agree.
    """
    return taken(kernel, state, event)[:2]


def taken(kernel: K, state: S, event: Event) -> tuple[K, S, tuple[Effect, ...] | None]:
    """As `step`, and return the effects as well; None: it cannot be, and both refused it."""
    take: Any = model.provider_step if isinstance(state, model.Provider) else model.consumer_step
    try:
        after, said = take(state, event)
    except model.Impossible as impossible:
        return _refused(kernel, state, event, impossible), state, None
    try:
        effects = kernel.receive(event)
    except ProtocolError as error:
        raise Difference(f"the kernel does not take {event}: {error}") from None
    found = model.differences(effects, said) + other_states(kernel, after)
    if found:
        raise Difference(f"{event}: {found}")
    return kernel, after, tuple(effects)


def _refused(kernel: K, state: Any, event: Event, impossible: model.Impossible) -> K:
    """Put an event to a kernel that cannot be."""
    spare = copy.deepcopy(kernel) if _is_lax(state, event) else None
    before = _snapshot(kernel)
    try:
        kernel.receive(event)
    except ProtocolError as error:
        if _WHOSE[type(error)] != impossible.whose or _snapshot(kernel) != before:
            raise Difference(f"{error} changed something, or is {impossible.whose}") from None
        return kernel
    if spare is None:
        raise Difference(f"the kernel takes {event}, which cannot be")
    return spare


_WHOSE: Final = {LocalProtocolError: "ours", RemoteProtocolError: "peer's"}


def _is_lax(state: model.Provider | model.Consumer, event: Event) -> bool:
    """
    Say whether a kernel may take something from its driver though it cannot be.

    Ours does not remember which hand-overs it has asked for: a driver reports them in the same
    turn.
    """
    if not isinstance(event, on.ResponseSent | on.ResponseNotSent):
        return False
    assert isinstance(state, model.Provider)
    a = state.allocations.get(event.allocation_id)
    return a is not None and (a.response is not None or a.has_ended)


def _snapshot(kernel: Any) -> object:
    return kernel.snapshot() if hasattr(kernel, "snapshot") else None


def _identity(kernel: Any) -> object:
    return _snapshot(kernel) or _frozen(kernel)


_ATOMS: Final = (type, str, int, float, bytes, Enum, FunctionType, BuiltinFunctionType)
"""What `copy` takes as it is."""


def _frozen(value: Any) -> object:
    """Make a value that is equal when all that `copy` would copy is equal."""
    if value is None or isinstance(value, _ATOMS):
        return value
    if isinstance(value, dict):
        return tuple((_frozen(key), _frozen(each)) for key, each in value.items())
    if isinstance(value, set | frozenset):
        return frozenset(map(_frozen, value))
    if isinstance(value, list | tuple | deque):
        return tuple(map(_frozen, value))
    return tuple(
        _frozen(part if isinstance(part, dict | tuple | None) else list(part))
        for part in value.__reduce_ex__(2)[1:]
    )


def _copied(kernel: K) -> K:
    if not isinstance(kernel, ConsumerKernel):
        return copy.deepcopy(kernel)
    return cast(K, type(kernel).restore(kernel.snapshot()))  # fifty times as fast


def other_states(kernel: Receiver, state: Any) -> list[str]:
    """Compare the states as well, of a kernel that shows them as ours does; list differences."""
    found = []
    if isinstance(kernel, ConsumerKernel):
        ours = (kernel.state.value, kernel.notice.value)
        if ours != (state.state, state.notice):
            found.append(f"{ours}: {state.state}, {state.notice}")
    elif isinstance(kernel, ProviderKernel):
        if kernel.service.value != state.phase:
            found.append(f"the kernel is {kernel.service.value}, the model {state.phase}")
        for name in REQUESTS:
            if kernel.state_of(name).value != state.state_of(name):
                found.append(f"{name}: {kernel.state_of(name)}, {state.state_of(name)}")
    return found


# --- Many steps --------------------------------------------------------------------------------


def explore(kernel: K, state: S, events: Sequence[Event], states_max: int | None = None) -> int:
    """
    Put every event to a kernel in every state that these events lead to, the nearest first.

    Args:
        kernel: as it is in the beginning.
        state: the model's.
        events: what may happen, and what cannot.
        states_max: stop when there are so many.

    Returns:
        How many steps that were.

    Raises:
        Difference: the kernel and the model do not agree.
    """
    known, frontier, steps = {(_identity(kernel), state)}, deque([(kernel, state)]), 0
    while frontier:
        before, now = frontier.popleft()
        for event in events:
            found, after = step(_copied(before), now, event)
            steps += 1
            key = (_identity(found), after)
            if key not in known and (states_max is None or len(known) < states_max):
                known.add(key)
                frontier.append((found, after))
    return steps


def explore_consumer(make: Callable[[NamespaceRequest], Receiver] = ConsumerKernel) -> int:
    """Explore a consumer's kernel, all of it; return how many steps that were."""
    return explore(make(CONSUMED), model.Consumer(CONSUMED), CONSUMER_EVENTS)


def explore_provider(
    make: Callable[[Limits], Receiver] = ProviderKernel, names: str = "a", states_max: int = 300
) -> int:
    """Explore a provider's kernel up to a number of states; return how many steps that were."""
    events = list(dict.fromkeys(provider_events(names)))
    return explore(make(LIMITS), model.Provider(MODEL_LIMITS), events, states_max)


def walk_provider(
    seed: int, names: str, steps: int, make: Callable[[Limits], Receiver] = ProviderKernel
) -> None:
    """Lead a provider through events at random, mostly such as can be; at times begin anew."""
    rng, events = random.Random(seed), provider_events(names)
    kernel, state = make(LIMITS), model.Provider(MODEL_LIMITS)
    for at in range(1, steps + 1):
        event = next(e for e in iter(lambda: rng.choice(events), None) if _may_come(rng, state, e))
        kernel, state = step(kernel, state, event)
        if at % PROVIDER_WALK == 0:
            kernel, state = make(LIMITS), model.Provider(MODEL_LIMITS)


def _may_come(rng: random.Random, state: model.Provider, event: Event) -> bool:
    """Whether an event is possible; now and then also one that is not."""
    try:
        model.provider_step(state, event)
    except model.Impossible:
        return rng.random() < IMPOSSIBLE_SHARE
    return True
