"""What a provider decides: one test for each rule of the protocol that its kernel is there for."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable
from typing import Any, Final, TypeAlias

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specs import invariants as always
from statemachine import effects as do
from statemachine import events as on
from statemachine.effects import Effect, Timer
from statemachine.errors import (
    AllocationNotFound,
    CreationFailed,
    FdPassing,
    LocalProtocolError,
    NamespaceError,
    SocketUnavailable,
)
from statemachine.events import Event
from statemachine.messages import (
    AllocationEnded,
    NamespaceRequest,
    NamespaceResponse,
    NamespaceType,
    objection,
)
from statemachine.provider import (
    REMEMBERED_MAX,
    WAITING_MAX,
    Limits,
    ProviderKernel,
    event_of,
)
from statemachine.provider.models import Allocation
from statemachine.states import AllocationState, ServiceState

PID, NET, MOUNT = NamespaceType.PID, NamespaceType.NET, NamespaceType.MOUNT
UNKNOWN, ENDED = AllocationState.UNKNOWN, AllocationState.ENDED
RELEASED = AllocationState.RELEASED

A: Final = NamespaceRequest("a", (NET, PID))
A_OTHERWISE: Final = NamespaceRequest("a", (PID, NET))
B: Final = NamespaceRequest("b", (PID,))
TOO_LATE: Final = CreationFailed("the allocation ended before it could be handed over")
ENDINGS: Final = [
    pytest.param(on.ScopeEmptied("a"), id="its cgroup empties"),
    pytest.param(on.EndReceived(9, "a"), id="a consumer says so"),
    pytest.param(on.InitDied("a"), id="its init dies"),
    pytest.param(on.ClaimExpired("a"), id="no consumer claims it"),
    pytest.param(on.ReleaseRequested("a"), id="an operator says so"),
]


def answer_to(request: NamespaceRequest) -> NamespaceResponse:
    return NamespaceResponse(request.allocation_id, request.namespaces)


class FedKernel:
    """A kernel to be fed line by line; connection 9 is open and asks for nothing by itself."""

    def __init__(self, limits: Limits | None = None, *, is_ready: bool = True) -> None:
        self.kernel = ProviderKernel(limits)
        if is_ready:
            self.feed(on.ProviderReady())
        self.open(9)

    def feed(self, event: Event) -> tuple[Effect, ...]:
        return self.kernel.receive(event)

    def open(self, *connections: int, uid: int = 0) -> None:
        for connection in connections:
            assert self.feed(on.ConnectionOpened(connection, uid)) == ()

    def ask(self, connection: int, request: NamespaceRequest) -> tuple[Effect, ...]:
        return self.feed(on.RequestReceived(connection, request))

    def end(self, connection: int, name: str = "a") -> tuple[Effect, ...]:
        return self.feed(on.EndReceived(connection, name))

    def lose(self, connection: int) -> tuple[Effect, ...]:
        return self.feed(on.ConnectionLost(connection))

    def create(self, request: NamespaceRequest = A) -> tuple[Effect, ...]:
        effects = self.feed(on.NamespacesCreated(request.allocation_id, answer_to(request)))
        for effect in effects:
            if isinstance(effect, do.HandOver):
                self.feed(on.ResponseSent(request.allocation_id, effect.connection))
        return effects

    def hand_over(self, connection: int, request: NamespaceRequest = A) -> None:
        """Take an allocation all the way to one consumer."""
        self.ask(connection, request)
        self.create(request)

    def release(self, name: str = "a") -> tuple[Effect, ...]:
        return self.feed(on.NamespacesReleased(name))

    def state(self, name: str = "a") -> AllocationState:
        return self.kernel.state_of(name)

    def refuses(self, event: Event) -> LocalProtocolError:
        """Feed an event that cannot be; it must be refused, and change nothing."""
        before = self.kernel.snapshot()
        with pytest.raises(LocalProtocolError) as caught:
            self.feed(event)
        always.require(always.an_error_changes_nothing(before, self.kernel.snapshot()))
        return caught.value


def test_what_a_driver_may_ask_a_kernel() -> None:
    script = FedKernel(Limits(frozenset({0, 7}), connections_per_uid=1))
    script.open(1, uid=7)
    kernel = script.kernel
    assert (kernel.user_of("a"), kernel.response_of("a")) == (None, None)
    script.ask(1, A)
    assert (kernel.user_of("a"), kernel.response_of("a")) == (7, None)
    answer = answer_to(A)
    script.feed(on.NamespacesCreated("a", answer))
    assert kernel.response_of("a") is answer, "created"
    script.feed(on.ResponseSent("a", 1))
    assert kernel.response_of("a") is answer, "handed off"
    assert repr(kernel) == "<ProviderKernel ready, 2 connections, {a: handed_off}>"
    script.end(1)
    assert (kernel.user_of("a"), kernel.response_of("a")) == (7, None)
    script.ask(1, B)
    assert repr(kernel) == "<ProviderKernel ready, 2 connections, {a: ended, b: requested}>"
    assert str(kernel.objection_to(7)) == str(
        CreationFailed("limit reached: connections of one user, at most 1")
    )
    assert isinstance(kernel.objection_to(8), SocketUnavailable)
    script.lose(1)
    assert kernel.objection_to(7) is None


@pytest.mark.parametrize("failure", [None, CreationFailed("no room")])
def test_who_asks_is_told_why_when_the_release_takes_too_long(
    failure: CreationFailed | None,
) -> None:
    script = FedKernel()
    script.open(1)
    script.ask(1, A)
    if failure is None:
        script.end(9)
    else:
        script.feed(on.NamespacesNotCreated("a", failure))
    effects = script.feed(on.ReleaseOverdue("a"))
    assert [x.error for x in effects if isinstance(x, do.Refuse)] == [failure or TOO_LATE]


def test_losing_a_connection_looks_at_what_it_has_to_do_with_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    script = FedKernel(Limits(open_per_connection=1000))
    script.open(1, 2)
    for number in range(500):
        script.hand_over(1, NamespaceRequest(f"a{number}", A.namespaces))
    script.hand_over(2, NamespaceRequest("b", A.namespaces))
    script.end(2, "never")
    looked_at: list[str] = []
    drop = Allocation.drop

    def note(allocation: Allocation, connection: int) -> None:
        looked_at.append(allocation.allocation_id)
        drop(allocation, connection)

    monkeypatch.setattr(Allocation, "drop", note)
    # Also after a snapshot, which does not have what is derived from it.
    again = ProviderKernel.restore(script.kernel.snapshot(), Limits(open_per_connection=1000))
    for kernel in (script.kernel, again):
        looked_at.clear()
        assert kernel.receive(on.ConnectionLost(2)) == (do.StartTimer(Timer.CLAIM, "b"),)
        assert looked_at == ["b"]


def test_what_is_released_is_no_concern_of_a_connection_any_more() -> None:
    script = FedKernel()
    script.open(1)
    for number in range(3):
        request = NamespaceRequest(f"a{number}", A.namespaces)
        script.hand_over(1, request)
        script.end(1, request.allocation_id)
        script.release(request.allocation_id)
    assert not script.kernel._state.connections[1].concerns


def test_who_was_handed_what_it_never_asked_for_can_be_lost_after_the_release() -> None:
    script = FedKernel()
    script.open(1, 2)
    script.hand_over(1)
    script.feed(on.ResponseSent("a", 2))
    script.end(1)
    assert do.AnnounceEnd(2, "a") in script.release()
    assert script.lose(2) == ()


@pytest.fixture
def script() -> FedKernel:
    script = FedKernel()
    script.open(1, 2, 3)
    return script


def test_basic_one_life_from_the_request_to_the_release() -> None:
    kernel = ProviderKernel()
    life: list[tuple[Event, tuple[Effect, ...]]] = [
        (on.ProviderReady(), ()),
        (on.ConnectionOpened(1, 0), ()),
        (on.RequestReceived(1, A), (do.CreateNamespaces(A),)),
        (
            on.NamespacesCreated("a", answer_to(A)),
            (do.Watch("a"), do.HandOver(1, answer_to(A))),
        ),
        (on.ResponseSent("a", 1), (do.RecordHandoff("a"),)),
        (on.ScopePopulated("a"), ()),
        (
            on.ScopeEmptied("a"),
            (do.ReleaseNamespaces("a"), do.StartTimer(Timer.RELEASE, "a")),
        ),
        (
            on.NamespacesReleased("a"),
            (do.StopTimer(Timer.RELEASE, "a"), do.AnnounceEnd(1, "a")),
        ),
        (on.ConnectionLost(1), ()),
    ]
    for event, effects in life:
        assert kernel.receive(event) == effects
    assert kernel.states == {}
    assert kernel.state_of("a") is RELEASED


# --- Step by step ------------------------------------------------------------------------------


def ask(connection: int, request: NamespaceRequest = A) -> Event:
    return on.RequestReceived(connection, request)


def made(request: NamespaceRequest = A) -> Event:
    return on.NamespacesCreated(request.allocation_id, answer_to(request))


def sent(connection: int) -> Event:
    return on.ResponseSent("a", connection)


def end(connection: int, name: str = "a") -> Event:
    return on.EndReceived(connection, name)


def lost(connection: int) -> Event:
    return on.ConnectionLost(connection)


def granted(connection: int, request: NamespaceRequest = A) -> Effect:
    return do.HandOver(connection, answer_to(request))


def told(connection: int) -> Effect:
    return do.AnnounceEnd(connection, "a")


NOTHING: Final = NamespaceRequest("a", ())
MOUNTED: Final = NamespaceRequest("a", (MOUNT,))
WITH_IMAGE: Final = NamespaceRequest("a", (MOUNT,), "x.sqfs")
FAILURE: Final = CreationFailed("unshare: unshare(2): ENOSPC")
NOT_MADE: Final = on.NamespacesNotCreated("a", FAILURE)
UNSENT: Final = on.ResponseNotSent("a", 1, FdPassing("EMFILE"))
GARBLED: Final = on.FrameRejected("N is 0", 1)
EMPTIED: Final = on.ScopeEmptied("a")
DELAYED: Final = on.ReleaseDelayed("a", "1 process does not die")
OVERDUE: Final = on.ReleaseOverdue("a")
FREED: Final = on.NamespacesReleased("a")
OPERATOR: Final = on.ReleaseRequested("a")
READY: Final = on.ProviderReady()
STOPPING: Final = on.ProviderStopping()
REMAINS: Final = on.RemainsFound("a", A)
POPULATED: Final = on.ScopePopulated("a")
CREATED_BEFORE: Final = on.CreatedAdopted("a", A, answer_to(A))
HANDED_BEFORE: Final = on.HandedOffAdopted("a", A, answer_to(A))
HELD: Final[tuple[Event, ...]] = (ask(1), made(), sent(1))
"""A whole hand-over, to connection 1."""
OVER: Final[tuple[Event, ...]] = (*HELD, EMPTIED)
OVERTAKEN: Final[tuple[Event, ...]] = (HANDED_BEFORE, ask(1), end(2))

WATCHED, WATCHED_B = do.Watch("a"), do.Watch("b")
RELEASING: Final = (do.ReleaseNamespaces("a"), do.StartTimer(Timer.RELEASE, "a"))
IN_TIME: Final = do.StopTimer(Timer.RELEASE, "a")
CLAIM_ON, CLAIM_OFF = do.StartTimer(Timer.CLAIM, "a"), do.StopTimer(Timer.CLAIM, "a")
WAIT_OFF: Final = do.StopTimer(Timer.READINESS, "")
CREATING: Final = do.CreateNamespaces(A)
RECORDED: Final = do.RecordHandoff("a")
CONFLICT: Final = CreationFailed("allocation a is alive with another request")
UNKNOWN_END: Final = do.Refuse(1, AllocationNotFound("never"))
UNREADABLE: Final = do.Refuse(1, FdPassing("N is 0"))
HANG_UP: Final = do.CloseConnection(1)
STOPPED: Final = SocketUnavailable("the provider is shutting down")
UNRELEASED: Final = "the allocation before it has ended but is not released: "
DRAINING: Final = CreationFailed(f"{UNRELEASED}its release takes long")
STUCK: Final = CreationFailed(f"{UNRELEASED}1 process does not die")

Example: TypeAlias = tuple[tuple[Event, ...], Event, tuple[Effect, ...]]
"""What happened before; what happens now, and what is done about it."""

STEPS: Final[list[Example]] = [
    # The same request gets the same namespaces, and creates nothing. (LIFE-3, LIFE-4)
    (HELD, ask(2), (granted(2),)),
    (HELD, ask(1), (granted(1),)),
    ((), ask(1), (CREATING,)),
    ((ask(1),), ask(2), ()),
    ((ask(1), ask(2), ask(1)), made(), (WATCHED, granted(1), granted(1), granted(2))),
    # Another request is refused; order and image belong to it. (LIFE-5)
    ((ask(1),), ask(2, A_OTHERWISE), (do.Refuse(2, CONFLICT),)),
    ((ask(1), made()), ask(2, A_OTHERWISE), (do.Refuse(2, CONFLICT),)),
    (HELD, ask(2, A_OTHERWISE), (do.Refuse(2, CONFLICT),)),
    ((*HELD, ask(2, A_OTHERWISE)), ask(2), (granted(2),)),
    ((ask(1, MOUNTED),), ask(2, WITH_IMAGE), (do.Refuse(2, CONFLICT),)),
    # Descriptors that cannot be had leave the allocation as it is. (FD-13)
    ((ask(1), made()), UNSENT, ()),
    ((ask(1), made(), UNSENT), ask(2), (granted(2),)),
    ((ask(1), made(), UNSENT, ask(2)), sent(2), (RECORDED,)),
    # A creation that fails: everyone who asked hears why, when all is gone.
    ((ask(1), ask(2)), NOT_MADE, RELEASING),
    ((ask(1), ask(2), NOT_MADE), FREED, (IN_TIME, do.Refuse(1, FAILURE), do.Refuse(2, FAILURE))),
    # Nothing at all may be asked for.
    ((ask(1, NOTHING),), made(NOTHING), (WATCHED, granted(1, NOTHING))),
    # Who was handed nothing is told of no end; a second hand-over that fails undoes no first.
    ((ask(1), made(), UNSENT, EMPTIED), FREED, (IN_TIME,)),
    ((*HELD, ask(1), UNSENT, EMPTIED), FREED, (IN_TIME, told(1))),
    # A hand-over is recorded once.
    ((*HELD, ask(2)), sent(2), ()),
    # Answers wait for their turn, and hold up no other connection. (WIRE-14)
    ((ask(1), ask(1, B), end(1, "never")), made(B), (WATCHED_B,)),
    (
        (ask(1), ask(1, B), end(1, "never"), made(B)),
        made(),
        (WATCHED, granted(1), granted(1, B), UNKNOWN_END),
    ),
    ((ask(1), ask(1, B), ask(2, B)), made(B), (WATCHED_B, granted(2, B))),
    ((ask(1),), ask(1, A_OTHERWISE), ()),
    ((ask(1), ask(1, A_OTHERWISE)), made(), (WATCHED, granted(1), do.Refuse(1, CONFLICT))),
    ((ask(1),), GARBLED, ()),
    ((ask(1), GARBLED), made(), (WATCHED, granted(1), UNREADABLE, HANG_UP)),
    # An end that is pushed may come in between. (WIRE-15)
    ((*HELD, ask(1, B), EMPTIED), FREED, (IN_TIME, told(1))),
    ((*HELD, ask(1, B), EMPTIED, FREED), made(B), (WATCHED_B, granted(1, B))),
    # A frame that cannot be read is answered, and concerns no other connection. (WIRE-11, WIRE-12)
    ((), GARBLED, (UNREADABLE, HANG_UP)),
    ((*HELD, ask(2, B), GARBLED), made(B), (WATCHED_B, granted(2, B))),
    ((*HELD, ask(2, B), GARBLED), ask(2), ()),
    # What ended before its turn is not handed over.
    (
        (ask(1, B), ask(1), made(), on.InitDied("a"), FREED),
        made(B),
        (WATCHED_B, granted(1, B), do.Refuse(1, TOO_LATE)),
    ),
    # Nothing is sent on a connection that is being closed, or is lost.
    ((*HELD, GARBLED, EMPTIED), FREED, (IN_TIME,)),
    ((*HELD, lost(1), EMPTIED), FREED, (IN_TIME,)),
    # An end is pushed once to each that was handed it, before the last word there. (END-12)
    ((*HELD, ask(2), sent(2), ask(2), sent(2), EMPTIED), FREED, (IN_TIME, told(1), told(2))),
    (
        (*HELD, OPERATOR, ask(1), GARBLED),
        OVERDUE,
        (told(1), do.Refuse(1, DRAINING), UNREADABLE, HANG_UP),
    ),
    # Who ends gets the end as the answer, and not twice; or hears that it never was. (END-13)
    ((*HELD, end(1)), FREED, (IN_TIME, told(1))),
    ((), end(1, "never"), (UNKNOWN_END,)),
    # Every end has its answer: equal ones, crossing ones, and from two sides.
    ((*HELD, end(1), end(1)), FREED, (IN_TIME, told(1), told(1))),
    ((*OVER, FREED), end(1), (told(1),)),
    ((*HELD, end(1)), end(2), ()),
    ((*HELD, end(1), end(2)), FREED, (IN_TIME, told(1), told(2))),
    ((*OVER, FREED, end(2)), end(2), (told(2),)),
    # A creation that is undone, by either side, and whether it succeeds. (END-16)
    ((ask(1), ask(3)), end(2), RELEASING),
    ((ask(1), ask(3), end(2)), made(), ()),
    (
        (ask(1), ask(3), end(2), made()),
        FREED,
        (IN_TIME, told(2), do.Refuse(1, TOO_LATE), do.Refuse(3, TOO_LATE)),
    ),
    ((ask(1), end(2)), NOT_MADE, ()),
    ((ask(1), end(2), NOT_MADE), FREED, (IN_TIME, told(2), do.Refuse(1, FAILURE))),
    ((ask(1), end(1), made()), FREED, (IN_TIME, do.Refuse(1, TOO_LATE), told(1))),
    ((ask(1),), OPERATOR, RELEASING),
    ((ask(1), OPERATOR, made()), FREED, (IN_TIME, do.Refuse(1, TOO_LATE))),
    # A request during the release waits, and starts a new incarnation. (LIFE-6)
    (OVER, ask(2, A_OTHERWISE), ()),
    ((*OVER, ask(2, A_OTHERWISE)), FREED, (IN_TIME, told(1), do.CreateNamespaces(A_OTHERWISE))),
    ((*OVER, ask(2, A_OTHERWISE), FREED), made(A_OTHERWISE), (WATCHED, granted(2, A_OTHERWISE))),
    # After the release, the name is free for another request.
    ((*OVER, FREED), ask(1, A_OTHERWISE), (do.CreateNamespaces(A_OTHERWISE),)),
    # At the release deadline the end is announced, and not again; a later end is confirmed at once.
    ((*OVER, DELAYED), OVERDUE, (told(1),)),
    ((*OVER, DELAYED, OVERDUE, on.RetryDue("a")), FREED, ()),
    ((*OVER, OVERDUE), end(2), (told(2),)),
    ((*OVER, OVERDUE), ask(2), (do.Refuse(2, DRAINING),)),
    # Then a request is refused with what is still there. (LIFE-7)
    ((*OVER, ask(2), DELAYED), OVERDUE, (told(1), do.Refuse(2, STUCK))),
    ((*OVER, DELAYED, OVERDUE), ask(3), (do.Refuse(3, STUCK),)),
    # An early request is taken back by an end behind it, or the answer to that end would stand for
    # a set that is alive and that no consumer owes for (END-17); and by the loss of its connection,
    # but not by an end on another.
    ((*OVER, ask(2)), end(2), (do.Refuse(2, TOO_LATE),)),
    ((*OVER, ask(2), end(2)), FREED, (IN_TIME, told(1), told(2))),
    ((*OVER, ask(2), lost(2)), FREED, (IN_TIME, told(1))),
    ((*OVER, ask(2), end(3)), FREED, (IN_TIME, told(1), told(3), CREATING)),
    # The claim timer runs from the loss of the last that asked. (END-3)
    ((*HELD, ask(2)), lost(1), ()),
    ((*HELD, ask(2), lost(1)), lost(2), (CLAIM_ON,)),
    # A lost connection changes nothing of what is used. (LIFE-2)
    ((*HELD, POPULATED), lost(1), ()),
    # Who was refused did not ask; a request stops the claim timer, use stops it for good.
    ((*HELD, ask(2, A_OTHERWISE)), lost(1), (CLAIM_ON,)),
    ((*HELD, lost(1)), ask(2), (CLAIM_OFF, granted(2))),
    ((*HELD, lost(1)), POPULATED, (CLAIM_OFF,)),
    ((*HELD, lost(1), POPULATED, ask(2)), lost(2), ()),
    ((*HELD, lost(1)), end(2), (CLAIM_OFF, *RELEASING)),
    # Who asked is lost during the creation.
    ((ask(1),), lost(1), ()),
    ((ask(1), lost(1)), made(), (WATCHED, CLAIM_ON)),
    # While it stops, requests are refused (ERR-3), ends are taken, creations under way answered.
    (HELD, STOPPING, ()),
    ((*HELD, STOPPING), ask(2), (do.Refuse(2, STOPPED),)),
    ((*HELD, STOPPING), end(2), RELEASING),
    ((*HELD, STOPPING, end(2)), FREED, (IN_TIME, told(1), told(2))),
    ((*OVER, ask(2)), STOPPING, (do.Refuse(2, STOPPED),)),
    ((*OVER, ask(2), STOPPING), FREED, (IN_TIME, told(1))),
    ((ask(1), STOPPING), made(), (WATCHED, granted(1))),
]
STARTING_STEPS: Final[list[Example]] = [
    # The readiness timer stops with the last that waits.
    ((ask(1), ask(2)), lost(1), ()),
    ((ask(1), ask(2), lost(1)), lost(2), (WAIT_OFF,)),
    ((ask(1), ask(2), lost(1), lost(2)), READY, ()),
    # An end that waits behind its request undoes it.
    ((ask(1), end(1)), READY, (WAIT_OFF, CREATING, *RELEASING)),
    # What is alive is handed over again.
    ((), CREATED_BEFORE, (WATCHED, CLAIM_ON)),
    ((), HANDED_BEFORE, (WATCHED, CLAIM_ON)),
    ((CREATED_BEFORE, READY), ask(1), (CLAIM_OFF, granted(1))),
    ((HANDED_BEFORE, READY), ask(1), (CLAIM_OFF, granted(1))),
    ((CREATED_BEFORE, READY), ask(1, A_OTHERWISE), (do.Refuse(1, CONFLICT),)),
    ((HANDED_BEFORE, READY), ask(1, A_OTHERWISE), (do.Refuse(1, CONFLICT),)),
    # A provider that stops before it is ready answers all that wait. (LIFE-16)
    ((ask(1), end(1, "b")), STOPPING, (WAIT_OFF, do.Refuse(1, STOPPED), do.Refuse(1, STOPPED))),
    # What remains is released, and the name can be used again.
    ((), REMAINS, RELEASING),
    ((REMAINS, READY), ask(1), ()),
    ((REMAINS, READY, ask(1)), FREED, (IN_TIME, CREATING)),
    # A hand-over that an end overtakes, decided in the same step, is no error; nor if it fails.
    (OVERTAKEN, READY, (WAIT_OFF, CLAIM_OFF, granted(1), *RELEASING)),
    ((*OVERTAKEN, READY), sent(1), ()),
    ((*OVERTAKEN, READY, sent(1)), FREED, (IN_TIME, told(1), told(2))),
    ((*OVERTAKEN, READY), UNSENT, ()),
    ((*OVERTAKEN, READY, UNSENT), FREED, (IN_TIME, told(2))),
]


@pytest.mark.clause("LIFE-2", "LIFE-3", "LIFE-4", "LIFE-5", "LIFE-6", "LIFE-7", "LIFE-16")
@pytest.mark.clause("END-3", "END-12", "END-13", "END-16", "END-17", "ERR-3", "FD-13")
@pytest.mark.clause("WIRE-11", "WIRE-12", "WIRE-14", "WIRE-15")
@pytest.mark.parametrize(
    ("is_ready", "before", "event", "effects"),
    [*((True, *step) for step in STEPS), *((False, *step) for step in STARTING_STEPS)],
)
def test_a_step_is_as_written(
    is_ready: bool, before: tuple[Event, ...], event: Event, effects: tuple[Effect, ...]
) -> None:
    script = FedKernel(is_ready=is_ready)
    script.open(1, 2, 3)
    for earlier in before:
        script.feed(earlier)
    assert script.feed(event) == effects


# --- Hand-over ---------------------------------------------------------------------------------


@pytest.mark.clause("LIFE-12", "ERR-1")
@pytest.mark.parametrize(
    "request_",
    [
        NamespaceRequest("", ()),
        NamespaceRequest("a/b", (PID,)),
        NamespaceRequest("a", (PID, PID)),
        NamespaceRequest("a", (PID,), "x.sqfs"),
    ],
)
def test_a_request_that_breaks_a_rule_is_refused_without_any_effect(
    script: FedKernel, request_: NamespaceRequest
) -> None:
    before = script.kernel.snapshot()
    (refusal,) = script.ask(1, request_)
    assert isinstance(refusal, do.Refuse)
    assert refusal.error == CreationFailed(str(objection(request_)))
    assert script.kernel.snapshot() == before


def test_what_is_released_before_its_turn_is_not_handed_over(script: FedKernel) -> None:
    script.ask(1, B)
    script.ask(1, A)
    script.create(A)
    script.feed(on.ScopeEmptied("a"))
    script.create(B)
    script.end(1)
    assert do.Refuse(1, TOO_LATE) in script.release()


@pytest.mark.parametrize(
    ("message", "event"),
    [
        (A, on.RequestReceived(7, A)),
        (AllocationEnded("a"), on.EndReceived(7, "a")),
        (answer_to(A), on.FrameRejected("NamespaceResponse is not for the provider", 7)),
        (FdPassing("x"), on.FrameRejected("FdPassing is not for the provider", 7)),
        (CreationFailed("x"), on.FrameRejected("CreationFailed is not for the provider", 7)),
        # An end whose answer could not be sent is as good as unreadable.
        (
            AllocationEnded("x" * 129),
            on.FrameRejected("allocation_id has 129 bytes; 1 to 128 are allowed", 7),
        ),
    ],
)
def test_a_message_is_named_as_what_it_means(message: Any, event: Event) -> None:
    assert event_of(7, message) == event


# --- Ends --------------------------------------------------------------------------------------


@pytest.mark.clause("END-1")
@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("is_handed", [False, True], ids=["created", "handed off"])
def test_whichever_reason_comes_first_ends_it(
    script: FedKernel, ending: Event, is_handed: bool
) -> None:
    script.ask(1, A)
    script.feed(on.NamespacesCreated("a", answer_to(A)))
    if is_handed:
        script.feed(on.ResponseSent("a", 1))
    if isinstance(ending, on.ClaimExpired):
        script.lose(1)
    effects = script.feed(ending)
    assert effects == (do.ReleaseNamespaces("a"), do.StartTimer(Timer.RELEASE, "a"))
    assert script.state() is ENDED


@pytest.mark.clause("END-2")
@pytest.mark.parametrize("first", ENDINGS)
def test_the_later_reasons_to_end_have_no_effect(script: FedKernel, first: Event) -> None:
    script.hand_over(1)
    if isinstance(first, on.ClaimExpired):
        script.lose(1)
    script.feed(first)
    later = [
        on.ScopeEmptied("a"),
        on.InitDied("a"),
        on.ReleaseRequested("a"),
        on.EndReceived(9, "a"),
    ]
    for event in later:
        assert script.feed(event) == ()


@pytest.mark.clause("END-20")
def test_an_end_is_taken_however_many_messages_are_unanswered() -> None:
    script = FedKernel(Limits(open_per_connection=2, open_per_uid=2))
    script.open(1)
    script.ask(1, A)
    script.ask(1, B)
    assert do.ReleaseNamespaces("a") in script.end(1, "a")
    assert script.state("a") is ENDED


def live_and_end(script: FedKernel, *names: str) -> None:
    for name in names:
        script.hand_over(9, NamespaceRequest(name, ()))
        script.end(9, name)
        script.release(name)


@pytest.mark.clause("END-18")
def test_the_oldest_name_is_forgotten_first() -> None:
    script = FedKernel(Limits(remembered=2))
    live_and_end(script, "x", "y", "z")
    assert script.end(9, "x") == (do.Refuse(9, AllocationNotFound("x")),)
    assert script.end(9, "y") == (do.AnnounceEnd(9, "y"),)
    assert script.end(9, "z") == (do.AnnounceEnd(9, "z"),)


def test_a_name_that_is_used_again_is_remembered_as_of_its_last_end() -> None:
    script = FedKernel(Limits(remembered=2))
    live_and_end(script, "x", "y", "x", "z")
    assert (script.state("x"), script.state("y")) == (RELEASED, UNKNOWN)


def test_a_name_that_is_used_again_takes_no_place_among_the_remembered() -> None:
    script = FedKernel(Limits(remembered=2))
    live_and_end(script, "x", "y")
    script.hand_over(9, NamespaceRequest("y", ()))
    live_and_end(script, "b")
    assert script.state("x") is RELEASED


def test_a_new_provider_is_starting_and_empty() -> None:
    assert ProviderKernel().snapshot() == (ServiceState.STARTING, (), (), (), ())


def test_names_are_remembered_in_addition() -> None:
    kernel = ProviderKernel()
    kernel.remember(["x"])
    kernel.remember(["y"])
    assert [kernel.state_of(name) for name in "xyz"] == [RELEASED, RELEASED, UNKNOWN]


@pytest.mark.clause("END-18")
def test_about_a_thousand_names_are_remembered() -> None:
    assert Limits().remembered == REMEMBERED_MAX == 1024


# --- Releasing takes its time ------------------------------------------------------------------


def test_a_release_that_is_delayed_is_tried_again_until_it_is_done(script: FedKernel) -> None:
    script.hand_over(1)
    script.end(1)
    for _ in range(3):
        delayed = script.feed(on.ReleaseDelayed("a", "process 7 is in D state"))
        assert delayed == (do.StartTimer(Timer.RETRY, "a"),)
        assert script.kernel.drain_of("a") == "process 7 is in D state"
        assert script.feed(on.RetryDue("a")) == (do.ReleaseNamespaces("a"),)
    assert script.release()[1:] == (do.AnnounceEnd(1, "a"),)
    assert script.kernel.drain_of("a") == ""


# --- Readiness ---------------------------------------------------------------------------------


@pytest.mark.clause("LIFE-15")
@pytest.mark.clause("LIFE-13")
def test_before_it_is_ready_messages_wait_in_order() -> None:
    script = FedKernel(is_ready=False)
    script.open(1, 2)
    assert script.ask(2, A) == (do.StartTimer(Timer.READINESS, ""),)
    assert script.ask(1, A_OTHERWISE) == ()
    assert script.end(1, "nobody") == ()
    ready, create, *answers = script.feed(on.ProviderReady())
    assert (ready, create) == (do.StopTimer(Timer.READINESS, ""), do.CreateNamespaces(A))
    conflict = CreationFailed("allocation a is alive with another request")
    assert answers == [do.Refuse(1, conflict), do.Refuse(1, AllocationNotFound("nobody"))]


@pytest.mark.clause("LIFE-14")
def test_no_more_wait_than_the_limit_allows() -> None:
    script = FedKernel(Limits(open_per_connection=1000), is_ready=False)
    for number in range(WAITING_MAX):
        script.ask(9, NamespaceRequest(f"job-{number}", ()))
    script.open(1)
    full = SocketUnavailable("128 messages already wait for the provider")
    assert script.ask(1, A) == (do.Refuse(1, full),)
    made = [x for x in script.feed(on.ProviderReady()) if isinstance(x, do.CreateNamespaces)]
    assert [x.request.allocation_id for x in made] == [f"job-{n}" for n in range(WAITING_MAX)]


@pytest.mark.clause("LIFE-14")
def test_who_waited_too_long_is_told_that_it_is_unavailable() -> None:
    script = FedKernel(is_ready=False)
    script.open(1, 2)
    script.ask(1, A)
    script.ask(2, B)
    late = SocketUnavailable("the provider did not become ready in time")
    assert script.feed(on.ReadinessOverdue()) == (do.Refuse(1, late), do.Refuse(2, late))
    assert script.feed(on.ProviderReady()) == ()
    assert script.ask(1, A) == (do.CreateNamespaces(A),)


# --- After a restart ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "event",
    [
        on.CreatedAdopted("a", A, answer_to(A)),
        on.HandedOffAdopted("a", A, answer_to(A)),
        on.RemainsFound("a", A),
    ],
    ids=lambda event: type(event).__name__,
)
def test_a_name_that_is_remembered_may_be_found_in_use_again(event: Event) -> None:
    script = FedKernel(is_ready=False)
    script.kernel.remember(["a"])
    script.feed(event)
    assert "a" in script.kernel.states


def test_a_restart_adopts_for_no_user_and_counts_for_no_limit() -> None:
    script = FedKernel(Limits(allocations_per_uid=1), is_ready=False)
    script.feed(on.CreatedAdopted("a", A, answer_to(A)))
    script.feed(on.ProviderReady())
    assert script.ask(9, B) == (do.CreateNamespaces(B),)


# --- Peers and limits --------------------------------------------------------------------------


def refused(effects: tuple[Effect, ...], naming: str) -> NamespaceError:
    (refusal,) = [effect for effect in effects if isinstance(effect, do.Refuse)]
    assert naming in refusal.error.text
    return refusal.error


@pytest.mark.clause("ERR-3", "PEER-1")
def test_a_user_who_is_not_allowed_is_turned_away_before_anything_is_read() -> None:
    script = FedKernel(Limits(allowed_uids=frozenset({0, 1000})))
    effects = script.feed(on.ConnectionOpened(1, 1001))
    assert effects == (
        do.Refuse(1, SocketUnavailable("user 1001 may not use this provider")),
        do.CloseConnection(1),
    )
    script.refuses(on.RequestReceived(1, A))
    script.open(2, uid=1000)


@pytest.mark.clause("PEER-2")
def test_by_default_only_root_is_allowed() -> None:
    assert Limits().allowed_uids == {0}


@pytest.mark.clause("ERR-4")
def test_a_connection_too_many_is_refused_by_the_name_of_the_limit() -> None:
    script = FedKernel(Limits(connections_per_uid=2, allowed_uids=frozenset({0, 1})))
    script.open(1)
    effects = script.feed(on.ConnectionOpened(2, 0))
    assert isinstance(refused(effects, "connections of one user, at most 2"), CreationFailed)
    assert effects[-1] == do.CloseConnection(2)
    # Another user has another limit.
    script.open(3, uid=1)
    script.lose(2)
    script.lose(1)
    script.open(4)
    # One that is lost makes room for one.
    assert script.feed(on.ConnectionOpened(5, 0))[-1] == do.CloseConnection(5)


@pytest.mark.clause("PEER-5")
def test_messages_too_many_on_one_connection_are_refused_and_no_other_is_held_up() -> None:
    script = FedKernel(Limits(open_per_connection=2))
    script.open(1)
    script.ask(9, A)
    script.ask(9, B)
    assert script.ask(9, NamespaceRequest("c", ())) == ()
    assert script.ask(1, A) == ()
    script.create(A)
    effects = script.create(B)
    error = refused(effects, "unanswered messages of one connection, at most 2")
    assert isinstance(error, CreationFailed)
    assert script.ask(9, NamespaceRequest("c", ())) != ()


@pytest.mark.clause("PEER-6")
def test_a_connection_that_goes_on_beyond_its_limit_is_closed() -> None:
    script = FedKernel(Limits(open_per_connection=2))
    script.ask(9, A)
    for _ in range(3):
        assert script.ask(9, A) == ()
    *_, last, closed = script.ask(9, A)
    assert last == do.Refuse(9, FdPassing("over 4 unanswered messages of one connection"))
    assert closed == do.CloseConnection(9)
    assert script.lose(9) == ()


@pytest.mark.clause("LIFE-15")
def test_messages_too_many_of_one_user_are_refused() -> None:
    script = FedKernel(Limits(open_per_uid=2, allowed_uids=frozenset({0, 1})))
    script.open(1, 2)
    script.ask(1, A)
    script.ask(2, A)
    error = refused(script.ask(9, A), "unanswered messages of one user, at most 2")
    assert isinstance(error, CreationFailed)
    script.open(3, uid=1)
    assert script.ask(3, A) == ()
    script.create()
    assert script.ask(9, A) == (do.HandOver(9, answer_to(A)),)


def test_allocations_too_many_of_one_user_are_refused_until_one_is_released() -> None:
    script = FedKernel(Limits(allocations_per_uid=1, allowed_uids=frozenset({0, 1})))
    script.hand_over(9)
    error = refused(script.ask(9, B), "live allocations of one user, at most 1")
    assert isinstance(error, CreationFailed)
    assert script.ask(9, A) == (do.HandOver(9, answer_to(A)),)
    script.open(1, uid=1)
    assert script.ask(1, B) == (do.CreateNamespaces(B),)
    script.end(9)
    script.release()
    # One that is released makes room for one.
    c, d = NamespaceRequest("c", ()), NamespaceRequest("d", ())
    assert script.ask(9, c) == (do.CreateNamespaces(c),)
    script.create(c)
    refused(script.ask(9, d), "live allocations of one user, at most 1")


def test_a_restored_kernel_counts_on() -> None:
    limits = Limits(connections_per_uid=3, open_per_uid=4, allocations_per_uid=3)
    c, d = NamespaceRequest("c", ()), NamespaceRequest("d", ())
    script = FedKernel(limits)
    script.open(1)
    for connection in (1, 9):
        script.ask(connection, A)
        script.ask(connection, B)
    script.kernel = ProviderKernel.restore(script.kernel.snapshot(), limits)
    script.open(2)
    refused(script.ask(2, c), "unanswered messages of one user, at most 4")
    refused(script.feed(on.ConnectionOpened(3, 0)), "connections of one user, at most 3")
    script.create(A)
    script.create(B)
    assert script.ask(2, c) == (do.CreateNamespaces(c),)
    refused(script.ask(9, d), "live allocations of one user, at most 3")


def test_the_limit_counts_what_has_ended_until_it_is_released() -> None:
    script = FedKernel(Limits(allocations_per_uid=1))
    script.hand_over(9)
    script.feed(on.InitDied("a"))
    refused(script.ask(9, B), "live allocations of one user")
    # The one that waits for that very release is not one more.
    assert script.ask(9, A) == ()
    assert do.CreateNamespaces(A) in script.release()


# --- What cannot be ----------------------------------------------------------------------------

IMPOSSIBLE: Final[list[Event]] = [
    on.ConnectionOpened(9, 0),
    on.ConnectionLost(77),
    on.RequestReceived(77, A),
    on.EndReceived(77, "a"),
    on.FrameRejected("x", 77),
    on.ProviderReady(),
    on.ReadinessOverdue(),
    on.NamespacesCreated("nobody", answer_to(A)),
    on.NamespacesNotCreated("nobody", CreationFailed("x")),
    on.ResponseSent("nobody", 9),
    on.ResponseNotSent("nobody", 9, FdPassing("x")),
    on.ClaimExpired("nobody"),
    on.ScopePopulated("nobody"),
    on.ScopeEmptied("nobody"),
    on.InitDied("nobody"),
    on.ReleaseRequested("nobody"),
    on.NamespacesReleased("a"),
    on.ReleaseDelayed("a", "x"),
    on.RetryDue("a"),
    on.ReleaseOverdue("a"),
    on.NamespacesCreated("a", answer_to(A)),
    on.CreatedAdopted("a", A, answer_to(A)),
    on.HandedOffAdopted("a", A, answer_to(A)),
    on.RemainsFound("a", A),
    # Named by the kernel alone.
    on.Unclaimed(),
    on.RequestRepeated(),
    on.RequestConflicting(),
    on.RequestEarly(),
    on.RequestDuringDrain(),
    on.EndRepeated(),
    # The consumer's.
    on.NamespacesWanted(),
    on.Connected(),
    on.EndAnnounced(),
]


@pytest.mark.clause("LIFE-1")
@pytest.mark.parametrize("event", IMPOSSIBLE, ids=lambda event: type(event).__name__)
def test_an_impossible_event_raises_and_changes_nothing(script: FedKernel, event: Event) -> None:
    script.hand_over(1)
    error = script.refuses(event)
    assert error.event == type(event).__name__
    # It goes on as if nothing had been.
    assert script.ask(2, A) == (do.HandOver(2, answer_to(A)),)


EARLY_END: Final[tuple[Event, ...]] = (ask(1, B), on.EndReceived(9, "b"))
CLOSING_LATER: Final[tuple[Event, ...]] = (ask(1, B), GARBLED)
MISUSES: Final[list[tuple[tuple[Event, ...], Event, str]]] = [
    # What happened before, what cannot be, whose it is and where that stands.
    ((), on.NamespacesWanted(), "the provider is ready"),
    ((), READY, "the provider is ready"),
    ((), on.ReadinessOverdue(), "the provider is ready"),
    ((), on.CreatedAdopted("b", B, answer_to(B)), "the provider is ready"),
    ((), on.HandedOffAdopted("b", B, answer_to(B)), "the provider is ready"),
    ((), on.RemainsFound("b", B), "the provider is ready"),
    ((STOPPING,), STOPPING, "the provider is stopping"),
    ((STOPPING,), READY, "the provider is stopping"),
    ((), on.ConnectionOpened(9, 0), "connection 9 is open"),
    ((), lost(8), "connection 8 is not open"),
    ((GARBLED,), ask(1), "connection 1 is closing"),
    ((GARBLED,), end(1), "connection 1 is closing"),
    (CLOSING_LATER, GARBLED, "connection 1 is closing"),
    (CLOSING_LATER, end(1), "connection 1 is closing"),
    ((), on.InitDied("a"), "allocation a is unknown"),
    ((ask(1), made()), on.ClaimExpired("a"), "allocation a is created without a claim timer"),
    (HELD, on.ClaimExpired("a"), "allocation a is handed_off without a claim timer"),
    (
        (*HELD, lost(1), ask(9)),
        on.ClaimExpired("a"),
        "allocation a is handed_off without a claim timer",
    ),
    (OVER, on.RetryDue("a"), "allocation a is ended without a retry timer"),
    ((*OVER, OVERDUE), OVERDUE, "allocation a is ended without a release timer"),
    ((*OVER, DELAYED), DELAYED, "allocation a is ended and not being released"),
    ((*OVER, DELAYED), FREED, "allocation a is ended and not being released"),
    (HELD, made(), "allocation a is handed_off"),
    (OVER, made(), "allocation a is ended and not being made"),
    ((ask(9), end(9), made()), made(), "allocation a is ended and not being made"),
    (OVER, NOT_MADE, "allocation a is ended and not being made"),
    (EARLY_END, on.NamespacesReleased("b"), "allocation b is ended and still being made"),
    (EARLY_END, on.ReleaseDelayed("b", "x"), "allocation b is ended and still being made"),
]


@pytest.mark.clause("LIFE-1")
@pytest.mark.parametrize(("before", "event", "where"), MISUSES)
def test_a_misuse_is_named_with_whose_it_is_and_where_that_stands(
    script: FedKernel, before: tuple[Event, ...], event: Event, where: str
) -> None:
    for earlier in before:
        script.feed(earlier)
    assert str(script.refuses(event)) == f"{type(event).__name__} is not possible while {where}"


# --- Random walks ------------------------------------------------------------------------------


def walk(rng: random.Random, steps: int, look: Callable[[ProviderKernel, Event], None]) -> str:
    """Feed what may happen, and what may not; give a text that says all that came of it."""
    kernel = ProviderKernel(Limits(remembered=1, open_per_connection=3, waiting=4))
    said: list[str] = []
    for _ in range(steps):
        event = rng.choice(EVERYTHING)
        look(kernel, event)
        try:
            said.append(repr(kernel.receive(event)))
        except LocalProtocolError as error:
            said.append(str(error))
    return "\n".join([*said, repr(kernel.states)])


EVERYTHING: Final[list[Event]] = [
    *[on.ConnectionOpened(c, 0) for c in (1, 2)] * 3,
    *[on.ConnectionLost(c) for c in (1, 2)],
    *[on.RequestReceived(c, r) for c in (1, 2) for r in (A, A_OTHERWISE, B)] * 3,
    *[on.EndReceived(c, n) for c in (1, 2) for n in "ab"] * 2,
    on.FrameRejected("x", 1),
    *[on.ProviderReady()] * 6,
    on.ReadinessOverdue(),
    *[on.NamespacesCreated(r.allocation_id, answer_to(r)) for r in (A, B)] * 3,
    *[on.NamespacesNotCreated(n, CreationFailed("x")) for n in "ab"],
    *[on.ResponseSent(n, c) for n in "ab" for c in (1, 2)],
    *[on.ResponseNotSent(n, 1, FdPassing("x")) for n in "ab"],
    *[kind(n) for n in "ab" for kind in (on.ScopePopulated, on.ScopeEmptied, on.InitDied)],
    *[kind(n) for n in "ab" for kind in (on.ClaimExpired, on.ReleaseRequested)],
    *[kind(n) for n in "ab" for kind in (on.RetryDue, on.ReleaseOverdue)],
    *[on.NamespacesReleased(n) for n in "ab"] * 3,
    on.ReleaseDelayed("a", "x"),
    on.CreatedAdopted("a", A, answer_to(A)),
    on.HandedOffAdopted("b", B, answer_to(B)),
    on.RemainsFound("b", B),
]


@given(st.randoms(use_true_random=False))
def test_a_kernel_restored_from_any_snapshot_goes_on_the_same(rng: random.Random) -> None:
    limits = Limits(remembered=1, open_per_connection=3, waiting=4)

    def look(kernel: ProviderKernel, event: Event) -> None:
        snapshot = kernel.snapshot()
        twin = ProviderKernel.restore(snapshot, limits)
        assert twin.snapshot() == snapshot
        assert hash(twin.snapshot()) == hash(snapshot)
        again = ProviderKernel.restore(snapshot, limits)
        assert outcome(twin, event) == outcome(again, event)
        # A snapshot is a value: what its kernel does later leaves it alone.
        assert ProviderKernel.restore(snapshot, limits).snapshot() == snapshot
        twins.append((twin, event))

    twins: list[tuple[ProviderKernel, Event]] = []
    after: list[Any] = []

    def compare(kernel: ProviderKernel, event: Event) -> None:
        if twins:
            assert twins[-1][0].snapshot() == kernel.snapshot()
        after.append(event)
        look(kernel, event)

    walk(rng, 40, compare)


def outcome(kernel: ProviderKernel, event: Event) -> tuple[Any, Any]:
    before = kernel.snapshot()
    try:
        effects: Any = kernel.receive(event)
    except LocalProtocolError as error:
        effects = str(error)
        always.require(always.an_error_changes_nothing(before, kernel.snapshot()))
    return effects, kernel.snapshot()


@given(st.integers(0, 2**32))
def test_the_same_events_have_the_same_effects(seed: int) -> None:
    first = walk(random.Random(seed), 40, lambda kernel, event: None)
    assert walk(random.Random(seed), 40, lambda kernel, event: None) == first


def walk_many() -> str:
    return "\n".join(
        walk(random.Random(seed), 60, lambda kernel, event: None) for seed in range(40)
    )


@pytest.mark.parametrize("hash_seed", ["1", "4242"])
def test_effects_do_not_depend_on_how_python_hashes(hash_seed: str) -> None:
    code = f"from {__name__} import walk_many; print(walk_many())"
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={
            **os.environ,
            "PYTHONHASHSEED": hash_seed,
            "PYTHONPATH": os.pathsep.join(sys.path),
        },
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.rstrip("\n") == walk_many().rstrip("\n")


IMPORTED: Final = """
import sys
before = set(sys.modules)
import statemachine
brought = set(sys.modules) - before
print(sorted(brought & {"socket", "asyncio", "subprocess", "msgpack", "transport", "linux"}))
"""


def test_the_kernels_bring_nothing_along_that_touches_the_machine() -> None:
    run = subprocess.run(
        [sys.executable, "-I", "-c", IMPORTED], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "[]"
