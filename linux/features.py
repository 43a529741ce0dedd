"""Detect which Linux kernel features beyond 5.14 can be used here.

Linux 5.14 (RHEL 9, SLES 15) is the oldest supported kernel. A newer interface that does better what
5.14 can do in another way has a flag here, and the code that knows both ways asks the flag.
`Features.probe` tries each interface. It reads no version, because distributions backport features
and security modules forbid some.

`OLDEST` has no feature. Given to any part of `linux` it makes that part work as on 5.14, which is
how the older ways are tested on a new kernel.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from typing import Final

from statemachine.record import record
from transport.calls import syscall
from transport.descriptors import Descriptor

from . import syscalls
from .syscalls import Ioctl


@record
class Features:
    """What the running kernel can do beyond Linux 5.14, each with the release that brought it."""

    pidfs_inodes: bool = False
    """6.9: the inode number of a pidfd identifies its process until the next boot."""
    pidfd_namespaces: bool = False
    """6.11: a process' namespaces can be opened from its pidfd, without /proc."""
    mount_namespace_ids: bool = False
    """6.11: a mount namespace has an id that is never used twice."""
    detached_clone: bool = False
    """6.15: a detached mount can be cloned."""
    namespace_ids: bool = False
    """6.18: any namespace has an id that is never used twice."""
    proc_by_pidns: bool = False
    """6.18: a /proc of another PID namespace can be mounted from outside."""

    @classmethod
    def probe(cls) -> Features:
        """
        Try every interface on the running kernel, with the caller's own capabilities.

        Leaves no descriptor and no mount. What fails for any reason counts as absent, because the
        older way then works, or fails with a reason of its own.
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
"""Linux 5.14, the oldest supported kernel: none of them."""


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
    # A kernel without the parameter answers EINVAL when it is set, before there is a superblock.
    context = stack.enter_context(syscalls.fsopen("proc"))
    syscalls.fsconfig_fd(context, "pidns", _own_namespace(stack, "pid"))
    return True


def _own_namespace(stack: ExitStack, name: str) -> Descriptor:
    path = f"/proc/self/ns/{name}"
    return stack.enter_context(syscalls.openat2(syscalls.AT_FDCWD, path, os.O_RDONLY))
