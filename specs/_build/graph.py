"""A table as a picture: its states in layers, its moves between them; coloured by visits, if any.

The layout is that of every layered drawing (Sugiyama): states in layers by their distance from the
initial one, and a move that spans layers goes through a place of its own in each. Between any two
layers of states there is one of labels: a label is such a place, as large as it is, so that no two
of them can meet, nor a label and a state. Lines bend only between two layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from itertools import pairwise
from typing import Final, NamedTuple

from specs._build.svg import centred, element, group, level_of, picture, rect, short, width_of
from statemachine.table import Row, Table

STATE_HEIGHT: Final = 44.0
STATE_PAD: Final = 14.0
LABEL_PX: Final = 11.0
LABEL_LINE: Final = 14.0
LAYER_GAP: Final = 30.0
PLACE_GAP: Final = 14.0
MARGIN: Final = 10.0
SWEEPS: Final = 12
RELAXATIONS: Final = 200
STRAIGHTNESS: Final = 8.0

Cells = Mapping[tuple[str, str, str], int]
"""Visits by table, state and event."""


class Drawing(NamedTuple):
    """What a picture is made of."""

    width: float
    height: float
    parts: list[str]


@dataclass
class _LayerNode:
    """Something that takes room in a layer: a state, a label, or a move passing through."""

    layer: int
    is_state: bool = False
    width: float = 6.0
    height: float = 0.0
    x: float = 0.0
    y: float = 0.0
    top: float = 0.0
    """Of its layer, as is the bottom."""
    bottom: float = 0.0
    before: list[_LayerNode] = field(default_factory=list)
    after: list[_LayerNode] = field(default_factory=list)


@dataclass
class _StateArrow:
    """All rows from one state to another."""

    source: Enum
    target: Enum
    rows: list[Row]
    path: list[_LayerNode] = field(default_factory=list)
    label: _LayerNode | None = None
    is_back: bool = False


def state_graph(table: Table, cells: Cells) -> str:
    """Draw a table for a page that has arrow heads; a move that was not taken is dashed."""
    label = f"State graph of the table {table.name}: the rows are listed in the table below it"
    width, height, parts = drawing(table, cells)
    return picture(width, height, label, parts)


def drawing(table: Table, cells: Cells | None = None, heads: str = "head") -> Drawing:
    """
    Draw a table.

    Args:
        table: whose states and moves.
        cells: how often each row was used; without them, nothing is said of it.
        heads: how the ids of the arrow heads begin, `-hit` and `-missed`.
    """
    moves = _moves_of(table)
    depths = _depths_of(table, moves)
    states = {
        state: _LayerNode(depths[state] * 2, True, _state_width(table, state, cells), STATE_HEIGHT)
        for state in table.states
    }
    for move in moves:
        _lay(move, states)
    layers = _layers(states, moves)
    _order(layers)
    width, height = _place(layers)
    parts = [_draw_line(table, move, cells, heads) for move in moves]
    parts += [_draw_label(table, move, cells) for move in moves]
    parts += [_draw_state(table, state, place, cells) for state, place in states.items()]
    return Drawing(width, height, parts)


def _visits(table: Table, row: Row, cells: Cells | None) -> int:
    """Say how often a row was used; a row without a count is used."""
    if cells is None:
        return 1
    return cells.get((table.name, _id(row.source), row.event.__name__), 0)


def _id(state: Enum) -> str:
    return str(state.value)


def _moves_of(table: Table) -> list[_StateArrow]:
    moves: dict[tuple[Enum, Enum], _StateArrow] = {}
    for row in table.rows:
        if row.source is not row.target:
            key = (row.source, row.target)
            moves.setdefault(key, _StateArrow(*key, [])).rows.append(row)
    return list(moves.values())


def _depths_of(table: Table, moves: list[_StateArrow]) -> dict[Enum, int]:
    """Give each state the longest way to it that goes in no cycle, and find what leads back."""
    order: list[Enum] = []
    on_way: list[Enum] = []

    def visit(state: Enum) -> None:
        on_way.append(state)
        for move in moves:
            if move.source is state:
                move.is_back = move.target in on_way
                if not move.is_back and move.target not in order:
                    visit(move.target)
        on_way.pop()
        order.append(state)

    visit(table.initial)
    depths = dict.fromkeys(table.states, 0)
    for state in reversed(order):
        for move in moves:
            if move.source is state and not move.is_back:
                depths[move.target] = max(depths[move.target], depths[state] + 1)
    return depths


def _lay(move: _StateArrow, states: Mapping[Enum, _LayerNode]) -> None:
    """Give a move a place in each layer between its ends; its label is in the middle one."""
    first, last = states[move.source], states[move.target]
    if move.is_back:
        first, last = last, first
    between = [_LayerNode(layer) for layer in range(first.layer + 1, last.layer)]
    odd = [place for place in between if place.layer % 2]
    move.label = odd[(len(odd) - 1) // 2]
    names = [row.event.__name__ for row in move.rows]
    move.label.width = max(width_of(name, LABEL_PX) for name in names) + 8
    move.label.height = LABEL_LINE * len(names) + 4
    move.path = [first, *between, last]
    for above, below in pairwise(move.path):
        above.after.append(below)
        below.before.append(above)
    if move.is_back:
        move.path.reverse()


def _layers(states: Mapping[Enum, _LayerNode], moves: list[_StateArrow]) -> list[list[_LayerNode]]:
    layers: list[list[_LayerNode]] = []
    places = [*states.values(), *(p for m in moves for p in m.path[1:-1])]
    for place in places:
        while len(layers) <= place.layer:
            layers.append([])
        layers[place.layer].append(place)
    return layers


# --- Where everything is -----------------------------------------------------------------------


def _order(layers: list[list[_LayerNode]]) -> None:
    """Sort each layer by the middle of its neighbours; keep the order with fewest crossings."""
    best, fewest = [list(layer) for layer in layers], _crossings(layers)
    for sweep in range(SWEEPS):
        is_forward = sweep % 2 == 0
        for layer in layers if is_forward else reversed(layers):
            positions = {id(p): i for other in layers for i, p in enumerate(other)}
            rank = {id(p): _middle(p, positions, is_forward) for p in layer}
            layer.sort(key=lambda place, rank=rank: rank[id(place)])
        crossings = _crossings(layers)
        if crossings < fewest:
            best, fewest = [list(layer) for layer in layers], crossings
    layers[:] = best


def _middle(place: _LayerNode, positions: Mapping[int, int], is_forward: bool) -> float:
    neighbours = (place.before if is_forward else place.after) or [place]
    return sum(positions[id(n)] for n in neighbours) / len(neighbours)


def _crossings(layers: list[list[_LayerNode]]) -> int:
    count = 0
    for left, right in pairwise(layers):
        positions = {id(p): i for i, p in enumerate(right)}
        ends = [(i, positions[id(q)]) for i, p in enumerate(left) for q in p.after]
        count += sum(a < c and b > d for a, b in ends for c, d in ends)
    return count


def _place(layers: list[list[_LayerNode]]) -> tuple[float, float]:
    """Give everything its coordinates: near its neighbours, and never over another."""
    y = MARGIN
    for layer in layers:
        thickness = max(place.height for place in layer)
        for place in layer:
            place.y, place.top, place.bottom = y + thickness / 2, y, y + thickness
        y += thickness + LAYER_GAP
        _spread(layer, [0.0] * len(layer))
    for sweep in range(RELAXATIONS):
        for layer in layers if sweep % 2 == 0 else reversed(layers):
            _spread(layer, [_preferred(place) for place in layer])
    left = min(p.x - p.width / 2 for layer in layers for p in layer) - MARGIN
    for layer in layers:
        for place in layer:
            place.x -= left
    right = max(p.x + p.width / 2 for layer in layers for p in layer) + MARGIN
    return right, y - LAYER_GAP + MARGIN


def _preferred(place: _LayerNode) -> float:
    """Find the middle of a place's neighbours; long lines would rather be straight."""
    near = [*place.before, *place.after]
    weights = [1.0 if place.is_state or n.is_state else STRAIGHTNESS for n in near]
    total = sum(weights)
    return sum(n.x * w for n, w in zip(near, weights, strict=True)) / total if near else place.x


def _spread(layer: list[_LayerNode], preferred: list[float]) -> None:
    """Put a layer's places where they are to be, in their order and apart."""
    rightward, leftward = list(preferred), list(preferred)
    for i in range(1, len(layer)):
        rightward[i] = max(preferred[i], rightward[i - 1] + _apart(layer[i - 1], layer[i]))
    for i in reversed(range(len(layer) - 1)):
        leftward[i] = min(preferred[i], leftward[i + 1] - _apart(layer[i], layer[i + 1]))
    for place, low, high in zip(layer, leftward, rightward, strict=True):
        place.x = (low + high) / 2


def _apart(left: _LayerNode, right: _LayerNode) -> float:
    return (left.width + right.width) / 2 + PLACE_GAP


# --- What it looks like ------------------------------------------------------------------------


def _counted(said: str, count: int, cells: Cells | None) -> str:
    return said if cells is None else f"{said}: {count:,}"


def _draw_line(table: Table, move: _StateArrow, cells: Cells | None, heads: str) -> str:
    visits = sum(_visits(table, row, cells) for row in move.rows)
    most = max(_visits(table, row, cells) for row in table.rows)
    level = 0 if cells is None else level_of(visits, most)
    name = "hit" if visits else "missed"
    path = element(
        "path",
        d=_curve(move),
        class_=f"edge {name} e{level}",
        stroke_width=1.0 + level * 0.5,
        marker_end=f"url(#{heads}-{name})",
    )
    return group([path], _tip(table, move, cells))


def _draw_label(table: Table, move: _StateArrow, cells: Cells | None) -> str:
    place = move.label
    assert place is not None
    corner = (place.x - place.width / 2, place.y - place.height / 2)
    box = rect(*corner, place.width, place.height, rx=4, class_="ground")
    top = place.y - LABEL_LINE * (len(move.rows) - 1) / 2
    words = [
        centred(place.x, top + i * LABEL_LINE, row.event.__name__, name, LABEL_PX)
        for i, row in enumerate(move.rows)
        for name in ["label" if _visits(table, row, cells) else "label missed"]
    ]
    return group([box, *words], _tip(table, move, cells))


def _tip(table: Table, move: _StateArrow, cells: Cells | None) -> str:
    lines = [f"{_id(move.source)} to {_id(move.target)}"]
    lines += [_counted(row.event.__name__, _visits(table, row, cells), cells) for row in move.rows]
    return "\n".join(lines)


def _curve(move: _StateArrow) -> str:
    """Go through a move's places, straight within a layer, from one state's edge to the other's."""
    path = move.path
    way = 1 if path[-1].y > path[0].y else -1
    said = f"M{_port(path[0], path[1]):.1f} {path[0].y + way * path[0].height / 2:.1f}"
    x, y = _port(path[0], path[1]), path[0].y + way * path[0].height / 2
    for place in path[1:]:
        is_last = place is path[-1]
        end_x = _port(place, path[-2]) if is_last else place.x
        near, far = (place.top, place.bottom) if way > 0 else (place.bottom, place.top)
        end_y = place.y - way * (place.height / 2 + 1) if is_last else near
        middle = (y + end_y) / 2
        said += f"C{x:.1f} {middle:.1f} {end_x:.1f} {middle:.1f} {end_x:.1f} {end_y:.1f}"
        if not is_last:
            said += f"V{far:.1f}"
        x, y = end_x, far
    return said


def _port(state: _LayerNode, next_one: _LayerNode) -> float:
    """Choose where on a state's edge a move leaves or arrives: in the order of where they go."""
    side = state.after if next_one.layer > state.layer else state.before
    ordered = sorted(side, key=lambda place: place.x)
    index = next(i for i, place in enumerate(ordered) if place is next_one)
    step = min(18.0, (state.width - 24) / max(len(ordered), 1))
    return state.x + (index - (len(ordered) - 1) / 2) * step


def _stays(table: Table, state: Enum, cells: Cells | None) -> dict[str, int]:
    return {
        row.event.__name__: _visits(table, row, cells)
        for row in table.rows
        if row.source is state and row.target is state
    }


def _second_line(stays: Mapping[str, int], cells: Cells | None) -> str:
    if not stays:
        return ""
    events = "event" if len(stays) == 1 else "events"
    said = f"stays on {len(stays)} {events}"
    return said if cells is None else f"{said}: {short(sum(stays.values()))}"


def _state_width(table: Table, state: Enum, cells: Cells | None) -> float:
    second = _second_line(_stays(table, state, cells), cells)
    return max(width_of(_id(state), 14), width_of(second, 10), 60) + 2 * STATE_PAD


def _draw_state(table: Table, state: Enum, place: _LayerNode, cells: Cells | None) -> str:
    stays = _stays(table, state, cells)
    second = _second_line(stays, cells)
    arrivals = sum(
        _visits(table, row, cells)
        for row in table.rows
        if row.target is state and row.source is not state
    )
    kind = "initial" if state is table.initial else "final" if state in table.finals else ""
    is_missed = state is not table.initial and not arrivals
    names = ["state", kind, "missed" if is_missed else ""]
    x, y = place.x - place.width / 2, place.y - place.height / 2
    parts = [
        rect(x, y, place.width, place.height, rx=9, class_=" ".join(filter(None, names))),
        centred(place.x, place.y - (8 if second else 0), _id(state), "name", 14),
    ]
    if second:
        name = "faint" if all(stays.values()) else "label missed"
        parts.append(centred(place.x, place.y + 10, second, name, 10))
    lines = [_id(state) if cells is None else f"{_id(state)}: reached {arrivals:,} times"]
    lines += [_counted(f"stays on {event}", count, cells) for event, count in stays.items()]
    return group(parts, "\n".join(lines))
