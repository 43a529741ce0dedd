"""The other side of a connection, made by hand: exact bytes, exact descriptors, exact moments.

A `Line` is one end of a connection that says whatever a test wants, also what no provider and no
consumer would say, and writes down what it hears. A `Liar` listens where a provider would and has a
script for every connection. What it tells about descriptors may be a lie; the sockets, descriptors
and namespaces are real.
"""

from __future__ import annotations

import itertools
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Final, TypeAlias

from statemachine.messages import AllocationEnded, Message, NamespaceResponse

from ..channel import receive_once, send_once
from ..codec import decode_message, encode_message
from ..descriptors import Descriptor, DescriptorBundle, close_all
from ..framing import HEADER_BYTES, encode_frame

DEADLINE_S: Final = float(os.environ.get("NSHANDOFF_DEADLINE_S", "20"))
"""How long a test waits for what must happen, which takes a millisecond; longer on an emulator."""

POLL_S: Final = 0.002


def wait_until(happened: Callable[[], object], what: str = "it") -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not happened():
        assert time.monotonic() < deadline, f"{what} did not come true"
        time.sleep(POLL_S)


def frame_of(message: Message) -> bytes:
    return encode_frame(encode_message(message))


def copies_of(fds: Sequence[int]) -> int:
    """How many descriptors this process has of the files behind some; of each at least one."""
    files = {_file_behind(fd) for fd in fds}
    return sum(_file_behind(int(name)) in files for name in os.listdir("/proc/self/fd"))


def _file_behind(fd: int) -> tuple[int, int] | None:
    try:
        status = os.fstat(fd)
    except OSError:
        return None  # It was the listing's own.
    return status.st_dev, status.st_ino


class Line:
    """One end of a connection; blocks, but not for ever."""

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(DEADLINE_S)
        self.sock = sock
        self.heard: list[Message] = []
        self.is_over = threading.Event()
        """Whether everything was heard that the other end will ever say."""
        self._descriptors: list[Descriptor] = []

    @classmethod
    def to(cls, path: Path) -> Line:
        """Connect, as soon as there is room in the backlog."""
        with ExitStack() as undo:
            sock = undo.enter_context(socket.socket(socket.AF_UNIX))
            sock.connect(str(path))
            undo.pop_all()
        return cls(sock)

    def say(self, what: Message | bytes, fds: Sequence[int] = ()) -> None:
        """Send, with descriptors coming along with the first byte; all in one `sendmsg`."""
        data = what if isinstance(what, bytes) else frame_of(what)
        sent = send_once(self.sock, data, fds)
        if sent < len(data):
            self.sock.sendall(data[sent:])

    def hear(self) -> Message | None:
        """The next message, or None when the other end has hung up."""
        self._drop_descriptors()
        header = self._read(HEADER_BYTES)
        if header is None:
            self.is_over.set()
            return None
        body = self._read(int.from_bytes(header, "big"))
        assert body is not None, "hung up in the middle of a frame"
        message = decode_message(body)
        self.heard.append(message)
        return message

    def ask(self, what: Message | bytes) -> Message | None:
        """Say something, and take the next message for the answer."""
        self.say(what)
        return self.hear()

    def hears_nothing(self) -> bool:
        """Whether nothing has arrived by now."""
        return not select.select([self.sock], [], [], 0)[0]

    def hear_rest(self) -> list[Message]:
        """Everything until the other end hangs up."""
        rest = []
        while (message := self.hear()) is not None:
            rest.append(message)
        return rest

    def take(self) -> DescriptorBundle:
        """The descriptors that came with the last message, which was a response."""
        response = self.heard[-1]
        assert isinstance(response, NamespaceResponse)
        taken, self._descriptors = self._descriptors, []
        return DescriptorBundle(response.fd_types, taken)

    def hang_up(self) -> None:
        self._drop_descriptors()
        # A thread that waits in `recv` of a closed socket would wait on.
        with suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)
        self.sock.close()

    def __enter__(self) -> Line:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.hang_up()

    def _read(self, size: int) -> bytes | None:
        data = b""
        while len(data) < size:
            try:
                reception = receive_once(self.sock, size - len(data), 8)
            except ConnectionResetError:
                return None
            self._descriptors += reception.descriptors
            if not reception.data:
                return None
            data += reception.data
        return data

    def _drop_descriptors(self) -> None:
        dropped, self._descriptors = self._descriptors, []
        close_all(dropped)


Script: TypeAlias = Callable[[Line], None]
"""What is done on one connection, once it is accepted. Afterwards the rest is heard."""


def confirm_ends(line: Line) -> None:
    """Be a provider that has nothing but ends to confirm."""
    while (message := line.hear()) is not None:
        if isinstance(message, AllocationEnded):
            line.say(message)


class Liar:
    """
    Something that listens where a provider would.

    Args:
        path: where.
        scripts: one for each connection, in order; further ones are confirmed their ends.
        backlog: as in listen(2).
    """

    def __init__(self, path: Path, *scripts: Script, backlog: int = 64) -> None:
        self._scripts = itertools.chain(scripts, itertools.repeat(confirm_ends))
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(backlog)
        self._threads: list[threading.Thread] = []
        self._errors: list[BaseException] = []
        self.lines: list[Line] = []

    def stop_listening(self) -> None:
        """Accept no more; further connections are refused."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)

    def told(self, number: int) -> list[Message]:
        """What was heard on a connection, once it is over."""
        wait_until(lambda: len(self.lines) > number, f"connection {number}")
        assert self.lines[number].is_over.wait(DEADLINE_S), f"connection {number} stays open"
        return self.lines[number].heard

    def __enter__(self) -> Liar:
        self._start(self._accept)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop_listening()
        self._threads[0].join(DEADLINE_S)
        for line in self.lines:
            with suppress(OSError):
                line.sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(DEADLINE_S)
        for line in self.lines:
            line.hang_up()
        self._listener.close()
        if error is None and self._errors:
            raise self._errors[0]

    def _start(self, target: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        for script in self._scripts:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            line = Line(sock)
            self.lines.append(line)
            self._start(self._play, script, line)

    def _play(self, script: Script, line: Line) -> None:
        try:
            # A consumer hangs up on a liar, as it should; what it said before can be read.
            with suppress(BrokenPipeError, ConnectionResetError):
                script(line)
            if line.sock.fileno() >= 0:
                line.hear_rest()
        except BaseException as error:
            self._errors.append(error)
        finally:
            line.is_over.set()
