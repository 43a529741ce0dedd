"""Who catches what, from the rows of `catches_campaign`: by bug, and by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

CAUGHT: Final = "caught"
MISSED: Final = "-"
NOTHING: Final = "nothing: another layer catches each of them"


def by_bug(rows: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """Make a line of each bug, with a column for each layer; blank where it was not shown."""
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    lines: dict[str, dict[str, str]] = {}
    for row in rows:
        line = lines.setdefault(row["bug"], {"bug": row["bug"], **dict.fromkeys(layers, "")})
        line[row["layer"]] = CAUGHT if row["caught"] == "yes" else MISSED
    return list(lines.values())


def by_layer(rows: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """Make a line of each layer: how many it catches, and which no other that was shown them."""
    catchers: dict[str, set[str]] = {}
    for row in rows:
        if row["caught"] == "yes":
            catchers.setdefault(row["bug"], set()).add(row["layer"])
    lines = []
    for layer in dict.fromkeys(row["layer"] for row in rows):
        shown = sum(row["layer"] == layer for row in rows)
        caught = [bug for bug, layers in catchers.items() if layer in layers]
        alone = [bug for bug in caught if catchers[bug] == {layer}]
        lines.append(
            {
                "layer": layer,
                "catches": f"{len(caught)} of {shown}",
                "rate": f"{len(caught) / shown:.0%}",
                "alone": f"{len(alone)}",
                "what only it catches": "; ".join(alone) or (NOTHING if caught else "nothing"),
            }
        )
    return lines


def idle(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """Name the layers that catch nothing which another does not."""
    return [line["layer"] for line in by_layer(rows) if line["alone"] == "0"]


def uncaught(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """Name the bugs that no layer catches."""
    return [line["bug"] for line in by_bug(rows) if CAUGHT not in line.values()]


def markdown(lines: Sequence[Mapping[str, str]]) -> str:
    """Write lines as a table."""
    names = list(lines[0]) if lines else []
    cells = [names, ["---"] * len(names), *([line[name] for name in names] for line in lines)]
    return "".join(f"| {' | '.join(row)} |\n" for row in cells)
