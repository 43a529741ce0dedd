"""The lies of a provider that cheats, each with what a consumer must say of it.

    with Liar(path, after_a_request(telling(stage, lie))): ...  # and a consumer asks at that path

The namespaces, descriptors and sockets are real. Only what is told about them is not true.
"""

from __future__ import annotations

import itertools
import os
import socket
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property
from typing import Any, Final, TypeAlias

from statemachine.errors import CreationFailed
from statemachine.messages import (
    AllocationEnded,
    NamespaceRequest,
    NamespaceResponse,
    NamespaceType,
)

from ..descriptors import Descriptor, DescriptorBundle
from ..framing import FRAME_BYTES_MAX
from .peer import Line, Script, frame_of

PID, NET, MOUNT = NamespaceType.PID, NamespaceType.NET, NamespaceType.MOUNT
ALL: Final = (PID, NET, MOUNT)


class LiarSetup:
    """
    What a lying provider has at hand; `stack` closes what it opened.

    Args:
        name: the allocation that the consumer asks for, with all three types in the order of `ALL`.
        bundle: such namespaces, lent as long as they are lied about.
    """

    def __init__(self, name: str, bundle: DescriptorBundle) -> None:
        self.request: Final = NamespaceRequest(name, ALL)
        self.honest: Final = NamespaceResponse(name, ALL)
        self.frame: Final = frame_of(self.honest)
        self.ended: Final = AllocationEnded(name)
        self.fds: Final = bundle.filenos()
        self.stack: Final = ExitStack()

    @cached_property
    def strangers(self) -> dict[str, int]:
        """Descriptors that were not asked for."""

        def keep(fd: int) -> int:
            return self.stack.enter_context(Descriptor(fd)).fileno()

        reader, writer = map(keep, os.pipe())
        return {
            "uts": keep(os.open("/proc/self/ns/uts", os.O_RDONLY)),
            "cgroup": keep(os.open("/proc/self/ns/cgroup", os.O_RDONLY)),
            "own net": keep(os.open("/proc/self/ns/net", os.O_RDONLY)),
            "own mount": keep(os.open("/proc/self/ns/mnt", os.O_RDONLY)),
            "own pid": keep(os.open("/proc/self/ns/pid", os.O_RDONLY)),
            "file": keep(os.open(__file__, os.O_RDONLY)),
            "directory": keep(os.open("/proc/self/ns", os.O_RDONLY)),
            "memfd": keep(os.memfd_create("nshandoff-Pid-1")),
            "pipe": reader,
            "pipe's end": writer,
            "socket": self.stack.enter_context(socket.socket()).fileno(),
            "pidfd": keep(os.pidfd_open(os.getpid())),
        }


Lie: TypeAlias = Callable[[LiarSetup], Iterable[tuple[Any, Sequence[int]]]]
"""What is sent after a request was heard: messages or bytes, each with descriptors."""


def _with(*positions: int) -> Lie:
    """The honest answer, with some of its descriptors."""
    return lambda stage: [(stage.honest, [stage.fds[position] for position in positions])]


def _substitute(name: str, position: int) -> Lie:
    def lie(stage: LiarSetup) -> Iterable[tuple[Any, Sequence[int]]]:
        fds = list(stage.fds)
        fds[position] = stage.strangers[name]
        return [(stage.honest, fds)]

    return lie


def _changed(fds: slice, **changes: Any) -> Lie:
    """Another answer than the honest one."""
    return lambda stage: [(replace(stage.honest, **changes), stage.fds[fds])]


def _saying(what: Any, *, comes_with: bool = True) -> Lie:
    return lambda stage: [(what, stage.fds if comes_with else ())]


def _longer(stage: LiarSetup) -> Iterable[tuple[Any, Sequence[int]]]:
    body = stage.frame[4:] + b"\xc0"
    return [(len(body).to_bytes(4, "big") + body, stage.fds)]


ANY: Final = slice(None)
OTHER: Final = AllocationEnded("other")
NO_NAMESPACE: Final = "announced as Pid, cannot be used: it is no namespace"
OF_NO_TYPE: Final = "announced as Mount, cannot be used: it is a namespace of another type"
OWN: Final = "is the receiver's own namespace"

LIES: Final[dict[str, tuple[str, Lie]]] = {
    "swapped": ("descriptor 1 of 3, announced as Pid, is a Net namespace", _with(1, 0, 2)),
    "one missing": ("announces 3 descriptors and came with 2", _with(0, 1)),
    "one too many": ("descriptors were cut off: more than 3", _with(0, 1, 2, 0)),
    "hundreds": ("descriptors were cut off: more than 3", _with(*(0, 1, 2) * 84)),
    "none": ("announces 3 descriptors and came with 0", _with()),
    "one twice": ("descriptor 2 of 3, announced as Net, is a Pid namespace", _with(0, 0, 2)),
    **{f"{name} for Mount": (OF_NO_TYPE, _substitute(name, 2)) for name in ("uts", "cgroup")},
    **{
        f"{name} for Pid": (NO_NAMESPACE, _substitute(name, 0))
        for name in ("file", "directory", "memfd", "pipe", "pipe's end", "socket", "pidfd")
    },
    "own pid": (OWN, _substitute("own pid", 0)),
    "own net": (OWN, _substitute("own net", 1)),
    "own mount": (OWN, _substitute("own mount", 2)),
    "descriptors after the frame": (
        "announces 3 descriptors and came with 0",
        lambda stage: [(stage.frame, ()), (b"\0", stage.fds)],
    ),
    "descriptors with a frame before": (
        "AllocationEnded announces 0 descriptors and came with 3",
        lambda stage: [(stage.ended, stage.fds), (stage.honest, ())],
    ),
    "descriptors with an error": (
        "CreationFailed announces 0 descriptors and came with 3",
        _saying(CreationFailed("no")),
    ),
    "descriptors twice": (
        "descriptors came twice with one frame",
        lambda stage: [(stage.frame[:5], stage.fds), (stage.frame[5:], stage.fds)],
    ),
    "a length just over the limit": (
        f"announces {FRAME_BYTES_MAX + 1} bytes",
        _saying((FRAME_BYTES_MAX + 1).to_bytes(4, "big") + b"\x81"),
    ),
    "the longest length": ("announces 4294967295 bytes", _saying(b"\xff\xff\xff\xff")),
    "a length of zero": ("announces 0 bytes", _saying(b"\0\0\0\0")),
    "garbage": ("the body is not readable", _saying(b"\0\0\0\x04\xc1\xff\xc1\xff")),
    "not a map": ("the body must be a map of one entry", _saying(b"\0\0\0\x01\x2a")),
    "bytes after the message": ("more bytes follow the message", _longer),
    "another allocation's": (
        "the response is for 'other', not 'nsh-test-",
        _changed(ANY, allocation_id="other"),
    ),
    "another allocation's, endless": (
        "the response is for 'xxxx",
        _changed(ANY, allocation_id="x" * 65_000),
    ),
    "another order": (
        "fd_types is ['Mount', 'Net', 'Pid'], not ['Pid', 'Net', 'Mount']",
        _changed(slice(None, None, -1), fd_types=ALL[::-1]),
    ),
    "fewer types": (
        "fd_types is ['Pid', 'Net'], not",
        _changed(slice(2), fd_types=(PID, NET)),
    ),
    "one type twice": (
        "fd_types is ['Pid', 'Net', 'Net'], not",
        lambda stage: [
            (replace(stage.honest, fd_types=(PID, NET, NET)), (*stage.fds[:2], stage.fds[1])),
        ],
    ),
    "a mount path that was not asked for": (
        "uenv_mount_path must be there exactly if",
        _changed(ANY, uenv_mount_path="/"),
    ),
    "a request": (
        "NamespaceRequest is not for the consumer",
        lambda stage: [(stage.request, ())],
    ),
    "the end of another": (
        "AllocationEnded for 'other', which was never asked for",
        _saying(OTHER, comes_with=False),
    ),
    # Quoted it would be four times as long, and fit into no frame.
    "the end of another, endless": (
        "AllocationEnded for '\\x01\\x01",
        _saying(AllocationEnded("\1" * 65_000), comes_with=False),
    ),
    "the end before the answer": (
        "EndAnnounced is not possible while",
        lambda stage: [(stage.ended, ()), (stage.honest, stage.fds)],
    ),
    "ends without end": (
        "AllocationEnded for 'other', which was never asked for",
        lambda stage: itertools.repeat((OTHER, ())),
    ),
}
"""Each with what the reason must say. The connection is closed at once, with that reason."""


def telling(stage: LiarSetup, lie: Lie) -> Script:
    """Make a script that sends a lie."""

    def script(line: Line) -> None:
        for what, fds in lie(stage):
            line.say(what, fds)

    return script


def after_a_request(script: Script) -> Script:
    """Make a script that hears a request first."""

    def heard(line: Line) -> None:
        line.hear()
        script(line)

    return heard
