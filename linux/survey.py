"""List the allocations, images and processes of a node, and why an allocation is still alive.

Reads the state directory and the Linux kernel and asks no provider: it works while the provider is
down, and changes nothing. It reads one thing after the other, while things go on changing.

    survey_node                  all of it, for `nshandoff list`
    states_of, zombies_below     reasons, for `linux.backend` as well
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Final

from statemachine.errors import FdPassing
from statemachine.record import changed, record
from statemachine.states import AllocationState
from transport.calls import syscall
from transport.descriptors import NamespaceIdentity

from .anchor import Anchor, AnchorIdentity, adopt, boot_id, find_anchors
from .cgroups import CgroupUnavailable, Scope, anchor_path, find_cgroup2
from .features import Features
from .files import read_file
from .journal import LOCK_NAME, Entry, read_journal
from .mounts import image_on, loop_devices
from .namespaces import KernelInspector, open_namespace
from .pool import POOL_TOKEN_PREFIX
from .recovery import state_noted
from .syscalls import SyscallError

PROCESSES_SHOWN_MAX: Final = 8
"""Most processes named in a reason."""

READY_NAME: Final = "ready"
"""File in the state directory that exists while a provider serves requests."""

_STATE_WORDS: Final = {
    "D": "in uninterruptible sleep",
    "Z": "a zombie",
    "T": "stopped",
    "R": "running",
    "S": "sleeping",
}

_CANNOT_READ: Final = (SyscallError, FdPassing)


@record
class ProviderSeen:
    """A running provider."""

    pid: int
    socket: str
    """Where it listens."""


@record
class NamespaceSeen:
    """One namespace of a living allocation."""

    identity: NamespaceIdentity
    """Which one it is."""
    inode: int
    """As in the links of /proc/PID/ns."""


@record
class ProcessSeen:
    """One process in an allocation's cgroup."""

    pid: int
    state: str
    """As in /proc: R, S, D, Z, T."""
    command: str
    """Its short name."""


@record
class AllocationSeen:
    """One allocation: what the journal and the Linux kernel say of it."""

    entry: Entry
    """What the journal says."""
    init_pid: int | None
    """The process that holds its namespaces; None if it has ended or was never started."""
    namespaces: tuple[NamespaceSeen, ...]
    """In request order; empty without a living init."""
    scope: Path | None
    """Its cgroup, if there is one."""
    processes: tuple[ProcessSeen, ...]
    """The processes in that cgroup."""
    why: str | None
    """Why it is ended and not released, or alive without an init; None if it is neither."""


@record
class ImageSeen:
    """One image on a loop device of a provider."""

    image: str
    """As it was requested; truncated if it is long."""
    device: str
    """The loop device."""
    file: str
    """The image's path, as the Linux kernel has it."""
    users: tuple[str, ...]
    """Allocations of this state directory that requested it."""


@record
class NodeSeen:
    """What one provider has on this node, whether it runs or not."""

    provider: ProviderSeen | None
    """None if none runs that serves requests."""
    allocations: tuple[AllocationSeen, ...]
    """Everything that is not released."""
    images: tuple[ImageSeen, ...]
    """Of all providers of this node."""
    remembered: tuple[str, ...]
    """Ids of allocations that have ended, the oldest end first."""
    ahead: int = 0
    """Anchors that are made ahead, and wait for an allocation."""


def survey_node(state_dir: Path, features: Features) -> NodeSeen:
    """
    Collect everything that a provider has on this node.

    Args:
        state_dir: The provider's.
        features: What the Linux kernel can do.

    Raises:
        JournalError: the journal cannot be read.
        SyscallError: something cannot be read (no permission, no descriptor left).
    """
    view = read_journal(state_dir)
    is_void = view.boot_id != boot_id()
    allocations = tuple(
        _see_dead(entry) if is_void else _see(entry, features) for entry in view.entries
    )
    images = tuple(_see_images([seen.entry for seen in allocations]))
    ahead = 0 if is_void or view.instance is None else _count_ahead(view.instance, view.entries)
    return NodeSeen(_see_provider(state_dir), allocations, images, view.remembered, ahead)


def states_of(pids: Iterable[int]) -> str:
    """List processes with the state of each, as text."""
    processes = [f"{pid} ({_STATE_WORDS.get(state, state)})" for pid, state, _ in _read_all(pids)]
    # Since Linux 6.19 a process that is exiting populates its cgroup and is not listed.
    return _shortened(processes) or "none that can be seen; they are exiting"


def zombies_below(init: int) -> str:
    """
    Say why an init that was killed is still there.

    It waits in the Linux kernel until every process of its namespace is reaped, which a parent
    outside may never do. Which namespace a zombie was in cannot be read any more, so all zombies of
    inner PID namespaces are named, first those that are likely: started after the init.
    """
    zombies = [
        (pid, parent)
        for pid, state, parent in _read_all(_all_pids())
        if state == "Z" and _depth_of(pid) > 1
    ]
    zombies.sort(key=lambda zombie: (zombie[0] < init, zombie[0]))
    suspects = [f"{pid} (child of {parent})" for pid, parent in zombies]
    waits = f"init {init} is being killed"
    return f"{waits}; not reaped by their parents: {_shortened(suspects)}" if suspects else waits


def _see_provider(state_dir: Path) -> ProviderSeen | None:
    """Read the readiness file; it counts only if its author has the directory's lock file open."""
    try:
        plain = json.loads(read_file(state_dir / READY_NAME))
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


def _see(entry: Entry, features: Features) -> AllocationSeen:
    with ExitStack() as stack:
        anchor = _find_anchor(entry, features)
        if anchor is not None:
            stack.enter_context(anchor)
        path = entry.scope_path
        scope = None if path is None else Scope.at(Path(path), entry.incarnation)
        entry = changed(entry, state=state_noted(entry, scope))
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
        # A dying init has none any more.
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


def _count_ahead(instance: str, entries: Iterable[Entry]) -> int:
    taken = {entry.incarnation for entry in entries}
    try:
        anchors = find_anchors(anchor_path(find_cgroup2(), instance))
    except CgroupUnavailable:
        return 0
    for anchor in anchors.values():
        anchor.close()
    return sum(token.startswith(POOL_TOKEN_PREFIX) for token in anchors.keys() - taken)


def _see_images(entries: list[Entry]) -> Iterator[ImageSeen]:
    for device, file in loop_devices():
        image = image_on(device)
        if image is not None:
            yield ImageSeen(os.fsdecode(image), device, file, _users_of(image, entries))


def _users_of(image: bytes, entries: list[Entry]) -> tuple[str, ...]:
    asked = [(entry.request.uenv_image, entry.allocation_id) for entry in entries]
    return tuple(
        name for wanted, name in asked if wanted and os.fsencode(wanted)[: len(image)] == image
    )


def _shortened(processes: list[str]) -> str:
    more = len(processes) - PROCESSES_SHOWN_MAX
    shown = ", ".join(processes[:PROCESSES_SHOWN_MAX])
    return f"{shown} and {more} more" if more > 0 else shown


def _all_pids() -> Iterator[int]:
    for entry in syscall(Path("/proc").iterdir):
        if entry.name.isdecimal():
            yield int(entry.name)


def _read_all(pids: Iterable[int]) -> Iterator[tuple[int, str, int]]:
    """Read pid, state and parent of each process that is still there."""
    for pid in pids:
        try:
            stat = syscall(Path(f"/proc/{pid}/stat").read_text, encoding="utf-8", errors="replace")
        except OSError:
            continue
        # The name in parentheses may contain anything, also parentheses.
        state, parent, *_ = stat.rpartition(")")[2].split()
        yield pid, state, int(parent)


def _depth_of(pid: int) -> int:
    """Count the PID namespaces that a process is in, from this one down."""
    try:
        status = syscall(Path(f"/proc/{pid}/status").read_text, encoding="utf-8", errors="replace")
    except OSError:
        return 0
    for line in status.splitlines():
        if line.startswith("NSpid:"):
            return len(line.split()) - 1
    return 1
