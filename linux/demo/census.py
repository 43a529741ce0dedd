"""What the demonstration has on this machine, counted before and after it.

Other programs work on the same machine. So what is machine-wide counts only if it is the
demonstration's own: by a path in its private folder, by the names of its allocations, or by the
Linux kernel's ids of its namespaces.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from statemachine.errors import FdPassing
from transport.descriptors import Descriptor, NamespaceIdentity

from ..features import Features
from ..mounts import loop_devices
from ..namespaces import PROC_NAMES, KernelInspector


@dataclass(frozen=True, slots=True)
class Traces:
    """What on this machine would be the demonstration's."""

    folder: Path
    """Its private folder, with images, sockets and mount points."""
    cgroups: tuple[Path, ...] = ()
    """The cgroups that it may have made."""
    namespaces: frozenset[NamespaceIdentity] = frozenset()
    """The namespaces that were handed over to it."""


@dataclass(frozen=True, slots=True)
class Inventory:
    """What there is at one moment, each a set of names."""

    descriptors: frozenset[str]
    children: frozenset[str]
    namespace_members: frozenset[str]
    mounts: frozenset[str]
    loop_devices: frozenset[str]
    cgroups: frozenset[str]

    @classmethod
    def take(cls, traces: Traces) -> Inventory:
        """Count now."""
        return cls(
            descriptors=frozenset(_descriptors()),
            children=frozenset(_children()),
            namespace_members=frozenset(_members(traces.namespaces)),
            mounts=frozenset(mounts_of(str(traces.folder))),
            loop_devices=frozenset(loop_devices_below(traces.folder)),
            cgroups=frozenset(str(path) for path in traces.cgroups if path.exists()),
        )


def mounts_of(*names: str) -> list[str]:
    """List the mount points in this process's mount table whose line contains one of the names."""
    lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines()
    return [line.split()[4] for line in lines if any(name in line for name in names)]


def loop_devices_below(path: Path) -> list[str]:
    """List the loop devices whose file is this one, or in this folder."""
    return [device for device, file in loop_devices() if Path(file).is_relative_to(path)]


def _descriptors() -> Iterator[str]:
    for number in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # the listing's own
            yield f"{number} {os.readlink(f'/proc/self/fd/{number}')}"


def _children() -> Iterator[str]:
    for task in os.listdir("/proc/self/task"):
        with suppress(OSError):  # a thread that ended
            children = Path(f"/proc/self/task/{task}/children").read_text(encoding="ascii")
            yield from children.split()


def _members(namespaces: Collection[NamespaceIdentity]) -> Iterator[str]:
    """List the living processes in any of the namespaces."""
    if namespaces:
        inspector = KernelInspector(Features.probe())
        for pid in filter(str.isdigit, os.listdir("/proc")):
            is_in_there = any(each in namespaces for each in _identities(pid, inspector))
            if is_in_there and not _is_zombie(pid):
                yield pid


def _is_zombie(pid: str) -> bool:
    """Say whether a process is dead and not reaped."""
    with suppress(OSError):
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        return stat.rpartition(")")[2].split()[0] == "Z"
    return True


def _identities(pid: str, inspector: KernelInspector) -> Iterable[NamespaceIdentity]:
    for name in PROC_NAMES.values():
        with suppress(OSError, FdPassing):  # it is gone, or another user's
            path = f"/proc/{pid}/ns/{name}"
            with Descriptor(os.open(path, os.O_RDONLY | os.O_CLOEXEC)) as namespace:
                yield inspector.inspect(namespace.fileno())
