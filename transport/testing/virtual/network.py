"""The sockets of a virtual world: real ones, and a record of what went through them.

`VirtualNetwork.hook` stands in `transport.calls.syscall`. It knows which accepted socket belongs to
which connected one, says whose it is, cuts reads and writes short where a scheduler says so, and
tells a provider's rules what was read and sent.
"""

from __future__ import annotations

import array
import os
import socket
import struct
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Protocol

from statemachine.messages import Message

from ...codec import decode_message
from .world import VirtualWorld

_UCRED = struct.Struct("iII")


class FrameStream:
    """One direction of a connection, cut into frames."""

    def __init__(self) -> None:
        self.count = 0
        """How many frames were whole so far."""
        self.rest = b""
        """The frame that is not whole."""

    def feed(self, data: bytes) -> list[bytes]:
        """Take in bytes; return the bodies of the frames that are whole now."""
        self.rest += data
        bodies = []
        while len(self.rest) >= 4:
            end = 4 + int.from_bytes(self.rest[:4], "big")
            if len(self.rest) < end:
                break
            bodies.append(self.rest[4:end])
            self.rest = self.rest[end:]
            self.count += 1
        return bodies


class VirtualConnection:
    """A connection, as seen from outside."""

    def __init__(self, who: str, uid: int, client: socket.socket) -> None:
        self.who = who
        self.uid = uid
        self.client = client
        self.served: socket.socket | None = None
        """The provider's end, once it is accepted."""
        self.number: int | None = None
        """What the provider calls it."""
        self.said = FrameStream()
        self.read = FrameStream()
        self.sent = FrameStream()
        self.said_messages: list[Message] = []
        """What its client has said whole."""
        self.sent_messages: list[Message] = []
        """What the provider has sent whole."""
        self.due_of_client: list[Message] = []
        """What its client's kernel has decided to say."""
        self.fed = 0
        """How many of the provider's messages its client's kernels have been fed."""
        self.left_before: list[VirtualConnection] = []
        """The connections of the same client that it had closed before."""
        self.unfed: deque[Message | None] = deque()
        """What the provider has read whole and not fed to its kernel; None: no message."""

    @property
    def has_left(self) -> bool:
        """Whether the client's end is closed."""
        return self.client.fileno() < 0

    def __repr__(self) -> str:
        return f"{self.who}'s connection {self.number}"


class WireRules(Protocol):
    """Told of what a provider does with its sockets."""

    def note_said(self, link: VirtualConnection) -> None: ...
    def note_read(self, link: VirtualConnection) -> None: ...
    def note_leaving(self, link: VirtualConnection, inodes: list[int]) -> None: ...
    def note_sent(self, link: VirtualConnection, message: Message) -> None: ...


class VirtualNetwork:
    """
    Knows all connections.

    Args:
        world: makes its choices.
        cuts: whether a provider's reads and writes can be short.
        room: how much may wait in a connection for its peer to read; None for what is usual.
    """

    def __init__(self, world: VirtualWorld, *, cuts: bool = False, room: int | None = None) -> None:
        self.rules: WireRules | None = None
        self.links: list[VirtualConnection] = []
        self.uids: dict[str, int] = {}
        """Whose each client is; by default this process's."""
        self.who = ""
        """Which client connects; by default the thread that does."""
        self._world = world
        self._cuts = cuts
        self._room = room
        self._waiting: deque[VirtualConnection] = deque()
        self._clients: dict[socket.socket, VirtualConnection] = {}
        self._served: dict[socket.socket, VirtualConnection] = {}
        self._full: set[socket.socket] = set()
        world.after_step.append(self._full.clear)

    def of_served(self, sock: socket.socket) -> VirtualConnection:
        """Find the connection of a provider's socket."""
        return self._served[sock]

    def of_client(self, sock: socket.socket) -> VirtualConnection:
        """Find the connection of a client's socket."""
        return self._clients[sock]

    def reset(self) -> None:
        """Forget what waits to be accepted: the listener is closed."""
        self._waiting.clear()

    def hook(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """Make a system call, as `transport.calls.SyscallHook`."""
        special = _CALLS.get(getattr(function, "__name__", ""))
        sock = getattr(function, "__self__", None)
        if special is None or not isinstance(sock, socket.socket):
            return function(*args, **kwargs)
        running = self._world.running
        if running is not None and getattr(running.program, "steps_at_calls", False):
            self._world.switch(f"calls {function.__name__}")
        return special(self, function, sock, args)

    def _connect(self, function: Any, sock: socket.socket, args: tuple[Any, ...]) -> None:
        function(*args)
        running = self._world.running
        who = self.who or (running.name if running is not None else "?")
        link = VirtualConnection(who, self.uids.get(who, os.geteuid()), sock)
        link.left_before += [each for each in self.links if each.who == who and each.has_left]
        self.links.append(link)
        self._waiting.append(link)
        self._clients[sock] = link

    def _accept(self, function: Any, _: socket.socket, args: tuple[Any, ...]) -> Any:
        accepted = function(*args)
        link = self._waiting.popleft()
        link.served = accepted[0]
        self._served[accepted[0]] = link
        if self._room is not None:
            accepted[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self._room)
        return accepted

    def _getsockopt(self, function: Any, sock: socket.socket, args: tuple[Any, ...]) -> Any:
        result = function(*args)
        link = self._served.get(sock)
        if link is not None and args[1] == socket.SO_PEERCRED:
            pid, _, gid = _UCRED.unpack(result)
            return _UCRED.pack(pid, link.uid, gid)
        return result

    def _sendmsg(self, function: Any, sock: socket.socket, args: tuple[Any, ...]) -> int:
        data, ancillary = bytes(args[0][0]), args[1]
        served = self._served.get(sock)
        if served is None:
            sent: int = function(*args)
            said = self._clients.get(sock)
            if said is not None:
                for body in said.said.feed(data[:sent]):
                    with suppress(Exception):
                        said.said_messages.append(decode_message(body))
                if self.rules is not None:
                    self.rules.note_said(said)
            return sent
        if sock in self._full:
            raise BlockingIOError
        how = self._choose("writes one byte", "finds no room")
        if how == 2:
            self._full.add(sock)
            raise BlockingIOError
        if how == 1 and len(data) > 1:
            self._full.add(sock)
            data = data[:1]
        assert self.rules is not None
        fds = array.array("i")
        for *_, content in ancillary:
            fds.extend(content)
        inodes = [os.fstat(fd).st_ino for fd in fds]
        sent = function([data], *args[1:])
        if not served.sent.rest:
            self.rules.note_leaving(served, inodes)
        elif inodes:
            raise AssertionError(f"{served}: descriptors leave in the middle of a frame")
        for body in served.sent.feed(data[:sent]):
            served.sent_messages.append(decode_message(body))
            self.rules.note_sent(served, served.sent_messages[-1])
        return sent

    def _recvmsg(self, function: Any, sock: socket.socket, args: tuple[Any, ...]) -> Any:
        served = self._served.get(sock)
        if served is None:
            return function(*args)
        if self._choose("reads one byte"):
            args = (1, *args[1:])
        result = function(*args)
        assert self.rules is not None
        for body in served.read.feed(result[0]):
            message = None
            with suppress(Exception):
                message = decode_message(body)
            served.unfed.append(message)
        self.rules.note_read(served)
        return result

    def _choose(self, *others: str) -> int:
        return self._world.choose("", *others) if self._cuts else 0


_CALLS: dict[str, Callable[..., Any]] = {
    "connect": VirtualNetwork._connect,
    "accept": VirtualNetwork._accept,
    "getsockopt": VirtualNetwork._getsockopt,
    "sendmsg": VirtualNetwork._sendmsg,
    "recvmsg": VirtualNetwork._recvmsg,
}
