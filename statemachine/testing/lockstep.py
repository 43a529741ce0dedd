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
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, Final, TypeVar, cast

from specs import model

from .. import events as on
from ..consumer import ConsumerKernel
from ..effects import Effect
from ..errors import (
    AllocationNotFound,
    CreationFailed,
    FdPassing,
    SocketUnavailable,
)
from ..events import Event
from ..messages import NamespaceRequest, NamespaceResponse, NamespaceType
from ..provider import Limits, ProviderKernel
from .kit import KernelTrial, Receiver, Reference
from .tables import HOMES

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


K = TypeVar("K", bound=Receiver)
S = TypeVar("S", model.Provider, model.Consumer)


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
    return REFERENCE.taken(kernel, state, event)


def _model_step(state: Any, event: Any) -> tuple[Any, Any]:
    take: Any = model.provider_step if isinstance(state, model.Provider) else model.consumer_step
    result: tuple[Any, Any] = take(state, event)
    return result


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


REFERENCE: Final[Reference[Any]] = Reference(
    _model_step,
    model.Impossible,
    differences=model.differences,
    other_states=other_states,
    is_lax=_is_lax,
)
"""The reference model of `specs`."""


# --- Many steps --------------------------------------------------------------------------------


def consumer_trial(
    make: Callable[[NamespaceRequest], Receiver] = ConsumerKernel,
) -> KernelTrial[Receiver]:
    """Say what is put to a consumer's kernel, and what it is held to."""
    reference = replace(REFERENCE, initial=model.Consumer(CONSUMED))
    return KernelTrial(
        lambda: make(CONSUMED),
        CONSUMER_EVENTS,
        reference=reference,
        homes=HOMES,
        copied=_copied,
    )


def explore_consumer(make: Callable[[NamespaceRequest], Receiver] = ConsumerKernel) -> int:
    """
    Explore a consumer's kernel, all of it; return how many steps that were.

    Raises:
        ViolatingPath: the kernel and the model do not agree; with a shortest script.
    """
    return consumer_trial(make).explore().steps


def explore_provider(
    make: Callable[[Limits], Receiver] = ProviderKernel, names: str = "a", states_max: int = 300
) -> int:
    """
    Explore a provider's kernel up to a number of states; return how many steps that were.

    Raises:
        ViolatingPath: the kernel and the model do not agree; with a shortest script.
    """
    events = list(dict.fromkeys(provider_events(names)))
    reference = replace(REFERENCE, initial=model.Provider(MODEL_LIMITS))
    trial = KernelTrial(lambda: make(LIMITS), events, reference=reference)
    return trial.explore(states_max).steps


def walk_provider(
    seed: int, names: str, steps: int, make: Callable[[Limits], Receiver] = ProviderKernel
) -> None:
    """
    Lead a provider through events at random, mostly such as can be; at times begin anew.

    Raises:
        Difference: the kernel and the model do not agree.
    """
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
