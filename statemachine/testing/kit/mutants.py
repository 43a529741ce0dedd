"""Tables in which one thing is different, and which of them a check does not notice.

A mutant of a table is one edit of one cell: a row less, a row that leads elsewhere, a row where
there is none, an effect less, more, twice, or in another place. All of them are made, so that what
is said of them is said of all. A mutant is *killed* if it breaks a rule that every table keeps
(`UnsoundTable`), or if a check raises while the kernels run it. What survives is a hole in the
check, or no change at all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from enum import Enum
from itertools import combinations
from typing import Any, TypeAlias

from ...effects import Order, order_name
from ...events import Event
from ...table import Row, Table, UnsoundTable, compile_table
from .homes import TableHomes
from .reached import ViolatingPath

TableCell: TypeAlias = tuple[type[Event], Any]


@dataclass(frozen=True)
class Mutant:
    """A table with one edit."""

    table: str
    edit: str
    """What kind of edit it is."""
    name: str
    """Which cell, and what is done to it."""
    before: Row | None
    """The row as it was, if there is one."""
    after: Row | None
    """The row as it is, if there is one."""
    rows: tuple[Row, ...] = field(repr=False)

    def __str__(self) -> str:
        return f"{self.edit}: {self.name}"

    @property
    def cell(self) -> TableCell:
        """The event and the state."""
        row = self.before or self.after
        assert row is not None
        return row.event, row.source

    @property
    def surplus(self) -> Order | None:
        """The effect that is asked for in addition, or once more."""
        if self.before is None or self.after is None:
            return None
        more = list(self.after.effects)
        for order in self.before.effects:
            if order in more:
                more.remove(order)
        return more[0] if len(self.after.effects) > len(self.before.effects) else None


# --- All of them -------------------------------------------------------------------------------


def mutants(table: Table) -> Iterator[Mutant]:
    """Make every edit of every cell."""
    for at, row in enumerate(table.rows):
        for edit, name, changed in _edits(table, row):
            rows = (*table.rows[:at], *([changed] if changed else []), *table.rows[at + 1 :])
            full_name = f"{row.event.__name__} in {row.source.value} {name}"
            yield Mutant(table.name, edit, full_name, row, changed, rows)
    for event in table.events:
        for state in table.states:
            if table.row(event, state) is None:
                for target in table.states:
                    name = f"{event.__name__} in {state.value} to {target.value}"
                    row = Row(event, state, target)
                    yield Mutant(table.name, "add a row", name, None, row, (*table.rows, row))


def _edits(table: Table, row: Row) -> Iterator[tuple[str, str, Row | None]]:
    yield "delete a row", "is missing", None
    for target in table.states:
        if target is not row.target:
            yield "redirect a row", f"to {target.value}", replace(row, target=target)
    orders = row.effects
    for at, order in enumerate(orders):
        name = order_name(order)
        less = (*orders[:at], *orders[at + 1 :])
        twice = (*orders[: at + 1], *orders[at:])
        yield "drop an effect", f"without {name}", replace(row, effects=less)
        yield "repeat an effect", f"with {name} twice", replace(row, effects=twice)
    for one, other in combinations(range(len(orders)), 2):
        swapped = list(orders)
        swapped[one], swapped[other] = swapped[other], swapped[one]
        name = f"with {order_name(orders[one])} and {order_name(orders[other])} swapped"
        yield "swap effects", name, replace(row, effects=tuple(swapped))
    for order in vocabulary(table):
        if order not in orders:
            name = f"with {order_name(order)} as well"
            yield "add an effect", name, replace(row, effects=(*orders, order))


def vocabulary(table: Table) -> tuple[Order, ...]:
    """List every effect that a table asks for anywhere."""
    return tuple(dict.fromkeys(order for row in table.rows for order in row.effects))


def edited(table: Table, event: type[Event], state: Enum, new: Row | None) -> Table:
    """Make a table like another one but for a row: replaced, left out, or put in."""
    rows = [row for row in table.rows if (row.event, row.source) != (event, state)]
    added = [new] if new is not None else []
    return compile_table(table.name, [*rows, *added], initial=table.initial, finals=table.finals)


# --- Who notices -------------------------------------------------------------------------------


@dataclass
class MutantFates:
    """What became of the mutants of a table."""

    killers: dict[str, str] = field(default_factory=dict)
    """By each mutant that was noticed, a few words of what noticed it."""
    survivors: list[Mutant] = field(default_factory=list)
    """Those that nothing noticed."""
    counts: Counter[str] = field(default_factory=Counter)
    """How many were killed, by kind of edit."""

    @property
    def total(self) -> int:
        """How many there were."""
        return len(self.killers) + len(self.survivors)


def try_mutants(table: Table, homes: TableHomes, check: Callable[[], object]) -> MutantFates:
    """
    Run a check with every mutant of a table in its place.

    Args:
        table: what is edited.
        homes: where the kernels of the check take it from.
        check: raises what it notices.

    Raises:
        Exception: what the check raises with the table as it is: then it tells nothing.
    """
    check()
    fates = MutantFates()
    for mutant in mutants(table):
        killer = killer_of(mutant, table, homes, check)
        if killer is None:
            fates.survivors.append(mutant)
        else:
            fates.killers[str(mutant)] = killer
            fates.counts[mutant.edit] += 1
    return fates


def killer_of(
    mutant: Mutant, table: Table, homes: TableHomes, check: Callable[[], object]
) -> str | None:
    """
    Say what notices a mutant: a few words of its finding; None if nothing does.

    Args:
        mutant: of the table.
        table: as it is.
        homes: where the kernels of the check take it from.
        check: raises what it notices.
    """
    try:
        edited_table = compile_table(
            table.name, mutant.rows, initial=table.initial, finals=table.finals
        )
        with homes.replaced(edited_table):
            check()
    except UnsoundTable as error:
        return f"unsound: {error}"
    except Exception as error:
        # A mutant may also make the kernel fail in itself.
        said = error.finding if isinstance(error, ViolatingPath) else str(error)
        return f"{type(error).__name__}: {said.partition(chr(10))[0]}"
    return None
