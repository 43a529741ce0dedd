"""A daemon on this node goes on while images hang, and while no process can be started."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final

import pytest

from statemachine.errors import CreationFailed
from statemachine.messages import AllocationEnded, NamespaceRequest, NamespaceResponse
from tests.conftest import MakeImage
from tests.support.programs import MOUNT, PID, Daemon, daemon_in, wait_until
from transport.serve.work import THREADS_MAX
from transport.testing.peer import Line

pytestmark = pytest.mark.needs_root


HANGING: Final = THREADS_MAX + 2
"""More images that hang than the daemon has threads of any kind."""

F_SETLEASE: Final = 1024
MNT_DETACH: Final = 2
_libc: Final = ctypes.CDLL(None, use_errno=True)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    made = tmp_path / "images"
    made.mkdir()
    return made


def is_served(daemon: Daemon, name: str, count: int = 5) -> bool:
    """Whether creations and releases without an image go on."""
    for number in range(count):
        with daemon.obtain(f"{name}-{number}", PID, MOUNT) as handoff:
            assert not handoff.is_degraded
            assert handoff.end()
    return True


@contextmanager
def hanging_below(directory: Path) -> Iterator[None]:
    """Mount a file system whose server answers nothing; it fails at once in the end."""
    directory.mkdir()
    if not Path("/dev/fuse").exists():
        pytest.skip("/dev/fuse is missing")
    try:
        server = os.open("/dev/fuse", os.O_RDWR)
    except OSError as error:
        if error.errno not in (errno.ENODEV, errno.ENXIO):
            raise
        pytest.skip("kernel lacks FUSE")
    options = f"fd={server},rootmode=40000,user_id=0,group_id=0".encode()
    target = os.fsencode(directory)
    try:
        assert _libc.mount(b"none", target, b"fuse", 0, options) == 0, os.strerror(
            ctypes.get_errno()
        )
    except BaseException:
        os.close(server)
        raise
    try:
        yield
    finally:
        # Without a server all that hangs comes back with ENOTCONN.
        os.close(server)
        assert _libc.umount2(target, MNT_DETACH) == 0


@pytest.mark.clause("PEER-16")
def test_images_on_a_dead_file_server_make_nothing_else_wait(
    tmp_path: Path, root: Path, allocation_id: str
) -> None:
    with ExitStack() as stack:
        daemon = stack.enter_context(daemon_in(tmp_path, root))
        with hanging_below(root / "gone"):
            line = stack.enter_context(Line.to(daemon.socket))
            names = [f"{allocation_id}-h{number}" for number in range(HANGING)]
            for number, name in enumerate(names):
                line.say(NamespaceRequest(name, (PID, MOUNT), f"gone/{number}.sqfs"))
            # The last one has been read, since it is answered after those.
            wait_until(lambda: len(daemon.events(names[-1])) == 1)
            assert is_served(daemon, allocation_id)
            assert line.hears_nothing()
        answers = [line.hear() for _ in names]
        assert all(isinstance(answer, CreationFailed) for answer in answers), answers


def test_a_daemon_with_images_that_hang_stops(
    tmp_path: Path, root: Path, allocation_id: str
) -> None:
    with daemon_in(tmp_path, root) as daemon:
        with hanging_below(root / "gone"), Line.to(daemon.socket) as line:
            for number in range(HANGING):
                name = f"{allocation_id}-h{number}"
                line.say(NamespaceRequest(name, (PID, MOUNT), f"gone/{number}.sqfs"))
            wait_until(lambda: len(daemon.events(name)) == 1)
            assert is_served(daemon, allocation_id)
            program = daemon.program
            assert program is not None
            program.send_signal(signal.SIGTERM)
            # It cannot be gone while one of its threads is in the Linux kernel; its socket is.
            assert line.hear_rest() == []
        assert program.wait(20) == 0


@contextmanager
def leased(*files: Path) -> Iterator[None]:
    """Hold a write lease on files in another process, which does not give it up when told."""
    ours, theirs = os.pipe()
    child = os.fork()
    if not child:
        with suppress(BaseException):
            signal.signal(signal.SIGIO, signal.SIG_IGN)
            for file in files:
                fcntl.fcntl(os.open(file, os.O_RDWR), F_SETLEASE, fcntl.F_WRLCK)
            os.write(theirs, b"x")
            signal.pause()
        os._exit(1)
    os.close(theirs)
    try:
        assert os.read(ours, 1) == b"x"
        yield
    finally:
        os.close(ours)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@pytest.mark.clause("NODE-15", "PEER-16")
def test_an_image_under_a_lease_is_refused_at_once(
    tmp_path: Path, root: Path, make_image: MakeImage, allocation_id: str
) -> None:
    images = [make_image(root / f"{number}.sqfs", {"a": "b"}) for number in range(HANGING)]
    with daemon_in(tmp_path, root) as daemon, leased(*images), Line.to(daemon.socket) as line:
        requests = [
            NamespaceRequest(f"{allocation_id}-l{number}", (PID, MOUNT), image.name)
            for number, image in enumerate(images)
        ]
        for request in requests:
            answer = line.ask(request)
            assert isinstance(answer, CreationFailed)
            assert "a program holds a lease on it" in answer.reason
        assert is_served(daemon, allocation_id)


# --- No process can be started -------------------------------------------------------------------


def _pids_version_1() -> Path | None:
    """Where the controller of processes is mounted in version 1."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        kind, _, options = fields[fields.index("-") + 1 :][:3]
        if kind == "cgroup" and "pids" in options.split(","):
            return Path(fields[4])
    return None


def _has_linux_pids() -> bool:
    lines = Path("/proc/cgroups").read_text().splitlines()
    return any(line.split()[::3] == ["pids", "1"] for line in lines)


@pytest.fixture
def pids(cgroup2: Path, allocation_id: str) -> Iterator[Path]:
    """A cgroup that can be limited: the test's own; in version 2 the one that this process has."""
    above = _pids_version_1()
    if above is not None:
        own = above / f"{allocation_id}-pids"
        own.mkdir()
        try:
            yield own
        finally:
            home = above / "cgroup.procs"
            for pid in (own / "cgroup.procs").read_text().split():
                with suppress(OSError):
                    home.write_text(pid)
            own.rmdir()
        return
    # One below it cannot be: as this one has processes, "+pids" in its cgroup.subtree_control would
    # let none of the cgroups below it take any (cgroup-v2.rst, "Threads").
    limit = cgroup2 / "pids.max"
    if not limit.exists():
        if not _has_linux_pids():
            pytest.skip("kernel lacks the pids controller")
        pytest.fail(f"no pids.max in {cgroup2}: the cgroup above does not hand the controller on")
    before = limit.read_text()
    try:
        yield cgroup2
    finally:
        limit.write_text(before)


@pytest.mark.clause("PEER-17")
def test_at_the_limit_of_processes_every_request_is_answered(
    tmp_path: Path, image_root: Path, allocation_id: str, pids: Path
) -> None:
    names = [f"{allocation_id}-{number}" for number in range(6)]
    requests = [NamespaceRequest(name, (PID, MOUNT)) for name in names]
    with daemon_in(tmp_path, image_root) as daemon:
        for pid in (daemon.pid, *_children_of(daemon.pid)):
            (pids / "cgroup.procs").write_text(str(pid))
        (pids / "pids.max").write_text((pids / "pids.current").read_text())
        with Line.to(daemon.socket) as line:
            for request in requests:
                line.say(request)
            for answer in (line.hear() for _ in requests):
                # What ends meanwhile leaves room for another.
                if not isinstance(answer, NamespaceResponse):
                    assert isinstance(answer, CreationFailed)
                    assert "no process left: " in answer.reason
                    assert "pids.max of the cgroup" in answer.reason
            (pids / "pids.max").write_text("max")
            for request in requests:
                answer = line.ask(request)
                assert isinstance(answer, NamespaceResponse), answer
                assert line.ask(AllocationEnded(request.allocation_id)) is not None


def _children_of(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in text.split()]
