"""cgroup v2 scopes: make an allocation's cgroup, see when it is empty, kill all in it, remove it.

Every allocation has one cgroup v2 directory, `<cgroup2>/workload.slice/<allocation_id>.scope` where
`ScopePlace` says nothing else. The provider makes it before it answers, and the consumer fills it.
From then on the provider sees in it that the allocation is over, and kills by it what is left.

Two rules hold throughout. *Decide from state, never from an event*: events of a cgroup come also
for freezing, late, or merged, so `ScopeWatch` only says where to read again. *Touch only what is
provably ours*: a scope has its owner's token as an extended attribute, which survives the owner,
and nothing is killed or removed that has another one.

A consumer may make the scope itself, before it asks, to set limits on it. Such a scope is
*adopted*: it gets the token and nothing else, loses it at the release, and is not removed.

A consumer is root on its node and may nest, freeze, make threaded or remove its cgroup. So nothing
here blocks, recurses or follows names in it without a bound.

Used by `linux.backend`, and by `linux.forge` for the scopes of self-service.
"""

from __future__ import annotations

import errno
import os
import re
import select
import signal
import stat
import struct
import threading
from collections.abc import Hashable, Iterable, Iterator
from contextlib import ExitStack, suppress
from enum import Enum
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Final, Generic, NamedTuple, Self, TypeVar

from statemachine.messages import objection_to_id
from statemachine.record import record
from transport.calls import syscall
from transport.descriptors import Descriptor, Owner

from .mountinfo import MOUNTINFO, mount_lines, parse_mount
from .syscalls import (
    IN_ATTRIB,
    IN_DELETE,
    IN_ONLYDIR,
    IN_Q_OVERFLOW,
    SyscallError,
    calling,
    inotify_add_watch,
    inotify_init1,
    open_cgroup_by_id,
    pidfd_open,
    pidfd_send_signal,
)

SELF_SERVICE_SLICE: Final = "self-service.slice"
"""Holds the scope of a consumer's own allocation where the provider's has taken the name."""

WORKLOAD_SLICE: Final = "workload.slice"
"""Contains the scopes of allocations by default."""

ANCHOR_SLICE: Final = "pact.slice"
"""Contains the anchors, in one cgroup for each provider instance; they are never in a scope."""

OWNER_ATTRIBUTE: Final = "user.nshandoff.owner"
"""Extended attribute of a scope: its owner's token."""

ALLOCATION_ATTRIBUTE: Final = "user.nshandoff.allocation"
"""Extended attribute of a scope: which allocation it was made for, as its owner describes it."""

STATE_ATTRIBUTE: Final = "user.nshandoff.state"
"""Extended attribute of a scope: the last state that its owner marked it with."""

MADE_ATTRIBUTE: Final = "user.nshandoff.made"
"""Extended attribute of a slice that was made here, and may be removed when it is empty."""

USED_ATTRIBUTE: Final = "user.nshandoff.used"
"""Extended attribute of an adopted scope: the CPU time, in microseconds, that was used before."""

FROZEN_ATTRIBUTE: Final = "user.nshandoff.frozen"
"""Extended attribute of a scope: it was frozen here to kill what is in it, and not by others."""

_OURS: Final = "user.nshandoff."
"""Prefix of our extended attributes."""

SCOPE_MODE: Final = stat.S_ISVTX | 0o755
"""
Permissions of a scope that was made here. The sticky bit says that it was: mkdir(2) sets it with
the directory, so that even after a crash no such scope is taken for one that a consumer made.
"""

ANCHORS_MODE: Final = 0o700
"""Permissions of the anchors' cgroup: who can open it can lock it, and so keep a provider away."""

MAKE_ATTEMPTS_MAX: Final = 100
"""How often a directory is made again when it, or its parent, is removed meanwhile."""

REMOVE_STEPS_MAX: Final = 10_000
"""Directories that one `remove` visits at most; the rest is left for the next one."""

KILL_ROUNDS_MAX: Final = 16
"""How often a kill by pid looks again for processes that were started meanwhile."""

KILL_BATCH_MAX: Final = 64
"""How many pidfds a kill by pid opens at a time."""

LEAVING_ATTEMPTS_MAX: Final = 250
"""How often to try to remove a cgroup whose last process has died; microseconds should suffice."""

LEAVING_PAUSE_MS: Final = 2
"""Pause between two attempts, and between two looks at a CPU time that may still be counted."""

END_ATTEMPTS_MAX: Final = 100
"""How often to try to remove a scope in which everything was killed."""

END_PAUSE_MS: Final = 20
"""Pause between two attempts."""

EVENTS_BYTES_MAX: Final = 4096
"""More than `cgroup.events` ever contains; one read re-arms its poll."""

READ_BYTES_MAX: Final = 4096
"""How much of any other file of a cgroup is read at a time."""

INOTIFY_BYTES_MAX: Final = 65_536
"""How much of the events of removals is read at a time; the rest is read the next time."""

_INOTIFY_EVENT: Final = struct.Struct("=iIII")
"""`struct inotify_event` without the name: watch, mask, cookie, length of the name."""

_GONE: Final = (errno.ENOENT, errno.ENODEV)
_BUSY: Final = (errno.EBUSY, errno.ENOTEMPTY)
_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

Key = TypeVar("Key", bound=Hashable)


class CgroupUnavailable(Exception):
    """This node has no usable cgroup v2 hierarchy; no allocation can be tracked on it."""


class ScopeError(SyscallError):
    """A call on a cgroup failed. Nothing that the failing operation made is left."""


_calling: Final = partial(calling, kind=ScopeError)


def find_cgroup2(mountinfo: str | Path = MOUNTINFO) -> Path:
    """
    Find where cgroup v2 is mounted, by filesystem type: on hybrid nodes the path differs.

    Args:
        mountinfo: The text of a mountinfo file, or the path of one.

    Returns:
        The first cgroup v2 mount that is writable and not covered by another mount.

    Raises:
        CgroupUnavailable: there is none.

    Source:
        proc_pid_mountinfo(5); cgroups(7).
    """
    # Keeps NODE-1.
    lines = mount_lines(mountinfo) if isinstance(mountinfo, Path) else mountinfo.splitlines()
    for mount in map(parse_mount, lines):
        if mount.fstype != "cgroup2" or "rw" not in mount.options:
            continue
        root = Path(mount.point)
        # Only a v2 hierarchy has this file at its top: not so if another mount covers this one.
        if syscall((root / "cgroup.controllers").exists):
            return root
    raise CgroupUnavailable(
        "no writable cgroup2 mount in mountinfo; mount one: mount -t cgroup2 none /sys/fs/cgroup"
    )


@record
class ScopePlace:
    """
    Where the scopes of a provider are below the mount point of cgroup v2, and what they are called.

    Raises:
        ValueError: that cannot be a place of scopes; the text says why.
    """

    parent: str = WORKLOAD_SLICE
    """The cgroup that contains them: a relative path. What is missing of it is made."""
    name: str = "{id}.scope"
    """What one is called; `{id}` stands for the allocation."""

    def __post_init__(self) -> None:
        for part in self.parent.split("/"):
            objection = objection_to_id(part)
            if objection is not None:
                raise ValueError(f"the parent of scopes {self.parent!a}: {objection}")
        if self.parent.split("/")[0] == ANCHOR_SLICE:
            raise ValueError(f"the parent of scopes {self.parent!a}: anchors are there")
        if self.name.count("{id}") != 1:
            raise ValueError(f"the name of scopes {self.name!a} does not have {{id}} in it once")
        objection = objection_to_id(self.name.replace("{id}", "x"))
        if objection is not None:
            raise ValueError(f"the name of scopes {self.name!a}: {objection}")

    def path_of(self, root: Path, allocation_id: str) -> Path:
        """
        Say where the scope of an allocation is.

        Raises:
            ScopeError: EINVAL, the id cannot be in a directory's name.
        """
        _expect_name(allocation_id)
        return root.joinpath(self.parent, self.name.replace("{id}", allocation_id))


DEFAULT_PLACE: Final = ScopePlace()
"""`workload.slice/<id>.scope`."""


def find_cgroup(cgroup_id: int) -> Path:
    """
    Find a cgroup by its id: in another cgroup namespace, or below another mount, its path differs.

    Args:
        cgroup_id: The inode number of its directory, which the Linux kernel never uses twice.

    Raises:
        CgroupUnavailable: there is none, or what can be seen of cgroup v2 here has no path to it.

    Source:
        open_by_handle_at(2); it needs CAP_DAC_READ_SEARCH, except for the mount point itself.
    """
    mount = find_cgroup2()
    with _calling("stat(2)", mount):
        if syscall(mount.stat).st_ino == cgroup_id:
            return mount
    with (
        suppress(OSError),
        _open_directory(mount) as directory,
        open_cgroup_by_id(directory, cgroup_id) as found,
    ):
        path = Path(syscall(os.readlink, f"/proc/self/fd/{found.fileno()}"))
        if syscall(path.stat).st_ino == cgroup_id:
            return path
    raise CgroupUnavailable(
        f"the provider's cgroups are outside of what {mount} shows here; use the cgroup namespace"
        " of the node, and mount cgroup2 in it"
    )


class Use(Enum):
    """What a scope is used for."""

    NONE = "nothing has run in it"
    RUNNING = "a process is in it"
    OVER = "its processes have all ended, or it is gone"


class Scope:
    """
    The cgroup of one allocation. It has no open descriptor, because there can be thousands.

    Made by `create`, found again by `open`. A scope that another program removed counts as empty,
    over and removed; one that another program made in its place is never touched.
    """

    def __init__(self, path: Path, owner: str) -> None:
        self.path: Final = path
        self._token: Final = owner
        self._was_made = False
        """Whether its directory was made by this object."""
        self._inode: int | None = None
        """Of the directory that this object has claimed; the Linux kernel never uses one twice."""
        self._was_seen_populated = False

    @classmethod
    def create(
        cls,
        root: Path,
        allocation_id: str,
        owner: str,
        description: str | None = None,
        place: ScopePlace = DEFAULT_PLACE,
    ) -> Self:
        """
        Make the allocation's scope, or adopt the one that is there, and set its owner.

        Adopted is one that has no owner and in which nothing is: a consumer has made it, or its
        maker died before setting an owner. Its limits, attributes and inode stay. If several make
        the same scope at the same time, exactly one succeeds.

        Args:
            root: The mount point of cgroup v2.
            allocation_id: The allocation; refused if it cannot be a directory's name.
            owner: This owner's token; a scope with another one is never touched.
            description: Kept with the scope, for `described_scopes`.
            place: Where scopes are.

        Raises:
            ScopeError: nothing was made, and what was there before is still there. With EEXIST it
                is in use, or another owner's.
        """
        # Keeps NODE-1, NODE-18.
        path = place.path_of(root, allocation_id)
        with _calling("open(2)", root):
            # To remove a cgroup takes a descriptor: what fails for want of one can be undone.
            spare = _open_directory(root)
        scope = cls(path, owner)
        try:
            with spare:
                scope._make_or_claim(root, description)
                _expect_usable(path)
        except BaseException:
            scope._abandon()
            raise
        return scope

    @classmethod
    def open(
        cls, root: Path, allocation_id: str, owner: str, place: ScopePlace = DEFAULT_PLACE
    ) -> Self | None:
        """
        Find the scope that this owner made or adopted, also in an earlier process.

        Returns:
            The scope, if it has the owner's token, or if it was made here and has none (the owner
            died before setting it); None if there is none or another owner has it.
        """
        return cls.at(place.path_of(root, allocation_id), owner)

    @classmethod
    def at(cls, path: Path, owner: str) -> Self | None:
        """As `open`, by the scope's path: places can be others when a provider starts again."""
        scope = cls(path, owner)
        return None if scope.is_gone() else scope

    def owner(self) -> str | None:
        """Return the token of its owner; None if it has none, or is gone."""
        return _read_owner(self.path)

    def mark(self, state: str) -> None:
        """
        Note a state on the scope itself, where it outlives the owner and every file.

        Raises:
            ScopeError: the scope is gone or another's, or the Linux kernel has no memory for it.
        """
        with _calling("setxattr(2)", self.path), _open_directory(self.path) as directory:
            # Guard: what is marked is ours.
            if _read_owner(directory.fileno()) != self._token:
                raise OSError(errno.ENOENT, "it is another owner's")
            syscall(os.setxattr, directory.fileno(), STATE_ATTRIBUTE, state.encode())

    def marked(self) -> str | None:
        """Return the state that the scope was last marked with; None if it was not, or is gone."""
        return read_attribute(self.path, STATE_ATTRIBUTE)

    def is_gone(self) -> bool:
        """Say whether the scope was removed, given back, or replaced by one of another owner."""
        owner = self.owner()
        return owner != self._token and not (owner is None and _is_made_here(self.path))

    def is_populated(self) -> bool:
        """Say whether a live process, frozen or not, is in the scope or below; no zombie counts."""
        # Keeps END-5, END-6.
        path = f"{self.path}/cgroup.events"
        with _calling("read(2)", path, *_GONE), _open_in(None, path, os.O_RDONLY) as events:
            return self._note_populated(events)
        return False

    def was_used(self) -> bool:
        """
        Say whether a process ran in the scope since it was made or adopted, even if none was seen.

        CPU time proves it: the Linux kernel counts it for every process in the scope and keeps it
        after the process has ended. Freezing, which also makes an event, does not change it. The
        last of it is counted when the process leaves the CPU, which can be a moment after the scope
        is empty: after an event and False, ask again a little later.
        """
        usage = _usage_of(self._read("cpu.stat"))
        return usage > 0 and usage > int(read_attribute(self.path, USED_ATTRIBUTE) or 0)

    def is_over(self) -> bool:
        """
        Say whether the allocation's processes have all ended, after there were some.

        True only if the scope is empty in two readings and was used before, or if it was removed:
        nothing can run in it any more. An empty scope that was never used is not over.

        Source: protocol, "Conventions on the node".
        """
        # Keeps END-4.
        return self.use() is Use.OVER

    def use(self) -> Use:
        """Say how far the allocation's processes are; see `is_over`."""
        if self.is_gone():
            return Use.OVER
        path = f"{self.path}/cgroup.events"
        with _calling("read(2)", path, *_GONE), _open_in(None, path, os.O_RDONLY) as events:
            if self._note_populated(events):
                return Use.RUNNING
            if not (self._was_seen_populated or self.was_used()):
                return Use.NONE
            # Guard: empty in two readings.
            return Use.RUNNING if self._note_populated(events) else Use.OVER
        return Use.OVER if self.is_gone() else Use.NONE

    def kill(self) -> None:
        """
        Send SIGKILL to every process in the scope and below it; does not wait for their end.

        To be repeated until the scope is empty: a process may enter meanwhile. The Linux kernel
        kills the whole cgroup at once. Where it cannot (the consumer made it threaded), the cgroup
        is frozen, and stays frozen, so that no process can start others faster than it is killed.

        Raises:
            ScopeError: the scope is populated but not provably ours (nothing was killed), or the
                Linux kernel refused.
        """
        # Keeps NODE-4, END-11.
        with (
            _calling("cgroup.kill", self.path, *_GONE),
            _open_directory(self.path) as directory,
        ):
            # Read by the descriptor, so that the cgroup that is checked is the one that is killed.
            owner = _read_owner(directory.fileno())
            if not _is_populated(directory):
                return
            # Guard: what is killed is ours.
            if owner == self._token:
                self._kill_all(directory)
            elif owner is None:
                advice = "it has no owner, so what runs in it is not killed; end it by hand"
                raise ScopeError("cgroup.kill", errno.EPERM, self.path, advice)

    def remove_if_empty(self) -> bool:
        """
        Remove the scope if that is all there is to do, as it is where a job has ended by itself.

        Returns:
            True if it was removed. If not, `kill` and `remove` are to be called: it was adopted or
            is not provably ours, something is in it or below it, or the Linux kernel refused.
        """
        # Keeps NODE-4, NODE-17, NODE-19, END-11.
        try:
            with _open_directory(self.path) as directory:
                number = directory.fileno()
                is_ours = _read_owner(number) == self._token and _is_made_here_at(directory)
                if not is_ours or _is_populated_in(directory, "cgroup.events"):
                    return False
            # Its events could be read, so it was there until then, and no other had its path.
            syscall(os.rmdir, self.path)
        except OSError:
            return False
        return True

    def remove(self) -> bool:
        """
        Remove every empty cgroup below the scope, and the scope if it was made here.

        One that was adopted is given back: it stays, empty and without an owner, for the program
        that made it.

        Returns:
            True if the scope is gone or given back, also if it was before; False while something is
            in it.

        Raises:
            ScopeError: the Linux kernel refused for another reason than being in use.
        """
        # Keeps NODE-4, NODE-19, END-11.
        if self.is_gone():
            return True
        with _calling("rmdir(2)", self.path, *_GONE), _open_directory(self.path) as directory:
            # Asked of what was opened: another program may have put its own there meanwhile.
            owner, is_made_here = _read_owner(directory.fileno()), _is_made_here_at(directory)
            if owner is None and is_made_here:
                # Of one that was claimed here, and lost its token since, it is known whose it is.
                # Guard: what lost its token was claimed here.
                if self._inode is None or self._inode != _inode_of(directory):
                    return self._remove_unowned(directory)
            # Guard: what is emptied was opened.
            elif owner != self._token:
                return True
            with _Cursor(directory) as cursor:
                if _is_populated(directory) or not cursor.remove_below():
                    return False
            if not is_made_here:
                self._give_back(directory)
                return True
            if owner is None:
                return self._remove_unowned(directory)
        # By its path, because rmdir(2) takes no descriptor. If another program puts its own there
        # just now, that stays if anything is in it.
        return remove_cgroup(self.path)

    def processes(self) -> list[int]:
        """
        List the pids of the processes in the scope and below it, in ascending order.

        A process that this PID namespace cannot see has no pid here and is left out.
        """
        with _calling("open(2)", self.path, *_GONE), _open_directory(self.path) as directory:
            return self._processes_in(directory)
        return []

    def open_procs(self) -> Descriptor:
        """
        Open `cgroup.procs`: a process enters the scope by writing "0" or its pid to it.

        Returns:
            The descriptor, owned by the caller.

        Raises:
            ScopeError: the scope is gone, or may not be entered.
        """
        return self._open("cgroup.procs", os.O_WRONLY)

    def open_events(self) -> Descriptor:
        """
        Open `cgroup.events`, for `ScopeWatch`.

        It has not been read, so the watch reports it once at the beginning, and nothing that
        happened before is missed.

        Returns:
            The descriptor, owned by the caller.

        Raises:
            ScopeError: the scope is gone.
        """
        return self._open("cgroup.events", os.O_RDONLY)

    def _abandon(self) -> None:
        """Undo what a creation that failed has done, with one descriptor."""
        with suppress(OSError):
            with _open_directory(self.path) as directory:
                owner, is_made_here = _read_owner(directory.fileno()), _is_made_here_at(directory)
                if owner == self._token and not is_made_here:
                    self._give_back(directory)
                is_half_made = self._was_made and is_made_here and owner is None
                is_half_made = is_half_made and self._can_claim(directory)
                is_ours = (is_made_here and owner == self._token) or is_half_made
            if is_ours:
                remove_cgroup(self.path)

    def _can_claim(self, directory: Descriptor) -> bool:
        """Claim it, unless another program is faster; what has no room for a token is free, too."""
        try:
            return self._claim(directory)
        except ScopeError:
            return True

    def _make_or_claim(self, root: Path, description: str | None) -> None:
        """Make the scope, or claim one that is there and unused."""
        for _ in range(MAKE_ATTEMPTS_MAX):
            try:
                _make_in_slice(self.path, root, mode=SCOPE_MODE, exist_ok=False)
                self._was_made = True
            except ScopeError as error:
                if error.errno != errno.EEXIST:
                    raise
                self._was_made = False
            # From here on it is what was opened, whatever another program puts in its place.
            with _calling("open(2)", self.path, *_GONE), _open_directory(self.path) as directory:
                # Guard: what was made was opened.
                self._was_made = self._was_made and _is_made_here_at(directory)
                if self._has_claimed(directory, description):
                    self._inode = _inode_of(directory)
                    return
        raise ScopeError(
            "mkdir(2)", errno.EEXIST, self.path, "another program keeps making it; find out which"
        )

    def _has_claimed(self, directory: Descriptor, description: str | None) -> bool:
        if self._was_made:
            # Described before it has an owner: what has an owner of ours says what it is for.
            self._describe(directory, description)
            return self._claim(directory)
        self._expect_unowned(directory)
        self._expect_unused(directory)
        if not self._claim(directory):
            return False
        # Only now, because another program may have been about to claim it as well.
        self._describe(directory, description)
        self._expect_unused(directory)
        self._note_past_use(directory)
        return True

    def _expect_unowned(self, directory: Descriptor) -> None:
        owner = _read_owner(directory.fileno())
        if owner is not None:
            advice = f"it belongs to owner {owner}; `nshandoff doctor` says whose that is"
            raise ScopeError("mkdir(2)", errno.EEXIST, self.path, advice)

    def _expect_unused(self, directory: Descriptor) -> None:
        use = self._use_of(directory)
        if use is not None:
            advice = f"it has no owner, and {use}"
            raise ScopeError("mkdir(2)", errno.EEXIST, self.path, advice)

    def _use_of(self, directory: Descriptor) -> str | None:
        """Say what is in a cgroup, and what to do about it; None if nothing is, or it is gone."""
        with _calling("read(2)", self.path, *_GONE):
            if _is_populated_in(directory, "cgroup.events"):
                return "processes are in it; end them first"
            below = _children_of(directory)
            if below:
                return f"cgroups are below it, {below[0]!a} for one; remove them first"
        return None

    def _note_past_use(self, directory: Descriptor) -> None:
        """Note the CPU time that an adopted scope has used, since only what comes later counts."""
        with _calling("read(2)", self.path / "cpu.stat", *_GONE):
            before = 0
            for _ in range(LEAVING_ATTEMPTS_MAX):
                usage = _usage_of(_read_in(directory, "cpu.stat"))
                if usage == before:
                    break
                # The last of it is counted a moment after the scope is empty.
                before = usage
                select.poll().poll(LEAVING_PAUSE_MS)
        if before:
            self._stamp(directory, USED_ATTRIBUTE, str(before))

    def _claim(self, directory: Descriptor) -> bool:
        """Become the owner of a scope that has none; False if another was faster, or it is gone."""
        # XATTR_CREATE: of two that claim one directory, exactly one becomes its owner.
        # Guard: one owner.
        return self._stamp(directory, OWNER_ATTRIBUTE, self._token, os.XATTR_CREATE)

    def _describe(self, directory: Descriptor, description: str | None) -> None:
        if description is not None:
            # If it is gone, claiming it finds that, too.
            self._stamp(directory, ALLOCATION_ATTRIBUTE, description)

    def _stamp(self, directory: Descriptor, attribute: str, text: str, flags: int = 0) -> bool:
        """Set an attribute of a scope; False if the scope is gone, or with XATTR_CREATE has it."""
        with _calling("setxattr(2)", self.path, *_GONE, errno.EEXIST):
            syscall(os.setxattr, directory.fileno(), attribute, text.encode(), flags)
            return True
        return False

    def _remove_unowned(self, directory: Descriptor) -> bool:
        """Remove a scope that was made here and has no owner; False while something is in it."""
        if self._use_of(directory) is not None:
            return False
        # It is claimed first: only the owner of a scope may remove it, and its maker may be about
        # to claim it.
        if not self._claim(directory) or remove_cgroup(self.path):
            return True
        with suppress(OSError):
            syscall(os.removexattr, directory.fileno(), OWNER_ATTRIBUTE)
        return False

    def _give_back(self, directory: Descriptor) -> None:
        """Leave an adopted scope to the program that made it, as it was."""
        number = directory.fileno()
        if read_attribute(number, FROZEN_ATTRIBUTE) is not None:
            with _calling("write(2)", self.path / "cgroup.freeze", *_GONE):
                _write_in(directory, "cgroup.freeze", "0")
        ours: list[str] = []
        with _calling("listxattr(2)", self.path, *_GONE):
            ours = [each for each in syscall(os.listxattr, number) if each.startswith(_OURS)]
        # The token last: without it nothing would be tried again.
        for name in sorted(ours, key=OWNER_ATTRIBUTE.__eq__):
            with _calling("removexattr(2)", self.path, *_GONE, errno.ENODATA):
                syscall(os.removexattr, number, name)

    def _note_populated(self, events: Descriptor) -> bool:
        populated = _reads_populated(events)
        self._was_seen_populated |= populated
        return populated

    def _open(self, name: str, flags: int) -> Descriptor:
        path = f"{self.path}/{name}"
        with _calling("open(2)", path):
            return _open_in(None, path, flags)

    def _read(self, name: str) -> str:
        path = f"{self.path}/{name}"
        with _calling("read(2)", path, *_GONE):
            return _read_in(None, path)
        return ""

    def _processes_in(self, directory: Descriptor) -> list[int]:
        found: set[int] = set()
        with _calling("read(2)", self.path, *_GONE), _Cursor(directory) as cursor:
            for cgroup in cursor.walk():
                found.update(_members(cgroup))
        return sorted(found - {0})

    def _kill_all(self, directory: Descriptor) -> None:
        try:
            _write_in(directory, "cgroup.kill", "1")
        except OSError as error:
            # ENOENT: the cgroup was removed. EOPNOTSUPP: the consumer made it threaded.
            if error.errno not in (*_GONE, errno.EOPNOTSUPP):
                raise
            # Noted on the scope: who gives it back thaws it, also if this program has died.
            with suppress(OSError):
                syscall(os.setxattr, directory.fileno(), FROZEN_ATTRIBUTE, b"1")
            with suppress(OSError):  # without freezing it only takes more rounds
                _write_in(directory, "cgroup.freeze", "1")
        # Always, because cgroup.kill signals the leading thread alone. If that has ended or moved
        # away, the other threads of its process stay alive (measured on 6.18).
        self._kill_each(directory)

    def _kill_each(self, directory: Descriptor) -> None:
        killed: set[int] = set()
        for _ in range(KILL_ROUNDS_MAX):
            fresh = sorted(set(self._processes_in(directory)) - killed)
            if not fresh:
                return
            for start in range(0, len(fresh), KILL_BATCH_MAX):
                self._kill_members(directory, fresh[start : start + KILL_BATCH_MAX])
            killed.update(fresh)

    def _kill_members(self, directory: Descriptor, pids: list[int]) -> None:
        with ExitStack() as stack:
            pidfds: dict[int, Descriptor] = {}
            for pid in pids:
                with _calling("pidfd_open(2)", self.path, errno.ESRCH):
                    pidfds[pid] = stack.enter_context(pidfd_open(pid))
            # The pidfds were opened first: a pid that is still listed now is listed for the process
            # of its pidfd, or that process is dead and the signal has no effect.
            # Guard: a process is still listed when it is killed.
            for pid in pidfds.keys() & set(self._processes_in(directory)):
                with _calling("pidfd_send_signal(2)", self.path, errno.ESRCH):
                    pidfd_send_signal(pidfds[pid], signal.SIGKILL)


def end_scope(scope: Scope) -> bool:
    """
    Kill what is in a scope and remove it, in a bounded time; False if it is not empty by then.

    Raises:
        ScopeError: as `Scope.kill` and `Scope.remove`.
    """
    for _ in range(END_ATTEMPTS_MAX):
        scope.kill()
        if scope.remove():
            return True
        select.poll().poll(END_PAUSE_MS)
    return False


class DescribedScope(NamedTuple):
    """A scope as its attributes describe it."""

    path: Path
    """Its directory."""
    owner: str | None
    """Its owner's token; None if it has none."""
    description: str | None
    """As given to `Scope.create`; None if there is none."""


def described_scopes(
    root: Path, parents: Iterable[str] = (WORKLOAD_SLICE,)
) -> list[DescribedScope]:
    """
    List the scopes of all owners, by path, and those by default that have none.

    Args:
        root: The mount point of cgroup v2.
        parents: Where scopes can be, below it; what is missing of them has none.

    Raises:
        ScopeError: they cannot be read.
    """
    found = []
    for parent in sorted(set(parents)):
        names: list[str] = []
        with _calling("readdir(2)", root / parent, *_GONE):
            names = sorted(_children_of(root / parent))
        for path in (root / parent / name for name in names):
            owner = _read_owner(path)
            # Elsewhere other programs may have scopes: systemd has.
            if owner is not None or (parent == WORKLOAD_SLICE and path.suffix == ".scope"):
                description = read_attribute(path, ALLOCATION_ATTRIBUTE)
                found.append(DescribedScope(path, owner, description))
    return found


class ScopeWatch(Owner, Generic[Key]):
    """
    One descriptor that reports changes and removals of many scopes, and the deaths of anchors.

    It is an epoll, because `cgroup.events` is always readable: waiting for that would spin. The
    removal of a cgroup wakes no poll of a file in it; inotify reports it, of the slice. Add
    `fileno()` to an event loop as readable (a nested epoll works) and call `poll` when it is.

    The watched descriptors belong to the caller, who calls `remove` *before* closing one. Usable
    from any thread.
    """

    CHANGES: Final = select.EPOLLPRI
    """For `cgroup.events`: reported once for every change, and once at the beginning."""

    DEATH: Final = select.EPOLLIN
    """For a pidfd: reported once, when its process is dead."""

    def __init__(self) -> None:
        self._guard: Final = threading.Lock()
        with calling("epoll_create1(2)"):
            self._epoll: Final = syscall(select.epoll)
        self._inotify: Descriptor | None = None
        self._removals: Final[dict[tuple[int, str], Key]] = {}
        """By the number of the slice's watch, and the name of the scope in it."""
        self._places: Final[dict[Key, tuple[int, str]]] = {}
        self._keys: Final[dict[int, Key]] = {}
        self._masks: Final[dict[int, int]] = {}
        self._fds: Final[dict[Key, int]] = {}

    def fileno(self) -> int:
        """Lend the epoll's descriptor; it is readable while `poll` has something to return."""
        return self._epoll.fileno()

    def add(self, key: Key, fd: int, mask: int = CHANGES) -> None:
        """
        Watch a descriptor; `poll` returns its key.

        Args:
            key: Names it; in use for one descriptor at a time.
            fd: What to watch; borrowed until `remove`.
            mask: `CHANGES` or `DEATH`.

        Raises:
            ValueError: the key or the descriptor is already watched, or the mask is neither.
            SyscallError: the user's limit of watches is reached (ENOSPC), or there is no memory
                (ENOMEM). In all cases the same is watched as before.
        """
        if mask not in (self.CHANGES, self.DEATH):
            raise ValueError(f"a watch has the mask CHANGES or DEATH, not {mask:#x}")
        with self._guard:
            if key in self._fds or fd in self._keys:
                raise ValueError(f"{key!r} or its descriptor is already watched")
            with calling("epoll_ctl(2)"):
                syscall(self._epoll.register, fd, mask)
            self._keys[fd], self._masks[fd], self._fds[key] = key, mask, fd

    def add_removal(self, key: Key, scope: Path) -> None:
        """
        Watch for the removal of a scope; `poll` returns its key once more then.

        Also when its attributes change: it has another owner, perhaps.

        To be called before the scope's descriptor is added: if that can be opened, no removal was
        missed.

        Args:
            key: That of the scope.
            scope: Its directory.

        Raises:
            SyscallError: the slice is gone, or cannot be watched: the user has too many instances
                of inotify (EMFILE), for example. The rest is watched as before.
        """
        # Keeps END-21.
        with self._guard:
            if self._inotify is None:
                with ExitStack() as undo:
                    inotify = undo.enter_context(inotify_init1())
                    with calling("epoll_ctl(2)"):
                        syscall(self._epoll.register, inotify, select.EPOLLIN)
                    undo.pop_all()
                self._inotify = inotify
            # Each time, because a slice can be removed and made again; it is the same watch if not.
            events = IN_DELETE | IN_ATTRIB | IN_ONLYDIR
            above, name = os.path.split(scope)
            watch = inotify_add_watch(self._inotify, above, events)
            self._forget_removal(key)
            self._places[key] = place = (watch, name)
            self._removals[place] = key

    def remove(self, key: Key) -> None:
        """Stop watching; nothing if the key is not watched."""
        with self._guard:
            self._forget_removal(key)
            fd = self._fds.pop(key, None)
            if fd is not None:
                del self._keys[fd], self._masks[fd]
                self._disarm(fd)

    def poll(self) -> list[Key]:
        """
        Return the keys of what has changed since the last call; does not wait.

        A scope that was removed is reported once more, and so is a process that died. Neither is
        reported again, so that a caller that is slow to `remove` it does not spin.
        """
        with self._guard:
            with calling("epoll_wait(2)"):
                events = [fd for fd, _ in syscall(self._epoll.poll, 0)]
            ready = [fd for fd in events if fd in self._keys]
            for fd in ready:
                if self._masks[fd] == self.DEATH or not _rearm(fd):
                    self._disarm(fd)
            keys = [self._keys[fd] for fd in ready]
            if self._inotify is not None and self._inotify.fileno() in events:
                keys += self._read_removals(self._inotify)
            return list(dict.fromkeys(keys))

    def close(self) -> None:
        """Stop watching everything. Idempotent; what was watched stays open."""
        with self._guard:
            self._epoll.close()
            if self._inotify is not None:
                self._inotify.close()
                self._inotify = None
            for known in (self._keys, self._masks, self._fds, self._removals, self._places):
                known.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read_removals(self, inotify: Descriptor) -> list[Key]:
        with calling("read(2)", "inotify"):
            events = syscall(os.read, inotify.fileno(), INOTIFY_BYTES_MAX)
        keys: list[Key] = []
        while events:
            watch, mask, _, size = _INOTIFY_EVENT.unpack_from(events)
            end = _INOTIFY_EVENT.size + size
            name = os.fsdecode(events[_INOTIFY_EVENT.size : end].rstrip(b"\0"))
            events = events[end:]
            if mask & IN_Q_OVERFLOW:
                return list(self._places)  # some are missing, so any can have gone
            if (watch, name) in self._removals:
                keys.append(self._removals[watch, name])
        return keys

    def _forget_removal(self, key: Key) -> None:
        place = self._places.pop(key, None)
        if place is not None:
            self._removals.pop(place, None)

    def _disarm(self, fd: int) -> None:
        # ENOENT: disarmed before. EBADF: closed too early, which also removes it from the epoll.
        with suppress(OSError):
            syscall(self._epoll.unregister, fd)


def anchor_path(root: Path, instance: str) -> Path:
    """Say where the anchors' cgroup of one provider instance is, made or not."""
    return root / ANCHOR_SLICE / f"{instance}.scope"


def anchor_cgroup(root: Path, instance: str) -> Path:
    """
    Make the cgroup for the anchors of one provider instance, unless it is there.

    Its `cgroup.procs` lists the anchors, whatever happens to the provider.

    Args:
        root: The mount point of cgroup v2.
        instance: Names the provider instance, by the rules of an allocation id.

    Raises:
        ScopeError: it is not there and could not be made.
    """
    # Keeps NODE-3, PEER-18.
    _expect_name(instance)
    path = anchor_path(root, instance)
    _make_in_slice(path, root, mode=ANCHORS_MODE)
    return path


def instances(root: Path) -> list[str]:
    """
    List the provider instances that have a cgroup for their anchors, whether they run or not.

    Raises:
        ScopeError: they cannot be read.
    """
    with _calling("readdir(2)", root / ANCHOR_SLICE, *_GONE):
        names = sorted(syscall(os.listdir, root / ANCHOR_SLICE))
        return [name.removesuffix(".scope") for name in names if name.endswith(".scope")]
    return []


def remove_anchor_cgroup(root: Path, instance: str) -> bool:
    """
    Remove the anchors' cgroup of one provider instance.

    Returns:
        True if it is gone, also if it was before; False while an anchor lives in it.

    Raises:
        ScopeError: the Linux kernel refused for another reason than being in use.
    """
    _expect_name(instance)
    path = anchor_path(root, instance)
    for _ in range(LEAVING_ATTEMPTS_MAX):
        # A process that has just died (the last anchor, the forge) is not listed any more, but
        # populates its cgroup until it has left the CPU for the last time.
        if remove_cgroup(path) or _lists_members(path):
            break
        select.poll().poll(LEAVING_PAUSE_MS)
    return not _is_there(path)


def _lists_members(path: Path) -> bool:
    try:
        return bool(_read_in(None, f"{path}/cgroup.procs").split())
    except OSError:
        return False


def remove_slices(root: Path, place: ScopePlace = DEFAULT_PLACE) -> None:
    """
    Remove the slices of scopes and anchors if they are empty and were made here.

    A slice that was there before, or is still used, stays.
    """
    parent = PurePosixPath(place.parent)
    for path in (parent, *parent.parents[:-1], PurePosixPath(ANCHOR_SLICE)):
        remove_slice(root / path)


def remove_slice(path: Path) -> None:
    """Remove one slice if it is empty and was made here."""
    if read_attribute(path, MADE_ATTRIBUTE) is not None:
        remove_cgroup(path)


def _open_directory(path: Path) -> Descriptor:
    return Descriptor(syscall(os.open, path, _DIRECTORY))


def _children_of(directory: Descriptor | Path) -> list[str]:
    where = directory.fileno() if isinstance(directory, Descriptor) else directory
    with syscall(os.scandir, where) as listing:
        return [entry.name for entry in listing if entry.is_dir(follow_symlinks=False)]


class _Cursor:
    """
    A position in a tree of cgroups, moved one level at a time.

    It has one open descriptor, however deep the tree is, and no path, because a consumer can nest
    deeper than a path, a stack or a descriptor table allows.
    """

    def __init__(self, start: Descriptor) -> None:
        self._here = start.duplicate()
        self._depth = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._here.close()

    def walk(self) -> Iterator[Descriptor]:
        """Visit every cgroup, parents first. Each descriptor is valid until the next iteration."""
        pending = [self._children()]
        yield self._here
        while pending:
            if pending[-1]:
                # A child may have been removed since its name was read.
                with suppress(FileNotFoundError):
                    self._enter(pending[-1].pop())
                    pending.append(self._children())
                    yield self._here
            else:
                pending.pop()
                if pending:
                    self._enter("..")

    def remove_below(self) -> bool:
        """Remove every cgroup below the first, leaves first; False as soon as one is in use."""
        pending = [self._children()]
        for _ in range(REMOVE_STEPS_MAX):
            if not pending[-1]:
                pending.pop()
                if not pending:
                    return True
                self._enter("..")
            elif remove_cgroup(pending[-1][-1], self._here):
                pending[-1].pop()
            else:
                self._enter(pending[-1][-1])
                pending.append(self._children())
                if not pending[-1]:
                    return False  # a leaf that cannot be removed is populated
        return False

    def _enter(self, name: str) -> None:
        there = Descriptor(syscall(os.open, name, _DIRECTORY, dir_fd=self._here.fileno()))
        self._here.close()
        self._here = there
        self._depth += -1 if name == ".." else 1

    def _children(self) -> list[str]:
        return _children_of(self._here)


def _expect_name(name: str) -> None:
    # Checked here whatever was checked before, because here a name becomes a path.
    objection = objection_to_id(name)
    if objection is not None:
        raise ScopeError("mkdir(2)", errno.EINVAL, Path(ascii(name)), objection)


def _usage_of(statistics: str) -> int:
    """Read the CPU time, in microseconds, from a `cpu.stat`."""
    for line in statistics.splitlines():
        name, _, value = line.partition(" ")
        if name == "usage_usec":
            return int(value)
    return 0


def _make_in_slice(path: Path, root: Path, *, mode: int = 0o755, exist_ok: bool = True) -> None:
    for _ in range(MAKE_ATTEMPTS_MAX):
        # ENOENT: there is no slice, or it was empty and was removed after it was made here.
        with _calling("mkdir(2)", path, errno.ENOENT):
            syscall(path.mkdir, mode=mode, exist_ok=exist_ok)
            return
        _make_slice(path.parent, root)
    raise ScopeError("mkdir(2)", errno.ENOENT, path, "another program keeps removing the slice")


def _make_slice(path: Path, root: Path) -> None:
    if path.parent != root and not _is_there(path.parent):
        _make_slice(path.parent, root)
    # ENOENT, as above: not so of the root, which cannot be removed.
    gone = () if path.parent == root else (errno.ENOENT,)
    with _calling("mkdir(2)", path, errno.EEXIST, *gone):
        syscall(path.mkdir, mode=0o755)
        # If it is gone again, or the Linux kernel lacks these attributes, it is only not removed.
        with suppress(OSError):
            syscall(os.setxattr, path, MADE_ATTRIBUTE, b"1")


def _expect_usable(path: Path) -> None:
    file = f"{path}/cgroup.type"
    with _calling("read(2)", file):
        kind = _read_in(None, file).strip()
    if kind != "domain":
        advice = f"its type is {kind!r}: a cgroup beside or above it was made threaded; remove that"
        raise ScopeError("mkdir(2)", errno.EOPNOTSUPP, path, advice)


def remove_cgroup(path: Path | str, above: Descriptor | None = None) -> bool:
    """
    Remove a cgroup; False while something is in it.

    Only after `populated 0` was read: since Linux 6.19 processes that are exiting still populate
    their cgroup, and until 7.0.8 rmdir(2) waits for them, where no signal reaches it. (A process
    that enters in between is not one that is exiting, and rmdir(2) refuses.)

    Args:
        path: The cgroup; a name if `above` is given.
        above: The cgroup that it is in; lent.
    """
    # Keeps NODE-17.
    events = f"{path}/cgroup.events"
    with _calling("read(2)", events, *_GONE):
        if _is_populated_in(above, events):
            return False
    with _calling("rmdir(2)", path, *_GONE):
        try:
            syscall(os.rmdir, path, dir_fd=None if above is None else above.fileno())
        except OSError as error:
            if error.errno in _BUSY:
                return False
            raise
    return True


def _is_made_here(path: Path) -> bool | None:
    """Say whether a scope was made here, and not by a consumer; None if there is none."""
    with _calling("stat(2)", path, *_GONE):
        return bool(syscall(path.lstat).st_mode & stat.S_ISVTX)
    return None


def _is_made_here_at(directory: Descriptor) -> bool:
    with _calling("fstat(2)"):
        return bool(syscall(os.fstat, directory.fileno()).st_mode & stat.S_ISVTX)


def _inode_of(directory: Descriptor) -> int:
    with _calling("fstat(2)"):
        return syscall(os.fstat, directory.fileno()).st_ino


def _is_there(path: Path) -> bool:
    with _calling("stat(2)", path):
        return syscall(path.is_dir)


def _read_owner(path: Path | int) -> str | None:
    return read_attribute(path, OWNER_ATTRIBUTE)


def read_attribute(path: Path | int, name: str) -> str | None:
    """Read an extended attribute of a cgroup; None if it has none of that name, or is gone."""
    with _calling("getxattr(2)", str(path), *_GONE, errno.ENODATA, errno.EOPNOTSUPP):
        return syscall(os.getxattr, path, name).decode("utf-8", "replace")
    return None


def _members(directory: Descriptor) -> set[int]:
    """List the processes of one cgroup; empty if it was removed."""
    try:
        return {int(pid) for pid in _read_in(directory, "cgroup.procs").split()}
    except OSError as error:
        if error.errno in _GONE:
            return set()
        if error.errno != errno.EOPNOTSUPP:
            raise
    # A threaded cgroup lists threads only. One that ended meanwhile has no process any more.
    threads = _read_in(directory, "cgroup.threads").split()
    return {pid for pid in map(_process_of_thread, threads) if pid is not None}


def _process_of_thread(thread: str) -> int | None:
    with suppress(OSError):
        found = re.search(
            r"^Tgid:\s+(\d+)$", syscall(Path(f"/proc/{thread}/status").read_text), re.M
        )
        return int(found[1]) if found else None
    return None


def _is_populated(directory: Descriptor) -> bool:
    """Say whether a live process is in an open cgroup or below; not if it was removed."""
    with _calling("read(2)", "cgroup.events", *_GONE):
        return _is_populated_in(directory, "cgroup.events")
    return False


def _is_populated_in(directory: Descriptor | None, name: str) -> bool:
    with _open_in(directory, name, os.O_RDONLY) as events:
        return _reads_populated(events)


def _reads_populated(events: Descriptor) -> bool:
    """Read an open `cgroup.events` from its beginning: it says what is so now."""
    text = syscall(os.pread, events.fileno(), EVENTS_BYTES_MAX, 0)
    return b"populated 1" in text.splitlines()


def _read_in(directory: Descriptor | None, name: str) -> str:
    """Read a file of a cgroup, without open(): that makes ten calls where these are four."""
    parts = []
    with _open_in(directory, name, os.O_RDONLY) as file:
        while part := syscall(os.read, file.fileno(), READ_BYTES_MAX):
            parts.append(part)
    return b"".join(parts).decode()


def _write_in(directory: Descriptor, name: str, text: str) -> None:
    with _open_in(directory, name, os.O_WRONLY) as file:
        syscall(os.write, file.fileno(), text.encode())


def _open_in(directory: Descriptor | None, name: str, flags: int) -> Descriptor:
    # Without O_CREAT and O_TRUNC: files cannot be made in a cgroup.
    above = None if directory is None else directory.fileno()
    return Descriptor(syscall(os.open, name, flags | os.O_CLOEXEC, dir_fd=above))


def _rearm(fd: int) -> bool:
    """Read the events file, so that its next change is reported; False once it is gone."""
    try:
        syscall(os.pread, fd, EVENTS_BYTES_MAX, 0)
    except OSError as error:
        # After any other error (no memory) the file is reported again.
        return error.errno not in (*_GONE, errno.EBADF)
    return True
