"""Any machine of `transitions` made of any table does what the rows say, and nothing else."""

from __future__ import annotations

import asyncio
import inspect
from collections import deque
from enum import Enum
from typing import Any, Final

import pytest
from transitions import Machine, MachineError
from transitions.extensions import (
    AsyncMachine,
    GraphMachine,
    HierarchicalMachine,
    LockedMachine,
)

from statemachine.effects import Order
from statemachine.lifecycle import ALLOCATION, TABLES
from statemachine.states import AllocationState
from statemachine.table import Row, Table

KINDS: Final[tuple[Any, ...]] = (
    Machine,
    GraphMachine,
    LockedMachine,
    AsyncMachine,
    HierarchicalMachine,
)
OPTIONS: Final[dict[Any, dict[str, str]]] = {GraphMachine: {"graph_engine": "mermaid"}}

every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
every_table = pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)


class AnyModel:
    """It has whatever `transitions` adds, and notes the orders of each move."""

    state: Enum

    def __init__(self) -> None:
        self.orders: list[tuple[Order, ...]] = []

    def note(self, event: Any) -> None:
        self.orders.append(event.transition.effects)

    def happens(self, name: str) -> bool:
        """Trigger an event, of an asynchronous machine as well."""
        outcome: Any = getattr(self, name)()
        if inspect.isawaitable(outcome):
            outcome = asyncio.run(_awaited(outcome))
        return bool(outcome)


async def _awaited(outcome: Any) -> Any:
    return await outcome


def made(table: Table, kind: Any, **options: Any) -> tuple[Any, AnyModel]:
    """Make a machine of this kind, and a model that it moves."""
    model = AnyModel()
    options |= {"send_event": True, "after_state_change": "note", **OPTIONS.get(kind, {})}
    return table.machine(kind, model=model, **options), model


def whole_life(table: Table) -> list[Row]:
    """Find the shortest way from the initial state to a final one."""
    ways: deque[list[Row]] = deque([[]])
    while True:
        way = ways.popleft()
        state = way[-1].target if way else table.initial
        if state in table.finals:
            return way
        ways.extend([*way, row] for row in table.rows if row.source is state)


@every_kind
@every_table
def test_basic_it_tells_the_rows(table: Table, kind: Any) -> None:
    machine, _ = made(table, kind)
    assert isinstance(machine, kind)
    for state in table.states:
        rows = [row for row in table.rows if row.source is state]
        assert set(machine.get_triggers(state)) == {row.event.__name__ for row in rows}
    for event in table.events:
        moves = machine.get_transitions(event.__name__)
        assert {(move.source, move.dest, move.effects) for move in moves} == {
            (row.source.name, row.target.name, row.effects)
            for row in table.rows
            if row.event is event
        }
    assert len(machine.get_transitions()) == len(table.rows)


@every_kind
@every_table
def test_basic_it_leads_a_model_through_a_whole_life(table: Table, kind: Any) -> None:
    machine, model = made(table, kind)
    assert model.state is table.initial
    life = whole_life(table)
    for row in life:
        assert model.happens(row.event.__name__)
        assert model.state is row.target
        assert machine.get_model_state(model).name == row.target.name
    assert model.state in table.finals
    assert model.orders == [row.effects for row in life]


@every_kind
@every_table
def test_it_refuses_what_has_no_row(table: Table, kind: Any) -> None:
    for state in table.states:
        _, model = made(table, kind, initial=state)
        for event in table.events:
            if table.row(event, state) is None:
                with pytest.raises(MachineError, match=f"'?{event.__name__}'? from state"):
                    model.happens(event.__name__)
        assert (model.state, model.orders) == (state, [])


@every_table
def test_its_graph_has_every_row(table: Table) -> None:
    machine, _ = made(table, GraphMachine)
    lines = [line.strip() for line in machine.get_graph().draw(None).splitlines()]
    for row in table.rows:
        start = f"{row.source.name} --> {row.target.name}: "
        labels = [line.removeprefix(start) for line in lines if line.startswith(start)]
        assert any(row.event.__name__ in label.split(" | ") for label in labels), row


# --- Where it begins, and what cannot be given ---------------------------------------------------


@every_kind
@pytest.mark.parametrize("initial", [AllocationState.HANDED_OFF, "HANDED_OFF"])
def test_it_begins_where_it_is_told_to(kind: Any, initial: Any) -> None:
    _, model = made(ALLOCATION, kind, initial=initial)
    assert model.state is AllocationState.HANDED_OFF
    assert model.happens("ScopeEmptied")
    assert model.state is AllocationState.ENDED


@pytest.mark.parametrize("initial", ["handed off", "created", "", Machine, 1])
def test_invalid_an_initial_state_of_no_table(initial: Any) -> None:
    with pytest.raises(ValueError, match=r"^allocation: .+ is no state of this table, which has "):
        ALLOCATION.machine(initial=initial)


@pytest.mark.parametrize("name", ["states", "transitions"])
def test_invalid_states_and_transitions_are_the_tables_own(name: str) -> None:
    with pytest.raises(TypeError, match=f"^allocation: {name} cannot be given: they are the table"):
        ALLOCATION.machine(**{name: []})


def test_a_class_whose_states_can_have_any_name_is_taken_as_it_is() -> None:
    for table in TABLES:
        assert type(table.machine()) is Machine
        has_underscore = any("_" in state.name for state in table.states)
        assert (type(table.machine(HierarchicalMachine)) is HierarchicalMachine) != has_underscore
    assert HierarchicalMachine.state_cls.separator == "_"
