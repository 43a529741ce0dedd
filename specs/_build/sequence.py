"""Draws a sequence diagram, in as much of Mermaid's language as this project writes.

participant P as provider      C0->>P: said        P--xC0: gone        Note over P: why
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from specs._build.svg import element, group, line, picture, rect, text, width_of

LANE_WIDTH_MIN: Final = 130.0
STEP: Final = 30.0
HEAD: Final = 30.0
MARGIN: Final = 12.0
PX: Final = 12.0
NOTE_COLUMNS: Final = 44
"""Longest line of a note; what is longer is broken."""

_PARTICIPANT: Final = re.compile(r"participant (\w+)(?: as (.*))?")
_ARROW: Final = re.compile(r"(\w+?)\s*(--?(?:>>|x|\)|>))\s*(\w+)\s*:\s*(.*)")
_NOTE: Final = re.compile(r"Note over (\w+)(?:,\s*(\w+))?\s*:\s*(.*)")
_ENTITY: Final = re.compile(r"#(\d+);")


class NotDrawable(ValueError):
    """A line is not of the language that is drawn here."""


@dataclass(frozen=True)
class Arrow:
    """A message from one participant to another."""

    source: str
    target: str
    said: str
    is_dashed: bool
    is_lost: bool


@dataclass(frozen=True)
class Note:
    """Words over one or two participants."""

    over: tuple[str, ...]
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Sequence:
    """A sequence diagram that was read."""

    lanes: dict[str, str]
    """The participants' names, by what the lines call them."""
    steps: tuple[Arrow | Note, ...]


def read(diagram: str) -> Sequence:
    """Read a diagram; raises `NotDrawable` at a line that is no participant, arrow or note."""
    lanes: dict[str, str] = {}
    steps: list[Arrow | Note] = []
    for number, raw in enumerate(diagram.splitlines(), 1):
        said = raw.strip()
        if said in ("", "sequenceDiagram") or said.startswith(("```", "%%")):
            continue
        if found := _PARTICIPANT.fullmatch(said):
            lanes[found[1]] = _plain(found[2] or found[1])
        elif found := _NOTE.fullmatch(said):
            over = tuple(filter(None, (found[1], found[2])))
            steps.append(Note(over, _broken(_plain(found[3]))))
        elif found := _ARROW.fullmatch(said):
            is_lost = found[2].endswith("x")
            dashed = found[2].startswith("--")
            steps.append(Arrow(found[1], found[3], _plain(found[4]), dashed, is_lost))
        else:
            raise NotDrawable(f"line {number}: {said}")
    for step in steps:
        for name in step.over if isinstance(step, Note) else (step.source, step.target):
            lanes.setdefault(name, name)
    return Sequence(lanes, tuple(steps))


def sequence(diagram: str) -> str:
    """Draw a diagram; raises as `read` does."""
    whole = read(diagram)
    at = _lanes_at(whole)
    heights = [STEP if isinstance(s, Arrow) else 14 + 15 * len(s.lines) for s in whole.steps]
    bottom = MARGIN + HEAD + sum(heights) + 14
    width = max(
        [x + _head_width(whole.lanes[name]) / 2 for name, x in at.items()]
        + [_reach(step, at) for step in whole.steps]
    )
    parts = []
    for name, x in at.items():
        parts.append(line(x, MARGIN + HEAD, x, bottom, class_="lane"))
        parts += _head(x, MARGIN, whole.lanes[name])
    y = MARGIN + HEAD
    for step, height in zip(whole.steps, heights, strict=True):
        parts.append(_draw(step, at, y, height))
        y += height
    said = f"Sequence diagram of {len(whole.steps)} steps; its text is below it"
    return picture(width + MARGIN, bottom + MARGIN, said, parts)


def _lanes_at(whole: Sequence) -> dict[str, float]:
    """Put the lanes so far apart that what is said between two neighbours fits."""
    names = list(whole.lanes)
    at: dict[str, float] = {}
    for index, name in enumerate(names):
        if index == 0:
            notes = [s for s in whole.steps if isinstance(s, Note) and s.over == (name,)]
            half = max([_note_width(n) / 2 for n in notes] + [_head_width(whole.lanes[name]) / 2])
            at[name] = MARGIN + half
            continue
        near = (_head_width(whole.lanes[name]) + _head_width(whole.lanes[names[index - 1]])) / 2
        x = at[names[index - 1]] + max(LANE_WIDTH_MIN, near + MARGIN)
        for step in whole.steps:
            if isinstance(step, Arrow) and name in (step.source, step.target):
                other = step.target if step.source == name else step.source
                if other in at:
                    x = max(x, at[other] + width_of(step.said, PX) + 24)
        at[name] = x
    notes = [step for step in whole.steps if isinstance(step, Note) and len(step.over) == 1]
    left = min((at[note.over[0]] - _note_width(note) / 2 for note in notes), default=0)
    return {name: x + max(0.0, MARGIN - left) for name, x in at.items()}


def _reach(step: Arrow | Note, at: dict[str, float]) -> float:
    if isinstance(step, Note):
        return max(at[name] for name in step.over) + _note_width(step) / 2
    if step.source == step.target:
        return at[step.source] + 40 + width_of(step.said, PX)
    return 0.0


def _head_width(name: str) -> float:
    return width_of(name, PX) + 26


def _note_width(note: Note) -> float:
    return max(width_of(said, PX) for said in note.lines) + 18


def _head(x: float, y: float, name: str) -> list[str]:
    width = _head_width(name)
    return [
        rect(x - width / 2, y, width, HEAD - 4, rx=6, class_="state"),
        text(x, y + HEAD / 2 - 2, name, class_="name", font_size=PX, text_anchor="middle"),
    ]


def _draw(step: Arrow | Note, at: dict[str, float], y: float, height: float) -> str:
    if isinstance(step, Note):
        return _draw_note(step, at, y, height)
    x1, x2 = at[step.source], at[step.target]
    name = "lost" if step.is_lost else "said"
    level = y + height - 7
    look = {
        "class_": f"arrow {name}",
        "stroke_dasharray": "5 4" if step.is_dashed else None,
        "marker_end": f"url(#head-{name})",
    }
    if step.source == step.target:
        shape = f"M{x1:.1f} {level - 12:.1f}h26v12h-24"
        words = text(x1 + 34, level - 6, step.said, class_="label", font_size=PX)
        return group([element("path", d=shape, **look), words])
    end = x2 - 8 * (1 if x2 > x1 else -1) if step.is_lost else x2
    words = text(
        (x1 + x2) / 2, level - 10, step.said, class_="label", font_size=PX, text_anchor="middle"
    )
    return group([line(x1, level, end, level, **look), words])


def _draw_note(note: Note, at: dict[str, float], y: float, height: float) -> str:
    ends = [at[name] for name in note.over]
    width = max(_note_width(note), max(ends) - min(ends) + 40)
    middle = sum(ends) / len(ends)
    is_finding = note.lines[0].startswith("BROKEN")
    box = rect(
        middle - width / 2,
        y + 5,
        width,
        height - 8,
        rx=3,
        class_="note broken" if is_finding else "note",
    )
    words = [
        text(middle, y + 14 + 15 * i, said, class_="label", font_size=PX, text_anchor="middle")
        for i, said in enumerate(note.lines)
    ]
    return group([box, *words])


def _plain(said: str) -> str:
    """Undo what Mermaid needs: entities for some letters, and breaks."""
    return _ENTITY.sub(lambda found: chr(int(found[1])), re.sub(r"<br ?/?>", " ", said))


def _broken(said: str) -> tuple[str, ...]:
    lines = [""]
    for word in said.split():
        if lines[-1] and len(lines[-1]) + len(word) >= NOTE_COLUMNS:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return tuple(lines)
