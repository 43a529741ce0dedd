"""Pictures as text: the few SVG elements that we draw with, and how wide letters are.

Colours are classes of a style sheet, never values: the sheet knows light, dark and print.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from html import escape
from typing import Final

TEXT_PX: Final = 12.0
"""Height of the letters, unless said otherwise."""
LETTER_SHARE: Final = 0.6
"""Widest average letter of the fonts that the style sheets ask for, as a share of their height."""
TRIANGLE: Final = "M0 0L8 4L0 8z"
"""What most lines end in, in a square of 8."""
LEVELS: Final = 7
"""Shades there are for counts: `v0` is none, `v1` to `v6` are ever more."""


def width_of(text: str, px: float = TEXT_PX) -> float:
    """Say how much room a text takes at most."""
    return len(text) * px * LETTER_SHARE


def element(name: str, inside: str = "", /, **attributes: object) -> str:
    """Write one element; `_` in a name stands for `-`, a last one is dropped."""
    said = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_value(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return f"<{name}{said}>{inside}</{name}>" if inside else f"<{name}{said}/>"


def text(x: float, y: float, said: str, **attributes: object) -> str:
    """Write words; `y` is their middle."""
    return element("text", escape(said), x=x, y=y, dy="0.34em", **attributes)


def centred(x: float, y: float, said: str, class_: str, px: float) -> str:
    """Write words around a point."""
    return text(x, y, said, class_=class_, font_size=px, text_anchor="middle")


def line(x1: float, y1: float, x2: float, y2: float, **attributes: object) -> str:
    """Draw a straight line."""
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, **attributes)


def rect(
    x: float, y: float, width: float, height: float, tip: str = "", **attributes: object
) -> str:
    """Draw a box, which says `tip` when it is pointed at."""
    inside = element("title", escape(tip)) if tip else ""
    return element("rect", inside, x=x, y=y, width=width, height=height, **attributes)


def group(parts: Iterable[str], tip: str = "", **attributes: object) -> str:
    """Take parts together."""
    inside = element("title", escape(tip)) if tip else ""
    return element("g", inside + "".join(parts), **attributes)


def picture(
    width: float, height: float, label: str | None, parts: Iterable[str], **attributes: object
) -> str:
    """Make a picture; `label` is for those who do not see it, unless a part tells them."""
    return element(
        "svg",
        "\n".join(parts),
        viewBox=f"0 0 {_value(width)} {_value(height)}",
        width=width,
        height=height,
        role="img",
        aria_label=label,
        **attributes,
    )


def arrow_heads() -> str:
    """Make what the lines of every picture of a page end in; once on the page, and not seen."""
    shapes = {
        "hit": TRIANGLE,
        "missed": TRIANGLE,
        "said": TRIANGLE,
        "lost": "M1 1L7 7M7 1L1 7",
    }
    heads = [
        arrow_head(shape, 4 if name == "lost" else 7, class_=f"head {name}", id=f"head-{name}")
        for name, shape in shapes.items()
    ]
    inside = element("defs", "".join(heads))
    return element("svg", inside, width=0, height=0, class_="heads", aria_hidden="true")


def arrow_head(shape: str, tip: float, *, class_: str, id: str) -> str:  # noqa: A002
    """Make what lines end in: a shape in a square of 8, of which `tip` is where the line ends."""
    return element(
        "marker",
        element("path", d=shape, class_=class_),
        id=id,
        viewBox="0 0 8 8",
        refX=tip,
        refY=4,
        markerWidth=9,
        markerHeight=9,
        markerUnits="userSpaceOnUse",
        orient="auto",
    )


def level_of(count: int, most: int) -> int:
    """Choose the shade for a count, by its logarithm."""
    if count <= 0:
        return 0
    share = math.log1p(count) / math.log1p(max(most, count, 1))
    return min(LEVELS - 1, 1 + int(share * (LEVELS - 2) + 0.5))


def short(count: float) -> str:
    """Write a number in at most four letters: 7, 950, 3.1k, 42k, 1.5M."""
    for unit in ("", "k", "M", "G"):
        if count < 999.5:
            is_round = unit == "" or count >= 9.95
            return f"{count:.0f}{unit}" if is_round else f"{count:.1f}{unit}"
        count /= 1000
    return f"{count:.0f}T"


def _value(value: object) -> str:
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else str(value)
