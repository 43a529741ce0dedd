"""Running out of descriptors, of room on a disk or of room in a pipe, on purpose."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import resource
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def descriptors_left(count: int) -> Iterator[None]:
    """Let this process open `count` more descriptors and no other; afterwards as before."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    fillers: list[int] = []
    # Numbers below the limit that are free now would be used first: all are filled, some freed.
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1 + count, hard))
    try:
        while (filler := _open_null()) is not None:
            fillers.append(filler)
        for _ in range(count):
            os.close(fillers.pop())
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for filler in fillers:
            os.close(filler)


def fill_pipe(fd: int) -> None:
    """Fill a pipe or terminal by its writing end, and leave that blocking as it was."""
    os.set_blocking(fd, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(fd, b"\0" * 4096)
    os.set_blocking(fd, True)


def fill_disk(disk: Path) -> Path:
    """Fill a file system, its inodes too; remove the directory that is returned to make room."""
    fillers = disk / "fillers"
    fillers.mkdir()
    with (fillers / "blocks").open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"\0" * 4096)
    with contextlib.suppress(OSError):
        for number in itertools.count():
            (fillers / str(number)).touch()
    return fillers


def _open_null() -> int | None:
    try:
        return os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
        return None
