"""The consumer's drivers: `Consumer` blocks, `AsyncConsumer` is for an asyncio event loop.

    exchange        one request, without waiting: what both forms have in common
    blocking        `Consumer`, `Handoff`
    asynchronous    `AsyncConsumer`, `AsyncHandoff`

The last is imported when a name of it is asked for: a caller that blocks does not pay for asyncio.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from statemachine.exports import on_demand

from .blocking import Cancelled, Consumer, Handoff
from .exchange import AUDIT_EVENT, Audit, Fallback, Patience

if TYPE_CHECKING:
    from .asynchronous import AsyncConsumer, AsyncHandoff

__all__ = [
    "AUDIT_EVENT",
    "AsyncConsumer",
    "AsyncHandoff",
    "Audit",
    "Cancelled",
    "Consumer",
    "Fallback",
    "Handoff",
    "Patience",
]

# Not for mypy, which would take any name for one that is there.
if not TYPE_CHECKING:
    __getattr__, __dir__ = on_demand(__name__, {".asynchronous": "AsyncConsumer AsyncHandoff"})
