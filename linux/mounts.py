"""Where does an allocation's image come from, and when is it gone again?

A uenv image is a squashfs file below the image root. However many allocations ask for it, it has
one loop device and one superblock on the node. The store keeps a *master* of each image: a mount
that is attached nowhere, in nobody's mount table, and so in nobody's way. Every allocation gets a
mount of its own made from it, equally detached, which the forge attaches inside the allocation's
mount namespace and nowhere else.

Nothing is ever unmounted. An allocation's mount goes with its namespace, the master goes when the
hold time after the last user is over, and with the last of them the Linux kernel frees the loop
device, because it was told to (AUTOCLEAR) in the same call that made it. So a provider that is
killed at any point leaves nothing behind that nobody uses.

Used by `linux.backend`.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Final, NamedTuple, Self

from transport.calls import syscall
from transport.descriptors import Descriptor

from .features import Features
from .syscalls import (
    AT_EMPTY_PATH,
    MOUNT_ATTR_NODEV,
    MOUNT_ATTR_NOSUID,
    MOUNT_ATTR_RDONLY,
    OPEN_TREE_CLONE,
    RESOLVE_BENEATH,
    RESOLVE_NO_MAGICLINKS,
    Ioctl,
    SyscallError,
    calling,
    fsconfig_create,
    fsconfig_flag,
    fsconfig_string,
    fsmount,
    fsopen,
    ioctl,
    open_tree,
    openat2,
    read_fs_log,
)

IMAGE_FSTYPE: Final = "squashfs"
"""The filesystem that an image holds."""

RESOLVE_ATTEMPTS_MAX: Final = 16
"""How often an image is looked up again when somebody renames directories meanwhile (EAGAIN)."""

LOOP_ATTEMPTS_MAX: Final = 128
"""How often a free loop device is asked for again when somebody else takes it first."""

LOOP_TAG: Final = b"nshandoff:"
"""How the name of every loop device of ours begins: a restarted provider adopts only these."""

LOOP_NAME_BYTES_MAX: Final = 63
"""Longest name a loop device can have, without the final NUL (`LO_NAME_SIZE`)."""

LO_FLAGS_READ_ONLY: Final = 1
LO_FLAGS_AUTOCLEAR: Final = 4

_LOOP_CONTROL: Final = "/dev/loop-control"
_SYS_BLOCK: Final = Path("/sys/block")

_LOOP_INFO: Final = struct.Struct("=5Q 4I 64s 64s 32s 2Q")
"""`struct loop_info64`: device, inode, rdevice, offset, sizelimit; number, two encryption fields,
flags; file name, crypt name, key; two reserved (linux/loop.h)."""

_LOOP_CONFIG: Final = struct.Struct(f"=2I {_LOOP_INFO.size}s 64x")
"""`struct loop_config`: descriptor, block size, `loop_info64`, reserved (linux/loop.h)."""

_ATTRIBUTES: Final = MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV

_LOST_RACES: Final = (errno.EBUSY, errno.EAGAIN, errno.ENXIO, errno.ENODEV)
"""What one meets when a loop device that was free is not, or is gone."""

_RESOLVE: Final = "resolve image"

_ADVICE: Final = {
    errno.ENOENT: "no such image below the image root",
    errno.ENOTDIR: "a part of its path is no directory",
    errno.EXDEV: "it leads out of the image root",
    errno.ELOOP: "it goes through a magic link or through too many symbolic links",
}


class ImageError(SyscallError):
    """
    An image cannot be used; the text names the step, the call, the error, the path and what helps.

    Nothing that the failing step made is left behind.
    """

    # Keeps NODE-15.

    def __init__(self, step: str, call: str, number: int, path: str, advice: str = "") -> None:
        super().__init__(call, number, path)
        self.step: Final = step
        self.advice: Final = advice

    def __str__(self) -> str:
        text = f"{self.step}: {super().__str__()}"
        return f"{text}; {self.advice}" if self.advice else text


@dataclass(frozen=True, slots=True)
class ImageStatus:
    """What the store has of one image."""

    image: str
    """The image, as it was first asked for."""
    device: str
    """Its loop device."""
    users: tuple[str, ...]
    """Whoever acquired it and has not released it."""
    free_since: float | None
    """When its last user left, on the store's clock; None while it has one."""


@dataclass(frozen=True, slots=True)
class LingeringImage:
    """An image that the store has dropped and somebody still holds mounted."""

    image: str
    """The image, below the image root."""
    device: str
    """The loop device that still backs it."""


class _ImageKey(NamedTuple):
    """What makes two files the same image: a file that was changed in place is another one."""

    device: int
    inode: int
    mtime_ns: int
    size: int


@dataclass(slots=True, eq=False)
class _Image:
    name: str
    key: _ImageKey
    users: set[str] = field(default_factory=set)
    borrowers: int = 0
    """Calls that are using it right now."""
    free_since: float | None = None
    making: threading.Lock = field(default_factory=threading.Lock)
    """Held while the master is made, so that an image that is slow stops nobody else."""
    master: Descriptor | None = None
    device: str = ""
    backing_file: str = ""
    """The image's path as the Linux kernel has it, by which the loop device is known again."""


def resolve_image(root: Path, image: str) -> Descriptor:
    """
    Open an image for reading, wherever below the root its path really leads.

    Nothing but a regular file is ever opened: opening a FIFO waits, opening a device acts.

    Args:
        root: The image root; it may be reached by any path.
        image: A path below it. Symbolic links are followed as long as they stay below it.

    Returns:
        The file; the caller owns it.

    Raises:
        ImageError: there is no such file, it leads out of the root, or it is no regular file.

    Source:
        Protocol, "Conventions on the node"; openat2(2).
    """
    # Keeps NODE-11.
    subject = f"{image!a} below {root}"
    try:
        with _open_root(root) as base, _open_below(base, image) as found:
            if not stat.S_ISREG(_status_of(found).st_mode):
                advice = f"it is no regular file; a uenv image is a {IMAGE_FSTYPE} file"
                raise ImageError(_RESOLVE, "openat2(2)", errno.EINVAL, subject, advice)
            # O_PATH opened nothing yet. By this name it is the very file that was looked at.
            return _open(f"/proc/self/fd/{found.fileno()}")
    except ImageError:
        raise
    except SyscallError as error:
        number = error.errno or errno.EIO
        advice = _ADVICE.get(number, "")
        raise ImageError(_RESOLVE, error.call, number, subject, advice) from error


class ImageStore:
    """
    The images of this node that are in use or were until just now.

    A *user* is whatever name the caller gives to one who needs an image: an allocation's
    incarnation. Usable from any thread; an image that is slow to mount delays only those who want
    that image.

    Args:
        root: The image root.
        hold_time_s: Seconds that an image is kept after its last user has left, 0.0 or more.
        clock: Tells the time in seconds; only differences count. Never goes back.
        features: What the running Linux kernel can do.
    """

    # Keeps NODE-13.

    def __init__(
        self, root: Path, hold_time_s: float, clock: Callable[[], float], features: Features
    ) -> None:
        self._root: Final = root
        self._hold_time_s: Final = hold_time_s
        self._clock: Final = clock
        self._features: Final = features
        self._guard: Final = threading.Lock()
        self._images: Final[dict[_ImageKey, _Image]] = {}
        self._dropped: Final[list[_Image]] = []
        self._is_closed = False

    def acquire(self, image: str, user: str) -> Descriptor:
        """
        Give a user a mount of an image: read-only, without set-uid programs and devices.

        The first user of an image has it put on a loop device and mounted; all later ones get
        another mount of the same superblock. A user who acquires it again gets another mount and
        still counts once.

        Args:
            image: A path below the image root.
            user: Who needs it, until `release`.

        Returns:
            A detached mount, to be attached once with move_mount(2); the caller owns it.

        Raises:
            ImageError: the image cannot be used, with what the Linux kernel says about it. The
                user has no more images than before.
            ValueError: the store is closed.
        """
        with resolve_image(self._root, image) as file, self._borrowed(file, image, user) as entry:
            with entry.making:
                if entry.master is None:
                    _make_master(entry, file)
            return self._another_mount(entry)

    def adopt(self, image: str, user: str) -> bool:
        """
        Take over an image that a user got from an earlier life of this provider.

        The user's own mount is in its namespace and needs nothing. What is taken over is the
        superblock, so that whoever comes next shares it.

        Returns:
            True if the image is in the store now, with this user; False if nothing is left to be
            taken over, because the mount is gone or another file has the image's name today.

        Raises:
            ImageError: it is there and cannot be mounted again. Nothing has changed.
            ValueError: the store is closed.
        """
        try:
            file = resolve_image(self._root, image)
        except ImageError as error:
            if error.errno == errno.ENOENT:
                return False
            raise
        with file:
            try:
                with self._borrowed(file, image, user) as entry, entry.making:
                    if entry.master is None:
                        _remake_master(entry, file)
            except _NothingToAdopt:
                return False
        return True

    def release(self, user: str) -> None:
        """
        Note that a user needs no image any more. Idempotent; its mounts are its own affair.

        An image without users is held for the hold time and then dropped by `tidy`.
        """
        with self._guard:
            for entry in self._images.values():
                if user in entry.users:
                    entry.users.discard(user)
                    self._note_if_free(entry)

    def tidy(self) -> float | None:
        """
        Drop every image that has had no user for the hold time.

        Returns:
            Seconds until the next image is due, if nobody acquires it before; None if none is
            waiting.
        """
        # Keeps NODE-14.
        with self._guard:
            now = self._clock()
            waiting = {
                entry: entry.free_since + self._hold_time_s - now
                for entry in self._images.values()
                if entry.free_since is not None
            }
            due = [entry for entry, left_s in waiting.items() if left_s <= 0]
            self._forget(due)
        _drop(due)
        return min((left_s for left_s in waiting.values() if left_s > 0), default=None)

    def users(self) -> tuple[str, ...]:
        """List everybody who has an image, in alphabetical order."""
        with self._guard:
            return tuple(sorted(set().union(*(e.users for e in self._images.values()))))

    def images(self) -> tuple[ImageStatus, ...]:
        """List the images that are mounted, the oldest first."""
        with self._guard:
            return tuple(
                ImageStatus(entry.name, entry.device, tuple(sorted(entry.users)), entry.free_since)
                for entry in self._images.values()
                if entry.master is not None
            )

    def lingering(self) -> tuple[LingeringImage, ...]:
        """
        List the images that were dropped and are still mounted somewhere.

        The Linux kernel takes up to a few milliseconds to free a loop device; what stays longer is
        held by somebody: a process that was given the mount namespace and still has it.
        """
        with self._guard:
            in_use = {entry.device for entry in self._images.values()}
            self._dropped[:] = [
                entry
                for entry in self._dropped
                if entry.device not in in_use and _backing_file(entry.device) == entry.backing_file
            ]
            return tuple(LingeringImage(entry.name, entry.device) for entry in self._dropped)

    def close(self) -> None:
        """Drop all images at once, used or not. Idempotent; mounts that were given out stay."""
        with self._guard:
            self._is_closed = True
            idle = [entry for entry in self._images.values() if not entry.borrowers]
            self._forget(idle)  # a borrower drops its own when it is done
        _drop(idle)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @contextmanager
    def _borrowed(self, file: Descriptor, image: str, user: str) -> Iterator[_Image]:
        """Enter a user, and keep the image while the body uses it; a body that fails undoes it."""
        with _step("look at image", image):
            key = _key_of(file)
        with self._guard:
            if self._is_closed:
                raise ValueError("the image store is closed")
            entry = self._images.setdefault(key, _Image(image, key))
            is_new_user = user not in entry.users
            entry.users.add(user)
            entry.borrowers += 1
            entry.free_since = None
        has_failed = True
        try:
            yield entry
            has_failed = False
        finally:
            with self._guard:
                entry.borrowers -= 1
                if has_failed and is_new_user:
                    entry.users.discard(user)
                unusable = [entry] if self._must_go(entry) else []
                self._forget(unusable)
                self._note_if_free(entry)
            _drop(unusable)

    def _must_go(self, entry: _Image) -> bool:
        never_was = entry.master is None and not entry.users
        return not entry.borrowers and (never_was or self._is_closed)

    def _note_if_free(self, entry: _Image) -> None:
        if not entry.users and not entry.borrowers and entry.free_since is None:
            entry.free_since = self._clock()

    def _forget(self, entries: list[_Image]) -> None:
        for entry in entries:
            self._images.pop(entry.key, None)
            if entry.master is not None:
                self._dropped.append(entry)

    def _another_mount(self, entry: _Image) -> Descriptor:
        assert entry.master is not None
        if not self._features.detached_clone:
            # The superblock is the device's: mounting it once more does not make a second one.
            return _mount(entry.name, entry.device)
        with _step("share image", entry.name):
            return open_tree(entry.master, "", OPEN_TREE_CLONE | AT_EMPTY_PATH)


class _NothingToAdopt(Exception):
    """No loop device of ours has the file."""


def _open_root(root: Path) -> Descriptor:
    try:
        with calling("open(2)", root):
            return Descriptor(syscall(os.open, root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
    except SyscallError as error:
        number = error.errno or errno.EIO
        advice = "the image root cannot be used; create it, or configure another"
        raise ImageError(_RESOLVE, error.call, number, str(root), advice) from error


def _open_below(base: Descriptor, image: str) -> Descriptor:
    resolve = RESOLVE_BENEATH | RESOLVE_NO_MAGICLINKS
    for _ in range(RESOLVE_ATTEMPTS_MAX - 1):
        try:
            return openat2(base, image, os.O_PATH, resolve=resolve)
        except SyscallError as error:
            if error.errno != errno.EAGAIN:
                raise
    return openat2(base, image, os.O_PATH, resolve=resolve)


def _key_of(file: Descriptor) -> _ImageKey:
    status = _status_of(file)
    return _ImageKey(status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size)


def _make_master(entry: _Image, file: Descriptor) -> None:
    with _step("set up loop device", entry.name):
        device, loop = _configure_loop(file, entry.name)
    with loop:  # until the mount holds it: a device that nobody holds frees itself
        _mount_master(entry, device)


def _remake_master(entry: _Image, file: Descriptor) -> None:
    with _step("find loop device", entry.name):
        found = _find_loop(file)
    if found is None:
        raise _NothingToAdopt
    device, loop = found
    with loop:
        _mount_master(entry, device)


def _mount_master(entry: _Image, device: str) -> None:
    master = _mount(entry.name, device)
    entry.device, entry.backing_file = device, _backing_file(device)
    entry.master = master


def _mount(image: str, device: str) -> Descriptor:
    # Keeps NODE-12.
    with _step("mount image", image), fsopen(IMAGE_FSTYPE) as context:
        try:
            fsconfig_string(context, "source", device)
            fsconfig_flag(context, "ro")
            fsconfig_create(context)
            return fsmount(context, _ATTRIBUTES)
        except SyscallError as error:
            said = ", ".join(read_fs_log(context))
            advice = said or f"it is no readable {IMAGE_FSTYPE} image"
            raise _retold("mount image", error, image, advice) from error


def _configure_loop(file: Descriptor, image: str) -> tuple[str, Descriptor]:
    """Put a file on a free loop device; the device is freed when its last holder closes it."""
    config = _loop_config(file, image)
    with _open(_LOOP_CONTROL) as control:
        for _ in range(LOOP_ATTEMPTS_MAX - 1):
            try:
                return _try_configure(control, config)
            except SyscallError as error:
                # To ask for a free device reserves nothing; somebody was faster.
                if error.errno not in _LOST_RACES:
                    raise
        return _try_configure(control, config)


def _try_configure(control: Descriptor, config: bytes) -> tuple[str, Descriptor]:
    device = f"/dev/loop{ioctl(control, Ioctl.LOOP_CTL_GET_FREE)}"
    loop = _open(device)
    try:
        ioctl(loop, Ioctl.LOOP_CONFIGURE, bytearray(config))
    except BaseException:
        loop.close()
        raise
    return device, loop


def _loop_config(file: Descriptor, image: str) -> bytes:
    name = (LOOP_TAG + os.fsencode(image))[:LOOP_NAME_BYTES_MAX]
    flags = LO_FLAGS_READ_ONLY | LO_FLAGS_AUTOCLEAR
    return _LOOP_CONFIG.pack(
        file.fileno(), 0, _LOOP_INFO.pack(0, 0, 0, 0, 0, 0, 0, 0, flags, name, b"", b"", 0, 0)
    )


def _find_loop(file: Descriptor) -> tuple[str, Descriptor] | None:
    """Find the loop device that an earlier life of ours put the file on, and hold it."""
    status = _status_of(file)
    for path in sorted(_SYS_BLOCK.glob("loop*/loop/backing_file")):
        device = f"/dev/{path.parent.parent.name}"
        # Looked at from afar first: to open a stranger's device keeps it from being freed.
        if not _is_file(_backing_file(device), status):
            continue
        with suppress(SyscallError), ExitStack() as stack:  # freed since it was listed
            loop = stack.enter_context(_open(device))
            if _is_ours(loop, status):
                stack.pop_all()
                return device, loop
    return None


def _is_file(path: str, status: os.stat_result) -> bool:
    try:
        return os.path.samestat(syscall(Path(path).stat), status)
    except OSError:
        return False


def _is_ours(loop: Descriptor, status: os.stat_result) -> bool:
    buffer = bytearray(_LOOP_INFO.size)
    ioctl(loop, Ioctl.LOOP_GET_STATUS64, buffer)
    device, inode, _, offset, _, _, _, _, flags, name, *_ = _LOOP_INFO.unpack(buffer)
    wanted = LO_FLAGS_READ_ONLY | LO_FLAGS_AUTOCLEAR
    return (
        (device, inode, offset) == (status.st_dev, status.st_ino, 0)
        and flags & wanted == wanted
        and name.startswith(LOOP_TAG)
    )


def _backing_file(device: str) -> str:
    path = _SYS_BLOCK / Path(device).name / "loop" / "backing_file"
    try:
        # An image that was deleted is still the same image.
        return (
            syscall(path.read_text, errors="surrogateescape")
            .rstrip("\n")
            .removesuffix(" (deleted)")
        )
    except OSError:
        return ""  # the device is free, or gone


def _open(path: str) -> Descriptor:
    with calling("open(2)", path):
        return Descriptor(syscall(os.open, path, os.O_RDONLY | os.O_CLOEXEC))


def _status_of(file: Descriptor) -> os.stat_result:
    with calling("fstat(2)"):
        return syscall(os.fstat, file.fileno())


def _drop(entries: list[_Image]) -> None:
    """Close the masters; outside the store's lock, because unmounting takes its time."""
    for entry in entries:
        master, entry.master = entry.master, None
        if master is not None:
            master.close()


@contextmanager
def _step(step: str, image: str) -> Iterator[None]:
    try:
        yield
    except ImageError:
        raise  # a step inside this one has said it already, and better
    except SyscallError as error:
        raise _retold(step, error, image) from error


def _retold(step: str, error: SyscallError, image: str, advice: str = "") -> ImageError:
    subject = f"{image!a}" if error.path is None else f"{image!a} by {error.path}"
    return ImageError(step, error.call, error.errno or errno.EIO, subject, advice)
