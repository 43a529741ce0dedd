"""What a consumer decides: from its caller's request to the end that it must report."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specs import invariants as always
from statemachine import effects as do
from statemachine import events as on
from statemachine.consumer import ConsumerKernel, event_of, mismatch
from statemachine.effects import Effect, Timer
from statemachine.errors import (
    AllocationNotFound,
    CreationFailed,
    FdPassing,
    LocalProtocolError,
    NamespaceError,
    ProtocolError,
    RemoteProtocolError,
    SocketUnavailable,
)
from statemachine.events import Event
from statemachine.messages import (
    AllocationEnded,
    NamespaceRequest,
    NamespaceResponse,
    NamespaceType,
)
from statemachine.states import ConsumerState, NoticeState

PID, NET, MOUNT = NamespaceType.PID, NamespaceType.NET, NamespaceType.MOUNT

REQUEST: Final = NamespaceRequest("a", (NET, MOUNT, PID), "tools/hello.sqfs")
RESPONSE: Final = NamespaceResponse("a", (NET, MOUNT, PID), "/run/pact/uenv/tools/hello")
OWN: Final = NamespaceResponse("a", (NET, MOUNT, PID), "/run/own/hello")
REFUSED: Final = SocketUnavailable("connection refused")

WANT: Final = on.NamespacesWanted()
CONNECTED: Final = on.Connected()
RESPONDED: Final = on.ResponseReceived(RESPONSE)
ENDED: Final = on.EndAnnounced()
LOST: Final = on.ConnectionLost(reason="the provider is gone")
LATE: Final = on.AnswerOverdue()
GARBLED: Final = on.FrameRejected("N is 0")
MISMATCHED: Final = on.ResponseMismatched("fd_types is ['Pid']")
NOT_FOUND: Final = on.NotFoundReceived(AllocationNotFound("a"))
FAILED: Final = on.CreationRefused(CreationFailed("ENOSPC"))
PASSING: Final = on.PassingFailed(FdPassing("EMFILE"))
UNAVAILABLE: Final = on.ProviderUnavailable(SocketUnavailable("shutting down"))
UNREACHABLE: Final = on.ProviderUnreachable(REFUSED)
SERVED: Final = on.SelfServed(OWN)
END: Final = on.EndWanted()

TO_ASKING: Final[tuple[Event, ...]] = (WANT, CONNECTED)
TO_HELD: Final[tuple[Event, ...]] = (*TO_ASKING, RESPONDED)

ANSWER_ON: Final = do.StartTimer(Timer.ANSWER, "a")
ANSWER_OFF: Final = do.StopTimer(Timer.ANSWER, "a")
NOTICE_ON: Final = do.StartTimer(Timer.NOTICE, "a")
NOTICE_OFF: Final = do.StopTimer(Timer.NOTICE, "a")
REDIAL_ON: Final = do.StartTimer(Timer.REDIAL, "a")
SAY: Final = (do.SendEnd("a"), NOTICE_ON)
CONFIRMED: Final = (NOTICE_OFF, do.CloseChannel())
REDIAL: Final = (do.CloseChannel(), do.Connect())
DISCARD: Final = do.DiscardDescriptors()
FAULT: Final = do.SendFault("N is 0")
OTHERS: Final = FdPassing("fd_types is ['Pid']")
OTHERS_FAULT: Final = do.SendFault(OTHERS.reason)
CUT: Final = on.ConnectionLost()
UNREADABLE: Final = FdPassing("N is 0")
DEGRADED: Final = do.DeliverDescriptors(OWN, is_degraded=True)
UNKNOWN: Final = do.ReportRefusal(AllocationNotFound("a"))
NO_ROOM: Final = do.ReportRefusal(CreationFailed("ENOSPC"))
NOT_PERMITTED: Final = do.ReportRefusal(CreationFailed("EPERM"))
STOPPING: Final = SocketUnavailable("shutting down")
TOO_LATE: Final = SocketUnavailable("no whole answer within the answer deadline")
GONE: Final = SocketUnavailable("the provider is gone")
NO_REASON: Final = SocketUnavailable("the connection was lost before a whole answer")


def after(*events: Event) -> ConsumerKernel:
    kernel = ConsumerKernel(REQUEST)
    for event in events:
        kernel.receive(event)
    return kernel


def test_it_says_how_it_stands() -> None:
    assert repr(after()) == "<ConsumerKernel a: idle, end notice silent>"


def turn(error: NamespaceError) -> tuple[Effect, ...]:
    """To self-service, loudly."""
    return (do.ReportFallback("a", error), do.ServeSelf(REQUEST))


def test_basic_one_life_from_the_request_to_the_end() -> None:
    kernel = ConsumerKernel(REQUEST)
    assert kernel.request == REQUEST
    assert (kernel.state, kernel.notice) == (ConsumerState.IDLE, NoticeState.SILENT)
    assert not kernel.owes_end
    assert kernel.is_connected is False
    assert kernel.receive(WANT) == (do.Connect(),)
    assert kernel.receive(CONNECTED) == (do.SendRequest(REQUEST), ANSWER_ON)
    delivery = do.DeliverDescriptors(RESPONSE, is_degraded=False)
    assert kernel.receive(RESPONDED) == (ANSWER_OFF, delivery)
    assert kernel.receive(ENDED) == (do.CloseChannel(), do.ReportEnd("a"))
    assert (kernel.state, kernel.notice) == (ConsumerState.ENDED, NoticeState.SILENT)
    assert not kernel.owes_end
    assert kernel.is_connected is False


HELD, ENDING, DONE = ConsumerState.HELD, ConsumerState.ENDING, ConsumerState.ENDED
SERVING, OWN_HELD = ConsumerState.SERVING_SELF, ConsumerState.SELF_HELD
SILENT, OWED, CALLING = NoticeState.SILENT, NoticeState.OWED, NoticeState.DIALLING
TOLD, HEARD = NoticeState.TOLD, NoticeState.HEARD

TO_LATE: Final = (*TO_ASKING, LATE)
TO_OWN: Final = (WANT, UNREACHABLE, SERVED)
TO_OWN_AND_OWED: Final = (*TO_ASKING, LOST, SERVED)
FAILED_SELF: Final = on.SelfServiceFailed(CreationFailed("EPERM"))

STEPS: Final[list[tuple[tuple[Event, ...], Event, tuple[Effect, ...], Any, NoticeState]]] = [
    # What happened before; what happens now, and what is done about it; where that leads.
    (TO_ASKING, LATE, (*SAY, *turn(TOO_LATE)), SERVING, TOLD),
    (TO_ASKING, LOST, (ANSWER_OFF, do.Connect(), *turn(GONE)), SERVING, CALLING),
    (TO_ASKING, CUT, (ANSWER_OFF, do.Connect(), *turn(NO_REASON)), SERVING, CALLING),
    (TO_ASKING, PASSING, (ANSWER_OFF, *REDIAL, *turn(FdPassing("EMFILE"))), SERVING, CALLING),
    # What cannot be read is answered before the channel is closed; what came with it goes first.
    (TO_ASKING, GARBLED, (ANSWER_OFF, FAULT, *REDIAL, *turn(UNREADABLE)), SERVING, CALLING),
    (
        TO_ASKING,
        MISMATCHED,
        (DISCARD, ANSWER_OFF, OTHERS_FAULT, *REDIAL, *turn(OTHERS)),
        SERVING,
        CALLING,
    ),
    (TO_ASKING, END, (ANSWER_OFF, *SAY), ENDING, TOLD),
    ((WANT, UNREACHABLE), SERVED, (DEGRADED,), OWN_HELD, SILENT),
    # A provider that cannot be reached, or has refused, is owed nothing.
    ((WANT,), UNREACHABLE, turn(REFUSED), SERVING, SILENT),
    (TO_ASKING, UNAVAILABLE, (ANSWER_OFF, do.CloseChannel(), *turn(STOPPING)), SERVING, SILENT),
    # A refusal is reported and not papered over, and so is self-service that fails.
    (TO_ASKING, FAILED, (ANSWER_OFF, do.CloseChannel(), NO_ROOM), ConsumerState.REFUSED, SILENT),
    (TO_ASKING, NOT_FOUND, (ANSWER_OFF, do.CloseChannel(), UNKNOWN), ConsumerState.REFUSED, SILENT),
    ((WANT, UNREACHABLE), FAILED_SELF, (NOT_PERMITTED,), ConsumerState.FAILED, SILENT),
    # What comes after it has turned away; only the answer to the end is one.
    (TO_LATE, RESPONDED, (DISCARD,), SERVING, TOLD),
    ((*TO_LATE, SERVED), RESPONDED, (DISCARD,), OWN_HELD, TOLD),
    ((*TO_LATE, RESPONDED), ENDED, CONFIRMED, SERVING, HEARD),
    ((*TO_LATE, SERVED, RESPONDED), ENDED, CONFIRMED, OWN_HELD, HEARD),
    (TO_LATE, MISMATCHED, (DISCARD,), SERVING, TOLD),
    (TO_LATE, FAILED, (), SERVING, TOLD),
    (TO_LATE, NOT_FOUND, CONFIRMED, SERVING, HEARD),
    ((*TO_LATE, FAILED_SELF), ENDED, CONFIRMED, ConsumerState.FAILED, HEARD),
    (TO_LATE, UNAVAILABLE, (*CONFIRMED, REDIAL_ON), SERVING, OWED),
    (TO_LATE, PASSING, (*CONFIRMED, REDIAL_ON), SERVING, OWED),
    (TO_LATE, GARBLED, (FAULT, *CONFIRMED, REDIAL_ON), SERVING, OWED),
    (TO_OWN_AND_OWED, CONNECTED, SAY, OWN_HELD, TOLD),
    ((*TO_OWN_AND_OWED, CONNECTED), ENDED, CONFIRMED, OWN_HELD, HEARD),
    # A fault on the connection does not end what is held.
    (TO_HELD, GARBLED, (FAULT, do.CloseChannel()), HELD, SILENT),
    (TO_HELD, PASSING, (do.CloseChannel(),), HELD, SILENT),
    (TO_HELD, LOST, (), HELD, SILENT),
    # The caller is done: on a new connection, if there is none; while calling, nothing is owed.
    (TO_HELD, END, SAY, ENDING, TOLD),
    ((*TO_HELD, END), ENDED, (do.ReportEnd("a"), *CONFIRMED), DONE, HEARD),
    ((*TO_HELD, LOST), END, (do.Connect(),), ENDING, CALLING),
    ((*TO_HELD, LOST, END), CONNECTED, SAY, ENDING, TOLD),
    ((*TO_HELD, LOST, END, CONNECTED), ENDED, (do.ReportEnd("a"), *CONFIRMED), DONE, HEARD),
    ((WANT,), END, (do.CloseChannel(), do.ReportEnd("a")), DONE, SILENT),
    ((*TO_ASKING, END), RESPONDED, (DISCARD,), ENDING, TOLD),
    ((*TO_ASKING, END), FAILED, (), ENDING, TOLD),
    ((*TO_ASKING, END), ENDED, (do.ReportEnd("a"), *CONFIRMED), DONE, HEARD),
    ((*TO_HELD, END), LOST, (NOTICE_OFF, REDIAL_ON), ENDING, OWED),
    # What the provider does not know is over, and that is reported, too.
    ((*TO_HELD, END), NOT_FOUND, (UNKNOWN, do.ReportEnd("a"), *CONFIRMED), DONE, HEARD),
    ((END, CONNECTED), NOT_FOUND, (UNKNOWN, do.ReportEnd("a"), *CONFIRMED), DONE, HEARD),
    # What others hold is ended by its name.
    ((), END, (do.Connect(),), ENDING, CALLING),
    ((END,), UNREACHABLE, (REDIAL_ON,), ENDING, OWED),
    ((END, UNREACHABLE), on.NoticeDue(), (do.Connect(),), ENDING, CALLING),
    # What self-service made is released without the provider, to whom an end may still be owed.
    (TO_OWN, END, (do.ReleaseOwn("a"), do.ReportEnd("a")), DONE, SILENT),
    (TO_OWN_AND_OWED, END, (do.ReleaseOwn("a"), do.ReportEnd("a")), DONE, CALLING),
    ((*TO_OWN_AND_OWED, END, CONNECTED), ENDED, CONFIRMED, DONE, HEARD),
]


@pytest.mark.clause("SELF-5", "SELF-9", "SELF-10", "SELF-11", "CRASH-13", "ERR-5")
@pytest.mark.parametrize(("before", "event", "effects", "state", "notice"), STEPS)
def test_a_step_is_as_written(
    before: tuple[Event, ...],
    event: Event,
    effects: tuple[Effect, ...],
    state: ConsumerState,
    notice: NoticeState,
) -> None:
    kernel = after(*before)
    assert kernel.receive(event) == effects
    assert (kernel.state, kernel.notice) == (state, notice)
    assert kernel.owes_end == (notice in (OWED, CALLING, TOLD))


def test_a_snapshot_says_whether_there_is_a_line_and_which_timers_run() -> None:
    def line_and_timers(*events: Event) -> tuple[bool, bool, set[Timer]]:
        snapshot = after(*events).snapshot()
        return snapshot.is_connected, snapshot.is_calling, set(snapshot.timers)

    overdue, told_late = on.AnswerOverdue(), (END, on.NoticeOverdue())
    assert line_and_timers() == (False, False, set())
    assert line_and_timers(WANT) == (False, True, set())
    assert line_and_timers(WANT, UNREACHABLE) == (False, False, set())
    assert line_and_timers(*TO_ASKING) == (True, False, {Timer.ANSWER})
    assert line_and_timers(*TO_HELD) == (True, False, set())
    assert line_and_timers(*TO_HELD, LOST) == (False, False, set())
    assert line_and_timers(*TO_ASKING, overdue) == (True, False, {Timer.NOTICE})
    assert line_and_timers(*TO_HELD, *told_late) == (False, False, {Timer.REDIAL})
    assert line_and_timers(*TO_HELD, *told_late, on.NoticeDue()) == (False, True, set())


# --- Never two live sets -----------------------------------------------------------------------


@pytest.mark.clause("SELF-8")
def test_the_end_is_told_again_until_it_is_confirmed() -> None:
    kernel = after(*TO_ASKING, LOST)
    for _ in range(3):
        assert kernel.receive(UNREACHABLE) == (REDIAL_ON,)
        assert kernel.receive(on.NoticeDue()) == (do.Connect(),)
    assert kernel.receive(CONNECTED) == SAY
    assert kernel.receive(on.NoticeOverdue()) == (do.CloseChannel(), REDIAL_ON)
    assert kernel.receive(on.NoticeDue()) == (do.Connect(),)
    assert kernel.receive(CONNECTED) == SAY
    assert kernel.receive(LOST) == (NOTICE_OFF, REDIAL_ON)
    assert kernel.receive(on.NoticeDue()) == (do.Connect(),)
    assert kernel.receive(CONNECTED) == SAY
    assert kernel.receive(ENDED) == (NOTICE_OFF, do.CloseChannel())
    assert kernel.notice is HEARD


# --- The caller is done ------------------------------------------------------------------------


@pytest.mark.clause("END-15")
def test_crossing_ends_end_it_once() -> None:
    """The provider's own end is taken as the answer; the connection is closed before the second."""
    kernel = after(*TO_HELD, END)
    assert do.CloseChannel() in kernel.receive(ENDED)
    assert kernel.state is ConsumerState.ENDED
    assert kernel.is_connected is False


NO_CONNECTION: Final[tuple[tuple[Event, ...], ...]] = (
    (),
    (WANT,),
    (*TO_HELD, LOST),
    (*TO_ASKING, LOST),
    (*TO_HELD, END, ENDED),
)
UNTIMELY: Final = (RESPONDED, MISMATCHED, FAILED, NOT_FOUND, UNAVAILABLE)
HEARABLE: Final = (*UNTIMELY, ENDED, PASSING, GARBLED, LOST)
NOT_TO_BE_ENDED: Final[tuple[tuple[Event, ...], ...]] = (
    (WANT, UNREACHABLE),
    (*TO_HELD, END),
    (*TO_HELD, ENDED),
    (*TO_ASKING, FAILED),
    (WANT, UNREACHABLE, on.SelfServiceFailed(REFUSED)),
)
IMPOSSIBLE: Final[list[tuple[tuple[Event, ...], Event, type[ProtocolError]]]] = [
    # Nothing is heard without a connection.
    *((before, event, RemoteProtocolError) for before in NO_CONNECTION for event in HEARABLE),
    # An answer to nothing, and an end before the answer, are the provider's faults.
    *((TO_HELD, event, RemoteProtocolError) for event in UNTIMELY),
    (TO_ASKING, ENDED, RemoteProtocolError),
    # A caller cannot end what is not there, or not done yet.
    *((before, END, LocalProtocolError) for before in NOT_TO_BE_ENDED),
]


@pytest.mark.clause("LIFE-1")
@pytest.mark.parametrize(("before", "event", "blame"), IMPOSSIBLE)
def test_an_impossible_event_is_refused_and_changes_nothing(
    before: tuple[Event, ...], event: Event, blame: type[ProtocolError]
) -> None:
    kernel = after(*before)
    snapshot = kernel.snapshot()
    with pytest.raises(blame) as caught:
        kernel.receive(event)
    text = f"{type(event).__name__} is not possible while allocation a is {kernel.state.value}"
    assert str(caught.value).startswith(text)
    assert kernel.snapshot() == snapshot


# --- Naming what arrives -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "event"),
    [
        (RESPONSE, RESPONDED),
        (AllocationEnded("a"), ENDED),
        (CreationFailed("ENOSPC"), FAILED),
        (AllocationNotFound("a"), NOT_FOUND),
        (SocketUnavailable("shutting down"), UNAVAILABLE),
        (FdPassing("EMFILE"), PASSING),
        (REQUEST, on.FrameRejected("NamespaceRequest is not for the consumer")),
        (
            AllocationEnded("b"),
            on.FrameRejected("AllocationEnded for 'b', which was never asked for"),
        ),
    ],
    ids=lambda x: type(x).__name__,
)
def test_a_message_is_named_as_what_it_means(message: Any, event: Event) -> None:
    assert event_of(REQUEST, message) == event


PATH_DIFFERS: Final = "uenv_mount_path must be there exactly if uenv_image was asked for"


@pytest.mark.clause("FD-2")
@pytest.mark.parametrize(
    ("request_", "response", "named"),
    [
        (REQUEST, replace(RESPONSE, allocation_id="b"), "the response is for 'b', not 'a'"),
        (
            REQUEST,
            replace(RESPONSE, fd_types=(PID, NET, MOUNT)),
            "fd_types is ['Pid', 'Net', 'Mount'], not ['Net', 'Mount', 'Pid']",
        ),
        (
            REQUEST,
            replace(RESPONSE, fd_types=(NET, MOUNT)),
            "fd_types is ['Net', 'Mount'], not ['Net', 'Mount', 'Pid']",
        ),
        (REQUEST, replace(RESPONSE, uenv_mount_path=None), PATH_DIFFERS),
        (NamespaceRequest("a", (MOUNT,)), NamespaceResponse("a", (MOUNT,), "/x"), PATH_DIFFERS),
        # No more of what came is told than shows the difference.
        (
            NamespaceRequest("a", (NET,)),
            NamespaceResponse("a", (NET, PID, MOUNT)),
            "fd_types is ['Net', 'Pid'], not ['Net']",
        ),
    ],
    ids=["id", "order", "count", "no mount path", "a mount path", "many"],
)
def test_a_response_to_something_else_is_named_by_what_differs(
    request_: NamespaceRequest, response: NamespaceResponse, named: str
) -> None:
    assert mismatch(request_, response) == named
    assert event_of(request_, response) == on.ResponseMismatched(named)


def test_a_response_without_an_image_has_no_mount_path() -> None:
    assert mismatch(NamespaceRequest("a", (MOUNT,)), NamespaceResponse("a", (MOUNT,))) is None


# --- Random walks ------------------------------------------------------------------------------

EVERYTHING: Final[list[Event]] = [
    WANT,
    CONNECTED,
    *HEARABLE,
    LATE,
    UNREACHABLE,
    SERVED,
    FAILED_SELF,
    END,
    on.NoticeDue(),
    on.NoticeOverdue(),
    # The provider's, and what only the kernel itself may name.
    on.ProviderReady(),
    on.EndOwed(),
    on.EndOwedApart(),
]


def outcome(kernel: ConsumerKernel, event: Event) -> tuple[Any, Any]:
    before = kernel.snapshot()
    try:
        effects: Any = kernel.receive(event)
    except ProtocolError as error:
        effects = (type(error), str(error))
        always.require(always.an_error_changes_nothing(before, kernel.snapshot()))
    return effects, kernel.snapshot()


@pytest.fixture(scope="module")
def reached() -> dict[Any, ConsumerKernel]:
    """Find every state of a consumer that any sequence of events leads to."""
    frontier = [ConsumerKernel(REQUEST)]
    found = {kernel.snapshot(): kernel for kernel in frontier}
    while frontier:
        kernel = frontier.pop()
        for event in EVERYTHING:
            after_it = ConsumerKernel.restore(kernel.snapshot())
            _, snapshot = outcome(after_it, event)
            if snapshot not in found:
                found[snapshot] = after_it
                frontier.append(after_it)
    return found


def test_every_state_of_both_tables_is_reached(
    reached: dict[Any, ConsumerKernel],
) -> None:
    assert {kernel.state for kernel in reached.values()} == set(ConsumerState)
    assert {kernel.notice for kernel in reached.values()} == set(NoticeState)


def test_the_provider_is_never_told_by_an_event_from_outside(
    reached: dict[Any, ConsumerKernel],
) -> None:
    for kernel in reached.values():
        for event in (on.EndOwed(), on.EndOwedApart()):
            assert outcome(kernel, event)[0][0] is LocalProtocolError


def test_a_consumer_restored_anywhere_goes_on_the_same(
    reached: dict[Any, ConsumerKernel],
) -> None:
    for snapshot, kernel in reached.items():
        assert kernel.snapshot() == snapshot
        assert hash(snapshot) == hash(ConsumerKernel.restore(snapshot).snapshot())
        for event in EVERYTHING:
            one, other = ConsumerKernel.restore(snapshot), ConsumerKernel.restore(snapshot)
            assert outcome(one, event) == outcome(other, event)


@given(st.randoms(use_true_random=False))
def test_a_caller_gets_one_outcome_and_one_end_at_most(rng: random.Random) -> None:
    kernel = ConsumerKernel(REQUEST)
    told: list[type[Effect]] = []
    for event in rng.choices(EVERYTHING, k=60):
        state = kernel.state
        effects, _ = outcome(kernel, event)
        # That an end found nothing is no outcome of a request.
        is_outcome = state is not ConsumerState.ENDING
        told += [type(x) for x in effects if is_outcome or not isinstance(x, do.ReportRefusal)]
    assert told.count(do.DeliverDescriptors) + told.count(do.ReportRefusal) <= 1
    assert told.count(do.ReportEnd) <= 1
    assert told.count(do.ServeSelf) == told.count(do.ReportFallback) <= 1
    assert told.count(do.ReleaseOwn) <= 1


def test_a_kernel_is_made_for_a_request_only() -> None:
    wrong: Any = "x"
    with pytest.raises(TypeError, match=r"^request must be NamespaceRequest, not str$"):
        ConsumerKernel(wrong)
