"""Every world there can be, within bounds: see `explorer`."""

from __future__ import annotations

from ...messages import NamespaceRequest, NamespaceType
from ...provider import Limits
from .explorer import MOVES, Counterexample, Explorer, Result, all_rows, only
from .world import (
    BY_ITSELF,
    CUT,
    FAILED_TO_PASS,
    MISMATCHED,
    NOT_FOUND,
    SOUND,
    SPENDS,
    Bounds,
    Move,
    Violation,
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
    "Counterexample",
    "Explorer",
    "Limits",
    "Move",
    "NamespaceRequest",
    "NamespaceType",
    "Result",
    "Violation",
    "World",
    "all_rows",
    "only",
]
