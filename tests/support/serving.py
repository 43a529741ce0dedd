"""A provider at work in a thread of its own, on a real socket, to be watched from a test."""

from __future__ import annotations

import asyncio
import ctypes
import os
import platform
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, TypeVar

from statemachine.effects import Effect
from statemachine.events import Event
from statemachine.provider import Limits
from statemachine.states import AllocationState
from transport.contract import Backend
from transport.endpoint import listen
from transport.serve import Provider, Spans
from transport.testing.peer import DEADLINE_S, Line, wait_until

T = TypeVar("T")


class Serving:
    """
    A running provider.

    Args:
        path: where it listens, from construction on.
        backend: lent.
        waits_ready: whether entering the context waits until requests are served.
        listening: for `listen`.
    """

    def __init__(
        self,
        path: Path,
        backend: Backend,
        *,
        limits: Limits | None = None,
        spans: Spans | None = None,
        waits_ready: bool = True,
        **listening: Any,
    ) -> None:
        self.path = path
        self.turns: list[tuple[Event, tuple[Effect, ...]]] = []
        self.faults: list[str] = []
        """What the event loop complained about."""
        self.loop = asyncio.new_event_loop()
        self.loop.set_exception_handler(lambda _, context: self.faults.append(repr(context)))
        self.provider = Provider(
            listen(path, **listening),
            backend,
            limits=limits,
            spans=spans,
            observer=lambda event, effects: self.turns.append((event, effects)),
        )
        self._waits_ready = waits_ready
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="provider")
        self._error: BaseException | None = None

    def ask(self, question: Callable[[], T]) -> T:
        """Ask in the provider's own thread, between two of its steps."""

        async def asked() -> T:
            return question()

        return asyncio.run_coroutine_threadsafe(asked(), self.loop).result(DEADLINE_S)

    def state_of(self, name: str) -> AllocationState:
        return self.ask(lambda: self.provider.kernel.state_of(name))

    def saw(self, kind: type[Event]) -> list[Event]:
        """The events of a kind so far, in order."""
        return [event for event, _ in tuple(self.turns) if isinstance(event, kind)]

    def effects(self, kind: type[Effect]) -> list[Effect]:
        """Every effect of a kind that the kernel has asked for."""
        decided = (effect for _, effects in tuple(self.turns) for effect in effects)
        return [effect for effect in decided if isinstance(effect, kind)]

    def wait_ready(self) -> None:
        assert self._ready.wait(DEADLINE_S), "the provider does not become ready"

    def wait_for(self, kind: type[Event], count: int = 1) -> None:
        wait_until(lambda: len(self.saw(kind)) >= count, f"{count} times {kind.__name__}")

    def connect(self) -> Line:
        return Line.to(self.path)

    def stop(self) -> None:
        """Have it stop; returns at once."""
        self.loop.call_soon_threadsafe(self.provider.stop)

    def end(self) -> None:
        """Have it stop, and wait until it has; may be called again."""
        if not self.loop.is_closed():
            if self._thread.is_alive():
                self.stop()
            self.join()

    def join(self) -> None:
        """Wait until it has stopped; complain about whatever it complained about."""
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive(), "the provider does not stop"
        self.loop.close()
        if self._error is not None:
            raise self._error
        assert not self.faults, self.faults

    def __enter__(self) -> Serving:
        self._thread.start()
        if self._waits_ready:
            self.wait_ready()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.end()

    def _run(self) -> None:
        try:
            self.loop.run_until_complete(self.provider.run(self._ready.set))
            # One more round, for what was only just cancelled.
            self.loop.run_until_complete(asyncio.sleep(0))
        except BaseException as error:
            self._error = error


_SETRESUID, _SETFSUID = (147, 151) if platform.machine() == "aarch64" else (117, 122)
_libc: Final = ctypes.CDLL(None, use_errno=True)


def connect_as(path: Path, uid: int) -> Line:
    """
    Connect as another user: a connection keeps the credentials of the thread that made it.

    To the Linux kernel a thread has a user of its own; glibc's wrapper would change all of them.
    For files it stays root, so that every directory on the way can be passed.
    """
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(_connect_as, path, uid).result()


def _connect_as(path: Path, uid: int) -> Line:
    for call, *arguments in ((_SETRESUID, -1, uid, -1), (_SETFSUID, 0)):
        if _libc.syscall(call, *arguments) < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
    return Line.to(path)
