"""Anchor: the process that keeps an allocation's namespaces alive, and how to find it again.

A PID namespace lives as long as its first process. So every allocation has an *anchor*: a small
process that does nothing, outlives the provider, and is killed to end the allocation. All the
allocation's namespaces can be opened from it, so the provider holds one pidfd per allocation. The
anchor of a consumer that serves itself waits for the end of a pipe instead, which that one holds.

The anchor executes a program that only waits (`forge.idle`, or `sleep infinity`), with SIGCHLD
ignored. That survives the exec and makes the Linux kernel reap the orphans which a PID namespace's
init inherits.

A provider that starts again has to find its anchors without mistaking another process for one. Two
things outlive the provider:

    identity    in the journal: boot, pid, and what tells this process from a later one of that pid
    token       the only variable in the anchor's environment. All anchors of a provider instance
                are in one cgroup, so even one without a journal entry is found.

Anchors are started in `forge`.
"""

from __future__ import annotations

import errno
import os
import select
from collections.abc import Collection, Mapping
from contextlib import ExitStack, suppress
from functools import cache
from pathlib import Path
from signal import SIGKILL
from typing import Final

from statemachine.record import fields_of, record
from transport.calls import syscall
from transport.descriptors import Descriptor, Owner

from . import syscalls
from .features import Features
from .syscalls import SyscallError, calling

ANCHOR_COMMAND: Final = ("sleep", "infinity")
"""What an anchor executes where `forge.idle` has nothing; the first word is looked up in PATH."""

TIED_COMMAND: Final = ("cat",)
"""What an anchor executes that ends with its owner: it reads a pipe which that one holds open."""

ANCHOR_VARIABLE: Final = "NSHANDOFF_ANCHOR"
"""The one variable in an anchor's environment; its value is the token."""

READ_BYTES_MAX: Final = 65_536
"""How much of a file in /proc is read at a time."""

_NAMESPACE_LINKS: Final = ("pid", "net", "mnt")

# Fields of /proc/PID/stat behind the command's name, which may itself contain spaces and brackets:
# the first one is field 3, and the start time is field 22.
_STAT_START_TIME: Final = 22 - 3

# What /proc answers about a process that has gone, or is going.
_GONE: Final = frozenset({errno.ENOENT, errno.ESRCH})

# What pidfd_open says about a number that no process has. If a thread has it that leads no process,
# that is EINVAL, and ENOENT since 6.15.
_NO_PROCESS: Final = frozenset({errno.ESRCH, errno.ENOENT, errno.EINVAL})


@cache
def boot_id() -> str:
    """Return the id of the current boot; no pid or inode means anything after another one."""
    path = "/proc/sys/kernel/random/boot_id"
    with calling("read(2)", path):
        return syscall(Path(path).read_text, encoding="ascii").strip()


@record
class AnchorIdentity:
    """
    What tells one anchor from every other process, in a form that can be stored.

    Source:
        pidfd_open(2), "pidfs"; proc_pid_stat(5). A start time alone is weak: a forced reuse of a
        pid had the same one in 41 of 50 cases.
    """

    boot_id: str
    """The boot in which the rest is valid."""
    pid: int
    """As the provider sees it."""
    pidfs_inode: int | None
    """Unique for the whole boot; None where the Linux kernel does not have it (before 6.9)."""
    start_time: int
    """Clock ticks after the boot."""
    seen_from: int
    """Inode of the PID namespace in which `pid` means it; 0 if that was not noted."""
    namespaces: Mapping[str, int]
    """Inode of each namespace, by its name in /proc. Not proof by itself: inodes are reused."""

    def as_json(self) -> dict[str, object]:
        """Return it as plain values, for the journal."""
        return {**fields_of(self), "namespaces": dict(self.namespaces)}

    @classmethod
    def from_json(cls, plain: Mapping[str, object]) -> AnchorIdentity:
        """
        Read what `as_json` returned.

        Raises:
            ValueError: it is something else; the text names the field.
        """
        inode = plain.get("pidfs_inode")
        namespaces = plain.get("namespaces")
        if not isinstance(namespaces, dict):
            raise ValueError(f"namespaces of an anchor's identity: {namespaces!r}")
        return cls(
            boot_id=_text(plain, "boot_id"),
            pid=_number(plain, "pid"),
            pidfs_inode=None if inode is None else _number(plain, "pidfs_inode"),
            start_time=_number(plain, "start_time"),
            seen_from=_number(plain, "seen_from"),
            namespaces={str(name): _number(namespaces, name) for name in namespaces},
        )


class Anchor(Owner):
    """
    One anchor, held by a pidfd, which refers to the same process even when the pid is reused.

    Closing it (or leaving the context) closes the pidfd and lets the process live; `kill` ends it.

    Args:
        pid: For texts and for /proc.
        pidfd: This object owns it.
        token: The value of `ANCHOR_VARIABLE` in its environment.
    """

    # Keeps CRASH-1.

    __slots__ = ("pid", "pidfd", "token")

    def __init__(self, pid: int, pidfd: Descriptor, token: str) -> None:
        self.pid: Final = pid
        self.pidfd: Final = pidfd
        self.token: Final = token

    def is_alive(self, patience_ms: int = 0) -> bool:
        """
        Say whether the anchor has not ended; a zombie has.

        One that was killed is alive until every process of its PID namespace is reaped. The parent
        of a process that joined from outside may never do that, so never wait for it without a
        limit.

        Args:
            patience_ms: How long to wait for its end, if it is alive; 0 does not wait.

        Raises:
            ValueError: the anchor is closed.
        """
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        return not poll.poll(patience_ms)

    def kill(self) -> None:
        """
        Kill the anchor, and with it every process of its PID namespace; does not wait.

        One that has ended already is no failure.

        Raises:
            SyscallError: no permission (EPERM); the anchor stays alive.
            ValueError: the anchor is closed.
        """
        try:
            syscalls.pidfd_send_signal(self.pidfd, SIGKILL)
        except SyscallError as error:
            if error.errno != errno.ESRCH:
                raise

    def identity(self, features: Features) -> AnchorIdentity:
        """
        Return what tells this process from every other.

        Args:
            features: Without `pidfs_inodes` it has start time and namespaces only.

        Raises:
            SyscallError: ESRCH, the anchor has ended.
        """
        inode = _inode_of(self.pidfd) if features.pidfs_inodes else None
        start_time = _start_time(self.pid)
        namespaces = _namespace_inodes(self.pid)
        # Asked last: if the anchor lives now, the pid was its own while the rest was read.
        if start_time is None or len(namespaces) < len(_NAMESPACE_LINKS) or not self.is_alive():
            raise SyscallError("pidfd", errno.ESRCH, f"anchor {self.pid}")
        seen_from = own_pid_namespace()
        return AnchorIdentity(boot_id(), self.pid, inode, start_time, seen_from, namespaces)

    def close(self) -> None:
        """Close the pidfd; the process stays alive. Idempotent."""
        self.pidfd.close()

    def __enter__(self) -> Anchor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Anchor(pid={self.pid}, pidfd={self.pidfd!r}, token={self.token!r})"


def adopt(identity: AnchorIdentity, token: str, features: Features) -> Anchor | None:
    """
    Find the anchor that has an identity.

    Args:
        identity: From `Anchor.identity`, in this provider process or an earlier one.
        token: What its environment must say.
        features: Without `pidfs_inodes`, the pidfs inode of the identity is ignored.

    Returns:
        The anchor, which the caller owns. None only if it is proven that it has ended: its pid is
        free, or belongs to another process now, or the machine was booted since. Without proof it
        counts as alive, because to release a living allocation is the greater harm. An anchor that
        was killed and cannot end yet is alive.

    Raises:
        SyscallError: the process cannot be read (no descriptor left, no permission).
    """
    # Keeps CRASH-8.
    if identity.boot_id != boot_id():
        return None
    pidfd = _open_process(identity.pid)
    if pidfd is None:
        return None
    with ExitStack() as undo:
        undo.enter_context(pidfd)
        anchor = Anchor(identity.pid, pidfd, token)
        # The pidfd came first: if its process lives at the end, everything that was read in between
        # was read from this one process.
        # Guard: the number is the same process's.
        if _is_other(anchor, identity, features) or not anchor.is_alive():
            return None
        undo.pop_all()
        return anchor


def find_anchors(cgroup: Path) -> dict[str, Anchor]:
    """
    Find every living anchor in a cgroup, also those without a journal entry.

    One that is just being started has no environment yet and is missed: call this when no forge
    works in that cgroup.

    The cgroup is read again after the processes were opened. So a pid that was reused in between by
    a process elsewhere is not taken for an anchor, whatever that process has in its environment.

    Args:
        cgroup: The anchors' cgroup; its children are not read.

    Returns:
        The anchors by their tokens; the caller owns them. Empty if there is no such cgroup.

    Raises:
        SyscallError: the cgroup or a process cannot be read; nothing stays open.
    """
    # Keeps CRASH-7.
    with ExitStack() as undo:
        found: dict[str, Anchor] = {}
        for pid in _members(cgroup):
            anchor = _open_anchor(pid)
            if anchor is not None:
                undo.enter_context(anchor)
                found.setdefault(anchor.token, anchor)
        members = _members(cgroup)
        living = {
            token: anchor
            for token, anchor in found.items()
            # Guard: the anchors' cgroup is read again.
            if anchor.pid in members and anchor.is_alive()
        }
        undo.pop_all()
    for anchor in found.values():
        if anchor not in living.values():
            anchor.close()
    return living


def has_hidden_members(cgroup: Path) -> bool:
    """
    Say whether a cgroup has processes that this PID namespace cannot see.

    Raises:
        SyscallError: the cgroup cannot be read.
    """
    return 0 in _listed(cgroup)


def own_pid_namespace() -> int:
    """Return the inode of the PID namespace in which this process sees others."""
    with calling("stat(2)", "/proc/self/ns/pid"):
        return syscall(os.stat, "/proc/self/ns/pid").st_ino


def find_tokens(tokens: Collection[str]) -> dict[str, int]:
    """
    Find processes anywhere on the node that have one of these tokens in their environment.

    It shows that an anchor may be alive, not which process it is: any process can have such a
    variable. Reads every process, so it is for what nothing else has found.

    Returns:
        A pid for each token that was found.
    """
    found: dict[str, int] = {}
    if tokens:
        for name in syscall(os.listdir, "/proc"):
            with suppress(SyscallError):  # kernel threads, and what ends meanwhile
                token = token_of(int(name)) if name.isdecimal() else None
                if token in tokens:
                    found.setdefault(str(token), int(name))
    return found


def token_of(pid: int) -> str | None:
    """
    Read the token in a process' environment.

    Returns:
        The token; None if the process is no anchor, has gone, or is going.

    Raises:
        SyscallError: no permission to read it.
    """
    return _token_in(_read_proc(pid, "environ") or b"")


def _is_other(anchor: Anchor, identity: AnchorIdentity, features: Features) -> bool:
    """Say whether the process is proven to be another one than the identity's."""
    if features.pidfs_inodes and identity.pidfs_inode is not None:
        return _inode_of(anchor.pidfd) != identity.pidfs_inode or _has_other_token(anchor)
    start_time = _start_time(anchor.pid)
    if start_time is not None and start_time != identity.start_time:
        return True
    inodes = _namespace_inodes(anchor.pid)
    if any(identity.namespaces.get(name, inode) != inode for name, inode in inodes.items()):
        return True
    return _has_other_token(anchor)


def _has_other_token(anchor: Anchor) -> bool:
    # An anchor that is being killed has an empty environment, which proves nothing.
    environment = _read_proc(anchor.pid, "environ")
    return bool(environment) and _token_in(environment or b"") != anchor.token


def _token_in(environment: bytes) -> str | None:
    prefix = ANCHOR_VARIABLE.encode() + b"="
    for variable in environment.split(b"\0"):
        if variable.startswith(prefix):
            return os.fsdecode(variable[len(prefix) :])
    return None


def _open_process(pid: int) -> Descriptor | None:
    try:
        return syscalls.pidfd_open(pid)
    except SyscallError as error:
        if error.errno in _NO_PROCESS:
            return None
        raise


def _open_anchor(pid: int) -> Anchor | None:
    pidfd = _open_process(pid)
    if pidfd is None:
        return None
    with ExitStack() as undo:
        undo.enter_context(pidfd)
        token = token_of(pid)
        if token is None:
            return None
        undo.pop_all()
        return Anchor(pid, pidfd, token)


def _members(cgroup: Path) -> list[int]:
    return [pid for pid in _listed(cgroup) if pid > 0]


def _listed(cgroup: Path) -> list[int]:
    """Read the pids of a cgroup; a process of an outer or another PID namespace is listed as 0."""
    path = cgroup / "cgroup.procs"
    try:
        return [int(pid) for pid in syscall(path.read_text, encoding="ascii").split()]
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENODEV):
            return []
        raise SyscallError.of("read(2)", error, path) from error


def _inode_of(pidfd: Descriptor) -> int:
    with calling("fstat(2)"):
        return syscall(os.fstat, pidfd.fileno()).st_ino


def _start_time(pid: int) -> int | None:
    content = _read_proc(pid, "stat")
    return None if content is None else int(content.rpartition(b")")[2].split()[_STAT_START_TIME])


def _namespace_inodes(pid: int) -> dict[str, int]:
    inodes: dict[str, int] = {}
    for name in _NAMESPACE_LINKS:
        path = f"/proc/{pid}/ns/{name}"
        try:
            inodes[name] = syscall(os.stat, path).st_ino
        except OSError as error:
            if error.errno not in _GONE:
                raise SyscallError.of("stat(2)", error, path) from error
    return inodes


def _read_proc(pid: int, name: str) -> bytes | None:
    path = f"/proc/{pid}/{name}"
    try:
        with Descriptor(syscall(os.open, path, os.O_RDONLY | os.O_CLOEXEC)) as file:
            return b"".join(iter(lambda: syscall(os.read, file.fileno(), READ_BYTES_MAX), b""))
    except OSError as error:
        if error.errno in _GONE:
            return None
        raise SyscallError.of("read(2)", error, path) from error


def _text(plain: Mapping[str, object], name: str) -> str:
    value = plain.get(name)
    if not isinstance(value, str):
        raise ValueError(f"{name} of an anchor's identity: {value!r}")
    return value


def _number(plain: Mapping[str, object], name: str) -> int:
    value = plain.get(name)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{name} of an anchor's identity: {value!r}")
    return value
