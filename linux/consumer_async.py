"""`AsyncConsumer`: the asyncio consumer of `transport.request` with this node's defaults."""

from __future__ import annotations

import asyncio
import os
from types import EllipsisType

from statemachine.messages import HANDOFF_SOCKET_PATH
from transport.contract import SelfService
from transport.descriptors import Inspector
from transport.request import Audit, Patience, asynchronous

from .consumer import node_defaults


class AsyncConsumer(asynchronous.AsyncConsumer):
    """
    A consumer for asyncio that needs no argument; as `transport.request.AsyncConsumer`.

        async with AsyncConsumer() as consumer, await consumer.obtain(request) as handoff:
            ...

    Args:
        As `Consumer`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = HANDOFF_SOCKET_PATH,
        inspector: Inspector | None = None,
        *,
        service: SelfService | EllipsisType | None = ...,
        patience: Patience | None = None,
        audit: Audit | None = None,
    ) -> None:
        inspector, chosen, self._own = node_defaults(inspector, service)
        super().__init__(path, inspector, service=chosen, patience=patience, audit=audit)

    async def close(self) -> None:
        """Close every handoff that was not taken, and end what this consumer made itself."""
        await super().close()
        if self._own is not None:
            await asyncio.get_running_loop().run_in_executor(None, self._own.close)
