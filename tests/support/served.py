"""A provider at work from construction on, and peers that speak to it frame by frame."""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, TypeVar

from statemachine.effects import Effect
from statemachine.messages import Message
from statemachine.provider import Limits
from tests.support.serving import Serving
from transport.channel import Channel, Delivery, Lost
from transport.contract import Backend
from transport.serve import Provider, Spans
from transport.testing.peer import DEADLINE_S

T = TypeVar("T")


class Served(Serving):
    """A provider that runs from construction until `stop`, instead of in a context."""

    def __init__(
        self, path: Path, backend: Backend, limits: Limits | None = None, spans: Spans | None = None
    ) -> None:
        super().__init__(path, backend, limits=limits, spans=spans)
        self._thread.start()

    def wait_ready(self) -> None:
        assert self._ready.wait(DEADLINE_S), "the provider does not become ready"

    def ask_provider(self, question: Callable[[Provider], T]) -> T:
        """Ask the provider something, in its own thread."""
        return self.ask(lambda: question(self.provider))

    def effects(self, kind: type[Effect]) -> list[Effect]:
        """Every effect of a kind that the kernel has asked for."""
        decided = (effect for _, effects in tuple(self.turns) for effect in effects)
        return [effect for effect in decided if isinstance(effect, kind)]

    def stop(self) -> None:
        """Have it stop, and wait until it has."""
        if self.loop.is_closed():
            return
        if self._thread.is_alive():
            super().stop()
        self.join()


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
