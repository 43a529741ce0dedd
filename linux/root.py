"""What a process's root directory means for mount namespaces: a chroot, or no mount propagation.

Who enters a mount namespace gets that namespace's own root. So a process in a chroot(2) would have
its workload see other files than its own, and a mount at another path than it says.
"""

from __future__ import annotations

import os
from typing import Final

from transport.calls import syscall

from . import syscalls
from .mountinfo import mount_lines, parse_mount
from .threads import call_in_thread

CHROOT: Final = (
    "this process is in a chroot, and a process that enters a mount namespace leaves it: run this "
    "outside, or with pivot_root(8) in a mount namespace of its own in place of chroot(8)"
)
"""What is wrong in a chroot, and what helps."""

PRIVATE: Final = (
    "the mount of / is private, so what is mounted later is not seen in an allocation: "
    "mount --make-rshared /"
)
"""What is wrong without mount propagation, and what helps."""


def is_chroot() -> bool:
    """
    Say whether this process's root is another one than that of its mount namespace.

    Enters that namespace again, in a thread: that moves the thread's root. Without permission to do
    so the answer is no.

    Raises:
        SyscallError: EAGAIN, no thread can be started.
    """

    def has_another() -> bool:
        try:
            syscalls.unshare(syscalls.CLONE_FS)
            before = _identity_of_root(infos)
            syscalls.setns(namespace, syscalls.CLONE_NEWNS)
            return before != _identity_of_root(infos)
        except OSError:
            return False

    # Opened before the move: there need not be a /proc afterwards.
    with (
        syscalls.openat2(syscalls.AT_FDCWD, "/proc/self/ns/mnt", os.O_RDONLY) as namespace,
        syscalls.openat2(syscalls.AT_FDCWD, "/proc/self/fdinfo", os.O_RDONLY) as infos,
    ):
        return call_in_thread(has_another)


def has_propagation() -> bool:
    """Say whether / receives what is mounted later, so that an allocation's can as well."""
    tops = [mount.tags for mount in map(parse_mount, mount_lines()) if mount.point == "/"]
    return bool(tops) and any(tag.startswith(("shared:", "master:")) for tag in tops[-1])


def _identity_of_root(infos: syscalls.HasFileno) -> tuple[int, int, int]:
    """Return the device and inode of /, and the id of its mount: a bind mount has others."""
    with syscalls.openat2(syscalls.AT_FDCWD, "/", os.O_PATH) as root:
        status = syscall(os.fstat, root.fileno())
        with syscalls.openat2(infos, str(root.fileno()), os.O_RDONLY) as info:
            text = syscall(os.read, info.fileno(), 4096).decode("ascii")
    (mount,) = (line for line in text.splitlines() if line.startswith("mnt_id:"))
    return status.st_dev, status.st_ino, int(mount.split()[1])
