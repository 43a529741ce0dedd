"""Could this have happened? A trace's events are fed to a judge, and its effects compared.

The judge is our kernel, or the reference model (`transport.testing.model_judge`) for what another
implementation wrote. Besides what it refuses, a trace must keep what `effects` obliges a driver to:
to report what came of something it must have been asked for, and each once. And a provider that
starts again must find what the one before it can have left: nothing else, and not less.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol, TypeAlias

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
from .clauses import ORDER, ClauseIds, clauses_of_effects, clauses_of_event


class ImpossibleLine(TraceError):
    """
    A line that cannot have happened after those before it.

    Args:
        line: Its number.
        reason: What cannot be.
        instead: Lines that say what could have been.
        clauses: What of the book it breaks.
    """

    def __init__(self, line: int, reason: str, *instead: str, clauses: ClauseIds) -> None:
        super().__init__(line, reason)
        self.instead: Final = instead
        self.clauses: Final = clauses


class Objection(NamedTuple):
    """What is wrong with what a provider did."""

    reason: str
    clauses: ClauseIds
    """What of the book it breaks."""


class Judge(Protocol):
    """Knows what a provider does next: a kernel that is put the same events."""

    @property
    def service(self) -> ServiceState:
        """The provider's own state."""

    def state_of(self, allocation_id: str) -> AllocationState:
        """Say how far an allocation has come."""

    def remember(self, names: Iterable[str], /) -> None:
        """Take over the names of what was released before the start, oldest first."""

    def receive(self, event: ProviderInput, /) -> tuple[Effect, ...]:
        """Return what a provider does now; raise `ProtocolError` where the event cannot be."""

    def objection(
        self, event: ProviderInput, found: tuple[Effect, ...], expected: tuple[Effect, ...]
    ) -> Objection | None:
        """Compare what a provider did with what `receive` returned."""


class KernelJudge(ProviderKernel):
    """Our kernel: the same effects in the same order, to the letter of each reason."""

    def objection(
        self, event: ProviderInput, found: tuple[Effect, ...], expected: tuple[Effect, ...]
    ) -> Objection | None:
        """Compare what a provider did with what `receive` returned."""
        if found == expected:
            return None
        count = Counter(found)
        count.subtract(Counter(expected))
        wrong = [effect for effect, number in count.items() if number]
        return Objection("has other effects", clauses_of_effects(wrong) or ORDER)


class Replay:
    """
    Goes through a trace, up to the first impossible line.

    Args:
        judge: Makes the judge of a provider that has just started, from its limits.

    Takes time with the length of the trace, and memory only with what is alive in it. The end of
    the trace may be missing, and the end of every provider's life in it: that is a crash. Where
    other lines are missing there is no way on but through a crash, either, and what it left behind
    is unknown; a trace that does not begin with a start has such a gap before it.
    """

    def __init__(self, judge: Callable[[Limits], Judge] = KernelJudge) -> None:
        self._judge_of: Final = judge
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
        self._judge: Judge = self._judge_of(limits)
        self._owed = _Owed()
        self._lives: dict[str, _TracedAllocation] = {}
        self._knows_all = False
        self._is_after_gap = False

    def _take(self, number: int, sequence: int, entry: TraceEntry) -> None:
        if isinstance(entry, Start):
            if self._knows_all:
                self._left = _Left()
            if self._left is not None:
                self._left.add(self._lives, self._judge)
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
            if self._judge.service is not ServiceState.STARTING:
                reason = "a recovery, but the provider is ready"
                raise ImpossibleLine(number, reason, clauses=("CRASH-6",))
            self._judge.remember(entry.remembered)
            if self._left is not None:
                self._left.strike_off(entry.remembered)

    def _check_place(self, number: int, event: Event) -> None:
        """Have nothing but adoptions after a gap, and none but of what can have been left."""
        is_adoption = isinstance(event, _ADOPTIONS)
        if is_adoption and self._judge.service is not ServiceState.STARTING:
            reason = f"{_name(event)}, but the provider is {self._judge.service.value}"
            clauses = clauses_of_event(event)
            raise ImpossibleLine(number, reason, self._allowed_for(event), clauses=clauses)
        if self._left is not None:
            self._left.check(number, event)
        if self._is_after_gap and not is_adoption:
            if not isinstance(event, on.ProviderReady):
                reason = f"lines are missing before this {_name(event)}; then there was a crash"
                allowed = _allowed([*_ADOPTIONS, on.ProviderReady])
                raise ImpossibleLine(number, reason, allowed, clauses=("DAEMON-7",))
            self._is_after_gap = False

    def _turn(self, number: int, turn: Turn) -> None:
        event = turn.event
        if not self._owed.settle(event):
            raise self._not_asked_for(number, event)
        try:
            effects = self._judge.receive(event)
        except ProtocolError as error:
            allowed, clauses = self._allowed_for(event, error), clauses_of_event(event)
            raise ImpossibleLine(number, str(error), allowed, clauses=clauses) from None
        objection = self._judge.objection(event, turn.effects, effects)
        if objection is not None:
            reason = f"{_name(event)} {objection.reason}"
            shown = f"found:    {_shown(turn.effects)}", f"expected: {_shown(effects)}"
            raise ImpossibleLine(number, reason, *shown, clauses=objection.clauses)
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
        allowed, reason = self._allowed_for(event), f"{_name(event)} reports what was not asked for"
        try:
            self._judge.receive(event)
        except ProtocolError as error:
            reason = str(error)
        return ImpossibleLine(number, reason, allowed, clauses=clauses_of_event(event))

    def _allowed_for(self, event: Event, refusal: ProtocolError | None = None) -> str:
        """Say what may happen where that stands which the event is about."""
        if not isinstance(event, on.AllocationEvent):
            return _allowed(_AFTER[refusal.state if refusal else self._judge.service.value])
        name = event.allocation_id
        state = self._judge.state_of(name)
        # Of what is released only the name is left, and it may begin anew.
        states = {state, _UNKNOWN} if state is AllocationState.RELEASED else {state}
        kinds = [
            _FED_AS.get(row.event, row.event) for row in ALLOCATION.rows if row.source in states
        ]
        if self._judge.service is not ServiceState.STARTING:
            kinds = [kind for kind in kinds if kind not in _ADOPTIONS]
        return _allowed(kind for kind in kinds if self._owed.has(kind, name))


def checked(
    file: str, lines: Iterable[bytes], judge: Callable[[Limits], Judge], by: str = ""
) -> tuple[bool, list[str]]:
    """
    Check a trace.

    Args:
        file: Its name.
        lines: What is in it.
        judge: Makes the judge.
        by: What to say of the judge, if anything.

    Returns:
        Whether it can have happened, and lines to show.
    """
    replay = Replay(judge)
    try:
        replay.take_all(lines)
    except ImpossibleLine as error:
        clauses = f" ({', '.join(error.clauses)})"
        first = f"{file}:{error.line}: {error.reason}{clauses}"
        return False, [first, *(f"  {line}" for line in error.instead)]
    except TraceError as error:
        return False, [f"{file}:{error.line}: {error.reason}"]
    counted = f"{replay.turns} events, {replay.starts} starts, {replay.gaps} gaps"
    return True, [f"{file}: possible{by}: {counted}"]


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

    def add(self, lives: dict[str, _TracedAllocation], judge: Judge) -> None:
        """Add what a provider that is gone knew; it may have begun to find what another left."""
        states = {name: judge.state_of(name) for name in lives}
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
            objection = self._objection(event)
            if objection is not None:
                reason = f"{_name(event)}, but before the crash {objection.reason}"
                raise ImpossibleLine(number, reason, clauses=objection.clauses)
        elif isinstance(event, on.ProviderReady) and self._must_be_found:
            name = min(self._must_be_found)
            reason = f"ready, but {name}, which was {self._states[name].value}, was not found"
            raise ImpossibleLine(number, reason, _allowed(_ADOPTIONS), clauses=_KEPT)

    def _objection(
        self, event: on.CreatedAdopted | on.HandedOffAdopted | on.RemainsFound
    ) -> Objection | None:
        life = self._lives.pop(event.allocation_id, None)
        if life is None:
            return Objection("it was not there", clauses_of_event(event))
        if event.request != life.request:
            return Objection(f"it had another request: {life.request}", _KEPT)
        if isinstance(event, on.RemainsFound):
            return None
        state = self._states[event.allocation_id]
        if life.response is not None and event.response != life.response:
            return Objection(f"it had another response: {life.response}", _KEPT)
        if life.is_announced:
            return Objection("its end was announced", ("CRASH-5",))
        is_handed = isinstance(event, on.HandedOffAdopted)
        if is_handed and state in (AllocationState.REQUESTED, AllocationState.CREATED):
            return Objection(f"it was only {state.value}", _KEPT)
        return None


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


_KEPT: Final[ClauseIds] = ("CRASH-2",)

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
