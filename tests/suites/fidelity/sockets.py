"""The descriptors of one process and socket pairs in it: simulated, and on Linux."""

from __future__ import annotations

import contextlib
import fcntl
import os
import resource
import socket
from collections.abc import Iterator
from typing import Final, TypeAlias

from tests.suites.fidelity.machines import OPEN_TO_READ, Operation, SimulatedMachine
from tests.suites.fidelity.socket_model import SimulatedFile, SimulatedSocket, SimulatedTable

FILES: Final = 4
"""How many files there are to be opened."""

WINDOW: Final = 10
"""How many numbers of descriptors a process of these tests has, at most."""

PASSRIGHTS: Final = 83
"""SO_PASSRIGHTS of asm-generic/socket.h (6.16)."""

ROOM_BYTES: Final = 65_536
"""What always fits into the buffer of a new socket."""

Label: TypeAlias = str
"""Which file a descriptor refers to: `file 0`, `socket 1a`."""

Come: TypeAlias = tuple[int, Label, bool]
"""A descriptor that was received: its number, which file it is, whether it is inherited."""


class _Sockets:
    """The descriptors of one process, numbered from 0, and socket pairs in it."""

    _sends = 0

    def _letters(self, count: int) -> bytes:
        self._sends += 1
        return b"%c" % (64 + self._sends % 64) * count

    def _would_loop(self, fd: int, fds: tuple[int, ...]) -> bool:
        """
        Whether a socket would be in flight where it might wait for itself.

        Linux finds those, but later; that is not simulated, and so it is not done here: a socket
        travels only over one of an earlier pair.
        """
        carrier = self._pair_of(fd)
        return carrier >= 0 and any(0 <= self._pair_of(each) <= carrier for each in set(fds))

    def _pair_of(self, fd: int) -> int:
        try:
            sort, number = self._label(fd).split()
        except OSError:
            return -1
        return int(number[:-1]) if sort == "socket" else -1


class SimulatedSockets(SimulatedMachine, _Sockets):
    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.process = SimulatedTable(WINDOW)
        self._files: list[SimulatedFile] = []
        self._labels: dict[SimulatedFile, Label] = {}
        self._pairs = self._sends = 0

    def told(self, call: Operation, answer: object) -> None:
        """Learn from Linux how much room there was, once that is not certain."""
        self.process.room = None
        if call.name == "send" and self._is_crowded(*call.arguments[:2]):
            if isinstance(answer, int) and answer >= 0:
                self.process.room = answer
            elif answer == "EAGAIN":
                self.process.room = 0

    def _is_crowded(self, fd: int, count: int) -> bool:
        if fd not in self.process.fds:
            return False
        end = self.process.file(fd)
        return isinstance(end, SimulatedSocket) and end.peer.queued_bytes + count > ROOM_BYTES

    def open(self) -> int:
        if len(self._files) == FILES:
            return -1
        file = SimulatedFile()
        fd = self.process.open(file)
        self._labels[file] = f"file {len(self._files)}"
        self._files.append(file)
        return fd

    def pair(self) -> tuple[int, int]:
        fds = self.process.pair()
        for fd, side in zip(fds, "ab", strict=True):
            self._labels[self.process.file(fd)] = f"socket {self._pairs}{side}"
        self._pairs += 1
        return fds

    def duplicate(self, fd: int) -> int:
        return self.process.duplicate(fd)

    def close_fd(self, fd: int) -> None:
        self.process.close(fd)

    def limit(self, descriptors_max: int) -> None:
        """Set RLIMIT_NOFILE."""
        self.process.descriptors_max = descriptors_max

    def send(self, fd: int, count: int, fds: tuple[int, ...] = ()) -> int:
        """Send some bytes, of another letter each time, and descriptors; -1 if it is not tried."""
        if self._would_loop(fd, fds):
            return -1
        data = self._letters(count)
        return self.process.send(fd, data, fds)

    def receive(
        self,
        fd: int,
        size: int,
        control_bytes: int = 0,
        is_peek: bool = False,
        is_inherited: bool = False,
    ) -> tuple[bytes, list[Come], bool]:
        data, fds, is_truncated = self.process.receive(
            fd, size, control_bytes, is_peek=is_peek, is_inherited=is_inherited
        )
        come = [(each, self._label(each), self.process.is_inherited(each)) for each in fds]
        return data, come, is_truncated

    def read(self, fd: int, size: int) -> bytes:
        """Read as a program does that does not expect descriptors: recv(2)."""
        return self.process.receive(fd, size).data

    def shutdown(self, fd: int, how: int) -> None:
        self.process.shutdown(fd, how)

    def accept_rights(self, fd: int, are_taken: bool) -> None:
        self.process.accept_rights(fd, are_taken)

    def table(self) -> list[tuple[int, Label]]:
        return [(fd, self._label(fd)) for fd in self.process.fds]

    def alive(self) -> list[Label]:
        """Which files are open: in the table, or in flight."""
        return [self._labels[file] for file in self._files if file.is_alive]

    def _label(self, fd: int) -> Label:
        return self._labels[self.process.file(fd)]


class LinuxSockets(_Sockets):
    """
    The numbers 0, 1, … are this process' numbers from `_first` on; all below are in use.

    A file is the writing end of a pipe: whether it is open anywhere, its reading end tells.
    """

    def __init__(self) -> None:
        self._limits: Final = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._low: Final = _fill_holes(2 * FILES)
        self._first: Final = max(self._low) + 1
        self._readers: Final = self._low[:FILES]
        self._writers: Final = self._low[FILES : 2 * FILES]
        # Only views: they stay when the number means something else, and each call says what.
        self._views: Final = [socket.socket(socket.AF_UNIX) for _ in range(WINDOW)]
        self._labels: dict[int, Label] = {}
        self._used = FILES
        self._pairs = 0
        self.reset()

    def reset(self) -> None:
        os.closerange(self._first, self._first + WINDOW)
        resource.setrlimit(resource.RLIMIT_NOFILE, self._limits)
        for number in range(self._used):
            self._make_file(number)
        self._labels.clear()
        self._used = self._pairs = self._sends = 0
        self.limit(WINDOW)

    def close(self) -> None:
        for view in self._views:
            view.detach()
        os.closerange(self._first, self._first + WINDOW)
        resource.setrlimit(resource.RLIMIT_NOFILE, self._limits)
        for fd in self._low:
            with contextlib.suppress(OSError):
                os.close(fd)

    def _make_file(self, number: int) -> None:
        reader, writer = os.pipe()
        os.dup2(reader, self._readers[number], inheritable=False)
        os.dup2(writer, self._writers[number], inheritable=False)
        os.close(reader)
        os.close(writer)
        os.set_blocking(self._readers[number], False)

    def open(self) -> int:
        if self._used == FILES:
            return -1
        writer = self._writers[self._used]
        fd = os.dup(writer)
        self._labels[os.fstat(fd).st_ino] = f"file {self._used}"
        os.dup2(self._readers[self._used], writer, inheritable=False)  # the number stays in use
        self._used += 1
        return fd - self._first

    def pair(self) -> tuple[int, int]:
        ends = socket.socketpair()
        one, other = (end.detach() for end in ends)
        for fd, side in ((one, "a"), (other, "b")):
            self._labels[os.fstat(fd).st_ino] = f"socket {self._pairs}{side}"
        self._pairs += 1
        return one - self._first, other - self._first

    def duplicate(self, fd: int) -> int:
        return os.dup(self._first + fd) - self._first

    def close_fd(self, fd: int) -> None:
        os.close(self._first + fd)

    def limit(self, descriptors_max: int) -> None:
        soft = self._first + descriptors_max
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, self._limits[1]))

    def send(self, fd: int, count: int, fds: tuple[int, ...] = ()) -> int:
        if self._would_loop(fd, fds):
            return -1
        data = self._letters(count)
        ancillary = []
        if fds:
            numbers = b"".join((self._first + each).to_bytes(4, "little") for each in fds)
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, numbers)]
        flags = socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT
        return self._views[fd].sendmsg([data], ancillary, flags)

    def receive(
        self,
        fd: int,
        size: int,
        control_bytes: int = 0,
        is_peek: bool = False,
        is_inherited: bool = False,
    ) -> tuple[bytes, list[Come], bool]:
        flags = socket.MSG_DONTWAIT
        flags |= socket.MSG_PEEK if is_peek else 0
        flags |= 0 if is_inherited else socket.MSG_CMSG_CLOEXEC
        data, ancillary, flags, _ = self._views[fd].recvmsg(size, control_bytes, flags)
        numbers = b"".join(content for _, _, content in ancillary)
        come = [
            self._come(int.from_bytes(numbers[at : at + 4], "little"))
            for at in range(0, len(numbers), 4)
        ]
        return data, come, bool(flags & socket.MSG_CTRUNC)

    def _come(self, fd: int) -> Come:
        is_inherited = not fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
        return fd - self._first, self._label(fd - self._first), is_inherited

    def _label(self, fd: int) -> Label:
        return self._labels[os.fstat(self._first + fd).st_ino]

    def read(self, fd: int, size: int) -> bytes:
        return self._views[fd].recv(size, socket.MSG_DONTWAIT)

    def shutdown(self, fd: int, how: int) -> None:
        self._views[fd].shutdown(how)

    def accept_rights(self, fd: int, are_taken: bool) -> None:
        self._views[fd].setsockopt(socket.SOL_SOCKET, PASSRIGHTS, int(are_taken))

    def table(self) -> list[tuple[int, Label]]:
        found = []
        for number in range(WINDOW):
            with contextlib.suppress(OSError):
                found.append((number, self._label(number)))
        return found

    def alive(self) -> list[Label]:
        return [f"file {number}" for number in range(self._used) if self._is_alive(number)]

    def _is_alive(self, number: int) -> bool:
        try:
            return os.read(self._readers[number], 1) != b""
        except BlockingIOError:
            return True


Sockets: TypeAlias = SimulatedSockets | LinuxSockets


def _fill_holes(least: int) -> list[int]:
    """Open something at every free number below the highest that is in use, and some above."""
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    fillers = [os.open(os.devnull, OPEN_TO_READ)]
    while max(fillers) <= highest or len(fillers) < least:
        fillers.append(os.open(os.devnull, OPEN_TO_READ))
    return fillers


@contextlib.contextmanager
def linux_sockets() -> Iterator[LinuxSockets]:
    machine = LinuxSockets()
    try:
        yield machine
    finally:
        machine.close()
