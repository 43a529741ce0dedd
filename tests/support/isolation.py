"""A cgroup and a mount table of its own for a process that runs tests.

An isolated process sees its own cgroup as the root of cgroup v2: the slices, scopes and anchors of
other test sessions and of other providers cannot be seen, and those that a test makes cannot be
seen by them. Whatever it starts is isolated as well.

The cgroup is a directory at the real root. The process that made it holds a lock on it for as long
as it lives, so that what a killed session has left can be told from what is in use.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

PREFIX: Final = "nsh-session-"
EMPTIES_S: Final = 30.0
"""How long the processes of a killed cgroup may take to die."""

CLONE_NEWNS: Final = 0x00020000
CLONE_NEWCGROUP: Final = 0x02000000
MS_REC: Final = 0x4000
MS_SLAVE: Final = 1 << 19
MS_SHARED: Final = 1 << 20
MNT_DETACH: Final = 2

_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_libc: Final = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Isolation:
    """What it takes to end it: descriptors, its own, of cgroups as they are seen from outside."""

    name: str
    above: int
    """The root of cgroup v2, where the process's own cgroup is a directory."""
    home: int
    """`cgroup.procs` of the cgroup that this process came from."""
    lock: int
    """The directory of the process's own cgroup."""

    def leave(self) -> None:
        """
        Move this process back, kill what is left in its own cgroup, and remove that.

        The mount table stays its own, so this comes last in a process's life.

        Raises:
            OSError: something did not die in time; the cgroup stays, for a later session to remove.
        """
        try:
            os.write(self.home, b"0")
            with suppress(FileNotFoundError):  # before Linux 5.14
                _write("cgroup.kill", "1", self.lock)
            deadline = time.monotonic() + EMPTIES_S
            while not _is_empty(self.lock) and time.monotonic() < deadline:
                time.sleep(0.002)
            _remove(self.name, self.above)
        finally:
            for descriptor in (self.lock, self.home, self.above):
                os.close(descriptor)


def enter(root: Path) -> Isolation:
    """
    Isolate this process, of its threads the calling one; remove what dead sessions have left.

    Args:
        root: where cgroup v2 is mounted, before and after.

    Raises:
        OSError: the Linux kernel refuses; nothing has changed.
    """
    above = os.open(root, _DIRECTORY)
    own = next(line for line in _lines("/proc/self/cgroup") if line.startswith("0::"))
    # Opened here: a write counts as made by the process that opened, from its cgroup at that time.
    home = os.open(root / own[4:] / "cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)
    remove_stale(above)
    isolation = _make(above, home)
    try:
        _write("cgroup.procs", "0", isolation.lock)
        _unshare(root)
    except OSError:
        isolation.leave()
        raise
    return isolation


def find_cgroup2() -> Path | None:
    """Where this node has mounted cgroup v2, by filesystem type; hybrid nodes differ."""
    for line in _lines("/proc/self/mountinfo"):
        fields = line.split()
        if fields[fields.index("-") + 1] == "cgroup2":
            return Path(fields[4])
    return None


def remove_stale(above: int) -> None:
    """Remove the cgroups of sessions on which there is no lock and in which there is no process."""
    for name in os.listdir(above):
        if name.startswith(PREFIX):
            with suppress(OSError):
                lock = os.open(name, _DIRECTORY, dir_fd=above)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if _is_empty(lock):
                        _remove(name, above)
                finally:
                    os.close(lock)


def _make(above: int, home: int) -> Isolation:
    number = 0
    while True:
        number += 1
        name = f"{PREFIX}{os.getpid()}-{number}"
        # Until it is locked, another session may take it for a stale one.
        with suppress(FileExistsError, FileNotFoundError):
            os.mkdir(name, dir_fd=above)
            lock = os.open(name, _DIRECTORY, dir_fd=above)
            fcntl.flock(lock, fcntl.LOCK_EX)
            if name in os.listdir(above):
                return Isolation(name, above, home, lock)
            os.close(lock)


def _unshare(root: Path) -> None:
    """Have cgroups and mounts of one's own; what is shared stays so, with others in here."""
    back = [os.open(f"/proc/self/ns/{name}", os.O_RDONLY) for name in ("cgroup", "mnt")]
    table = _lines("/proc/self/mountinfo")
    is_shared = any(" / / " in line and " shared:" in line for line in table)
    try:
        _call("unshare", CLONE_NEWNS | CLONE_NEWCGROUP)
        try:
            # What is mounted outside still arrives here, and what is unmounted there still goes.
            _call("mount", None, b"/", None, MS_REC | MS_SLAVE, None)
            if is_shared:
                _call("mount", None, b"/", None, MS_REC | MS_SHARED, None)
            _call("umount2", os.fsencode(root), MNT_DETACH)
            _call("mount", b"cgroup2", os.fsencode(root), b"cgroup2", 0, None)
        except OSError:
            for namespace in back:
                _call("setns", namespace, 0)
            raise
    finally:
        for namespace in back:
            os.close(namespace)


def _call(name: str, *arguments: object) -> None:
    if getattr(_libc, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def _remove(name: str, above: int) -> None:
    for _, directories, _, parent in os.fwalk(name, topdown=False, dir_fd=above):
        for directory in directories:
            os.rmdir(directory, dir_fd=parent)
    os.rmdir(name, dir_fd=above)


def _is_empty(directory: int) -> bool:
    events = os.open("cgroup.events", os.O_RDONLY, dir_fd=directory)
    with open(events, encoding="ascii") as file:
        return "populated 0\n" in file


def _write(name: str, text: str, directory: int) -> None:
    file = os.open(name, os.O_WRONLY, dir_fd=directory)
    try:
        os.write(file, text.encode())
    finally:
        os.close(file)


def _lines(path: str) -> list[str]:
    return Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
