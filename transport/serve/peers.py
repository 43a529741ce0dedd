"""Connections of a provider: accepts, reads, writes and closes them; none makes another wait.

Connections take turns, those of one user among themselves and users among each other: at its turn
one message is read from a connection and handled. While its answers wait because the peer does not
read, nothing more is read from it, so that what is kept for it stays bounded; the descriptors of an
answer are opened when there is room to send them, and after a time the peer is given up.

A connection has two directions that end separately. When nothing more is read from a peer
(`read_closed`), it is still sent what it is owed; when nothing more can be sent to it
(`write_closed`), what it said before still counts. With both closed, or at the end of its linger
time, it is dropped.
"""

from __future__ import annotations

import asyncio
import logging
import select
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Final, NamedTuple, TypeAlias

from statemachine import events as on
from statemachine.errors import FdPassing, NamespaceError, SocketUnavailable
from statemachine.events import ProviderInput
from statemachine.messages import Message, NamespaceResponse
from statemachine.provider import Limits, event_of

from ..calls import syscall
from ..channel import Delivery, Lost, Rejected
from ..codec import encode_message
from ..descriptors import DescriptorBundle
from ..endpoint import Accepted, Listener, Refused
from .timers import Spans
from .turns import Turns

ACCEPT_PAUSE_S: Final = 0.1
"""Pause in accepting when there is no descriptor left at all: that takes time to pass."""

ACCEPTS_PER_TURN_MAX: Final = 4
"""Most connections taken up before others get their turn."""

REFUSALS_PER_TURN_MAX: Final = 4
"""Most connections refused before others get their turn: that costs a tenth of taking one up."""

REFUSALS_LOG_PAUSE_S: Final = 10.0
"""How often at most a line is logged about connections that were refused."""

MESSAGES_PER_TURN_MAX: Final = 2
"""Most messages handled before the event loop looks at everything else: what waits there waits long
if each of a creation's dozen steps waits for so many."""

ERROR_CHARACTERS_MAX: Final = 1024
"""Longest text of an error that cannot be sent as it is: too long for a frame, or not Unicode."""

UNSENT_BYTES_PER_CONNECTION_MAX: Final = 262_144
"""Most bytes of answers that wait for one peer to read."""

UNSENT_BYTES_PER_UID_MAX: Final = 4_194_304
"""Most bytes of answers that wait for all peers of one user."""

UNSENT_BYTES_MAX: Final = 16_777_216
"""Most bytes of answers that wait for all peers."""

UNREAD_BYTES_PER_UID_MAX: Final = 4_194_304
"""Most bytes of frames that are not whole yet, on all connections of one user."""

UNREAD_BYTES_MAX: Final = 16_777_216
"""Most bytes of such frames in sum."""

_IN: Final = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLET
_IN_AND_OUT: Final = _IN | select.EPOLLOUT
_LOST: Final = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR

_LEFT: Final = "the peer closed the connection"

_log: Final = logging.getLogger(__name__)

Opener: TypeAlias = Callable[[bool], DescriptorBundle]
"""
Opens the descriptors of a response, given whether the response had to wait; the caller owns them.

Raises a `NamespaceError`.
"""


class _Waiting(NamedTuple):
    """An answer for which there is no room yet."""

    message: Message
    size: int
    """Of its body, in bytes."""
    open_bundle: Opener | None
    """For a response."""


class Budget:
    """
    Bytes that are kept for peers: for all connections of one user, and in sum.

    Args:
        per_user: most for one user.
        in_sum: most for all.
    """

    # Keeps PEER-9.

    def __init__(self, per_user: int, in_sum: int) -> None:
        self._per_user: Final = per_user
        self._in_sum: Final = in_sum
        self._used: Final[Counter[int]] = Counter()
        self._sum = 0

    def change(self, uid: int, by: int) -> bool:
        """Count more or fewer bytes; say whether it stays within the limits."""
        self._used[uid] += by
        self._sum += by
        if not self._used[uid]:
            del self._used[uid]
        return self._used[uid] <= self._per_user and self._sum <= self._in_sum


class ServedConnection:
    """
    One connection, as the event loop serves it.

    Args:
        number: what the kernel knows it by.
        accepted: the channel and its peer's credentials; owned from here on. The credentials are
            held as long as the connection, because their pidfd pins who opened it.
        others: all connections; this one leaves them when it is dropped.
        spans: how long its timers run.
        feed: takes the events.
    """

    def __init__(
        self,
        number: int,
        accepted: Accepted,
        others: Connections,
        spans: Spans,
        feed: Callable[[ProviderInput], None],
    ) -> None:
        self.number: Final = number
        self.channel: Final = accepted.channel
        self.credentials: Final = accepted.credentials
        self.uid: Final = accepted.credentials.uid
        self.read_closed = False
        self.write_closed = False
        self.is_waiting = False
        """Whether it waits for its turn to be read."""
        self.is_lost = False
        """Whether its peer has closed it; what it said before may not be read yet."""
        self.is_in_order = False
        """Whether it is among those of its user that are read one after the other."""
        self._is_closing = False
        self._others: Final = others
        self._spans: Final = spans
        self._feed: Final = feed
        self._loop: Final = asyncio.get_running_loop()
        self._frame_deadline: asyncio.TimerHandle | None = None
        self._linger: asyncio.TimerHandle | None = None
        self._read_deadline: asyncio.TimerHandle | None = None
        self._unsent: Final[deque[_Waiting]] = deque()
        self._unsent_bytes = 0
        self._unread_bytes = 0
        self._read_since_lost = 0

    @property
    def is_blocked(self) -> bool:
        """Whether answers wait because the peer does not read; then it is not read either."""
        return bool(self._unsent) or self.channel.wants_write

    # Writing.

    def send(self, message: Message) -> None:
        """
        Send a message, now or as soon as there is room; nothing if the peer takes none any more.

        Raises:
            ValueError: it cannot be put into a frame; nothing was sent.
        """
        if self.write_closed:
            return
        if self.is_blocked:
            self._wait(_Waiting(message, len(encode_message(message)), None))
            return
        with self._sending():
            self.channel.send(message)

    def hand_over(self, response: NamespaceResponse, open_bundle: Opener) -> bool:
        """
        Send a response, now or as soon as there is room, with descriptors that are opened then.

        If they cannot be opened later, the error is sent in its place.

        Returns:
            Whether the peer still takes any.

        Raises:
            NamespaceError: they cannot be opened now. Nothing was sent.
            ValueError: what was opened is not what the response announces. Nothing was sent.
        """
        # Keeps PEER-14.
        if self.write_closed:
            return False
        if self.is_blocked or not self._offer(response, open_bundle(False)):
            self._wait(_Waiting(response, len(encode_message(response)), open_bundle))
        return not self.write_closed

    def _offer(self, response: NamespaceResponse, bundle: DescriptorBundle) -> bool:
        """Send a response whole or in part, if there is room for any of it."""
        with self._sending():
            return self.channel.offer(response, bundle)
        return True  # to no avail: the peer is gone

    @contextmanager
    def _sending(self) -> Iterator[None]:
        """If the body finds that the peer is gone, send nothing more; if it is slow, wait."""
        try:
            yield
        except FdPassing as error:
            self._close_write(error.reason)
            return
        if self.channel.wants_write:
            self._wait_for_room()

    def _wait(self, answer: _Waiting) -> None:
        # Keeps PEER-9.
        self._unsent.append(answer)
        self._unsent_bytes += answer.size
        is_within = self._others.unsent.change(self.uid, answer.size)
        if not is_within or self._unsent_bytes > UNSENT_BYTES_PER_CONNECTION_MAX:
            self._close_write(f"the peer does not read: {self._unsent_bytes} bytes wait")
        else:
            self._wait_for_room()

    def _wait_for_room(self) -> None:
        # Keeps PEER-13.
        if self.is_lost:
            self._close_write(_LEFT)
            return
        if self._read_deadline is not None:
            return
        try:
            self._others.watch(self, _IN_AND_OUT)
        except OSError as error:
            # Room cannot be watched for (no memory), so the rest would wait for ever.
            self._close_write(f"the rest cannot be sent: {error.strerror}")
            return
        self._read_deadline = self._loop.call_later(self._spans.unread_s, self._close_slow)

    def _close_slow(self) -> None:
        """Give up a peer that has not read for so long, unless there is room after all."""
        # Keeps PEER-13.
        # This is late where the loop has stood still, and the room may not have been noticed yet.
        self.write()
        if self.is_blocked:
            self._close_write(f"the peer did not read for {self._spans.unread_s:g} s")

    def write(self) -> None:
        """Send what waits, as far as there is room."""
        if self.write_closed or not self.is_blocked:
            return
        try:
            self.channel.flush()
            while self._unsent and not self.channel.wants_write:
                if not self._send_waiting(self._unsent[0]):
                    break
                self._drop_unsent(1)
        except FdPassing as error:
            self._close_write(error.reason)
            return
        if self.is_blocked:
            # Watched anew, so that room is not missed that there was all the time.
            with suppress(OSError):
                self._others.watch(self, _IN_AND_OUT)
            return
        self._stop_waiting_for_room()
        if self._is_closing:
            self.drop("closed")
        else:
            self._others.enqueue(self)

    def _send_waiting(self, answer: _Waiting) -> bool:
        """Send the answer that has waited longest; say whether any of it has left."""
        if answer.open_bundle is None:
            self.channel.send(answer.message)
            return True
        try:
            return self.channel.offer(answer.message, answer.open_bundle(True))
        except (NamespaceError, ValueError) as error:
            # If it was the channel that failed, it raises the same again.
            failure = error if isinstance(error, NamespaceError) else FdPassing(str(error))
            self.channel.send(sendable(failure))
            return True

    def _drop_unsent(self, count: int) -> None:
        for _ in range(count):
            size = self._unsent.popleft().size
            self._unsent_bytes -= size
            self._others.unsent.change(self.uid, -size)

    def _stop_waiting_for_room(self) -> None:
        if self._read_deadline is not None:
            self._read_deadline.cancel()
            self._read_deadline = None
            with suppress(OSError):
                self._others.watch(self, _IN)

    def _close_write(self, reason: str) -> None:
        """Send nothing more. What the peer said before it went away still counts."""
        if self.write_closed:
            return
        self.write_closed = True
        self._stop_waiting_for_room()
        self._drop_unsent(len(self._unsent))
        self.channel.stop_sending(reason)
        if self.read_closed:
            self.drop(reason)
            return
        self._start_linger(reason)
        self._others.enqueue(self)

    # Reading.

    def read(self) -> bool:
        """Take one message, if there is a whole one; say whether there may be more."""
        # Keeps PEER-12.
        if self.read_closed or self.is_blocked:
            return False
        match self.channel.receive_next():
            case None:
                self._time_frame()
                # Watched anew, so that nothing is missed that came since, or was not had.
                with suppress(OSError):
                    self._others.watch(self, _IN)
                return False
            case Delivery(message=message):
                self._stop_frame_deadline()
                self._take(event_of(self.number, message))
            case Rejected(error=error):
                self._reject(error.reason)
            case Lost(reason=reason):
                self.drop(reason)
        return not self.read_closed

    def _take(self, event: ProviderInput) -> None:
        if isinstance(event, on.FrameRejected):
            self._reject(event.reason)
            return
        self._feed(event)
        if self.is_lost:
            # None of its answers can be read, so that it is over the limit of those that were not.
            self._read_since_lost += 1
            if self._read_since_lost >= self._others.flood:
                self.drop("the peer left more messages than it may have unanswered")

    def _reject(self, reason: str) -> None:
        # Keeps WIRE-11, WIRE-12.
        # What follows is not read, though the refusal may have to wait for its turn.
        self._close_read()
        self._feed(on.FrameRejected(reason, self.number))
        if self.is_lost:
            self.drop(reason)

    def _close_read(self) -> None:
        self.read_closed = True
        self._stop_frame_deadline()

    def _time_frame(self) -> None:
        """Give the frame that has begun to arrive its deadline, once."""
        # Once: begun anew with every byte, it would let a peer keep a frame open for ever.
        if not self.channel.is_mid_frame:
            self._stop_frame_deadline()
            return
        if self._frame_deadline is None:
            span_s = self._spans.partial_frame_s
            self._frame_deadline = self._loop.call_later(span_s, self._reject_slow)
        if not self._count_unread(self.channel.bytes_held):
            self._reject("the frames that are not whole take up too much; send each at once")

    def _reject_slow(self) -> None:
        # Keeps PEER-7.
        # What has come counts, though it was not read yet: it was not its turn, or its answers
        # wait. In the latter case the frame is timed anew when it is read on.
        if self.is_blocked:
            self._frame_deadline = None
        elif self.read():
            self._others.enqueue(self)
        if self._frame_deadline is not None:
            self._reject(f"a frame was not whole within {self._spans.partial_frame_s:g} s")

    def _stop_frame_deadline(self) -> None:
        if self._frame_deadline is not None:
            self._frame_deadline.cancel()
            self._frame_deadline = None
        if self._unread_bytes:
            self._count_unread(0)

    def _count_unread(self, count: int) -> bool:
        # Keeps PEER-9.
        change, self._unread_bytes = count - self._unread_bytes, count
        return self._others.unread.change(self.uid, change)

    # Closing.

    def note_loss(self) -> None:
        """Go on with a connection that its peer has closed: what it said is read, no more sent."""
        # Keeps PEER-10.
        # Later connections of its user wait until it is read to its end: nothing may hold that up.
        self.is_lost = True
        if self.read_closed:
            self.drop(_LEFT)
        elif self.is_blocked:
            self._close_write(_LEFT)

    def close_when_sent(self) -> None:
        """Read nothing more; close as soon as the peer has what was sent, or has had its time."""
        self._is_closing = True
        self._close_read()
        if self.is_blocked:
            self._start_linger("closed")
        else:
            self.drop("closed")

    def drop(self, reason: str) -> None:
        """Close it now, and report its loss; nothing happens if it is closed."""
        # Keeps PEER-10, CRASH-14.
        if self._others.remove(self):
            self.abandon()
            self._feed(on.ConnectionLost(self.number, reason))
            self._others.go_on(self.uid)

    def abandon(self) -> None:
        """Close everything that belongs to it, and report nothing."""
        self._close_read()
        self._drop_unsent(len(self._unsent))
        for timer in (self._linger, self._read_deadline):
            if timer is not None:
                timer.cancel()
        self.channel.close()
        self.credentials.close()

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
        limits: who may connect, and how many messages a connection may have unanswered.
        spans: how long a connection's timers run.
        objection_to: says why a user's connection is refused, or None if it is not.
        feed: takes the events.
        stopping: set when accepting is not to be taken up again after a shortage.
    """

    def __init__(
        self,
        listener: Listener,
        limits: Limits,
        spans: Spans,
        objection_to: Callable[[int], NamespaceError | None],
        feed: Callable[[ProviderInput], None],
        stopping: asyncio.Event,
    ) -> None:
        self.flood: Final = limits.flood
        self.unsent: Final = Budget(UNSENT_BYTES_PER_UID_MAX, UNSENT_BYTES_MAX)
        self.unread: Final = Budget(UNREAD_BYTES_PER_UID_MAX, UNREAD_BYTES_MAX)
        self._listener: Final = listener
        self._spans: Final = spans
        self._objection_to: Final = objection_to
        self._feed: Final = feed
        self._stopping: Final = stopping
        self._open: Final[dict[int, ServedConnection]] = {}
        self._by_fd: Final[dict[int, ServedConnection]] = {}
        self._epoll: select.epoll
        self._started: Final = ExitStack()
        """Undoes `start`."""
        self._turns: Final[Turns[ServedConnection]] = Turns()
        self._is_turn_due = False
        self._in_order: Final[defaultdict[int, deque[ServedConnection]]] = defaultdict(deque)
        """Of each user: connections that are lost and not read to the end, and later ones."""
        self._refusals: Final = Refusals()
        self._next_number = 1

    def __len__(self) -> int:
        return len(self._open)

    def start(self) -> None:
        """Accept the connections that come, and read them."""
        loop = asyncio.get_running_loop()
        self._epoll = self._started.enter_context(syscall(select.epoll))
        loop.add_reader(self._epoll.fileno(), self._read_ready)
        self._started.callback(loop.remove_reader, self._epoll.fileno())
        loop.add_reader(self._listener.fileno(), self._accept)

    def get(self, number: int) -> ServedConnection | None:
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
            connection.send(sendable(message))

    def stop_accepting(self) -> None:
        """Close the listener; connections that are accepted stay open."""
        asyncio.get_running_loop().remove_reader(self._listener.fileno())
        self._listener.close()
        self._refusals.close()

    def close(self, reason: str) -> None:
        """Close every connection now, and read nothing more."""
        for connection in tuple(self._open.values()):
            connection.drop(reason)
        self._started.close()

    # For a connection.

    def watch(self, connection: ServedConnection, what: int) -> None:
        """
        Have it written to, too, when there is room, or only read.

        Raises:
            OSError: there is no memory for that.
        """
        if connection.number in self._open:
            self._epoll.modify(connection.channel.fileno(), what)

    def enqueue(self, connection: ServedConnection) -> None:
        """Read a connection when it is its turn."""
        self._put(connection)
        self._go_on_soon()

    def remove(self, connection: ServedConnection) -> bool:
        """Find a connection no more; say whether it could be found."""
        if self._open.pop(connection.number, None) is None:
            return False
        self._by_fd.pop(connection.channel.fileno(), None)
        if connection.is_waiting:
            self._turns.remove((connection.uid, connection.number), connection)
        return True

    # Reading.

    def _read_ready(self) -> None:
        """Read what is there, from here rather than in the next turn of the event loop."""
        self._notice()
        if not self._is_turn_due:
            self._take_turns()

    def _put(self, connection: ServedConnection) -> None:
        if not (connection.read_closed or connection.is_waiting):
            connection.is_waiting = True
            self._turns.put((connection.uid, connection.number), connection)

    def _go_on_soon(self) -> None:
        if self._turns and not self._is_turn_due:
            self._is_turn_due = True
            asyncio.get_running_loop().call_soon(self._take_turns)

    def _notice(self) -> None:
        """Note which connections have something to read, have room, or are lost."""
        # Edge-triggered: each is told once, and read until nothing is left.
        loop = asyncio.get_running_loop()
        for fd, events in self._epoll.poll(0):
            connection = self._by_fd.get(fd)
            if connection is None:
                continue
            if events & _LOST and not connection.is_lost:
                self._keep_in_order(connection)
                connection.note_loss()
            self._put(connection)
            if events & select.EPOLLOUT:
                loop.call_soon(connection.write)

    def _take_turns(self) -> None:
        # Keeps PEER-12.
        self._is_turn_due = False
        for _ in range(MESSAGES_PER_TURN_MAX):
            connection = self._turns.take()
            if connection is None:
                return
            connection.is_waiting = False
            if connection.read():
                self._put(connection)
        self._go_on_soon()

    # Accepting.

    def _accept(self) -> None:
        accepts = refusals = 0
        while accepts < ACCEPTS_PER_TURN_MAX and refusals < REFUSALS_PER_TURN_MAX:
            accepted = self._accept_next()
            if accepted is None:
                break
            if isinstance(accepted, Refused):
                refusals += 1
                self._refusals.count(accepted)
            else:
                accepts += 1
                self._take_up(accepted)
        if accepts:
            self._read_ready()  # most have said by now what they want

    def _take_up(self, accepted: Accepted) -> None:
        # Numbers are never used twice: an effect for a connection that is gone finds none.
        number = self._next_number
        connection = ServedConnection(number, accepted, self, self._spans, self._feed)
        # What was lost before this one was opened is noticed before this one is read.
        self._notice()
        must_wait = bool(self._in_order[connection.uid])
        try:
            if not must_wait:
                self._register(connection)
        except OSError as error:
            _turn_away(accepted, f"the provider cannot listen to it: {error.strerror}")
            return
        self._next_number += 1
        self._open[number] = connection
        if must_wait:
            self._keep_in_order(connection)
        self._feed(on.ConnectionOpened(number, connection.uid))

    def _keep_in_order(self, connection: ServedConnection) -> None:
        if not connection.is_in_order:
            connection.is_in_order = True
            self._in_order[connection.uid].append(connection)

    def _register(self, connection: ServedConnection) -> None:
        fd = connection.channel.fileno()
        syscall(self._epoll.register, fd, _IN)
        self._by_fd[fd] = connection

    def go_on(self, uid: int) -> None:
        """Read the connections of a user that waited for a lost one to be read to its end."""
        # Keeps CRASH-14.
        in_order = self._in_order[uid]
        while in_order:
            first = in_order[0]
            if first.number in self._open:
                if first.is_lost or not self._begin_reading(first):
                    return
                # It may have been lost while it waited; then those behind it go on waiting.
                self._notice()
                self._go_on_soon()
                if first.is_lost:
                    return
            first.is_in_order = False
            in_order.popleft()

    def _begin_reading(self, connection: ServedConnection) -> bool:
        try:
            self._register(connection)
        except OSError as error:
            reason = f"the provider cannot listen to it: {error.strerror}"
            asyncio.get_running_loop().call_soon(connection.drop, reason)
            return False
        return True

    def _accept_next(self) -> Accepted | Refused | None:
        # The listener stays readable while a connection waits that cannot be accepted: without a
        # pause, this would spin.
        try:
            accepted = self._listener.accept_if(self._refusal_of)
        except OSError:
            _log.exception("accepting on %s failed", self._listener.path)
            self._pause_accepting()
            return None
        if accepted is None and self._listener.is_starved:
            self._pause_accepting()
        return accepted

    def _refusal_of(self, uid: int) -> NamespaceError | None:
        """Say why a user's connection is refused; those that they have closed do not count."""
        refusal = self._objection_to(uid)
        if refusal is not None and self._end_lost(uid):
            refusal = self._objection_to(uid)
        return refusal

    def _end_lost(self, uid: int) -> bool:
        """Read what is lost of a user, as far as a turn goes; say whether any of it has ended."""
        self._notice()
        before = len(self._open)
        in_order = self._in_order.get(uid, ())
        for _ in range(MESSAGES_PER_TURN_MAX):
            if not in_order or not in_order[0].is_lost:
                break
            in_order[0].read()
        self._go_on_soon()
        return len(self._open) < before

    def _pause_accepting(self) -> None:
        # Keeps PEER-11.
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._listener.fileno())
        loop.call_later(ACCEPT_PAUSE_S, self._resume_accepting)

    def _resume_accepting(self) -> None:
        if self._stopping.is_set():
            return
        loop = asyncio.get_running_loop()
        try:
            loop.add_reader(self._listener.fileno(), self._accept)
        except OSError:
            _log.exception("listening to %s failed", self._listener.path)
            loop.call_later(ACCEPT_PAUSE_S, self._resume_accepting)


class Refusals:
    """Counts the connections that are refused, and logs how many at most every so often."""

    # Keeps PEER-15.

    def __init__(self) -> None:
        self._count = 0
        self._pause: asyncio.TimerHandle | None = None

    def count(self, refused: Refused) -> None:
        """Count one; one that had left before it could be told is none."""
        if refused.error is None:
            return
        self._count += 1
        self._last = refused
        if self._pause is None:
            self._log()

    def close(self) -> None:
        """Log no more."""
        if self._pause is not None:
            self._pause.cancel()

    def _log(self) -> None:
        self._pause = None
        if not self._count:
            return
        count, self._count = self._count, 0
        fields = {"count": count, "uid": self._last.uid, "error": str(self._last.error)}
        extra = {"event": "connections_refused", "fields": fields}
        _log.warning("connections refused: %d", count, extra=extra)
        loop = asyncio.get_running_loop()
        self._pause = loop.call_later(REFUSALS_LOG_PAUSE_S, self._log)


def _turn_away(accepted: Accepted, reason: str) -> None:
    """Say why a connection is not served, as far as that can be said at once, and close it."""
    try:
        with suppress(FdPassing):
            accepted.channel.send(SocketUnavailable(reason))
    finally:
        accepted.close()


def sendable(error: NamespaceError) -> NamespaceError:
    """Say the same so that it fits into a frame, whatever it quotes."""
    text = error.text.encode("ascii", "backslashreplace").decode()
    return type(error)(text[:ERROR_CHARACTERS_MAX])
