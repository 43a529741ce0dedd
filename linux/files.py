"""Replace a file in one step, read one without waiting for a pipe, lock one against others."""

from __future__ import annotations

import errno
import fcntl
import os
import select
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple

from transport.calls import syscall
from transport.descriptors import Descriptor

from .syscalls import calling

READ_BYTES_MAX: Final = 65536
"""What is longer is none of the files that are read here."""

LEFT_ATTEMPTS_MAX: Final = 100
"""How often to try to lock what a dead process has locked."""

LEFT_PAUSE_MS: Final = 20
"""Pause between two attempts."""


def read_file(path: Path) -> str:
    """
    Read a small file; a pipe, a device or a directory in its place is refused, not waited for.

    Raises:
        OSError: it cannot be read, or is no regular file.
        ValueError: it is no text.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
    with Descriptor(syscall(os.open, path, flags)) as file:
        if not stat.S_ISREG(syscall(os.fstat, file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "it is no regular file", str(path))
        return syscall(os.read, file.fileno(), READ_BYTES_MAX).decode()


class OwnFile(NamedTuple):
    """A file as this process made it."""

    path: Path
    """Where it is."""
    status: os.stat_result
    """To tell it from one that another program has put there since."""

    def remove(self) -> None:
        """
        Remove it, if it is still there and no other program's.

        Raises:
            OSError: it cannot be removed.
        """
        with suppress(FileNotFoundError):
            # Guard: the file that is removed is ours.
            if _identity(syscall(self.path.lstat)) == _identity(self.status):
                syscall(self.path.unlink)


def _identity(status: os.stat_result) -> tuple[int, int, int]:
    # A file system gives the inode of a file that was removed to one that is made later.
    return status.st_dev, status.st_ino, status.st_mtime_ns


def replace_file(path: Path, text: str, mode: int | None = None) -> os.stat_result:
    """
    Write a file beside its place, and rename it to there.

    Args:
        path: Where it has to be.
        text: Its content.
        mode: Its permissions; None has the umask say.

    Returns:
        Its status, to know it again by: `OwnFile`.

    Raises:
        SyscallError: what was there before is unchanged, and nothing else is left.

    Source:
        rename(2).
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with calling("write(2)", path):
            syscall(draft.write_text, text, encoding="utf-8")
            if mode is not None:
                syscall(draft.chmod, mode)
            status = syscall(draft.stat)
        with calling("rename(2)", path):
            syscall(draft.replace, path)
    except OSError:
        with suppress(OSError):
            syscall(draft.unlink)
        raise
    return status


def try_lock(file: Descriptor, kind: int, holder: Callable[[], int | None]) -> bool:
    """
    Lock an open file or directory, flock(2), if no living process has locked it.

    A program that is killed while it starts another one leaves its locks with that one, until it
    executes something. That is waited for, for a bounded time.

    Args:
        file: Lent; closing it unlocks.
        kind: LOCK_SH or LOCK_EX.
        holder: Says which process locked it, as far as it is known.

    Raises:
        OSError: it cannot be locked at all.
    """
    for _ in range(LEFT_ATTEMPTS_MAX):
        try:
            syscall(fcntl.flock, file.fileno(), kind | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = holder()
            if pid is None or syscall(Path(f"/proc/{pid}").exists):
                break
            select.poll().poll(LEFT_PAUSE_MS)
        else:
            return True
    return False
