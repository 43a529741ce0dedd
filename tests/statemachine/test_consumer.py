"""What a consumer decides: from its caller's wish to the last word that it owes."""

from __future__ import annotations

import random
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
from statemachine.lifecycle import ConsumerState, NoticeState
from statemachine.messages import (
    AllocationEnded,
    NamespaceRequest,
    NamespaceResponse,
    NamespaceType,
)

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


def after(*events: Event) -> ConsumerKernel:
    kernel = ConsumerKernel(REQUEST)
    for event in events:
        kernel.receive(event)
    return kernel


def turn(error: NamespaceError) -> tuple[Effect, ...]:
    """To self-service, loudly."""
    return (do.ReportFallback("a", error), do.ServeSelf(REQUEST))


def test_basic_one_life_from_the_wish_to_the_end() -> None:
    kernel = ConsumerKernel(REQUEST)
    assert kernel.receive(WANT) == (do.Connect(),)
    assert kernel.receive(CONNECTED) == (do.SendRequest(REQUEST), ANSWER_ON)
    delivery = do.DeliverDescriptors(RESPONSE, is_degraded=False)
    assert kernel.receive(RESPONDED) == (ANSWER_OFF, delivery)
    assert kernel.receive(ENDED) == (do.CloseChannel(), do.ReportEnd("a"))
    assert (kernel.state, kernel.notice) == (ConsumerState.ENDED, NoticeState.SILENT)
    assert not kernel.owes_end
    assert kernel.is_connected is False


def test_a_snapshot_says_whether_there_is_a_line_and_which_timers_run() -> None:
    def line_and_timers(*events: Event) -> tuple[bool, bool, set[Timer]]:
        *_, is_connected, is_calling, timers = after(*events).snapshot()
        assert isinstance(is_connected, bool)
        assert isinstance(is_calling, bool)
        return is_connected, is_calling, set(timers)

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


def test_a_new_consumer_is_idle_and_owes_nothing() -> None:
    kernel = ConsumerKernel(REQUEST)
    assert kernel.request == REQUEST
    assert (kernel.state, kernel.notice) == (ConsumerState.IDLE, NoticeState.SILENT)
    assert kernel.is_connected is False
    assert not kernel.owes_end


# --- When it serves itself, and when not -------------------------------------------------------


@pytest.mark.clause("SELF-10")
def test_an_unreachable_provider_is_owed_nothing() -> None:
    kernel = after(WANT)
    assert kernel.receive(UNREACHABLE) == turn(REFUSED)
    assert not kernel.owes_end


@pytest.mark.clause("SELF-10")
def test_an_unavailable_provider_is_owed_nothing() -> None:
    kernel = after(*TO_ASKING)
    error = SocketUnavailable("shutting down")
    assert kernel.receive(UNAVAILABLE) == (ANSWER_OFF, do.CloseChannel(), *turn(error))
    assert not kernel.owes_end


def test_on_the_answer_deadline_it_turns_to_itself_and_says_so_on_the_open_connection() -> None:
    kernel = after(*TO_ASKING)
    overdue = SocketUnavailable("no whole answer within the answer deadline")
    assert kernel.receive(LATE) == (*SAY, *turn(overdue))
    assert kernel.is_connected is True
    assert kernel.owes_end


def test_a_connection_lost_before_the_answer_is_called_again_to_be_told() -> None:
    kernel = after(*TO_ASKING)
    lost = SocketUnavailable("the provider is gone")
    assert kernel.receive(LOST) == (ANSWER_OFF, do.Connect(), *turn(lost))
    assert kernel.receive(CONNECTED) == SAY


def test_a_connection_lost_without_a_reason_has_one_all_the_same() -> None:
    effects = after(*TO_ASKING).receive(on.ConnectionLost())
    lost = SocketUnavailable("the connection was lost before a whole answer")
    assert do.ReportFallback("a", lost) in effects


def test_a_failed_passing_closes_the_channel_and_leaves_a_debt() -> None:
    kernel = after(*TO_ASKING)
    failed = (ANSWER_OFF, do.CloseChannel(), do.Connect(), *turn(FdPassing("EMFILE")))
    assert kernel.receive(PASSING) == failed
    assert kernel.owes_end


def test_an_unreadable_frame_is_answered_before_the_channel_is_closed() -> None:
    kernel = after(*TO_ASKING)
    assert kernel.receive(GARBLED) == (
        ANSWER_OFF,
        do.SendFault("N is 0"),
        do.CloseChannel(),
        do.Connect(),
        *turn(FdPassing("N is 0")),
    )
    assert kernel.owes_end


def test_a_response_that_was_not_asked_for_is_closed_at_once() -> None:
    kernel = after(*TO_ASKING)
    effects = kernel.receive(MISMATCHED)
    assert effects[0] == do.DiscardDescriptors()
    assert do.SendFault("fd_types is ['Pid']") in effects
    assert do.DeliverDescriptors not in map(type, effects)
    assert kernel.owes_end


@pytest.mark.clause("ERR-5")
@pytest.mark.parametrize(
    ("event", "error"),
    [(FAILED, CreationFailed("ENOSPC")), (NOT_FOUND, AllocationNotFound("a"))],
    ids=["CreationFailed", "AllocationNotFound"],
)
def test_a_refusal_is_reported_and_not_papered_over(event: Event, error: NamespaceError) -> None:
    kernel = after(*TO_ASKING)
    assert kernel.receive(event) == (ANSWER_OFF, do.CloseChannel(), do.ReportRefusal(error))
    assert kernel.state is ConsumerState.REFUSED
    assert not kernel.owes_end


def test_self_service_is_delivered_as_degraded() -> None:
    kernel = after(WANT, UNREACHABLE)
    assert kernel.receive(SERVED) == (do.DeliverDescriptors(OWN, is_degraded=True),)
    assert kernel.state is ConsumerState.SELF_HELD


@pytest.mark.clause("SELF-5")
def test_self_service_that_fails_is_reported() -> None:
    kernel = after(WANT, UNREACHABLE)
    error = CreationFailed("unshare: unshare(2): EPERM")
    assert kernel.receive(on.SelfServiceFailed(error)) == (do.ReportRefusal(error),)
    assert kernel.state is ConsumerState.FAILED


def test_a_failed_request_still_pays_its_debt() -> None:
    kernel = after(*TO_ASKING, LATE, on.SelfServiceFailed(CreationFailed("EPERM")))
    assert kernel.owes_end
    assert kernel.receive(ENDED) == (NOTICE_OFF, do.CloseChannel())
    assert not kernel.owes_end


# --- Never two live sets -----------------------------------------------------------------------


@pytest.mark.clause("SELF-9")
@pytest.mark.parametrize("own", [(), (SERVED,)], ids=["serving itself", "self-held"])
def test_a_late_answer_is_closed_and_the_end_already_said(own: tuple[Event, ...]) -> None:
    kernel = after(*TO_ASKING, LATE, *own)
    assert kernel.receive(RESPONDED) == (do.DiscardDescriptors(),)
    assert kernel.receive(ENDED) == (NOTICE_OFF, do.CloseChannel())
    assert kernel.notice is NoticeState.HEARD


def test_a_late_answer_that_is_wrong_is_closed_too() -> None:
    assert after(*TO_ASKING, LATE).receive(MISMATCHED) == (do.DiscardDescriptors(),)


def test_a_late_refusal_leaves_the_debt_to_the_answer_of_the_end() -> None:
    kernel = after(*TO_ASKING, LATE)
    assert kernel.receive(FAILED) == ()
    assert kernel.owes_end
    assert kernel.receive(NOT_FOUND) == (NOTICE_OFF, do.CloseChannel())
    assert not kernel.owes_end


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
    assert kernel.notice is NoticeState.HEARD


@pytest.mark.parametrize("event", [UNAVAILABLE, PASSING], ids=["unavailable", "passing failed"])
def test_a_provider_that_cannot_take_the_end_now_is_called_again(event: Event) -> None:
    kernel = after(*TO_ASKING, LATE)
    assert kernel.receive(event) == (NOTICE_OFF, do.CloseChannel(), REDIAL_ON)
    assert kernel.owes_end


def test_an_unreadable_answer_to_the_end_is_answered_and_the_end_told_again() -> None:
    kernel = after(*TO_ASKING, LATE)
    fault = do.SendFault("N is 0")
    assert kernel.receive(GARBLED) == (fault, NOTICE_OFF, do.CloseChannel(), REDIAL_ON)


def test_the_debt_is_paid_while_self_service_is_under_way_and_after_it() -> None:
    kernel = after(*TO_ASKING, LOST, SERVED)
    assert kernel.state is ConsumerState.SELF_HELD
    assert kernel.receive(CONNECTED) == SAY
    assert kernel.receive(ENDED) == (NOTICE_OFF, do.CloseChannel())
    assert kernel.state is ConsumerState.SELF_HELD


# --- Held --------------------------------------------------------------------------------------


@pytest.mark.clause("CRASH-13")
def test_losing_the_connection_does_not_end_what_is_held() -> None:
    kernel = after(*TO_HELD)
    assert kernel.receive(LOST) == ()
    assert kernel.state is ConsumerState.HELD
    assert kernel.is_connected is False


def test_what_is_held_without_a_connection_is_ended_on_a_new_one() -> None:
    kernel = after(*TO_HELD, LOST)
    assert kernel.receive(END) == (do.Connect(),)
    assert kernel.receive(CONNECTED) == SAY
    assert kernel.receive(ENDED) == (do.ReportEnd("a"), NOTICE_OFF, do.CloseChannel())
    assert kernel.state is ConsumerState.ENDED


def test_a_fault_on_the_connection_does_not_end_what_is_held() -> None:
    kernel = after(*TO_HELD)
    assert kernel.receive(GARBLED) == (do.SendFault("N is 0"), do.CloseChannel())
    assert kernel.state is ConsumerState.HELD
    kernel = after(*TO_HELD)
    assert kernel.receive(PASSING) == (do.CloseChannel(),)
    assert kernel.state is ConsumerState.HELD


@pytest.mark.parametrize(
    "event", [RESPONDED, MISMATCHED, FAILED, NOT_FOUND, UNAVAILABLE], ids=lambda x: type(x).__name__
)
def test_an_answer_to_nothing_is_the_providers_fault(event: Event) -> None:
    kernel = after(*TO_HELD)
    before = kernel.snapshot()
    with pytest.raises(RemoteProtocolError):
        kernel.receive(event)
    assert kernel.snapshot() == before


def test_an_end_before_the_answer_is_the_providers_fault() -> None:
    with pytest.raises(RemoteProtocolError, match="EndAnnounced is not possible"):
        after(*TO_ASKING).receive(ENDED)


# --- The caller is done ------------------------------------------------------------------------


def test_a_caller_who_is_done_while_calling_owes_nothing() -> None:
    kernel = after(WANT)
    assert kernel.receive(END) == (do.CloseChannel(), do.ReportEnd("a"))
    assert kernel.state is ConsumerState.ENDED
    assert not kernel.owes_end


def test_a_caller_who_is_done_while_asking_takes_the_request_back() -> None:
    kernel = after(*TO_ASKING)
    assert kernel.receive(END) == (ANSWER_OFF, *SAY)
    assert kernel.state is ConsumerState.ENDING
    assert kernel.receive(FAILED) == ()
    assert kernel.receive(ENDED) == (do.ReportEnd("a"), NOTICE_OFF, do.CloseChannel())


def test_what_arrives_for_a_caller_who_is_done_is_closed() -> None:
    kernel = after(*TO_ASKING, END)
    assert kernel.receive(RESPONDED) == (do.DiscardDescriptors(),)
    assert kernel.state is ConsumerState.ENDING


@pytest.mark.clause("SELF-11")
def test_a_caller_who_is_done_with_what_it_holds_tells_the_provider() -> None:
    kernel = after(*TO_HELD)
    assert kernel.receive(END) == SAY
    assert kernel.receive(ENDED) == (do.ReportEnd("a"), NOTICE_OFF, do.CloseChannel())


@pytest.mark.parametrize("events", [(*TO_HELD, END), (END, CONNECTED)], ids=["held", "by name"])
def test_the_end_of_what_the_provider_does_not_know_is_an_end_and_reported(
    events: tuple[Event, ...],
) -> None:
    kernel = after(*events)
    not_found = do.ReportRefusal(AllocationNotFound("a"))
    effects = kernel.receive(NOT_FOUND)
    assert effects == (not_found, do.ReportEnd("a"), NOTICE_OFF, do.CloseChannel())
    assert kernel.state is ConsumerState.ENDED


def test_what_others_hold_can_be_ended_by_its_name() -> None:
    kernel = ConsumerKernel(REQUEST)
    assert kernel.receive(END) == (do.Connect(),)
    assert kernel.receive(UNREACHABLE) == (REDIAL_ON,)
    assert kernel.receive(on.NoticeDue()) == (do.Connect(),)
    assert kernel.receive(CONNECTED) == SAY
    assert kernel.receive(ENDED) == (do.ReportEnd("a"), NOTICE_OFF, do.CloseChannel())
    assert not kernel.owes_end


def test_an_end_that_cannot_be_told_is_told_later() -> None:
    kernel = after(*TO_HELD, END)
    assert kernel.receive(LOST) == (NOTICE_OFF, REDIAL_ON)
    assert kernel.state is ConsumerState.ENDING
    kernel.receive(on.NoticeDue())
    kernel.receive(CONNECTED)
    assert do.ReportEnd("a") in kernel.receive(ENDED)


def test_what_self_service_made_is_released_without_the_provider() -> None:
    kernel = after(WANT, UNREACHABLE, SERVED)
    assert kernel.receive(END) == (do.ReleaseOwn("a"), do.ReportEnd("a"))
    assert kernel.state is ConsumerState.ENDED


def test_the_end_of_what_self_service_made_does_not_forget_the_debt() -> None:
    kernel = after(*TO_ASKING, LOST, SERVED, END)
    assert kernel.state is ConsumerState.ENDED
    assert kernel.owes_end
    assert kernel.receive(CONNECTED) == SAY
    assert kernel.receive(ENDED) == (NOTICE_OFF, do.CloseChannel())
    assert not kernel.owes_end


@pytest.mark.parametrize(
    "events",
    [
        (WANT, UNREACHABLE),
        (*TO_HELD, END),
        (*TO_HELD, ENDED),
        (*TO_ASKING, FAILED),
        (WANT, UNREACHABLE, on.SelfServiceFailed(REFUSED)),
    ],
    ids=["serving itself", "ending", "ended", "refused", "failed"],
)
def test_a_caller_cannot_end_what_is_not_there_or_not_done_yet(events: tuple[Event, ...]) -> None:
    kernel = after(*events)
    before = kernel.snapshot()
    with pytest.raises(LocalProtocolError):
        kernel.receive(END)
    assert kernel.snapshot() == before


@pytest.mark.clause("END-15")
def test_crossing_ends_end_it_once() -> None:
    """The provider's own end is taken as the answer; the connection is closed before the second."""
    kernel = after(*TO_HELD, END)
    assert do.CloseChannel() in kernel.receive(ENDED)
    assert kernel.state is ConsumerState.ENDED
    assert kernel.is_connected is False


@pytest.mark.clause("LIFE-1")
@pytest.mark.parametrize(
    "event", [RESPONDED, MISMATCHED, FAILED, NOT_FOUND, ENDED, UNAVAILABLE, PASSING, GARBLED, LOST]
)
@pytest.mark.parametrize(
    "events",
    [(), (WANT,), (*TO_HELD, LOST), (*TO_ASKING, LOST), (*TO_HELD, END, ENDED)],
    ids=["idle", "calling", "held", "calling again", "ended"],
)
def test_nothing_is_heard_without_a_connection(events: tuple[Event, ...], event: Event) -> None:
    kernel = after(*events)
    before = kernel.snapshot()
    with pytest.raises(RemoteProtocolError):
        kernel.receive(event)
    assert kernel.snapshot() == before


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
    ],
    ids=lambda x: type(x).__name__,
)
def test_a_message_is_named_as_what_it_means(message: Any, event: Event) -> None:
    assert event_of(REQUEST, message) == event


def test_a_request_is_not_for_a_consumer() -> None:
    rejected = on.FrameRejected("NamespaceRequest is not for the consumer")
    assert event_of(REQUEST, REQUEST) == rejected


def test_the_end_of_somebody_elses_allocation_is_not_for_this_consumer() -> None:
    event = event_of(REQUEST, AllocationEnded("b"))
    assert event == on.FrameRejected("AllocationEnded for 'b', which was never asked for")


@pytest.mark.clause("FD-2")
@pytest.mark.parametrize(
    ("response", "named"),
    [
        (NamespaceResponse("b", RESPONSE.fd_types, "/x"), "the response is for 'b', not 'a'"),
        (NamespaceResponse("a", (PID, NET, MOUNT), "/x"), "fd_types is ['Pid', 'Net', 'Mount']"),
        (NamespaceResponse("a", (NET, MOUNT), "/x"), "fd_types is ['Net', 'Mount'], not"),
        (NamespaceResponse("a", RESPONSE.fd_types), "uenv_mount_path must be there exactly if"),
    ],
    ids=["id", "order", "count", "mount path"],
)
def test_a_response_to_something_else_is_named_by_what_differs(
    response: NamespaceResponse, named: str
) -> None:
    event = event_of(REQUEST, response)
    assert isinstance(event, on.ResponseMismatched)
    assert named in event.reason


def test_a_mount_path_that_nobody_asked_for_differs_too() -> None:
    reason = mismatch(NamespaceRequest("a", (MOUNT,)), NamespaceResponse("a", (MOUNT,), "/x"))
    assert reason == "uenv_mount_path must be there exactly if uenv_image was asked for"
    assert mismatch(NamespaceRequest("a", (MOUNT,)), NamespaceResponse("a", (MOUNT,))) is None


def test_no_more_of_what_came_is_told_than_shows_the_difference() -> None:
    reason = mismatch(NamespaceRequest("a", (NET,)), NamespaceResponse("a", (NET, PID, MOUNT)))
    assert reason == "fd_types is ['Net', 'Pid'], not ['Net']"


def test_a_caller_who_may_not_do_something_is_told_of_which_allocation() -> None:
    kernel = after(*TO_HELD, END)
    with pytest.raises(LocalProtocolError) as caught:
        kernel.receive(END)
    assert str(caught.value) == "EndWanted is not possible while allocation a is ending"


# --- Random walks ------------------------------------------------------------------------------

EVERYTHING: Final[list[Event]] = [
    WANT,
    CONNECTED,
    RESPONDED,
    ENDED,
    LOST,
    LATE,
    GARBLED,
    MISMATCHED,
    NOT_FOUND,
    FAILED,
    PASSING,
    UNAVAILABLE,
    UNREACHABLE,
    SERVED,
    on.SelfServiceFailed(CreationFailed("EPERM")),
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
            twin = ConsumerKernel.restore(kernel.snapshot())
            with pytest.raises(LocalProtocolError):
                twin.receive(event)


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
def test_two_consumers_that_are_told_the_same_do_the_same(rng: random.Random) -> None:
    one, other = ConsumerKernel(REQUEST), ConsumerKernel(REQUEST)
    for event in rng.choices(EVERYTHING, k=60):
        assert outcome(one, event) == outcome(other, event)
        assert (one.state, one.notice) == (other.state, other.notice)
        other = ConsumerKernel.restore(one.snapshot())


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
