"""Draws a trace as a Mermaid sequence diagram: node, provider, and each connection's consumer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Final

from statemachine import effects as do
from statemachine import events as on
from statemachine.effects import Effect
from statemachine.events import ConnectionId, Event, allocation_of
from statemachine.messages import NamespaceRequest, NamespaceResponse

from . import Start, TraceEntry, Turn

TEXT_CHARACTERS_MAX: Final = 100
"""Most characters of a text in the diagram."""


def sequence_diagram(
    entries: Iterable[TraceEntry], allocation_id: str | None = None
) -> Iterator[str]:
    """
    Draw a trace line by line; timers that only start or stop, and reports of sending, are left out.

    Args:
        entries: The trace, which need not be possible.
        allocation_id: Draw only what concerns this one, and the connections that do.
    """
    yield "sequenceDiagram"
    yield "    participant node"
    yield "    participant provider"
    drawing = _DrawnConnections(allocation_id)
    for entry in entries:
        if isinstance(entry, Start):
            drawing.start()
            yield "    Note over node,provider: the provider starts"
        elif isinstance(entry, Turn):
            yield from (f"    {line}" for line in drawing.draw(entry))


class _DrawnConnections:
    """Which connections have been drawn, in which life of the provider."""

    def __init__(self, allocation_id: str | None) -> None:
        self._wanted: Final = allocation_id
        self._life = 1
        self._is_fresh = True
        self._uids: dict[ConnectionId, int] = {}
        """Who opened the connections that are open and not drawn."""
        self._drawn: set[ConnectionId] = set()

    def start(self) -> None:
        self._life += not self._is_fresh
        self._is_fresh = False
        self._uids.clear()
        self._drawn.clear()

    def draw(self, turn: Turn) -> Iterator[str]:
        self._is_fresh = False
        event, name = turn.event, allocation_of(turn.event)
        if isinstance(event, on.ConnectionOpened):
            self._uids[event.connection] = event.uid
        if self._concerns(name, event):
            yield from self._arrow(event, self._draw_event(event))
        for effect in turn.effects:
            if self._concerns(allocation_of(effect) or name, effect):
                yield from self._arrow(effect, self._draw_effect(effect))
        if isinstance(event, on.ConnectionLost):
            self._uids.pop(event.connection, None)
            self._drawn.discard(event.connection)

    def _concerns(self, name: str, something: Event | Effect) -> bool:
        if self._wanted is None or name:
            return self._wanted in (None, name)
        return getattr(something, "connection", None) in {None, *self._drawn}

    def _arrow(self, something: Event | Effect, line: str) -> Iterator[str]:
        """Draw a line, and before it the connection it is the first of."""
        number = getattr(something, "connection", None)
        if line and number is not None and number not in self._drawn:
            self._drawn.add(number)
            again = f", start {self._life}" if self._life > 1 else ""
            yield f"participant {self._consumer(number)} as consumer {number}{again}"
            if number in self._uids:
                uid = self._uids.pop(number)
                yield f"{self._consumer(number)}->>provider: connects (uid {uid})"
        if line:
            yield line

    def _consumer(self, number: ConnectionId) -> str:
        return f"c{self._life}_{number}"

    def _draw_event(self, event: Event) -> str:
        match event:
            case on.ConnectionOpened() | on.ResponseSent():
                return ""
            case on.RequestReceived(connection=number, request=request):
                return f"{self._consumer(number)}->>provider: {_message(request)}"
            case on.EndReceived(connection=number, allocation_id=name):
                return f"{self._consumer(number)}->>provider: AllocationEnded {_plain(name)}"
            case on.FrameRejected(connection=number, reason=reason):
                return f"{self._consumer(number)}->>provider: unreadable: {_plain(reason)}"
            case on.ConnectionLost(connection=number, reason=reason):
                return f"{self._consumer(number)}--xprovider: is gone: {_plain(reason)}"
            case _:
                arrow = "node->>provider" if isinstance(event, _OF_NODE) else "Note over provider"
                return f"{arrow}: {_words(event)}"

    def _draw_effect(self, effect: Effect) -> str:
        match effect:
            case do.StartTimer() | do.StopTimer():
                return ""
            case do.HandOver(connection=number, response=response):
                return f"provider->>{self._consumer(number)}: {_message(response)}"
            case do.Refuse(connection=number, error=error):
                said = f"{error.kind}: {_plain(error.text)}"
                return f"provider->>{self._consumer(number)}: {said}"
            case do.AnnounceEnd(connection=number, allocation_id=name):
                return f"provider->>{self._consumer(number)}: AllocationEnded {_plain(name)}"
            case do.CloseConnection(connection=number):
                return f"provider-x{self._consumer(number)}: closes"
            case _:
                return f"provider->>node: {_words(effect)}"


_OF_NODE: Final = (
    on.CreatedAdopted,
    on.HandedOffAdopted,
    on.RemainsFound,
    on.NamespacesCreated,
    on.NamespacesNotCreated,
    on.ScopePopulated,
    on.ScopeEmptied,
    on.InitDied,
    on.NamespacesReleased,
    on.ReleaseDelayed,
)


def _words(something: Event | Effect) -> str:
    words = f"{type(something).__name__} {_plain(allocation_of(something))}".rstrip()
    reason = getattr(getattr(something, "error", None), "text", getattr(something, "reason", ""))
    return f"{words}: {_plain(reason)}" if reason else words


def _message(message: NamespaceRequest | NamespaceResponse) -> str:
    if isinstance(message, NamespaceRequest):
        kinds, image = message.namespaces, message.uenv_image
    else:
        kinds, image = message.fd_types, message.uenv_mount_path
    words = [type(message).__name__, message.allocation_id, *(kind.value for kind in kinds)]
    return _plain(" ".join([*words, image or ""]).rstrip())


def _plain(text: str) -> str:
    """Cut a text short, and take from it what means something to Mermaid or to a terminal."""
    cut = text if len(text) <= TEXT_CHARACTERS_MAX else f"{text[:TEXT_CHARACTERS_MAX]}..."
    return re.sub(r"[#;%<>]|[^ -~]", lambda found: f"#{ord(found.group())};", cut)
