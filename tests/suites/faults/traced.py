"""A provider's program that strace kills: before any system call of one of its threads.

`crashes.py` kills it at the calls that the program makes through its own hook. Here those count as
well that the interpreter, SQLite and asyncio make; what comes of it is looked at in the same way.
"""

from __future__ import annotations

import asyncio
import re
import signal
import socket
import subprocess
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from statemachine.messages import NamespaceRequest
from tests.suites.faults.crashes import PATIENCE_S, POLL_S, DoomableProgram, Killed
from tests.suites.faults.faults import CallSite
from tests.suites.faults.lives import LinuxStage, NotTolerated
from transport.endpoint import listen
from transport.serve import Provider
from transport.testing.peer import wait_until

THREADS: Final[dict[str, tuple[str, ...]]] = {
    "obtaining": ("MainThread", "backend-create", "forge"),
    "ending": ("MainThread", "backend-release"),
    "recovering": ("MainThread", "backend-create"),
}
"""Whose calls are counted, by what the program is doing: a thread of its own, or its forge."""

TRACED_S: Final = 0.3
"""After that a program that is traced has nothing more to do."""

ALL: Final = -1
"""In place of the number of a call: none is the last, and all are noted."""

WAITS: Final = frozenset({"futex", "restart_syscall"})
"""What changes nothing, so that to die before it is to die before the next."""

_GO: Final = b"go"
_CALL: Final = re.compile(r"^(?:\d+ +)?(\w+)\(")


class Traced(Killed):
    """
    A program in a process of its own, killed in one of its threads, or robbed of its forge.

    Args:
        stage: where it works.
        who: of `THREADS`; a thread is named by the beginning of its name.
    """

    def __init__(self, stage: LinuxStage, who: str) -> None:
        super().__init__(stage)
        self.who: Final = who
        self.missed = 0
        """Calls that were not made this time, as when a thread waits is its own affair."""
        self._threads: dict[str, int] = {}
        self._strace: subprocess.Popen[bytes] | None = None
        self._k = 0
        self._output: Final = stage.directory / "strace"
        self._calls: list[tuple[str, int]] = []
        """What it calls in the phase: the name, and which one of this name."""

    def run(self, phase: str, k: int) -> CallSite | None:
        if not self._calls:
            super().run(phase, ALL)
            self._calls = self._made()
        if k > len(self._calls):
            return None
        last = super().run(phase, k)
        self.missed += last is None
        return last or self._site(k)

    def _made(self) -> list[tuple[str, int]]:
        seen: Counter[str] = Counter()
        calls = []
        for found in map(_CALL.match, self._output.read_text(errors="replace").splitlines()):
            if found and found[1] not in WAITS:
                seen[found[1]] += 1
                calls.append((found[1], seen[found[1]]))
        return calls

    def _site(self, k: int) -> CallSite:
        name, nth = self._calls[k - 1]
        return CallSite(self.who, "below Python", name, nth)

    async def start(self, doomed_at: int | None = None) -> bool:
        if self.who == "forge" and self._pid:
            # The program lives on, and makes itself another forge.
            self._detach()
            self._last = None
            return True
        self._begin(doomed_at)
        self._k = 0
        if doomed_at is not None and self.who == "MainThread":
            self._attach([self._pid], doomed_at)
        self._tell(_GO)
        while said := await self._hear():
            word, *words = said.split()
            if word == "ready":
                self._threads = {x.split("=")[0]: int(x.split("=")[1]) for x in words}
                return True
            if doomed_at is not None and self.who != "MainThread":
                self._attach([int(words[0])], doomed_at)
            self._tell(_GO)
        self._note(b"")
        return False

    async def _hear(self) -> str:
        """What the program says next; nothing if it is dead."""
        assert self._control is not None
        with suppress(ConnectionResetError):
            heard = self.stage.loop.sock_recv(self._control, 4096)
            return (await asyncio.wait_for(heard, PATIENCE_S)).decode()
        return ""

    def doom(self, k: int) -> None:
        self._detach()
        if not k:
            return
        if self.who == "MainThread":
            tasks = [self._pid]
        elif self.who == "forge":
            assert self.forge is not None
            tasks = [self.forge]
        else:
            tasks = [tid for name, tid in self._threads.items() if name.startswith(self.who)]
        self._attach(tasks, k)

    def _attach(self, tasks: list[int], k: int) -> None:
        command = ["strace", "-qq", "-o", str(self._output)]
        if k != ALL:
            name, nth = self._calls[k - 1]
            command += ["-e", f"trace={name}", "-e", f"inject={name}:signal=KILL:when={nth}"]
        for task in tasks:
            command += ["-p", str(task)]
        self._strace, self._k = subprocess.Popen(command), k
        wait_until(lambda: self._strace.poll() is not None or all(map(_is_traced, tasks)))

    def _detach(self) -> None:
        strace, self._strace = self._strace, None
        if strace is not None:
            strace.send_signal(signal.SIGINT)
            strace.wait(PATIENCE_S)

    def _note(self, said: bytes) -> None:
        """It is dead, before the call that strace was told."""
        if self._k <= 0:
            raise NotTolerated("the program ended by itself")
        if self._strace is not None:
            self._strace.wait(PATIENCE_S)
        self._last = self._site(self._k)

    async def spare(self) -> CallSite | None:
        return await DoomableProgram.spare(self)  # strace is told, not the program

    async def died_at(self) -> CallSite | None:
        if self.who == "forge":
            if self._strace is not None and self._strace.poll() is not None:
                self._note(b"")
            return self._last
        return await super().died_at()

    async def _crash(self, phase: str, k: int) -> CallSite | None:
        if self.who == "forge":
            # There is one only when something was made.
            warm = await self._obtain(NamespaceRequest(self.stage.new_name(), self.stage.kinds))
            assert warm is not None
            await warm.end()
            await warm.close()
        return await super()._crash(phase, k)

    async def _await_death(self, ending: asyncio.Future[None] | None) -> CallSite | None:
        deadline = time.monotonic() + TRACED_S
        while (last := await self.died_at()) is None and time.monotonic() < deadline:
            if ending is not None and not ending.done():
                await asyncio.wait({ending}, timeout=POLL_S)
            else:
                await asyncio.sleep(POLL_S)
        return last

    def _reap(self) -> None:
        self._detach()
        super()._reap()

    # What the process does.

    async def _serve(self, control: socket.socket, doomed_at: int | None) -> None:
        control.recv(64)
        world = self.stage.world
        world.launch()
        recover = world.backend.recover

        def recover_when_told() -> Any:
            control.send(f"recovering {threading.get_native_id()}".encode())
            control.recv(64)
            return recover()

        world.backend.recover = recover_when_told  # type: ignore[method-assign]
        provider = Provider(listen(self.stage.path), world.backend)
        await provider.run(lambda: control.send(_threads_now()))


def _threads_now() -> bytes:
    words = [f"{thread.name}={thread.native_id}" for thread in threading.enumerate()]
    return " ".join(["ready", *words]).encode()


def _is_traced(task: int) -> bool:
    with suppress(OSError):
        return "TracerPid:\t0\n" not in Path(f"/proc/{task}/status").read_text()
    return True  # it is dead already
