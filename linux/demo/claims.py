"""The checks of the demonstration: what is claimed of a hand-over, and how it is verified.

Each function asks the Linux kernel about one side of a hand-over and compares the answers with what
the protocol promises. Nothing is changed, except that processes are started to be examined.
"""

from __future__ import annotations

import os
import select
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, TypeVar

from transport.descriptors import Descriptor, Inspector, NamespaceIdentity

from ..anchor import ANCHOR_COMMAND
from ..cgroups import Scope
from ..forge.idle import IDLE_COMMAND
from ..forge.spawn import InitDead, spawn_within
from ..namespaces import PROC_NAMES
from .census import loop_devices_below, mounts_of
from .host import IMAGE, IMAGE_TEXT, Host
from .processes import DemoAllocation, DemoError
from .report import Report

LOOKS_MAX: Final = 6000
"""How often to look whether the Linux kernel has freed what it frees in the background."""

PAUSE_MS: Final = 5
"""Pause between two looks."""

T = TypeVar("T")


def claim_types(report: Report, allocation: DemoAllocation, inspector: Inspector) -> None:
    """Check the type of each descriptor of an allocation (NS_GET_NSTYPE)."""
    found = [inspector.inspect(fd).kind.value for fd in allocation.held.bundle.filenos()]
    claim = f"{allocation.subject}: the types asked for, in that order"
    report.check(f"{allocation.subject}.types", claim, allocation.types(), " ".join(found))


def claim_distinct(
    report: Report, allocations: Sequence[DemoAllocation], inspector: Inspector
) -> None:
    """Check that all namespaces are different, and different from our own."""
    fds = [fd for each in allocations for fd in each.held.bundle.filenos()]
    inheritable = [fd for fd in fds if os.get_inheritable(fd)]
    claim = "close-on-exec: no program inherits them"
    report.check("descriptors", claim, [], inheritable, f"{len(fds)} descriptors")
    held = {inspector.inspect(fd) for fd in fds}
    ids = sorted(identity.key[-1] for identity in held)
    claim = "all of them are different namespaces"
    report.check("distinct", claim, len(fds), len(held), f"{len(held)} ids, {ids[0]} to {ids[-1]}")
    own = {kind: inspector.own(kind) for kind in PROC_NAMES}
    ours = [identity for identity in own.values() if identity is not None]
    if ours:
        shared = held & set(ours)
        report.check("foreign", "none of them is one of ours", set(), shared, f"ours: {_ids(ours)}")


def claim_mounts(report: Report, host: Host) -> None:
    """Check the number of loop devices, and that the node has nothing mounted."""
    marks = [str(host.image_root), str(host.uenv_base)]
    if host.image is not None:
        devices = loop_devices_below(host.image_root / IMAGE)
        found = " ".join(devices)
        report.check("loop", "both share one loop device for the image", 1, len(devices), found)
        marks += devices
    shown, all_mounts = mounts_of(*marks), mounts_of("")
    evidence = f"{len(shown)} of {len(all_mounts)} mounts"
    report.check("mounts", "our own mount table shows nothing of it", [], shown, evidence)


def claim_place(report: Report, allocation: DemoAllocation) -> None:
    """Check in which namespaces and which cgroup the process inside is."""
    pid, bundle = allocation.inner.pid, allocation.held.bundle
    kinds = [PROC_NAMES[kind] for kind in bundle.types]
    links = [Path(f"/proc/{pid}/ns/{kind}").stat().st_ino for kind in kinds]
    files = [os.fstat(fd).st_ino for fd in bundle.filenos()]
    claim = "it is in the namespaces that were handed over"
    report.check("inside.namespaces", claim, files, links, f"/proc/{pid}/ns: {' '.join(kinds)}")
    if allocation.scope is not None:
        members = Scope(allocation.scope, "").processes()
        evidence = f"cgroup.procs: {' '.join(map(str, members))}"
        claim = "it is in the allocation's scope, alone"
        report.check("inside.scope", claim, [pid], members, evidence)


def claim_init(report: Report, allocation: DemoAllocation) -> None:
    """Check that the init of an allocation adopts and reaps an orphan."""
    process = allocation.inner
    pid, lifeline = allocation.leave_orphan()
    with lifeline:
        parent = process.ask(f"parent {pid}")
    is_gone = process.ask(f"gone {pid}")
    fate = "reaped" if is_gone else "a zombie"
    claim = "its init takes in orphans, and reaps them"
    evidence = f"pid {pid}: parent {parent}, then {fate}"
    report.check("inside.orphan", claim, [1, True], [parent, is_gone], evidence)


def claim_sight(report: Report, seen: dict[str, Any]) -> None:
    """Check what the process inside sees."""
    pid, pids, links = seen["pid"], seen["pids"], seen["interfaces"]
    evidence = f"pid 1: {seen['init']}; itself: {pid}"
    claim = "pid 1 is that init, and not ours"
    inits = [command[0] for command in (IDLE_COMMAND, ANCHOR_COMMAND)]
    report.check("inside.init", claim, True, seen["init"] in inits, evidence)
    claim = "/proc shows only the allocation's processes"
    report.check("inside.proc", claim, [1, pid], pids, f"/proc: {' '.join(map(str, pids))}")
    report.check("inside.net", "its only interface is lo, and lo is up", ["lo up"], links)
    heard = seen["loopback"]
    report.check("inside.loopback", "lo carries a TCP connection", "heard", heard, "127.0.0.1")
    image = seen["image"]
    if image is None:
        return
    text = image["text"]
    report.check("inside.image", "the image's file can be read", IMAGE_TEXT, text, f'"{text}"')
    tries = [image["write"], image["create"]]
    claim = "nothing in it can be written or created"
    report.check("inside.readonly", claim, ["EROFS"] * 2, tries, f"open(2): {tries[0]}")
    wanted = ["ro", "nosuid", "nodev"]
    options = [word for word in wanted if word in image["options"]]
    claim = "nor used as a device, or for set-uid"
    report.check("inside.options", claim, wanted, options, f"mounted {','.join(options)}")


def claim_apart(report: Report, first: dict[str, Any], second: dict[str, Any]) -> None:
    """Compare what the process in the second allocation sees with the first."""
    claim = "second: /proc shows only its own processes"
    report.check("second.proc", claim, [1, second["pid"]], second["pids"])
    if first["image"] is not None:
        device, other = first["image"]["device"], second["image"]["device"]
        claim = "second: the image is the same filesystem"
        report.check("second.image", claim, device, other, f"st_dev {other} in both")


def claim_same(
    report: Report, allocation: DemoAllocation, again: Sequence[NamespaceIdentity]
) -> None:
    """Compare the ids of a second hand-over with those of the first."""
    claim = f"{allocation.subject}: same request, the very same namespaces"
    first = list(allocation.held.identities)
    report.check(f"{allocation.subject}.again", claim, first, list(again), f"ids {_ids(again)}")


def claim_dead(report: Report, allocation: DemoAllocation) -> None:
    """Check that nothing can be started in an allocation that is released."""
    found = "a process"
    try:
        spawn_within(["true"], allocation.held.bundle).wait()
    except InitDead as error:
        found = error.name
    claim = "nothing starts in the ended PID namespace"
    report.check("dead", claim, "ENOMEM", found, f"fork(2): {found}")


def claim_freed(report: Report, allocations: Sequence[DemoAllocation], host: Host) -> None:
    """Check that nothing is left when both are released and all descriptors are closed."""
    scopes = [each.scope for each in allocations if each.scope is not None]
    if scopes:
        left = [path.name for path in scopes if path.exists()]
        report.check("scopes", "both scopes are removed", [], left, "gone")
    if host.image is not None:
        devices = settled(lambda: loop_devices_below(host.image_root / IMAGE))
        report.check("freed", "the image's loop device is free again", [], devices, "gone")


def init_of(namespace: Descriptor) -> int:
    """
    Find the init of a PID namespace.

    Raises:
        DemoError: it cannot be found.
    """
    inode = os.fstat(namespace.fileno()).st_ino
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):  # a process that ended, or another user's
            is_in_there = Path(f"/proc/{pid}/ns/pid").stat().st_ino == inode
            if is_in_there and _innermost_number(pid) == "1":
                return int(pid)
    raise DemoError("the init of the PID namespace cannot be found")


def settled(look: Callable[[], T]) -> T:
    """Look until nothing is found, at most `LOOKS_MAX` times; return what was found last."""
    seen = look()
    for _ in range(LOOKS_MAX):
        if not seen:
            break
        select.poll().poll(PAUSE_MS)
        seen = look()
    return seen


def _innermost_number(pid: str) -> str:
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace")
    return next(line.split()[-1] for line in status.splitlines() if line.startswith("NSpid:"))


def _ids(identities: Iterable[NamespaceIdentity]) -> str:
    return " ".join(str(identity.key[-1]) for identity in identities)
