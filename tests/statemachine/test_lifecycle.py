"""The tables say what the protocol says: cell by cell, and as a whole."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

import pytest

from statemachine import effects as do
from statemachine import events as on
from statemachine import lifecycle
from statemachine.effects import Order, Timer, order_name, start, stop
from statemachine.errors import LocalProtocolError, ProtocolError, RemoteProtocolError
from statemachine.events import Event, PeerEvent
from statemachine.lifecycle import (
    ALLOCATION,
    CONSUMER,
    MESSAGE,
    NOTICE,
    PROVIDER_GUARDS,
    SERVICE,
    TABLES,
    Guard,
)
from statemachine.states import AllocationState, ConsumerState, MessageState, NoticeState
from statemachine.table import Row, Table

UNKNOWN, REQUESTED = AllocationState.UNKNOWN, AllocationState.REQUESTED
CREATED, HANDED_OFF = AllocationState.CREATED, AllocationState.HANDED_OFF
ENDED, RELEASED = AllocationState.ENDED, AllocationState.RELEASED

ALLOCATION_GRID: Final = """
                      unknown     requested   created     handed_off  ended       released
RequestAdmitted       requested   local       local       local       local       local
NamespacesCreated     local       created     local       local       stays       local
NamespacesNotCreated  local       ended       local       local       stays       local
ResponseSent          local       local       handed_off  stays       stays       local
ResponseNotSent       local       local       stays       stays       stays       local
RequestRepeated       local       stays       stays       stays       local       local
RequestConflicting    local       stays       stays       stays       local       local
RequestEarly          local       local       local       local       stays       local
RequestDuringDrain    local       local       local       local       stays       local
Unclaimed             local       stays       stays       stays       stays       local
ScopePopulated        local       local       stays       stays       stays       local
EndReceived           stays       ended       ended       ended       stays       peer
ReleaseRequested      local       ended       ended       ended       stays       local
ScopeEmptied          local       local       ended       ended       stays       local
InitDied              local       local       ended       ended       stays       local
ClaimExpired          local       local       ended       ended       local       local
ReleaseDelayed        local       local       local       local       stays       local
RetryDue              local       local       local       local       stays       local
ReleaseOverdue        local       local       local       local       stays       local
NamespacesReleased    local       local       local       local       released    local
EndRepeated           local       local       local       local       stays       stays
CreatedAdopted        created     local       local       local       local       local
HandedOffAdopted      handed_off  local       local       local       local       local
RemainsFound          ended       local       local       local       local       local
"""
"""Where each event leads from each state; or whose fault it is that it leads nowhere."""


@dataclass(slots=True)
class StateHolder:
    state: Any
    subject: str = "it"


def cell_text(table: Table, event: type[Event], state: Enum) -> str:
    row = table.row(event, state)
    if row is None:
        return "peer" if issubclass(event, PeerEvent) else "local"
    return "stays" if row.target is row.source else str(row.target.value)


def grid_of(table: Table) -> str:
    head = ["", *(str(state.value) for state in table.states)]
    body = [
        [event.__name__, *(cell_text(table, event, state) for state in table.states)]
        for event in table.events
    ]
    lines = [
        "".join(text.ljust(22 if column == 0 else 12) for column, text in enumerate(line)).rstrip()
        for line in (head, *body)
    ]
    return "\n".join(lines)


def rows_from(table: Table, *states: Enum) -> list[Row]:
    return [row for row in table.rows if row.source in states]


def rows_into(table: Table, state: Enum) -> list[Row]:
    return [row for row in table.rows if row.target is state and row.source is not state]


def rows_out_of(table: Table, state: Enum) -> list[Row]:
    return [row for row in table.rows if row.source is state and row.target is not state]


def named(rows: list[Row]) -> set[str]:
    return {row.event.__name__ for row in rows}


def test_basic_an_allocation_does_in_every_cell_what_the_grid_says() -> None:
    assert grid_of(ALLOCATION).split() == ALLOCATION_GRID.split(), f"\n{grid_of(ALLOCATION)}"


CELLS: Final = [
    pytest.param(table, event, state, id=f"{table.name}-{event.__name__}-{state.value}")
    for table in TABLES
    for event in table.events
    for state in table.states
]


@pytest.mark.parametrize(("table", "event", "state"), CELLS)
def test_every_cell_is_a_row_or_a_refusal_with_a_culprit(
    table: Table, event: type[Event], state: Enum
) -> None:
    model = StateHolder(state)
    row = table.row(event, state)
    if row is not None:
        assert table.fire(model, event) == row.effects
        assert model.state is row.target
        return
    with pytest.raises(ProtocolError) as caught:
        table.fire(model, event)
    blame = RemoteProtocolError if issubclass(event, PeerEvent) else LocalProtocolError
    assert type(caught.value) is blame
    assert (caught.value.event, caught.value.state) == (event.__name__, state.value)
    assert model.state is state


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_only_final_states_may_be_left_by_nothing(table: Table) -> None:
    left = {row.source for row in table.rows if row.target is not row.source}
    assert set(table.states) - left == table.finals


# --- What is asked for where -------------------------------------------------------------------

ONLY_HERE: Final[list[tuple[Table, Order, set[str]]]] = [
    (ALLOCATION, do.CreateNamespaces, {"RequestAdmitted: unknown to requested"}),
    (
        ALLOCATION,
        do.Watch,
        {
            "NamespacesCreated: requested to created",
            "CreatedAdopted: unknown to created",
            "HandedOffAdopted: unknown to handed_off",
        },
    ),
    (ALLOCATION, do.RecordHandoff, {"ResponseSent: created to handed_off"}),
    *(
        (
            ALLOCATION,
            order,
            {"NamespacesReleased: ended to released", "ReleaseOverdue: ended to ended"},
        )
        for order in (do.AnswerEnd, do.PushEnd)
    ),
    (
        ALLOCATION,
        do.ConfirmEnd,
        {"EndRepeated: ended to ended", "EndRepeated: released to released"},
    ),
    (
        CONSUMER,
        do.DeliverDescriptors,
        {"ResponseReceived: asking to held", "SelfServed: serving_self to self_held"},
    ),
    (
        CONSUMER,
        do.ServeSelf,
        {
            "ProviderUnreachable: connecting to serving_self",
            "ProviderUnavailable: asking to serving_self",
            "PassingFailed: asking to serving_self",
            "FrameRejected: asking to serving_self",
            "ResponseMismatched: asking to serving_self",
            "ConnectionLost: asking to serving_self",
            "AnswerOverdue: asking to serving_self",
        },
    ),
    (CONSUMER, do.ReleaseOwn, {"EndWanted: self_held to ended"}),
]


@pytest.mark.parametrize(
    ("table", "order", "moves"), ONLY_HERE, ids=[order_name(order) for _, order, _ in ONLY_HERE]
)
def test_an_effect_is_asked_for_by_these_rows_only(
    table: Table, order: Order, moves: set[str]
) -> None:
    assert moves == {
        f"{row.event.__name__}: {row.source.value} to {row.target.value}"
        for row in table.rows
        if order in row.effects
    }


# --- The provider ------------------------------------------------------------------------------


def test_every_row_that_ends_asks_for_the_release_exactly_once() -> None:
    for row in rows_into(ALLOCATION, ENDED):
        assert row.effects.count(do.ReleaseNamespaces) == 1, row
        assert row.effects.count(start(Timer.RELEASE)) == 1, row


def test_the_release_is_asked_for_by_an_end_or_by_the_next_try_only() -> None:
    asking = [row for row in ALLOCATION.rows if do.ReleaseNamespaces in row.effects]
    staying = [row for row in asking if row.source is row.target]
    assert named(staying) == {"RetryDue"}
    assert {row.target for row in asking} == {ENDED}


def test_nothing_is_handed_over_but_what_exists_and_has_not_ended() -> None:
    giving = [row for row in ALLOCATION.rows if do.GrantAskers in row.effects]
    assert {row.target for row in giving} == {CREATED, HANDED_OFF}
    for row in rows_into(ALLOCATION, ENDED):
        is_granted = row.source in (CREATED, HANDED_OFF) and row.event is not on.ClaimExpired
        assert (do.WithdrawGrants in row.effects) == is_granted, row


def test_ends_are_answered_then_holders_are_told_then_askers_are_refused() -> None:
    """What is answered is not pushed as well; and a refusal may be a connection's last frame."""
    order: list[Order] = [do.AnswerEnd, do.PushEnd, do.FailAskers, do.FailAllAskers]
    for row in ALLOCATION.rows:
        ending = [order.index(x) for x in row.effects if x in order]
        assert ending in ([], [0, 1, 2], [0, 1, 3]), row


# --- The consumer ------------------------------------------------------------------------------


@pytest.mark.parametrize("state", list(ConsumerState))
def test_a_response_is_delivered_discarded_or_refused(state: ConsumerState) -> None:
    for event in (on.ResponseReceived, on.ResponseMismatched):
        row = CONSUMER.row(event, state)
        if row is not None:
            kept = {do.DeliverDescriptors, do.DiscardDescriptors} & set(row.effects)
            assert len(kept) == 1, row


def test_self_service_is_never_silent() -> None:
    for row in CONSUMER.rows:
        assert row.effects.count(do.ServeSelf) == row.effects.count(do.ReportFallback), row


def test_who_turns_away_from_a_provider_that_may_have_made_a_set_owes_it_an_end() -> None:
    for row in rows_out_of(CONSUMER, ConsumerState.ASKING):
        knows = row.event in (
            on.ResponseReceived,
            on.CreationRefused,
            on.NotFoundReceived,
            on.ProviderUnavailable,
        )
        assert (do.OweEnd in row.effects) == (not knows), row


def test_the_caller_is_told_of_the_end_once() -> None:
    for row in CONSUMER.rows:
        is_entry = row.target is ConsumerState.ENDED and row.source is not ConsumerState.ENDED
        assert (do.ReportEnd in row.effects) == is_entry, row


def test_an_owed_end_is_confirmed_only_by_the_provider() -> None:
    assert named(rows_into(NOTICE, NoticeState.HEARD)) == {"EndAnnounced", "NotFoundReceived"}
    assert rows_out_of(NOTICE, NoticeState.HEARD) == []


def test_an_owed_end_that_is_not_confirmed_is_sent_again() -> None:
    assert named(rows_into(NOTICE, NoticeState.OWED)) == {
        "ProviderUnreachable",
        "ConnectionLost",
        "NoticeOverdue",
        "ProviderUnavailable",
        "PassingFailed",
        "FrameRejected",
    }
    for row in rows_into(NOTICE, NoticeState.OWED):
        assert row.effects[-1] == start(Timer.REDIAL), row


# --- Timers ------------------------------------------------------------------------------------

TIMED: Final[list[tuple[Table, Timer, type[Event], tuple[Enum, ...]]]] = [
    (ALLOCATION, Timer.CLAIM, on.ClaimExpired, (CREATED, HANDED_OFF)),
    (ALLOCATION, Timer.RELEASE, on.ReleaseOverdue, (ENDED,)),
    (ALLOCATION, Timer.RETRY, on.RetryDue, (ENDED,)),
    (CONSUMER, Timer.ANSWER, on.AnswerOverdue, (ConsumerState.ASKING,)),
    (NOTICE, Timer.NOTICE, on.NoticeOverdue, (NoticeState.TOLD,)),
    (NOTICE, Timer.REDIAL, on.NoticeDue, (NoticeState.OWED,)),
]
"""Which timer may run in which states of a table, and as what it expires."""


@pytest.mark.parametrize(("table", "timer", "expiry", "states"), TIMED, ids=lambda x: str(x)[:20])
def test_a_timer_runs_only_where_its_expiry_is_a_row(
    table: Table, timer: Timer, expiry: type[Event], states: tuple[Enum, ...]
) -> None:
    started = {row.target for row in table.rows if start(timer) in row.effects}
    assert started <= set(states)
    assert {row.source for row in table.rows if row.event is expiry} == set(states)


@pytest.mark.parametrize(
    ("table", "timer", "expiry", "states"),
    # A state that waits for the next try is left by nothing but that try's expiry and its outcome.
    [timed for timed in TIMED if timed[1] not in (Timer.RETRY, Timer.REDIAL)],
    ids=lambda x: str(x)[:20],
)
def test_a_timer_is_stopped_on_every_way_out_but_its_expiry(
    table: Table, timer: Timer, expiry: type[Event], states: tuple[Enum, ...]
) -> None:
    ways_out = [row for row in rows_from(table, *states) if row.target not in states]
    assert ways_out
    for row in ways_out:
        # The expiry of a claim is stopped by the kernel itself, which notes that it has expired.
        assert (stop(timer) in row.effects) or row.event is expiry, row


def test_orders_are_named_as_tables_print_them() -> None:
    orders: list[Order] = [do.HandOver, start(Timer.CLAIM), stop(Timer.CLAIM)]
    assert [order_name(order) for order in orders] == [
        "HandOver",
        "start claim timer",
        "stop claim timer",
    ]


def test_the_vocabulary_that_is_checked_on_import_is_all_there_is() -> None:
    used = {row.event for table in TABLES for row in table.rows}
    assert lifecycle._leaves(on, Event) == used


# --- The provider as a whole, and a message ----------------------------------------------------

SERVICE_GRID: Final = """
                      starting    ready       stopping    aborted
CreatedAdopted        stays       local       local       local
HandedOffAdopted      stays       local       local       local
RemainsFound          stays       local       local       local
ProviderReady         ready       local       local       local
ReadinessOverdue      stays       local       local       local
ProviderStopping      aborted     stopping    local       local
ConnectionOpened      stays       stays       stays       stays
PeerRefused           stays       stays       stays       stays
ConnectionLost        stays       stays       stays       stays
RequestReceived       stays       stays       stays       stays
EndReceived           stays       stays       stays       stays
QueueFull             stays       local       local       local
RequestOverLimit      stays       stays       stays       stays
ConnectionFlooded     stays       stays       stays       local
FrameRejected         stays       stays       stays       stays
"""

MESSAGE_GRID: Final = """
                  arrived    held    open      deferred granted  refused  confirmed unreadable answered
MessageHeld       held       local   local     local    local    local    local     local      local
MessageDispatched open       open    local     open     local    local    local     local      local
MessageDeferred   local      local   deferred  local    local    local    local     local      local
MessageGranted    local      local   granted   local    local    local    local     local      local
GrantWithdrawn    local      local   local     local    open     local    local     local      local
MessageRefused    refused    refused refused   refused  local    local    local     local      local
EndConfirmed      local      local   confirmed local    local    local    local     local      local
FrameRejected     unreadable peer    peer      peer     peer     peer     peer      peer       peer
TurnCame          local      stays   stays     stays    answered answered answered  answered   local
"""  # noqa: E501


def test_the_service_and_a_message_do_in_every_cell_what_the_grids_say() -> None:
    assert grid_of(SERVICE).split() == SERVICE_GRID.split(), f"\n{grid_of(SERVICE)}"
    assert grid_of(MESSAGE).split() == MESSAGE_GRID.split(), f"\n{grid_of(MESSAGE)}"


def test_a_message_has_one_answer_and_leaves_once_when_it_has_it() -> None:
    leaving = rows_into(MESSAGE, MessageState.ANSWERED)
    assert named(leaving) == {"TurnCame"}
    answers = {row.source.value: row.effects for row in leaving}
    assert answers == {
        "granted": (do.HandOver,),
        "refused": (do.Refuse,),
        "confirmed": (do.AnnounceEnd,),
        "unreadable": (do.Refuse, do.CloseConnection),
    }


@pytest.mark.parametrize("guard", PROVIDER_GUARDS, ids=lambda guard: guard.name)
def test_every_guarded_event_has_a_row_in_a_table_of_the_provider(guard: Guard) -> None:
    tables = (ALLOCATION, SERVICE)
    assert all(any(event in table.events for table in tables) for event in guard.events)
