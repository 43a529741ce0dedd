"""The protocol as a book that runs; its model, its invariants and its vectors."""

from __future__ import annotations

from statemachine import __version__

__all__ = ["__version__"]
