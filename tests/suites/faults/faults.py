"""A hook of `transport.calls` that injects faults: counts system calls, and has some of them fail.

A call is identified by its name, its place, the thread that makes it, and how often it was made
there: so that a plan means the same call in every run, whatever else happens beside it. A plan says
what happens to which calls: they fail with an errno of their man page, they move fewer bytes than
they were given, or the program that makes them is dead from then on.
"""

from __future__ import annotations

import errno
import os
import socket
import sqlite3
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, Final

from linux.simulated import SimulatedFailure
from linux.syscalls import SyscallError

TRUE_AFTERWARDS: Final = {
    ("rmdir", "ENOENT"),
    ("unlink", "ENOENT"),
    ("kill", "ESRCH"),
    ("pidfd_send_signal(2)", "ESRCH"),
}
"""Errors that a call gets only after another process did the same: so it is done first."""

FORGE_KILLED: Final = "killed"
"""A fault of a call of the forge: it is killed just before."""

ANCHOR_KILLED: Final = "anchor killed"
"""A fault of any other call: the anchor of the life, if there is one, is killed just before."""

CLOSING: Final = frozenset({"close"})
"""What still happens when a program dies: the kernel closes what it had open."""


@dataclass(frozen=True, order=True)
class CallSite:
    """One system call of one life."""

    who: str
    """`consumer`, `provider`, `forge`."""
    where: str
    """The function that makes it."""
    name: str
    nth: int
    """Which of its like, from 1."""

    def __str__(self) -> str:
        return f"{self.who}: {self.name} #{self.nth} in {self.where}"


@dataclass(frozen=True, order=True)
class Fault:
    """What becomes of a call."""

    call: CallSite
    kind: str
    """
    An errno's name; or `one byte`, `half`, `death`, `FORGE_KILLED`, `ANCHOR_KILLED`, or one of
    `interference.ACTS`.
    """

    def __str__(self) -> str:
        return f"{self.call}: {self.kind}"

    def as_json(self) -> list[Any]:
        return [self.call.who, self.call.where, self.call.name, self.call.nth, self.kind]

    @classmethod
    def of_json(cls, said: Sequence[Any]) -> Fault:
        return cls(CallSite(*said[:4]), said[4])


FaultPlan = tuple[Fault, ...]


class Death(BaseException):
    """The program that made the call is no more; it must not catch this."""


# What a correct caller can be told, by the man page of each call. Left out are the errnos that
# only a mistake of the caller's own brings about (EBADF, EFAULT, ENOTSOCK, …), and EINTR, which
# Python repeats by itself (PEP 475): `test_strace.py` injects that below Python.
_OPEN: Final = "EACCES EMFILE ENFILE ENOMEM ENOENT"  # open(2)
_LOOKUP: Final = "EACCES ENOENT ENOTDIR ENOMEM"  # path_resolution(7), stat(2)
_READ: Final = "EIO"  # read(2)
_SOCKET: Final = "EMFILE ENFILE ENOBUFS ENOMEM"  # socket(2)
_PROCESS: Final = "EAGAIN ENOMEM"  # fork(2), clone(2)

ERRNOS: Final[Mapping[str, str]] = {
    "accept": "EAGAIN ECONNABORTED EMFILE ENFILE ENOBUFS ENOMEM EPERM",  # accept(2)
    "bind": "EACCES EADDRINUSE ENOENT ENOMEM ENOTDIR EROFS ENOSPC",  # bind(2)
    "chmod": "EACCES EIO ENOENT ENOMEM EPERM EROFS",  # chmod(2)
    "close": "EIO ENOSPC EDQUOT",  # close(2)
    "connect": "EACCES EAGAIN ECONNREFUSED ENOENT EPERM EPROTOTYPE",  # connect(2), unix(7)
    "epoll": "EMFILE ENFILE ENOMEM",  # epoll_create1(2)
    "eventfd": "EMFILE ENFILE ENODEV ENOMEM",  # eventfd(2)
    "exists": "EACCES ENAMETOOLONG ENOMEM",
    "fchmod": "EIO EPERM EROFS",  # fchmod(2)
    "fcntl": "EMFILE",  # fcntl(2), F_DUPFD_CLOEXEC
    "flock": "EAGAIN ENOLCK",  # flock(2)
    "fork": _PROCESS,
    "fstat": "EIO ENOMEM",  # fstat(2)
    "fsconfig(2)": "EBUSY EINVAL EIO ENOMEM EPERM",
    "fsmount(2)": "EBUSY EMFILE ENFILE ENOMEM EPERM",
    "fsopen(2)": "EMFILE ENFILE ENODEV ENOMEM EPERM",
    "ftruncate": "EIO EPERM",  # ftruncate(2)
    "getsockopt": "ENOBUFS ENOMEM EMFILE",  # getsockopt(2), unix(7) SO_PEERPIDFD
    "getxattr": "EACCES EIO ENOMEM",  # getxattr(2)
    "inotify_add_watch(2)": "ENOENT ENOMEM ENOSPC",
    "inotify_init1(2)": "EMFILE ENFILE ENOMEM",
    "ioctl(2) LOOP_CONFIGURE": "EBUSY EINVAL EIO ENOMEM",  # loop(4)
    "ioctl(2) LOOP_CTL_GET_FREE": "ENOMEM ENOSPC",  # loop(4)
    "ioctl(2)": "EMFILE ENFILE ENOMEM ENOTTY EPERM ESRCH",  # ioctl_pidfd(2), ioctl_nsfs(2)
    "is_dir": "EACCES EIO ENOMEM",  # stat(2)
    "is_socket": "EACCES EIO ENOMEM",
    "is_symlink": "EACCES EIO ENOMEM",
    "iterdir": "EACCES EMFILE ENFILE ENOENT ENOMEM",  # opendir(3)
    "kill": "EPERM ESRCH",  # kill(2)
    "listen": "EADDRINUSE",  # listen(2)
    "listxattr": "EACCES ENOENT ENOMEM",  # listxattr(2)
    "lstat": _LOOKUP,
    "memfd_create": "EMFILE ENFILE ENOMEM EPERM",  # memfd_create(2)
    "mkdir": "EACCES EAGAIN EEXIST ENOENT ENOMEM ENOSPC EROFS",  # mkdir(2), cgroups(7)
    "mount(2)": "EACCES EBUSY EINVAL ENODEV ENOENT ENOMEM EPERM",
    "move_mount(2)": "EACCES EINVAL ELOOP ENOENT ENOSPC EPERM",  # move_mount(2)
    "open": _OPEN,
    "open_tree(2)": "EACCES EINVAL EMFILE ENFILE ENOMEM EPERM",
    "openat2(2)": f"{_OPEN} EAGAIN ELOOP EXDEV",  # openat2(2)
    "pidfd_open(2)": "EMFILE ENFILE ENODEV ENOMEM ESRCH",
    "pidfd_send_signal(2)": "EPERM ESRCH",
    "pipe": "EMFILE ENFILE",  # pipe(2)
    "poll": "ENOMEM",
    "Popen": f"{_PROCESS} EMFILE ENOENT",  # vfork(2), execve(2), pipe(2)
    "posix_spawn": f"{_PROCESS} E2BIG EACCES ENOENT",  # posix_spawn(3), execve(2)
    "pread": "EIO ENOMEM",  # read(2); seq_file
    "pread in cgroups._reads_populated": "EIO ENODEV ENOMEM ENOTSUP",  # cgroups(7)
    "pwrite": "EDQUOT EIO ENOSPC",  # pwrite(2)
    "read": _READ,
    "read in cgroups._read_in": f"{_READ} ENODEV ENOTSUP",  # cgroups(7)
    "read_bytes": f"{_OPEN} {_READ} ESRCH",  # open(2), read(2), proc(5)
    "read_text": f"{_OPEN} {_READ} ENODEV ENOTSUP",  # open(2), read(2), cgroups(7)
    "recv": "EAGAIN ECONNRESET ENOMEM",  # recv(2), unix(7)
    "recvmsg": "EAGAIN ECONNRESET ENOMEM",  # recvmsg(2), unix(7)
    "register": "ENOMEM ENOSPC",  # epoll_ctl(2)
    "removexattr": "EACCES ENODATA ENOENT",  # removexattr(2)
    "rmdir": "EACCES EBUSY ENOENT ENOMEM ENOTEMPTY EPERM EROFS",  # rmdir(2)
    "scandir": "ENOENT ENOMEM EMFILE ENFILE",  # opendir(3), readdir(3)
    "sendmsg": "EAGAIN ECONNRESET ENOBUFS ENOMEM EPERM EPIPE ETOOMANYREFS",  # sendmsg(2), unix(7)
    "setns(2)": "EINVAL ENOMEM EPERM",
    "setsockopt": "ENOPROTOOPT EPERM",  # setsockopt(2)
    "setxattr": "EDQUOT EEXIST ENOENT ENOSPC ENOTSUP EPERM",  # setxattr(2)
    "socket": _SOCKET,
    "socketpair": _SOCKET,
    "sqlite": "SQLITE_FULL SQLITE_IOERR SQLITE_CANTOPEN SQLITE_BUSY",  # sqlite.org/rescode.html
    "stat": _LOOKUP,
    "step": "EIO",  # a step of the simulated node, which stands for any of its calls
    "unlink": "EACCES EBUSY EIO ENOENT EPERM EROFS",  # unlink(2)
    "unregister": "ENOENT ENOMEM",  # epoll_ctl(2)
    "unshare(2)": "EINVAL ENOMEM ENOSPC EPERM EUSERS",
    "waitid": "ECHILD",  # waitid(2)
    "write": "EACCES EAGAIN ENODEV ENOSPC ENOTSUP",  # write(2), cgroups(7)
    "write_text": "EACCES EBUSY ENODEV ENOENT ENOSPC ENOTSUP",  # open(2), write(2), cgroups(7)
    "umount2(2)": "EBUSY EINVAL EPERM",
}
"""
What each call can be refused with; the names of the functions are Python's, or a man page's. Where
a place is named, more is possible there.
"""

SHORT: Final = ("one byte", "half")
"""How a stream socket moves less than it was asked to: send(2), recv(2)."""


def errnos_of(name: str) -> tuple[str, ...]:
    """The errnos a call can be refused with."""
    words = ERRNOS.get(name) or ERRNOS[name.partition(" ")[0]]
    return tuple(words.split())


def faults_of(call: CallSite) -> list[Fault]:
    """Every single thing that can go wrong with a call, but for the death of who makes it."""
    there = f"{call.name} in {call.where}"
    return [Fault(call, kind) for kind in errnos_of(there if there in ERRNOS else call.name)]


def short_faults_of(call: CallSite) -> list[Fault]:
    """Every way in which a transfer can be cut short."""
    is_transfer = call.name in ("sendmsg", "recvmsg") and not call.where.startswith("forge")
    return [Fault(call, kind) for kind in SHORT] if is_transfer else []


def kills_of(call: CallSite) -> list[Fault]:
    """Which process beside its maker can be killed at a call."""
    return [Fault(call, FORGE_KILLED if call.who == "forge" else ANCHOR_KILLED)]


@dataclass
class FaultInjector:
    """
    Lets calls pass, one by one, and does to some of them what the plan says.

    Args:
        plan: what happens to which call.
        is_asleep: whether calls pass uncounted, until `wake`.
    """

    plan: FaultPlan = ()
    who: str | None = None
    """Who makes all the calls here; None asks the stack."""
    is_asleep: bool = False
    passed: list[CallSite] = field(default_factory=list)
    """All calls so far, in order."""
    fired: list[Fault] = field(default_factory=list)
    """What of the plan has happened."""
    on_pass: Callable[[CallSite], None] | None = None
    interferences: Mapping[str, Callable[[], None]] = field(default_factory=dict)
    """What others do just before a call, by the kind of fault; the call is made then."""
    after_interference: Callable[[], None] | None = None
    """Called when a call has been made that was interfered with."""
    dead: set[str] = field(default_factory=set)
    """Programs that make no calls any more."""
    _counts: Counter[tuple[str, str, str]] = field(default_factory=Counter)

    def __call__(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        if self.is_asleep:
            return function(*args, **kwargs)
        where, who = _caller(sys._getframe(2))
        name = _name_of(function, args)
        call = self.note(self.who or who, where, name)
        kind = self.kind_for(call)
        if kind in self.interferences:
            self.interferences[kind]()
            try:
                return function(*args, **kwargs)
            finally:
                if self.after_interference is not None:
                    self.after_interference()
        if kind is None:
            return function(*args, **kwargs)
        if kind in SHORT:
            return _cut_short(kind, function, args, kwargs)
        if name in CLOSING or (name, kind) in TRUE_AFTERWARDS:
            function(*args, **kwargs)  # A number is free, whatever close(2) says.
        if kind == "death":
            self.dead.add(call.who)
            if name in CLOSING:
                return None
            raise Death(call.who)
        raise failure_of(kind, name, args)

    def note(self, who: str, where: str, name: str) -> CallSite:
        """Count a call."""
        self._counts[who, where, name] += 1
        call = CallSite(who, where, name, self._counts[who, where, name])
        self.passed.append(call)
        if self.on_pass is not None:
            self.on_pass(call)
        return call

    def kind_for(self, call: CallSite) -> str | None:
        """What shall become of a call."""
        if call.who in self.dead:
            return "death"
        for fault in self.plan:
            if fault.call == call:
                self.fired.append(fault)
                return fault.kind
        return None

    def step(self, who: str, where: str) -> None:
        """A step of the simulated node: it has no call to make, and fails all the same."""
        if self.is_asleep:
            return
        call = self.note(who, where, "step")
        kind = self.kind_for(call)
        if kind == "death":
            self.dead.add(call.who)
            raise Death(call.who)
        if kind in self.interferences:
            self.interferences[kind]()
        elif kind is not None:
            raise SimulatedFailure(f"{where}: {kind}")


def failure_of(kind: str, name: str, args: Sequence[Any] = ()) -> BaseException:
    """The exception by which a caller learns of a failure."""
    if name == "sqlite":
        error = sqlite3.OperationalError(_SQLITE_SAYS[kind])
        error.sqlite_errorcode = getattr(sqlite3, kind)
        error.sqlite_errorname = kind
        return error
    number = getattr(errno, kind)
    if "(2)" in name:
        return SyscallError(name, number, args[1] if len(args) > 1 else None)
    return OSError(number, os.strerror(number))


_SQLITE_SAYS: Final = {
    "SQLITE_FULL": "database or disk is full",
    "SQLITE_IOERR": "disk I/O error",
    "SQLITE_CANTOPEN": "unable to open database file",
    "SQLITE_BUSY": "database is locked",
}


def _cut_short(
    kind: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """Move one byte, or half of what was asked for; a packet cannot be cut."""
    sock = getattr(function, "__self__", None)
    assert isinstance(sock, socket.socket)
    if sock.type is not socket.SOCK_STREAM:
        return function(*args, **kwargs)
    first, *rest = args
    if isinstance(first, int):
        return function(_less(kind, first), *rest, **kwargs)
    (data,) = first
    return function([data[: _less(kind, len(data))]], *rest, **kwargs)


def _less(kind: str, size: int) -> int:
    return 1 if kind == "one byte" else max(1, size // 2)


def _name_of(function: Callable[..., Any], args: tuple[Any, ...]) -> str:
    name = function.__name__
    if name == "_once":  # linux.syscalls makes all its calls so; it knows their names
        return str(args[0])
    owner = type(getattr(function, "__self__", None))
    if owner is sqlite3.Connection or function is sqlite3.connect:
        return "sqlite"
    return name


_UNTOLD: Final = ("linux/syscalls.py", "transport/calls.py")
"""Who only makes calls for others."""


@cache
def _place_of(code: CodeType) -> tuple[str, bool]:
    """A function's name, if it is one that counts; and whether only consumers have it."""
    path = code.co_filename
    place = "" if path.endswith(_UNTOLD) else f"{Path(path).stem}.{code.co_qualname}"
    return place, "/transport/request/" in path


def _caller(frame: FrameType | None) -> tuple[str, str]:
    """Where a call is made, and whose program that is."""
    where = ""
    while frame is not None:
        code = frame.f_code
        place, is_consumer = _place_of(code)
        where = where or place
        if is_consumer:
            return where, "consumer"
        frame = frame.f_back
    return where, "provider"
