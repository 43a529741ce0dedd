"""A consumer that blocks: `Consumer` obtains namespaces from the provider, or makes its own.

A call to `obtain` opens one connection, carries one allocation on it, and returns a `Handoff` that
holds the descriptors. The connection stays open as long as the handoff does, because the provider
announces the end on it.
"""

from __future__ import annotations

import select
from collections.abc import Callable
from contextlib import closing, suppress
from typing import Any, Final

from statemachine import effects as do
from statemachine.effects import Effect
from statemachine.errors import NamespaceError
from statemachine.messages import NamespaceRequest, NamespaceResponse

from .exchange import (
    ANSWER_TIMEOUT_S,
    SETTLE_TIMEOUT_S,
    BaseConsumer,
    BaseHandoff,
    Exchange,
)


class Cancelled(Exception):
    """What a call was given as `cancel` became readable before the call was done."""


class Handoff(BaseHandoff):
    """
    Namespaces in hand. Leaving its context closes the descriptors and the connection.

    The allocation goes on when the handoff is closed: it ends when its cgroup empties, or when
    `end` says so.
    """

    __slots__ = ()

    def wait_ended(self, timeout_s: float, *, cancel: int | None = None) -> bool:
        """
        Wait for the allocation to be over.

        Args:
            timeout_s: seconds to wait; 0.0 only looks.
            cancel: a descriptor that stops waiting when it is readable; borrowed, never read.

        Returns:
            Whether it is over. A provider that is gone cannot announce anything.

        Raises:
            Cancelled: `cancel` is readable. Nothing else has changed.
        """
        return _run(self._exchange, lambda: self._exchange.is_over, timeout_s, cancel)

    def end(self, timeout_s: float = ANSWER_TIMEOUT_S) -> bool:
        """
        End the allocation, and wait until the provider has confirmed.

        What self-service made is released here.

        Args:
            timeout_s: seconds to wait.

        Returns:
            Whether it is over, and everything that was owed to the provider is said. If not, a
            later call goes on.
        """
        self._exchange.want_end()
        return _run(self._exchange, lambda: self._exchange.is_done, timeout_s)

    def settle(self, timeout_s: float = SETTLE_TIMEOUT_S) -> bool:
        """
        Tell the provider of an end that is owed to it, if there is one.

        Args:
            timeout_s: seconds to wait for its confirmation.

        Returns:
            Whether nothing is owed any more.
        """
        return _run(self._exchange, lambda: not self._exchange.owes_end, timeout_s)

    def close(self) -> None:
        """
        Close the descriptors and the connection; may be called again.

        An end that is owed to the provider is said, if that can be done at once.
        """
        try:
            self._exchange.hurry()
            self.settle(0.0)
        finally:
            self._exchange.close()

    def __enter__(self) -> Handoff:
        return self

    def __exit__(self, *exc_info: object) -> None:
        try:
            self.settle()
        finally:
            self.close()


class Consumer(BaseConsumer[Handoff]):
    """
    A consumer that blocks; fulfils the seed's `NamespaceConsumer`.

    Starts no thread and no event loop, so that its caller may fork and execute right after.
    `linux.Consumer` is this with the node's own inspector and self-service as defaults.

    Args:
        path: the provider's socket; None: the node has no provider, and none is asked.
        inspector: says what a descriptor really is.
        service: makes namespaces when the provider cannot be reached; None never does.
        patience: how long to wait.
        audit: told of every turn to self-service.
        joins: what it asks for is there already and others use it: giving up does not end it.
        keeps: how many connections are kept for later requests, once their allocation is over. The
            provider counts each as one of this user's.
    """

    def obtain(self, request: NamespaceRequest, *, cancel: int | None = None) -> Handoff:
        """
        Obtain namespaces, from the provider or by self-service.

        Cancelled, the provider is told to end what it may have made, once, and nothing is left
        open here. Self-service that has begun is not cancelled.

        An exception that a signal's handler raises (KeyboardInterrupt) does the same where it
        comes while the provider is waited for. It may come between any two instructions, and then
        the provider may not be told: give a `cancel`, a signalfd(2) for example.

        Args:
            request: what is wanted.
            cancel: a descriptor that gives up when it is readable; borrowed, never read.

        Returns:
            The handoff; the caller owns it and its descriptors. `is_degraded` says whether
            self-service made them.

        Raises:
            CreationFailed: the request breaks a rule, the provider refused it, or self-service
                failed too. There are no namespaces and no descriptors.
            AllocationNotFound: the provider does not know the allocation.
            SocketUnavailable, FdPassing: the provider could not be had, and there is no
                self-service.
            TypeError: it is no request. ValueError: this consumer is closed. Nothing was done.
            Cancelled: `cancel` is readable.
        """
        # Keeps SELF-3, SELF-6.
        exchange = self._begin(request)
        try:
            _run(exchange, lambda: exchange.is_settled, cancel=cancel)
            if exchange.refusal is not None:
                raise exchange.refusal
        except (Cancelled, NamespaceError):
            exchange.withdraw()
            exchange.close()
            raise
        except BaseException:
            with closing(exchange), suppress(Exception):
                exchange.withdraw_from_any_state()
            raise
        return Handoff(exchange)

    def request_namespaces(self, request: NamespaceRequest) -> NamespaceResponse:
        """
        Obtain namespaces and keep their descriptors here, to be taken with `handoff_of`.

        Raises:
            As `obtain`.

        Source:
            Seed 94-104.
        """
        handoff = self.obtain(request)
        replaced = self._keep(handoff)
        if replaced is not None:
            replaced.close()
        self._expect_open()
        return handoff.response

    def end(self, allocation_id: str, timeout_s: float = ANSWER_TIMEOUT_S) -> None:
        """
        End an allocation that this consumer need not hold, and wait until the provider confirms.

        Args:
            allocation_id: which.
            timeout_s: seconds to wait.

        Raises:
            AllocationNotFound: the provider does not know it; no provider can, if it is no valid
                id, and none is asked.
            SocketUnavailable: the provider did not confirm in time; it may have heard.
        """
        exchange = self._begin_end(allocation_id)
        try:
            _run(exchange, lambda: exchange.is_over, timeout_s)
            exchange.raise_unless_over()
        finally:
            exchange.close()

    def close(self) -> None:
        """Close every handoff that was not taken; may be called again. No verb works afterwards."""
        self._is_closed = True
        while self._handoffs:
            self._handoffs.popitem()[1].close()
        self._close_kept()

    def __enter__(self) -> Consumer:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _run(
    exchange: Exchange,
    is_done: Callable[[], bool],
    timeout_s: float | None = None,
    cancel: int | None = None,
) -> bool:
    """Drive an exchange until it is done, or the time is over; say whether it is done."""
    deadline = None if timeout_s is None else exchange.clock() + timeout_s
    # What has arrived since the last call counts, even if there is no time to wait.
    exchange.read()
    while not is_done():
        if cancel is not None:
            _raise_if_readable(cancel)
        # What the kernel has decided is done, whatever the time.
        if exchange.slow:
            perform(exchange, exchange.slow.popleft(), cancel)
            continue
        now = exchange.clock()
        if deadline is not None and now >= deadline:
            return False
        if exchange.channel is None and not exchange.deadlines and deadline is None:
            raise AssertionError("nothing is left that could settle this exchange")
        _wait(exchange, now, deadline, cancel)
        exchange.expire()
    return True


def _wait(exchange: Exchange, now: float, deadline: float | None, cancel: int | None) -> None:
    ends = [*exchange.deadlines.values(), *([] if deadline is None else [deadline])]
    # One millisecond more: poll rounds down, and would return just before the deadline.
    timeout_ms = max(0.0, min(ends) - now) * 1000.0 + 1.0 if ends else None
    poll = select.poll()
    channel = exchange.channel
    if channel is not None:
        wants = select.POLLIN | (select.POLLOUT if channel.wants_write else 0)
        poll.register(channel.fileno(), wants)
    if cancel is not None:
        poll.register(cancel, select.POLLIN)
    for number, happened in poll.poll(timeout_ms):
        if number == cancel:
            continue  # the next turn sees it
        if happened & select.POLLOUT:
            exchange.write()
        exchange.read()


def _raise_if_readable(cancel: int | None) -> None:
    poll = select.poll()
    if cancel is not None:
        poll.register(cancel, select.POLLIN)
    if poll.poll(0):
        raise Cancelled


# --- Effects that take time ----------------------------------------------------------------------


def perform(exchange: Exchange, effect: Effect, cancel: int | None = None) -> None:
    """Perform an effect that takes time, taken from `exchange.slow`, and return when it is done."""
    _PERFORMERS[type(effect)](exchange, effect, cancel)


def _connect(exchange: Exchange, effect: do.Connect, cancel: int | None) -> None:
    if exchange.reuse():
        return
    deadline = exchange.connect_deadline()
    wait_s = exchange.take_connection(exchange.try_to_connect(), deadline)
    while wait_s:
        _raise_if_readable(cancel)
        wait_s = exchange.take_connection(exchange.try_to_connect(wait_s), deadline)


def _serve_self(exchange: Exchange, effect: do.ServeSelf, cancel: int | None) -> None:
    exchange.feed(exchange.serve_self(effect))


def _release_own(exchange: Exchange, effect: do.ReleaseOwn, cancel: int | None) -> None:
    exchange.release_own()


_PERFORMERS: Final[dict[type[Effect], Callable[[Exchange, Any, int | None], None]]] = {
    do.Connect: _connect,
    do.ServeSelf: _serve_self,
    do.ReleaseOwn: _release_own,
}
