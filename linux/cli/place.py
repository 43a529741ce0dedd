"""Compare what a running provider believes with the node: its files, its cgroups, its allocations.

What holds the provider's knowledge is made again: the state directory, from what the open journal
still has, and the anchors' cgroup. A socket file that is gone is not: consumers find nothing at the
path and serve themselves, and another provider may have been put there. Then this one stops;
everything that is alive stays alive for the next one, which the service manager starts.

It is looked at, once a second, and not waited for by inotify: that watches an inode, and says
nothing when a directory above it is moved, or when something is mounted over it.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

from ..backend import LinuxBackend
from ..instance import InstanceBusy
from ..journal import JournalError
from ..syscalls import SyscallError

PERIOD_S: Final = 1.0
"""How often it is looked at: six calls of stat(2) and its like, and some for each allocation."""

_log: Final = logging.getLogger(__name__)


class PlaceLost(Exception):
    """A provider cannot go on where it is; what is alive stays alive."""

    # Keeps CRASH-17.


class PlaceWatch:
    """
    Looks every `PERIOD_S` whether files, cgroup and socket are still this provider's.

    Each time it has the backend look at some allocations as well.

    Args:
        backend: Whose state directory and anchors' cgroup are kept.
        socket: The path at which the provider listens now.
        on_mended: Called after something was made again, to announce readiness again.
    """

    def __init__(self, backend: LinuxBackend, socket: Path, on_mended: Callable[[], None]) -> None:
        self._backend: Final = backend
        self._socket: Final = socket
        self._identity: Final = _identity_of(socket)
        self._on_mended: Final = on_mended

    async def run(self, stop: Callable[[], None]) -> None:
        """
        Look until it is cancelled.

        Raises:
            PlaceLost: after `stop` was called, which stops the provider.
        """
        while True:
            await asyncio.sleep(PERIOD_S)
            try:
                self.look()
            except PlaceLost:
                stop()
                raise

    def look(self) -> None:
        """
        Look once, and make again what can be.

        Raises:
            PlaceLost: something is lost that cannot be made again.
        """
        if _identity_of(self._socket) != self._identity:
            raise PlaceLost(
                f"{self._socket}: the socket was removed or replaced; consumers are"
                " not served at this path any more"
            )
        try:
            mended = self._backend.hold_place()
        except (JournalError, InstanceBusy, SyscallError, OSError) as error:
            raise PlaceLost(str(error)) from error
        self._backend.reconcile()
        for what in mended:
            extra = {"event": "made_again", "fields": {}}
            _log.warning("%s by another program; it was made again", what, extra=extra)
        if mended:
            with suppress(OSError):  # the next look finds what is wrong
                self._on_mended()


def _identity_of(path: Path) -> tuple[int, int] | None:
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino
