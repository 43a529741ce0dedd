"""The file beside a provider's socket that says where its scopes are: write it, read it.

A consumer has to put processes into the scope, and the messages do not say where that is: parent
and name are settings of the provider, which can also have no scopes, or see another part of cgroup
v2. The cgroup's id is the same wherever it is seen from (`linux.cgroups.find_cgroup`).
"""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Final, NamedTuple

from transport.calls import syscall

from .cgroups import ScopePlace
from .files import OwnFile, read_file, replace_file
from .syscalls import calling

SUFFIX: Final = ".scopes"
"""What the file is called: the socket's path, and this."""

MODE: Final = 0o644
"""Its permissions: each user that can connect may read it."""


class ScopesSaid(NamedTuple):
    """What a provider says of its scopes."""

    cgroup_id: int | None
    """The id of what it sees as the root of cgroup v2; None if it makes no scopes."""
    place: ScopePlace
    """Where they are below that."""


def write_scope_file(address: Path, cgroup2: Path | None, place: ScopePlace) -> OwnFile:
    """
    Say where the scopes of a provider are.

    Args:
        address: The path of the provider's socket.
        cgroup2: Its mount point of cgroup v2; None if it makes no scopes.
        place: Where they are below that.

    Returns:
        The file, for the caller to remove in the end.

    Raises:
        SyscallError: it cannot be written; what was there before is unchanged.
    """
    # Keeps NODE-22.
    path = Path(f"{address}{SUFFIX}")
    with calling("stat(2)", cgroup2):
        cgroup_id = None if cgroup2 is None else syscall(cgroup2.stat).st_ino
    said = {"cgroup_id": cgroup_id, "parent": place.parent, "name": place.name}
    return OwnFile(path, replace_file(path, json.dumps(said) + "\n", MODE))


def read_scope_file(address: Path) -> ScopesSaid | None:
    """
    Read where the scopes of a provider are; None if it does not say.

    Args:
        address: The path of the provider's socket.

    Raises:
        SyscallError: the file is there and cannot be read.
        ValueError: it is no such file.
    """
    path = Path(f"{address}{SUFFIX}")
    text = None
    with calling("read(2)", path, errno.ENOENT):
        text = read_file(path)
    if text is None:
        return None
    try:
        plain = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} does not say where scopes are: {error}") from error
    match plain:
        case {"cgroup_id": int() | None as cgroup_id, "parent": str(parent), "name": str(name)}:
            return ScopesSaid(cgroup_id, ScopePlace(parent, name))
    raise ValueError(f"{path} does not say where scopes are: {plain!r}")
