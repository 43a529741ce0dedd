"""Watch or replace the tables that kernels run: row coverage, mutants."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final, TypeAlias

from ...effects import Order
from ...events import Event
from ...table import Row, Table

RowKey: TypeAlias = tuple[str, str, str]
"""A row by names: of its table, of its event, and of the state before."""

OnRow: TypeAlias = Callable[[str, type[Event], Any], None]
"""Is told of each row that is taken: the table's name, the event, the state before."""


def row_key(table: str, event: type[Event], state: Any) -> RowKey:
    """Name a row, with what `OnRow` is told."""
    return table, event.__name__, str(state.value)


def all_rows(*tables: Table) -> set[RowKey]:
    """Name every row of tables."""
    return {row_key(table.name, row.event, row.source) for table in tables for row in table.rows}


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


class TableHomes:
    """
    Where kernels look for their tables whenever they use one.

    Args:
        homes: of each table, by its name, the module or the class that has it, and as what.
    """

    def __init__(self, homes: Mapping[str, tuple[Any, str]]) -> None:
        self._homes: Final = dict(homes)

    def running(self, name: str) -> Any:
        """Return the table of a name that the kernels run at present."""
        owner, attribute = self._homes[name]
        return getattr(owner, attribute)

    @contextmanager
    def replaced(self, *tables: Any) -> Iterator[None]:
        """Have kernels run these tables for those of the same names, in every thread."""
        before = {table.name: self.running(table.name) for table in tables}
        try:
            for table in tables:
                self._put(table.name, table)
            yield
        finally:
            for name, table in before.items():
                self._put(name, table)

    @contextmanager
    def watched(self, taken: OnRow, asked: OnRow | None = None) -> Iterator[None]:
        """Watch all tables that the kernels run meanwhile, in every thread."""
        running = map(self.running, self._homes)
        with self.replaced(*(WatchedTable(table, taken, asked) for table in running)):
            yield

    def _put(self, name: str, table: Any) -> None:
        owner, attribute = self._homes[name]
        setattr(owner, attribute, table)
