"""Could this have happened? A trace's events are fed to a kernel again, and its effects compared.

Besides what the kernel refuses, a trace must keep what `effects` obliges a driver to: to report
what came of something it must have been asked for, and each once. And a provider that starts again
must find what the one before it can have left: nothing else, and not less.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, TypeAlias

from statemachine import effects as do
from statemachine import events as on
from statemachine.effects import Effect, Timer
from statemachine.errors import ProtocolError
from statemachine.events import ConnectionId, Event, ProviderInput
from statemachine.lifecycle import ALLOCATION
from statemachine.messages import NamespaceRequest, NamespaceResponse
from statemachine.provider import REMEMBERED_MAX, Limits, ProviderKernel
from statemachine.states import AllocationState, ServiceState

from . import Recovered, Start, TraceEntry, TraceError, Turn, encode_effect, read_lines


class ImpossibleLine(TraceError):
    """
    A line that cannot have happened after those before it.

    Args:
        line: Its number.
        reason: What cannot be.
        instead: Lines that say what could have been.
    """

    def __init__(self, line: int, reason: str, *instead: str) -> None:
        super().__init__(line, reason)
        self.instead: Final = instead


class Replay:
    """
    Goes through a trace, up to the first impossible line.

    Takes time with the length of the trace, and memory only with what is alive in it. The end of
    the trace may be missing, and the end of every provider's life in it: that is a crash. Where
    other lines are missing there is no way on but through a crash, either, and what it left behind
    is unknown; a trace that does not begin with a start has such a gap before it.
    """

    def __init__(self) -> None:
        self.turns = 0
        self.starts = 0
        self.gaps = 0
        self._sequence = -1
        self._left: _Left | None = None
        self._crash(Limits())

    def take_all(self, lines: Iterable[bytes]) -> None:
        """
        Go through the lines.

        Raises:
            TraceError: a line cannot be read.
            ImpossibleLine: a line cannot have happened.
        """
        for number, sequence, entry in read_lines(lines):
            self._take(number, sequence, entry)

    def _crash(self, limits: Limits) -> None:
        self._limits = limits
        self._kernel = ProviderKernel(limits)
        self._owed = _Owed()
        self._lives: dict[str, _TracedAllocation] = {}
        self._knows_all = False
        self._is_after_gap = False

    def _take(self, number: int, sequence: int, entry: TraceEntry) -> None:
        if isinstance(entry, Start):
            if self._knows_all:
                self._left = _Left()
            if self._left is not None:
                self._left.add(self._lives, self._kernel)
            self._crash(entry.limits)
            self.starts += 1
        elif sequence != self._sequence + 1:
            self._left = None
            self._crash(self._limits)
            self._is_after_gap = True
            self.gaps += 1
        self._sequence = sequence
        if isinstance(entry, Turn):
            self._check_place(number, entry.event)
            self._turn(number, entry)
            self.turns += 1
        elif isinstance(entry, Recovered):
            if self._kernel.service is not ServiceState.STARTING:
                raise ImpossibleLine(number, "a recovery, but the provider is ready")
            self._kernel.remember(entry.remembered)
            if self._left is not None:
                self._left.strike_off(entry.remembered)

    def _check_place(self, number: int, event: Event) -> None:
        """Have nothing but adoptions after a gap, and none but of what can have been left."""
        is_adoption = isinstance(event, _ADOPTIONS)
        if is_adoption and self._kernel.service is not ServiceState.STARTING:
            reason = f"{_name(event)}, but the provider is {self._kernel.service.value}"
            raise ImpossibleLine(number, reason, self._allowed_for(event))
        if self._left is not None:
            self._left.check(number, event)
        if self._is_after_gap and not is_adoption:
            if not isinstance(event, on.ProviderReady):
                reason = f"lines are missing before this {_name(event)}; then there was a crash"
                raise ImpossibleLine(number, reason, _allowed([*_ADOPTIONS, on.ProviderReady]))
            self._is_after_gap = False

    def _turn(self, number: int, turn: Turn) -> None:
        event = turn.event
        if not self._owed.settle(event):
            raise self._not_asked_for(number, event)
        try:
            effects = self._kernel.receive(event)
        except ProtocolError as error:
            raise ImpossibleLine(number, str(error), self._allowed_for(event, error)) from None
        if effects != turn.effects:
            reason = f"{_name(event)} has other effects"
            found, expected = _shown(turn.effects), _shown(effects)
            raise ImpossibleLine(number, reason, f"found:    {found}", f"expected: {expected}")
        if isinstance(event, on.ProviderReady):
            self._knows_all, self._left = True, None
        self._keep(event)
        for effect in effects:
            self._owed.add(effect)
            if isinstance(effect, do.CreateNamespaces):
                self._lives[effect.request.allocation_id] = _TracedAllocation(effect.request)
            elif isinstance(effect, do.AnnounceEnd) and effect.allocation_id in self._lives:
                self._lives[effect.allocation_id].is_announced = True

    def _keep(self, event: Event) -> None:
        """Note what an event says of a life."""
        if isinstance(event, on.NamespacesCreated):
            self._lives[event.allocation_id].response = event.response
        elif isinstance(event, on.NamespacesReleased):
            del self._lives[event.allocation_id]
        elif isinstance(event, on.CreatedAdopted | on.HandedOffAdopted):
            self._lives[event.allocation_id] = _TracedAllocation(event.request, event.response)
        elif isinstance(event, on.RemainsFound):
            self._lives[event.allocation_id] = _TracedAllocation(event.request)

    def _not_asked_for(self, number: int, event: ProviderInput) -> ImpossibleLine:
        allowed = self._allowed_for(event)
        try:
            self._kernel.receive(event)
        except ProtocolError as error:
            return ImpossibleLine(number, str(error), allowed)
        return ImpossibleLine(number, f"{_name(event)} reports what was not asked for", allowed)

    def _allowed_for(self, event: Event, refusal: ProtocolError | None = None) -> str:
        """Say what may happen where that stands which the event is about."""
        if not isinstance(event, on.AllocationEvent):
            return _allowed(_AFTER[refusal.state if refusal else self._kernel.service.value])
        name = event.allocation_id
        state = self._kernel.state_of(name)
        # Of what is released only the name is left, and it may begin anew.
        states = {state, _UNKNOWN} if state is AllocationState.RELEASED else {state}
        kinds = [
            _FED_AS.get(row.event, row.event) for row in ALLOCATION.rows if row.source in states
        ]
        if self._kernel.service is not ServiceState.STARTING:
            kinds = [kind for kind in kinds if kind not in _ADOPTIONS]
        return _allowed(kind for kind in kinds if self._owed.has(kind, name))


@dataclass(slots=True)
class _TracedAllocation:
    """What a trace says of an allocation that is not released."""

    request: NamespaceRequest
    response: NamespaceResponse | None = None
    is_announced: bool = False


class _Left:
    """
    What a provider that is gone can have left for the next one to find.

    It wrote each line before it performed anything, and its backend works on after its last line.
    So what was being created may be found in any shape or not at all, an end that was not told
    may be forgotten, and a hand-over may not have been noted. But what has been created is found,
    or remembered as ended; what has been announced as ended is not alive; and nothing is found
    that was not there.
    """

    def __init__(self) -> None:
        self._lives: dict[str, _TracedAllocation] = {}
        self._states: dict[str, AllocationState] = {}
        self._must_be_found: set[str] = set()

    def add(self, lives: dict[str, _TracedAllocation], kernel: ProviderKernel) -> None:
        """Add what a provider that is gone knew; it may have begun to find what another left."""
        states = {name: kernel.state_of(name) for name in lives}
        self._lives |= lives
        self._states |= states
        self._must_be_found |= {name for name, state in states.items() if state in _EXIST}

    def strike_off(self, remembered: tuple[str, ...]) -> None:
        """Take up which names the backend remembers; its memory is bounded."""
        self._must_be_found -= set(remembered)
        if len(remembered) >= REMEMBERED_MAX:
            self._must_be_found.clear()

    def check(self, number: int, event: Event) -> None:
        """
        Hold what the next provider finds to what there was.

        Raises:
            ImpossibleLine: it finds what cannot be, or is ready and has not found what must be.
        """
        if isinstance(event, _ADOPTIONS):
            self._must_be_found.discard(event.allocation_id)
            reason = self._objection(event)
            if reason:
                raise ImpossibleLine(number, f"{_name(event)}, but before the crash {reason}")
        elif isinstance(event, on.ProviderReady) and self._must_be_found:
            name = min(self._must_be_found)
            reason = f"ready, but {name}, which was {self._states[name].value}, was not found"
            raise ImpossibleLine(number, reason, _allowed(_ADOPTIONS))

    def _objection(self, event: on.CreatedAdopted | on.HandedOffAdopted | on.RemainsFound) -> str:
        life = self._lives.pop(event.allocation_id, None)
        if life is None:
            return "it was not there"
        if event.request != life.request:
            return f"it had another request: {life.request}"
        if isinstance(event, on.RemainsFound):
            return ""
        state = self._states[event.allocation_id]
        if life.response is not None and event.response != life.response:
            return f"it had another response: {life.response}"
        if life.is_announced:
            return "its end was announced"
        is_handed = isinstance(event, on.HandedOffAdopted)
        if is_handed and state in (AllocationState.REQUESTED, AllocationState.CREATED):
            return f"it was only {state.value}"
        return ""


class _Owed:
    """What a driver was asked for and has not reported yet."""

    def __init__(self) -> None:
        self._open: set[tuple[_Asked, str]] = set()
        self._on_the_way: dict[ConnectionId, list[str]] = {}
        """The allocations that are being handed over, once for each time."""

    def add(self, effect: Effect) -> None:
        """Note what an effect asks for."""
        if isinstance(effect, do.HandOver):
            name = effect.response.allocation_id
            self._on_the_way.setdefault(effect.connection, []).append(name)
        elif isinstance(effect, do.StartTimer):
            self._open.add((effect.timer, effect.allocation_id))
        elif isinstance(effect, do.StopTimer):
            self._open.discard((effect.timer, effect.allocation_id))
        elif isinstance(effect, do.CreateNamespaces):
            self._open.add((do.CreateNamespaces, effect.request.allocation_id))
        elif isinstance(effect, do.ReleaseNamespaces):
            self._open.add((do.ReleaseNamespaces, effect.allocation_id))

    def settle(self, event: Event) -> bool:
        """Strike off what an event reports; say whether it was owed, or need not be."""
        asked = _REPORTS.get(type(event))
        if asked is None:
            if isinstance(event, on.ConnectionLost):
                self._on_the_way.pop(event.connection, None)
            return True
        name: str = getattr(event, "allocation_id", "")
        if isinstance(event, on.ResponseSent | on.ResponseNotSent):
            names = self._on_the_way.get(event.connection, [])
            if name in names:
                names.remove(name)
                return True
            return False
        is_open = (asked, name) in self._open
        self._open.discard((asked, name))
        return is_open

    def has(self, kind: type[Event], name: str) -> bool:
        """Say whether an event of a kind could report something of an allocation."""
        asked = _REPORTS.get(kind)
        if asked is do.HandOver:
            return any(name in names for names in self._on_the_way.values())
        return asked is None or (asked, name) in self._open


_ADOPTIONS: Final = (on.CreatedAdopted, on.HandedOffAdopted, on.RemainsFound)

_Asked: TypeAlias = type[Effect] | Timer

_REPORTS: Final[dict[type[Event], _Asked]] = {
    on.NamespacesCreated: do.CreateNamespaces,
    on.NamespacesNotCreated: do.CreateNamespaces,
    on.ResponseSent: do.HandOver,
    on.ResponseNotSent: do.HandOver,
    on.NamespacesReleased: do.ReleaseNamespaces,
    on.ReleaseDelayed: do.ReleaseNamespaces,
    on.ReadinessOverdue: Timer.READINESS,
    on.ClaimExpired: Timer.CLAIM,
    on.ReleaseOverdue: Timer.RELEASE,
    on.RetryDue: Timer.RETRY,
}
"""What each of these is the report of."""

_FED_AS: Final[dict[type[Event], type[Event]]] = {
    on.RequestAdmitted: on.RequestReceived,
    on.RequestRepeated: on.RequestReceived,
    on.RequestConflicting: on.RequestReceived,
    on.RequestEarly: on.RequestReceived,
    on.RequestDuringDrain: on.RequestReceived,
    on.EndRepeated: on.EndReceived,
    on.Unclaimed: on.ConnectionLost,
}
"""What a driver feeds where the kernel names it."""

_AFTER: Final[dict[str, list[type[Event]]]] = {
    "not open": [on.ConnectionOpened],
    "open": [on.RequestReceived, on.EndReceived, on.FrameRejected, on.ConnectionLost],
    "closing": [on.ConnectionLost],
    ServiceState.STARTING.value: [*_ADOPTIONS, on.ProviderReady, on.ProviderStopping],
    ServiceState.READY.value: [on.ProviderStopping],
    ServiceState.STOPPING.value: [],
    ServiceState.ABORTED.value: [],
}
"""What may follow where a connection, or the provider, stands as the kernel's refusal says."""

_UNKNOWN: Final = AllocationState.UNKNOWN
_EXIST: Final = (AllocationState.CREATED, AllocationState.HANDED_OFF)


def _allowed(kinds: Iterable[type[Event]]) -> str:
    names = dict.fromkeys(kind.__name__ for kind in kinds)
    return f"allowed: {', '.join(names) or 'nothing'}"


def _shown(effects: Iterable[Effect]) -> str:
    return json.dumps([encode_effect(effect) for effect in effects])


def _name(event: Event) -> str:
    name = getattr(event, "allocation_id", "")
    return f"{type(event).__name__} of {name}" if name else type(event).__name__
