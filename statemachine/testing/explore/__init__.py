"""Every world there can be, within bounds: see `explorer`."""

from __future__ import annotations

from ...messages import NamespaceRequest, NamespaceType
from ...provider import Limits
from .explorer import MOVES, Counterexample, Explorer, Result, only
from .world import (
    BY_ITSELF,
    CUT,
    FAILED_TO_PASS,
    MISMATCHED,
    NOT_FOUND,
    SOUND,
    SPENDS,
    Bounds,
    GlobalState,
    Move,
    Violation,
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
    "GlobalState",
    "Limits",
    "Move",
    "NamespaceRequest",
    "NamespaceType",
    "Result",
    "Violation",
    "only",
]
