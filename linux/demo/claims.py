"""What does the demonstration claim, and whom does it ask?

Each function asks the Linux kernel about one side of a handoff and holds the answers against what
the protocol promises. Nothing is changed here, except that a process is started to be looked at.
"""

from __future__ import annotations

import os
import select
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, TypeVar

from transport.descriptors import Descriptor, Inspector, NamespaceIdentity

from ..cgroups import Scope
from ..forge.spawn import InitDead, spawn_within
from ..namespaces import PROC_NAMES
from .cast import CastError, Part
from .census import loop_devices_below, mounts_of
from .report import Report
from .stage import IMAGE, IMAGE_TEXT, Stage

LOOKS_MAX: Final = 300
"""How often one looks whether the Linux kernel has freed what it frees in the background."""

PAUSE_MS: Final = 5
"""Pause between two looks."""

T = TypeVar("T")


def claim_types(report: Report, part: Part, inspector: Inspector) -> None:
    """Ask each descriptor of an allocation what it is (NS_GET_NSTYPE)."""
    found = [inspector.inspect(fd).kind.value for fd in part.held.bundle.filenos()]
    claim = f"{part.subject}: the types asked for, in that order"
    report.check(f"{part.subject}.types", claim, part.types(), " ".join(found))


def claim_distinct(report: Report, parts: Sequence[Part], inspector: Inspector) -> None:
    """Ask for the ids of all namespaces, and for our own."""
    fds = [fd for part in parts for fd in part.held.bundle.filenos()]
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


def claim_mounts(report: Report, stage: Stage) -> None:
    """Ask which loop devices there are, and what this node has mounted."""
    marks = [str(stage.image_root), str(stage.uenv_base)]
    if stage.image is not None:
        devices = loop_devices_below(stage.image_root / IMAGE)
        found = " ".join(devices)
        report.check("loop", "both share one loop device for the image", 1, len(devices), found)
        marks += devices
    shown, all_mounts = mounts_of(*marks), mounts_of("")
    evidence = f"{len(shown)} of {len(all_mounts)} mounts"
    report.check("mounts", "our own mount table shows nothing of it", [], shown, evidence)


def claim_place(report: Report, part: Part) -> None:
    """Ask which namespaces and which cgroup an allocation's resident is in."""
    pid, bundle = part.settled.pid, part.held.bundle
    kinds = [PROC_NAMES[kind] for kind in bundle.types]
    links = [Path(f"/proc/{pid}/ns/{kind}").stat().st_ino for kind in kinds]
    files = [os.fstat(fd).st_ino for fd in bundle.filenos()]
    claim = "it is in the namespaces that were handed over"
    report.check("inside.namespaces", claim, files, links, f"/proc/{pid}/ns: {' '.join(kinds)}")
    if part.scope is not None:
        members = Scope(part.scope, "").processes()
        evidence = f"cgroup.procs: {' '.join(map(str, members))}"
        claim = "it is in the allocation's scope, alone"
        report.check("inside.scope", claim, [pid], members, evidence)


def claim_init(report: Report, part: Part) -> None:
    """Leave an orphan to the init of an allocation, and see what becomes of it."""
    resident = part.settled
    pid, lifeline = part.leave_orphan()
    with lifeline:
        parent = resident.ask(f"parent {pid}")
    is_gone = resident.ask(f"gone {pid}")
    fate = "reaped" if is_gone else "a zombie"
    claim = "its init takes in orphans, and reaps them"
    evidence = f"pid {pid}: parent {parent}, then {fate}"
    report.check("inside.orphan", claim, [1, True], [parent, is_gone], evidence)


def claim_sight(report: Report, seen: dict[str, Any]) -> None:
    """Hold what a resident sees against what it should."""
    pid, pids, links = seen["pid"], seen["pids"], seen["interfaces"]
    evidence = f"pid 1: {seen['init']}; itself: {pid}"
    report.check("inside.init", "pid 1 is that init, and not ours", "sleep", seen["init"], evidence)
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
    """Hold what the second resident sees against what the first one does."""
    claim = "second: /proc shows only its own processes"
    report.check("second.proc", claim, [1, second["pid"]], second["pids"])
    if first["image"] is not None:
        device, other = first["image"]["device"], second["image"]["device"]
        claim = "second: the image is the same filesystem"
        report.check("second.image", claim, device, other, f"st_dev {other} in both")


def claim_same(report: Report, part: Part, again: Sequence[NamespaceIdentity]) -> None:
    """Compare the ids of a second handoff with those of the first."""
    claim = f"{part.subject}: same request, the very same namespaces"
    first = list(part.held.identities)
    report.check(f"{part.subject}.again", claim, first, list(again), f"ids {_ids(again)}")


def claim_dead(report: Report, part: Part) -> None:
    """Try to start something in an allocation that is released."""
    found = "a process"
    try:
        spawn_within(["true"], part.held.bundle).wait()
    except InitDead as error:
        found = error.name
    claim = "nothing starts in the ended PID namespace"
    report.check("dead", claim, "ENOMEM", found, f"fork(2): {found}")


def claim_freed(report: Report, parts: Sequence[Part], stage: Stage) -> None:
    """Ask what is left on the node when both are released and all descriptors are closed."""
    scopes = [part.scope for part in parts if part.scope is not None]
    if scopes:
        left = [path.name for path in scopes if path.exists()]
        report.check("scopes", "both scopes are removed", [], left, "gone")
    if stage.image is not None:
        devices = settled(lambda: loop_devices_below(stage.image_root / IMAGE))
        report.check("freed", "the image's loop device is free again", [], devices, "gone")


def init_of(namespace: Descriptor) -> int:
    """
    Find the process that is the first of a PID namespace.

    Raises:
        CastError: there is none to be seen.
    """
    inode = os.fstat(namespace.fileno()).st_ino
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):  # a process that ended, or another user's
            is_in_there = Path(f"/proc/{pid}/ns/pid").stat().st_ino == inode
            if is_in_there and _innermost_number(pid) == "1":
                return int(pid)
    raise CastError("the init of the PID namespace is not to be seen")


def settled(look: Callable[[], T]) -> T:
    """Look until there is nothing to be seen any more, or it has been long enough."""
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
