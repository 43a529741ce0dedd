"""Open an anchor's namespaces, and identify the namespace behind a descriptor.

Only this module translates between the protocol's three namespace types and the Linux kernel's
flags. Namespaces are opened from an anchor when they are handed over, not before, so that an
allocation costs the provider one descriptor instead of four.
"""

from __future__ import annotations

import errno
import os
import select
import struct
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from types import MappingProxyType
from typing import Final

from statemachine.errors import FdPassing
from statemachine.messages import NamespaceType
from transport.calls import syscall
from transport.descriptors import Descriptor, DescriptorBundle, NamespaceIdentity

from . import syscalls
from .anchor import Anchor
from .features import Features
from .syscalls import Ioctl, SyscallError, calling

CLONE_FLAGS: Final[Mapping[NamespaceType, int]] = MappingProxyType(
    {
        NamespaceType.PID: syscalls.CLONE_NEWPID,
        NamespaceType.NET: syscalls.CLONE_NEWNET,
        NamespaceType.MOUNT: syscalls.CLONE_NEWNS,
    }
)
"""What each type is called in unshare(2) and setns(2)."""

KINDS: Final[Mapping[int, NamespaceType]] = MappingProxyType(
    {flag: kind for kind, flag in CLONE_FLAGS.items()}
)
"""What NS_GET_NSTYPE answers for each type that is handed over."""

PROC_NAMES: Final[Mapping[NamespaceType, str]] = MappingProxyType(
    {NamespaceType.PID: "pid", NamespaceType.NET: "net", NamespaceType.MOUNT: "mnt"}
)
"""What each type is called in /proc/PID/ns."""

_PIDFD_REQUESTS: Final[Mapping[NamespaceType, Ioctl]] = MappingProxyType(
    {
        NamespaceType.PID: Ioctl.PIDFD_GET_PID_NAMESPACE,
        NamespaceType.NET: Ioctl.PIDFD_GET_NET_NAMESPACE,
        NamespaceType.MOUNT: Ioctl.PIDFD_GET_MNT_NAMESPACE,
    }
)

_INIT_PID: Final = 1
"""The number that the first process of a PID namespace has inside it."""


def open_namespace(anchor: Anchor, kind: NamespaceType, features: Features) -> Descriptor:
    """
    Open one of the namespaces an anchor is in.

    Open only a type that the anchor was made with: of any other type the anchor is in the node's
    own namespace.

    Args:
        anchor: Borrowed; must be alive.
        kind: Which one.
        features: Without `pidfd_namespaces` it is opened in /proc.

    Returns:
        The namespace; the caller owns it. It stays usable when the anchor has ended, except a PID
        namespace, in which no process can be started any more.

    Raises:
        SyscallError: the anchor has ended (ESRCH), or no descriptor is left (EMFILE).

    Source:
        ioctl_pidfd(2); namespaces(7), "The /proc/pid/ns/ directory".
    """
    if features.pidfd_namespaces:
        return syscalls.ioctl_descriptor(anchor.pidfd, _PIDFD_REQUESTS[kind])
    return _open_in_proc(anchor, kind)


def open_bundle(
    anchor: Anchor, kinds: Sequence[NamespaceType], features: Features
) -> DescriptorBundle:
    """
    Open several of an anchor's namespaces, in the given order: all or none.

    Returns:
        The bundle; the caller owns it.

    Raises:
        SyscallError: as `open_namespace`; nothing stays open.
    """
    with ExitStack() as undo:
        opened = [undo.enter_context(open_namespace(anchor, kind, features)) for kind in kinds]
        undo.pop_all()
    return DescriptorBundle(tuple(kinds), opened)


def expect_own_namespaces() -> None:
    """
    Check that this process could return to its own namespaces after leaving them.

    Not so in a user namespace that was made without the others: they belong to the outer one.
    A process that makes namespaces for others has to return, each time.

    Raises:
        SyscallError: EPERM, with what would help.
    """
    # Keeps NODE-21.
    for kind, name in PROC_NAMES.items():
        path = f"/proc/self/ns/{name}"
        with syscalls.openat2(syscalls.AT_FDCWD, path, os.O_RDONLY) as namespace:
            try:
                syscalls.ioctl_descriptor(namespace, Ioctl.NS_GET_USERNS).close()
            except SyscallError as error:
                if error.errno != errno.EPERM:
                    raise
                advice = (
                    f"this process is in a user namespace and its {kind.value} namespace belongs to"
                    " another one, so it cannot return there; run it outside, or with namespaces of"
                    " its own (unshare --user --map-root-user --mount --net --pid --fork)"
                )
                raise SyscallError("setns(2)", errno.EPERM, path, advice) from error


def has_dead_init(namespace: Descriptor, features: Features) -> bool:
    """
    Say whether it is proven that a PID namespace's first process has ended.

    Opening, passing and entering such a namespace still works; only then every fork fails, with
    ENOMEM. One that is a zombie has ended: who has to reap it may be slow, or never do it.

    Args:
        namespace: A PID namespace; lent, the caller goes on owning it.
        features: Without `pidfd_namespaces` (the same release brought both) nothing can be proven,
            and the answer is False.

    Source:
        ioctl_nsfs(2), NS_GET_PID_FROM_PIDNS.
    """
    if not features.pidfd_namespaces:
        return False
    try:
        pid = syscalls.ioctl(namespace, Ioctl.NS_GET_PID_FROM_PIDNS, _INIT_PID)
        with syscalls.pidfd_open(pid) as init:
            poll = select.poll()
            poll.register(init, select.POLLIN)
            return bool(poll.poll(0))
    except SyscallError as error:
        return error.errno == errno.ESRCH


class KernelInspector:
    """
    An `Inspector` that asks the Linux kernel which namespace a received descriptor refers to.

    Args:
        features: Decides what an identity consists of. Compare only identities that were made with
            the same features.
    """

    def __init__(self, features: Features) -> None:
        self._features: Final = features

    def inspect(self, fd: int) -> NamespaceIdentity:
        """
        Say which namespace a descriptor refers to.

        Args:
            fd: Borrowed. It may refer to anything: a peer chose it.

        Raises:
            FdPassing: it is no namespace, or of a type that is never handed over.

        Source:
            ioctl_nsfs(2), NS_GET_NSTYPE.
        """
        # Keeps FD-8.
        try:
            flag = syscalls.ioctl(fd, Ioctl.NS_GET_NSTYPE)
            kind = KINDS.get(flag)
            if kind is None:
                raise FdPassing(f"it is a namespace of another type (CLONE flag {flag:#x})")
            return NamespaceIdentity(kind, self._key(fd, kind))
        except SyscallError as error:
            raise FdPassing(f"it is no namespace: {error}") from error

    def own(self, kind: NamespaceType) -> NamespaceIdentity | None:
        """Say which namespace of a type this process is in; None if /proc cannot be read."""
        try:
            path = f"/proc/self/ns/{PROC_NAMES[kind]}"
            with syscalls.openat2(syscalls.AT_FDCWD, path, os.O_RDONLY) as namespace:
                return self.inspect(namespace.fileno())
        except SyscallError:
            return None

    def _key(self, fd: int, kind: NamespaceType) -> tuple[int, ...]:
        if self._features.namespace_ids:
            return (_namespace_id(fd, Ioctl.NS_GET_ID),)
        if self._features.mount_namespace_ids and kind is NamespaceType.MOUNT:
            return (_namespace_id(fd, Ioctl.NS_GET_MNTNS_ID),)
        # The inode is not reused while this is open.
        with calling("fstat(2)"):
            status = syscall(os.fstat, fd)
        return (status.st_dev, status.st_ino)


def _open_in_proc(anchor: Anchor, kind: NamespaceType) -> Descriptor:
    path = f"/proc/{anchor.pid}/ns/{PROC_NAMES[kind]}"
    try:
        namespace = syscalls.openat2(syscalls.AT_FDCWD, path, os.O_RDONLY)
    except SyscallError as error:
        # A zombie has no such link, nor has a process that is gone. The pidfd says ESRCH then.
        if error.errno == errno.ENOENT:
            raise SyscallError(error.call, errno.ESRCH, path) from error
        raise
    # Asked afterwards: if the anchor lives now, the pid in the path was its own.
    if not anchor.is_alive():
        namespace.close()
        raise SyscallError("openat2(2)", errno.ESRCH, path)
    return namespace


def _namespace_id(fd: int, request: Ioctl) -> int:
    answer = bytearray(8)
    syscalls.ioctl(fd, request, answer)
    return int(struct.unpack("=Q", answer)[0])
