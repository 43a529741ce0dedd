"""Which of the newer kernel interfaces may be used here?

The floor is Linux 5.14 (RHEL 9, SLES 15). Above it there are interfaces that do better what the
floor can do in a second way; each has a flag here, and every place that has two ways asks the
flag. `Features.probe` finds out by trying, never by reading a version, because distributions
carry features back and security modules take them away.

`OLDEST` is the floor itself. Giving it to any part of `linux` makes that part behave as on the
oldest kernel, which is how the second ways are tested on a new one.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Final

from transport.calls import syscall
from transport.descriptors import Descriptor

from . import syscalls
from .syscalls import Ioctl


@dataclass(frozen=True, slots=True)
class Features:
    """What the running kernel can do beyond Linux 5.14; each flag names its release and use."""

    pidfs_inodes: bool = False
    """6.9: a pidfd's inode number names its process for as long as the machine is up."""
    pidfd_namespaces: bool = False
    """6.11: a process' namespaces can be opened from its pidfd, without /proc."""
    mount_namespace_ids: bool = False
    """6.11: a mount namespace tells an id that is never used twice."""
    detached_clone: bool = False
    """6.15: a mount that is attached nowhere can be copied."""
    namespace_ids: bool = False
    """6.18: any namespace tells an id that is never used twice."""
    proc_by_pidns: bool = False
    """6.18: a /proc of another PID namespace can be made from outside."""

    @classmethod
    def probe(cls) -> Features:
        """
        Try every interface on the running kernel, with the caller's own capabilities.

        Nothing stays behind: no descriptor, no mount. What fails for any reason counts as absent,
        because the second way then serves, or fails with a reason of its own.
        """
        # Keeps NODE-16.
        return cls(
            pidfs_inodes=_works(_try_pidfs_inodes),
            pidfd_namespaces=_works(_try_pidfd_namespaces),
            mount_namespace_ids=_works(_try_mount_namespace_id),
            detached_clone=_works(_try_detached_clone),
            namespace_ids=_works(_try_namespace_id),
            proc_by_pidns=_works(_try_proc_by_pidns),
        )


OLDEST: Final = Features()
"""The oldest kernel that is supported, Linux 5.14: none of them."""


def _works(attempt: Callable[[ExitStack], bool]) -> bool:
    with ExitStack() as stack:
        try:
            return attempt(stack)
        except OSError:
            return False


def _try_pidfs_inodes(stack: ExitStack) -> bool:
    # Before 6.9 all anonymous files share one inode, pidfds and eventfds among them.
    pidfd = stack.enter_context(syscalls.pidfd_open(os.getpid()))
    anonymous = stack.enter_context(Descriptor(syscall(os.eventfd, 0)))
    return syscall(os.fstat, pidfd.fileno()).st_dev != syscall(os.fstat, anonymous.fileno()).st_dev


def _try_pidfd_namespaces(stack: ExitStack) -> bool:
    pidfd = stack.enter_context(syscalls.pidfd_open(os.getpid()))
    for request in (
        Ioctl.PIDFD_GET_PID_NAMESPACE,
        Ioctl.PIDFD_GET_NET_NAMESPACE,
        Ioctl.PIDFD_GET_MNT_NAMESPACE,
    ):
        stack.enter_context(syscalls.ioctl_descriptor(pidfd, request))
    return True


def _try_mount_namespace_id(stack: ExitStack) -> bool:
    syscalls.ioctl(_own_namespace(stack, "mnt"), Ioctl.NS_GET_MNTNS_ID, bytearray(8))
    return True


def _try_namespace_id(stack: ExitStack) -> bool:
    for name in ("pid", "net", "mnt"):
        syscalls.ioctl(_own_namespace(stack, name), Ioctl.NS_GET_ID, bytearray(8))
    return True


def _try_detached_clone(stack: ExitStack) -> bool:
    context = stack.enter_context(syscalls.fsopen("tmpfs"))
    syscalls.fsconfig_create(context)
    mounted = stack.enter_context(syscalls.fsmount(context, 0))
    flags = syscalls.OPEN_TREE_CLONE | syscalls.AT_EMPTY_PATH
    stack.enter_context(syscalls.open_tree(mounted, "", flags))
    return True


def _try_proc_by_pidns(stack: ExitStack) -> bool:
    # Kernels without the parameter answer EINVAL when it is set; no superblock is needed to see.
    context = stack.enter_context(syscalls.fsopen("proc"))
    syscalls.fsconfig_fd(context, "pidns", _own_namespace(stack, "pid"))
    return True


def _own_namespace(stack: ExitStack, name: str) -> Descriptor:
    path = f"/proc/self/ns/{name}"
    return stack.enter_context(syscalls.openat2(syscalls.AT_FDCWD, path, os.O_RDONLY))
