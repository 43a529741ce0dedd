"""Where the kernels of this protocol take their tables from: row coverage, mutants."""

from __future__ import annotations

from typing import Final

from .. import consumer
from ..provider import state
from .kit import TableHomes

HOMES: Final = TableHomes(
    {
        "allocation": (state, "ALLOCATION"),
        "consumer": (consumer, "CONSUMER"),
        "notice": (consumer, "NOTICE"),
        "service": (state, "SERVICE"),
        "message": (state, "MESSAGE"),
    }
)
"""The module from which the kernels take each table, under its name in capitals."""
