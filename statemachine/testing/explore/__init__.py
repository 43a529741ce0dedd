"""Every world there can be, within bounds: see `explorer`."""

from __future__ import annotations

from .explorer import (
    BY_ITSELF,
    CUT,
    FAILED_TO_PASS,
    MISMATCHED,
    MOVES,
    NOT_FOUND,
    SOUND,
    SPENDS,
    Bounds,
    Broken,
    Explorer,
    Finding,
    Limits,
    Move,
    NamespaceRequest,
    NamespaceType,
    Result,
    World,
    all_rows,
    only,
)

__all__ = [
    "BY_ITSELF",
    "CUT",
    "FAILED_TO_PASS",
    "MISMATCHED",
    "MOVES",
    "NOT_FOUND",
    "SOUND",
    "SPENDS",
    "Bounds",
    "Broken",
    "Explorer",
    "Finding",
    "Limits",
    "Move",
    "NamespaceRequest",
    "NamespaceType",
    "Result",
    "World",
    "all_rows",
    "only",
]
