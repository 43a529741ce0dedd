"""Where is what mounted, who sees it, and when is an image gone? Without a kernel.

The part of mounts that an allocation's image depends on: mount namespaces and what propagates
between them, mounts on top of each other, what is busy, and the superblock that goes with its last
user. Random programs run on this and on Linux.

    image.acquire()               one superblock for all, for as long as anything has it
    tree.copy(Propagation.SLAVE)  later mounts *and unmounts* of the original reach the copy
    tree.mount(place, …)          on top of what is there; elsewhere below what is there
    tree.unmount(place)           EBUSY while a file is open in it, or where it goes, too

Not simulated: several directories of one mount, bind mounts, and moving what is attached.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from enum import Enum
from typing import Final, NoReturn

TOP: Final = "/"
"""The place on a mount where the next one on the same directory stands."""


class Propagation(Enum):
    """What a copy of a mount tree has to do with its original."""

    SHARED = "shared"
    SLAVE = "slave"
    PRIVATE = "private"


class SimulatedSuperblock:
    """A filesystem that is mounted, or held ready to be; gone with its last reference."""

    def __init__(self, image: str) -> None:
        self.image = image
        self.references = 0

    @property
    def is_alive(self) -> bool:
        """Whether anything has it: a mount, an open file, a master. So long is its loop device."""
        return self.references > 0


class _Group:
    """Mounts that tell each other what is mounted on them, and the mounts that only listen."""

    def __init__(self) -> None:
        self.peers: list[SimulatedMount] = []
        self.slaves: list[SimulatedMount] = []


class SimulatedMount:
    """One mount: of what, on which place of which other mount."""

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
        """Stand on a place of another mount, below what stands there already."""
        above = parent.children.get(place)
        self.parent, self.place = parent, place
        parent.children[place] = self
        if above is not None:
            above.parent, above.place = self, TOP
            self.children[TOP] = above

    def detach(self) -> None:
        """Leave, and let what stands on top of it take its place."""
        assert self.parent is not None
        del self.parent.children[self.place]
        above = self.children.pop(TOP, None)
        if above is not None:
            above.attach(self.parent, self.place)
        self.parent = None
        self.end()

    def end(self) -> None:
        """Belong to nothing any more; an open file still has the superblock."""
        for peers in (self.group and self.group.peers, self.master and self.master.slaves):
            if peers:
                peers.remove(self)
        self.group = self.master = None
        self.superblock.references -= 1

    def listen_like(self, other: SimulatedMount) -> None:
        """Belong to the groups that another mount belongs to."""
        if other.group is not None:
            self.group = other.group
            self.group.peers.append(self)
        if other.master is not None:
            self.master = other.master
            self.master.slaves.append(self)

    def change(self, propagation: Propagation) -> None:
        """Become a slave of one's peers, or nobody's."""
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
        """Get a group of its own."""
        if self.group is None:
            self.group = _Group()
            self.group.peers.append(self)

    def audience(self) -> list[SimulatedMount]:
        """All other mounts on which appears what is mounted on this one."""
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
        """Itself, and everything that stands on it."""
        yield self
        for child in self.children.values():
            yield from child.all_below()


class SimulatedFileInMount:
    """An open file: its mount is busy, and its superblock stays whatever becomes of the mount."""

    def __init__(self, mount: SimulatedMount) -> None:
        self._mount = mount
        mount.open_files += 1
        mount.superblock.references += 1

    def close(self) -> None:
        """Let go of both."""
        self._mount.open_files -= 1
        self._mount.superblock.references -= 1


class SimulatedImage:
    """An image file, and a provider's master of it: a mount that is attached nowhere."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.master: SimulatedSuperblock | None = None

    def acquire(self) -> SimulatedMount:
        """Make a mount of it; only while there is a master they are all of one superblock."""
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
        """Let go of the master; whatever is mounted stays."""
        if self.master is not None:
            self.master.references -= 1
            self.master = None


class SimulatedTree:
    """
    The mounts of one mount namespace.

    Args:
        base: what all else stands on.
    """

    def __init__(self, base: SimulatedMount) -> None:
        self.base = base

    @classmethod
    def boot(cls) -> SimulatedTree:
        """Begin with one mount, which shares what is mounted on it, as under systemd."""
        base = SimulatedMount(SimulatedSuperblock(""))
        base.share()
        return cls(base)

    def find(self, place: str) -> SimulatedMount | None:
        """Return what one sees at a place: the uppermost mount there."""
        mount = self.base.children.get(place)
        while mount is not None and TOP in mount.children:
            mount = mount.children[TOP]
        return mount

    def mount(self, place: str, mount: SimulatedMount) -> None:
        """Attach a mount on top of a place, here and wherever that is heard of."""
        parent = self.find(place) or self.base
        where = place if parent is self.base else TOP
        audience = parent.audience()
        mount.attach(parent, where)
        if parent.group is not None:
            mount.share()
        for listener in audience:
            copy = SimulatedMount(mount.superblock)
            assert mount.group is not None
            if listener.group is parent.group:
                copy.listen_like(mount)
            else:
                copy.master = mount.group
                mount.group.slaves.append(copy)
            copy.attach(listener, where)

    def unmount(self, place: str, *, is_lazy: bool = False) -> None:
        """
        Take away what one sees at a place, here and wherever that is heard of.

        Raises:
            OSError: EINVAL, nothing is mounted there; EBUSY, a file is open in it, or in what
                would go with it elsewhere. Not if it is lazy.
        """
        mount = self.find(place)
        if mount is None or mount.parent is None:
            _refuse(errno.EINVAL)
        elsewhere = [
            listener.children[mount.place]
            for listener in mount.parent.audience()
            if mount.place in listener.children
        ]
        if not is_lazy and any(each.open_files for each in (mount, *elsewhere)):
            _refuse(errno.EBUSY)
        for each in (mount, *elsewhere):
            each.detach()

    def copy(self, propagation: Propagation) -> SimulatedTree:
        """Make another namespace like this one: its mounts hear of these, or do not."""
        return SimulatedTree(_copied(self.base, propagation))

    def end(self) -> None:
        """Let the namespace go, and its mounts with it."""
        for mount in tuple(self.base.all_below()):
            mount.end()


def _copied(mount: SimulatedMount, propagation: Propagation) -> SimulatedMount:
    copy = SimulatedMount(mount.superblock)
    copy.listen_like(mount)
    copy.change(propagation)
    for place, child in mount.children.items():
        _copied(child, propagation).attach(copy, place)
    return copy


def _refuse(number: int) -> NoReturn:
    raise OSError(number, os.strerror(number))
