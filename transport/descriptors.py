"""File descriptors with one owner each: `Descriptor`, `DescriptorBundle`, and checking a bundle.

A file descriptor is an integer that the Linux kernel hands out again as soon as it is closed. Code
that keeps the integer can close, or write to, another file. So an integer becomes a
`Descriptor` the moment it arrives, the `Descriptor` forgets it the moment it closes it, and every
function says who owns what afterwards. This module is the only one that calls `os.close` or
duplicates a descriptor.

It is also where a received bundle is compared with what its message announced (`verify_bundle`).
What a descriptor *is* only the Linux kernel can say; it is asked through an `Inspector`, which a
backend provides.
"""

from __future__ import annotations

import errno
import fcntl
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import Final, NamedTuple, NoReturn, Protocol

from statemachine.errors import FdPassing
from statemachine.messages import NamespaceType

from .calls import syscall

DUPLICATE_FD_MIN: Final = 3
"""Lowest number for a duplicate: 0, 1 and 2 mean something to whatever is executed later."""


class Owner:
    """A base of what owns descriptors: to copy or to pickle it would make two owners; TypeError."""

    __slots__ = ()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError(f"cannot copy or pickle {type(self).__name__!r}: it owns file descriptors")


class Descriptor(Owner):
    """
    One open file descriptor with one owner.

    Adopts the integer it is given: from then on only this object may close it. Usable as a context
    manager, and wherever something with `fileno()` is accepted. One that is dropped while open
    is closed and reported as a ResourceWarning.

    Args:
        fd: An open file descriptor without an owner.

    Raises:
        ValueError: `fd` is negative. Nothing is owned.
    """

    __slots__ = ("_fd",)

    def __init__(self, fd: int) -> None:
        self._fd = -1
        if fd < 0:
            raise ValueError(f"a file descriptor is not negative: {fd}")
        self._fd = fd

    @property
    def closed(self) -> bool:
        """Whether the number is gone: closed here, or detached."""
        return self._fd < 0

    def fileno(self) -> int:
        """
        Lend the number; this object stays its owner.

        Raises:
            ValueError: closed or detached.
        """
        if self._fd < 0:
            raise ValueError("the descriptor is closed")
        return self._fd

    def detach(self) -> int:
        """
        Give the number away, open; the caller owns it, and this object is closed.

        Raises:
            ValueError: closed or detached before.
        """
        fd = self.fileno()
        self._fd = -1
        return fd

    def duplicate(self) -> Descriptor:
        """
        Open a second descriptor of the same file, close-on-exec; the caller owns it.

        Raises:
            ValueError: closed or detached.
            OSError: no descriptor is left (EMFILE); this one stays as it was.

        Source:
            fcntl(2), F_DUPFD_CLOEXEC.
        """
        return Descriptor(
            syscall(fcntl.fcntl, self.fileno(), fcntl.F_DUPFD_CLOEXEC, DUPLICATE_FD_MIN)
        )

    def close(self) -> None:
        """
        Close it, if it is open.

        Raises:
            OSError: the number was not open (EBADF): it was closed behind the owner's back. Any
                other error comes from the file and is dropped: Linux has freed the number, and
                repeating the call could close another file.

        Source:
            close(2), "Dealing with error returns from close()".
        """
        # Forgotten in the same statement: whatever close does, it cannot be closed twice.
        fd, self._fd = self._fd, -1
        if fd < 0:
            return
        try:
            syscall(os.close, fd)
        except OSError as error:
            if error.errno == errno.EBADF:
                raise

    def __enter__(self) -> Descriptor:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __del__(self) -> None:
        if self._fd >= 0:
            try:
                warnings.warn(f"never closed: {self!r}", ResourceWarning, stacklevel=2, source=self)
            finally:  # also where warnings are errors
                self.close()

    def __repr__(self) -> str:
        return "Descriptor(closed)" if self.closed else f"Descriptor({self._fd})"


def adopt_all(fds: Iterable[int]) -> list[Descriptor]:
    """Adopt each of several numbers, in order; the caller owns the descriptors."""
    return [Descriptor(fd) for fd in fds]


def close_all(descriptors: Iterable[Descriptor]) -> None:
    """
    Close each of them, whatever happens to the others.

    Raises:
        OSError: as `Descriptor.close`; all are closed nevertheless.
    """
    with ExitStack() as stack:
        for descriptor in descriptors:
            stack.callback(descriptor.close)


class DescriptorBundle(Owner):
    """
    The descriptors of one response: ordered, each with its type, closed as one.

    May be empty, for a message that brings none. A type may stand in it twice, because a peer can
    announce that; looking it up by type then finds the first.

    Args:
        types: What each descriptor is announced to be, in order.
        descriptors: As many; the bundle owns them from here on, also if it raises.

    Raises:
        ValueError: not as many descriptors as types. All of them are closed.
    """

    # Keeps FD-12.

    __slots__ = ("_descriptors", "_types")

    def __init__(
        self,
        types: Sequence[NamespaceType] = (),
        descriptors: Sequence[Descriptor] = (),
    ) -> None:
        self._types = tuple(types)
        self._descriptors = tuple(descriptors)
        if len(self._types) != len(self._descriptors):
            self.close()
            raise ValueError(
                f"{len(self._descriptors)} descriptors for {len(self._types)} namespace types"
            )

    @property
    def types(self) -> tuple[NamespaceType, ...]:
        """The announced types, in the descriptors' order."""
        return self._types

    @property
    def closed(self) -> bool:
        """Whether no descriptor of it is open; an empty bundle always is."""
        return all(descriptor.closed for descriptor in self._descriptors)

    def __len__(self) -> int:
        return len(self._types)

    def __iter__(self) -> Iterator[tuple[NamespaceType, Descriptor]]:
        return zip(self._types, self._descriptors, strict=True)

    def __getitem__(self, kind: NamespaceType) -> Descriptor:
        """
        Lend the descriptor of one type; the bundle stays its owner.

        Raises:
            KeyError: there is none of that type.
        """
        for own_kind, descriptor in self:
            if own_kind is kind:
                return descriptor
        raise KeyError(kind)

    def filenos(self) -> tuple[int, ...]:
        """
        Lend the numbers, in order.

        Raises:
            ValueError: a descriptor is closed or detached.
        """
        return tuple(descriptor.fileno() for descriptor in self._descriptors)

    def detach(self) -> tuple[int, ...]:
        """
        Give all numbers away, in order; the caller owns them, and the bundle is closed.

        Raises:
            ValueError: a descriptor is closed or detached; nothing is given away.
        """
        # Looked at before anything moves, so that it is all of them or none.
        self.filenos()
        return tuple(descriptor.detach() for descriptor in self._descriptors)

    def duplicate(self) -> DescriptorBundle:
        """
        Open a second bundle of the same namespaces; the caller owns it.

        Raises:
            ValueError: a descriptor is closed or detached.
            OSError: no descriptor is left (EMFILE). Nothing is opened; this bundle is untouched.
        """
        with ExitStack() as undo:
            copies = [
                undo.enter_context(descriptor.duplicate()) for descriptor in self._descriptors
            ]
            undo.pop_all()
        return DescriptorBundle(self._types, copies)

    def close(self) -> None:
        """Close every descriptor that is still open; may be called again."""
        close_all(self._descriptors)

    def __enter__(self) -> DescriptorBundle:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        shown = ", ".join(f"{kind.value}: {descriptor!r}" for kind, descriptor in self)
        return f"DescriptorBundle({shown})"


class NamespaceIdentity(NamedTuple):
    """
    Which namespace a descriptor refers to: equal identities are one namespace.

    The key is unique over time where the Linux kernel can say so (NS_GET_ID, NS_GET_MNTNS_ID).
    Elsewhere it is device and inode, which is unique only while a descriptor is held.
    """

    kind: NamespaceType
    """The type the Linux kernel reports, whatever was announced."""
    key: tuple[int, ...]
    """Compared, never interpreted."""


class Inspector(Protocol):
    """Says what a namespace descriptor really is."""

    def inspect(self, fd: int) -> NamespaceIdentity:
        """
        Say which namespace a descriptor refers to.

        Args:
            fd: Lent; stays the caller's.

        Raises:
            FdPassing: it is no namespace, or of a type that is never handed off.
        """
        ...

    def own(self, kind: NamespaceType) -> NamespaceIdentity | None:
        """Say which namespace of a type the asking process is in; None if it cannot be known."""
        ...


class DescriptorSource(Protocol):
    """Opens an allocation's namespaces, as often as it is asked."""

    def bundle_of(self, allocation_id: str) -> DescriptorBundle:
        """
        Open the allocation's namespaces, in the order of its request; the caller owns the bundle.

        Raises:
            AllocationNotFound: there is no such allocation.
            FdPassing: its namespaces could not be opened; none is left open.
        """
        ...


def verify_bundle(bundle: DescriptorBundle, inspector: Inspector) -> tuple[NamespaceIdentity, ...]:
    """
    Check that every descriptor is what its message announced.

    A peer that mixes up the order would have a job join the wrong namespaces, and one that hands
    out the receiver's own would have it join none. So each is asked for its type, none may occur
    twice, and none may be a namespace the receiver is in already.

    Args:
        bundle: Lent; stays open and the caller's in every case.
        inspector: Asked once for every descriptor.

    Returns:
        The identities, in the bundle's order.

    Raises:
        FdPassing: the reason names the position, counted from 1, and what was found there. The
            caller closes the bundle and the channel.

    Source:
        FD-8, FD-9. ioctl_ns(2), NS_GET_NSTYPE.
    """
    identities: list[NamespaceIdentity] = []
    for position, (kind, descriptor) in enumerate(bundle, start=1):
        place = f"descriptor {position} of {len(bundle)}, announced as {kind.value},"
        identity = _inspect(descriptor, inspector, place)
        if identity.kind is not kind:
            raise FdPassing(f"{place} is a {identity.kind.value} namespace")
        if identity in identities:
            first = identities.index(identity) + 1
            raise FdPassing(f"{place} is the same namespace as descriptor {first}")
        if identity == inspector.own(kind):
            raise FdPassing(f"{place} is the receiver's own namespace")
        identities.append(identity)
    return tuple(identities)


def _inspect(descriptor: Descriptor, inspector: Inspector, place: str) -> NamespaceIdentity:
    try:
        return inspector.inspect(descriptor.fileno())
    except FdPassing as error:
        raise FdPassing(f"{place} cannot be used: {error.reason}") from error
