"""Watch or replace the tables that the kernels run: row coverage, mutants."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, Final

from .. import consumer
from ..effects import Order
from ..events import Event
from ..lifecycle import TABLES
from ..provider import state
from ..table import Row, Table

HOMES: Final[dict[str, ModuleType]] = {
    "allocation": state,
    "consumer": consumer,
    "notice": consumer,
    "service": state,
    "message": state,
}
"""The module from which the kernels take each table, under its name in capitals."""

OnRow = Callable[[str, type[Event], Any], None]
"""Is told of each row that is taken: the table's name, the event, the state before."""


class WatchedTable:
    """
    A table that tells of each row that it takes.

    Args:
        table: what is watched; it may be watched already.
        taken: is told of each row that was taken.
        asked: is told of each cell that was looked up, before it is known whether there is a row.
    """

    def __init__(self, table: Table, taken: OnRow, asked: OnRow | None = None) -> None:
        self._table = table
        self._taken = taken
        self._asked = asked
        self.name = table.name

    def row(self, event: type[Event], state: Any) -> Row | None:
        """Look up a cell, as `Table.row` does."""
        if self._asked is not None:
            self._asked(self.name, event, state)
        return self._table.row(event, state)

    def fire(self, model: Any, event: type[Event]) -> tuple[Order, ...]:
        """Move a model, as `Table.fire` does."""
        state = model.state
        if self._asked is not None:
            self._asked(self.name, event, state)
        orders = self._table.fire(model, event)
        self._taken(self.name, event, state)
        return orders


@contextmanager
def replaced(*tables: Any) -> Iterator[None]:
    """Have all kernels run these tables in place of those of the same names, in every thread."""
    before = {table.name: vars(HOMES[table.name])[table.name.upper()] for table in tables}
    try:
        for table in tables:
            setattr(HOMES[table.name], table.name.upper(), table)
        yield
    finally:
        for name, table in before.items():
            setattr(HOMES[name], name.upper(), table)


@contextmanager
def watched(taken: OnRow, asked: OnRow | None = None) -> Iterator[None]:
    """Watch all tables that the kernels run meanwhile, in every thread."""
    running = [vars(HOMES[table.name])[table.name.upper()] for table in TABLES]
    with replaced(*(WatchedTable(table, taken, asked) for table in running)):
        yield
