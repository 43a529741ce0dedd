"""Which clauses a line of a trace breaks: by the event that cannot be, or by its effects."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, TypeAlias

from statemachine import effects as do
from statemachine import events as on
from statemachine.effects import Effect, Timer
from statemachine.errors import (
    AllocationNotFound,
    CreationFailed,
    FdPassing,
    NamespaceError,
    SocketUnavailable,
)
from statemachine.events import Event

ClauseIds: TypeAlias = tuple[str, ...]
"""Ids of clauses, as in `LIFE-3`."""

ORDER: Final[ClauseIds] = ("WIRE-14",)
"""What is broken where only the order of what is sent on a connection is another."""

RESPONSE: Final[ClauseIds] = ("FD-2",)
"""What is broken by a response that does not answer its request."""

OF_EVENTS: Final[dict[type[Event], ClauseIds]] = {
    on.NamespacesCreated: ("LIFE-3",),
    on.NamespacesNotCreated: ("LIFE-3",),
    on.ResponseSent: ("END-24",),
    on.ResponseNotSent: ("END-24",),
    on.ScopePopulated: ("END-4",),
    on.ScopeEmptied: ("END-1",),
    on.InitDied: ("END-1",),
    on.ReleaseRequested: ("END-1",),
    on.ClaimExpired: ("END-3",),
    on.ReleaseOverdue: ("END-9",),
    on.ReleaseDelayed: ("END-10",),
    on.NamespacesReleased: ("END-10",),
    on.RetryDue: ("END-9",),
    on.CreatedAdopted: ("CRASH-2",),
    on.HandedOffAdopted: ("CRASH-2",),
    on.RemainsFound: ("CRASH-3", "CRASH-4"),
    on.ConnectionOpened: ("CRASH-14",),
    on.ConnectionLost: ("CRASH-14",),
    on.RequestReceived: ("WIRE-11",),
    on.EndReceived: ("WIRE-11",),
    on.FrameRejected: ("WIRE-11",),
    on.ProviderReady: ("LIFE-13",),
    on.ReadinessOverdue: ("LIFE-14",),
    on.ProviderStopping: ("CRASH-12",),
}
"""What is broken, besides LIFE-1, where such an event is taken that cannot be."""

OF_EFFECTS: Final[dict[type[Effect] | type[NamespaceError] | Timer, ClauseIds]] = {
    do.CreateNamespaces: ("LIFE-3",),
    do.Watch: ("END-1",),
    do.HandOver: ("LIFE-3", "LIFE-4"),
    do.RecordHandoff: ("CRASH-2",),
    do.AnnounceEnd: ("END-12", "END-13"),
    do.CloseConnection: ("WIRE-11",),
    do.ReleaseNamespaces: ("END-2", "END-10"),
    SocketUnavailable: ("ERR-3",),
    CreationFailed: ("LIFE-5", "ERR-4"),
    AllocationNotFound: ("END-13",),
    FdPassing: ("WIRE-11", "PEER-6"),
    Timer.READINESS: ("LIFE-14",),
    Timer.CLAIM: ("END-3",),
    Timer.RELEASE: ("END-9",),
    Timer.RETRY: ("END-9",),
}
"""What is broken by such an effect where it is not asked for, and without it where it is."""


def clauses_of_event(event: Event) -> ClauseIds:
    """Name what is broken where an event is taken that cannot be."""
    return ("LIFE-1", *OF_EVENTS.get(type(event), ()))


def clauses_of_effects(effects: Iterable[Effect]) -> ClauseIds:
    """Name what is broken by effects, each of them too many or missing."""
    found = [clause for effect in effects for clause in OF_EFFECTS[_subject_of(effect)]]
    return tuple(dict.fromkeys(found))


def _subject_of(effect: Effect) -> type[Effect] | type[NamespaceError] | Timer:
    if isinstance(effect, do.Refuse):
        return type(effect.error)
    if isinstance(effect, do.StartTimer | do.StopTimer):
        return effect.timer
    return type(effect)
