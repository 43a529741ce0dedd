"""The real daemon while the kernel refuses it something: failures made below Python, by strace.

`test_faults.py` makes calls fail in the program's own hook; this makes the kernel refuse them, to
the program as it is started on a node, with its threads and its forge: also calls that the
interpreter makes past the hook, and also EINTR, which the interpreter repeats.
"""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import pytest

from linux.cli.exits import ExitCode
from linux.features import Features
from linux.namespaces import KernelInspector
from statemachine import NamespaceRequest
from statemachine.errors import NamespaceError
from tests.support.programs import (
    DEADLINE_S,
    MOUNT,
    NET,
    PID,
    Daemon,
    nshandoff,
    wait_until,
    warm_daemon_in,
)
from transport.request import Consumer, Patience

pytestmark = pytest.mark.needs_root

STRACE: Final = ("strace", "-qq", "-f", "-o", "/dev/null", "-e")
PATIENCE: Final = Patience(answer_s=5.0)

Point = tuple[str, str, int]
"""Call, errno, and which one in each thread."""

POINTS: Final[dict[str, tuple[Point, ...]]] = {
    "files": (
        ("openat", "EMFILE", 1),
        ("openat", "ENFILE", 2),
        ("openat", "EACCES", 3),
        ("openat2", "ENOMEM", 1),
        ("read", "EIO", 2),
        ("fstat,newfstatat", "ENOMEM", 1),
        ("pwrite64", "ENOSPC", 1),
    ),
    "cgroups": (
        ("mkdir", "ENOSPC", 1),
        ("mkdir", "EAGAIN", 2),
        ("setxattr", "ENOSPC", 1),
        ("getxattr", "EIO", 2),
        ("rmdir", "EBUSY", 1),
        ("rmdir", "EPERM", 1),
    ),
    "sockets": (
        ("sendmsg", "EPIPE", 1),
        ("sendmsg", "EAGAIN", 1),
        ("sendmsg", "EINTR", 1),
        ("recvmsg", "ECONNRESET", 1),
        ("recvmsg", "EINTR", 1),
        ("recvmsg", "ENOMEM", 2),
        ("accept4", "EMFILE", 1),
        ("accept4", "ECONNABORTED", 1),
        ("accept4", "EINTR", 1),
    ),
    "the event loop": (
        ("epoll_ctl", "ENOMEM", 1),
        ("epoll_ctl", "ENOSPC", 2),
        ("epoll_wait", "EINTR", 1),
    ),
    "mounts": (
        ("ioctl", "ENOMEM", 1),
        ("ioctl", "EMFILE", 3),
        ("fsopen", "EMFILE", 1),
        ("fsmount", "ENOMEM", 1),
        ("move_mount", "EINVAL", 1),
        ("mount", "EPERM", 1),
    ),
    "namespaces": (
        ("unshare", "ENOSPC", 1),
        ("unshare", "EPERM", 1),
        ("setns", "EINVAL", 1),
        ("pidfd_open", "EMFILE", 1),
        ("pidfd_send_signal", "EPERM", 1),
        ("clone3", "EAGAIN", 1),
        ("vfork,clone", "ENOMEM", 1),
    ),
}
"""A sample, by what is asked for; the campaign makes more of each."""

STARTING: Final = (
    ("socket", "EMFILE"),
    ("bind", "EACCES"),
    ("listen", "EADDRINUSE"),
    ("flock", "ENOLCK"),
    ("epoll_create1", "EMFILE"),
)
"""What a program that starts may be refused, from the first such call that is its own."""


@contextmanager
def refusing(daemon: Daemon, calls: str, errno: str, nth: int) -> Iterator[None]:
    """Let the kernel refuse a call, once in each thread of the daemon and of its forge."""
    pids = [daemon.pid, *_children_of(daemon.pid)]
    command = [*STRACE, f"trace={calls}", "-e", f"inject={calls}:error={errno}:when={nth}"]
    for pid in pids:
        command += ["-p", str(pid)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as strace:
        try:
            wait_until(lambda: strace.poll() is not None or all(map(_is_traced, pids)))
            assert strace.poll() is None, strace.communicate()
            yield
        finally:
            strace.send_signal(signal.SIGINT)
            strace.wait(DEADLINE_S)


def _children_of(pid: int) -> list[int]:
    """Those that live: a forge that has ended is waited for with the next request."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    children = [int(child) for task in tasks for child in task.read_text().split()]
    return [child for child in children if not any(map(_has_ended, _statuses_of(child)))]


def _is_traced(pid: int) -> bool:
    """
    Whether every thread of a process is: those that start later are as well.

    Or it has ended: a call that it waited in is begun anew when it is traced, and refused then.
    """
    statuses = _statuses_of(pid)
    return all(_has_ended(status) or "TracerPid:\t0\n" not in status for status in statuses)


def _statuses_of(pid: int) -> list[str]:
    return [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/status")]


def _has_ended(status: str) -> bool:
    return "State:\tZ" in status or "State:\tX" in status


def life(daemon: Daemon, name: str) -> str:
    """From a request to the end; say how it went, as the protocol has words for it."""
    consumer = Consumer(daemon.socket, KernelInspector(Features.probe()), patience=PATIENCE)
    try:
        wanted = NamespaceRequest(name, (PID, MOUNT, NET), "hello.sqfs")
        with consumer.obtain(wanted) as handoff:
            return "ended" if handoff.end(DEADLINE_S) else "not ended in time"
    except NamespaceError as error:
        return type(error).__name__


def survive(daemon: Daemon, name: str, point: Point) -> str:
    """
    Have the kernel refuse something in a life, and look at what is left of it.

    Returns:
        How the life went.
    """
    with daemon.obtain(f"{name}-neighbour", PID, MOUNT) as neighbour:
        before = neighbour.identities
        with refusing(daemon, *point):
            outcome = life(daemon, name)
        assert outcome in ("ended", "CreationFailed", "FdPassing", "SocketUnavailable"), outcome
        assert daemon.program is not None
        assert daemon.program.poll() is None, daemon.log.read_text()[-2000:]
        # What was given up may be alive still: its end was not said.
        with suppress(NamespaceError):
            daemon.consumer().end(name, DEADLINE_S)
        assert life(daemon, f"{name}-next") == "ended"
        with daemon.obtain(f"{name}-neighbour", PID, MOUNT) as again:
            assert again.identities == before, "the neighbour is another"
            assert again.end(DEADLINE_S)
    daemon.wait_until_none_is_alive()
    return outcome


@pytest.mark.sample(2)
@pytest.mark.parametrize("sort", POINTS)
def test_basic_a_refusal_has_a_typed_outcome_and_leaves_nothing(
    tmp_path: Path, image_root: Path, allocation_id: str, sort: str
) -> None:
    with warm_daemon_in(tmp_path, image_root) as daemon:
        for number, point in enumerate(POINTS[sort]):
            try:
                survive(daemon, f"{allocation_id}-{number}", point)
            except BaseException as error:
                error.add_note(f"{point} in each thread")
                raise


@pytest.mark.sample(2)
@pytest.mark.parametrize("point", STARTING, ids=lambda point: point[0])
def test_a_program_that_cannot_start_says_why_in_one_line(
    tmp_path: Path, image_root: Path, point: tuple[str, str]
) -> None:
    call, errno = point
    daemon = Daemon(tmp_path, image_root)
    inject = f"inject={call}:error={errno}:when=1+"
    refused = nshandoff(*daemon.words, within=(*STRACE, f"trace={call}", "-e", inject))
    assert refused.returncode not in (0, -signal.SIGKILL)
    assert refused.returncode in {code.value for code in ExitCode}
    *_, last = refused.stderr.strip().splitlines()
    assert "Traceback" not in refused.stderr, refused.stderr
    assert last
    assert not daemon.socket.exists()
    assert not daemon.ready.exists()
