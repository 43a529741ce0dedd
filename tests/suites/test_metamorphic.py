"""What is no difference makes none: names, order, repetition, interleaving, a crash at rest.

The kernel is given what it took in on a life of `transport.testing.machine`, and then the same in
another form; what it decides must be the same in that form. (That the cuts of a stream make no
difference either is `test_channel.py`'s.)
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Final, TypeAlias

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import run_state_machine_as_test

from linux.testing.worlds import SimulatedWorld
from statemachine import effects as do
from statemachine import events as on
from statemachine.consumer import ConsumerKernel
from statemachine.effects import Effect
from statemachine.errors import NamespaceError
from statemachine.events import ConnectionId, Event
from statemachine.messages import NamespaceRequest, NamespaceType
from statemachine.provider import Limits, ProviderKernel
from statemachine.states import AllocationState, ServiceState
from tests.suites.stateful.adapters import InProcess, machine
from tests.suites.stateful.tour import PROVIDER_TOUR, take
from transport.testing.adapter import Ability

PREFIX: Final = "nsh-test-m"
UID: Final = os.geteuid()
LIMITS: Final = Limits(allowed_uids=frozenset({UID}))
RUNS: Final = 15
NEWCOMER: Final[ConnectionId] = 1_000_000

ALIVE: Final = (AllocationState.CREATED, AllocationState.HANDED_OFF)

Decision: TypeAlias = tuple[Event, tuple[Effect, ...]]


class Roomy(InProcess):
    """A provider whose limits nothing reaches: with one caller more all is as it was."""

    abilities = frozenset(Ability) - {Ability.LIMITS, Ability.USERS}


@dataclass
class Recording:
    """All that one kernel took in and decided, from its start on."""

    remembered: tuple[str, ...]
    turns: list[Decision]

    def kernel(self, turns: int = 0) -> ProviderKernel:
        """Have a kernel that has come so far."""
        kernel = ProviderKernel(LIMITS)
        kernel.remember(self.remembered)
        for event, _ in self.turns[:turns]:
            kernel.receive(event)
        return kernel


class Recorder(ProviderKernel):
    """A kernel that notes everything."""

    recordings: Final[list[Recording]] = []

    def __init__(self, limits: Limits) -> None:
        super().__init__(LIMITS)
        self._turns: list[Decision] = []

    def remember(self, names: Iterable[str]) -> None:
        super().remember(names := tuple(names))
        self.recordings.append(Recording(names, self._turns))

    def receive(self, event: Event) -> tuple[Effect, ...]:
        effects = super().receive(event)
        self._turns.append((event, effects))
        return effects


def record() -> list[Recording]:
    Recorder.recordings.clear()
    recorded = machine(PREFIX, lambda: Roomy(SimulatedWorld(), Recorder, ConsumerKernel, LIMITS))
    take(recorded, PROVIDER_TOUR)
    run_state_machine_as_test(
        recorded,
        settings=settings(
            max_examples=RUNS, stateful_step_count=20, derandomize=True, database=None
        ),
    )
    return [each for each in Recorder.recordings if len(each.turns) > 1]


_made: Final[list[Recording]] = []


def recordings() -> list[Recording]:
    """Record once, when it is needed first."""
    if not _made:
        _made.extend(record())
    return _made


def start_of(recording: Recording) -> int | None:
    """Where the kernel is ready; None where a message was waiting for that."""
    for index, (event, _) in enumerate(recording.turns):
        if isinstance(event, on.ProviderReady):
            return index
        if isinstance(event, on.ConnectionOpened):
            break
    return None


anything_recorded: Final = st.deferred(lambda: st.sampled_from(recordings()))
anything_asked_in_time: Final = st.deferred(
    lambda: st.sampled_from([each for each in recordings() if start_of(each) is not None])
)


# --- The same in another form ------------------------------------------------------------------


@dataclass(frozen=True)
class Rewriting:
    """How to say the same in another way."""

    name: Callable[[str], str] = str
    connection: Callable[[ConnectionId], ConnectionId] = int
    kinds: Callable[[tuple[NamespaceType, ...]], tuple[NamespaceType, ...]] = tuple

    def of(self, thing: Any, field: str = "") -> Any:
        """Say an event or an effect in this form."""
        if field == "connection":
            return self.connection(thing)
        if field in ("namespaces", "fd_types"):
            return self.kinds(thing)
        if isinstance(thing, str):
            return re.sub(rf"{PREFIX}-\w+", lambda match: self.name(match[0]), thing)
        if isinstance(thing, NamespaceError):
            return type(thing)(self.of(thing.text))
        if is_dataclass(thing) and not isinstance(thing, type):
            values = {each.name: getattr(thing, each.name) for each in fields(thing)}
            return replace(thing, **{name: self.of(value, name) for name, value in values.items()})
        return thing

    def of_turns(self, turns: Iterable[Decision]) -> list[Decision]:
        return [(self.of(event), tuple(self.of_all(effects))) for event, effects in turns]

    def of_all(self, effects: Iterable[Effect]) -> list[Effect]:
        return [self.of(effect) for effect in effects]


def same(one: Sequence[Effect], other: Sequence[Effect]) -> bool:
    """Whether both do the same, in the same order on each connection."""
    lines = {getattr(effect, "connection", None) for effect in one} - {None}
    return Counter(map(repr, one)) == Counter(map(repr, other)) and all(
        [e for e in one if getattr(e, "connection", None) == line]
        == [e for e in other if getattr(e, "connection", None) == line]
        for line in lines
    )


def check_form(recording: Recording, form: Rewriting) -> None:
    """Play a recording in another form, and hold every decision to that form."""
    kernel = ProviderKernel(LIMITS)
    kernel.remember([form.of(name) for name in recording.remembered])
    for event, effects in recording.turns:
        decided = kernel.receive(form.of(event))
        assert same(decided, form.of_all(effects)), f"{event}: {decided}, not {effects} renamed"


SHUFFLED: Final = dict(zip("abcdn", "zyxwv", strict=True))


@given(anything_recorded)
def test_names_mean_nothing(recording: Recording) -> None:
    """M3, with names that sort the other way."""
    check_form(
        recording, Rewriting(name=lambda name: f"{PREFIX}-{SHUFFLED[name[len(PREFIX) + 1]]}x")
    )


@given(anything_recorded, st.permutations(range(3)))
def test_namespaces_asked_for_in_another_order_come_in_that_order(
    recording: Recording, order: list[int]
) -> None:
    """M6."""

    def permuted(kinds: tuple[NamespaceType, ...]) -> tuple[NamespaceType, ...]:
        return tuple(kinds[index] for index in order if index < len(kinds))

    check_form(recording, Rewriting(kinds=permuted))


@given(anything_asked_in_time, anything_asked_in_time, st.randoms(use_true_random=False))
def test_lives_that_share_nothing_do_not_notice_each_other(
    one: Recording, other: Recording, rng: Any
) -> None:
    """M1: in whatever order the steps of both come, each decides what it decides alone."""
    apart = Rewriting(name=lambda name: f"{name}-apart", connection=lambda number: number + 1000)
    begins, others = start_of(one), start_of(other)
    assert begins is not None
    assert others is not None
    kernel = ProviderKernel(LIMITS)
    kernel.remember([*one.remembered, *map(apart.of, other.remembered)])
    for event, _ in [*one.turns[:begins], *apart.of_turns(other.turns[:others]), one.turns[begins]]:
        kernel.receive(event)
    lanes = [one.turns[begins + 1 :], apart.of_turns(other.turns[others + 1 :])]
    while lanes[0] or lanes[1]:
        lane = rng.choice([lane for lane in lanes if lane])
        event, effects = lane.pop(0)
        decided = kernel.receive(event)
        assert same(decided, effects), f"{event}: {decided}, not {effects}"


@given(anything_recorded, st.floats(0, 1))
def test_a_request_said_twice_is_said_once(recording: Recording, where: float) -> None:
    """M4: who asks again is answered again, and nothing else has happened."""
    turns = round(where * len(recording.turns))
    kernel = recording.kernel(turns)
    if kernel.service is not ServiceState.READY:
        return
    kernel.receive(on.ConnectionOpened(NEWCOMER, UID))
    for request in requests_alive(kernel, recording.turns[:turns]):
        ask(kernel, request)
        once = kernel.snapshot()
        assert [type(effect) for effect in ask(kernel, request)] == [do.HandOver]
        assert kernel.snapshot() == once


def ask(kernel: ProviderKernel, request: NamespaceRequest) -> list[Effect]:
    """Ask as the newcomer, and have the response sent."""
    effects = kernel.receive(on.RequestReceived(NEWCOMER, request))
    for effect in effects:
        if isinstance(effect, do.HandOver):
            kernel.receive(on.ResponseSent(request.allocation_id, effect.connection))
    return list(effects)


def requests_alive(kernel: ProviderKernel, turns: Iterable[Decision]) -> list[NamespaceRequest]:
    """Under which requests the living allocations are alive."""
    found: dict[str, NamespaceRequest] = {}
    for event, effects in turns:
        if isinstance(event, on.CreatedAdopted | on.HandedOffAdopted):
            found[event.allocation_id] = event.request
        for effect in effects:
            if isinstance(effect, do.CreateNamespaces):
                found[effect.request.allocation_id] = effect.request
    return [request for name, request in found.items() if kernel.state_of(name) in ALIVE]


@given(anything_recorded, st.floats(0, 1))
def test_a_crash_at_rest_is_not_noticed(recording: Recording, where: float) -> None:
    """M5: a kernel that adopts what another left goes on as that one would, once all have gone."""
    turns = round(where * len(recording.turns))
    past = recording.turns[:turns]
    kernel = recording.kernel(turns)
    requests = {each.allocation_id: each for each in requests_alive(kernel, past)}
    is_at_rest = kernel.service is ServiceState.READY and set(kernel.states) == set(requests)
    if not is_at_rest or _is_sending(past):
        return
    recovered = ProviderKernel(LIMITS)
    remembered = [*recording.remembered, *(e.allocation_id for e, _ in past if _is_release(e))]
    recovered.remember(remembered)
    for name, request in sorted(requests.items()):
        is_new = kernel.state_of(name) is AllocationState.CREATED
        adopted = on.CreatedAdopted if is_new else on.HandedOffAdopted
        recovered.receive(adopted(name, request, _response(past, name)))
    recovered.receive(on.ProviderReady())
    for number in _open(past):
        kernel.receive(on.ConnectionLost(number))
    assert kernel.states == recovered.states
    for one in (kernel, recovered):
        one.receive(on.ConnectionOpened(NEWCOMER, UID))
    for name, request in sorted(requests.items()):
        told = [
            ask(kernel, request),
            [*kernel.receive(on.EndReceived(NEWCOMER, name))],
            [*kernel.receive(on.NamespacesReleased(name))],
            ask(recovered, request),
            [*recovered.receive(on.EndReceived(NEWCOMER, name))],
            [*recovered.receive(on.NamespacesReleased(name))],
        ]
        assert [_without_claims(each) for each in told[:3]] == [
            _without_claims(each) for each in told[3:]
        ]
    for name in [*remembered, f"{PREFIX}-never"]:
        end = on.EndReceived(NEWCOMER, name)
        assert kernel.receive(end) == recovered.receive(end)


def _is_sending(past: list[Decision]) -> bool:
    """Whether a response has been asked for that is not reported yet."""
    asked = sum(isinstance(effect, do.HandOver) for _, effects in past for effect in effects)
    said = sum(isinstance(event, on.ResponseSent | on.ResponseNotSent) for event, _ in past)
    return asked != said


def _is_release(event: Event) -> bool:
    return isinstance(event, on.NamespacesReleased)


def _response(past: list[Decision], name: str) -> Any:
    answers = (on.NamespacesCreated, on.CreatedAdopted, on.HandedOffAdopted)
    return [e.response for e, _ in past if isinstance(e, answers) and e.allocation_id == name][-1]


def _open(past: list[Decision]) -> list[ConnectionId]:
    opened = [event.connection for event, _ in past if isinstance(event, on.ConnectionOpened)]
    lost = [event.connection for event, _ in past if isinstance(event, on.ConnectionLost)]
    return sorted(set(opened) - set(lost))


def _without_claims(effects: Iterable[Effect]) -> list[Effect]:
    """Leave out the claim timer: who was used before is seen to be so again, and stops it then."""
    return [effect for effect in effects if getattr(effect, "timer", None) is not do.Timer.CLAIM]


# --- They can fail -----------------------------------------------------------------------------


def test_a_kernel_that_looks_at_names_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    recordings()
    receive = ProviderKernel.receive

    def partial(self: ProviderKernel, event: Event) -> tuple[Effect, ...]:
        effects = receive(self, event)
        is_odd = getattr(event, "allocation_id", "").endswith("x")
        return effects[:-1] if is_odd else effects

    monkeypatch.setattr(ProviderKernel, "receive", partial)
    with pytest.raises(AssertionError, match="renamed"):
        test_names_mean_nothing.hypothesis.inner_test(recordings()[0])  # type: ignore[attr-defined]
