"""The real kernels, one step at a time, and beside each the reference model in lock-step.

A kernel is known by a number that stands for its snapshot *and* for the state that the model has
come to by the same events: the model keeps some things in another way, so neither follows from the
other. Each distinct step is taken once, and judged once: the same effects, and the same states.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, is_dataclass, replace
from enum import Enum
from typing import Any

from specs import invariants as always
from specs import model

from ...consumer import ConsumerKernel
from ...effects import Effect
from ...errors import (
    AllocationNotFound,
    CreationFailed,
    ProtocolError,
    RemoteProtocolError,
)
from ...events import ConsumerInput, Event, ProviderInput
from ...messages import (
    AllocationEnded,
    Message,
    NamespaceRequest,
    NamespaceResponse,
)
from ...provider import Limits, ProviderKernel
from ...snapshots import AllocationSnapshot, ConsumerSnapshot, ProviderSnapshot
from ...states import AllocationState, ConsumerState, NoticeState, ServiceState
from ..kit import RowKey
from ..lockstep import model_limits, other_states
from .world import Bounds, Numbers, Violation

Permutation = tuple[int, ...]
"""For each allocation the index of the one whose name it gets; empty: as they are."""


@dataclass(frozen=True, slots=True)
class ProviderView:
    """What is looked at of a provider's kernel."""

    service: ServiceState
    states: tuple[AllocationState, ...]
    numbers: tuple[int, ...]
    """Every connection that the snapshot mentions."""


@dataclass(frozen=True, slots=True)
class ConsumerView:
    """What is looked at of a consumer's kernel."""

    request: NamespaceRequest
    name: int
    hold: ConsumerState
    notice: NoticeState
    is_connected: bool
    owes_end: bool


@dataclass(slots=True)
class Reaction:
    """What one kernel did with one event."""

    after: int
    effects: tuple[Effect, ...]
    rows: tuple[RowKey, ...]
    uses: int = 0


class Kernels:
    """Every kernel that has come about, by number; `has_model`: the model judges each step."""

    def __init__(
        self,
        bounds: Bounds,
        provider: type[ProviderKernel],
        consumer: type[ConsumerKernel],
        *,
        has_model: bool,
    ) -> None:
        self.names = bounds.names
        self.messages: Numbers[Message] = Numbers()
        self.provider_views: list[Any] = [None]
        self.consumer_views: list[Any] = [None]
        self.decided: tuple[Effect, ...] = ()
        """What the provider's kernel has decided last, be it right or wrong."""
        self.rows: list[RowKey] = []
        """The rows that tables have noted in the step that is being taken."""
        self._limits = bounds.limits or Limits()
        self._provider = provider
        self._consumer = consumer
        self._has_model = has_model
        self._index = {name: i for i, name in enumerate(self.names)}
        self._providers: Numbers[tuple[ProviderSnapshot, Any]] = Numbers()
        self._consumers: Numbers[tuple[ConsumerSnapshot, Any]] = Numbers()
        self._provider_steps: dict[tuple[int, ProviderInput], Reaction] = {}
        self._consumer_steps: dict[tuple[int, ConsumerInput], Reaction | None] = {}
        self._renamed: dict[tuple[int, Permutation, str | tuple[int, ...]], int] = {}

    def index_of(self, name: str) -> int:
        """Say which allocation has a name."""
        return self._index[name]

    @property
    def steps(self) -> int:
        """How many distinct steps were taken."""
        return len(self._provider_steps) + len(self._consumer_steps)

    def hits(self) -> Counter[RowKey]:
        """Count how often each row was taken, each time that a step was asked for."""
        found: Counter[RowKey] = Counter()
        for step in (*self._provider_steps.values(), *self._consumer_steps.values()):
            for row in step.rows if step else ():
                found[row] += step.uses if step else 0
        return found

    # --- The provider --------------------------------------------------------------------------

    def new_provider(self, remembered: Iterable[str] = ()) -> int:
        """Start a provider that remembers names of what was released."""
        names = tuple(remembered)
        kernel = self._provider(self._limits)
        kernel.remember(names)
        started = None
        if self._has_model:
            started = model.Provider(limits=model_limits(self._limits), remembered=names)
        return self._number_provider(kernel, started)

    def step_provider(self, number: int, event: ProviderInput) -> Reaction:
        """Feed the provider's kernel; raises `Violation` or `InvariantBroken` if it errs."""
        key = (number, event)
        step = self._provider_steps.get(key)
        if step is None:
            step = self._provider_steps[key] = self._take_provider_step(number, event)
        step.uses += 1
        self.decided = step.effects
        return step

    def snapshot_of(self, number: int) -> ProviderSnapshot:
        """Look up the snapshot of a provider."""
        snapshot: ProviderSnapshot = self._providers.things[number][0]
        return snapshot

    def _take_provider_step(self, number: int, event: ProviderInput) -> Reaction:
        before, known = self._providers.things[number]
        kernel = self._provider.restore(before, self._limits)
        self.rows.clear()
        self.decided = ()
        try:
            effects = self.decided = kernel.receive(event)
        except ProtocolError as error:
            always.require(always.an_error_changes_nothing(before, kernel.snapshot()))
            raise Violation(f"the provider's kernel refuses its driver: {error}") from error
        rows = tuple(self.rows)
        if known is not None:
            known = _follow(model.provider_step, known, event, effects, kernel)
        return Reaction(self._number_provider(kernel, known), effects, rows)

    def _number_provider(self, kernel: ProviderKernel, known: Any) -> int:
        snapshot = kernel.snapshot()
        number = self._providers.of((snapshot, known))
        if number == len(self.provider_views):
            again = self._provider.restore(snapshot, self._limits)
            if again.snapshot() != snapshot:
                raise Violation("a snapshot of the provider's kernel does not restore it")
            states = tuple(kernel.state_of(name) for name in self.names)
            numbers = {connection.number for connection in snapshot.connections}
            for a in snapshot.allocations:
                numbers.update(a.asked, a.parties, a.holders, a.deferred)
            view = ProviderView(kernel.service, states, tuple(sorted(numbers)))
            self.provider_views.append(view)
        return number

    # --- The consumers -------------------------------------------------------------------------

    def new_consumer(self, request: NamespaceRequest) -> int:
        """Start a consumer's kernel."""
        started = model.Consumer(request) if self._has_model else None
        return self._number_consumer(self._consumer(request), started)

    def step_consumer(self, number: int, event: ConsumerInput) -> Reaction | None:
        """
        Feed a consumer's kernel; None: the provider may not say that now.

        Raises:
            Violation, InvariantBroken: it refuses what its driver says, or does what it must not.
        """
        key = (number, event)
        if key not in self._consumer_steps:
            self._consumer_steps[key] = self._take_consumer_step(number, event)
        step = self._consumer_steps[key]
        if step is not None:
            step.uses += 1
        return step

    def _take_consumer_step(self, number: int, event: ConsumerInput) -> Reaction | None:
        before, known = self._consumers.things[number]
        kernel = self._consumer.restore(before)
        self.rows.clear()
        try:
            effects = kernel.receive(event)
        except RemoteProtocolError:
            always.require(always.an_error_changes_nothing(before, kernel.snapshot()))
            if known is not None and not _is_impossible(known, event):
                raise Violation(f"the kernel takes no {event}, and the model does") from None
            return None
        except ProtocolError as error:
            raise Violation(f"the consumer's kernel refuses its driver: {error}") from error
        rows = tuple(self.rows)
        if known is not None:
            known = _follow(model.consumer_step, known, event, effects, kernel)
        return Reaction(self._number_consumer(kernel, known), effects, rows)

    def _number_consumer(self, kernel: ConsumerKernel, known: Any) -> int:
        snapshot = kernel.snapshot()
        number = self._consumers.of((snapshot, known))
        if number == len(self.consumer_views):
            if self._consumer.restore(snapshot).snapshot() != snapshot:
                raise Violation("a snapshot of the consumer's kernel does not restore it")
            request, name = kernel.request, self._index[kernel.request.allocation_id]
            held = (kernel.state, kernel.notice, kernel.is_connected, kernel.owes_end)
            self.consumer_views.append(ConsumerView(request, name, *held))
        return number

    # --- Other names ---------------------------------------------------------------------------

    def rename_message(self, number: int, permutation: Permutation) -> int:
        """Find the message that says the same of other allocations."""
        key = (number, permutation, "message")
        if number and key not in self._renamed:
            message = self._namer((), permutation).of(self.messages.things[number])
            self._renamed[key] = self.messages.of(message)
        return self._renamed[key] if number else 0

    def rename_consumer(self, number: int, permutation: Permutation) -> int:
        """Find the consumer that is the same with another allocation."""
        key = (number, permutation, "consumer")
        if number and key not in self._renamed:
            namer = self._namer((), permutation)
            snapshot, known = self._consumers.things[number]
            kernel = self._consumer.restore(namer.of(snapshot))
            self._renamed[key] = self._number_consumer(kernel, namer.of_model(known))
        return self._renamed[key] if number else 0

    def rename_provider(
        self, number: int, connections: tuple[int, ...], permutation: Permutation
    ) -> int:
        """
        Find the provider that is the same under other names, in its normal form.

        Its `connections` are numbered 1, 2, 3, … in this order; none: they stay as they are.
        """
        key = (number, permutation, connections)
        if key not in self._renamed:
            namer = self._namer(connections, permutation)
            snapshot, known = self._providers.things[number]
            kernel = self._provider.restore(namer.of_provider(snapshot), self._limits)
            if known is not None:
                known = namer.in_order(namer.of_model(known))
            self._renamed[key] = self._number_provider(kernel, known)
        return self._renamed[key]

    def _namer(self, connections: tuple[int, ...], permutation: Permutation) -> _Namer:
        names = (
            {name: self.names[permutation[i]] for i, name in enumerate(self.names)}
            if permutation
            else {}
        )
        is_any_forgotten = len(self.names) > self._limits.remembered
        return _Namer({c: i for i, c in enumerate(connections, 1)}, names, is_any_forgotten)


def _follow(
    take: Callable[[Any, Event], Any],
    known: Any,
    event: Event,
    effects: tuple[Effect, ...],
    kernel: ProviderKernel | ConsumerKernel,
) -> Any:
    """Have the model take the same step, and compare."""
    try:
        after, said = take(known, event)
    except model.Impossible as impossible:
        raise Violation(f"the model knows no way to {event}: {impossible}") from impossible
    always.require(model.differences(effects, said) + other_states(kernel, after))
    return after


def _is_impossible(known: Any, event: ConsumerInput) -> bool:
    try:
        model.consumer_step(known, event)
    except model.Impossible as impossible:
        return impossible.whose == "peer's"
    return False


class _Namer:
    """Other numbers for connections and other names for allocations, throughout a state."""

    def __init__(
        self, numbers: dict[int, int], names: dict[str, str], is_any_forgotten: bool
    ) -> None:
        self._numbers = numbers
        self._names = names
        self._is_any_forgotten = is_any_forgotten

    def of(self, thing: Any) -> Any:
        """Rename what a message, an error or a tuple says."""
        name = self._name
        match thing:
            case tuple() if hasattr(thing, "_fields"):
                return type(thing)(*map(self.of, thing))
            case tuple():
                return tuple(map(self.of, thing))
            case NamespaceRequest():
                return NamespaceRequest(
                    name(thing.allocation_id), thing.namespaces, thing.uenv_image
                )
            case NamespaceResponse():
                mount = thing.uenv_mount_path
                return NamespaceResponse(name(thing.allocation_id), thing.fd_types, mount)
            case AllocationEnded():
                return AllocationEnded(name(thing.allocation_id))
            case AllocationNotFound():
                return AllocationNotFound(name(thing.allocation_id))
            case CreationFailed():
                return CreationFailed(self._text(thing.reason))
            case _:
                return thing

    def of_model(self, thing: Any) -> Any:
        """
        Rename what a state of the model says, which is made of plain values.

        Every number in it but those of its limits is a connection's, from 1 on, or a user's, 0.
        """
        match thing:
            case bool() | None | Enum() | model.Limits():
                return thing
            case int():
                return self._number(thing)
            case str():
                return self._name(thing)
            case dict():
                items = sorted((self.of_model(k), self.of_model(v)) for k, v in thing.items())
                return type(thing)(items)
            case tuple() if hasattr(thing, "_fields"):
                return type(thing)(*map(self.of_model, thing))
            case tuple() | frozenset():
                return type(thing)(map(self.of_model, thing))
            case _ if is_dataclass(thing) and not isinstance(thing, type):
                parts = {f.name: self.of_model(getattr(thing, f.name)) for f in fields(thing)}
                return replace(thing, **parts)
            case _:
                return self.of(thing)

    def in_order(self, known: Any) -> Any:
        """
        Bring what a provider's model keeps into an order of which all counts.

        When the provider is ready, what waits does so for a release: only what is about the same
        allocation has an order.
        """
        is_ready = known.phase != ServiceState.STARTING.value
        waiting = sorted(known.waiting, key=_name_in) if is_ready else known.waiting
        return known._replace(waiting=tuple(waiting), remembered=self.in_memory(known.remembered))

    def of_provider(self, snapshot: ProviderSnapshot) -> ProviderSnapshot:
        """Rename what a provider's snapshot says."""
        number = self._number
        return snapshot._replace(
            connections=tuple(
                c._replace(number=number(c.number), messages=self.of(c.messages))
                for c in snapshot.connections
            ),
            allocations=tuple(sorted(map(self._allocation, snapshot.allocations), key=_name_of)),
            held=tuple(m._replace(connection=number(m.connection)) for m in snapshot.held),
            remembered=self.in_memory(tuple(map(self._name, snapshot.remembered))),
        )

    def _allocation(self, a: AllocationSnapshot) -> AllocationSnapshot:
        return a._replace(
            allocation_id=self._name(a.allocation_id),
            request=self.of(a.request),
            response=self.of(a.response),
            asked=frozenset(map(self._number, a.asked)),
            parties=frozenset(map(self._number, a.parties)),
            holders=frozenset(map(self._number, a.holders)),
            deferred=tuple(map(self._number, a.deferred)),
            failure=self._text(a.failure),
        )

    def in_memory(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """The order of what is remembered counts only where something may be forgotten."""
        return names if self._is_any_forgotten else tuple(sorted(names))

    def _number(self, number: int) -> int:
        return self._numbers.get(number, number)

    def _name(self, name: str) -> str:
        return self._names.get(name, name)

    def _text(self, text: str) -> str:
        words = text.split(" ")
        for i, word in enumerate(words[:-1]):
            if word == "allocation":
                words[i + 1] = self._name(words[i + 1])
        return " ".join(words)


def _name_in(waiting: tuple[int, Any]) -> str:
    name: str = waiting[1].allocation_id
    return name


def _name_of(allocation: AllocationSnapshot) -> str:
    return allocation.allocation_id
