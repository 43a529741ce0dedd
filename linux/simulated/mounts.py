"""Model of mounts: mount namespaces, propagation, stacked mounts, EBUSY, and loop devices.

The part of mounts on which an allocation's image depends. Random programs compare it with Linux.

    image.acquire()               one superblock for all mounts, as long as anything refers to it
    tree.copy(Propagation.SLAVE)  later mounts *and unmounts* of the original reach the copy
    tree.mount(place, …)          on top of what is there; in other trees below what is there
    tree.unmount(place)           EBUSY while a file is open in it, or in what goes with it

Not simulated: several directories of one mount, bind mounts, and moving an attached mount.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from enum import Enum
from typing import Final, NoReturn

TOP: Final = "/"
"""The place on a mount where another one on the same directory is attached."""


class Propagation(Enum):
    """How mounts propagate between a mount tree and its copy."""

    SHARED = "shared"
    SLAVE = "slave"
    PRIVATE = "private"


class SimulatedSuperblock:
    """A mounted filesystem; gone with its last reference."""

    def __init__(self, image: str) -> None:
        self.image = image
        self.references = 0

    @property
    def is_alive(self) -> bool:
        """Whether a mount, an open file or a master refers to it; so long is its loop device."""
        return self.references > 0


class _Group:
    """A peer group: mounts that propagate to each other, and the slaves that only receive."""

    def __init__(self) -> None:
        self.peers: list[SimulatedMount] = []
        self.slaves: list[SimulatedMount] = []


class SimulatedMount:
    """One mount: of a superblock, at a place on another mount."""

    def __init__(self, superblock: SimulatedSuperblock) -> None:
        self.superblock = superblock
        superblock.references += 1
        self.parent: SimulatedMount | None = None
        self.place = TOP
        self.children: dict[str, SimulatedMount] = {}
        self.open_files = 0
        self.group: _Group | None = None
        self.master: _Group | None = None

    def attach(self, parent: SimulatedMount, place: str) -> None:
        """Attach it to a place of another mount, below what is attached there already."""
        above = parent.children.get(place)
        self.parent, self.place = parent, place
        parent.children[place] = self
        if above is not None:
            above.parent, above.place = self, TOP
            self.children[TOP] = above

    def detach(self) -> None:
        """Remove it; what is attached on top of it takes its place."""
        assert self.parent is not None
        del self.parent.children[self.place]
        above = self.children.pop(TOP, None)
        if above is not None:
            above.attach(self.parent, self.place)
        self.parent = None
        self.end()

    def end(self) -> None:
        """Leave all groups; an open file still refers to the superblock."""
        for peers in (self.group and self.group.peers, self.master and self.master.slaves):
            if peers:
                peers.remove(self)
        self.group = self.master = None
        self.superblock.references -= 1

    def join_groups_of(self, other: SimulatedMount) -> None:
        """Join the groups that another mount belongs to."""
        if other.group is not None:
            self.group = other.group
            self.group.peers.append(self)
        if other.master is not None:
            self.master = other.master
            self.master.slaves.append(self)

    def change(self, propagation: Propagation) -> None:
        """Become a slave of its peer group, or private."""
        if propagation is Propagation.SHARED:
            return
        group, self.group = self.group, None
        if group is not None:
            group.peers.remove(self)
        if self.master is not None and (group is not None or propagation is Propagation.PRIVATE):
            self.master.slaves.remove(self)
            self.master = None
        if group is not None and propagation is Propagation.SLAVE:
            self.master = group
            group.slaves.append(self)

    def share(self) -> None:
        """Get a peer group of its own."""
        if self.group is None:
            self.group = _Group()
            self.group.peers.append(self)

    def receivers(self) -> list[SimulatedMount]:
        """All other mounts to which a mount on this one propagates."""
        found: list[SimulatedMount] = []
        groups = [self.group] if self.group is not None else []
        while groups:
            group = groups.pop()
            for mount in (*group.peers, *group.slaves):
                if mount is not self and mount not in found:
                    found.append(mount)
                    if mount.group is not None and mount.group is not group:
                        groups.append(mount.group)
        return found

    def all_below(self) -> Iterator[SimulatedMount]:
        """Itself, and everything attached on it."""
        yield self
        for child in self.children.values():
            yield from child.all_below()


class SimulatedFileInMount:
    """An open file: its mount is busy, and its superblock stays even without the mount."""

    def __init__(self, mount: SimulatedMount) -> None:
        self._mount = mount
        mount.open_files += 1
        mount.superblock.references += 1

    def close(self) -> None:
        """Close it."""
        self._mount.open_files -= 1
        self._mount.superblock.references -= 1


class SimulatedImage:
    """An image file, and a provider's master of it: a detached mount."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.master: SimulatedSuperblock | None = None

    def acquire(self) -> SimulatedMount:
        """Make a mount of it; as long as there is a master, of the same superblock."""
        if self.master is None:
            self.master = SimulatedSuperblock(self.name)
            self.master.references += 1
        return SimulatedMount(self.master)

    def adopt(self, superblock: SimulatedSuperblock) -> None:
        """Have a master of a filesystem that is mounted; nothing if there is a master already."""
        if self.master is None:
            self.master = superblock
            superblock.references += 1

    def drop(self) -> None:
        """Close the master; all other mounts stay."""
        if self.master is not None:
            self.master.references -= 1
            self.master = None


class SimulatedTree:
    """
    The mounts of one mount namespace.

    Args:
        base: the mount on which all others are attached.
    """

    def __init__(self, base: SimulatedMount) -> None:
        self.base = base

    @classmethod
    def boot(cls) -> SimulatedTree:
        """Make a tree with one mount, which is shared, as under systemd."""
        base = SimulatedMount(SimulatedSuperblock(""))
        base.share()
        return cls(base)

    def find(self, place: str) -> SimulatedMount | None:
        """Return the uppermost mount at a place."""
        mount = self.base.children.get(place)
        while mount is not None and TOP in mount.children:
            mount = mount.children[TOP]
        return mount

    def mount(self, place: str, mount: SimulatedMount) -> None:
        """Attach a mount on top of a place, here and wherever that propagates."""
        parent = self.find(place) or self.base
        where = place if parent is self.base else TOP
        receivers = parent.receivers()
        mount.attach(parent, where)
        if parent.group is not None:
            mount.share()
        for receiver in receivers:
            copy = SimulatedMount(mount.superblock)
            assert mount.group is not None
            if receiver.group is parent.group:
                copy.join_groups_of(mount)
            else:
                copy.master = mount.group
                mount.group.slaves.append(copy)
            copy.attach(receiver, where)

    def unmount(self, place: str, *, is_lazy: bool = False) -> None:
        """
        Remove the uppermost mount at a place, here and wherever that propagates.

        Raises:
            OSError: EINVAL, nothing is mounted there; EBUSY, a file is open in it, or in what
                would be removed with it elsewhere. Not if it is lazy.
        """
        mount = self.find(place)
        if mount is None or mount.parent is None:
            _refuse(errno.EINVAL)
        elsewhere = [
            receiver.children[mount.place]
            for receiver in mount.parent.receivers()
            if mount.place in receiver.children
        ]
        if not is_lazy and any(each.open_files for each in (mount, *elsewhere)):
            _refuse(errno.EBUSY)
        for each in (mount, *elsewhere):
            each.detach()

    def copy(self, propagation: Propagation) -> SimulatedTree:
        """Copy the tree for another mount namespace."""
        return SimulatedTree(_copied(self.base, propagation))

    def end(self) -> None:
        """End the namespace, and with it its mounts."""
        for mount in tuple(self.base.all_below()):
            mount.end()


def _copied(mount: SimulatedMount, propagation: Propagation) -> SimulatedMount:
    copy = SimulatedMount(mount.superblock)
    copy.join_groups_of(mount)
    copy.change(propagation)
    for place, child in mount.children.items():
        _copied(child, propagation).attach(copy, place)
    return copy


def _refuse(number: int) -> NoReturn:
    raise OSError(number, os.strerror(number))
