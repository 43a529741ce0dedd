"""A provider at work in a thread of its own, and peers that speak to it message by message."""

from __future__ import annotations

import asyncio
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, TypeVar

from statemachine.effects import Effect
from statemachine.events import Event
from statemachine.lifecycle import AllocationState
from statemachine.messages import Message
from statemachine.provider import Limits
from transport.channel import Channel, Delivery, Lost
from transport.contract import Backend
from transport.endpoint import listen
from transport.serve import Provider, Spans

DEADLINE_S: Final = 10.0

T = TypeVar("T")


class Served:
    """
    A provider in a thread.

    Args:
        path: its socket.
        backend: stays the caller's, who closes it after `stop`.
        limits: the provider's.
        spans: the provider's.
    """

    def __init__(
        self, path: Path, backend: Backend, limits: Limits | None = None, spans: Spans | None = None
    ) -> None:
        self.path: Final = path
        self.history: Final[list[tuple[Event, tuple[Effect, ...]]]] = []
        """Every event, with what the kernel decided."""
        self.faults: Final[list[dict[str, Any]]] = []
        """What went wrong in the loop and belongs to nobody."""
        self._backend: Final = backend
        self._limits: Final = limits
        self._spans: Final = spans
        self._is_ready: Final = threading.Event()
        self._thread: Final = threading.Thread(target=self._run, name="provider")
        self._thread.start()

    def wait_ready(self) -> None:
        assert self._is_ready.wait(DEADLINE_S), "the provider does not become ready"

    def state_of(self, name: str) -> AllocationState:
        return self.ask(lambda provider: provider.kernel.state_of(name))

    def ask(self, question: Callable[[Provider], T]) -> T:
        """Ask the provider something, in its own thread."""

        async def answer() -> T:
            return question(self._provider)

        return asyncio.run_coroutine_threadsafe(answer(), self._loop).result(DEADLINE_S)

    def effects(self, kind: type[Effect]) -> list[Effect]:
        """Every effect of a kind that the kernel has asked for."""
        decided = (effect for _, effects in tuple(self.history) for effect in effects)
        return [effect for effect in decided if isinstance(effect, kind)]

    def stop(self) -> None:
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._provider.stop)
            self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive(), "the provider does not stop"
        assert not self.faults

    def _run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._loop.set_exception_handler(lambda _, context: self.faults.append(context))
        self._provider = Provider(
            listen(self.path),
            self._backend,
            limits=self._limits,
            spans=self._spans,
            observer=lambda event, effects: self.history.append((event, effects)),
        )
        await self._provider.run(self._is_ready.set)


@contextmanager
def served(
    path: Path, backend: Backend, limits: Limits | None = None, spans: Spans | None = None
) -> Iterator[Served]:
    provider = Served(path, backend, limits, spans)
    try:
        provider.wait_ready()
        yield provider
    finally:
        provider.stop()


class Wire:
    """A peer that sends and takes single messages, when the test says so."""

    def __init__(self, path: Path) -> None:
        self.socket: Final = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.connect(str(path))
        self.socket.setblocking(False)
        self.channel: Final = Channel(self.socket, accepts_descriptors=True)
        self._arrived: Final[list[Message]] = []
        self._is_lost = False

    def send(self, *messages: Message) -> None:
        for message in messages:
            self.channel.send(message)
        while not self.channel.flush():
            select.select([], [self.channel], [], DEADLINE_S)

    def take(self) -> Message:
        """The next message, whose descriptors are closed at once."""
        message = self._take(DEADLINE_S)
        assert message is not None, "no message arrives"
        return message

    def hears_nothing(self) -> bool:
        """Whether nothing has arrived by now."""
        return self._take(0.0) is None

    def hears_the_end(self) -> bool:
        """Whether the provider closes the connection, without another message."""
        return self._take(DEADLINE_S) is None and self._is_lost

    def _take(self, patience_s: float) -> Message | None:
        deadline = time.monotonic() + patience_s
        while not self._arrived and not self._is_lost:
            left_s = max(0.0, deadline - time.monotonic())
            if not select.select([self.channel], [], [], left_s)[0]:
                return None
            for received in self.channel.receive():
                if isinstance(received, Delivery):
                    received.bundle.close()
                    self._arrived.append(received.message)
                else:
                    assert isinstance(received, Lost), received
                    self._is_lost = True
        return self._arrived.pop(0) if self._arrived else None

    def close(self) -> None:
        self.channel.close()

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
