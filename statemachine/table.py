"""State tables, checked and run by `transitions`: a row is event, source, target and effects.

`compile_table` checks that rows make a sound table and puts each into a machine of `transitions`,
as a transition that carries the row's effects. `Table.fire` triggers that machine for a model, and
translates its refusal. `Table.machine` makes a stock machine of the same rows, for any model.

A model is not registered with the table's machine: an object with a `state` is enough, nothing is
added to it and no reference to it is kept, so that an allocation costs its own few words and is
gone when it is forgotten. This module and `machine` are the only ones that know `transitions`,
which is imported when a model is first moved: a program that shows a table moves none.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar, overload

from .effects import Effect, KernelOrder, Order, Timing, order_name
from .errors import LocalProtocolError, RemoteProtocolError
from .events import Event, LocalEvent, PeerEvent
from .record import record

if TYPE_CHECKING:
    from transitions import Machine

M = TypeVar("M", bound="Machine")


class Model(Protocol):
    """Anything with a state that a table may move."""

    state: Any

    @property
    def subject(self) -> str:
        """What the model stands for, in the text of an error."""
        ...


@record
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


class Table:
    """
    A sound table, ready to move models.

    Any number of models may be moved by one table; the table has no state of its own.
    """

    def __init__(
        self,
        name: str,
        rows: tuple[Row, ...],
        initial: Enum,
        finals: frozenset[Enum],
        cells: dict[tuple[type[Event], Enum], Row],
    ) -> None:
        self.name: Final = name
        """What the table is about, for texts."""
        self.rows: Final = rows
        """Every row, in the order in which they are written down."""
        self.initial: Final = initial
        """Where a life begins."""
        self.finals: Final = finals
        """Where a life can end."""
        self._cells: Final = cells

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

    def fire(self, model: Model, event: type[Event]) -> tuple[Order, ...]:
        """
        Move a model by an event.

        Returns:
            What the row asks for.

        Raises:
            LocalProtocolError, RemoteProtocolError: there is no such row; the event's class says
                whose fault that is. The model is untouched.
        """
        # Keeps LIFE-1.
        try:
            orders: tuple[Order, ...] = self._triggers[event](model)
        except _what_refuses():
            raise refusal(event, model) from None
        return orders

    @cached_property
    def _triggers(self) -> dict[type[Event], Any]:
        from .machine import TableMachine

        made: Any = self.machine(TableMachine)
        return {event: made.events[event.__name__].take for event in self.events}

    @overload
    def machine(
        self, *, model: Any = None, initial: Enum | str | None = None, **options: Any
    ) -> Machine: ...
    @overload
    def machine(
        self, cls: type[M], *, model: Any = None, initial: Enum | str | None = None, **options: Any
    ) -> M: ...
    def machine(
        self,
        cls: Any = None,
        *,
        model: Any = None,
        initial: Enum | str | None = None,
        **options: Any,
    ) -> Any:
        """
        Make a stock machine of `transitions` with the rows of this table.

        The machine is new with each call. Its triggers are the names of the events, its states the
        members of the enum; each transition has the row's orders as its attribute `effects`, which
        a callback finds with `send_event=True` in `event_data.transition.effects`.

        A hierarchical machine takes an underscore for the end of an outer state's name. Where a
        state has one, it is given a subclass of `cls` in which a dot has that meaning.

        Args:
            cls: which machine: `Machine` (None), `GraphMachine`, `LockedMachine`, ...
            model: what it moves; an object, a list, or None.
            initial: where the model begins, by member or by name; None: where a life begins.
            options: for its constructor, as `send_event`, `graph_engine` or `after_state_change`.

        Raises:
            ValueError: the table has no such initial state.
            TypeError: `states` or `transitions` are given, which are the table's own.
        """
        taken = sorted({"states", "transitions"} & options.keys())
        if taken:
            raise TypeError(f"{self.name}: {taken[0]} cannot be given: they are the table's own")
        if cls is None:
            from transitions import Machine

            cls = Machine
        made = _taking_names(cls, self.states)(
            model=model,
            states=type(self.initial),
            initial=self.initial if initial is None else self._state_of(initial),
            transitions=[
                {"trigger": row.event.__name__, "source": row.source, "dest": row.target}
                for row in self.rows
            ],
            # They would give every state a `to_<state>` that bypasses the rows.
            auto_transitions=options.pop("auto_transitions", False),
            **options,
        )
        for row in self.rows:
            found: Any = made.events[row.event.__name__].transitions[row.source.name][0]
            found.effects = row.effects
        return made

    def _state_of(self, state: Enum | str) -> Enum:
        for each in self.states:
            if state in (each, each.name):
                return each
        names = ", ".join(each.name for each in self.states)
        raise ValueError(f"{self.name}: {state!r} is no state of this table, which has {names}")


def _taking_names(cls: Any, states: Iterable[Enum]) -> Any:
    """Return a class of machines like `cls` that takes the states' names as they are."""
    separator = getattr(cls.state_cls, "separator", None)
    if separator is None or not any(separator in state.name for state in states):
        return cls
    kind = type(cls.state_cls.__name__, (cls.state_cls,), {"separator": "."})
    return type(cls.__name__, (cls,), {"state_cls": kind})


def _what_refuses() -> tuple[type[Exception], ...]:
    """Return what `fire` is told by a table that has no such event, or no such row."""
    from transitions import MachineError

    return KeyError, MachineError


def refusal(event: type[Event], model: Model) -> LocalProtocolError | RemoteProtocolError:
    """Make the error for an event that has no row: the event's class says whose fault it is."""
    error = RemoteProtocolError if issubclass(event, PeerEvent) else LocalProtocolError
    return error(event.__name__, str(model.state.value), model.subject)


def compile_table(
    name: str, rows: Iterable[Row], *, initial: Enum, finals: Iterable[Enum]
) -> Table:
    """
    Check rows and make them run.

    Raises:
        UnsoundTable: two rows for one cell; a state that cannot be reached, or from which no
            final state can be reached; an event that is neither a peer's nor local (so that a
            refusal would have no culprit); something in the last column that is no order.
    """
    rows = tuple(rows)
    finals = frozenset(finals)
    cells = _cells_of(name, rows)
    _check_kinds(name, rows)
    _check_states(name, rows, initial, finals)
    _check_paths(name, rows, initial, finals)
    return Table(name, rows, initial, finals, cells)


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


def _cells_of(name: str, rows: tuple[Row, ...]) -> dict[tuple[type[Event], Enum], Row]:
    cells: dict[tuple[type[Event], Enum], Row] = {}
    for row in rows:
        cell = row.event, row.source
        if cell in cells:
            raise UnsoundTable(f"{name}: two rows for {row.event.__name__} in {row.source}")
        cells[cell] = row
    return cells


def _check_kinds(name: str, rows: tuple[Row, ...]) -> None:
    for row in rows:
        if issubclass(row.event, PeerEvent) == issubclass(row.event, LocalEvent):
            raise UnsoundTable(f"{name}: {row.event.__name__} is neither a peer's nor local")
        for order in row.effects:
            is_named = isinstance(order, type) and issubclass(order, Effect | KernelOrder)
            if not isinstance(order, Timing) and not is_named:
                raise UnsoundTable(f"{name}: {order!r} is not an order")


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
    return ", ".join(sorted(str(state.value) for state in states))
