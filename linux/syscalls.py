"""Linux system calls that Python's standard library lacks: namespaces, mounts, ioctls, pidfds.

One function per system call, named as in its man page, without policy; only EINTR is retried. A
call that fails raises `SyscallError`, which says call, errno and path. A call that opens something
returns a `Descriptor`, close-on-exec, which the caller owns. No other module may import `ctypes`.

Every call releases the interpreter's lock while it is in the kernel and reads errno from its own
thread, so any thread may make any call. Where one affects *other* threads, its docstring says so.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterable
from enum import IntEnum
from errno import EINTR, EINVAL, ENODATA, ETIMEDOUT, errorcode
from typing import Final, Protocol, Self, TypeAlias

from statemachine.errors import Copyable
from transport.calls import syscall
from transport.descriptors import Descriptor

from .shortage import words_for

# sched.h: unshare(2), setns(2); also what NS_GET_NSTYPE answers with.
CLONE_FS: Final = 0x00000200
CLONE_NEWNS: Final = 0x00020000
CLONE_NEWUSER: Final = 0x10000000
CLONE_NEWPID: Final = 0x20000000
CLONE_NEWNET: Final = 0x40000000

# linux/mount.h: mount(2), umount2(2).
MS_RDONLY: Final = 0x1
MS_NOSUID: Final = 0x2
MS_NODEV: Final = 0x4
MS_NOEXEC: Final = 0x8
MS_REMOUNT: Final = 0x20
MS_BIND: Final = 0x1000
MS_REC: Final = 0x4000
MS_PRIVATE: Final = 1 << 18
MS_SLAVE: Final = 1 << 19
MS_SHARED: Final = 1 << 20
MNT_DETACH: Final = 0x2
UMOUNT_NOFOLLOW: Final = 0x8

# linux/mount.h: the newer mount calls.
OPEN_TREE_CLONE: Final = 0x1
OPEN_TREE_CLOEXEC: Final = os.O_CLOEXEC
MOVE_MOUNT_F_EMPTY_PATH: Final = 0x4
FSOPEN_CLOEXEC: Final = 0x1
FSMOUNT_CLOEXEC: Final = 0x1
FSCONFIG_SET_FLAG: Final = 0
FSCONFIG_SET_STRING: Final = 1
FSCONFIG_SET_FD: Final = 5
FSCONFIG_CMD_CREATE: Final = 6
MOUNT_ATTR_RDONLY: Final = 0x1
MOUNT_ATTR_NOSUID: Final = 0x2
MOUNT_ATTR_NODEV: Final = 0x4
MOUNT_ATTR_NOEXEC: Final = 0x8

# fcntl.h and linux/openat2.h: how a path is looked up.
AT_FDCWD: Final = -100
AT_EMPTY_PATH: Final = 0x1000
AT_RECURSIVE: Final = 0x8000
RESOLVE_NO_MAGICLINKS: Final = 0x02
RESOLVE_BENEATH: Final = 0x08

# sys/inotify.h: events of a directory.
IN_ATTRIB: Final = 0x4
"""Attributes of something in it were changed."""
IN_DELETE: Final = 0x200
"""Something in it was removed."""
IN_Q_OVERFLOW: Final = 0x4000
"""Events were lost, because too many had not been read."""
IN_ONLYDIR: Final = 0x01000000
"""Watch nothing but a directory."""

FS_LOG_LINE_BYTES_MAX: Final = 4096
"""Longest line that is read from a filesystem context's log; real ones are far shorter."""

FS_LOG_LINES_MAX: Final = 32
"""Most lines that are read from it; the kernel keeps eight."""


_SIGSET_BYTES: Final = 128
"""Size of the C library's sigset_t (signal.h)."""


class Ioctl(IntEnum):
    """The ioctl(2) requests of this project, so that a failure can name its request."""

    NS_GET_USERNS = 0xB701
    """Of a namespace: the user namespace that owns it; EPERM if that is not ours nor below it."""
    NS_GET_NSTYPE = 0xB703
    """Of a namespace: which CLONE flag makes its kind."""
    NS_GET_MNTNS_ID = 0x8008B705
    """Of a mount namespace: its 64-bit id, never used twice (6.11)."""
    NS_GET_PID_FROM_PIDNS = 0x8004B706
    """Of a PID namespace: the pid, as we see it, of the process that has pid `arg` in it (6.11)."""
    NS_GET_ID = 0x8008B70D
    """Of any namespace: its 64-bit id, never used twice (6.18)."""
    PIDFD_GET_MNT_NAMESPACE = 0xFF03
    """Of a pidfd: its process' mount namespace (6.11); `arg` must be 0."""
    PIDFD_GET_NET_NAMESPACE = 0xFF04
    """Of a pidfd: its process' network namespace (6.11); `arg` must be 0."""
    PIDFD_GET_PID_NAMESPACE = 0xFF05
    """Of a pidfd: its process' PID namespace (6.11); `arg` must be 0."""
    LOOP_GET_STATUS64 = 0x4C05
    """Of a loop device: a `struct loop_info64` about its backing file."""
    LOOP_CONFIGURE = 0x4C0A
    """Of a loop device: set the backing file and everything else in one call (5.8)."""
    LOOP_CTL_GET_FREE = 0x4C82
    """Of /dev/loop-control: the number of a loop device that was free a moment ago."""
    SIOCGIFFLAGS = 0x8913
    """Of a socket: the flags of a network interface."""
    SIOCSIFFLAGS = 0x8914
    """Of a socket: set the flags of a network interface."""

    def __init__(self, _: int) -> None:
        # What it is called in errors: worked out once, because every request is made with it.
        self.call: Final = f"ioctl(2) {self._name_}"


class _SystemCall(IntEnum):
    """Numbers of the calls that the C library does not wrap everywhere.

    Calls added since 5.1 have one number on all architectures (Alpha apart), x86_64 and aarch64
    among them, so there is one column.
    """

    PIDFD_SEND_SIGNAL = 424
    OPEN_TREE = 428
    MOVE_MOUNT = 429
    FSOPEN = 430
    FSCONFIG = 431
    FSMOUNT = 432
    PIDFD_OPEN = 434
    OPENAT2 = 437

    def __init__(self, _: int) -> None:
        self.call: Final = f"{self._name_.lower()}(2)"


class HasFileno(Protocol):
    """Anything that has a descriptor: a `Descriptor`, a socket, a file."""

    def fileno(self) -> int:
        """Return the descriptor's number; the object still owns it."""
        ...


FileDescriptor: TypeAlias = int | HasFileno
"""A descriptor that the callee borrows."""

Path: TypeAlias = str | bytes | os.PathLike[str]
"""A path, as all calls here take it."""


class SyscallError(Copyable, OSError):
    """
    A system call failed.

    Unlike an `OSError` of the standard library it names the call, and it is one class for every
    errno: look at `errno`, not at the class. If it is for want of something, its text says of what.
    """

    # Keeps ERR-8, ERR-2, DAEMON-8.

    def __init__(self, call: str, number: int, path: Path | None = None, advice: str = "") -> None:
        """
        Describe one failure.

        Args:
            call: the call, named as its man page, `mount(2)`.
            number: the errno.
            path: what it was about, if that has a path.
            advice: what may help, for an operator.
        """
        super().__init__(number, os.strerror(number))
        self.call: Final = call
        self.path: Final = None if path is None else os.fsdecode(path)
        self.advice: Final = advice

    @classmethod
    def of(cls, call: str, error: OSError, path: Path | None = None) -> Self:
        """Make one from another `OSError`; an error of this class is returned as it is."""
        if isinstance(error, cls):
            return error
        # The TimeoutError of a socket has no errno.
        number = error.errno or (ETIMEDOUT if isinstance(error, TimeoutError) else EINVAL)
        return cls(call, number, error.filename if path is None else path)

    @property
    def name(self) -> str:
        """The errno's name, `EPERM`."""
        return errorcode.get(self.errno or 0, str(self.errno))

    def __str__(self) -> str:
        subject = f": {self.path}" if self.path is not None else ""
        words = self.advice or words_for(self.call, self.errno or 0)
        advice = f"; {words}" if words else ""
        return f"{self.call}: {self.name} ({self.strerror}){subject}{advice}"


class calling:  # noqa: N801  a context manager, which reads like a function
    """
    Turn an `OSError` of the body into a `SyscallError` that names `call` and `path`.

    For calls that Python does wrap (`os.mkdir`, `os.open`), so that a failure reads the same
    whichever way the call was made.

    Args:
        call: the call, named as its man page.
        path: what it is about.
        tolerated: errnos that end the body without an error.
        kind: the class to raise; an error of this class passes as it is.

    Raises:
        SyscallError: the body raised an `OSError` that is not tolerated.
    """

    # No generator: that would take thrice as long, around each of a provider's calls.
    __slots__ = ("_call", "_kind", "_path", "_tolerated")

    def __init__(
        self,
        call: str,
        path: Path | None = None,
        *tolerated: int,
        kind: type[SyscallError] = SyscallError,
    ) -> None:
        self._call: Final = call
        self._path: Final = path
        self._tolerated: Final = tolerated
        self._kind: Final = kind

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, __: object) -> bool | None:
        if not isinstance(error, OSError) or isinstance(error, self._kind):
            return False
        if error.errno not in self._tolerated:
            raise self._kind.of(self._call, error, self._path) from error
        return True


# --- namespaces -------------------------------------------------------------------------------


def unshare(flags: int) -> None:
    """
    Move the calling thread into new namespaces (CLONE_NEWPID: its next child, not itself).

    CLONE_FS, which CLONE_NEWNS implies, gives the thread a root and a working directory of its own.

    Source: unshare(2).
    """
    _libc_call("unshare", flags)


def setns(namespace: FileDescriptor, kind: int) -> None:
    """
    Move the calling thread into an existing namespace (CLONE_NEWPID: its next children).

    A mount namespace is refused with EINVAL to a thread that shares its root with others; it calls
    `unshare(CLONE_FS)` first.

    `namespace` must be a namespace, never a pidfd: with a pidfd the kernel moves root and working
    directory of *all* threads along with the calling one.

    Args:
        namespace: borrowed.
        kind: the CLONE flag of the namespace's kind; anything else is refused with EINVAL.

    Source: setns(2); the pidfd trap was measured on 6.18.
    """
    _libc_call("setns", _fd(namespace), kind)


# --- mounts -----------------------------------------------------------------------------------


def mount(
    source: Path | None, target: Path, fstype: str | None, flags: int, options: str | None = None
) -> None:
    """Mount something, or change a mount, in the calling thread's mount namespace (mount(2))."""
    _libc_call(
        "mount",
        _text("mount(2)", source),
        _text("mount(2)", target),
        _text("mount(2)", fstype),
        ctypes.c_ulong(flags),
        _text("mount(2)", options),
        path=target,
    )


def umount2(target: Path, flags: int = 0) -> None:
    """Take a mount out of the calling thread's mount namespace (umount2(2))."""
    _libc_call("umount2", _text("umount2(2)", target), flags, path=target)


def open_tree(directory: FileDescriptor, path: Path, flags: int) -> Descriptor:
    """
    Open a mount; with OPEN_TREE_CLONE, a copy of it that is attached nowhere.

    Cloning a mount that is itself detached needs 6.15; before, it is refused with EINVAL.

    Returns:
        The mount; closing a detached one unmounts it. The caller owns it.

    Source: open_tree(2).
    """
    return _open(
        _SystemCall.OPEN_TREE,
        _fd(directory),
        _text("open_tree(2)", path),
        flags | OPEN_TREE_CLOEXEC,
        path=path,
    )


def move_mount(
    source: FileDescriptor, source_path: Path, target: FileDescriptor, path: Path, flags: int
) -> None:
    """Attach a detached mount, or move an attached one, to a path (move_mount(2))."""
    _system_call(
        _SystemCall.MOVE_MOUNT,
        _fd(source),
        _text("move_mount(2)", source_path),
        _fd(target),
        _text("move_mount(2)", path),
        flags,
        path=path,
    )


def attach_mount(mounted: FileDescriptor, path: Path) -> None:
    """Attach the detached mount behind a descriptor to a path: `move_mount` as we always use it."""
    move_mount(mounted, "", AT_FDCWD, path, MOVE_MOUNT_F_EMPTY_PATH)


def fsopen(fstype: str) -> Descriptor:
    """Begin to configure a filesystem (fsopen(2)). The caller owns the context."""
    return _open(_SystemCall.FSOPEN, _text("fsopen(2)", fstype), FSOPEN_CLOEXEC, path=fstype)


def fsconfig_flag(context: FileDescriptor, key: str) -> None:
    """Set a parameter that has no value, such as `ro` (fsconfig(2), FSCONFIG_SET_FLAG)."""
    _fsconfig(context, FSCONFIG_SET_FLAG, key, None, 0)


def fsconfig_string(context: FileDescriptor, key: str, value: str) -> None:
    """Set a parameter to a text, such as `source` (fsconfig(2), FSCONFIG_SET_STRING)."""
    _fsconfig(context, FSCONFIG_SET_STRING, key, value, 0)


def fsconfig_fd(context: FileDescriptor, key: str, value: FileDescriptor) -> None:
    """Set a parameter to a descriptor, such as `pidns` (fsconfig(2), FSCONFIG_SET_FD)."""
    _fsconfig(context, FSCONFIG_SET_FD, key, None, value)


def fsconfig_create(context: FileDescriptor) -> None:
    """
    Make the superblock of what was configured (fsconfig(2), FSCONFIG_CMD_CREATE).

    After a failure the context is good for nothing but `read_fs_log`, which often says more.
    """
    _fsconfig(context, FSCONFIG_CMD_CREATE, None, None, 0)


def fsmount(context: FileDescriptor, attributes: int) -> Descriptor:
    """
    Make a detached mount of a created superblock (fsmount(2)).

    Args:
        context: from `fsopen`, after `fsconfig_create`; borrowed.
        attributes: MOUNT_ATTR flags.

    Returns:
        The mount, attached nowhere; closing it while it is detached unmounts it. The caller owns
        it.
    """
    return _open(_SystemCall.FSMOUNT, _fd(context), FSMOUNT_CLOEXEC, attributes)


def read_fs_log(context: FileDescriptor) -> list[str]:
    """
    Read the log of a filesystem context.

    Never raises: it is called after a failure, and must not hide that one.

    Returns:
        The log's lines, oldest first, without the letter that tells their severity; they are
        consumed.

    Source: fsopen(2), "Message retrieval interface".
    """
    number = context if isinstance(context, int) else context.fileno()
    lines: list[str] = []
    while len(lines) < FS_LOG_LINES_MAX:
        try:
            line = syscall(os.read, number, FS_LOG_LINE_BYTES_MAX)
        except OSError as error:
            if error.errno != ENODATA:
                lines.append(f"(log: {error.strerror})")
            break
        text = line.decode("utf-8", "replace").strip()
        lines.append(text[2:] if text[1:2] == " " else text)
    return lines


# --- files and processes ----------------------------------------------------------------------


def openat2(
    directory: FileDescriptor, path: Path, flags: int, *, resolve: int = 0, mode: int = 0
) -> Descriptor:
    """
    Open a path, and restrict how it is looked up.

    Args:
        directory: where a relative path begins, or AT_FDCWD; borrowed.
        path: what to open.
        flags: O_ flags; O_CLOEXEC is added.
        resolve: RESOLVE_ flags; RESOLVE_BENEATH keeps the lookup below `directory` (EXDEV if it
            would leave it).
        mode: permissions of a file that is created.

    Returns:
        The open file; the caller owns it.

    Source: openat2(2).
    """
    how = struct.pack("=QQQ", flags | os.O_CLOEXEC, mode, resolve)
    return _open(
        _SystemCall.OPENAT2,
        _fd(directory),
        _text("openat2(2)", path),
        how,
        ctypes.c_size_t(len(how)),
        path=path,
    )


def open_cgroup_by_id(mount: FileDescriptor, cgroup_id: int) -> Descriptor:
    """
    Open the directory of a cgroup by its id, wherever it is (open_by_handle_at(2)).

    Args:
        mount: an open directory in cgroup v2; borrowed.
        cgroup_id: the directory's inode number.

    Returns:
        The directory; the caller owns it.

    Raises:
        SyscallError: ESTALE, there is none; EPERM, no CAP_DAC_READ_SEARCH.
    """
    # struct file_handle: size and type of the handle, then the handle: FILEID_KERNFS, the inode.
    handle = ctypes.create_string_buffer(struct.pack("=IiQ", 8, 0xFE, cgroup_id))
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    name = f"cgroup {cgroup_id}"
    arguments = (_fd(mount), handle, flags)
    return Descriptor(_libc_call("open_by_handle_at", *arguments, path=name))


def ioctl(fd: FileDescriptor, request: int, arg: int | bytearray = 0) -> int:
    """
    Make an ioctl(2) request.

    Args:
        fd: borrowed.
        request: an `Ioctl`, so that a failure can name it, or any number.
        arg: a number, or a buffer which the kernel reads and writes in place. It is always passed:
            some requests refuse (EINVAL) the garbage that C passes for an argument left out.

    Returns:
        What the call returned, 0 or more.

    Source: ioctl(2).
    """
    value: _CValue
    if isinstance(arg, int):
        value = ctypes.c_ulong(arg)
    else:
        value = (ctypes.c_char * len(arg)).from_buffer(arg)
    call = request.call if isinstance(request, Ioctl) else f"ioctl(2) {hex(request)}"
    return _checked(call, _libc.ioctl, _fd(fd), ctypes.c_ulong(request), value)


def ioctl_descriptor(fd: FileDescriptor, request: int, arg: int = 0) -> Descriptor:
    """Make a request that returns a descriptor, close-on-exec; the caller owns it."""
    return Descriptor(ioctl(fd, request, arg))


def inotify_init1() -> Descriptor:
    """
    Make an inotify instance, from which events are read without blocking (inotify_init1(2)).

    The caller owns it.

    Raises:
        SyscallError: EMFILE, no descriptor is left, or no instance of the user's (128 by default).
    """
    flags = os.O_NONBLOCK | os.O_CLOEXEC
    return Descriptor(_libc_call("inotify_init1", flags))


def inotify_add_watch(instance: FileDescriptor, path: Path, mask: int) -> int:
    """
    Watch a path; one that is watched already keeps its number (inotify_add_watch(2)).

    Args:
        instance: from `inotify_init1`; borrowed.
        path: what to watch.
        mask: IN_ flags.

    Returns:
        The number that its events have.
    """
    text = _text("inotify_add_watch(2)", path)
    return _libc_call("inotify_add_watch", _fd(instance), text, mask, path=path)


def pidfd_open(pid: int) -> Descriptor:
    """
    Open a process; the pidfd refers to it even when its pid is reused.

    Returns:
        A descriptor that the caller owns.

    Raises:
        SyscallError: ESRCH, no such process (a zombie is still one); EINVAL, the number is a
            thread's that leads no process (ENOENT since 6.15).

    Source: pidfd_open(2).
    """
    # A pid that was read from a file can be any number, also one that only this type accepts.
    return _open(_SystemCall.PIDFD_OPEN, ctypes.c_int(pid), 0, path=f"pid {pid}")


def pidfd_send_signal(pidfd: FileDescriptor, signal: int) -> None:
    """Send a signal to the process behind a pidfd; ESRCH once it is reaped."""
    _system_call(_SystemCall.PIDFD_SEND_SIGNAL, _fd(pidfd), signal, None, 0)


def signalfd(numbers: Iterable[int]) -> Descriptor:
    """
    Make a descriptor that is readable while one of these signals is pending (signalfd(2)).

    The signals have to be blocked. The descriptor's caller owns it.

    Raises:
        SyscallError: EMFILE, ENFILE, no descriptor is left.
    """
    mask = ctypes.create_string_buffer(_SIGSET_BYTES)
    for number in numbers:
        _libc_call("sigaddset", mask, number)
    flags = os.O_NONBLOCK | os.O_CLOEXEC
    return Descriptor(_libc_call("signalfd", -1, mask, flags))


def limit_heaps(count: int) -> bool:
    """
    Have malloc(3) use so many heaps for all threads; those that are there already stay.

    Returns:
        Whether this C library has such a limit; glibc has.

    Source:
        mallopt(3), M_ARENA_MAX.
    """
    mallopt = getattr(_libc, "mallopt", None)
    return bool(mallopt and mallopt(_M_ARENA_MAX, count))


# --- making a call --------------------------------------------------------------------

_CValue: TypeAlias = (
    int
    | bytes
    | ctypes.c_int
    | ctypes.c_ulong
    | ctypes.c_size_t
    | ctypes.Array[ctypes.c_char]
    | None
)
"""An argument. By itself ctypes passes an int as a C int, and bytes and None as pointers; to make
an object of a type for each takes longer than the rest. What is wider than a C int needs one."""

# CDLL, not PyDLL, releases the interpreter's lock. use_errno keeps errno per thread, so that calls
# of the interpreter do not overwrite it.
_M_ARENA_MAX: Final = -8

_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class _Function(Protocol):
    def __call__(self, *arguments: _CValue) -> int: ...


def _checked(call: str, function: _Function, *arguments: _CValue, path: Path | None = None) -> int:
    while True:
        try:
            return syscall(_once, call, path, function, *arguments)
        except SyscallError as error:
            if error.errno != EINTR:
                raise


def _once(call: str, path: Path | None, function: _Function, *arguments: _CValue) -> int:
    result = function(*arguments)
    if result < 0:
        raise SyscallError(call, ctypes.get_errno(), path)
    return result


def _libc_call(name: str, *arguments: _CValue, path: Path | None = None) -> int:
    return _checked(f"{name}(2)", getattr(_libc, name), *arguments, path=path)


def _system_call(number: _SystemCall, *arguments: _CValue, path: Path | None = None) -> int:
    return _checked(number.call, _libc.syscall, number, *arguments, path=path)


def _open(number: _SystemCall, *arguments: _CValue, path: Path | None = None) -> Descriptor:
    return Descriptor(_system_call(number, *arguments, path=path))


def _fsconfig(
    context: FileDescriptor, command: int, key: str | None, value: str | None, aux: FileDescriptor
) -> None:
    _system_call(
        _SystemCall.FSCONFIG,
        _fd(context),
        command,
        _text("fsconfig(2)", key),
        _text("fsconfig(2)", value),
        _fd(aux),
        path=None if key is None else key if value is None else f"{key}={value}",
    )


def _fd(fd: FileDescriptor) -> int:
    return fd if isinstance(fd, int) else fd.fileno()


def _text(call: str, text: Path | None) -> bytes | None:
    """Make a C string. A NUL inside is refused: the string would be cut there."""
    if text is None:
        return None
    try:
        encoded = os.fsencode(text)
    except UnicodeEncodeError as error:
        raise SyscallError(call, EINVAL, ascii(text)) from error
    if b"\0" in encoded:
        raise SyscallError(call, EINVAL, ascii(text))
    return encoded
