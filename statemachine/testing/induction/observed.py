"""Relation and kernel compared: what a kernel does must be a transition, and keep the invariants.

`Comparer.kernel` makes a `ProviderKernel` for the explorer that looks at itself. Each `receive` is
taken apart where a message is put to its allocation, so that each part is one occurrence of the
relation. For each allocation there has to be exactly one transition that can be made, with the rows
that the kernel took and the values that it has come to.

The invariants are evaluated on every snapshot, as far as a kernel can know them; and on every world
of the explorer, which knows what the backend and the connections know besides.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final

from ... import effects as do
from ... import events as on
from ...effects import Effect
from ...events import ConnectionId, Event, ProviderInput
from ...messages import AllocationEnded, NamespaceRequest
from ...provider import Limits, ProviderKernel
from ...provider.models import Allocation, Message
from ...provider.state import State
from ...snapshots import AllocationSnapshot, ProviderSnapshot
from ...states import AllocationState, MessageState
from ..explore.server import Setting
from ..explore.world import RELEASE_JOB, ServerState
from .allocation import ENDS, INVARIANTS, REQUESTS, TIMERS, VARIABLES, relation_of
from .relation import STATE, Invariant, Relation, Transition, told
from .terms import Evaluated, Sort, compiled

_RowTaken = tuple[str, type[Event], Enum]
_EACH: Final = [each for each in VARIABLES if each.is_of_each]
_ALONE: Final = [each for each in VARIABLES if not each.is_of_each]
_OVER: Final = (AllocationState.UNKNOWN, AllocationState.RELEASED)
_GHOSTS: Final = {each.name for each in VARIABLES if each.is_ghost}
_REPORTS: Final = {
    "creations": (on.NamespacesCreated, on.NamespacesNotCreated),
    "releases": (on.NamespacesReleased, on.ReleaseDelayed),
}


class RelationBroken(AssertionError):
    """Kernel and relation differ, or an invariant does not hold."""


@dataclass
class _StepPart:
    """What a kernel did from one moment to the next."""

    before: ProviderSnapshot
    cause: ProviderInput | Message
    is_due: bool = False
    """Whether the message that is put to its allocation was deferred."""
    start: int = 0
    """How many effects there were before."""
    rows: list[_RowTaken] = field(default_factory=list)
    confirmed: set[tuple[ConnectionId, str]] = field(default_factory=set)
    answered: Counter[tuple[ConnectionId, str]] = field(default_factory=Counter)
    """Ends that were answered, by connection and allocation."""


class _RecordingState(State):
    """A state that takes down which rows are taken, and when a message is put to an allocation."""

    parts: list[_StepPart]

    def fire_message(self, message: Message, event: type[Event]) -> None:
        if event is on.MessageDispatched:
            is_due = message.state is MessageState.DEFERRED
            self.parts.append(_StepPart(self.freeze(), message, is_due, len(self.effects)))
        elif isinstance(message.question, AllocationEnded):
            key = message.connection, message.question.allocation_id
            if event is on.EndConfirmed:
                self.parts[-1].confirmed.add(key)
            elif event is on.TurnCame and message.state is MessageState.CONFIRMED:
                self.parts[-1].answered[key] += 1
        super().fire_message(message, event)

    def fire_allocation(
        self, allocation: Allocation, event: type[Event], cause: Any = None
    ) -> None:
        row = (allocation.allocation_id, event, allocation.state)
        self.parts[-1].rows.append(row)
        super().fire_allocation(allocation, event, cause)


class Comparer:
    """
    Compares a relation with the kernels that it makes.

    Args:
        relation: what a kernel may do.
        invariants: what must be so of every snapshot.
    """

    def __init__(
        self, relation: Relation | None = None, invariants: Iterable[Invariant] = INVARIANTS
    ) -> None:
        self.relation = relation or relation_of()
        self.taken: Counter[str] = Counter()
        """How often each transition was made."""
        self.rows: set[tuple[type[Event], Enum]] = set()
        """Rows of the table that were taken."""
        self.states = 0
        """Of how many allocations in how many moments the invariants were evaluated."""
        self._transitions: dict[str, list[Transition]] = {}
        for transition in self.relation.transitions:
            self._transitions.setdefault(transition.occurrence, []).append(transition)
        self._all = _compiled(self.relation, invariants, is_of_kernel=False)
        self._known = _compiled(self.relation, invariants, is_of_kernel=True)

    def kernel(self, provider: type[ProviderKernel] = ProviderKernel) -> type[ProviderKernel]:
        """Make kernels like `provider` that raise `RelationBroken`, for `Explorer(provider=…)`."""
        comparer = self
        base: Any = provider

        class RecordingKernel(base):  # type: ignore[misc]
            def __init__(self, limits: Limits | None = None) -> None:
                super().__init__(limits)
                self._state = _RecordingState(limits or Limits(), self.orders)

            def receive(self, event: ProviderInput) -> tuple[Effect, ...]:
                state = self._state
                assert isinstance(state, _RecordingState)
                state.parts = [_StepPart(self.snapshot(), event)]
                effects: tuple[Effect, ...] = super().receive(event)
                after = self.snapshot()
                comparer.check_step(state.parts, effects, after)
                # The explorer restores a kernel before each step, so that it never sees these.
                again = provider.restore(after, state.limits)._state
                if _derived(state) != _derived(again):
                    raise RelationBroken(f"derived: {_derived(state)}, not {_derived(again)}")
                return effects

        return RecordingKernel

    # --- Steps -------------------------------------------------------------------------------

    def check_step(
        self, parts: list[_StepPart], effects: tuple[Effect, ...], after: ProviderSnapshot
    ) -> None:
        """
        Compare a step of a kernel with the relation.

        Raises:
            RelationBroken: it is none, or it breaks an invariant.
        """
        event = parts[0].cause
        ends = [(part.before, part.start) for part in parts[1:]] + [(after, len(effects))]
        for part, (left, end) in zip(parts, ends, strict=True):
            for name in _names(part.before, left, event):
                is_freed = isinstance(event, on.NamespacesReleased) and event.allocation_id == name
                is_first = part is parts[0]
                before = _moment(part.before, name, is_due=is_freed and not is_first)
                now = _moment(left, name, is_due=is_freed)
                self._check_part(part, effects[part.start : end], name, before, now)
        for name in _names(after, after, event):
            self._evaluate(self._known, _moment(after, name), name)

    def _check_part(
        self,
        part: _StepPart,
        effects: tuple[Effect, ...],
        name: str,
        before: _Abstraction,
        now: _Abstraction,
    ) -> None:
        connections = before.connections | now.connections
        _suppose_ghosts(part, before)
        occurrence, inputs = _occurrence(part, name)
        if isinstance(part.cause, on.ConnectionOpened | on.ConnectionLost):
            connections |= {part.cause.connection}
        expected = before.values
        rows: tuple[tuple[type[Event], Enum], ...] = ()
        if occurrence in self._transitions:
            values = {**before.values, **inputs}
            transition = self._only_one(occurrence, values, connections, name)
            expected = _after(transition, values, connections)
            rows = transition.rows
            self.taken[transition.name] += 1
            self.rows |= set(rows)
        taken = tuple((event, state) for of, event, state in part.rows if of == name)
        if taken != rows:
            raise RelationBroken(f"{name}: the kernel takes {taken}, the relation {rows}")
        _note_effects(part, effects, name, before, now)
        found = _differences(expected, now.values, connections)
        if found:
            cause = occurrence or type(part.cause).__name__
            raise RelationBroken(f"{name}, {cause}: {'; '.join(found)}")

    def _only_one(
        self, occurrence: str, values: dict[str, Any], connections: set[int], name: str
    ) -> Transition:
        possible = [
            transition
            for transition in self._transitions[occurrence]
            if transition.is_made and transition.applies(values, connections)
        ]
        if len(possible) != 1:
            names = [transition.name for transition in possible]
            raise RelationBroken(f"{name}, {occurrence}: the relation has {names} for it")
        return possible[0]

    # --- Moments -----------------------------------------------------------------------------

    def check_world(self, setting: Setting, server: ServerState) -> None:
        """
        Evaluate all invariants on a world: what the backend and the connections know included.

        Raises:
            RelationBroken: one does not hold.
        """
        if not server.provider:
            return
        snapshot = setting.kernels.snapshot_of(server.provider)
        for index, name in enumerate(setting.kernels.names):
            moment = _moment(snapshot, name)
            jobs = server.nodes[index].jobs
            moment.values["releases"] = jobs.count(RELEASE_JOB)
            moment.values["creations"] = len(jobs) - jobs.count(RELEASE_JOB)
            confirmed = _confirmed(snapshot, name)
            # An answer to the end of the incarnation before may still be on its way.
            is_told = moment.values["announced"] or moment.values[STATE] in _OVER
            for link in server.links:
                number = link.number
                if number in moment.connections:
                    is_answered = link.told >> index & 1 or number in confirmed
                    moment.values["handed"][number] = bool(link.handed >> index & 1)
                    moment.values["answered"][number] = bool(is_told and is_answered)
                    moment.values["pushes"][number] = link.pushed >> index & 1
            self._evaluate(self._all, moment, name)

    def _evaluate(self, invariants: dict[str, Evaluated], moment: _Abstraction, name: str) -> None:
        self.states += 1
        for invariant, holds in invariants.items():
            if not holds(moment.values, moment.connections):
                raise RelationBroken(f"{name}: {invariant} does not hold: {told(moment.values)}")


def _compiled(
    relation: Relation, invariants: Iterable[Invariant], *, is_of_kernel: bool
) -> dict[str, Evaluated]:
    return {
        each.name: compiled(each.term(relation.before()))
        for each in invariants
        if not (is_of_kernel and each.names(relation) & _GHOSTS)
    }


# --- Snapshots as values -----------------------------------------------------------------------


@dataclass
class _Abstraction:
    """The variables of one allocation at one moment, and the connections there are."""

    values: dict[str, Any]
    connections: set[int]


def _moment(snapshot: ProviderSnapshot, name: str, *, is_due: bool = False) -> _Abstraction:
    """Say what a snapshot says of an allocation, by variable."""
    values: dict[str, Any] = {each.name: _zero(each.sort) for each in _ALONE}
    for each in _EACH:
        values[each.name] = defaultdict(int if each.sort is Sort.COUNT else bool)
    values[STATE] = AllocationState.UNKNOWN
    if name in snapshot.remembered:
        values[STATE] = AllocationState.RELEASED
    connections = set()
    for connection in snapshot.connections:
        connections.add(connection.number)
        values["open"][connection.number] = True
        values["closing"][connection.number] = connection.is_closing
        for message in connection.messages:
            counted = _count_of(message.question, message.state, name)
            if counted is not None:
                counted = "due" if counted == "deferred" and is_due else counted
                values[counted][connection.number] += 1
    for allocation in snapshot.allocations:
        if allocation.allocation_id == name:
            _read_allocation(allocation, values)
            named = (*allocation.asked, *allocation.parties, *allocation.holders)
            connections |= {*named, *allocation.deferred}
    return _Abstraction(values, connections)


def _read_allocation(allocation: AllocationSnapshot, values: dict[str, Any]) -> None:
    values[STATE] = allocation.state
    values["being_made"] = allocation.is_being_made
    values["has_response"] = allocation.response is not None
    values["populated"] = allocation.is_populated
    values["announced"] = allocation.is_announced
    for timer, variable in TIMERS.items():
        values[variable] = timer in allocation.timers
    sets = {"asked": allocation.asked, "party": allocation.parties, "holder": allocation.holders}
    for variable, numbers in sets.items():
        values[variable].update(dict.fromkeys(numbers, True))
    for number in allocation.deferred:
        values["queued"][number] += 1


def _derived(state: State) -> tuple[object, ...]:
    """Say what a state keeps besides what is in its snapshot."""
    usage = {
        uid: (used.connections, used.messages, used.allocations)
        for uid, used in state.usage.items()
        if used.connections or used.messages or used.allocations
    }
    return usage, {number: each.concerns for number, each in state.connections.items()}


def _confirmed(snapshot: ProviderSnapshot, name: str) -> set[int]:
    """List the connections on which the answer to an end of it waits for its turn."""
    return {
        connection.number
        for connection in snapshot.connections
        for message in connection.messages
        if message.state is MessageState.CONFIRMED and message.question == AllocationEnded(name)
    }


def _count_of(question: object, state: MessageState, name: str) -> str | None:
    match question:
        case NamespaceRequest(allocation_id=of) if of == name:
            return REQUESTS.get(state)
        case AllocationEnded(allocation_id=of) if of == name:
            return ENDS.get(state)
        case _:
            return None


def _zero(sort: Sort) -> int | bool:
    return 0 if sort is Sort.COUNT else False


def _names(before: ProviderSnapshot, after: ProviderSnapshot, event: object) -> list[str]:
    """List every allocation that is named anywhere."""
    names = {getattr(event, "allocation_id", "")}
    if isinstance(event, on.RequestReceived):
        names.add(event.request.allocation_id)
    for snapshot in (before, after):
        names.update(snapshot.remembered)
        names.update(allocation.allocation_id for allocation in snapshot.allocations)
        for connection in snapshot.connections:
            for message in connection.messages:
                if message.question is not None:
                    names.add(message.question.allocation_id)
    return sorted(names - {""})


# --- Steps as occurrences ----------------------------------------------------------------------


def _occurrence(part: _StepPart, name: str) -> tuple[str, dict[str, Any]]:
    """Name what happens to an allocation, with what is to be known of it; "": nothing."""
    cause = part.cause
    inputs: dict[str, Any] = {"acting": getattr(cause, "connection", None)}
    if isinstance(cause, Message):
        question = cause.question
        if question is None or question.allocation_id != name:
            return "", inputs
        if isinstance(question, AllocationEnded):
            return "an end arrives", inputs
        known = [a.request for a in part.before.allocations if a.allocation_id == name]
        inputs["is_it_refused"] = not any(of == name for of, *_ in part.rows)
        inputs["is_it_the_same_request"] = known == [question]
        return ("a deferred request's turn comes" if part.is_due else "a request arrives"), inputs
    if isinstance(cause, on.ProviderStopping):
        return "the provider stops", inputs
    is_for_all = isinstance(cause, on.ConnectionOpened | on.ConnectionLost)
    is_for_it = getattr(cause, "allocation_id", None) == name
    return (type(cause).__name__ if is_for_all or is_for_it else ""), inputs


def _suppose_ghosts(part: _StepPart, before: _Abstraction) -> None:
    """Suppose what the kernel cannot know, as the invariants say that it is."""
    values, cause = before.values, part.cause
    is_ended = values[STATE] is AllocationState.ENDED
    values["releases"] = int(is_ended and not values["retry_timer"])
    values["creations"] = int(values["being_made"])
    if isinstance(cause, on.ResponseSent | on.ResponseNotSent):
        values["sending"][cause.connection] = 1


def _note_effects(
    part: _StepPart, effects: tuple[Effect, ...], name: str, before: _Abstraction, now: _Abstraction
) -> None:
    """Say what the ghosts are afterwards, by the effects that there are."""
    cause, old, new = part.cause, before.values, now.values
    asked = {"creations": do.CreateNamespaces, "releases": do.ReleaseNamespaces}
    for ghost, kind in asked.items():
        orders = [each for each in effects if isinstance(each, kind) and _is_of(each, name)]
        is_report = isinstance(cause, _REPORTS[ghost]) and _is_of(cause, name)
        new[ghost] = old[ghost] + len(orders) - is_report
    for connection in old["sending"]:
        new["sending"][connection] = old["sending"][connection]
    if isinstance(cause, on.ResponseSent | on.ResponseNotSent) and _is_of(cause, name):
        new["sending"][cause.connection] -= 1
        if isinstance(cause, on.ResponseSent) and old["open"][cause.connection]:
            new["handed"][cause.connection] = True
    for effect in effects:
        if isinstance(effect, do.HandOver) and _is_of(effect, name):
            # An answer's turn came, after the rest: as if it had not yet.
            if old["closing"][effect.connection]:
                raise RelationBroken(f"{name} is handed over to what is being closed")
            new["granted"][effect.connection] += 1
        if isinstance(effect, do.AnnounceEnd) and _is_of(effect, name):
            new["pushes"][effect.connection] += 1
    for (connection, of), count in part.answered.items():
        if of == name:
            new["pushes"][connection] -= count
    for connection, of in part.confirmed:
        if of == name:
            new["answered"][connection] = True


def _is_of(thing: Any, name: str) -> bool:
    subject = getattr(thing, "response", None) or getattr(thing, "request", None) or thing
    return bool(getattr(subject, "allocation_id", None) == name)


def _after(transition: Transition, values: dict[str, Any], connections: set[int]) -> dict[str, Any]:
    """Evaluate the variables after a transition."""
    after = dict(values)
    each = {declared.name for declared in _EACH}
    for name, value in transition.values.items():
        if name in each:
            after[name] = {c: value({**values, "any": c}, connections) for c in connections}
        else:
            after[name] = value(values, connections)
    return after


def _differences(
    expected: dict[str, Any], found: dict[str, Any], connections: Iterable[Hashable]
) -> list[str]:
    """Compare, but for what may follow at any time: a close, and that a name is forgotten."""
    lines = []
    for name in (STATE, *(each.name for each in _ALONE)):
        is_forgotten = name == STATE and (expected[name], found[name]) == (
            AllocationState.RELEASED,
            AllocationState.UNKNOWN,
        )
        if expected[name] != found[name] and not is_forgotten:
            lines.append(f"{name} is {found[name]}, not {expected[name]}")
    for each in _EACH:
        for connection in connections:
            want, got = expected[each.name][connection], found[each.name][connection]
            if want != got and not (each.name == "closing" and got):
                lines.append(f"{each.name} of {connection} is {got}, not {want}")
    return lines
