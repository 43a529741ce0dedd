"""A consumer for an asyncio event loop: `AsyncConsumer` has the verbs and outcomes of `Consumer`.

The event loop is never blocked: sockets are watched by it, timers are its own, and self-service
runs in the loop's default executor.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final

from statemachine import effects as do
from statemachine.effects import Effect
from statemachine.errors import NamespaceError
from statemachine.messages import NamespaceRequest, NamespaceResponse

from ..channel import Channel
from .exchange import (
    ANSWER_TIMEOUT_S,
    SETTLE_TIMEOUT_S,
    BaseConsumer,
    BaseHandoff,
    Exchange,
)


class AsyncHandoff(BaseHandoff):
    """
    Namespaces in hand, in an event loop. Leaving its context closes descriptors and connection.

    While it is open, an end is noticed, and one that is owed to the provider is told to it, in the
    background. The verbs are those of `Handoff`; where those need a limit of time, these may go
    without one.
    """

    __slots__ = ("_driver",)

    def __init__(self, exchange: Exchange, driver: _LoopDriver) -> None:
        super().__init__(exchange)
        self._driver = driver

    async def wait_ended(self, timeout_s: float | None = None) -> bool:
        """Wait for the allocation to be over; as `Handoff.wait_ended`."""
        return await self._driver.until(lambda: self._exchange.is_over, timeout_s)

    async def end(self, timeout_s: float | None = None) -> bool:
        """End the allocation, and wait until the provider has confirmed; as `Handoff.end`."""
        driver = self._driver
        self._exchange.want_end()
        driver.follow()
        return await driver.until(lambda: self._exchange.is_done and driver.is_idle, timeout_s)

    async def settle(self, timeout_s: float | None = SETTLE_TIMEOUT_S) -> bool:
        """Wait until the provider is told of an end that is owed to it; as `Handoff.settle`."""
        return await self._driver.until(lambda: not self._exchange.owes_end, timeout_s)

    async def close(self) -> None:
        """Close the descriptors and the connection; as `Handoff.close`."""
        await self._driver.close()

    async def __aenter__(self) -> AsyncHandoff:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        try:
            await self.settle()
        finally:
            await self.close()


class AsyncConsumer(BaseConsumer[AsyncHandoff]):
    """
    A consumer for an event loop; the same kernel, verbs and outcomes as `Consumer`.

    `linux.AsyncConsumer` is this with the node's own inspector and self-service as defaults.

    Args:
        path: the provider's socket; None: the node has no provider, and none is asked.
        inspector: says what a descriptor really is.
        service: makes namespaces when the provider cannot be reached; None never does. It is
            called in a thread.
        patience: how long to wait.
        audit: told of every turn to self-service.
        joins: what it asks for is there already and others use it: giving up does not end it.
        keeps: how many connections are kept for later requests, as with `Consumer`.
    """

    async def obtain(self, request: NamespaceRequest) -> AsyncHandoff:
        """
        Obtain namespaces, from the provider or by self-service.

        When it is cancelled, the provider is told to end what it may have made, once, and nothing
        is left open here.

        Returns:
            The handoff; the caller owns it and its descriptors.

        Raises:
            As `Consumer.obtain`.
        """
        exchange = self._begin(request)
        driver = _LoopDriver(exchange)
        try:
            await driver.until(lambda: exchange.is_settled)
            if exchange.refusal is not None:
                raise exchange.refusal
        except (asyncio.CancelledError, NamespaceError):
            await driver.withdraw()
            raise
        except BaseException:
            await driver.withdraw_from_any_state()
            raise
        return AsyncHandoff(exchange, driver)

    async def request_namespaces(self, request: NamespaceRequest) -> NamespaceResponse:
        """Obtain namespaces and keep them for `handoff_of`; as `Consumer.request_namespaces`."""
        handoff = await self.obtain(request)
        replaced = self._keep(handoff)
        if replaced is not None:
            await replaced.close()
        self._expect_open()
        return handoff.response

    async def end(self, allocation_id: str, timeout_s: float = ANSWER_TIMEOUT_S) -> None:
        """
        End an allocation that this consumer need not hold; as `Consumer.end`.

        Raises:
            As `Consumer.end`.
        """
        exchange = self._begin_end(allocation_id)
        driver = _LoopDriver(exchange)
        try:
            await driver.until(lambda: exchange.is_over, timeout_s)
            exchange.raise_unless_over()
        finally:
            await driver.close()

    async def close(self) -> None:
        """Close every handoff that was not taken; may be called again. No verb works afterwards."""
        self._is_closed = True
        while self._handoffs:
            await self._handoffs.popitem()[1].close()
        self._close_kept()

    async def __aenter__(self) -> AsyncConsumer:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    @property
    def _clock(self) -> Callable[[], float]:
        return asyncio.get_running_loop().time


class _LoopDriver:
    """Drives one exchange in an event loop: a reader, a writer, one timer, one task at a time."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._loop = asyncio.get_running_loop()
        self._registered: Channel | None = None
        self._registered_fd = -1
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None
        self._is_closing = False
        # What was raised where nothing awaits it: in a callback of the loop or in the task.
        self._failure: Exception | None = None
        self._moved = asyncio.Event()
        self.follow()

    @property
    def is_idle(self) -> bool:
        """Whether no work that takes time is under way."""
        return self._task is None

    async def until(self, is_done: Callable[[], bool], timeout_s: float | None = None) -> bool:
        """
        Wait for something to come true, or the time to be over; say whether it is true.

        Raises:
            Exception: what a callback of the caller's has raised since the last time.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self._failure is None and not is_done():
                    self._moved.clear()
                    await self._moved.wait()
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure
        return is_done()

    async def withdraw(self) -> None:
        """Give up the request: tell the provider, as far as goes at once, and close."""
        await _undisturbed(self._withdraw())

    async def withdraw_from_any_state(self) -> None:
        """Do so after an exception that may have come between two instructions."""
        await _undisturbed(self._withdraw_from_any_state())

    async def close(self) -> None:
        """Close everything; an end that is owed is told, as far as goes at once."""
        await _undisturbed(self._close())

    async def _withdraw(self) -> None:
        await self._finish_task()
        self._exchange.withdraw()
        await self._close()

    async def _withdraw_from_any_state(self) -> None:
        await self._finish_task()
        # What was raised first says more.
        with suppress(Exception):
            self._exchange.withdraw_from_any_state()
        with suppress(Exception):
            await self._close()

    async def _close(self) -> None:
        try:
            await self._finish_task()
            self._exchange.hurry()
            slow = self._exchange.slow
            while slow:
                effect = slow.popleft()
                # Self-service that has not begun is not wanted any more.
                if not isinstance(effect, do.ServeSelf):
                    await self._perform(effect)
        finally:
            self._unregister()
            self._stop_timer()
            self._exchange.close()
            self._is_closing = False
            if self._failure is not None:
                context = {"message": "a consumer's callback failed", "exception": self._failure}
                self._loop.call_exception_handler(context)

    async def _finish_task(self) -> None:
        """Let work that is under way finish, and begin no more: what it makes must not be lost."""
        # From here on `follow` begins nothing.
        self._is_closing = True
        if self._task is not None:
            await asyncio.wait({self._task})

    # Keeping the loop's view in step with the exchange.

    def follow(self) -> None:
        """Watch and time what the exchange waits for now; called after everything it was fed."""
        exchange = self._exchange
        if exchange.channel is not self._registered:
            self._unregister()
            self._register()
        if self._registered is not None:
            if self._registered.wants_write:
                self._loop.add_writer(self._registered_fd, self._on_writable)
            else:
                self._loop.remove_writer(self._registered_fd)
        self._stop_timer()
        if exchange.deadlines:
            self._timer = self._loop.call_at(min(exchange.deadlines.values()), self._on_time)
        # One at a time, because effects are performed in their order.
        if exchange.slow and self._task is None and not self._is_closing:
            self._task = self._loop.create_task(self._work(exchange.slow.popleft()))
        self._moved.set()

    def _register(self) -> None:
        channel = self._exchange.channel
        if channel is not None:
            self._registered = channel
            # Noted, because a closed channel has no number any more to be unregistered by.
            self._registered_fd = channel.fileno()
            self._loop.add_reader(self._registered_fd, self._on_readable)

    def _unregister(self) -> None:
        if self._registered is not None:
            self._loop.remove_reader(self._registered_fd)
            self._loop.remove_writer(self._registered_fd)
            self._registered = None

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _on_readable(self) -> None:
        with self._followed():
            self._exchange.read()

    def _on_writable(self) -> None:
        with self._followed():
            self._exchange.write()

    def _on_time(self) -> None:
        with self._followed():
            self._exchange.expire()

    @contextmanager
    def _followed(self) -> Iterator[None]:
        """Follow what is done in the block, also where it fails: `until` raises what it raised."""
        try:
            yield
        except Exception as error:
            self._failure = self._failure or error
        finally:
            self.follow()

    # Effects that take time.

    async def _work(self, effect: Effect) -> None:
        with self._followed():
            try:
                await self._perform(effect)
            finally:
                self._task = None

    async def _perform(self, effect: Effect) -> None:
        await _PERFORMERS[type(effect)](self, effect)

    async def _connect(self, effect: do.Connect) -> None:
        if self._exchange.reuse():
            return
        deadline = self._exchange.connect_deadline()
        wait_s = self._exchange.take_connection(self._exchange.try_to_connect(), deadline)
        while wait_s and not self._is_closing:
            outcome = await self._loop.run_in_executor(None, self._exchange.try_to_connect, wait_s)
            wait_s = self._exchange.take_connection(outcome, deadline)

    async def _serve_self(self, effect: do.ServeSelf) -> None:
        event = await self._loop.run_in_executor(None, self._exchange.serve_self, effect)
        self._exchange.feed(event)

    async def _release_own(self, effect: do.ReleaseOwn) -> None:
        await self._loop.run_in_executor(None, self._exchange.release_own)


_PERFORMERS: Final[dict[type[Effect], Callable[[_LoopDriver, Any], Coroutine[Any, Any, None]]]] = {
    do.Connect: _LoopDriver._connect,
    do.ServeSelf: _LoopDriver._serve_self,
    do.ReleaseOwn: _LoopDriver._release_own,
}


async def _undisturbed(work: Coroutine[Any, Any, None]) -> None:
    """Await work to its end; a cancellation that comes meanwhile is passed on afterwards."""
    # Half-way, descriptors would be left open and the provider with a set that is not wanted.
    task = asyncio.ensure_future(work)
    cancellation: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as error:
            cancellation = error
    task.result()
    if cancellation is not None:
        raise cancellation
