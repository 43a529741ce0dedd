"""`ReadySocket`: a socket beside the provider's tells who connects when requests are served."""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress
from pathlib import Path
from typing import Final

from transport.calls import syscall

from ..files import OwnFile
from ..syscalls import calling

READY_SOCKET_NAME: Final = "ready.sock"
"""Socket beside the provider's that tells when requests are served."""

READY_WAITING_MAX: Final = 128
"""Most connections of it that wait; more are closed."""


class ReadySocket:
    """
    Tells each peer that connects when requests are served: one line, and the end.

    Args:
        path: Where it is; what a provider before this one left there is replaced.
        mode: Its permissions.
        gid: Its group; None for the process's.
        word: The line.
    """

    # Keeps DAEMON-12.

    def __init__(self, path: Path, mode: int, gid: int | None, word: str) -> None:
        self._path: Final = path
        self._mode: Final = mode
        self._gid: Final = gid
        self._word: Final = word.encode()
        self._is_ready: Final = asyncio.Event()
        self._waiting = 0
        self._server: asyncio.Server | None = None
        self._file: OwnFile | None = None

    async def open(self) -> None:
        """
        Listen.

        Raises:
            SyscallError: it cannot be made.
        """
        with calling("bind(2)", self._path):
            self._server = await asyncio.start_unix_server(self._tell, self._path)
            self._file = OwnFile(self._path, syscall(self._path.lstat))
            if self._gid is not None:
                syscall(os.chown, self._path, -1, self._gid)
            syscall(self._path.chmod, self._mode)

    def announce(self) -> None:
        """Tell those that wait, and all that come."""
        self._is_ready.set()

    def close(self) -> None:
        """Listen no more, and remove the socket; may be called again."""
        if self._server is not None:
            self._server.close()
            self._server = None
        file, self._file = self._file, None
        if file is not None:
            with suppress(OSError):
                file.remove()

    async def _tell(self, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._waiting += 1
        try:
            if self._waiting <= READY_WAITING_MAX:
                await self._is_ready.wait()
                writer.write(self._word)
        finally:
            self._waiting -= 1
            writer.close()
