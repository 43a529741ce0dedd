"""
Bytes and messages as the golden cases have them: written down from the protocol, without our codec.

Nothing of `transport` is used, so that what the cases say and what the code does can differ, and be
compared.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeAlias

VectorCase: TypeAlias = dict[str, Any]
"""One line of a file: an id, and what its family's manifest says."""

JsonMessage: TypeAlias = dict[str, Any]
"""A message as JSON: its name, and its fields in order."""

FRAME_BYTES_MAX: Final = 65_536
ELEMENTS_MAX: Final = 64
NESTING_MAX: Final = 3
TYPES: Final = ("Pid", "Net", "Mount")


# --- MessagePack, written ------------------------------------------------------------------------

NIL: Final = b"\xc0"


def packed(value: Any) -> bytes:
    """Write a value in as few bytes as MessagePack allows; a message so written is its body."""
    if value is None:
        return NIL
    if isinstance(value, str):
        return text(value.encode())
    if isinstance(value, dict):
        return entries([(packed(k), packed(v)) for k, v in value.items()])
    return array([packed(item) for item in value])


def text(content: bytes) -> bytes:
    """Write a text, which may be none."""
    size = len(content)
    if size < 32:
        return bytes([0xA0 | size]) + content
    width = 1 if size < 256 else 2
    return bytes([0xD8 + width]) + size.to_bytes(width, "big") + content


def array(items: Sequence[bytes]) -> bytes:
    """Write an array of what is written already."""
    return counted(0x90, 0xDC, len(items)) + b"".join(items)


def entries(pairs: Sequence[tuple[bytes, bytes]]) -> bytes:
    """Write a map of what is written already."""
    return counted(0x80, 0xDE, len(pairs)) + b"".join(k + v for k, v in pairs)


def counted(short: int, long: int, count: int) -> bytes:
    """Write how many follow, in one byte or in three."""
    return bytes([short | count]) if count < 16 else bytes([long]) + count.to_bytes(2, "big")


def wide(content: bytes, width: int) -> bytes:
    """Write a text with a length of 1, 2 or 4 bytes, needed or not."""
    return (
        bytes([{1: 0xD9, 2: 0xDA, 4: 0xDB}[width]]) + len(content).to_bytes(width, "big") + content
    )


def nested(depth: int, *, maps: bool = False) -> bytes:
    """Write containers inside one another."""
    return (b"\x81\xa1x" if maps else b"\x91") * (depth - 1) + (b"\x80" if maps else b"\x90")


def framed(body: bytes) -> bytes:
    """Put the header in front."""
    return len(body).to_bytes(4, "big") + body


# --- Messages ------------------------------------------------------------------------------------


class Struct(NamedTuple):
    """A message, or a kind of error: where its fields stand, and which they are."""

    path: tuple[str, ...]
    fields: tuple[str, ...]

    @property
    def name(self) -> str:
        """Its own name."""
        return self.path[-1]

    def document(self, *values: Any) -> JsonMessage:
        """Make the message with these values."""
        return self._within(dict(zip(self.fields, values, strict=True)))

    def body(self, content: bytes) -> bytes:
        """Write the message around its fields, which are written already."""
        for name in reversed(self.path):
            content = entries([(packed(name), content)])
        return content

    def _within(self, content: Any) -> JsonMessage:
        for name in reversed(self.path):
            content = {name: content}
        return content


REQUEST: Final = Struct(("NamespaceRequest",), ("allocation_id", "namespaces", "uenv_image"))
RESPONSE: Final = Struct(("NamespaceResponse",), ("allocation_id", "fd_types", "uenv_mount_path"))
ENDED: Final = Struct(("AllocationEnded",), ("allocation_id",))
ERRORS: Final = tuple(
    Struct(("NamespaceError", kind), (field,))
    for kind, field in (
        ("SocketUnavailable", "reason"),
        ("CreationFailed", "reason"),
        ("AllocationNotFound", "allocation_id"),
        ("FdPassing", "reason"),
    )
)
STRUCTS: Final = (REQUEST, RESPONSE, ENDED, *ERRORS)

SUBSETS: Final = tuple(s for n in range(4) for s in itertools.permutations(TYPES, n))
"""Every order of every choice of types: sixteen."""

TYPICAL: Final = {
    REQUEST: REQUEST.document("job-7", ["Pid", "Mount"], "pytorch.sqfs"),
    RESPONSE: RESPONSE.document("job-7", ["Pid", "Mount"], "/run/pact/uenv/pytorch"),
    ENDED: ENDED.document("job-7"),
    **{error: error.document("job-7") for error in ERRORS},
}


def structs_in(document: JsonMessage) -> tuple[Struct, JsonMessage]:
    """Find the struct of a message, and its fields."""
    ((name, content),) = document.items()
    if name == "NamespaceError":
        ((kind, content),) = content.items()
        return next(e for e in ERRORS if e.name == kind), content
    return next(s for s in STRUCTS if s.name == name), content


def compact(document: JsonMessage) -> bytes:
    """Write a message with its struct as an array."""
    struct, fields = structs_in(document)
    return struct.body(packed(list(fields.values())))


def peer_messages() -> Iterator[tuple[str, JsonMessage]]:
    """Read the messages that were written by rmp-serde, without the bytes that it wrote."""
    path = Path(__file__).parents[3] / "tests" / "transport" / "vectors" / "rmp-serde.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        yield entry["name"].replace("_", "-"), entry["json"]


def named_after(types: Iterable[str]) -> str:
    """Make a part of a case's id."""
    return "-".join(types).lower() or "none"
