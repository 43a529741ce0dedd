"""Say what is short, and whose, when a system call fails for want of something, or of a right.

An errno alone does not tell: ENOSPC is a full disk where a file is written, a limit of namespaces
from unshare(2), and a limit of watches from epoll_ctl(2). EMFILE concerns one process, or one user
from inotify_init1(2), and ENFILE the whole node. So the words depend on the call and on the errno.
"""

from __future__ import annotations

import os
import re
from errno import EAGAIN, EDQUOT, EFBIG, EMFILE, ENFILE, ENODEV, ENOMEM, ENOSPC, EPERM, EROFS
from pathlib import Path
from typing import Final

from transport.calls import syscall

_NAMESPACES: Final = (
    "no namespace left: raise user.max_pid_namespaces, user.max_net_namespaces and "
    "user.max_mnt_namespaces, or nest fewer than 32 PID namespaces"
)
_WATCHES: Final = "the user has no watch left: raise fs.epoll.max_user_watches"
_INOTIFY_WATCHES: Final = "the user has no watch left: raise fs.inotify.max_user_watches"
_INOTIFY: Final = (
    "the user has no instance of inotify left, or the process that called no descriptor: raise "
    "fs.inotify.max_user_instances or its RLIMIT_NOFILE"
)
_MOUNTS: Final = "the mount namespace has no mount left: raise fs.mount-max"
_DEVICES: Final = "the node has no number left for a file system without a device"
_ATTRIBUTES: Final = "the file has no room left for extended attributes"
_SPACE: Final = "the file system has no space or no inode left: make room"
_DESCRIPTORS: Final = "the process that called has no descriptor left: raise its RLIMIT_NOFILE"
_PROCESSES: Final = (
    "no process left: raise RLIMIT_NPROC of the user, pids.max of the cgroup, or kernel.pid_max "
    "and kernel.threads-max of the node"
)
_THREADS: Final = (
    "no thread left, or no memory for its stack: raise RLIMIT_NPROC, RLIMIT_DATA and RLIMIT_AS of "
    "the user, pids.max of the cgroup, or kernel.threads-max of the node"
)
_MEMORY_OR_INIT: Final = (
    "no memory left in the node or the memory cgroup, or the init of the PID namespace has ended"
)
_CGROUPS: Final = "no cgroup left: raise cgroup.max.descendants and cgroup.max.depth above it"

_RIGHTS: Final = (
    "the process that called has no right to: it needs {}, and no seccomp filter that forbids the "
    "call; in a container that is a privileged one"
)

_PROC: Final = "a part of /proc is missing: mount -t proc proc /proc, without subset=pid"

WORDS: Final = (
    (EPERM, r"unshare|fsopen", _RIGHTS.format("CAP_SYS_ADMIN")),
    (EPERM, r"setns", _RIGHTS.format("CAP_SYS_ADMIN and CAP_SYS_CHROOT")),
    (EPERM, "ioctl(2) SIOCSIFFLAGS", _RIGHTS.format("CAP_NET_ADMIN")),
    (EMFILE, r"mount|fsconfig", _DEVICES),
    (EMFILE, r"inotify_init1", _INOTIFY),
    (EMFILE, r".*", _DESCRIPTORS),
    (ENFILE, r".*", "the node has no descriptor left: raise fs.file-max"),
    (EAGAIN, r"v?fork|clone3?|posix_spawn|execve", _PROCESSES),
    (EAGAIN, r"pthread_create", _THREADS),
    (EAGAIN, r"mkdir", _CGROUPS),
    (ENOMEM, r"v?fork|clone3?|posix_spawn|execve", _MEMORY_OR_INIT),
    (
        ENOMEM,
        r".*",
        "the node, or the memory cgroup of the process that called, has no memory left",
    ),
    (ENOSPC, r"unshare|clone3?", _NAMESPACES),
    (ENOSPC, r"epoll_ctl", _WATCHES),
    (ENOSPC, r"inotify_add_watch", _INOTIFY_WATCHES),
    (ENOSPC, r"mount|move_mount|open_tree|fsmount", _MOUNTS),
    (ENOSPC, r"f?setxattr", _ATTRIBUTES),
    (ENOSPC, r".*", _SPACE),
    (EDQUOT, r".*", "the user has used up the quota of the file system: make room"),
    (
        EFBIG,
        r"write|pwrite",
        "the process that called may write no longer file: raise RLIMIT_FSIZE",
    ),
    (ENODEV, r"fsopen", "the Linux kernel has no such file system: load its module (modprobe)"),
    (EROFS, r".*", "the file system is mounted read-only: remount it, or choose another place"),
)
"""The errno, which calls (a pattern for the name without its section, or one call with all that
follows it), and what to say. The first row that fits counts."""


def words_for(call: str, number: int) -> str:
    """
    Say what is short, whose it is, and what to raise.

    Args:
        call: As its man page is called, `unshare(2)`; of ioctl(2), with the request.
        number: The errno.

    Returns:
        Words for an operator; empty if the failure is no shortage, of rights neither.
    """
    # Keeps DAEMON-8.
    name = call.partition("(")[0]
    for errno, calls, words in WORDS:
        if errno == number and (re.fullmatch(calls, name) or calls == call):
            return words
    return ""


def fault_of(path: Path) -> str:
    """
    Say what is wrong with the place of a file that could not be made, opened or written.

    For failures that come without an errno, from SQLite for example.

    Returns:
        Words for an operator; empty if nothing is found.
    """
    # Keeps DAEMON-8.
    place = path
    while not syscall(place.exists) and place != place.parent:
        place = place.parent
    if place != path and path.is_relative_to("/proc"):
        return _PROC
    if place != path and not syscall(place.is_dir):
        return f"{place} is no directory: choose another place"
    try:
        status = syscall(os.statvfs, place)
    except OSError:
        return ""
    if status.f_flag & os.ST_RDONLY:
        return words_for("open(2)", EROFS)
    # That of /proc has no size.
    is_full = status.f_blocks and not status.f_bavail
    if is_full or (status.f_files and not status.f_favail):
        return words_for("open(2)", ENOSPC)
    return ""
