"""Which rows of the tables a run has taken: every one shall be, on every adapter of ours."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from statemachine.events import Event
from statemachine.table import Table
from statemachine.testing.kit import RowKey, all_rows, row_key
from statemachine.testing.tables import HOMES


def cell(table: str, event: type[Event], state: Any) -> str:
    """Name a cell."""
    return _named(row_key(table, event, state))


def _named(row: RowKey) -> str:
    table, event, state = row
    return f"{table} {state} {event}"


def cells_of(*tables: Table) -> set[str]:
    """Name every cell that has a row."""
    return set(map(_named, all_rows(*tables)))


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Count every row that any kernel takes meanwhile, in every thread."""
    hits: Counter[str] = Counter()

    def count(*row: Any) -> None:
        hits[cell(*row)] += 1

    with HOMES.watched(count):
        yield hits


def missing(hits: Iterable[str], *tables: Table) -> list[str]:
    """Name the cells that were not hit."""
    return sorted(cells_of(*tables) - set(hits))
