"""Which rows of the tables a run has taken: every one shall be, on every adapter of ours."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Final

from statemachine import consumer, provider
from statemachine.events import Event
from statemachine.lifecycle import CONSUMER, NOTICE, PROVIDER
from statemachine.table import Row, Table

_HOMES: Final = ((provider, PROVIDER), (consumer, CONSUMER), (consumer, NOTICE))


def cell(table: str, event: type[Event], state: Any) -> str:
    """Name a cell."""
    return f"{table} {state.value} {event.__name__}"


def cells_of(*tables: Table) -> set[str]:
    """Name every cell that has a row."""
    return {cell(table.name, row.event, row.source) for table in tables for row in table.rows}


class _Counting:
    """A table that counts what it fires."""

    def __init__(self, table: Table, hits: Counter[str]) -> None:
        self._table = table
        self._hits = hits

    def row(self, event: type[Event], state: Any) -> Row | None:
        return self._table.row(event, state)

    def fire(self, model: Any, event: type[Event], subject: str) -> Any:
        name = cell(self._table.name, event, model.state)
        orders = self._table.fire(model, event, subject)
        self._hits[name] += 1
        return orders


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Count every row that any kernel takes meanwhile, in whichever thread."""
    hits: Counter[str] = Counter()
    before = [vars(module)[table.name.upper()] for module, table in _HOMES]
    try:
        for (module, table), there in zip(_HOMES, before, strict=True):
            setattr(module, table.name.upper(), _Counting(there, hits))
        yield hits
    finally:
        for (module, table), there in zip(_HOMES, before, strict=True):
            setattr(module, table.name.upper(), there)


def missing(hits: Iterable[str], *tables: Table) -> list[str]:
    """Name the cells that were not hit."""
    return sorted(cells_of(*tables) - set(hits))
