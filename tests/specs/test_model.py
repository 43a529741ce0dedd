"""The kernels and the reference model, step by step: the same outputs, the same states."""

from __future__ import annotations

import ast
import contextlib
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Final

import pytest

from specs import model
from statemachine import events as on
from statemachine import lifecycle
from statemachine.consumer import ConsumerKernel
from statemachine.effects import order_name
from statemachine.errors import (
    AllocationNotFound,
    CreationFailed,
    FdPassing,
    LocalProtocolError,
    ProtocolError,
    RemoteProtocolError,
    SocketUnavailable,
)
from statemachine.events import Event
from statemachine.messages import NamespaceRequest, NamespaceResponse, NamespaceType
from statemachine.provider import Limits, ProviderKernel
from statemachine.table import Row, Table, UnsoundTable, compile_table
from statemachine.testing.tables import replaced

NET, PID, MOUNT = NamespaceType.NET, NamespaceType.PID, NamespaceType.MOUNT
REQUESTS: Final = {
    "a": (NamespaceRequest("a", (NET,)), NamespaceRequest("a", (PID, NET))),
    "b": (NamespaceRequest("b", ()), NamespaceRequest("b", (MOUNT,), "x.sqfs")),
    "c": (NamespaceRequest("c", (PID,)),),
}
INVALID: Final = NamespaceRequest("a", (NET, NET))
LIMITS: Final = Limits(
    allowed_uids=frozenset({0, 1}),
    waiting=4,
    open_per_connection=2,
    open_per_uid=5,
    allocations_per_uid=2,
    connections_per_uid=2,
    remembered=1,
)
CONNECTIONS: Final = (1, 2, 3)
PROVIDER_WALK: Final = 200
"""Steps from one new start to the next."""
IMPOSSIBLE_SHARE: Final = 0.05
"""How often an event is fed that cannot be, when it comes up."""


def model_limits(limits: Limits) -> model.Limits:
    return model.Limits(**{f.name: getattr(limits, f.name) for f in fields(limits)})


MODEL_LIMITS: Final = model_limits(LIMITS)


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


class Difference(AssertionError):
    """The kernel and the model do not agree."""


def culprit(error: ProtocolError) -> str:
    return {LocalProtocolError: "ours", RemoteProtocolError: "peer's"}[type(error)]


def step_provider(
    kernel: ProviderKernel, state: model.Provider, event: Event
) -> tuple[ProviderKernel, model.Provider]:
    try:
        after, said = model.provider_step(state, event)
    except model.Impossible as impossible:
        before = kernel.snapshot()
        try:
            kernel.receive(event)
        except ProtocolError as error:
            if culprit(error) != impossible.whose or kernel.snapshot() != before:
                raise Difference(f"{error} changed something, or is {impossible.whose}") from None
        else:
            if not is_lax(state, event):
                raise Difference(f"the kernel takes {event}, which cannot be")
            kernel = ProviderKernel.restore(before, kernel._state.limits)
        return kernel, state
    try:
        effects = kernel.receive(event)
    except ProtocolError as error:
        raise Difference(f"the kernel does not take {event}: {error}") from None
    found = model.differences(effects, said)
    if kernel.service.value != after.phase:
        found.append(f"the kernel is {kernel.service}, the model {after.phase}")
    for name in "abc":
        if kernel.state_of(name).value != after.state_of(name):
            found.append(f"{name}: {kernel.state_of(name)}, {after.state_of(name)}")
    if found:
        raise Difference(f"{event}: {found}")
    return kernel, after


def is_lax(state: model.Provider, event: Event) -> bool:
    """
    Say whether the kernel takes something from its driver though it cannot be.

    It does not remember which hand-overs it has asked for: a driver reports them in the same turn.
    """
    if not isinstance(event, on.ResponseSent | on.ResponseNotSent):
        return False
    a = state.allocations.get(event.allocation_id)
    return a is not None and (a.response is not None or a.has_ended)


def step_consumer(
    kernel: ConsumerKernel, state: model.Consumer, event: Event
) -> tuple[ConsumerKernel, model.Consumer]:
    try:
        after, said = model.consumer_step(state, event)
    except model.Impossible as impossible:
        before = kernel.snapshot()
        try:
            kernel.receive(event)
        except ProtocolError as error:
            if culprit(error) != impossible.whose or kernel.snapshot() != before:
                raise Difference(f"{error} changed something, or is {impossible.whose}") from None
        else:
            raise Difference(f"the kernel takes {event}, which cannot be")
        return kernel, state
    try:
        effects = kernel.receive(event)
    except ProtocolError as error:
        raise Difference(f"the kernel does not take {event}: {error}") from None
    found = model.differences(effects, said)
    if (kernel.state.value, kernel.notice.value) != (after.state, after.notice):
        found.append(f"{kernel.state}, {kernel.notice}: {after.state}, {after.notice}")
    if found:
        raise Difference(f"{event}: {found}")
    return kernel, after


def walk_provider(seed: int, names: str, steps: int) -> None:
    """Lead a provider through events at random, mostly such as can be; at times begin anew."""
    rng, events = random.Random(seed), provider_events(names)
    kernel, state = ProviderKernel(LIMITS), model.Provider(MODEL_LIMITS)
    for at in range(1, steps + 1):
        event = next(e for e in iter(lambda: rng.choice(events), None) if _may_come(rng, state, e))
        kernel, state = step_provider(kernel, state, event)
        if at % PROVIDER_WALK == 0:
            kernel, state = ProviderKernel(LIMITS), model.Provider(MODEL_LIMITS)


def explore_consumer() -> int:
    """Put every event to the consumer in every state it can be in; say how many steps that is."""
    start = (ConsumerKernel(CONSUMED).snapshot(), model.Consumer(CONSUMED))
    known, frontier, steps = {start}, [start], 0
    while frontier:
        snapshot, state = frontier.pop()
        for event in CONSUMER_EVENTS:
            kernel, after = step_consumer(ConsumerKernel.restore(snapshot), state, event)
            steps += 1
            found = (kernel.snapshot(), after)
            if found not in known:
                known.add(found)
                frontier.append(found)
    return steps


def _may_come(rng: random.Random, state: model.Provider, event: Event) -> bool:
    """Whether an event is possible; now and then also one that is not."""
    try:
        model.provider_step(state, event)
    except model.Impossible:
        return rng.random() < IMPOSSIBLE_SHARE
    return True


# --- They agree --------------------------------------------------------------------------------


@pytest.mark.parametrize(("names", "steps"), [("a", 6_000), ("ab", 10_000), ("abc", 6_000)])
def test_the_provider_does_what_the_model_says(names: str, steps: int) -> None:
    walk_provider(len(names), names, steps)


def test_the_consumer_does_what_the_model_says() -> None:
    assert explore_consumer() > 500


def test_equal_states_are_equal_values() -> None:
    script = [on.ConnectionOpened(1, 0), on.ProviderReady(), on.RequestReceived(1, CONSUMED)]
    ends = []
    for _ in range(2):
        state = model.Provider(MODEL_LIMITS)
        for event in script:
            state, _said = model.provider_step(state, event)
        ends.append(state)
    assert ends[0] == ends[1]
    assert len({*ends, model.Provider(MODEL_LIMITS)}) == 2


# --- Where they do not agree -------------------------------------------------------------------

A, A_OTHERWISE = REQUESTS["a"]
B: Final = REQUESTS["b"][0]
ENDED_A: Final = (on.RemainsFound("a", A), on.ProviderReady())

MENDED: Final[dict[str, list[Event]]] = {
    # It never learned what is alive, so it cannot know that this allocation is not.
    "a provider stopped before it was ready says AllocationNotFound": [
        on.ConnectionOpened(1, 0),
        on.ProviderStopping(),
        on.EndReceived(1, "a"),
    ],
    # The refusal waits for its turn behind the answer about b; the release takes it back.
    "an early request refused at the deadline starts an incarnation": [
        *ENDED_A,
        on.ConnectionOpened(1, 0),
        on.RequestReceived(1, B),
        on.RequestReceived(1, A),
        on.ReleaseOverdue("a"),
        on.NamespacesReleased("a"),
    ],
    "an early request refused at the deadline is refused otherwise at the stop": [
        *ENDED_A,
        on.ConnectionOpened(1, 0),
        on.RequestReceived(1, B),
        on.RequestReceived(1, A),
        on.ReleaseOverdue("a"),
        on.ProviderStopping(),
        on.NamespacesCreated("b", response_to(B)),
    ],
    # Connection 1 takes its request back; its next one, after that of 2, is put before that of 2.
    "an early request takes the place of one that was taken back": [
        *ENDED_A,
        on.ConnectionOpened(1, 0),
        on.ConnectionOpened(2, 0),
        on.RequestReceived(1, A),
        on.EndReceived(1, "a"),
        on.RequestReceived(2, A_OTHERWISE),
        on.RequestReceived(1, A),
        on.NamespacesReleased("a"),
    ],
    # Limits are on requests (protocol); what would end an allocation must not be kept from it.
    "an end over the limit is refused with CreationFailed and ends nothing": [
        on.ProviderReady(),
        on.ConnectionOpened(1, 0),
        on.RequestReceived(1, A),
        on.RequestReceived(1, B),
        on.EndReceived(1, "a"),
    ],
    # It is refused its second request, then its fault is answered and it is closed, and only then
    # would it be told: but it was there when the end was announced.
    "a holder whose unreadable frame waits for its answer is not told of the end": [
        on.ProviderReady(),
        on.ConnectionOpened(1, 0),
        on.RequestReceived(1, A),
        on.NamespacesCreated("a", response_to(A)),
        on.ResponseSent("a", 1),
        on.ReleaseRequested("a"),
        on.RequestReceived(1, A),
        on.FrameRejected("x", 1),
        on.ReleaseOverdue("a"),
    ],
}


@pytest.mark.parametrize("limits", [Limits(), LIMITS], ids=["roomy", "tight"])
@pytest.mark.parametrize("name", MENDED)
def test_what_the_model_found_stays_mended(name: str, limits: Limits) -> None:
    kernel = ProviderKernel(limits)
    state = model.Provider(
        model.Limits(**{f.name: getattr(limits, f.name) for f in fields(limits)})
    )
    for event in MENDED[name]:
        kernel, state = step_provider(kernel, state, event)


# --- The walks notice --------------------------------------------------------------------------


PROVIDER_MUTANTS: Final = 15
"""How many are tried of each kind; all of them take a minute. The consumer's are tried all."""

EQUIVALENT: Final = (
    # An expired timer does not run any more: these rows ask for what is so already.
    "ClaimExpired in created without stop claim timer",
    "ClaimExpired in handed_off without stop claim timer",
    # Of what is unknown or released nothing is kept that could be elsewhere afterwards.
    "EndReceived in unknown to ",
    "EndRepeated in released to ",
)


def drops(table: Table) -> Iterator[tuple[str, tuple[Row, ...]]]:
    """Leave out each effect of each row."""
    for at, row in enumerate(table.rows):
        for which, order in enumerate(row.effects):
            left = row.effects[:which] + row.effects[which + 1 :]
            mutant = Row(row.event, row.source, row.target, left)
            name = f"{row.event.__name__} in {row.source.value} without {order_name(order)}"
            yield name, (*table.rows[:at], mutant, *table.rows[at + 1 :])


def redirects(table: Table) -> Iterator[tuple[str, tuple[Row, ...]]]:
    """Lead each row to each other state."""
    for at, row in enumerate(table.rows):
        for target in table.states:
            mutant = Row(row.event, row.source, target, row.effects)
            name = f"{row.event.__name__} in {row.source.value} to {target.value}"
            if target is not row.target:
                yield name, (*table.rows[:at], mutant, *table.rows[at + 1 :])


def is_noticed(walk: Callable[[], object]) -> bool:
    """Whether a walk goes wrong; a mutant may also make the kernel stumble over itself."""
    try:
        walk()
    except (Difference, AssertionError, KeyError):
        return True
    return False


def walk_and_withdraw() -> None:
    """Walk at random; then end an allocation, in each way, whose granted response has to wait."""
    walk_provider(0, "ab", 40_000)
    first, second = REQUESTS["b"][0], REQUESTS["a"][0]
    for sent in ((), (on.RequestReceived(2, second), on.ResponseSent("a", 2))):
        for end in (
            on.ScopeEmptied("a"),
            on.EndReceived(2, "a"),
            on.InitDied("a"),
            on.ReleaseRequested("a"),
        ):
            kernel, state = ProviderKernel(LIMITS), model.Provider(MODEL_LIMITS)
            for event in (
                *(on.ConnectionOpened(1, 0), on.ConnectionOpened(2, 0), on.ProviderReady()),
                *(on.RequestReceived(1, first), on.RequestReceived(1, second)),
                *(on.NamespacesCreated("a", response_to(second)), *sent, end),
                *(on.NamespacesCreated("b", response_to(first)), on.NamespacesReleased("a")),
            ):
                kernel, state = step_provider(kernel, state, event)


@pytest.mark.parametrize("mutate", [drops, redirects])
@pytest.mark.parametrize("table", lifecycle.TABLES, ids=lambda table: table.name)
def test_a_mutant_of_a_table_is_noticed(
    table: Table, mutate: Callable[[Table], Iterator[tuple[str, tuple[Row, ...]]]]
) -> None:
    found = [(n, rows) for n, rows in mutate(table) if not n.startswith(EQUIVALENT)]
    walk: Callable[[], object] = explore_consumer
    if table not in (lifecycle.CONSUMER, lifecycle.NOTICE):
        found = random.Random(0).sample(found, min(PROVIDER_MUTANTS, len(found)))
        walk = walk_and_withdraw
    missed = []
    for name, rows in found:
        with contextlib.suppress(UnsoundTable):
            mutant = compile_table(table.name, rows, initial=table.initial, finals=table.finals)
            with replaced(mutant):
                if not is_noticed(walk):
                    missed.append(name)
    assert missed == []


# --- It is a model of its own ------------------------------------------------------------------


def test_the_model_knows_nothing_of_the_kernels() -> None:
    tree = ast.parse(Path(model.__file__).read_text(encoding="utf-8"))
    origins = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            origins |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            origins |= set(inner) if node.module == "statemachine" else {str(node.module)}
    allowed = {f"statemachine.{name}" for name in ("effects", "errors", "events", "messages")}
    assert {o for o in origins if o.partition(".")[0] not in sys.stdlib_module_names} == allowed
