"""The plan of an anchor, and the records that a forge and its owner exchange.

A record is one JSON object in one packet of a socketpair, with a descriptor where there is one.
Both ends run the same version of this code, so the records have no version, and one that cannot be
read is a bug.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Final

from statemachine.messages import NamespaceType
from statemachine.record import fields_of, record

from ..features import Features
from ..syscalls import SyscallError

RECORD_BYTES_MAX: Final = 65_536
"""Longest record. Two paths of PATH_MAX fit, each byte of them escaped."""


SHORTFALL_MAX: Final = 1000
"""Longest text of a shortfall, in characters."""

RETURN: Final = "return to the node's namespaces"
"""The operation whose failure ends the forge, which cannot work in an anchor's namespaces."""


class ForgeError(Exception):
    """
    An anchor, or a command, was not made; nothing is left of the attempt.

    Args:
        step: What was being done, in words.
        cause: The call, errno and path of the failure.
    """

    def __init__(self, step: str, cause: SyscallError) -> None:
        super().__init__(step, cause)
        self.step: Final = step
        self.cause: Final = cause

    def __str__(self) -> str:
        return f"{self.step}: {self.cause}"


@record
class AnchorPlan:
    """
    What one anchor is to be.

    Raises:
        ValueError: the plan contradicts itself.
    """

    token: str
    """For the anchor's environment; no other anchor ever has it."""
    kinds: tuple[NamespaceType, ...]
    """The namespaces to make for it; may be empty. It shares all others with the node."""
    uenv_base: str | None = None
    """Directory that contains only images inside the mount namespace; None without an image."""
    mount_path: str | None = None
    """Where the image appears, below `uenv_base`; given exactly if `uenv_base` is."""
    scope: str | None = None
    """The allocation's cgroup, which a tied forge removes with the anchor; it must exist."""

    def __post_init__(self) -> None:
        if not self.token or "\0" in self.token:
            raise ValueError(f"no environment can contain the token {self.token!r}")
        if (self.uenv_base is None) is not (self.mount_path is None):
            raise ValueError("uenv_base and mount_path belong together")
        if self.uenv_base is not None and self.mount_path is not None:
            if NamespaceType.MOUNT not in self.kinds:
                raise ValueError("an image needs a mount namespace of its own")
            base, path = PurePosixPath(self.uenv_base), PurePosixPath(self.mount_path)
            if base not in path.parents or ".." in path.parts:
                raise ValueError(f"{path} is not below {base}")


@record
class ForgeSettings:
    """What a forge is told when it starts."""

    features: Features
    """Which of the newer kernel interfaces it may use."""
    program: str
    """Absolute path of what anchors execute that are tied, or where nothing smaller can be."""
    cgroup: str | None
    """The cgroup in which its anchors start; None for the owner's."""
    tied: bool
    """Whether its anchors end with its owner."""


def encode_settings(settings: ForgeSettings) -> bytes:
    """Encode the first record that a forge receives."""
    return json.dumps(fields_of(settings), default=fields_of).encode()


def decode_settings(record: bytes) -> ForgeSettings:
    """Decode what `encode_settings` returned."""
    plain = json.loads(record)
    return ForgeSettings(**{**plain, "features": Features(**plain["features"])})


def encode_plan(plan: AnchorPlan) -> bytes:
    """
    Write the record that asks for an anchor.

    Raises:
        ValueError: it would be longer than `RECORD_BYTES_MAX`.
    """
    plain = {**fields_of(plan), "kinds": [kind.value for kind in plan.kinds]}
    record = json.dumps(plain).encode()
    if len(record) > RECORD_BYTES_MAX:
        raise ValueError(f"a plan of {len(record)} bytes; at most {RECORD_BYTES_MAX} can be sent")
    return record


def decode_plan(record: bytes) -> AnchorPlan:
    """Decode what `encode_plan` returned."""
    plain = json.loads(record)
    return AnchorPlan(**{**plain, "kinds": tuple(map(NamespaceType, plain["kinds"]))})


def encode_failure(step: str, cause: SyscallError) -> bytes:
    """Encode the answer that something failed."""
    plain = {
        "step": step,
        "call": cause.call,
        "errno": cause.errno,
        "path": cause.path,
        "advice": cause.advice,
    }
    return json.dumps(plain).encode()


def encode_success(pid: int, shortfalls: Sequence[str] = ()) -> bytes:
    """
    Encode the answer that an anchor was made, or that another request was fulfilled.

    Args:
        pid: Of the anchor.
        shortfalls: What it lacks because the Linux kernel refuses it here; they are cut to fit.
    """
    return json.dumps(
        {"pid": pid, "shortfalls": [each[:SHORTFALL_MAX] for each in shortfalls]}
    ).encode()


def shortfalls_in(record: bytes) -> list[str]:
    """Decode what an anchor lacks from the answer that it was made."""
    return list(map(str, json.loads(record).get("shortfalls", ())))


def decode_answer(record: bytes) -> int:
    """
    Decode an answer.

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
            place, advice = None if path is None else str(path), str(plain["advice"])
            raise ForgeError(step, SyscallError(call, number, place, advice))
    raise ValueError(f"no answer of a forge: {record!r}")
