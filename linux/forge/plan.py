"""What is said between the forge and its owner?

The plan of one anchor, what became of it, and the records in which both cross the socketpair: one
JSON object per packet, with a descriptor beside it where there is one. Both ends are this program,
started by each other, so the records are not a protocol: they need no version, and one that cannot
be read is a bug.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from typing import Final

from statemachine.messages import NamespaceType

from ..features import Features
from ..syscalls import SyscallError

RECORD_BYTES_MAX: Final = 65_536
"""Longest record. Two paths of PATH_MAX fit, each byte of them escaped."""


COME_HOME: Final = "come home"
"""The one step whose failure ends the forge: it must not work where it is, and cannot leave."""


class ForgeError(Exception):
    """
    An anchor, or a command, was not made; nothing is left of the attempt.

    Args:
        step: What was being done, in words.
        cause: The call, errno and path that it failed with.
    """

    def __init__(self, step: str, cause: SyscallError) -> None:
        super().__init__(step, cause)
        self.step: Final = step
        self.cause: Final = cause

    def __str__(self) -> str:
        return f"{self.step}: {self.cause}"


@dataclass(frozen=True, slots=True)
class AnchorPlan:
    """
    What one anchor shall be.

    Raises:
        ValueError: the plan contradicts itself.
    """

    token: str
    """Goes into the anchor's environment; unique to this anchor for ever."""
    kinds: tuple[NamespaceType, ...]
    """The namespaces to make for it; may be empty. All others it shares with the node."""
    uenv_base: str | None = None
    """Folder that inside the mount namespace shows the images and nothing else; None for none."""
    mount_path: str | None = None
    """Where the image appears, below `uenv_base`; given exactly if `uenv_base` is."""
    scope: str | None = None
    """The allocation's cgroup, which a tied forge removes with the anchor. Must exist already."""

    def __post_init__(self) -> None:
        if not self.token or "\0" in self.token:
            raise ValueError(f"a token that no environment can hold: {self.token!r}")
        if (self.uenv_base is None) is not (self.mount_path is None):
            raise ValueError("uenv_base and mount_path belong together")
        if self.uenv_base is not None and self.mount_path is not None:
            if NamespaceType.MOUNT not in self.kinds:
                raise ValueError("an image needs a mount namespace of its own")
            base, path = PurePosixPath(self.uenv_base), PurePosixPath(self.mount_path)
            if base not in path.parents or ".." in path.parts:
                raise ValueError(f"{path} is not below {base}")


@dataclass(frozen=True, slots=True)
class ForgeSettings:
    """What a forge is told when it starts."""

    features: Features
    """Which of the newer kernel interfaces it may use."""
    program: str
    """Absolute path of what anchors execute."""
    cgroup: str | None
    """The cgroup in which its anchors are born; None for the owner's."""
    tied: bool
    """Whether its anchors end with its owner."""


def encode_settings(settings: ForgeSettings) -> bytes:
    """Write the record that a forge gets first."""
    return json.dumps(asdict(settings)).encode()


def decode_settings(record: bytes) -> ForgeSettings:
    """Read what `encode_settings` wrote."""
    plain = json.loads(record)
    return ForgeSettings(**{**plain, "features": Features(**plain["features"])})


def encode_plan(plan: AnchorPlan) -> bytes:
    """
    Write the record that asks for an anchor.

    Raises:
        ValueError: it would be longer than `RECORD_BYTES_MAX`.
    """
    plain = {**asdict(plan), "kinds": [kind.value for kind in plan.kinds]}
    record = json.dumps(plain).encode()
    if len(record) > RECORD_BYTES_MAX:
        raise ValueError(f"a plan of {len(record)} bytes; at most {RECORD_BYTES_MAX} can be sent")
    return record


def decode_plan(record: bytes) -> AnchorPlan:
    """Read what `encode_plan` wrote."""
    plain = json.loads(record)
    return AnchorPlan(**{**plain, "kinds": tuple(map(NamespaceType, plain["kinds"]))})


def encode_failure(step: str, cause: SyscallError) -> bytes:
    """Write the answer that something failed."""
    plain = {"step": step, "call": cause.call, "errno": cause.errno, "path": cause.path}
    return json.dumps(plain).encode()


def encode_success(pid: int) -> bytes:
    """Write the answer that an anchor was made (or, to anything but a plan, a mere yes)."""
    return json.dumps({"pid": pid}).encode()


def decode_answer(record: bytes) -> int:
    """
    Read an answer.

    Returns:
        The anchor's pid.

    Raises:
        ForgeError: it says that something failed.
    """
    plain: Mapping[str, object] = json.loads(record)
    match plain:
        case {"pid": int(pid)}:
            return pid
        case {"step": str(step), "call": str(call), "errno": int(number), "path": path}:
            raise ForgeError(step, SyscallError(call, number, None if path is None else str(path)))
    raise ValueError(f"no answer of a forge: {record!r}")
