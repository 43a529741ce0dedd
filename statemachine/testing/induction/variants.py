"""Broken variants of the allocation's relation: for each invariant one that it refutes.

An invariant that no variant breaks would say nothing. Each variant changes one row, or leaves out
one guard or one thing that a driver must do; what it breaks is shown by a counterexample.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from functools import cache
from typing import Final

from ... import effects as do
from ... import events as on
from ...effects import Order, Timer, order_name, start, stop
from ...events import Event
from ...lifecycle import (
    ALLOCATION,
    IS_BEING_MADE,
    IS_BEING_RELEASED,
    IS_MADE,
    IS_OPEN,
    MESSAGE,
    PROVIDER_GUARDS,
    Guard,
)
from ...states import AllocationState, MessageState
from ...table import Row, Table
from ..kit.mutants import edited
from .allocation import NOTES, no_hand_over_is_under_way, relation_of
from .relation import Relation

_UNKNOWN: Final = AllocationState.UNKNOWN
_REQUESTED: Final = AllocationState.REQUESTED
_CREATED: Final = AllocationState.CREATED
_HANDED_OFF: Final = AllocationState.HANDED_OFF
_ENDED: Final = AllocationState.ENDED


@dataclass(frozen=True)
class Variant:
    """A relation in which one thing is wrong."""

    breaks: str
    """The invariant that does not hold in it, or what is insisted on in vain."""
    says: str
    """What is wrong with it."""
    relation: Relation
    concerns: Order | Guard | None = None
    """What it leaves out or asks for too much; None: a row leads elsewhere, or is missing."""


def without_order(table: Table, event: type[Event], state: Enum, order: Order) -> Table:
    """Make a table in which a row does not ask for something."""
    row = row_of(table, event, state)
    left = tuple(each for each in row.effects if each != order)
    if left == row.effects:
        raise ValueError(f"{event.__name__} in {state.value} does not ask for it")
    return edited(table, event, state, Row(event, state, row.target, left))


def with_order(table: Table, event: type[Event], state: Enum, order: Order) -> Table:
    """Make a table in which a row asks for one thing more."""
    row = row_of(table, event, state)
    return edited(table, event, state, Row(event, state, row.target, (*row.effects, order)))


def row_of(table: Table, event: type[Event], state: Enum) -> Row:
    row = table.row(event, state)
    if row is None:
        raise ValueError(f"{table.name}: {event.__name__} has no row in {state.value}")
    return row


def _forgetful(breaks: str, event: type[Event], state: AllocationState, order: Order) -> Variant:
    says = f"{event.__name__} in {state.value} without {order_name(order)}"
    made = relation_of(without_order(ALLOCATION, event, state, order))
    return Variant(breaks, says, made, order)


def _excessive(breaks: str, event: type[Event], state: AllocationState, order: Order) -> Variant:
    says = f"{event.__name__} in {state.value} with {order_name(order)}"
    made = relation_of(with_order(ALLOCATION, event, state, order))
    return Variant(breaks, says, made, order)


def _unguarded(breaks: str, guard: Guard) -> Variant:
    guards = tuple(each for each in PROVIDER_GUARDS if each is not guard)
    return Variant(breaks, f"without the guard *{guard.name}*", relation_of(guards=guards), guard)


def _redirected(
    breaks: str, event: type[Event], source: AllocationState, target: AllocationState
) -> Variant:
    row = row_of(ALLOCATION, event, source)
    says = f"{event.__name__} in {source.value} leads to {target.value}"
    table = edited(ALLOCATION, event, source, replace(row, target=target))
    return Variant(breaks, says, relation_of(table))


def _lacking(breaks: str, table: Table, event: type[Event], state: Enum) -> Variant:
    says = f"{table.name}: no row for {event.__name__} in {state.value}"
    left = edited(table, event, state, None)
    made = relation_of(left) if table is ALLOCATION else relation_of(message=left)
    return Variant(breaks, says, made)


def _late_reports() -> Variant:
    notes = {
        event: tuple(each for each in all_notes if each is not no_hand_over_is_under_way)
        for event, all_notes in NOTES.items()
    }
    says = "a hand-over may be reported after the end is announced"
    return Variant("hand-overs under way", says, relation_of(notes=notes), do.HandOver)


@cache
def variants() -> tuple[Variant, ...]:
    """Make every broken variant; the first for an invariant is the one that the book shows."""
    return (
        _unguarded("counts", IS_BEING_MADE),
        _unguarded("counts", IS_BEING_RELEASED),
        _unguarded("open connections", IS_OPEN),
        _forgetful("nothing kept", on.NamespacesReleased, _ENDED, do.Forget),
        _excessive("askers are parties", on.EndReceived, _UNKNOWN, do.AddAsker),
        _forgetful("waiting askers", on.RequestAdmitted, _UNKNOWN, do.AddAsker),
        _forgetful("waiting askers", on.RequestRepeated, _REQUESTED, do.AddAsker),
        _forgetful("creation", on.RequestAdmitted, _UNKNOWN, do.CreateNamespaces),
        _excessive("one creation", on.RequestRepeated, _REQUESTED, do.CreateNamespaces),
        _redirected("response", on.NamespacesNotCreated, _REQUESTED, _CREATED),
        _forgetful("granted alive", on.EndReceived, _CREATED, do.WithdrawGrants),
        _forgetful("granted alive", on.ScopeEmptied, _HANDED_OFF, do.WithdrawGrants),
        _forgetful("waiting", on.NamespacesCreated, _REQUESTED, do.GrantAskers),
        _forgetful("waiting", on.RequestConflicting, _CREATED, do.RefuseConflict),
        _forgetful("waiting", on.NamespacesReleased, _ENDED, do.FailAskers),
        _excessive("deferred", on.RequestDuringDrain, _ENDED, do.DeferRequest),
        _forgetful("waiting ends", on.ReleaseOverdue, _ENDED, do.AnswerEnd),
        _forgetful("claim timer in vain", on.RequestRepeated, _CREATED, stop(Timer.CLAIM)),
        _forgetful("claim timer in vain", on.EndReceived, _CREATED, stop(Timer.CLAIM)),
        _forgetful("claim timer", on.NamespacesCreated, _REQUESTED, do.CheckClaim),
        _forgetful("claim timer", on.CreatedAdopted, _UNKNOWN, start(Timer.CLAIM)),
        _forgetful("release timer", on.RemainsFound, _UNKNOWN, start(Timer.RELEASE)),
        _forgetful("announced", on.NamespacesReleased, _ENDED, do.Forget),
        _forgetful("one release", on.RetryDue, _ENDED, do.ReleaseNamespaces),
        _excessive("one release", on.ReleaseRequested, _ENDED, do.ReleaseNamespaces),
        _unguarded("retry after creation", IS_MADE),
        _redirected("holders", on.ResponseSent, _CREATED, _CREATED),
        _excessive("told once", on.EndReceived, _ENDED, do.ConfirmEnd),
        _forgetful("told at all", on.NamespacesReleased, _ENDED, do.PushEnd),
        _late_reports(),
        _lacking("ResponseSent is not refused", ALLOCATION, on.ResponseSent, _ENDED),
        _lacking("NamespacesCreated is not refused", ALLOCATION, on.NamespacesCreated, _ENDED),
        _lacking("InitDied is not refused", ALLOCATION, on.InitDied, _ENDED),
        _lacking("RetryDue is not refused", ALLOCATION, on.RetryDue, _ENDED),
        _lacking("allocation: Unclaimed has no row in ended", ALLOCATION, on.Unclaimed, _ENDED),
        _lacking(
            "message: MessageDispatched has a row in deferred",
            MESSAGE,
            on.MessageDispatched,
            MessageState.DEFERRED,
        ),
        _lacking(
            "message: GrantWithdrawn has a row in granted",
            MESSAGE,
            on.GrantWithdrawn,
            MessageState.GRANTED,
        ),
    )
