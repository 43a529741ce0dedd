"""Every world there can be, within bounds: see `explorer`."""

from __future__ import annotations

from ...messages import NamespaceRequest, NamespaceType
from ...provider import Limits
from .explorer import MOVES, Broken, Explorer, Result, all_rows, only
from .world import (
    BY_ITSELF,
    CUT,
    FAILED_TO_PASS,
    MISMATCHED,
    NOT_FOUND,
    SOUND,
    SPENDS,
    Bounds,
    Finding,
    Move,
    World,
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
