"""A table of rows, checked and run: the only place that knows `transitions`.

A `Row` is data. `compile_table` checks that the rows make a sound table and has one
`transitions.Machine` run them. Models are not registered with the machine: a slotted object with a
`state` is enough, nothing is added to it and no reference to it is kept, so that an allocation
costs its own few words and is gone when it is forgotten.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final, Protocol

from transitions import EventData, Machine, Transition
from transitions import State as MachineState

from .effects import Effect, Order, Timing, order_name
from .errors import LocalProtocolError, RemoteProtocolError
from .events import Event, LocalEvent, PeerEvent


class Model(Protocol):
    """Anything with a state that a table may move."""

    state: Any


@dataclass(frozen=True, slots=True)
class Row:
    """When this event happens in this state, go there and ask for that."""

    event: type[Event]
    source: Enum
    """The state before."""
    target: Enum
    """The state after; the same if the event is tolerated."""
    effects: tuple[Order, ...] = ()


class UnsoundTable(Exception):
    """A table breaks a rule that every table keeps; raised on import."""


@dataclass(frozen=True)
class Table:
    """
    A sound table, ready to move models.

    Any number of models may be moved by one table; the table has no state of its own.
    """

    name: str
    """What the table is about, for texts."""
    rows: tuple[Row, ...]
    """Every row, in the order in which they are written down."""
    initial: Enum
    """Where a life begins."""
    finals: frozenset[Enum]
    """Where a life can end."""
    _cells: dict[tuple[type[Event], Enum], Row] = field(repr=False)
    _triggers: dict[type[Event], Any] = field(repr=False)

    @property
    def states(self) -> tuple[Enum, ...]:
        """Every state, in the order in which the enum lists them."""
        return tuple(type(self.initial))

    @property
    def events(self) -> tuple[type[Event], ...]:
        """Every event of the table, in the order in which the rows first name them."""
        return tuple(dict.fromkeys(row.event for row in self.rows))

    def row(self, event: type[Event], state: Enum) -> Row | None:
        """Look up a cell: its row, or None where the event is refused."""
        return self._cells.get((event, state))

    def fire(self, model: Model, event: type[Event], subject: str) -> tuple[Order, ...]:
        """
        Move a model by an event.

        Args:
            model: what moves.
            event: what happened to it.
            subject: what the model stands for, for the error's text.

        Returns:
            What the row asks for.

        Raises:
            LocalProtocolError, RemoteProtocolError: there is no such row; the event's class says
                whose fault that is. The model is untouched.
        """
        # Keeps LIFE-1.
        row = self._cells.get((event, model.state))
        if row is None:
            raise refusal(event, model.state, subject)
        self._triggers[event].trigger(model)
        return row.effects


def refusal(
    event: type[Event], state: Enum, subject: str
) -> LocalProtocolError | RemoteProtocolError:
    """Make the error for an event that has no row: the event's class says whose fault it is."""
    error = RemoteProtocolError if issubclass(event, PeerEvent) else LocalProtocolError
    return error(event.__name__, str(state.value), subject)


def compile_table(
    name: str, rows: Iterable[Row], *, initial: Enum, finals: Iterable[Enum]
) -> Table:
    """
    Check rows and make them run.

    Raises:
        UnsoundTable: two rows for one cell; a state that cannot be reached, or from which no
            final state can be reached; an event that is neither a peer's nor local (so that a
            refusal would have no culprit); something in the last column that is no effect.
    """
    rows = tuple(rows)
    finals = frozenset(finals)
    cells = _cells_of(name, rows)
    _check_kinds(name, rows)
    _check_states(name, rows, initial, finals)
    _check_paths(name, rows, initial, finals)
    machine = _machine_of(rows, initial)
    triggers = {row.event: machine.events[row.event.__name__] for row in rows}
    return Table(name, rows, initial, finals, cells, triggers)


def check_vocabulary(
    tables: Iterable[Table], *, events: Iterable[type[Event]], orders: Iterable[Order]
) -> None:
    """
    Check that nothing is defined in vain: every event and every effect stands in some row.

    Raises:
        UnsoundTable: naming what no table uses.
    """
    rows = [row for table in tables for row in table.rows]
    unused = {e.__name__ for e in events} - {row.event.__name__ for row in rows}
    asked = {order_name(order) for row in rows for order in row.effects}
    unused |= {order_name(order) for order in orders} - asked
    if unused:
        raise UnsoundTable(f"defined, but in no table: {', '.join(sorted(unused))}")


class _Move(Transition):
    """
    A transition without callbacks: it sets the state, and that is all it does.

    No row has a callback, because one that raised would leave a move half done. Not looking for any
    makes a move twice as fast, which is what an exhaustive search of the kernels is made of.
    """

    def execute(self, event_data: EventData) -> bool:
        """Move the model; always possible, because the table has checked the row."""
        assert self.dest is not None
        event_data.machine.set_state(self.dest, event_data.model)
        return True


class _TableMachine(Machine):
    """The machine of a table: its transitions are moves."""

    transition_cls = _Move


def _machine_of(rows: tuple[Row, ...], initial: Enum) -> Machine:
    # auto_transitions would give every state a `to_<state>` that bypasses the table. A queue would
    # be shared by all models, and an exception would drop other models' events from it.
    return _TableMachine(
        model=None,
        states=[MachineState(state) for state in type(initial)],
        initial=initial,
        transitions=[
            {"trigger": row.event.__name__, "source": row.source, "dest": row.target}
            for row in rows
        ],
        auto_transitions=False,
        queued=False,
    )


def _cells_of(name: str, rows: tuple[Row, ...]) -> dict[tuple[type[Event], Enum], Row]:
    cells: dict[tuple[type[Event], Enum], Row] = {}
    for row in rows:
        if cells.setdefault((row.event, row.source), row) is not row:
            raise UnsoundTable(f"{name}: two rows for {row.event.__name__} in {row.source}")
    return cells


def _check_kinds(name: str, rows: tuple[Row, ...]) -> None:
    for row in rows:
        if issubclass(row.event, PeerEvent) == issubclass(row.event, LocalEvent):
            raise UnsoundTable(f"{name}: nobody is to blame for {row.event.__name__}")
        for order in row.effects:
            is_effect = isinstance(order, type) and issubclass(order, Effect)
            if not isinstance(order, Timing) and not is_effect:
                raise UnsoundTable(f"{name}: {order!r} is not an effect")


def _check_states(name: str, rows: tuple[Row, ...], initial: Enum, finals: frozenset[Enum]) -> None:
    named = {*finals, *(state for row in rows for state in (row.source, row.target))}
    foreign = named - frozenset(type(initial))
    if foreign:
        raise UnsoundTable(f"{name}: no state of this table: {_listed(foreign)}")


def _check_paths(name: str, rows: tuple[Row, ...], initial: Enum, finals: frozenset[Enum]) -> None:
    states: Final = frozenset(type(initial))
    forward = {(row.source, row.target) for row in rows}
    unreachable = states - _closure({initial}, forward)
    if unreachable:
        raise UnsoundTable(f"{name}: never reached: {_listed(unreachable)}")
    stuck = states - _closure(finals, {(target, source) for source, target in forward})
    if stuck:
        raise UnsoundTable(f"{name}: no way to an end from: {_listed(stuck)}")


def _closure(seeds: Iterable[Enum], edges: set[tuple[Enum, Enum]]) -> frozenset[Enum]:
    found: set[Enum] = set()
    frontier = set(seeds)
    while frontier:
        found |= frontier
        frontier = {target for source, target in edges if source in frontier} - found
    return frozenset(found)


def _listed(states: Iterable[Enum]) -> str:
    return ", ".join(sorted(_names(states)))


def _names(states: Iterable[Enum]) -> Iterator[str]:
    return (str(state.value) for state in states)
