"""Interference: what strangers do just before a call of a life, and what of it must stay theirs.

Faults (`faults.py`) are what the Linux kernel answers; this is what others do meanwhile. An act is
named in the plan like a fault, so that a finding is shown again by the same command. Each act
leaves a `Stranger` that remembers what is its own: that must be as it was when the life is over.
Acts make no calls of the program's, so they are not counted.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from linux.anchor import ANCHOR_VARIABLE
from linux.cgroups import (
    ALLOCATION_ATTRIBUTE,
    FROZEN_ATTRIBUTE,
    OWNER_ATTRIBUTE,
    STATE_ATTRIBUTE,
    USED_ATTRIBUTE,
    WORKLOAD_SLICE,
)
from linux.instance import OWN_TOKEN_PREFIX
from linux.journal import JOURNAL_NAME, LOCK_NAME
from linux.scope_file import SUFFIX
from tests.suites.faults.faults import CallSite, Fault
from tests.support.spared import is_spared
from transport.endpoint import SOCKET_PATH_BYTES_MAX

if TYPE_CHECKING:
    from tests.suites.faults.lives import FaultSetup

STAMP: Final = b"a stranger"
"""The token of an owner that is none of ours."""

STAMPS: Final = {
    OWNER_ATTRIBUTE: STAMP,
    ALLOCATION_ATTRIBUTE: b"of a stranger",
    STATE_ATTRIBUTE: b"kept",
    USED_ATTRIBUTE: b"1",
    FROZEN_ATTRIBUTE: b"1",
}

CONTENT: Final = b"what a stranger wrote; it is longer than the header of a database.\n" * 3

PATIENCE_S: Final = 5.0

SIGNAL_EVERY_S: Final = 0.00005

READY_SOCKET: Final = "ready.sock"
READY_FILE: Final = "ready"

_SYS_CLONE3: Final = 435
# With the interpreter's lock held: the child is this program with one thread, which has it.
_libc: Final = ctypes.PyDLL(None, use_errno=True)


class NotSpared(AssertionError):
    """Something of a stranger was killed, removed, opened, answered or changed."""


def expect(is_so: object, what: str) -> None:
    if not is_so:
        raise NotSpared(what)


class Stranger(ABC):
    """Who has done something to a life."""

    @abstractmethod
    def check(self) -> None:
        """Expect that what is the stranger's is as it was."""

    @abstractmethod
    def tidy(self) -> None:
        """Remove what is the stranger's."""


class StrangersProcess(Stranger):
    """A process that has nothing to do with any allocation."""

    def __init__(self, cgroup: Path | None = None, *, is_spared: bool = True) -> None:
        self._popen = subprocess.Popen(["sleep", "infinity"])
        self.pid: Final = self._popen.pid
        self._is_spared = is_spared
        """Whether it must not be killed: who has entered a scope of ours is killed with it."""
        if cgroup is not None:
            self.move(cgroup)

    def move(self, cgroup: Path) -> None:
        (cgroup / "cgroup.procs").write_text(str(self.pid))

    def check(self) -> None:
        expect(not self._is_spared or is_spared(self._popen), "a stranger's process was killed")

    def tidy(self) -> None:
        self._popen.kill()
        self._popen.wait()


class Namesake(Stranger):
    """A process that has the number which a process of ours had, and the same environment."""

    def __init__(self, pid: int, environment: dict[str, str]) -> None:
        self._pid: Final = pid
        _spawn_as(pid, environment)

    def check(self) -> None:
        ended = os.waitid(os.P_PID, self._pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        expect(ended is None, f"the stranger with the number {self._pid} was killed")

    def tidy(self) -> None:
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)


class Directory(Stranger):
    """A stranger's cgroup, where ours was or would be."""

    def __init__(self, path: Path, *, is_stamped: bool, has_process: bool) -> None:
        path.mkdir()
        self._path = path
        self._stamps = STAMPS if is_stamped else {}
        for name, text in self._stamps.items():
            os.setxattr(path, name, text)
        if not has_process:
            (path / "stranger").mkdir()  # so that it cannot be removed by rmdir(2) alone
        self._process = StrangersProcess(path) if has_process else None
        self._inode = path.stat().st_ino
        self._mode = path.stat().st_mode

    def check(self) -> None:
        path = self._path
        expect(path.is_dir() and path.stat().st_ino == self._inode, f"{path.name} was removed")
        expect(path.stat().st_mode == self._mode, f"the mode of {path.name} was changed")
        if self._process is not None:
            self._process.check()
            listed = (path / "cgroup.procs").read_text().split()
            expect(listed == [str(self._process.pid)], f"{listed} are in a stranger's cgroup")
        else:
            expect((path / "stranger").is_dir(), "a cgroup below a stranger's was removed")
        found = {name: os.getxattr(path, name) for name in os.listxattr(path)}
        expect(found == self._stamps, f"the attributes of {path.name} are {found}")

    def tidy(self) -> None:
        if self._process is not None:
            self._process.tidy()
        remove_cgroup(self._path)


class Stamp(Stranger):
    """The mark of another owner on a scope, or none, and a process in it that is the stranger's."""

    def __init__(self, path: Path, stamp: bytes | None, *, is_spared: bool) -> None:
        self._path = path
        self._stamp = stamp
        self._is_being_marked = _is_in("Scope.mark")
        # As the consumer does that serves itself, so that it is known to live.
        self._hold = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(self._hold, fcntl.LOCK_SH)
        if stamp is not None:
            os.setxattr(path, OWNER_ATTRIBUTE, stamp)
        else:
            os.removexattr(path, OWNER_ATTRIBUTE)
        self._process = StrangersProcess(path, is_spared=is_spared)
        self._inode = path.stat().st_ino
        self._is_spared = is_spared
        self._state = _state_of(path)

    def check(self) -> None:
        self._process.check()
        if self._stamp is not None and self._is_spared:
            expect(self._path.is_dir(), f"{self._path.name} was removed")
            expect(self._path.stat().st_ino == self._inode, f"{self._path.name} is another")
            owner = None
            with suppress(OSError):
                owner = os.getxattr(self._path, OWNER_ATTRIBUTE)
            expect(owner == self._stamp, f"the owner of {self._path.name} is {owner!r}")
            is_same = _state_of(self._path) == self._state or self._is_being_marked
            expect(is_same, f"the state of {self._path.name} was changed")

    def tidy(self) -> None:
        self._process.tidy()
        os.close(self._hold)
        if self._stamp is not None and self._path.is_dir():
            with suppress(OSError):
                if os.getxattr(self._path, OWNER_ATTRIBUTE) == self._stamp:
                    remove_cgroup(self._path)


class File(Stranger):
    """A stranger's file or socket at a path of ours; ours is beside it until the stranger goes."""

    def __init__(self, path: Path, *, listens: bool = False) -> None:
        self._path = path
        self._aside = path.with_name(f"{path.name}~")
        path.rename(self._aside)
        self._socket: socket.socket | None = None
        if listens:
            self._socket = socket.socket(socket.AF_UNIX)
            self._socket.bind(str(path))
            self._socket.listen()
        else:
            path.write_bytes(CONTENT)
        path.chmod(0o640)
        self._status = path.stat()

    def check(self) -> None:
        path = self._path
        expect(os.path.lexists(path), f"{path.name} was removed")
        status = path.stat()
        expect(os.path.samestat(status, self._status), f"{path.name} was replaced")
        expect(status.st_mode == self._status.st_mode, f"the mode of {path.name} was changed")
        if self._socket is None:
            expect(path.read_bytes() == CONTENT, f"the content of {path.name} was changed")

    def tidy(self) -> None:
        if self._socket is not None:
            self._socket.close()
        if os.path.lexists(self._path) and os.path.samestat(self._path.stat(), self._status):
            self._path.unlink()
            self._aside.rename(self._path)
        with suppress(FileNotFoundError):
            self._aside.unlink()


class Gone(Stranger):
    """A peer: nothing stays of it."""

    def check(self) -> None:
        """Nothing is its own."""

    def tidy(self) -> None:
        """Nothing is left of it."""


# --- The acts -------------------------------------------------------------------------------------

StrangersAct = Callable[["FaultSetup", str], Stranger | None]
"""Is given the stage and the name of the life; None: there is nothing that it could be done to."""


def reuse_number(stage: FaultSetup, name: str) -> Stranger | None:
    """The anchor dies, and a stranger gets its number."""
    for pid, token in stage.anchors_of(name):
        stage.kill_anchors()
        if _is_free(pid):
            with suppress(FileExistsError):  # another program on this machine was faster
                return Namesake(pid, {ANCHOR_VARIABLE: token})
    return None


def enter(stage: FaultSetup, name: str) -> Stranger | None:
    """A stranger's process enters the scope, and stays."""
    for path in _scopes(stage, name):
        return StrangersProcess(path, is_spared=False)
    return None


def pass_through(stage: FaultSetup, name: str) -> Stranger | None:
    """A stranger's process enters the scope and leaves it again."""
    for path in _scopes(stage, name):
        process = StrangersProcess(path)
        process.move(path.parent.parent if path.parent.name == WORKLOAD_SLICE else path.parent)
        return process
    return None


def replace_scope(stage: FaultSetup, name: str) -> Stranger | None:
    """The scope is removed; there is a stranger's, with a process."""
    return _replaced(stage, name, is_stamped=False, has_process=True)


def replace_scope_stamped(stage: FaultSetup, name: str) -> Stranger | None:
    """The scope is removed; there is one with another owner's attributes, with a process."""
    return _replaced(stage, name, is_stamped=True, has_process=True)


def replace_scope_empty(stage: FaultSetup, name: str) -> Stranger | None:
    """The scope is removed; there is one of another owner, with a cgroup below it."""
    return _replaced(stage, name, is_stamped=True, has_process=False)


def stamp(stage: FaultSetup, name: str) -> Stranger | None:
    """A stranger makes the scope its own, with a process in it."""
    for path in _scopes(stage, name):
        return Stamp(path, STAMP, is_spared=not _is_being_killed())
    return None


def stamp_as_own(stage: FaultSetup, name: str) -> Stranger | None:
    """The same by a consumer that serves itself, and lives."""
    for path in _scopes(stage, name):
        token = f"{OWN_TOKEN_PREFIX}of a stranger".encode()
        return Stamp(path, token, is_spared=not _is_being_killed())
    return None


def unstamp(stage: FaultSetup, name: str) -> Stranger | None:
    """A stranger takes the owner's token off the scope, and has a process in it."""
    for path in _scopes(stage, name):
        if OWNER_ATTRIBUTE in os.listxattr(path):
            return Stamp(path, None, is_spared=not _is_being_killed())
    return None


def listen_there(stage: FaultSetup, name: str) -> Stranger | None:
    """A stranger listens at the provider's path."""
    return _file(stage.path, listens=True)


def put_file_there(stage: FaultSetup, name: str) -> Stranger | None:
    """A stranger's file is where the provider listens."""
    return _file(stage.path)


def replace_start_lock(stage: FaultSetup, name: str) -> Stranger | None:
    """The lock of who starts at the provider's path is another file."""
    return _file(stage.path.with_name(f".{stage.path.name}.lock"))


def replace_journal(stage: FaultSetup, name: str) -> Stranger | None:
    """The journal is another file."""
    return _file(stage.state_dir / JOURNAL_NAME)


def replace_lock(stage: FaultSetup, name: str) -> Stranger | None:
    """The lock of the state directory is another file."""
    return _file(stage.state_dir / LOCK_NAME)


def replace_scope_file(stage: FaultSetup, name: str) -> Stranger | None:
    """The file that says where scopes are is another provider's."""
    return _file(Path(f"{stage.path}{SUFFIX}"))


def replace_ready_socket(stage: FaultSetup, name: str) -> Stranger | None:
    """A stranger listens where the provider says that it is ready."""
    return _file(stage.path.with_name(READY_SOCKET), listens=True)


def replace_ready_file(stage: FaultSetup, name: str) -> Stranger | None:
    """The file that says that the provider is ready is another one."""
    return _file(stage.path.with_name(READY_FILE))


def half_close(stage: FaultSetup, name: str) -> Stranger | None:
    """The consumer sends nothing more: to the kernel the same as this end receiving nothing."""
    return _shut(stage, socket.SHUT_RD)


def close_other_half(stage: FaultSetup, name: str) -> Stranger | None:
    """The consumer receives nothing more."""
    return _shut(stage, socket.SHUT_WR)


def shut(stage: FaultSetup, name: str) -> Stranger | None:
    """Both directions are closed."""
    return _shut(stage, socket.SHUT_RDWR)


def reset(stage: FaultSetup, name: str) -> Stranger | None:
    """The peer is gone, and what it was sent is not read: ECONNRESET."""
    return Gone() if stage.drop_raw_peer(0) else None


def read_one_byte(stage: FaultSetup, name: str) -> Stranger | None:
    """The peer reads one byte, and is gone."""
    return Gone() if stage.drop_raw_peer(1) else None


def exhaust_descriptors(stage: FaultSetup, name: str) -> Stranger | None:
    """No descriptor can be opened any more, until the life is over."""
    stage.starve()
    return Gone()


def keep_signalling(stage: FaultSetup, name: str) -> Stranger | None:
    """Signals keep arriving: what they interrupt is made again, so nothing comes of it."""
    signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, SIGNAL_EVERY_S, SIGNAL_EVERY_S)
    return Gone()


ANYWHERE: Final[dict[str, StrangersAct]] = {
    "stranger listens": listen_there,
    "file for the socket": put_file_there,
    "other start lock": replace_start_lock,
    "half-closed": half_close,
    "other half closed": close_other_half,
    "shut": shut,
    "reset": reset,
    "one byte and gone": read_one_byte,
    "no descriptor": exhaust_descriptors,
    "signals": keep_signalling,
}
"""What can be done on any backend."""

ON_LINUX: Final[dict[str, StrangersAct]] = {
    "number reused": reuse_number,
    "entered": enter,
    "passed through": pass_through,
    "scope replaced": replace_scope,
    "scope replaced, stamped": replace_scope_stamped,
    "scope replaced, empty": replace_scope_empty,
    "stamped": stamp,
    "stamped as own": stamp_as_own,
    "unstamped": unstamp,
    "other journal": replace_journal,
    "other lock": replace_lock,
    "other scope file": replace_scope_file,
    "other ready socket": replace_ready_socket,
    "other ready file": replace_ready_file,
}
"""What takes real processes and cgroups."""

ACTS: Final = {**ANYWHERE, **ON_LINUX}

ENDING: Final = frozenset(act for act in ON_LINUX if not act.startswith("other "))
"""
What ends an allocation, or may: its init dies, its scope is gone, or was used and is empty. If its
provider stands still just then, the next one releases it, and consumers of the last are not told.
"""


BY_PATH: Final = frozenset({"unlink"})
"""
Calls that take a path and nothing else, made after what is there was found to be ours: a stranger
that puts its own file there between the two loses it. There is no call that compares as well.
rmdir(2) is none of them: it removes nothing in which anything is.
"""

ON_FILES: Final = frozenset(
    name for name in ACTS if name.startswith(("other ", "stranger listens", "file for "))
) - {"other half closed"}


NOT_SWEPT: Final = frozenset(
    {("linux", "recovered", "other journal"), ("linux", "recovered", "other lock")}
)
"""
Backend, life and act that are not tried. A provider that starts takes what is at the paths of its
journal and its lock for these, in a directory of its own: it sets permissions, and writes its pid.
"""


def interferences_of(call: CallSite, backend: str, life: str) -> list[Fault]:
    """Everything that a stranger can do just before a call of a life."""
    if call.who == "forge":
        return []  # it has no hook in here
    acts = ANYWHERE if backend == "simulated" else ACTS
    return [
        Fault(call, act)
        for act in acts
        if (call.name not in BY_PATH or act not in ON_FILES)
        and (backend, life, act) not in NOT_SWEPT
    ]


# --- Helpers --------------------------------------------------------------------------------------


def remove_cgroup(path: Path) -> None:
    """Remove a cgroup and what is below it; its last process may still be leaving."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            for below in sorted(path.rglob("*/"), reverse=True):
                below.rmdir()
            path.rmdir()
            return
        except FileNotFoundError:
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.001)


def _scopes(stage: FaultSetup, name: str) -> list[Path]:
    return [path for path in stage.scope_paths(name) if path.is_dir()]


def _replaced(
    stage: FaultSetup, name: str, *, is_stamped: bool, has_process: bool
) -> Stranger | None:
    for path in _scopes(stage, name):
        for below in sorted(path.rglob("*/"), reverse=True):
            below.rmdir()
        try:
            path.rmdir()
        except OSError:
            return None  # something runs in it
        return Directory(path, is_stamped=is_stamped, has_process=has_process)
    return None


def _file(path: Path, *, listens: bool = False) -> Stranger | None:
    if not os.path.lexists(path):
        return None
    assert len(os.fsencode(path)) <= SOCKET_PATH_BYTES_MAX
    return File(path, listens=listens)


def _shut(stage: FaultSetup, how: int) -> Stranger | None:
    sockets = stage.served_sockets()
    for sock in sockets:
        with suppress(OSError):
            sock.shutdown(how)
    return Gone() if sockets else None


def _is_being_killed() -> bool:
    """Whether a scope has just been looked at and is killed: who enters then is killed with it."""
    frame: Any = sys._getframe()
    while frame is not None:
        if frame.f_code.co_qualname == "Scope.kill" and "owner" in frame.f_locals:
            return True
        frame = frame.f_back
    return False


def _is_in(function: str) -> bool:
    """Whether a function of this name has made the call that is about to be made."""
    frame: Any = sys._getframe()
    while frame is not None and frame.f_code.co_qualname != function:
        frame = frame.f_back
    return frame is not None and "directory" in frame.f_locals


def _state_of(path: Path) -> bytes | None:
    with suppress(OSError):
        return os.getxattr(path, STATE_ATTRIBUTE)
    return None


def _is_free(pid: int) -> bool:
    deadline = time.monotonic() + PATIENCE_S
    while Path(f"/proc/{pid}").exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.0005)
    return True


_CLONE_ARGUMENTS: Final = (
    *("flags", "pidfd", "child_tid", "parent_tid", "exit_signal", "stack", "stack_size"),
    *("tls", "set_tid", "set_tid_size", "cgroup"),
)


class _CloneArguments(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint64) for name in _CLONE_ARGUMENTS)


def _spawn_as(pid: int, environment: dict[str, str]) -> None:
    """Start a process with a number of our choice; the Linux kernel refuses one that is in use."""
    path = shutil.which("sleep") or "/bin/sleep"
    wanted = (ctypes.c_int32 * 1)(pid)
    arguments = _CloneArguments(
        exit_signal=signal.SIGCHLD, set_tid=ctypes.addressof(wanted), set_tid_size=1
    )
    size = ctypes.sizeof(arguments)
    found = _libc.syscall(_SYS_CLONE3, ctypes.byref(arguments), size)
    if found == 0:
        try:
            os.execve(path, ["sleep", "infinity"], environment)
        finally:
            os._exit(1)
    if found < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"clone3(2) with number {pid}: {os.strerror(number)}")
    assert found == pid
    # It has the environment only once it has executed.
    deadline = time.monotonic() + PATIENCE_S
    while Path(f"/proc/{pid}/cmdline").read_bytes()[:5] != b"sleep":
        assert time.monotonic() < deadline
        time.sleep(0.0002)
