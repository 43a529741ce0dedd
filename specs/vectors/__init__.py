"""The golden vectors as data: what bytes mean, whose descriptors are whose, what happens next.

    for case in vectors.cases("frames"):
        assert yours.encode(case["message"]) == bytes.fromhex(case["frame"])

The fields of a family's cases stand in its manifest; `README.md` beside this file says the rest.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

FOLDER: Final = Path(__file__).parent
"""Where the files are: a folder for each family, and a checker in C."""

FAMILIES: Final = tuple(sorted(path.parent.name for path in FOLDER.glob("*/manifest.json")))
"""The kinds of cases."""


def manifest(family: str) -> dict[str, Any]:
    """Read what a family is about, its files, and its fields."""
    found: dict[str, Any] = json.loads((FOLDER / family / "manifest.json").read_bytes())
    return found


def cases(family: str) -> Iterator[dict[str, Any]]:
    """Read the cases of a family, one after the other."""
    for file in manifest(family)["files"]:
        for line in (FOLDER / family / file["file"]).read_bytes().splitlines():
            yield json.loads(line)
