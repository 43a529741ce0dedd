"""The report's charts: heat map, bars, stacks and dots."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from specs._build.graph import Cells
from specs._build.svg import (
    centred,
    element,
    group,
    level_of,
    line,
    picture,
    rect,
    short,
    text,
    width_of,
)
from statemachine.table import Table

WIDTH_MAX: Final = 1112.0
MARGIN: Final = 8.0

CELL_WIDTH: Final = 29.0
CELL_HEIGHT: Final = 19.0
PANEL_GAP: Final = 16.0
STATES_HEIGHT: Final = 88.0
TITLE_HEIGHT: Final = 26.0

BAR_HEIGHT: Final = 20.0
BAR_STEP: Final = 30.0
BARS_WIDTH: Final = 560.0


# --- Heat map ----------------------------------------------------------------------------------


def heat_map(table: Table, panels: Mapping[str, Cells]) -> str:
    """Draw which cells of a table each adapter hit; a cell that has no row is left blank."""
    names = width_max([event.__name__ for event in table.events]) + 12
    panel = len(table.states) * CELL_WIDTH
    per_line = max(1, int((WIDTH_MAX - 2 * MARGIN - names + PANEL_GAP) // (panel + PANEL_GAP)))
    lines = -(-len(panels) // per_line)
    body = len(table.events) * CELL_HEIGHT
    step = TITLE_HEIGHT + STATES_HEIGHT + body + PANEL_GAP
    columns = min(len(panels), per_line)
    # The last heading leans out to the right.
    width = 2 * MARGIN + names + columns * (panel + PANEL_GAP) + 30
    parts = []
    for index, (adapter, cells) in enumerate(panels.items()):
        x = MARGIN + names + index % per_line * (panel + PANEL_GAP)
        y = MARGIN + index // per_line * step
        if index % per_line == 0:
            parts += _event_names(table, x - 8, y + TITLE_HEIGHT + STATES_HEIGHT)
        parts.append(_panel(table, adapter, cells, x, y))
    label = f"Heat map of the table {table.name}: state by event, for {', '.join(panels)}"
    return picture(width, MARGIN + lines * step, label, parts)


def _event_names(table: Table, x: float, y: float) -> list[str]:
    return [
        text(x, y + (i + 0.5) * CELL_HEIGHT, event.__name__, class_="label", text_anchor="end")
        for i, event in enumerate(table.events)
    ]


def _panel(table: Table, adapter: str, cells: Cells, x: float, y: float) -> str:
    legal = {(str(row.source.value), row.event.__name__) for row in table.rows}
    counts = {cell: cells.get((table.name, *cell), 0) for cell in legal}
    hit, most = sum(map(bool, counts.values())), max(counts.values())
    said = f"{adapter}: {hit} of {len(legal)}"
    parts = [
        text(x, y + TITLE_HEIGHT / 2, said, class_="name" if hit == len(legal) else "name missed")
    ]
    top = y + TITLE_HEIGHT + STATES_HEIGHT
    for column, state in enumerate(table.states):
        middle = x + (column + 0.5) * CELL_WIDTH
        place = f"translate({middle:.1f} {top - 6:.1f}) rotate(-58)"
        parts.append(element("text", str(state.value), class_="label", transform=place))
        for number, event in enumerate(table.events):
            cell = (str(state.value), event.__name__)
            corner = (x + column * CELL_WIDTH, top + number * CELL_HEIGHT)
            if cell in legal:
                parts.append(_cell(corner, cell, counts[cell], most))
            else:
                size = (CELL_WIDTH - 2, CELL_HEIGHT - 2)
                parts.append(rect(corner[0] + 1, corner[1] + 1, *size, rx=2, class_="none"))
    return group(parts)


def _cell(corner: tuple[float, float], cell: tuple[str, str], count: int, most: int) -> str:
    x, y = corner
    level = level_of(count, most)
    tip = f"{cell[1]} in {cell[0]}: {count:,}" if count else f"{cell[1]} in {cell[0]}: missed"
    name = f"cell v{level}" if count else "cell missed"
    box = rect(x + 1, y + 1, CELL_WIDTH - 2, CELL_HEIGHT - 2, rx=2, class_=name)
    name = f"on{level}" if count else "label missed"
    words = centred(x + CELL_WIDTH / 2, y + CELL_HEIGHT / 2, short(count), name, 10)
    return group([box, words], tip)


# --- Bars --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bar:
    """A measured figure, and what it was to reach."""

    label: str
    value: float
    goal: float | None = None


def bars(unit: str, these: Sequence[Bar]) -> str:
    """Draw figures of one unit beside each other; a goal is a line across its bar."""
    names = width_max([bar.label for bar in these]) + 12
    most = max([bar.value for bar in these] + [bar.goal or 0 for bar in these]) or 1.0
    scale = BARS_WIDTH / (most * 1.02)
    parts = []
    for index, bar in enumerate(these):
        y = MARGIN + index * BAR_STEP
        is_reached = bar.goal is None or bar.value >= bar.goal
        parts.append(text(names, y + BAR_HEIGHT / 2, bar.label, class_="label", text_anchor="end"))
        x = names + 8
        length = max(bar.value * scale, 1.5)
        name = "bar" if is_reached else "bar short"
        parts.append(rect(x, y, length, BAR_HEIGHT, class_=name, rx=2))
        end = x + length
        if bar.goal is not None:
            goal = x + bar.goal * scale
            parts.append(line(goal, y - 4, goal, y + BAR_HEIGHT + 4, class_="goal"))
            end = max(end, goal)
        said = f"{bar.value:,.0f}" + ("" if bar.goal is None else f" (goal {bar.goal:,.0f})")
        parts.append(text(end + 8, y + BAR_HEIGHT / 2, said, class_="label"))
    width = names + BARS_WIDTH + 170 + 2 * MARGIN
    label = f"Bars, {unit}: " + "; ".join(f"{b.label} {round(b.value)}" for b in these)
    return picture(width, MARGIN * 2 + len(these) * BAR_STEP, label, parts)


def stacks(unit: str, rows: Mapping[str, Mapping[str, float]]) -> str:
    """Draw, for each row, how its whole is made up; the kinds are explained above."""
    kinds = sorted({kind for parts in rows.values() for kind in parts})
    names = width_max(list(rows)) + 12
    most = max((sum(parts.values()) for parts in rows.values()), default=1) or 1
    drawn, top = _legend(kinds, names)
    for index, (row, counts) in enumerate(rows.items()):
        y = top + index * (BAR_STEP - 6)
        drawn.append(text(names, y + 9, row, class_="label", text_anchor="end"))
        x = names + 8
        for number, kind in enumerate(kinds):
            if counts.get(kind):
                length = BARS_WIDTH * counts[kind] / most
                tip = f"{row}, {kind}: {counts[kind]:,.0f}"
                name = f"kind k{number % KINDS}"
                drawn.append(rect(x, y, length, 18, tip, class_=name))
                x += length
        drawn.append(text(x + 8, y + 9, f"{sum(counts.values()):,.0f}", class_="label"))
    height = top + MARGIN + len(rows) * (BAR_STEP - 6)
    label = f"Stacked bars, {unit}: the same is in the table below"
    return picture(max(WIDTH_MAX, names + BARS_WIDTH + 90), height, label, drawn)


KINDS: Final = 8
"""How many colours there are for kinds."""


def _legend(kinds: Sequence[str], left: float) -> tuple[list[str], float]:
    """Explain the colours; say where what is below may begin."""
    parts = []
    x, y = left + 8, MARGIN
    for index, kind in enumerate(kinds):
        width = 18 + width_of(kind) + 16
        if x + width > WIDTH_MAX and x > left + 8:
            x, y = left + 8, y + 20
        parts.append(rect(x, y, 12, 12, class_=f"kind k{index % KINDS}", rx=2))
        parts.append(text(x + 18, y + 6, kind, class_="label"))
        x += width
    return parts, y + 26


# --- Dots --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dots:
    """Times of one thing, in seconds."""

    label: str
    seconds: Sequence[float]
    goal: float | None = None


DOT_STEP: Final = 18.0


def dots(unit: str, rows: Sequence[Dots]) -> str:
    """Draw times on a logarithmic axis; the goals are lines."""
    known = [s for row in rows for s in row.seconds if s > 0] or [1.0]
    goals = sorted({row.goal for row in rows if row.goal})
    low = math.floor(math.log10(min([*known, *goals]) * 0.9))
    high = math.ceil(math.log10(max([*known, *goals]) * 1.1))
    names = width_max([row.label for row in rows]) + 16
    scale = BARS_WIDTH / (high - low)

    def at(seconds: float) -> float:
        return names + (math.log10(max(seconds, 10.0**low)) - low) * scale

    bottom = MARGIN + 24 + len(rows) * DOT_STEP
    parts = []
    for power in range(low, high + 1):
        x = names + (power - low) * scale
        parts.append(line(x, MARGIN + 20, x, bottom, class_="axis"))
        said = f"{10.0**power:g} s"
        parts.append(text(x, MARGIN + 9, said, class_="faint", text_anchor="middle", font_size=11))
    for index, row in enumerate(rows):
        y = MARGIN + 24 + (index + 0.5) * DOT_STEP
        parts.append(text(names - 12, y, row.label, class_="label", text_anchor="end"))
        if row.goal:
            top, base = y - DOT_STEP / 2, y + DOT_STEP / 2
            parts.append(line(at(row.goal), top, at(row.goal), base, class_="goal"))
        for seconds in row.seconds:
            is_late = row.goal is not None and seconds >= row.goal
            dot = element(
                "circle",
                element("title", f"{row.label}: {seconds:.3g} s"),
                cx=at(seconds),
                cy=y,
                r=4.5,
                class_="dot late" if is_late else "dot",
            )
            parts.append(dot)
    label = f"Dots, {unit}: {len(rows)} rows, also in the table below"
    return picture(names + BARS_WIDTH + 40, bottom + MARGIN, label, parts)


def width_max(names: Sequence[str]) -> float:
    """Say how much room the longest of some texts takes."""
    return max((width_of(name) for name in names), default=0.0)
