"""`AsyncConsumer`: the asyncio consumer of `transport.request` with this node's defaults."""

from __future__ import annotations

import asyncio

from transport.request import AsyncHandoff, asynchronous

from .consumer import NodeConsumer


class AsyncConsumer(NodeConsumer[AsyncHandoff], asynchronous.AsyncConsumer):
    """
    A consumer for asyncio that needs no argument; as `transport.request.AsyncConsumer`.

        async with AsyncConsumer() as consumer, await consumer.obtain(request) as handoff:
            ...

    Args:
        As `Consumer`.
    """

    async def close(self) -> None:
        """Close every handoff that was not taken, and end what this consumer made itself."""
        await super().close()
        if self._own is not None:
            await asyncio.get_running_loop().run_in_executor(None, self._own.close)
