"""Mount squashfs (uenv) images through loop devices, once for all allocations that share one.

A uenv image is a squashfs file below the image root. However many allocations ask for it, it has
one loop device and one superblock on the node. The store keeps a *master* of each image: a mount
that is attached nowhere, so that it is in no mount table. Every allocation gets a mount of its own
made from it, also detached, which the forge attaches inside the allocation's mount namespace.

Nothing is ever unmounted. An allocation's mount goes with its namespace, and the master is closed
when the hold time after the last user is over. With the last of them the Linux kernel frees the
loop device: that was set up (AUTOCLEAR) in the same call that made it. So a provider that is killed
at any point leaves nothing but what is in use.

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
from pathlib import Path
from typing import Any, Final, NamedTuple, Self

from transport.calls import syscall
from transport.descriptors import Descriptor, Owner

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
"""How often an image is looked up again when directories are renamed meanwhile (EAGAIN)."""

LOOP_ATTEMPTS_MAX: Final = 128
"""How often a free loop device is asked for again when another program takes it first."""

LOOP_TAG: Final = b"nshandoff:"
"""Prefix of the names of our loop devices: a restarted provider adopts only these."""

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
"""What calls on a loop device fail with if it is not free any more, or gone."""

_RESOLVE: Final = "resolve image"

_ADVICE: Final = {
    errno.ENOENT: "no such image below the image root",
    errno.ENOTDIR: "a part of its path is no directory",
    errno.EXDEV: "it leads out of the image root",
    errno.ELOOP: "it goes through a magic link or through too many symbolic links",
    errno.EAGAIN: "a program holds a lease on it (fcntl), and is told to give it up: ask again",
}


_NO_LOOP: Final = (
    "a loop device is missing: modprobe loop, and give a container /dev/loop-control and the "
    "/dev/loop* of the node"
)


class ImageError(SyscallError):
    """An image cannot be used. Nothing that the failing operation made is left."""

    # Keeps NODE-15.

    def __init__(self, step: str, call: str, number: int, path: str, advice: str = "") -> None:
        """
        Describe one failure.

        Args:
            step: what was being done, in words.
            call: as in `SyscallError`, and so the rest.
        """
        super().__init__(call, number, path, advice)
        self.step: Final = step

    def __str__(self) -> str:
        return f"{self.step}: {super().__str__()}"


class _ImageKey(NamedTuple):
    """What identifies an image: a file that was changed in place is another one."""

    device: int
    inode: int
    mtime_ns: int
    size: int


class _Image:
    def __init__(self, name: str, key: _ImageKey) -> None:
        self.name: Final = name
        self.key: Final = key
        self.users: Final[set[str]] = set()
        self.borrowers = 0
        """How many calls are using it now."""
        self.free_since: float | None = None
        self.making: Final = threading.Lock()
        """Held while the master is made, so that a slow image does not block the others."""
        self.master: Descriptor | None = None
        self.device = ""


def resolve_image(root: Path, image: str) -> Descriptor:
    """
    Open an image for reading; its path must not leave the image root.

    Only a regular file is opened, because opening a FIFO waits and opening a device has effects.

    Args:
        root: The image root; it may be reached by any path.
        image: A path below it. Symbolic links are followed as long as they stay below it.

    Returns:
        The file; the caller owns it.

    Raises:
        ImageError: there is no such file, it leads out of the root, it is no regular file, or
            another program holds a lease on it, which it is told to give up.

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
            # O_PATH has not opened it yet. This path leads to the same file. Its owner can hold a
            # lease on it, which open(2) would wait for, 45 s by default (lease-break-time).
            return _open(f"/proc/self/fd/{found.fileno()}", os.O_NONBLOCK)
    except ImageError:
        raise
    except SyscallError as error:
        number = error.errno or errno.EIO
        advice = _ADVICE.get(number, "")
        raise ImageError(_RESOLVE, error.call, number, subject, advice) from error


def why_no_image() -> str | None:
    """Say why no image at all can be mounted here; None if nothing is in the way."""
    try:
        with _open_loop(_LOOP_CONTROL), fsopen(IMAGE_FSTYPE):
            return None
    except SyscallError as error:
        return str(error)


class ImageStore(Owner):
    """
    The images of this node that are in use, or were until the hold time began.

    A *user* is a name that the caller chooses: the token of an allocation's incarnation. Usable
    from any thread; an image that is slow to mount delays only the users of that image.

    Args:
        root: The image root.
        hold_time_s: Seconds that an image is kept after its last user has left, 0.0 or more.
        clock: Monotonic seconds; only differences count.
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
        self._is_closed = False

    def acquire(self, image: str, user: str) -> Descriptor:
        """
        Mount an image for a user: read-only, nosuid and nodev.

        For the first user the image is put on a loop device and mounted; all later ones get another
        mount of the same superblock. A user that acquires it again gets another mount and still
        counts once.

        Args:
            image: A path below the image root.
            user: Uses it until `release`.

        Returns:
            A detached mount, to be attached once with move_mount(2); the caller owns it.

        Raises:
            ImageError: the image cannot be used, with what the Linux kernel says about it. Nothing
                has changed.
            ValueError: the store is closed.
        """
        with resolve_image(self._root, image) as file, self._borrowed(file, image, user) as entry:
            with entry.making:
                if entry.master is None:
                    _make_master(entry, file)
            return self._another_mount(entry)

    def adopt(self, image: str, user: str) -> bool:
        """
        Adopt an image that a user got from an earlier process of this provider.

        The user's own mount stays as it is. What is adopted is the superblock, so that the next
        user shares it.

        Returns:
            True if the image is in the store now, with this user; False if there is nothing to
            adopt, because the mount is gone or another file has the image's name now.

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
        Remove a user from all images; its mounts stay. Idempotent.

        An image without users is dropped by `tidy` when the hold time is over.
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
            Seconds until the next one is due, if it is not acquired before; None if none is.
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

    def close(self) -> None:
        """Drop all images at once, used or not. Idempotent; mounts that were acquired stay."""
        with self._guard:
            self._is_closed = True
            idle = [entry for entry in self._images.values() if not entry.borrowers]
            self._forget(idle)  # one that is borrowed is dropped by its borrower
        _drop(idle)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def _borrowed(self, file: Descriptor, image: str, user: str) -> Iterator[_Image]:
        """Add a user, and keep the image while the body uses it; if the body fails, remove it."""
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

    def _another_mount(self, entry: _Image) -> Descriptor:
        assert entry.master is not None
        if not self._features.detached_clone:
            # The superblock belongs to the device: mounting that again does not make another.
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
    with loop:  # until it is mounted: a device that is not in use frees itself
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
    entry.master, entry.device = _mount(entry.name, device), device


def _mount(image: str, device: str) -> Descriptor:
    # Keeps NODE-12.
    with _step("mount image", image), fsopen(IMAGE_FSTYPE) as context:
        try:
            fsconfig_string(context, "source", device)
            fsconfig_flag(context, "ro")
            fsconfig_create(context)
            return fsmount(context, _ATTRIBUTES)
        except SyscallError as error:
            log = ", ".join(read_fs_log(context))
            advice = log or f"it is no readable {IMAGE_FSTYPE} image"
            number = error.errno or errno.EIO
            raise SyscallError(error.call, number, error.path, advice) from error


def _configure_loop(file: Descriptor, image: str) -> tuple[str, Descriptor]:
    """Put a file on a free loop device, which is freed when it is closed everywhere."""
    config = _loop_config(file, image)
    with _open_loop(_LOOP_CONTROL) as control:
        for _ in range(LOOP_ATTEMPTS_MAX - 1):
            try:
                return _try_configure(control, config)
            except SyscallError as error:
                # Asking for a free device does not reserve it; another program was faster.
                if error.errno not in _LOST_RACES:
                    raise
        return _try_configure(control, config)


def _try_configure(control: Descriptor, config: bytes) -> tuple[str, Descriptor]:
    device = f"/dev/loop{ioctl(control, Ioctl.LOOP_CTL_GET_FREE)}"
    loop = _open_loop(device)
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
    """Find and open the loop device on which an earlier process of ours put the file."""
    status = _status_of(file)
    for device, path in loop_devices():
        # Compared by path first: a device of another program that is opened cannot be freed.
        if not _is_file(path, status):
            continue
        with suppress(SyscallError), ExitStack() as stack:  # freed since it was listed
            loop = stack.enter_context(_open(device))
            if _is_ours(loop, status):
                stack.pop_all()
                return device, loop
    return None


def loop_devices() -> Iterator[tuple[str, str]]:
    """List the loop devices in use, each with its file; that of a deleted one ends in (deleted)."""
    for folder in sorted(_SYS_BLOCK.glob("loop*/loop")):
        with suppress(OSError):  # freed since it was listed
            file = syscall((folder / "backing_file").read_text, errors="surrogateescape")
            yield f"/dev/{folder.parent.name}", file.rstrip("\n")


def image_on(device: str) -> bytes | None:
    """Read from a loop device of ours which image is on it, truncated; None if it is not ours."""
    with suppress(OSError):  # freed since it was listed
        # Ours free themselves. No other is opened, since that could keep it from being freed.
        folder = _SYS_BLOCK / Path(device).name / "loop"
        if syscall((folder / "autoclear").read_text).strip() == "1":
            with _open(device) as loop:
                name: bytes = _read_status(loop)[9].rstrip(b"\0")
            return name.removeprefix(LOOP_TAG) if name.startswith(LOOP_TAG) else None
    return None


def _is_file(path: str, status: os.stat_result) -> bool:
    try:
        # An image that was deleted is the same image.
        return os.path.samestat(syscall(Path(path.removesuffix(" (deleted)")).stat), status)
    except OSError:
        return False


def _is_ours(loop: Descriptor, status: os.stat_result) -> bool:
    device, inode, _, offset, _, _, _, _, flags, name, *_ = _read_status(loop)
    wanted = LO_FLAGS_READ_ONLY | LO_FLAGS_AUTOCLEAR
    return (
        (device, inode, offset) == (status.st_dev, status.st_ino, 0)
        and flags & wanted == wanted
        and name.startswith(LOOP_TAG)
    )


def _read_status(loop: Descriptor) -> tuple[Any, ...]:
    buffer = bytearray(_LOOP_INFO.size)
    ioctl(loop, Ioctl.LOOP_GET_STATUS64, buffer)
    return _LOOP_INFO.unpack(buffer)


def _open(path: str, flags: int = 0) -> Descriptor:
    with calling("open(2)", path):
        return Descriptor(syscall(os.open, path, os.O_RDONLY | os.O_CLOEXEC | flags))


def _open_loop(path: str) -> Descriptor:
    try:
        return _open(path)
    except SyscallError as error:
        if error.errno not in (errno.ENOENT, errno.EACCES, errno.EPERM):
            raise
        raise SyscallError(error.call, error.errno, path, _NO_LOOP) from error


def _status_of(file: Descriptor) -> os.stat_result:
    with calling("fstat(2)"):
        return syscall(os.fstat, file.fileno())


def _drop(entries: list[_Image]) -> None:
    """Close the masters; without the store's lock, because unmounting takes a while."""
    for entry in entries:
        master, entry.master = entry.master, None
        if master is not None:
            master.close()


@contextmanager
def _step(step: str, image: str) -> Iterator[None]:
    try:
        yield
    except ImageError:
        raise  # it names the step inside this one
    except SyscallError as error:
        subject = f"{image!a}" if error.path is None else f"{image!a} by {error.path}"
        number = error.errno or errno.EIO
        raise ImageError(step, error.call, number, subject, error.advice) from error
