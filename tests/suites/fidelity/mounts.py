"""Mount namespaces, propagation and images: simulated, and on Linux."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, TypeAlias

from linux import syscalls
from linux.features import Features
from linux.mounts import ImageStore
from linux.simulated.mounts import (
    Propagation,
    SimulatedFileInMount,
    SimulatedImage,
    SimulatedSuperblock,
    SimulatedTree,
)
from linux.testing.worlds import loop_images
from tests.suites.fidelity.machines import OPEN_TO_READ, SimulatedMachine
from transport.descriptors import Descriptor, close_all
from transport.testing.peer import wait_until

IMAGES: Final = ("one.sqfs", "other.sqfs")
PLACES: Final = ("a", "b")
INSIDES: Final = 2
"""How many copies of the outside there may be; the outside is number 0."""


class SimulatedMounts(SimulatedMachine):
    """
    An outside that shares what is mounted on it, copies of it, and images.

    What asks for a copy or a file that does not exist does nothing and returns None.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._trees: dict[int, SimulatedTree] = {0: SimulatedTree.boot()}
        self._images = [SimulatedImage(name) for name in IMAGES]
        self._superblocks: list[SimulatedSuperblock] = []
        self._files: list[SimulatedFileInMount | None] = []

    def copy(self, inside: int, propagation: Propagation) -> None:
        """Make the mount namespace of an inside anew."""
        self.end(inside)
        self._trees[inside] = self._trees[0].copy(propagation)

    def end(self, inside: int) -> None:
        tree = self._trees.pop(inside, None)
        if tree is not None:
            tree.end()

    def mount(self, side: int, place: str, image: int) -> None:
        if side in self._trees:
            mount = self._images[image].acquire()
            if mount.superblock not in self._superblocks:
                self._superblocks.append(mount.superblock)
            self._trees[side].mount(place, mount)

    def unmount(self, side: int, place: str, is_lazy: bool) -> None:
        if side in self._trees:
            self._trees[side].unmount(place, is_lazy=is_lazy)

    def look(self, side: int, place: str) -> tuple[str, int] | None:
        """Which image is at a place, and on which of its superblocks."""
        mount = self._trees[side].find(place) if side in self._trees else None
        if mount is None:
            return None
        return mount.superblock.image, self._superblocks.index(mount.superblock)

    def open_in(self, side: int, place: str) -> None:
        """Open a file in the image at a place; ENOENT if there is none."""
        if side in self._trees:
            mount = self._trees[side].find(place)
            if mount is None:
                raise FileNotFoundError(errno.ENOENT, place)
            self._files.append(SimulatedFileInMount(mount))

    def close_file(self, number: int) -> None:
        if number < len(self._files):
            file, self._files[number] = self._files[number], None
            if file is not None:
                file.close()

    def drop(self, image: int) -> None:
        """Close an image's master."""
        self._images[image].drop()

    def loops(self, image: int) -> int:
        """How many loop devices have an image."""
        name = IMAGES[image]
        return sum(each.is_alive and each.image == name for each in self._superblocks)


class LinuxMounts:
    """
    In mount namespaces of its own, each held by a thread; the machine's own sees nothing of it.

    Args:
        directory: has the images; a filesystem is mounted over a folder in it.
    """

    def __init__(self, directory: Path) -> None:
        self._directory: Final = directory
        self._base: Final = directory / "mounts"
        self._base.mkdir(exist_ok=True)
        self._store: Final = ImageStore(directory, 0.0, lambda: 0.0, Features.probe())
        self._threads: Final = [ThreadPoolExecutor(1) for _ in range(1 + INSIDES)]
        for side in range(1 + INSIDES):
            self._do(side, syscalls.unshare, syscalls.CLONE_FS)
        self._home: Final = self._namespace(0)
        self._do(0, syscalls.unshare, syscalls.CLONE_NEWNS)
        self._do(0, syscalls.mount, None, "/", None, syscalls.MS_REC | syscalls.MS_PRIVATE)
        self._outside: Final = self._namespace(0)
        self._insides: Final[set[int]] = set()
        self._files: Final[list[Descriptor]] = []
        self._serials: Final[dict[int, int]] = {}
        self._masters: Final[dict[int, int]] = {}
        self._acquired = 0
        self._make_base()

    def reset(self) -> None:
        close_all(self._files)
        self._files.clear()
        for inside in tuple(self._insides):
            self.end(inside)
        self._do(0, syscalls.umount2, self._base, syscalls.MNT_DETACH)
        for image in range(len(IMAGES)):
            self.drop(image)
        self._serials.clear()
        self._acquired = 0
        self._make_base()
        wait_until(lambda: not any(map(self.loops, range(len(IMAGES)))), "the end of all loops")

    def close(self) -> None:
        self.reset()
        self._do(0, syscalls.setns, self._home, syscalls.CLONE_NEWNS)
        for thread in self._threads:
            thread.shutdown()
        close_all([self._home, self._outside])
        self._store.close()

    def _make_base(self) -> None:
        self._do(0, syscalls.mount, "tmpfs", self._base, "tmpfs", 0)
        for place in PLACES:
            self._do(0, os.mkdir, self._base / place)
        self._do(0, syscalls.mount, None, self._base, None, syscalls.MS_SHARED)

    def _do(self, side: int, call: Callable[..., Any], *arguments: object) -> Any:
        return self._threads[side].submit(call, *arguments).result()

    def _namespace(self, side: int) -> Descriptor:
        return Descriptor(self._do(side, os.open, "/proc/thread-self/ns/mnt", OPEN_TO_READ))

    def copy(self, inside: int, propagation: Propagation) -> None:
        self._do(inside, syscalls.setns, self._outside, syscalls.CLONE_NEWNS)
        self._do(inside, syscalls.unshare, syscalls.CLONE_NEWNS)
        if propagation is not Propagation.SHARED:
            is_slave = propagation is Propagation.SLAVE
            flag = syscalls.MS_SLAVE if is_slave else syscalls.MS_PRIVATE
            self._do(inside, syscalls.mount, None, "/", None, syscalls.MS_REC | flag)
        self._insides.add(inside)

    def end(self, inside: int) -> None:
        if inside in self._insides:
            self._do(inside, syscalls.setns, self._home, syscalls.CLONE_NEWNS)
            self._insides.discard(inside)

    def _is_there(self, side: int) -> bool:
        return side == 0 or side in self._insides

    def mount(self, side: int, place: str, image: int) -> None:
        if not self._is_there(side):
            return
        with self._store.acquire(IMAGES[image], IMAGES[image]) as mounted:
            if image not in self._masters:
                self._masters[image] = os.fstat(mounted.fileno()).st_dev
                self._serials[self._masters[image]] = self._acquired
                self._acquired += 1
            self._do(side, syscalls.attach_mount, mounted, self._base / place)

    def unmount(self, side: int, place: str, is_lazy: bool) -> None:
        if self._is_there(side):
            flags = syscalls.MNT_DETACH if is_lazy else 0
            self._do(side, syscalls.umount2, self._base / place, flags)

    def look(self, side: int, place: str) -> tuple[str, int] | None:
        if not self._is_there(side):
            return None
        try:
            text, device = self._do(side, _read_and_stat, self._file_at(place))
        except FileNotFoundError:
            return None
        return text, self._serials[device]

    def open_in(self, side: int, place: str) -> None:
        if self._is_there(side):
            self._files.append(
                Descriptor(self._do(side, os.open, self._file_at(place), OPEN_TO_READ))
            )

    def close_file(self, number: int) -> None:
        if number < len(self._files):
            self._files[number].close()

    def drop(self, image: int) -> None:
        self._masters.pop(image, None)
        self._store.release(IMAGES[image])
        self._store.tidy()

    def loops(self, image: int) -> int:
        return list(loop_images()).count(self._directory / IMAGES[image])

    def _file_at(self, place: str) -> Path:
        return self._base / place / MARKER


Mounts: TypeAlias = SimulatedMounts | LinuxMounts

MARKER: Final = "name.txt"
"""The file of an image that has its name in it."""


def _read_and_stat(path: Path) -> tuple[str, int]:
    with path.open() as file:
        return file.read(), os.fstat(file.fileno()).st_dev


@contextlib.contextmanager
def linux_mounts(directory: Path | None = None) -> Iterator[LinuxMounts]:
    """Have the machine, with images in a folder that is given, or in one of its own."""
    with contextlib.ExitStack() as stack:
        directory = directory or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for name in IMAGES:
            if not (directory / name).exists():
                make_image(directory / name)
        machine = LinuxMounts(directory.resolve())
        stack.callback(machine.close)
        yield machine


def make_image(image: Path) -> None:
    with tempfile.TemporaryDirectory() as tree:
        (Path(tree) / MARKER).write_text(image.name)
        command = [
            "mksquashfs",
            tree,
            str(image),
            "-noappend",
            "-all-root",
            "-no-progress",
            "-quiet",
        ]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
