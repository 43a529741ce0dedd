"""The unix socket at a path: listening with the right permissions, connecting, peer credentials.

The provider listens there (`listen`), a consumer connects (`begin_connect`), and the provider
learns from the Linux kernel, not from the peer, who has connected (`PeerCredentials`).

The path is created with its final permissions, and takes no connection before everything about it
is in place. One that a dead provider left behind is taken over; one that is in use, or is no socket
at all, is left alone.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final, NamedTuple

from statemachine.errors import NamespaceError, SocketUnavailable

from .calls import syscall
from .channel import Channel, send_once
from .codec import encode_message
from .descriptors import Descriptor, Owner
from .framing import encode_frame

SOCKET_PATH_BYTES_MAX: Final = 107
"""Longest path of a socket, in bytes: `sun_path` has 108, one of them for the closing NUL."""

SOCKET_MODE: Final = 0o600
"""Permissions of the socket file, unless configured: its owner may connect."""

BACKLOG_CONNECTIONS: Final = 128
"""
How many connections may wait to be accepted before `connect` waits, or says EAGAIN.

As many as may come in one burst. Accepting is in the order of connecting, so more would
let a flood of connections make others wait for longer.
"""

SO_PEERPIDFD: Final = 77
"""Socket option (Linux 6.5): a pidfd of the process that connected."""

SIOCUNIXFILE: Final = 0x89E0
"""Request of a bound socket (Linux 4.13): a descriptor, close-on-exec, of its file."""

SO_PASSRIGHTS: Final = 83
"""Socket option (Linux 6.16): whether a peer may send descriptors; on by default."""

_UCRED: Final = struct.Struct("iII")  # pid, uid, gid
_TIMEVAL: Final = struct.Struct("ll")  # seconds, microseconds

_SHORTAGE: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
_NO_PEER_PIDFD: Final = frozenset(
    {errno.ENOPROTOOPT, errno.EINVAL, errno.ENODATA, errno.ESRCH, errno.EOPNOTSUPP}
)


class PeerCredentials(NamedTuple):
    """
    Who was at the other end when the connection was made, in the Linux kernel's words.

    A pid alone says nothing once its process has ended, because it is given out again. The pidfd
    keeps meaning the process that connected. The credentials own it.
    """

    pid: int
    """0 if the peer is in a PID namespace that cannot be seen from here."""
    uid: int
    gid: int
    pidfd: Descriptor | None
    """Close-on-exec, readable once the process has ended; None where Linux has none to give."""

    @classmethod
    def of(cls, sock: socket.socket, *, use_peerpidfd: bool = True) -> PeerCredentials:
        """
        Ask who is at the other end of a connected socket; the caller owns the result.

        Args:
            sock: Lent.
            use_peerpidfd: False does as on a Linux before 6.5.

        Raises:
            OSError: no descriptor is left for the pidfd (EMFILE, ENFILE), or the socket is not
                connected.

        Source:
            unix(7), SO_PEERCRED, SO_PEERPIDFD.
        """
        # Keeps PEER-1.
        pid, uid, gid = _ids_of(sock)
        return cls(pid, uid, gid, _peer_pidfd(sock) if use_peerpidfd else None)

    def close(self) -> None:
        """Close the pidfd, if there is one; may be called again."""
        if self.pidfd is not None:
            self.pidfd.close()


class Accepted(NamedTuple):
    """A new connection; the caller of `accept` owns both parts."""

    channel: Channel
    """Takes no descriptors: a provider never does."""
    credentials: PeerCredentials
    """To be checked before any effect."""

    def close(self) -> None:
        """Close the connection and the pidfd; may be called again."""
        with ExitStack() as stack:
            stack.callback(self.credentials.close)
            stack.callback(self.channel.close)


class Refused(NamedTuple):
    """A connection that was closed before anything was made for it."""

    uid: int | None = None
    """Who had connected; None if it had left already, without a word."""
    error: NamespaceError | None = None
    """What it was told, if it was there."""


def listen(
    path: str | os.PathLike[str],
    *,
    mode: int = SOCKET_MODE,
    gid: int | None = None,
    backlog: int = BACKLOG_CONNECTIONS,
    use_passrights: bool = True,
    use_peerpidfd: bool = True,
) -> Listener:
    """
    Open the endpoint; from the moment this returns, consumers can connect.

    There is no moment at which more may connect than `mode` and `gid` say, and no process-wide
    umask is touched: the mode is set on the socket before it has a name, and a socket that is
    bound and does not listen yet refuses every connection.

    Args:
        path: Where; its directory must exist. At most `SOCKET_PATH_BYTES_MAX` bytes.
        mode: Permissions of the socket file; who may write to it may connect.
        gid: Its group; None leaves the process's own.
        backlog: Most connections that wait to be accepted.
        use_passrights: False does as on a Linux before 6.16: descriptors that a consumer sends
            are dropped here, instead of refused where they are sent.
        use_peerpidfd: False does as on a Linux before 6.5.

    Returns:
        The listener; the caller owns it.

    Raises:
        SocketUnavailable: another provider listens there, something else than a socket is there,
            the directory does not exist, the path is too long, or Linux refuses. What was at the
            path is still there, unless it was a socket without a listener.

    Source:
        Seed 9-13. WIRE-1, WIRE-2. unix(7).
    """
    # Keeps WIRE-1, WIRE-2, CRASH-10.
    address = _address(path)
    try:
        with _sole_starter(address), ExitStack() as undo:
            sock = undo.enter_context(_stream_socket())
            syscall(os.fchmod, sock.fileno(), mode)
            with _open_reserve():  # so that what was bound can be opened, and so be removed again
                _bind(sock, address)
            with _open_bound(sock, address) as file:
                # By its descriptor, because the path may lead to another program's by now.
                inode = _inode_of(file)
                undo.callback(_unlink_if, address, inode)
                itself = f"/proc/self/fd/{file.fileno()}"
                if gid is not None:
                    syscall(os.chown, itself, -1, gid)
                syscall(os.chmod, itself, mode)  # bind() let the umask take bits away.
            if use_passrights:
                _refuse_descriptors(sock)
            syscall(sock.listen, backlog)
            listener = Listener(sock, address, inode, use_peerpidfd=use_peerpidfd)
            undo.pop_all()
            return listener
    except OSError as error:
        raise SocketUnavailable(_listen_fault(address, error)) from error


def begin_connect(path: str | os.PathLike[str], wait_s: float = 0.0) -> socket.socket:
    """
    Connect to the endpoint, or say why not.

    Args:
        path: where a provider listens.
        wait_s: how long to wait for room in a full backlog, in the order in which the Linux kernel
            lets waiting processes in; 0 does not wait, and a connection that is tried again and
            again comes after those of all that wait.

    Returns:
        A connected, non-blocking socket; the caller owns it. Connected means that the provider's
        backlog has taken it, not that the provider has looked at it.

    Raises:
        BlockingIOError: the backlog is full: a provider listens, and it is worth trying again.
        SocketUnavailable: there is no such path, it has no listener, or Linux refuses.

    Source:
        connect(2), "EAGAIN". socket(7), SO_SNDTIMEO. unix(7).
    """
    # Keeps SELF-1.
    address = _address(path)
    try:
        with ExitStack() as undo:
            sock = undo.enter_context(_stream_socket())
            if wait_s > 0:
                _connect_in_turn(sock, address, wait_s)
            else:
                syscall(sock.connect, str(address))
            undo.pop_all()
            return sock
    except BlockingIOError:
        raise
    except OSError as error:
        raise SocketUnavailable(_connect_fault(address, error)) from error


def _connect_in_turn(sock: socket.socket, address: Path, wait_s: float) -> None:
    """Connect a socket, waiting for room as long as is said; leave it non-blocking."""
    micros = max(1, round(wait_s * 1e6))  # zero would be for ever
    limit = _TIMEVAL.pack(*divmod(micros, 10**6))
    syscall(sock.setsockopt, socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
    sock.setblocking(True)
    try:
        syscall(sock.connect, str(address))
        # After a signal, Python takes a unix socket for connected that is not.
        syscall(sock.getpeername)
    except OSError as error:
        if error.errno != errno.ENOTCONN:
            raise
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN)) from error
    sock.setblocking(False)


def is_provider_visible(sock: socket.socket) -> bool:
    """
    Say whether the process that listens has a pid here: it is in our PID namespace or below it.

    A PID namespace can be entered from its own and from those above it. The provider makes its
    PID namespaces below its own; so those of one that has no pid here cannot be entered.

    Args:
        sock: Connected to it; lent.

    Source:
        unix(7), SO_PEERCRED; pid_namespaces(7), "setns(2)".
    """
    try:
        ucred = syscall(sock.getsockopt, socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    except OSError:
        return True  # nothing is proved
    pid, _, _ = _UCRED.unpack(ucred)
    return bool(pid)


class Listener(Owner):
    """
    The provider's end of the path; made by `listen`.

    When no descriptor is left to accept a connection with, the connection stays in the backlog
    and the listener readable, so that a driver would spin. Pausing would leave the consumer
    without an answer until its deadline. So a descriptor is kept in reserve: it is given up for
    the connection, which is told `SocketUnavailable` and closed, and then taken back.
    """

    __slots__ = ("_inode", "_path", "_reserve", "_sock", "_use_peerpidfd")

    def __init__(
        self, sock: socket.socket, path: Path, inode: tuple[int, int], *, use_peerpidfd: bool
    ) -> None:
        self._reserve = _open_reserve()
        self._sock = sock
        self._path = path
        self._inode = inode
        self._use_peerpidfd = use_peerpidfd

    @property
    def path(self) -> Path:
        """Where consumers connect."""
        return self._path

    @property
    def is_starved(self) -> bool:
        """
        Whether even the reserve is gone: another thread took it while it was given up.

        The driver then waits for a descriptor to be closed before it waits on the listener again.
        """
        return self._reserve.closed

    def fileno(self) -> int:
        """
        Lend the socket's number, to wait on: readable means that a connection waits.

        Raises:
            ValueError: the listener is closed.
        """
        if self._sock.fileno() < 0:
            raise ValueError("the listener is closed")
        return self._sock.fileno()

    def accept(self) -> Accepted | None:
        """
        Take the next connection.

        Returns:
            The connection, which the caller owns; None if none waits, or if no descriptor was
            left for it and it has been turned away.

        Raises:
            ValueError: the listener is closed.
            OSError: the listener is broken; shortage, and a peer that is gone, are no errors.

        Source:
            accept(2).
        """
        sock = self._accept_next()
        return None if sock is None else self._accepted(sock)

    def accept_if(
        self, objection_to: Callable[[int], NamespaceError | None]
    ) -> Accepted | Refused | None:
        """
        Take the next connection, or close it before anything is made for it.

        Args:
            objection_to: says why a user's connection is refused, or None if it is not.

        Returns:
            As `accept`; and what was closed, because it was refused or its peer had left already.

        Raises:
            ValueError, OSError: as `accept`.
        """
        # Keeps PEER-15.
        sock = self._accept_next()
        if sock is None:
            return None
        if _has_left(sock):
            sock.close()
            return Refused()
        try:
            uid = _ids_of(sock)[1]
        except OSError:
            _turn_away(sock)
            return None
        objection = objection_to(uid)
        if objection is None:
            return self._accepted(sock)
        _turn_away(sock, objection)
        return Refused(uid, objection)

    def close(self) -> None:
        """
        Stop listening, and remove the path if it is still this listener's; may be called again.

        Connections that were not accepted are reset; accepted ones live on.
        """
        with ExitStack() as stack:
            stack.callback(self._reserve.close)
            stack.callback(self._sock.close)
            # While the socket is open its inode cannot be given to another file; so first the
            # path, then the socket.
            if self._sock.fileno() >= 0:
                stack.callback(_unlink_if, self._path, self._inode)

    def __repr__(self) -> str:
        state = "closed" if self._sock.fileno() < 0 else "listening"
        return f"<Listener on {self._path}: {state}>"

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _accept_next(self) -> socket.socket | None:
        # Keeps PEER-11.
        self.fileno()
        try:
            sock, _ = syscall(self._sock.accept)
        except (BlockingIOError, ConnectionAbortedError):
            return None
        except OSError as error:
            if error.errno not in _SHORTAGE:
                raise
            self._turn_away_next()
            return None
        return sock

    def _accepted(self, sock: socket.socket) -> Accepted | None:
        try:
            credentials = PeerCredentials.of(sock, use_peerpidfd=self._use_peerpidfd)
        except OSError:
            # A peer that cannot be told from another is not served.
            _turn_away(sock)
            return None
        return Accepted(Channel(sock, accepts_descriptors=False), credentials)

    def _turn_away_next(self) -> None:
        self._reserve.close()
        try:
            with suppress(OSError):
                sock, _ = syscall(self._sock.accept)
                _turn_away(sock)
        finally:
            with suppress(OSError):
                self._reserve = _open_reserve()


def _address(path: str | os.PathLike[str]) -> Path:
    address = Path(path)
    path_bytes = len(os.fsencode(address))
    if path_bytes > SOCKET_PATH_BYTES_MAX:
        raise SocketUnavailable(
            f"{address}: the path has {path_bytes} bytes; a socket's has {SOCKET_PATH_BYTES_MAX}"
        )
    # An empty path, or one that begins with NUL, would make an abstract socket: one without a
    # file, and so without permissions.
    if not address.name or "\0" in str(address):
        raise SocketUnavailable(f"{str(path)!r} is not the path of a socket")
    return address


def _stream_socket() -> socket.socket:
    sock = syscall(socket.socket, socket.AF_UNIX, socket.SOCK_STREAM)
    sock.setblocking(False)
    return sock


def _refuse_descriptors(sock: socket.socket) -> None:
    # Accepted sockets inherit it. A Linux that does not know it leaves the refusal to Channel.
    # Keeps FD-11.
    with suppress(OSError):
        syscall(sock.setsockopt, socket.SOL_SOCKET, SO_PASSRIGHTS, 0)


def _ids_of(sock: socket.socket) -> tuple[int, int, int]:
    """Return the pid, uid and gid of who is at the other end."""
    ucred = syscall(sock.getsockopt, socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    pid, uid, gid = _UCRED.unpack(ucred)
    return pid, uid, gid


def _has_left(sock: socket.socket) -> bool:
    """Say whether a peer has closed its end and has said nothing."""
    try:
        return not syscall(sock.recv, 1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except OSError:
        return False


def _peer_pidfd(sock: socket.socket) -> Descriptor | None:
    try:
        return Descriptor(syscall(sock.getsockopt, socket.SOL_SOCKET, SO_PEERPIDFD))
    except OSError as error:
        if error.errno not in _NO_PEER_PIDFD:
            raise
        return None


def _open_reserve() -> Descriptor:
    return Descriptor(syscall(os.open, os.devnull, os.O_RDONLY | os.O_CLOEXEC))


_SHORT: Final = SocketUnavailable("the provider has no file descriptor left")


def _turn_away(sock: socket.socket, error: NamespaceError = _SHORT) -> None:
    # Keeps PEER-15.
    # Nothing is made for it: a flood of these must cost next to nothing.
    with sock, suppress(OSError):
        sock.setblocking(False)
        send_once(sock, encode_frame(encode_message(error)))


# The path: who has it, and taking it over from a provider that died.


@contextmanager
def _sole_starter(path: Path) -> Iterator[None]:
    # Between asking whether a provider listens and removing the file, another one could put its
    # own there, and lose it. So only one at a time may start on a path. The lock is a file that
    # only its owner can open: a lock on the directory could be held by all who may read it.
    lock_path = path.with_name(f".{path.name}.lock")
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    while True:
        with Descriptor(syscall(os.open, lock_path, flags, 0o600)) as lock:
            try:
                syscall(fcntl.flock, lock.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise SocketUnavailable(f"another provider is starting on {path}") from error
            # Guard: the start lock is a lock.
            if syscall(os.fstat, lock.fileno()).st_size:
                raise SocketUnavailable(f"{lock_path} is another program's; it is left alone")
            # The one that had the lock before has removed the file, so it may not be at its path
            # any more; then the lock excludes nothing.
            # Guard: the start lock is still at its path.
            if not _is_at(lock_path, lock):
                continue
            try:
                yield
            finally:
                # Another program may have put its own there: then it excludes others by that.
                # Guard: the start lock is removed by who has it.
                if _is_at(lock_path, lock):
                    syscall(lock_path.unlink, missing_ok=True)
            return


def _is_at(path: Path, descriptor: Descriptor) -> bool:
    with suppress(FileNotFoundError):
        ours = syscall(os.fstat, descriptor.fileno())
        return os.path.samestat(syscall(path.lstat), ours)  # the path last: it can change
    return False


def _bind(sock: socket.socket, path: Path) -> None:
    # Keeps WIRE-2.
    try:
        syscall(sock.bind, str(path))
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        _remove_stale(path)
        syscall(sock.bind, str(path))


def _remove_stale(path: Path) -> None:
    # Guard: what is no socket is left alone.
    if not syscall(path.is_socket) or syscall(path.is_symlink):
        raise SocketUnavailable(f"{path} is not a socket; it is left alone")
    # Guard: who listens is left alone.
    if _is_listening(path):
        raise SocketUnavailable(f"another process listens on {path}")
    syscall(path.unlink)


def _is_listening(path: Path) -> bool:
    with _stream_socket() as probe:
        try:
            syscall(probe.connect, str(path))
        except ConnectionRefusedError:
            return False
        except OSError as error:
            # Alive as well: its backlog is full, or it is a socket of another type.
            if error.errno not in (errno.EAGAIN, errno.EPROTOTYPE):
                raise
    return True


def _open_bound(sock: socket.socket, path: Path) -> Descriptor:
    """
    Open the file that a socket was bound to, as a place: O_PATH.

    Source:
        unix(7) does not have SIOCUNIXFILE (Linux 4.13); it needs CAP_NET_ADMIN.
    """
    try:
        return Descriptor(syscall(fcntl.ioctl, sock.fileno(), SIOCUNIXFILE))
    except OSError:
        # What is at its path, then: it was bound a moment ago.
        return Descriptor(syscall(os.open, path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC))


def _inode_of(file: Path | Descriptor) -> tuple[int, int]:
    if isinstance(file, Descriptor):
        status = syscall(os.fstat, file.fileno())
    else:
        status = syscall(file.lstat)
    return status.st_dev, status.st_ino


def _unlink_if(path: Path, inode: tuple[int, int]) -> None:
    with suppress(FileNotFoundError):
        # Guard: the socket that is removed is ours.
        if _inode_of(path) == inode:
            syscall(path.unlink)


def _listen_fault(path: Path, error: OSError) -> str:
    match error.errno:
        case errno.ENOENT:
            return f"{path}: the directory {path.parent} does not exist; create it first"
        case _:
            return f"cannot listen on {path}: {error.strerror}"


def _connect_fault(path: Path, error: OSError) -> str:
    match error.errno:
        case errno.ENOENT:
            return f"{path} does not exist"
        case errno.ECONNREFUSED:
            return f"no process listens on {path}"
        case _:
            return f"cannot connect to {path}: {error.strerror}"
