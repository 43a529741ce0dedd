"""What an operator wants to know: which allocations there are, and why one is still alive.

Reads the state directory and the Linux kernel, never the daemon: it works while the provider is
down, and changes nothing. What it says of one moment was true in parts of the one before, because
nothing stands still meanwhile.

    survey_node                  all of it, for `nshandoff list`
    states_of, zombies_below     reasons, for `linux.backend` as well
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from statemachine.errors import FdPassing
from statemachine.lifecycle import AllocationState
from transport.calls import syscall
from transport.descriptors import Descriptor, NamespaceIdentity

from .anchor import Anchor, AnchorIdentity, adopt, boot_id
from .cgroups import CgroupUnavailable, Scope, find_cgroup2
from .features import Features
from .journal import LOCK_NAME, Entry, read_journal
from .mounts import LOOP_TAG
from .namespaces import KernelInspector, open_namespace
from .syscalls import Ioctl, SyscallError, ioctl

PROCESSES_SHOWN_MAX: Final = 8
"""Most processes named in a reason."""

READY_NAME: Final = "ready"
"""File in the state directory that is there while a provider serves requests."""

_STATE_WORDS: Final = {
    "D": "in uninterruptible sleep",
    "Z": "a zombie",
    "T": "stopped",
    "R": "running",
    "S": "sleeping",
}

_SYS_BLOCK: Final = Path("/sys/block")

# struct loop_info64 (linux/loop.h): how long it is, and where the name is in it.
_LOOP_STATUS_BYTES: Final = 232
_LOOP_NAME: Final = slice(56, 120)

_CANNOT_READ: Final = (SyscallError, FdPassing)


@dataclass(frozen=True, slots=True)
class ProviderSeen:
    """A provider that runs."""

    pid: int
    socket: str
    """Where it listens, if that is known."""


@dataclass(frozen=True, slots=True)
class NamespaceSeen:
    """One namespace of a living allocation."""

    identity: NamespaceIdentity
    """Which one it is."""
    inode: int
    """As in the links of /proc/PID/ns."""


@dataclass(frozen=True, slots=True)
class ProcessSeen:
    """One process in an allocation's cgroup."""

    pid: int
    state: str
    """The letter that /proc has for it."""
    command: str
    """Its short name."""


@dataclass(frozen=True, slots=True)
class AllocationSeen:
    """One allocation, as the journal has it and as the Linux kernel has it."""

    entry: Entry
    """What the journal says of it."""
    init_pid: int | None
    """The process that keeps its namespaces; None if it has ended or was never made."""
    namespaces: tuple[NamespaceSeen, ...]
    """In request order; empty without a living init."""
    scope: Path | None
    """Its cgroup, if there is one."""
    processes: tuple[ProcessSeen, ...]
    """Who runs in it."""
    why: str | None
    """Why it is not what it should be: ended and still there, or alive without an init."""


@dataclass(frozen=True, slots=True)
class ImageSeen:
    """One image that is on a loop device of ours."""

    image: str
    """As it was asked for; cut off if it is long."""
    device: str
    """The loop device."""
    file: str
    """The image's path, as the Linux kernel has it."""
    users: tuple[str, ...]
    """Allocations of this state directory that asked for it."""


@dataclass(frozen=True, slots=True)
class NodeSeen:
    """What there is on this node of one provider, whether it runs or not."""

    provider: ProviderSeen | None
    """None if none runs that serves requests."""
    allocations: tuple[AllocationSeen, ...]
    """Everything that is not released."""
    images: tuple[ImageSeen, ...]
    """Of all providers of this node."""
    remembered: tuple[str, ...]
    """Ids of allocations that have ended, the oldest end first."""


def survey_node(state_dir: Path, features: Features) -> NodeSeen:
    """
    Look at everything that a provider has on this node.

    Args:
        state_dir: The provider's; there may be none.
        features: What the Linux kernel can do.

    Raises:
        JournalError: the journal cannot be read.
        SyscallError: the Linux kernel does not let us look (no permission, no descriptor left).
    """
    view = read_journal(state_dir)
    is_void = view.boot_id != boot_id()
    root = None
    with suppress(CgroupUnavailable):
        root = find_cgroup2()
    allocations = tuple(
        _see_dead(entry) if is_void else _see(entry, root, features) for entry in view.entries
    )
    images = tuple(_see_images([seen.entry for seen in allocations]))
    return NodeSeen(_see_provider(state_dir), allocations, images, view.remembered)


def states_of(pids: Iterable[int]) -> str:
    """Name processes with the state each is in, for a person to read."""
    told = [f"{pid} ({_STATE_WORDS.get(state, state)})" for pid, state, _ in _read_all(pids)]
    return _shortened(told) or "none that can be seen"


def zombies_below(init: int) -> str:
    """
    Say why an init that was killed is still there.

    It waits in the Linux kernel for every process of its namespace. One whose parent is outside,
    and has not reaped it, keeps it waiting for as long as that parent likes. Which namespace a
    zombie was in cannot be read any more, so all that may be meant are named.
    """
    suspects = [
        f"{pid} (child of {parent})"
        for pid, state, parent in _read_all(_all_pids())
        if state == "Z" and _depth_of(pid) > 1
    ]
    waits = f"init {init} is being killed"
    return f"{waits}; not reaped by their parents: {_shortened(suspects)}" if suspects else waits


def _see_provider(state_dir: Path) -> ProviderSeen | None:
    """Read the readiness file; believed if its author still has the lock of the directory open."""
    try:
        plain = json.loads(syscall((state_dir / READY_NAME).read_text, encoding="utf-8"))
        provider = ProviderSeen(int(plain["pid"]), str(plain["socket"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return provider if _has_open(provider.pid, state_dir / LOCK_NAME) else None


def _has_open(pid: int, path: Path) -> bool:
    try:
        wanted = syscall(path.stat)
        links = list(syscall(Path(f"/proc/{pid}/fd").iterdir))
    except OSError:
        return False
    for link in links:
        with suppress(OSError):
            if os.path.samestat(syscall(link.stat), wanted):
                return True
    return False


def _see_dead(entry: Entry) -> AllocationSeen:
    why = "the node was booted since; nothing of it is left"
    return AllocationSeen(entry, None, (), None, (), why)


def _see(entry: Entry, root: Path | None, features: Features) -> AllocationSeen:
    with ExitStack() as stack:
        anchor = _find_anchor(entry, features)
        if anchor is not None:
            stack.enter_context(anchor)
        scope = None if root is None else Scope.open(root, entry.allocation_id, entry.incarnation)
        return AllocationSeen(
            entry,
            init_pid=None if anchor is None else anchor.pid,
            namespaces=() if anchor is None else tuple(_see_namespaces(entry, anchor, features)),
            scope=None if scope is None else scope.path,
            processes=() if scope is None else tuple(_see_processes(scope.processes())),
            why=_why(entry, anchor, scope),
        )


def _find_anchor(entry: Entry, features: Features) -> Anchor | None:
    if entry.anchor is None:
        return None
    return adopt(AnchorIdentity.from_json(entry.anchor), entry.incarnation, features)


def _see_namespaces(entry: Entry, anchor: Anchor, features: Features) -> Iterator[NamespaceSeen]:
    inspector = KernelInspector(features)
    for kind in entry.request.namespaces:
        # An init that is dying has lost them already.
        with suppress(*_CANNOT_READ), open_namespace(anchor, kind, features) as namespace:
            identity = inspector.inspect(namespace.fileno())
            yield NamespaceSeen(identity, syscall(os.fstat, namespace.fileno()).st_ino)


def _see_processes(pids: Iterable[int]) -> Iterator[ProcessSeen]:
    for pid, state, _ in _read_all(pids):
        with suppress(OSError):
            name = syscall(Path(f"/proc/{pid}/comm").read_text, encoding="utf-8", errors="replace")
            yield ProcessSeen(pid, state, name.rstrip("\n"))


def _why(entry: Entry, anchor: Anchor | None, scope: Scope | None) -> str | None:
    if entry.state is AllocationState.ENDED:
        reasons = []
        pids = [] if scope is None else scope.processes()
        if scope is not None and pids:
            reasons.append(f"processes in {scope.path}: {states_of(pids)}")
        if anchor is not None:
            reasons.append(zombies_below(anchor.pid))
        return "; ".join(reasons) or "nothing of it is left; a provider will note that"
    if entry.state is not AllocationState.REQUESTED and anchor is None:
        return "its init is dead; a provider will release it"
    return None


def _see_images(entries: list[Entry]) -> Iterator[ImageSeen]:
    for folder in sorted(_SYS_BLOCK.glob("loop*/loop")):
        device = f"/dev/{folder.parent.name}"
        try:
            # Ours free themselves. Others are not even opened: that would keep them from it.
            if syscall((folder / "autoclear").read_text).strip() != "1":
                continue
            file = syscall((folder / "backing_file").read_text, errors="surrogateescape").rstrip(
                "\n"
            )
            name = _loop_name(device)
        except OSError:
            continue  # freed since it was listed
        if name.startswith(LOOP_TAG):
            image = name.removeprefix(LOOP_TAG)
            yield ImageSeen(os.fsdecode(image), device, file, _users_of(image, entries))


def _users_of(image: bytes, entries: list[Entry]) -> tuple[str, ...]:
    asked = [(entry.request.uenv_image, entry.allocation_id) for entry in entries]
    return tuple(
        name for wanted, name in asked if wanted and os.fsencode(wanted)[: len(image)] == image
    )


def _loop_name(device: str) -> bytes:
    status = bytearray(_LOOP_STATUS_BYTES)
    with Descriptor(syscall(os.open, device, os.O_RDONLY | os.O_CLOEXEC)) as loop:
        ioctl(loop, Ioctl.LOOP_GET_STATUS64, status)
    return bytes(status[_LOOP_NAME]).rstrip(b"\0")


def _shortened(told: list[str]) -> str:
    more = len(told) - PROCESSES_SHOWN_MAX
    shown = ", ".join(told[:PROCESSES_SHOWN_MAX])
    return f"{shown} and {more} more" if more > 0 else shown


def _all_pids() -> Iterator[int]:
    for entry in syscall(Path("/proc").iterdir):
        if entry.name.isdecimal():
            yield int(entry.name)


def _read_all(pids: Iterable[int]) -> Iterator[tuple[int, str, int]]:
    """Read the state and the parent of each process that is still there."""
    for pid in pids:
        try:
            stat = syscall(Path(f"/proc/{pid}/stat").read_text, encoding="utf-8", errors="replace")
        except OSError:
            continue
        # The name in parentheses may hold anything, parentheses included.
        state, parent, *_ = stat.rpartition(")")[2].split()
        yield pid, state, int(parent)


def _depth_of(pid: int) -> int:
    """Say in how many PID namespaces a process is, from this one down."""
    try:
        status = syscall(Path(f"/proc/{pid}/status").read_text, encoding="utf-8", errors="replace")
    except OSError:
        return 0
    for line in status.splitlines():
        if line.startswith("NSpid:"):
            return len(line.split()) - 1
    return 1
