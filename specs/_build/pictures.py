"""The tables as pictures: what the Mermaid diagrams say, drawn with nothing but this project.

`specs/pictures/` holds one SVG a table, made by `python -m specs._build.refresh`; the site shows the
same. It stands alone, has words for those who do not see it, and follows light and dark.
"""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Final

from specs._build.graph import drawing
from specs._build.svg import TRIANGLE, arrow_head, element, picture
from statemachine.drawing import mermaid
from statemachine.lifecycle import TABLES
from statemachine.table import Table

FOLDER: Final = Path(__file__).resolve().parents[1] / "pictures"
"""Where they are kept."""

# The names `--color-...` are those of the site's theme; a picture that stands alone has none of
# them, and takes the values behind the commas.
STYLE: Final = """
.states {
  --ink: var(--color-foreground-primary, #1d2529);
  --faint: var(--color-foreground-muted, #64727a);
  --ground: var(--color-background-primary, #ffffff);
  --raised: var(--color-background-secondary, #f4f6f6);
  --line: var(--color-foreground-muted, #64727a);
  --accent: var(--color-brand-primary, #14707b);
  background: var(--ground); font-family: system-ui, "Segoe UI", "DejaVu Sans", sans-serif;
}
@media (prefers-color-scheme: dark) {
  .states {
    --ink: var(--color-foreground-primary, #e4ebed);
    --faint: var(--color-foreground-muted, #94a5ac);
    --ground: var(--color-background-primary, #11171a);
    --raised: var(--color-background-secondary, #1c2529);
    --line: var(--color-foreground-muted, #94a5ac);
    --accent: var(--color-brand-primary, #6fd0d9);
  }
}
.states text { fill: var(--ink); }
.states .name { font-weight: 600; }
.states .faint { fill: var(--faint); }
.states .ground { fill: var(--ground); }
.states .state { fill: var(--raised); stroke: var(--ink); stroke-width: 1.4; }
.states .state.initial { stroke-width: 2.6; }
.states .state.final { stroke: var(--accent); stroke-width: 3; }
.states .edge { fill: none; stroke: var(--line); stroke-width: 1.4; }
.states .head { fill: var(--line); }
.states g:hover > .edge { stroke: var(--ink); stroke-width: 2; }
"""


def draw(table: Table) -> str:
    """Draw a table."""
    name = f"picture-{table.name}"
    width, height, parts = drawing(table, heads=name)
    words = [
        element("title", f"The states of the table {table.name}", id=f"{name}-title"),
        element("desc", escape(_told(table)), id=f"{name}-words"),
        element("style", STYLE),
        element("defs", arrow_head(TRIANGLE, 7, class_="head", id=f"{name}-hit")),
    ]
    return picture(
        width,
        height,
        None,
        [*words, *parts],
        xmlns="http://www.w3.org/2000/svg",
        class_="states",
        aria_labelledby=f"{name}-title",
        aria_describedby=f"{name}-words",
    )


def _told(table: Table) -> str:
    """Say in words where one gets from each state, and by what."""
    moves: dict[tuple[str, str], list[str]] = {}
    for row in table.rows:
        if row.source is not row.target:
            ends = str(row.source.value), str(row.target.value)
            moves.setdefault(ends, []).append(row.event.__name__)
    finals = ", ".join(str(state.value) for state in table.states if state in table.finals)
    told = [
        f"{source} to {target}: {', '.join(events)}." for (source, target), events in moves.items()
    ]
    return " ".join([f"It begins as {table.initial.value}.", *told, f"It ends as {finals}."])


def of_diagram(diagram: str) -> str:
    """Find the picture of what a Mermaid diagram draws; raises `ValueError` if that is no table."""
    for table in TABLES:
        if mermaid(table) == diagram:
            return draw(table)
    raise ValueError(f"no table looks like this:\n{diagram}")


def path_of(table: Table) -> Path:
    """Say where a table's picture is kept."""
    return FOLDER / f"{table.name}.svg"


def write() -> list[Path]:
    """Draw every table anew; returns what has changed."""
    FOLDER.mkdir(exist_ok=True)
    changed = []
    for table in TABLES:
        path, text = path_of(table), f"{draw(table)}\n"
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            changed.append(path)
    return changed
