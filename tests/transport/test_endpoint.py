"""The path: who may connect, who is there, and what happens to what a dead provider left."""

from __future__ import annotations

import errno
import fcntl
import os
import select
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from statemachine.errors import SocketUnavailable
from statemachine.messages import AllocationEnded, NamespaceRequest
from tests.support.scarcity import descriptors_left
from transport import endpoint
from transport.channel import Channel, Delivery, Lost, Rejected, receive_once, send_once
from transport.codec import encode_message
from transport.descriptors import Descriptor
from transport.endpoint import (
    SO_PASSRIGHTS,
    SO_PEERPIDFD,
    SOCKET_PATH_BYTES_MAX,
    Accepted,
    Listener,
    PeerCredentials,
    begin_connect,
    listen,
)
from transport.framing import encode_frame

ENDED = AllocationEnded("a")
FRAME = encode_frame(encode_message(ENDED))


@pytest.fixture
def path() -> Iterator[Path]:
    """Where to listen: short, because a socket's path is."""
    directory = Path(tempfile.mkdtemp(prefix="nsh-"))
    yield directory / "handoff.sock"
    shutil.rmtree(directory)


@pytest.fixture
def listener(path: Path) -> Iterator[Listener]:
    with listen(path) as opened:
        yield opened


def connect(path: Path) -> Channel:
    return Channel(begin_connect(path), accepts_descriptors=True)


def accept(listener: Listener) -> Accepted:
    accepted = listener.accept()
    assert accepted is not None
    return accepted


def permissions(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def leave_stale_socket(path: Path) -> int:
    """Do as a provider that was killed; returns the inode of what it left."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        dead.bind(str(path))
        dead.listen()
    return path.stat().st_ino


def has_option(option: int) -> bool:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        try:
            value = ours.getsockopt(socket.SOL_SOCKET, option)
        except OSError as error:
            if error.errno != errno.ENOPROTOOPT:
                raise
            return False
    if option == SO_PEERPIDFD:
        os.close(value)
    return True


@pytest.mark.clause("WIRE-1")
def test_basic_connection(listener: Listener, path: Path) -> None:
    assert listener.path == path
    assert listener.accept() is None
    with connect(path) as consumer:
        assert select.select([listener], [], [], 1)[0]
        accepted = accept(listener)
        try:
            consumer.send(ENDED)
            (delivery,) = accepted.channel.receive()
            assert isinstance(delivery, Delivery)
            assert delivery.message == ENDED
            accepted.channel.send(ENDED)
            assert len(consumer.receive()) == 1
        finally:
            accepted.close()
        assert listener.accept() is None


# The path.


@pytest.mark.parametrize("umask", [0, 0o022, 0o077, 0o777])
@pytest.mark.parametrize("mode", [0o600, 0o660, 0o666])
def test_the_mode_is_what_was_asked_for_whatever_the_umask(
    path: Path, umask: int, mode: int
) -> None:
    before = os.umask(umask)
    try:
        with listen(path, mode=mode):
            assert os.umask(umask) == umask, "the files of others are not touched"
            assert permissions(path) == mode
    finally:
        os.umask(before)


@pytest.mark.clause("WIRE-2")
def test_the_mode_is_for_the_owner_alone_by_default(listener: Listener, path: Path) -> None:
    assert permissions(path) == 0o600
    assert stat.S_ISSOCK(path.stat().st_mode)


@pytest.mark.clause("WIRE-2")
def test_there_is_no_moment_with_wider_permissions(path: Path) -> None:
    # Seen at the one moment at which there is a name, and nothing has been adjusted yet.
    seen: list[int] = []

    class Watched(socket.socket):
        def __init__(self) -> None:
            super().__init__(socket.AF_UNIX, socket.SOCK_STREAM)
            self.setblocking(False)

        def bind(self, address: Any) -> None:
            super().bind(address)
            seen.append(permissions(path))
            with Watched() as early, pytest.raises(ConnectionRefusedError):
                early.connect(address)

    before = os.umask(0)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(endpoint, "_stream_socket", Watched)
            listen(path).close()
    finally:
        os.umask(before)
    assert seen == [0o600]


@pytest.mark.needs_root
def test_the_group_is_what_was_asked_for(path: Path) -> None:
    with listen(path, mode=0o660, gid=12_345):
        assert path.stat().st_gid == 12_345
        assert permissions(path) == 0o660


def test_closing_removes_the_path(path: Path) -> None:
    listener = listen(path)
    assert repr(listener) == f"<Listener on {path}: listening>"
    listener.close()
    assert repr(listener) == f"<Listener on {path}: closed>"
    assert not path.exists()
    listener.close()
    for use in (listener.fileno, listener.accept):
        with pytest.raises(ValueError, match="closed"):
            use()


def test_closing_leaves_what_another_put_there(path: Path) -> None:
    with listen(path):
        path.unlink()
        inode = leave_stale_socket(path)
    assert path.stat().st_ino == inode
    with listen(path):
        path.unlink()
    assert not path.exists()


def test_a_stale_socket_is_taken_over(path: Path) -> None:
    leave_stale_socket(path)
    with listen(path) as listener, connect(path):
        accept(listener).close()
    assert list(path.parent.iterdir()) == []


@pytest.mark.clause("CRASH-10")
def test_a_socket_in_use_is_left_alone(listener: Listener, path: Path) -> None:
    inode = path.stat().st_ino
    with pytest.raises(SocketUnavailable) as caught:
        listen(path)
    assert caught.value.reason == f"another process listens on {path}"
    assert path.stat().st_ino == inode
    accept(listener).close()  # The question was a connection.
    with connect(path):
        accept(listener).close()


def test_a_socket_with_a_full_backlog_is_in_use(path: Path) -> None:
    with listen(path, backlog=0), ExitStack() as stack:
        stack.enter_context(begin_connect(path))
        with pytest.raises(BlockingIOError):
            begin_connect(path)
        with pytest.raises(SocketUnavailable, match="another process listens"):
            listen(path)


def test_waiting_for_room_ends_in_time_or_with_a_signal(path: Path) -> None:
    with listen(path, backlog=0), ExitStack() as stack:
        stack.enter_context(begin_connect(path))
        with pytest.raises(BlockingIOError):
            begin_connect(path, 0.01)
        before = signal.signal(signal.SIGALRM, lambda *_: None)
        stack.callback(signal.signal, signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        # Python takes the socket for connected; without a look, the first message would fail.
        with pytest.raises(BlockingIOError):
            begin_connect(path, 20.0)


def test_a_datagram_socket_in_use_is_left_alone(path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind(str(path))
        with pytest.raises(SocketUnavailable, match="another process listens"):
            listen(path)
        with pytest.raises(SocketUnavailable, match="wrong type"):
            begin_connect(path)


@pytest.mark.parametrize("kind", ["file", "directory", "symlink"])
def test_what_is_no_socket_is_left_alone(path: Path, kind: str) -> None:
    if kind == "file":
        path.write_text("precious")
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to("elsewhere")
    with pytest.raises(SocketUnavailable, match="is not a socket; it is left alone"):
        listen(path)
    assert path.is_symlink() or path.exists()


def test_a_missing_directory_is_named(path: Path) -> None:
    missing = path.parent / "missing" / "handoff.sock"
    with pytest.raises(SocketUnavailable) as caught:
        listen(missing)
    assert f"the directory {missing.parent} does not exist" in caught.value.reason


def test_the_longest_path_works_and_a_longer_one_is_named(path: Path) -> None:
    longest = path.with_name("x" * (SOCKET_PATH_BYTES_MAX - len(bytes(path.parent)) - 1))
    assert len(bytes(longest)) == SOCKET_PATH_BYTES_MAX
    leave_stale_socket(longest)
    with listen(longest) as listener, connect(longest):
        accept(listener).close()
    for use in (listen, begin_connect):
        with pytest.raises(SocketUnavailable, match="has 108 bytes; a socket's has 107"):
            use(f"{longest}x")


@pytest.mark.parametrize("name", ["", "/", "\0abstract", "a\0b"])
def test_what_cannot_be_a_socket_is_named(name: str) -> None:
    # bind() would make an abstract socket of some of them: one without permissions.
    for use in (listen, begin_connect):
        with pytest.raises(SocketUnavailable, match="is not the path of a socket"):
            use(name)


@pytest.mark.parametrize("left", range(3))
def test_a_failure_leaves_nothing_at_the_path(path: Path, left: int) -> None:
    # The lock, the socket and the file that it is bound to need one each.
    with descriptors_left(left), pytest.raises(SocketUnavailable, match="Too many open files"):
        listen(path)
    assert list(path.parent.iterdir()) == []


def test_a_provider_that_finds_another_starting_says_so(path: Path) -> None:
    leave_stale_socket(path)
    lock_path = path.with_name(f".{path.name}.lock")
    with lock_path.open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(SocketUnavailable, match=f"another provider is starting on {path}"):
            listen(path)
        assert path.exists()
    with listen(path):
        assert list(path.parent.iterdir()) == [path], "no lock stays behind"


def test_a_lock_that_was_removed_meanwhile_is_taken_again(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Opened, then removed by the one that had it; a third could have made and locked another.
    checks: list[Path] = []
    is_at = endpoint._is_at

    def removed_once(lock_path: Path, descriptor: Descriptor) -> bool:
        if not checks:
            lock_path.unlink()
        checks.append(lock_path)
        return is_at(lock_path, descriptor)

    monkeypatch.setattr(endpoint, "_is_at", removed_once)
    with listen(path):
        assert len(checks) == 3, "twice when it is locked, and once before it is removed"
        assert list(path.parent.iterdir()) == [path]


def test_a_file_in_the_place_of_the_lock_is_left_alone(path: Path) -> None:
    lock_path = path.with_name(f".{path.name}.lock")
    lock_path.write_text("another's")
    with pytest.raises(SocketUnavailable, match="another program's; it is left alone"):
        listen(path)
    assert lock_path.read_text() == "another's"


def test_a_lock_that_another_program_has_put_there_since_stays(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock_path = path.with_name(f".{path.name}.lock")
    bind = endpoint._bind

    def replace(sock: socket.socket, address: Path) -> None:
        lock_path.unlink()
        lock_path.write_text("another's")
        bind(sock, address)

    monkeypatch.setattr(endpoint, "_bind", replace)
    with listen(path):
        assert lock_path.read_text() == "another's"


def test_what_another_program_has_put_there_since_it_was_bound_is_not_changed(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bind = endpoint._bind

    def replace(sock: socket.socket, address: Path) -> None:
        bind(sock, address)
        address.rename(address.with_name("ours"))
        address.write_text("another's")
        address.chmod(0o640)

    monkeypatch.setattr(endpoint, "_bind", replace)
    with listen(path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert path.read_text() == "another's"


def test_of_many_that_start_at_once_one_listens(path: Path) -> None:
    for _ in range(20):
        leave_stale_socket(path)
        outcomes = start_at_once(path, 6)
        listeners = [outcome for outcome in outcomes if isinstance(outcome, Listener)]
        assert len(outcomes) == 6
        assert len(listeners) == 1, outcomes
        with listeners[0] as listener, connect(path) as consumer:
            consumer.send(ENDED)
            assert [accepts_the_end(accepted) for accepted in all_of(listener)].count(True) == 1


def all_of(listener: Listener) -> Iterator[Accepted]:
    while (accepted := listener.accept()) is not None:
        yield accepted
        accepted.close()


def accepts_the_end(accepted: Accepted) -> bool:
    # Those that only asked whether a provider listens have gone again.
    first = accepted.channel.receive()[0]
    return isinstance(first, Delivery) and first.message == ENDED


def start_at_once(path: Path, count: int) -> list[Listener | SocketUnavailable]:
    barrier = threading.Barrier(count)

    def start(_: int) -> Listener | SocketUnavailable:
        barrier.wait()
        try:
            return listen(path)
        except SocketUnavailable as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(start, range(count)))


def test_a_broken_listener_is_told(listener: Listener) -> None:
    # Something else was put under its number.
    with open(os.devnull) as null:
        os.dup2(null.fileno(), listener.fileno(), inheritable=False)
    with pytest.raises(OSError, match="Socket operation on non-socket"):
        listener.accept()


# Connecting.


def test_connecting_where_nothing_is_says_so(path: Path) -> None:
    with pytest.raises(SocketUnavailable) as caught:
        begin_connect(path)
    assert caught.value.reason == f"{path} does not exist"


def test_connecting_where_no_process_listens_says_so(path: Path) -> None:
    leave_stale_socket(path)
    with pytest.raises(SocketUnavailable) as caught:
        begin_connect(path)
    assert caught.value.reason == f"no process listens on {path}"


@pytest.mark.needs_root
def test_connecting_without_permission_says_so(listener: Listener, path: Path) -> None:
    path.parent.chmod(0o755)
    os.seteuid(65_534)
    try:
        with pytest.raises(SocketUnavailable, match="Permission denied"):
            begin_connect(path)
    finally:
        os.seteuid(0)


def test_connecting_never_waits(listener: Listener, path: Path) -> None:
    with begin_connect(path) as sock:
        assert not sock.getblocking()
        assert not sock.get_inheritable()


# Credentials.

CHILD = """
import os, socket, sys
if os.geteuid() == 0:
    os.setgid(54_321)
    os.setuid(12_345)
sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
sock.connect(sys.argv[1])
sys.stdin.read()
"""


@pytest.mark.clause("PEER-1")
def test_credentials_are_those_of_the_connecting_process(path: Path) -> None:
    path.parent.chmod(0o755)
    with listen(path, mode=0o666) as listener:
        command = [sys.executable, "-c", CHILD, str(path)]
        with subprocess.Popen(command, stdin=subprocess.PIPE) as child:
            assert select.select([listener], [], [], 10)[0]
            accepted = accept(listener)
            credentials = accepted.credentials
            expected = (12_345, 54_321) if os.geteuid() == 0 else (os.geteuid(), os.getegid())
            assert credentials.pid == child.pid
            assert (credentials.uid, credentials.gid) == expected
            assert (credentials.pidfd is not None) == has_option(SO_PEERPIDFD)
            if credentials.pidfd is not None:
                assert not os.get_inheritable(credentials.pidfd.fileno())
                assert not select.select([credentials.pidfd], [], [], 0)[0], "alive"
            assert child.stdin is not None
            child.stdin.close()
            child.wait()
            if credentials.pidfd is not None:
                assert select.select([credentials.pidfd], [], [], 10)[0], "ended"
            accepted.close()
            accepted.close()


def test_credentials_of_an_older_linux_have_no_pidfd(path: Path) -> None:
    with listen(path, use_peerpidfd=False) as listener, connect(path):
        accepted = accept(listener)
        assert accepted.credentials == PeerCredentials(
            os.getpid(), os.geteuid(), os.getegid(), None
        )
        accepted.close()


def test_either_side_can_ask(listener: Listener, path: Path) -> None:
    with begin_connect(path) as sock:
        provider = PeerCredentials.of(sock)
        assert (provider.pid, provider.uid) == (os.getpid(), os.geteuid())
        provider.close()


def test_a_socket_that_is_not_connected_has_no_peer_to_pin() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as alone:
        assert PeerCredentials.of(alone).pidfd is None


# Descriptors that a consumer sends.


@pytest.mark.clause("FD-11")
@pytest.mark.parametrize("use_passrights", [True, False])
def test_a_provider_takes_no_descriptors_from_a_consumer(path: Path, use_passrights: bool) -> None:
    with (
        listen(path, use_passrights=use_passrights) as listener,
        begin_connect(path) as consumer,
        open(os.devnull) as null,
    ):
        accepted = accept(listener)
        if use_passrights and has_option(SO_PASSRIGHTS):
            with pytest.raises(PermissionError):
                send_once(consumer, FRAME, [null.fileno()])
            assert accepted.channel.receive() == []
        else:
            send_once(consumer, FRAME, [null.fileno()])
            with descriptors_left(0):
                (rejected,) = accepted.channel.receive()
            assert isinstance(rejected, Rejected)
        # The other way round they pass.
        with accepted.channel, accepted.credentials.pidfd or ExitStack():
            send_once_from(accepted.channel, null.fileno())
        data, descriptors, is_truncated, _ = receive_once(consumer, 10, 3)
        assert (data, len(descriptors), is_truncated) == (b"x", 1, False)
        descriptors[0].close()


def send_once_from(channel: Channel, fd: int) -> None:
    with socket.fromfd(channel.fileno(), socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        send_once(sock, b"x", [fd])


def test_descriptors_sent_before_accept_are_refused_too(path: Path) -> None:
    with listen(path) as listener, begin_connect(path) as consumer, open(os.devnull) as null:
        try:
            send_once(consumer, FRAME, [null.fileno()])
        except PermissionError:
            assert has_option(SO_PASSRIGHTS)
        else:
            assert not has_option(SO_PASSRIGHTS)
        accept(listener).close()


# Running out of descriptors.


def refusal_read_by(consumer: Channel) -> str:
    delivery, last = consumer.receive()
    assert isinstance(delivery, Delivery)
    assert isinstance(delivery.message, SocketUnavailable)
    assert isinstance(last, Lost)
    return delivery.message.reason


@pytest.mark.clause("PEER-11")
@pytest.mark.parametrize("left", [0, 1])
def test_a_connection_for_which_no_descriptor_is_left_is_told_so(
    listener: Listener, path: Path, left: int
) -> None:
    # With one left, there is one for the connection and none for its pidfd.
    if left and not has_option(SO_PEERPIDFD):
        pytest.skip("kernel lacks SO_PEERPIDFD")
    with connect(path) as consumer, connect(path) as second:
        consumer.send(NamespaceRequest("a", ()))
        with descriptors_left(left):
            assert listener.accept() is None
            assert listener.accept() is None
            assert not select.select([listener], [], [], 0)[0], "nothing keeps it readable"
            assert not listener.is_starved
        assert refusal_read_by(consumer) == "the provider has no file descriptor left"
        assert refusal_read_by(second) == "the provider has no file descriptor left"
    with connect(path):
        accept(listener).close()


def test_a_reserve_that_is_gone_comes_back(
    listener: Listener, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stolen() -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with connect(path), connect(path):
        with descriptors_left(0):
            with monkeypatch.context() as patch:
                patch.setattr(endpoint, "_open_reserve", stolen)
                assert listener.accept() is None
            assert listener.is_starved
        accept(listener).close()
    with connect(path):
        with descriptors_left(1):
            pass
        with descriptors_left(0):
            assert listener.accept() is None
        assert listener.is_starved, "there was none to take it from"
        with descriptors_left(2):
            accept(listener).close()
