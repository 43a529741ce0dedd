"""What the two roles say to each other: the seed's messages as frozen values.

A message that exists is well typed: its fields hold what the seed says they hold. Whether a
*request* can be granted is another question, answered by `objection`, because a request that
breaks a rule must still be readable in order to be refused by name.
"""

from __future__ import annotations

import unicodedata
from enum import Enum
from typing import Final, TypeAlias

from .errors import NamespaceError
from .record import Typed, expect, record

HANDOFF_SOCKET_PATH: Final = "/run/pact/handoff.sock"
"""The well-known path of the handoff socket (seed 9-13)."""

ALLOCATION_ID_BYTES_MAX: Final = 128
"""Longest allocation id, in bytes of UTF-8: it names a cgroup directory."""

UENV_IMAGE_BYTES_MAX: Final = 4096
"""Longest image path, in bytes of UTF-8 (Linux' PATH_MAX)."""

SHOWN_CHARACTERS_MAX: Final = 80
"""Most characters of a peer's text that a reason repeats: a reason must fit into a frame."""

UENV_SUFFIX: Final = ".sqfs"
"""The ending that an image's mount point does not carry."""


class NamespaceType(Enum):
    """
    The kinds of namespace that can be handed off; the value is the spelling on the wire.

    Source: seed 15-24.
    """

    PID = "Pid"
    NET = "Net"
    MOUNT = "Mount"

    def __repr__(self) -> str:
        return f"NamespaceType.{self.name}"


@record
class NamespaceRequest(Typed):
    """
    Consumer to provider: make me these namespaces for this allocation.

    Source: seed 26-37.
    """

    allocation_id: str
    """The scheduler's name for the allocation."""
    namespaces: tuple[NamespaceType, ...]
    """Which namespaces, in the order in which their descriptors are wanted."""
    uenv_image: str | None = None
    """A squashfs image below the provider's image root, or None."""

    def __post_init__(self) -> None:
        _expect_types("namespaces", self.namespaces)


@record
class NamespaceResponse(Typed):
    """
    Provider to consumer: here they are. The descriptors come with the frame's first byte.

    Source: seed 39-52.
    """

    allocation_id: str
    """Echoed from the request."""
    fd_types: tuple[NamespaceType, ...]
    """The type of each descriptor, in their order; equals the request's `namespaces`."""
    uenv_mount_path: str | None = None
    """Where the image is mounted inside the mount namespace; None if none was asked for."""

    def __post_init__(self) -> None:
        _expect_types("fd_types", self.fd_types)


@record
class AllocationEnded(Typed):
    """
    Either way: this allocation is over.

    From the provider it means ended, and released or still draining after the release deadline;
    from a consumer it asks for exactly that.

    Source: seed 54-63.
    """

    allocation_id: str
    """The allocation that ended."""


Message: TypeAlias = NamespaceRequest | NamespaceResponse | AllocationEnded | NamespaceError
"""Everything that can stand in a frame."""


def objection(request: NamespaceRequest) -> str | None:
    """
    Say why a request cannot be granted by any provider, or None if it can be tried.

    Returns:
        A reason that names the field and the rule, ready for `CreationFailed`.

    Raises:
        TypeError: it is no request.
    """
    expect("request", request, NamespaceRequest)
    # Keeps LIFE-11.
    return (
        objection_to_id(request.allocation_id)
        or _objection_to_types(request.namespaces)
        or _objection_to_image(request)
    )


def objection_to_id(allocation_id: str) -> str | None:
    """
    Say why a text cannot be an allocation's id, or None if it can.

    An id becomes one directory name (`<id>.scope`), so it must be one path component on any file
    system, printable in a log, and must not collide with the kernel's own `cgroup.*` files.
    """
    # Keeps LIFE-10.
    reason = objection_to_size(allocation_id)
    if reason is not None:
        return reason
    if "/" in allocation_id or any(_is_unprintable(c) for c in allocation_id):
        return f"allocation_id {allocation_id!r} has a slash or a control character"
    if allocation_id in (".", "..") or allocation_id.startswith("cgroup."):
        return f"allocation_id {allocation_id!r} is a name that the kernel reserves"
    return None


def objection_to_size(allocation_id: str) -> str | None:
    """Say why a text is too short or too long for an allocation's id, or None if it is not."""
    # Keeps END-19.
    expect("allocation_id", allocation_id, str)
    size = len(allocation_id.encode("utf-8", "surrogatepass"))
    if not 1 <= size <= ALLOCATION_ID_BYTES_MAX:
        return f"allocation_id has {size} bytes; 1 to {ALLOCATION_ID_BYTES_MAX} are allowed"
    return None


def shown(text: str) -> str:
    """Quote a text that came from outside, cut so that it can stand in a reason."""
    cut = text[:SHOWN_CHARACTERS_MAX]
    return repr(cut) if cut == text else f"{cut!r}..."


def mount_path_below(base: str, image: str) -> str:
    """
    Name the mount point of an image: `<base>/<image without .sqfs>`.

    Only the ending goes; two images in different folders never share a mount point.
    """
    return f"{base.rstrip('/')}/{image.removesuffix(UENV_SUFFIX)}"


def _objection_to_types(types: tuple[NamespaceType, ...]) -> str | None:
    # Keeps LIFE-12.
    repeated = [kind.value for kind in NamespaceType if types.count(kind) > 1]
    if repeated:
        return f"namespaces repeats {', '.join(repeated)}; each type may be asked for once"
    return None


def _objection_to_image(request: NamespaceRequest) -> str | None:
    # Keeps LIFE-12.
    image = request.uenv_image
    if image is None:
        return None
    if NamespaceType.MOUNT not in request.namespaces:
        return "uenv_image needs a Mount namespace to be mounted in; add Mount to namespaces"
    if not 1 <= len(image.encode("utf-8", "surrogatepass")) <= UENV_IMAGE_BYTES_MAX:
        return f"uenv_image must have 1 to {UENV_IMAGE_BYTES_MAX} bytes"
    if any(_is_unprintable(c) for c in image):
        return f"uenv_image {shown(image)} has a control character"
    parts = image.removesuffix(UENV_SUFFIX).split("/")
    if any(part in ("", ".", "..") for part in parts):
        return f"uenv_image {shown(image)} is not a plain path below the image root"
    return None


def _is_unprintable(character: str) -> bool:
    # Cc: control characters, NUL among them. Cs: lone surrogates, which UTF-8 cannot carry.
    return unicodedata.category(character) in ("Cc", "Cs")


def _expect_types(field: str, value: object) -> None:
    if not isinstance(value, tuple) or not all(isinstance(x, NamespaceType) for x in value):
        raise TypeError(f"{field} must be a tuple of NamespaceType, not {value!r}")
