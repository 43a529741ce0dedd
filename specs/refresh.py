"""Writes the generated parts of the documents anew: `python specs/refresh.py`.

A generated part stands between `<!-- generated: <how> <table> -->` and `<!-- end -->`.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from statemachine import drawing, lifecycle

ROOT = Path(__file__).resolve().parent.parent
"""The project's folder."""

DOCUMENTS = (ROOT / "README.md", *sorted((ROOT / "specs").glob("*.md")))
"""The documents that may have generated parts."""

_PART = re.compile(r"<!-- generated: (\w+) (\w+) -->\n.*?<!-- end -->", re.DOTALL)


def refreshed(text: str) -> str:
    """Return a document's text with every generated part made anew."""
    return _PART.sub(_part, text)


def _part(match: re.Match[str]) -> str:
    how, table = match.groups()
    drawn = getattr(drawing, how)(getattr(lifecycle, table))
    block = f"```mermaid\n{drawn}```" if how == "mermaid" else drawn.rstrip()
    return f"<!-- generated: {how} {table} -->\n\n{block}\n\n<!-- end -->"


def main() -> int:
    """Rewrite what is stale and name it."""
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        if refreshed(text) != text:
            document.write_text(refreshed(text), encoding="utf-8")
            print(f"refreshed {document.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
