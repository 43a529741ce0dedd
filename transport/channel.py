"""Messages with file descriptors over a unix socket (SCM_RIGHTS), each set with its own frame.

A stream socket carries two things that keep step loosely. Bytes arrive in order, cut anywhere.
Descriptors (SCM_RIGHTS) arrive in order too, each set with the bytes of the `sendmsg` it was sent
with; but one read can return the end of an earlier frame, which brings none, glued in front of
them. What holds on every cut is this: **a read ends with the bytes its descriptors came with**.
So descriptors belong to the frame that contains the last byte of their read.

    sent      |F0      |F1 +1 descriptor |F2 +3 descriptors     |F3     |
    read      |F0 F1         +1          |F2...    +3|...F2     |F3     |
    last byte                ^ in F1               ^ in F2

A `Channel` is one end of a connection: it never blocks, owns its socket and every descriptor that
is waiting on either side of it, and leaves none open on any path. Whether a descriptor really is
the namespace it is announced to be is the receiver's to check (`descriptors.verify_bundle`).

This module is the only one that calls `sendmsg` or `recvmsg`. `send_once` and `receive_once` are
those two calls with their traps closed, for passing descriptors without frames.
"""

from __future__ import annotations

import array
import errno
import socket
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Final, NamedTuple, TypeAlias

from statemachine.errors import FdPassing
from statemachine.messages import Message, NamespaceResponse, NamespaceType

from .calls import syscall
from .codec import decode_message, encode_message
from .descriptors import Descriptor, DescriptorBundle, Owner, adopt_all, close_all
from .framing import Frame, FrameReader, encode_frame

SENDMSG_DESCRIPTORS_MAX: Final = 253
"""Most descriptors in one `sendmsg` (the Linux kernel's SCM_MAX_FD)."""

FRAME_DESCRIPTORS_MAX: Final = len(NamespaceType)
"""Most descriptors with one frame: no type is handed off twice."""

RECEIVE_BYTES_MAX: Final = 65_536
"""Most bytes that one `Channel.receive` reads, so that a busy peer does not keep others waiting."""

RECEIVE_READS_MAX: Final = 16
"""Most reads of one `Channel.receive`: every set of descriptors ends a read."""

READ_AHEAD_BYTES_MAX: Final = 4_096
"""Most bytes that `Channel.receive_next` reads beyond the frame that it is reading."""

OUTGOING_BYTES_MAX: Final = 1_048_576
"""Most bytes that wait for a peer to read what was sent before."""

OUTGOING_BUNDLES_MAX: Final = 256
"""Most bundles that wait likewise: each holds descriptors of ours open."""


class Reception(NamedTuple):
    """What one `recvmsg` returned."""

    data: bytes
    """Empty at the end of the stream."""
    descriptors: list[Descriptor]
    """Close-on-exec, in the sender's order; the caller owns them."""
    is_truncated: bool
    """Whether the Linux kernel threw something away: descriptors, or the rest of a packet."""
    denied: tuple[int, ...] = ()
    """The errno of each descriptor that the Linux kernel withheld: a security module can (7.3)."""


def send_once(sock: socket.socket, data: bytes | memoryview, fds: Sequence[int] = ()) -> int:
    """
    Call `sendmsg` once: bytes, and descriptors with the first of them.

    On a stream fewer bytes can leave than were given. The descriptors then have left with the
    first of them, whole, and must not be given again with the rest.

    Args:
        sock: A connected AF_UNIX socket of any type; blocking, with a timeout, or neither.
        data: At least one byte: without any, Linux sends nothing and drops descriptors silently.
        fds: At most `SENDMSG_DESCRIPTORS_MAX`; lent, they stay open and the caller's.

    Returns:
        How many bytes left; at least 1.

    Raises:
        ValueError: no data, or too many descriptors. Nothing was sent.
        BlockingIOError: there is no room now. Nothing was sent.
        OSError: nothing was sent: EPIPE (the peer is gone, no signal is raised), EPERM (the peer
            refuses descriptors), EBADF, ETOOMANYREFS, or TimeoutError.

    Source:
        unix(7), SCM_RIGHTS. sendmsg(2).
    """
    # Keeps FD-1.
    if not data:
        raise ValueError("descriptors travel with bytes: at least one is needed")
    if len(fds) > SENDMSG_DESCRIPTORS_MAX:
        raise ValueError(f"{len(fds)} descriptors; at most {SENDMSG_DESCRIPTORS_MAX} can be sent")
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    return syscall(sock.sendmsg, [data], ancillary, socket.MSG_NOSIGNAL)


def receive_once(sock: socket.socket, size: int, descriptors_max: int) -> Reception:
    """
    Call `recvmsg` once, and own the descriptors that come with it.

    On a stream one call returns the descriptors of at most one `sendmsg`, and ends with the bytes
    of that `sendmsg`; bytes sent before it, without descriptors, may stand in front.

    Args:
        sock: A connected AF_UNIX socket of any type; blocking, with a timeout, or neither.
        size: Most bytes to read.
        descriptors_max: Most descriptors to accept. The Linux kernel drops what comes beyond
            that, without ever opening it here, and the result is truncated.

    Returns:
        The caller owns the descriptors. They can be fewer than were sent, also because this
        process has no number left for them: then, too, the result is truncated.

    Raises:
        BlockingIOError: there is nothing now.
        OSError: the connection is broken (ECONNRESET), or TimeoutError. Nothing was received.

    Source:
        unix(7), SCM_RIGHTS. recvmsg(2). cmsg(3).
    """
    # Keeps FD-5, FD-6, FD-14.
    # CMSG_LEN, not CMSG_SPACE: the padding of the latter has room for one descriptor more.
    # recvmsg, not socket.recv_fds: the latter ignores its flags, so that what it returns would be
    # inherited by every program that is executed (CPython issue 107898).
    ancillary_bytes = _cmsg_len(descriptors_max) if descriptors_max else 0
    data, ancillary, flags, _ = syscall(
        sock.recvmsg, size, ancillary_bytes, socket.MSG_CMSG_CLOEXEC
    )
    fds = array.array("i")
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
    is_truncated = bool(flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC))
    descriptors = adopt_all(fd for fd in fds if fd >= 0)
    return Reception(data, descriptors, is_truncated, tuple(-fd for fd in fds if fd < 0))


def _cmsg_len(descriptors: int) -> int:
    return socket.CMSG_LEN(descriptors * array.array("i").itemsize)


class Delivery(NamedTuple):
    """A whole message with the descriptors it announced; the receiver owns the bundle."""

    message: Message
    bundle: DescriptorBundle
    """As long as the response's `fd_types`; empty for every other message."""


class Rejected(NamedTuple):
    """
    The peer sent what is no message, or the wrong descriptors; they are closed.

    Nothing more can be received. The error is what the peer is told before the channel is closed.
    """

    error: FdPassing


class Lost(NamedTuple):
    """The peer is gone; nothing more can be received."""

    reason: str
    """What happened, for a person to read."""


Received: TypeAlias = Delivery | Rejected | Lost
"""What `Channel.receive` returns; the last two are final."""


class _Outgoing:
    """A frame on its way out; the bundle is empty once the first byte has left."""

    __slots__ = ("bundle", "rest")

    def __init__(self, frame: bytes, bundle: DescriptorBundle) -> None:
        self.rest = memoryview(frame)
        self.bundle = bundle


class _Arrival(NamedTuple):
    """Descriptors that came with a read, until the frame they belong to is whole."""

    first_byte: int
    """Where the read began, as a stream offset."""
    last_byte: int
    """Where the read ended: the stream offset of its last byte."""
    descriptors: list[Descriptor]
    fault: str | None
    """Why the frame cannot be delivered, if it cannot."""


class Channel(Owner):
    """
    One end of a connection: messages out, messages in, each with its descriptors; never blocks.

    For one thread. The socket is meant to be waited on for as long as it is readable, and, while
    `wants_write`, writable (level-triggered).

    Args:
        sock: A connected AF_UNIX stream socket; owned from here on, and made non-blocking.
        accepts_descriptors: Whether this end takes descriptors. If not, those that come are
            dropped by the Linux kernel before they are opened here, and their frame is rejected.
    """

    __slots__ = (
        "_accepts_descriptors",
        "_arrivals",
        "_frames",
        "_outgoing",
        "_outgoing_bundles",
        "_outgoing_bytes",
        "_read_closed",
        "_sock",
        "_write_fault",
    )

    def __init__(self, sock: socket.socket, *, accepts_descriptors: bool) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._accepts_descriptors = accepts_descriptors
        self._frames = FrameReader()
        self._arrivals: list[_Arrival] = []
        self._read_closed = False
        self._outgoing: deque[_Outgoing] = deque()
        self._outgoing_bytes = 0
        self._outgoing_bundles = 0
        self._write_fault: str | None = None

    def fileno(self) -> int:
        """
        Lend the socket's number, to wait on.

        Raises:
            ValueError: the channel is closed.
        """
        if self.closed:
            raise ValueError("the channel is closed")
        return self._sock.fileno()

    @property
    def sock(self) -> socket.socket:
        """The socket, lent to ask for its peer; the channel owns it."""
        return self._sock

    @property
    def closed(self) -> bool:
        """Whether this end was closed here."""
        return self._sock.fileno() < 0

    @property
    def wants_write(self) -> bool:
        """Whether something waits for room; call `flush` when the socket is writable."""
        return bool(self._outgoing)

    @property
    def is_mid_frame(self) -> bool:
        """Whether a frame has begun to arrive and is not whole."""
        return self._frames.is_partial

    @property
    def bytes_held(self) -> int:
        """How many bytes have been read that no message was made of yet."""
        return self._frames.bytes_held

    def send(self, message: Message, bundle: DescriptorBundle | None = None) -> None:
        """
        Send a message, or as much of it as there is room for; the rest waits for `flush`.

        Messages leave in the order of the calls. Descriptors leave with the first byte of their
        frame, once, and are closed here as soon as they have.

        Args:
            message: Anything that can stand in a frame.
            bundle: For a response its descriptors, in `fd_types` order. Owned by the channel from
                here on, also if it raises.

        Raises:
            FdPassing: the peer is gone, does not read, or takes no descriptors. Everything that
                was waiting is closed and will not be sent, nor will anything else. What the peer
                sent before can still be received.
            ValueError: the bundle is not what the message announces, the message cannot be
                encoded, or the channel is closed. The bundle is closed; nothing else changed.

        Source:
            FD-1, FD-3. unix(7), SCM_RIGHTS.
        """
        # Keeps FD-4.
        owned = DescriptorBundle() if bundle is None else bundle
        with ExitStack() as undo:
            undo.callback(owned.close)
            self.fileno()
            _check_announced(message, owned)
            frame = encode_frame(encode_message(message))
            self._check_room(len(frame), owned)
            undo.pop_all()
        self._outgoing.append(_Outgoing(frame, owned))
        self._outgoing_bytes += len(frame)
        self._outgoing_bundles += bool(owned)
        self.flush()

    def offer(self, message: Message, bundle: DescriptorBundle) -> bool:
        """
        Send a message if there is room for at least its first byte now; else nothing.

        Args:
            message, bundle: as `send`. The bundle is closed in every case.

        Returns:
            Whether the descriptors have left. If not, the message is to be offered again when the
            socket is writable.

        Raises:
            FdPassing, ValueError: as `send`.
        """
        # Keeps PEER-14.
        self.send(message, bundle)
        if not bundle or bundle.closed:
            return True
        frame = self._outgoing.pop()
        self._outgoing_bytes -= len(frame.rest)
        self._outgoing_bundles -= 1
        frame.bundle.close()
        return False

    def flush(self) -> bool:
        """
        Send what is waiting, as far as there is room.

        Returns:
            Whether nothing is left to send.

        Raises:
            FdPassing: as `send`.
        """
        self._check_writable()
        try:
            while self._outgoing:
                self._send_some(self._outgoing[0])
        except BlockingIOError:
            return False
        except OSError as error:
            raise self._close_write(f"sending failed: {error.strerror}") from error
        return True

    def receive(self) -> list[Received]:
        """
        Take what has arrived: whole messages, in the order they were sent.

        Returns:
            Possibly nothing. The caller owns every bundle. After `Rejected` or `Lost` nothing
            follows, in this call or any later one, and descriptors that were not delivered are
            closed. A call reads a bounded amount; what is left keeps the socket readable.

        Raises:
            ValueError: the channel is closed.

        Source:
            FD-5, FD-7. unix(7), SCM_RIGHTS.
        """
        self.fileno()
        received: list[Received] = []
        bytes_left = RECEIVE_BYTES_MAX
        for _ in range(RECEIVE_READS_MAX):
            if self._read_closed or not bytes_left:
                break
            try:
                reception = receive_once(self._sock, bytes_left, self._descriptors_max)
            except BlockingIOError:
                break
            except OSError as error:
                received.append(self._close_read(Lost(f"the connection broke: {error.strerror}")))
                break
            bytes_left -= len(reception.data)
            received += self._accept(reception)
        return received

    def stop_sending(self, reason: str) -> None:
        """Send nothing more, and drop what waits; any later `send` says why."""
        self._close_write(reason)

    def receive_next(self) -> Received | None:
        """
        Take the next message that has arrived, and read little more than that.

        Returns:
            As one of those that `receive` returns; None if nothing whole has arrived and the socket
            has nothing left to read.

        Raises:
            ValueError: the channel is closed.
        """
        self.fileno()
        while not self._read_closed:
            try:
                if (received := self._take_frame()) is not None:
                    return received
                size = max(READ_AHEAD_BYTES_MAX, self._frames.bytes_missing)
                reception = receive_once(self._sock, size, self._descriptors_max)
            except BlockingIOError:
                return None
            except OSError as error:
                return self._close_read(Lost(f"the connection broke: {error.strerror}"))
            if not reception.data:
                return self._lost()
            self._frames.feed(reception.data)
            self._note_arrival(reception)
        return None

    def close(self) -> None:
        """Close the socket and every descriptor that waits on either side; may be called again."""
        with ExitStack() as stack:
            stack.callback(self._sock.close)
            stack.callback(self._drop_outgoing)
            stack.callback(self._drop_incoming)

    def __repr__(self) -> str:
        if self.closed:
            return "<Channel closed>"
        read = "reading over" if self._read_closed else "reading"
        write = self._write_fault or f"{self._outgoing_bytes} bytes wait to be sent"
        return f"<Channel {self.fileno()}: {read}, {write}>"

    def __enter__(self) -> Channel:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    # Sending.

    def _check_room(self, frame_bytes: int, bundle: DescriptorBundle) -> None:
        # Keeps PEER-9.
        self._check_writable()
        if self._outgoing_bytes + frame_bytes > OUTGOING_BYTES_MAX:
            raise self._close_write(f"the peer does not read: {self._outgoing_bytes} bytes wait")
        if self._outgoing_bundles + bool(bundle) > OUTGOING_BUNDLES_MAX:
            raise self._close_write(
                f"the peer does not read: {self._outgoing_bundles} bundles wait"
            )

    def _check_writable(self) -> None:
        if self._write_fault is not None:
            raise FdPassing(self._write_fault)

    def _send_some(self, frame: _Outgoing) -> None:
        # Keeps FD-3.
        sent = send_once(self._sock, frame.rest, frame.bundle.filenos())
        # The first byte has left, and the descriptors with it. They are forgotten before anything
        # else can fail, so that they can never be sent twice.
        bundle, frame.bundle = frame.bundle, DescriptorBundle()
        frame.rest = frame.rest[sent:]
        self._outgoing_bytes -= sent
        self._outgoing_bundles -= bool(bundle)
        if not frame.rest:
            self._outgoing.popleft()
        bundle.close()

    def _close_write(self, reason: str) -> FdPassing:
        self._write_fault = reason
        self._drop_outgoing()
        return FdPassing(reason)

    def _drop_outgoing(self) -> None:
        dropped, self._outgoing = self._outgoing, deque()
        self._outgoing_bytes = self._outgoing_bundles = 0
        with ExitStack() as stack:
            for frame in dropped:
                stack.callback(frame.bundle.close)

    # Receiving.

    @property
    def _descriptors_max(self) -> int:
        return FRAME_DESCRIPTORS_MAX if self._accepts_descriptors else 0

    def _accept(self, reception: Reception) -> list[Received]:
        if not reception.data:
            return [self._lost()]
        self._frames.feed(reception.data)
        self._note_arrival(reception)
        received: list[Received] = []
        while not self._read_closed and (taken := self._take_frame()) is not None:
            received.append(taken)
        return received

    def _take_frame(self) -> Delivery | Rejected | None:
        try:
            frame = self._frames.take()
            if frame is not None:
                return self._deliver(frame)
            # What has not been delivered belongs to the frame that has only begun. If it can be
            # refused now, it is: its peer might never send the rest.
            _sole(self._arrivals)
        except FdPassing as error:
            self._drop_incoming()
            return Rejected(error)
        return None

    def _lost(self) -> Lost:
        place = "in the middle of a frame" if self.is_mid_frame else "the connection"
        self._drop_incoming()
        return Lost(f"the peer closed {place}")

    def _note_arrival(self, reception: Reception) -> None:
        fault = None
        if reception.is_truncated:
            fault = self._why_truncated(reception)
        elif reception.denied:
            numbers = ", ".join(errno.errorcode.get(n, str(n)) for n in reception.denied)
            fault = f"the receiver's Linux kernel denies {len(reception.denied)} of the descriptors"
            fault = f"{fault} ({numbers}); a security module forbids them"
        if reception.descriptors or fault is not None:
            end = self._frames.bytes_fed
            first_byte = end - len(reception.data)
            self._arrivals.append(_Arrival(first_byte, end - 1, reception.descriptors, fault))

    def _why_truncated(self, reception: Reception) -> str:
        if not self._accepts_descriptors:
            return "descriptors came with a frame; none are accepted here"
        if len(reception.descriptors) < FRAME_DESCRIPTORS_MAX:
            # Those that were accepted would have had room: the shortage is here, not the peer's.
            return (
                "descriptors were cut off: the receiver has no descriptor left for them: raise its "
                "RLIMIT_NOFILE"
            )
        return f"descriptors were cut off: more than {FRAME_DESCRIPTORS_MAX} came with a frame"

    def _deliver(self, frame: Frame) -> Delivery:
        # Arrivals of earlier frames are gone, so what ends before this frame does is this frame's.
        # They are let go only when nothing can fail any more; until then the channel owns them.
        # Keeps FD-7, FD-9.
        arrivals = [arrival for arrival in self._arrivals if arrival.last_byte < frame.end]
        descriptors = _sole(arrivals)
        if any(arrival.first_byte > frame.offset for arrival in arrivals):
            raise FdPassing("descriptors came later than the first byte of their frame")
        message = decode_message(frame.body)
        types = _announced(message)
        if len(descriptors) != len(types):
            raise FdPassing(
                f"{type(message).__name__} announces {len(types)} descriptors "
                f"and came with {len(descriptors)}"
            )
        del self._arrivals[: len(arrivals)]
        return Delivery(message, DescriptorBundle(types, descriptors))

    def _close_read(self, last: Lost) -> Lost:
        self._drop_incoming()
        return last

    def _drop_incoming(self) -> None:
        # Keeps FD-10.
        self._read_closed = True
        self._frames = FrameReader()
        dropped, self._arrivals = self._arrivals, []
        close_all(descriptor for arrival in dropped for descriptor in arrival.descriptors)


def _announced(message: Message) -> tuple[NamespaceType, ...]:
    return message.fd_types if isinstance(message, NamespaceResponse) else ()


def _check_announced(message: Message, bundle: DescriptorBundle) -> None:
    if _announced(message) != bundle.types:
        raise ValueError(f"{type(message).__name__} does not announce {bundle!r}")
    if len(bundle) > FRAME_DESCRIPTORS_MAX:
        raise ValueError(f"{len(bundle)} descriptors; a frame has {FRAME_DESCRIPTORS_MAX}")
    bundle.filenos()


def _sole(arrivals: Sequence[_Arrival]) -> Sequence[Descriptor]:
    # One frame's descriptors come in one sendmsg. A second set is refused, rather than appended:
    # that also bounds how many a peer can make this end hold for a frame it never finishes.
    if len(arrivals) > 1:
        raise FdPassing("descriptors came twice with one frame")
    for arrival in arrivals:
        if arrival.fault is not None:
            raise FdPassing(arrival.fault)
        return arrival.descriptors
    return ()
