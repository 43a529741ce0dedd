"""Simulated socket pairs and descriptor tables: what SCM_RIGHTS does, without a kernel.

The part of Linux that passing descriptors depends on: a table of descriptors with lowest free
numbers and a limit, stream sockets between two tables, and SCM_RIGHTS with everything that goes
wrong with it. Random programs run on both compare it with Linux.

    process.pair()                  two numbers, or EMFILE
    process.send(fd, data, fds)     a part of the data, or EAGAIN, EPIPE, EBADF, EINVAL, EPERM
    process.receive(fd, size, …)    data, numbers of what came with it, and whether some were lost

How much fits into a socket's buffer is not specified, because Linux counts what its bookkeeping
takes. So the caller sets the `room` of a process; by default everything fits.

Not simulated: sockets that are in flight in their own queues (Linux finds those later), and the
limit of what an unprivileged user may have in flight.
"""

from __future__ import annotations

import errno
import os
import socket
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, NoReturn

from transport.channel import SENDMSG_DESCRIPTORS_MAX

SEGMENT_BYTES_MAX: Final = 36_544
"""How Linux cuts what is sent at once: only the first segment carries the descriptors."""

DESCRIPTORS_MAX: Final = 1024
"""The usual RLIMIT_NOFILE."""

_CMSG_HEADER_BYTES: Final = 16
_INT_BYTES: Final = 4


class SimulatedFile:
    """
    What a descriptor refers to; it is released when nothing refers to it any more.

    Tables refer to it, and so does what is in flight.
    """

    def __init__(self) -> None:
        self.references = 0

    @property
    def is_alive(self) -> bool:
        """Whether anything refers to it."""
        return self.references > 0

    def hold(self) -> None:
        """Refer to it once more."""
        self.references += 1

    def let_go(self) -> None:
        """Refer to it once less."""
        self.references -= 1
        if not self.references:
            self.released()

    def released(self) -> None:
        """Nothing refers to it any more."""


@dataclass(slots=True)
class _Segment:
    """Bytes that were sent together, and what came with the first of them."""

    data: bytes
    rights: tuple[SimulatedFile, ...] = ()


class SimulatedSocket(SimulatedFile):
    """One end of a connected stream socket."""

    def __init__(self) -> None:
        super().__init__()
        self.peer: SimulatedSocket = self
        self.queue: deque[_Segment] = deque()
        self.takes_rights = True
        """SO_PASSRIGHTS; without it a sender of descriptors gets EPERM."""
        self._may_send = True
        self._may_receive = True
        self._is_reset = False

    @property
    def queued_bytes(self) -> int:
        """How much was sent to it and is not read."""
        return sum(len(segment.data) for segment in self.queue)

    def shutdown(self, how: int) -> None:
        """End one direction, or both; also when the peer has closed."""
        if how in (socket.SHUT_RD, socket.SHUT_RDWR):
            self._may_receive = self.peer._may_send = False
        if how in (socket.SHUT_WR, socket.SHUT_RDWR):
            self._may_send = self.peer._may_receive = False

    def released(self) -> None:
        """Close it; what is in flight to it goes with it."""
        self.peer._may_send = self.peer._may_receive = False
        if self.queue:
            self.peer._is_reset = True
        while self.queue:
            _let_go(self.queue.popleft().rights)

    def put(self, data: bytes, rights: Sequence[SimulatedFile], room: int | None) -> int:
        """Send from this end; see `SimulatedTable.send`."""
        if not self._may_send:
            _refuse(errno.EPIPE)
        if not data:
            return 0
        if room == 0:
            _refuse(errno.EAGAIN)
        if rights and not self.peer.takes_rights:
            _refuse(errno.EPERM)
        taken = data[:room]
        for start in range(0, len(taken), SEGMENT_BYTES_MAX):
            self.peer.queue.append(_Segment(taken[start : start + SEGMENT_BYTES_MAX]))
            if start == 0:
                _hold(rights)
                self.peer.queue[-1].rights = tuple(rights)
        return len(taken)

    def take(self, size: int, *, is_peek: bool) -> tuple[bytes, tuple[SimulatedFile, ...]]:
        """Read at this end; the caller closes the files."""
        if not self.queue:
            self._expect_end()
        data = bytearray()
        for segment in tuple(self.queue):
            part = segment.data[: size - len(data)]
            data += part
            rights = segment.rights
            if is_peek:
                _hold(rights)
            else:
                segment.data, segment.rights = segment.data[len(part) :], ()
                if not segment.data:
                    self.queue.popleft()
            # What came with a segment ends the read. A size that is used up ends it, too, but not
            # a peek: that looks on until it meets descriptors, of which it has no byte.
            if rights or (len(data) == size and not is_peek):
                return bytes(data), rights
        return bytes(data), ()

    def _expect_end(self) -> None:
        if self._is_reset:
            self._is_reset = False
            _refuse(errno.ECONNRESET)
        if self._may_receive:
            _refuse(errno.EAGAIN)


@dataclass(frozen=True, slots=True)
class _DescriptorSlot:
    file: SimulatedFile
    is_inherited: bool


class SimulatedReception(NamedTuple):
    """What one `receive` returned."""

    data: bytes
    """What was read."""
    fds: list[int]
    """The numbers of the descriptors that came with it."""
    is_truncated: bool
    """MSG_CTRUNC: some or all descriptors were thrown away."""


class SimulatedTable:
    """
    A process' table of descriptors; every call is non-blocking.

    Args:
        descriptors_max: how many numbers it may use, from 0: RLIMIT_NOFILE.
    """

    def __init__(self, descriptors_max: int = DESCRIPTORS_MAX) -> None:
        self.descriptors_max = descriptors_max
        self.room: int | None = None
        """How many bytes the next `send` finds room for; None for as many as there are."""
        self._table: dict[int, _DescriptorSlot] = {}

    @property
    def fds(self) -> list[int]:
        """The numbers in use."""
        return sorted(self._table)

    def file(self, fd: int) -> SimulatedFile:
        """Return what a number refers to; EBADF."""
        return self._entry(fd).file

    def is_inherited(self, fd: int) -> bool:
        """Say whether a program that is executed has it: it is not close-on-exec; EBADF."""
        return self._entry(fd).is_inherited

    def open(self, file: SimulatedFile, *, is_inherited: bool = False) -> int:
        """
        Give a file the lowest number that is free.

        Raises:
            OSError: EMFILE, that number is beyond the limit.
        """
        fd = next(number for number in range(len(self._table) + 1) if number not in self._table)
        if fd >= self.descriptors_max:
            _refuse(errno.EMFILE)
        file.hold()
        self._table[fd] = _DescriptorSlot(file, is_inherited)
        return fd

    def pair(self) -> tuple[int, int]:
        """Make two connected sockets: both, or none (EMFILE)."""
        one, other = SimulatedSocket(), SimulatedSocket()
        one.peer, other.peer = other, one
        first = self.open(one)
        try:
            return first, self.open(other)
        except OSError:
            del self._table[first]  # not closed: no program has seen it
            raise

    def duplicate(self, fd: int) -> int:
        """Give what a number refers to a second one; EBADF, EMFILE."""
        return self.open(self.file(fd))

    def close(self, fd: int) -> None:
        """Free a number; EBADF."""
        entry = self._entry(fd)
        del self._table[fd]
        entry.file.let_go()

    def die(self) -> None:
        """Close everything, as the end of a process does."""
        for fd in self.fds:
            self.close(fd)

    def shutdown(self, fd: int, how: int) -> None:
        """End a direction of a connection; EBADF, ENOTSOCK."""
        self._socket(fd).shutdown(how)

    def accept_rights(self, fd: int, are_taken: bool) -> None:
        """Set SO_PASSRIGHTS; EBADF, ENOTSOCK."""
        self._socket(fd).takes_rights = are_taken

    def send(self, fd: int, data: bytes, fds: Sequence[int] = ()) -> int:
        """
        Send bytes, and descriptors with the first of them, once.

        Returns:
            How many bytes left. The descriptors left with the first of them: with no bytes, they
            did not.

        Raises:
            OSError: nothing was sent. EBADF, ENOTSOCK; EINVAL, too many descriptors; EPIPE, none
                can read it; EPERM, the peer takes no descriptors; EAGAIN, there is no room.
        """
        end = self._socket(fd)
        if len(fds) > SENDMSG_DESCRIPTORS_MAX:
            _refuse(errno.EINVAL)
        return end.put(data, [self.file(each) for each in fds], self.room)

    def receive(
        self,
        fd: int,
        size: int,
        control_bytes: int = 0,
        *,
        is_peek: bool = False,
        is_inherited: bool = False,
    ) -> SimulatedReception:
        """
        Read what there is, up to and including what came with one set of descriptors.

        Args:
            fd: A socket.
            size: Most bytes.
            control_bytes: Room for the descriptors; 0 as a plain recv(2).
            is_peek: MSG_PEEK: all stays to be read again, and the descriptors are duplicates.
            is_inherited: Without MSG_CMSG_CLOEXEC.

        Returns:
            No data at the end of the stream. Of the descriptors a prefix: as many as there is room
            for, and numbers.

        Raises:
            OSError: EAGAIN, there is nothing; ECONNRESET, the peer closed without having read
                everything; EBADF, ENOTSOCK.
        """
        data, rights = self._socket(fd).take(size, is_peek=is_peek)
        fds: list[int] = []
        fitting = max(0, control_bytes - _CMSG_HEADER_BYTES) // _INT_BYTES
        try:
            for file in rights[:fitting]:
                fds.append(self.open(file, is_inherited=is_inherited))
        except OSError:
            pass  # no number is left: the rest is thrown away, and that is all one hears
        _let_go(rights)
        return SimulatedReception(data, fds, len(fds) < len(rights))

    def _entry(self, fd: int) -> _DescriptorSlot:
        entry = self._table.get(fd)
        if entry is None:
            _refuse(errno.EBADF)
        return entry

    def _socket(self, fd: int) -> SimulatedSocket:
        file = self.file(fd)
        if not isinstance(file, SimulatedSocket):
            _refuse(errno.ENOTSOCK)
        return file


def _hold(files: Iterable[SimulatedFile]) -> None:
    for file in files:
        file.hold()


def _let_go(files: Iterable[SimulatedFile]) -> None:
    for file in files:
        file.let_go()


def _refuse(number: int) -> NoReturn:
    raise OSError(number, os.strerror(number))
