"""Read /proc/self/mountinfo: what is mounted where, of which type, and how it propagates.

Any user who may mount something (with fusermount(1), for example) chooses the name of a mount
point, and so bytes of this table: they need not be UTF-8, and can have what Python takes for the
end of a line.
"""

from __future__ import annotations

import os
import re
import select
from pathlib import Path
from typing import Final, NamedTuple

from transport.calls import syscall
from transport.descriptors import Descriptor, Owner

from .syscalls import calling

MOUNTINFO: Final = Path("/proc/self/mountinfo")
"""The table of this process."""


class Mount(NamedTuple):
    """One line of the table."""

    point: str
    """Where it is mounted, as `os.fsdecode` decodes it."""
    options: list[str]
    """Of the mount, not of its filesystem."""
    tags: list[str]
    """How it propagates (`shared:1`, `master:2`); none if it is private."""
    fstype: str
    """The type of its filesystem, `cgroup2` for example."""


def mount_lines(path: Path = MOUNTINFO) -> list[str]:
    """
    Read the lines of the table; a later one covers an earlier one with the same mount point.

    Raises:
        SyscallError: it cannot be read.
    """
    with calling("read(2)", path):
        return os.fsdecode(syscall(path.read_bytes)).split("\n")[:-1]


def parse_mount(line: str) -> Mount:
    """
    Parse one line.

    Source:
        proc_pid_mountinfo(5).
    """
    mount, _, filesystem = line.partition(" - ")
    _, _, _, _, point, options, *tags = mount.split(" ")
    return Mount(_unescape(point), options.split(","), tags, filesystem.split(" ")[0])


def _unescape(field: str) -> str:
    """Decode the octal escapes of blanks and backslashes."""
    if "\\" not in field:  # almost always
        return field
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


class MountWatch(Owner):
    """
    Says whether the mounts have changed in the mount namespace in which it was made.

    A poll(2) of it for POLLPRI is an asking as well: it reports a change, once.

    Raises:
        SyscallError: the table cannot be opened.

    Source:
        proc_pid_mounts(5): a poll(2) of the table reports a change, once.
    """

    def __init__(self) -> None:
        with calling("open(2)", MOUNTINFO):
            table = syscall(os.open, MOUNTINFO, os.O_RDONLY | os.O_CLOEXEC)
        self._table: Final = Descriptor(table)
        self._poll: Final = select.poll()
        self._poll.register(self._table, select.POLLPRI)

    def has_changed(self) -> bool:
        """
        Say whether anything was mounted, unmounted, moved or remounted since this was last asked.

        How mounts propagate is not watched.
        """
        return bool(self._poll.poll(0))

    def fileno(self) -> int:
        """Return the descriptor, to be waited for; it stays this object's."""
        return self._table.fileno()

    def close(self) -> None:
        """Close the table. Idempotent."""
        self._table.close()

    def __enter__(self) -> MountWatch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
