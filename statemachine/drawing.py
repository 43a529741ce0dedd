"""Tables as Mermaid diagrams and as Markdown, for the documents.

Pure text, made from the rows in their order: same table, same picture, byte for byte.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum
from typing import Final

from .effects import order_name
from .lifecycle import Guard
from .table import Row, Table

_BREAK: Final = "<br>"


def mermaid(table: Table) -> str:
    """
    Draw the moves of a table as a Mermaid state diagram.

    Rows that stay where they are are left out: they are many, and the Markdown table has them.
    """
    lines = ["stateDiagram-v2", "    direction TB", f"    [*] --> {_id(table.initial)}"]
    for (source, target), rows in _moves(table.rows).items():
        events = _BREAK.join(row.event.__name__ for row in rows)
        lines.append(f"    {_id(source)} --> {_id(target)}: {events}")
    finals = (state for state in table.states if state in table.finals)
    lines += [f"    {_id(state)} --> [*]" for state in finals]
    return "\n".join(lines) + "\n"


def markdown(table: Table) -> str:
    """Write a table as Markdown, one line for each event, source and target grouped by row."""
    lines = ["| event | from | to | effects |", "|---|---|---|---|"]
    for rows in _alike(table.rows):
        first = rows[0]
        sources = ", ".join(_id(row.source) for row in rows)
        target = "*stays*" if first.source is first.target else _id(first.target)
        effects = ", ".join(order_name(order) for order in first.effects) or "nothing"
        lines.append(f"| `{first.event.__name__}` | {sources} | {target} | {effects} |")
    return "\n".join(lines) + "\n"


def guards(listed: Iterable[Guard]) -> str:
    """Write guards as Markdown, one line for each."""
    lines = ["| event | is refused unless |", "|---|---|"]
    for guard in listed:
        events = ", ".join(f"`{event.__name__}`" for event in guard.events)
        lines.append(f"| {events} | {guard.condition} |")
    return "\n".join(lines) + "\n"


def _id(state: Enum) -> str:
    return str(state.value)


def _moves(rows: Iterable[Row]) -> dict[tuple[Enum, Enum], list[Row]]:
    moves: dict[tuple[Enum, Enum], list[Row]] = {}
    for row in rows:
        if row.source is not row.target:
            moves.setdefault((row.source, row.target), []).append(row)
    return moves


def _alike(rows: Iterable[Row]) -> list[list[Row]]:
    """Group rows that differ only in where they come from, if they stay or go to one place."""
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        stays = row.source is row.target
        key = (row.event, None if stays else row.target, row.effects)
        groups.setdefault(key, []).append(row)
    return list(groups.values())
