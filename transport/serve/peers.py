"""Connections of a provider: accepts, reads, writes and closes them; none makes another wait.

A connection has two directions that end separately. When nothing more is read from a peer
(`read_closed`), it is still sent what it is owed; when nothing more can be sent to it
(`write_closed`), what it said before still counts. With both closed, or at the end of its linger
time, it is dropped.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from statemachine import events as on
from statemachine.errors import FdPassing, NamespaceError, SocketUnavailable
from statemachine.events import ProviderInput
from statemachine.messages import Message
from statemachine.provider import event_of

from ..channel import Delivery, Lost, Rejected
from ..descriptors import DescriptorBundle
from ..endpoint import Accepted, Listener
from .timers import Spans

ACCEPT_PAUSE_S: Final = 0.1
"""Pause in accepting when there is no descriptor left at all: that takes time to pass."""

ACCEPTS_PER_TURN_MAX: Final = 64
"""Most connections accepted before others get their turn."""

ERROR_CHARACTERS_MAX: Final = 1024
"""Longest text of an error that cannot be sent as it is: too long for a frame, or not Unicode."""

_log: Final = logging.getLogger(__name__)


class Connection:
    """
    One connection, as the event loop serves it.

    Args:
        number: what the kernel knows it by.
        accepted: the channel and its peer's credentials; owned from here on. The credentials are
            held as long as the connection, because their pidfd pins who opened it.
        others: all connections by number; this one leaves them when it is dropped.
        spans: how long its timers run.
        feed: takes the events.
    """

    def __init__(
        self,
        number: int,
        accepted: Accepted,
        others: dict[int, Connection],
        spans: Spans,
        feed: Callable[[ProviderInput], None],
    ) -> None:
        self.number: Final = number
        self.channel: Final = accepted.channel
        self.credentials: Final = accepted.credentials
        self.read_closed = False
        self.write_closed = False
        self._is_closing = False
        self._others: Final = others
        self._spans: Final = spans
        self._feed: Final = feed
        self._loop: Final = asyncio.get_running_loop()
        self._frame_deadline: asyncio.TimerHandle | None = None
        self._linger: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """
        Read what comes.

        Raises:
            OSError: the event loop cannot watch the socket.
        """
        self._loop.add_reader(self.channel.fileno(), self._read)

    def send(self, message: Message, bundle: DescriptorBundle | None = None) -> bool:
        """
        Send a message, now or as soon as there is room; say whether the peer still takes any.

        Raises:
            ValueError: it cannot be put into a frame; nothing was sent, the bundle is closed.
        """
        try:
            self.channel.send(message, bundle)
            if self.channel.wants_write:
                self._loop.add_writer(self.channel.fileno(), self._write)
        except FdPassing as error:
            self._close_write(error.reason)
            return False
        except OSError as error:
            # The event loop cannot watch for room (no memory), so the rest would wait for ever.
            self._close_write(f"the rest cannot be sent: {error.strerror}")
            return False
        return True

    def close_when_sent(self) -> None:
        """Read nothing more; close as soon as the peer has what was sent, or has had its time."""
        self._is_closing = True
        self._close_read()
        if self.channel.wants_write:
            self._start_linger("closed")
        else:
            self.drop("closed")

    def drop(self, reason: str) -> None:
        """Close it now, and report its loss; nothing happens if it is closed."""
        # Keeps PEER-10, CRASH-14.
        if self._others.pop(self.number, None) is None:
            return
        self.abandon()
        self._feed(on.ConnectionLost(self.number, reason))

    def abandon(self) -> None:
        """Close everything that belongs to it, and report nothing."""
        self._close_read()
        self._loop.remove_writer(self.channel.fileno())
        if self._linger is not None:
            self._linger.cancel()
        self.channel.close()
        self.credentials.close()

    # Reading.

    def _read(self) -> None:
        for received in self.channel.receive():
            # Feeding the one before may have closed the connection, or refused all that follows.
            if self.read_closed:
                return
            match received:
                case Delivery(message=message):
                    self._stop_frame_deadline()
                    self._take(event_of(self.number, message))
                case Rejected(error=error):
                    self._reject(error.reason)
                case Lost(reason=reason):
                    self.drop(reason)
        self._time_frame()

    def _take(self, event: ProviderInput) -> None:
        if isinstance(event, on.FrameRejected):
            self._reject(event.reason)
        else:
            self._feed(event)

    def _reject(self, reason: str) -> None:
        # Keeps WIRE-11, WIRE-12.
        # What follows is not read, though the refusal may have to wait for its turn.
        self._close_read()
        self._feed(on.FrameRejected(reason, self.number))

    def _close_read(self) -> None:
        self.read_closed = True
        self._stop_frame_deadline()
        self._loop.remove_reader(self.channel.fileno())

    def _time_frame(self) -> None:
        """Give the frame that has begun to arrive its deadline, once."""
        # Once: begun anew with every byte, it would let a peer keep a frame open for ever.
        if self.read_closed:
            return
        if not self.channel.is_mid_frame:
            self._stop_frame_deadline()
        elif self._frame_deadline is None:
            span_s = self._spans.partial_frame_s
            self._frame_deadline = self._loop.call_later(span_s, self._reject_slow)

    def _reject_slow(self) -> None:
        # Keeps PEER-7.
        self._reject(f"a frame was not whole within {self._spans.partial_frame_s:g} s")

    def _stop_frame_deadline(self) -> None:
        if self._frame_deadline is not None:
            self._frame_deadline.cancel()
            self._frame_deadline = None

    # Writing.

    def _write(self) -> None:
        try:
            is_done = self.channel.flush()
        except FdPassing as error:
            self._close_write(error.reason)
            return
        if is_done:
            self._loop.remove_writer(self.channel.fileno())
            if self._is_closing:
                self.drop("closed")

    def _close_write(self, reason: str) -> None:
        """Send nothing more. What the peer said before it went away still counts."""
        self._loop.remove_writer(self.channel.fileno())
        if self.read_closed:
            self.drop(reason)
        elif not self.write_closed:
            self.write_closed = True
            self._start_linger(reason)

    def _start_linger(self, reason: str) -> None:
        if self._linger is not None:
            self._linger.cancel()
        # A peer that never reads would hold its connection, and what waits for it, for ever.
        self._linger = self._loop.call_later(self._spans.linger_s, self.drop, reason)


class Connections:
    """
    All connections of a provider: accepts them, and finds them by the numbers it gives them.

    Args:
        listener: where consumers connect; closed by `stop_accepting`.
        spans: how long a connection's timers run.
        feed: takes the events.
        stopping: set when accepting is not to be taken up again after a shortage.
    """

    def __init__(
        self,
        listener: Listener,
        spans: Spans,
        feed: Callable[[ProviderInput], None],
        stopping: asyncio.Event,
    ) -> None:
        self._listener: Final = listener
        self._spans: Final = spans
        self._feed: Final = feed
        self._stopping: Final = stopping
        self._open: Final[dict[int, Connection]] = {}
        self._next_number = 1

    def __len__(self) -> int:
        return len(self._open)

    def start(self) -> None:
        """Accept the connections that come."""
        asyncio.get_running_loop().add_reader(self._listener.fileno(), self._accept)

    def get(self, number: int) -> Connection | None:
        """Find a connection by its number; None if it is closed."""
        return self._open.get(number)

    def send(self, number: int, message: Message) -> None:
        """Send a message that brings no descriptors; an error that fits into no frame is cut."""
        # Keeps WIRE-13.
        connection = self._open.get(number)
        if connection is None:
            return
        try:
            connection.send(message)
        except ValueError:
            # Only an error quotes what it likes, of a peer or of the machine. Its kind is what
            # counts, and order is how it is matched: so it must leave, whatever it says.
            assert isinstance(message, NamespaceError)
            connection.send(_sendable(message))

    def stop_accepting(self) -> None:
        """Close the listener; connections that are accepted stay open."""
        asyncio.get_running_loop().remove_reader(self._listener.fileno())
        self._listener.close()

    def drop_all(self, reason: str) -> None:
        """Close every connection now."""
        for connection in tuple(self._open.values()):
            connection.drop(reason)

    def _accept(self) -> None:
        for _ in range(ACCEPTS_PER_TURN_MAX):
            accepted = self._accept_next()
            if accepted is None:
                return
            connection = Connection(
                self._next_number, accepted, self._open, self._spans, self._feed
            )
            try:
                connection.start()
            except OSError as error:
                _turn_away(accepted, f"the provider cannot listen to it: {error.strerror}")
                continue
            # Numbers are never used twice: an effect for a connection that is gone finds none.
            self._next_number += 1
            self._open[connection.number] = connection
            self._feed(on.ConnectionOpened(connection.number, accepted.credentials.uid))

    def _accept_next(self) -> Accepted | None:
        # The listener stays readable while a connection waits that cannot be accepted: without a
        # pause, this would spin.
        try:
            accepted = self._listener.accept()
        except OSError:
            _log.exception("accepting on %s failed", self._listener.path)
            self._pause_accepting()
            return None
        if accepted is None and self._listener.is_starved:
            self._pause_accepting()
        return accepted

    def _pause_accepting(self) -> None:
        # Keeps PEER-11.
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._listener.fileno())
        loop.call_later(ACCEPT_PAUSE_S, self._resume_accepting)

    def _resume_accepting(self) -> None:
        if self._stopping.is_set():
            return
        try:
            self.start()
        except OSError:
            _log.exception("listening to %s failed", self._listener.path)
            asyncio.get_running_loop().call_later(ACCEPT_PAUSE_S, self._resume_accepting)


def _turn_away(accepted: Accepted, reason: str) -> None:
    """Say why a connection is not served, as far as that can be said at once, and close it."""
    try:
        with suppress(FdPassing):
            accepted.channel.send(SocketUnavailable(reason))
    finally:
        accepted.close()


def _sendable(error: NamespaceError) -> NamespaceError:
    """Say the same so that it fits into a frame, whatever it quotes."""
    text = error.text.encode("ascii", "backslashreplace").decode()
    return type(error)(text[:ERROR_CHARACTERS_MAX])
