"""The reference model as the judge of a provider's trace, whichever implementation wrote it.

A trace is held to `specs.model`, and our kernel is not asked. What is compared is what the book
demands: each message on the wire in the order of its connection, and what is made and released.
The text of a reason is free; so is the order between connections. Timers, watches and the note of a
hand-over are a provider's own affair, and may be left out; one that is there must be right.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Final

from specs import invariants, model
from statemachine import effects as do
from statemachine.effects import Effect
from statemachine.errors import LocalProtocolError, ProtocolError, RemoteProtocolError
from statemachine.events import AllocationEvent, ConnectionId, PeerEvent, ProviderInput
from statemachine.provider import Limits
from statemachine.states import AllocationState, ServiceState
from statemachine.testing.lockstep import model_limits

from ..trace.check import Objection
from ..trace.clauses import ORDER, RESPONSE, clauses_of_effects

FREE: Final = (do.StartTimer, do.StopTimer, do.Watch, do.RecordHandoff)
"""Effects that the wire and the node do not show: a trace may be without them."""

_FAULTS: Final[dict[str, type[ProtocolError]]] = {
    "ours": LocalProtocolError,
    "peer's": RemoteProtocolError,
}


class ModelJudge:
    """
    The reference model: what the book demands, and no more.

    Args:
        limits: the provider's.
    """

    def __init__(self, limits: Limits) -> None:
        self._state = model.Provider(model_limits(limits))
        self._effects: list[Effect] = []
        """Of the last event, with ends that are pushed told from those that answer."""

    @property
    def service(self) -> ServiceState:
        """The provider's own state."""
        return ServiceState(self._state.phase)

    def state_of(self, allocation_id: str) -> AllocationState:
        """Say how far an allocation has come."""
        return AllocationState(self._state.state_of(allocation_id))

    def remember(self, names: Iterable[str], /) -> None:
        """Take over the names of what was released before the start, oldest first."""
        kept = tuple(dict.fromkeys(names))
        first = max(0, len(kept) - self._state.limits.remembered)
        self._state = self._state._replace(remembered=kept[first:])

    def receive(self, event: ProviderInput, /) -> tuple[Effect, ...]:
        """Return what a provider does now; raise `ProtocolError` where the event cannot be."""
        try:
            self._state, self._effects = model.provider_step(self._state, event)
        except model.Impossible as impossible:
            raise self._refusal(event, impossible) from None
        return tuple(map(_plain, self._effects))

    def _refusal(self, event: ProviderInput, impossible: model.Impossible) -> ProtocolError:
        subject, state = "the provider", self._state.phase
        if isinstance(event, AllocationEvent):
            name = event.allocation_id
            subject, state = f"allocation {name}", self._state.state_of(name)
        elif isinstance(event, PeerEvent):
            subject, state = f"connection {event.connection}", self._connection(event.connection)
        return _FAULTS[impossible.whose](type(event).__name__, state, subject)

    def _connection(self, number: ConnectionId) -> str:
        peer = self._state.peers.get(number)
        if peer is None:
            return "not open"
        is_read = not peer.is_closed and all(entry.message for entry in peer.queue)
        return "open" if is_read else "closing"

    def objection(
        self, event: ProviderInput, found: tuple[Effect, ...], expected: tuple[Effect, ...]
    ) -> Objection | None:
        """Compare what a provider did with what `receive` returned."""
        response = getattr(event, "response", None)
        allocation = self._state.allocations.get(getattr(event, "allocation_id", ""))
        if response is not None and allocation is not None:
            wrong = invariants.response_answers_its_request(allocation.request, response)
            if wrong:
                return Objection(f"has a wrong response: {wrong[0]}", RESPONSE)
        missing = Counter(map(model.comparable, expected)) - Counter(map(model.comparable, found))
        demanded = [
            effect
            for effect in self._effects
            if not (isinstance(effect, FREE) and missing[model.comparable(effect)])
        ]
        if not model.differences(found, demanded):
            return None
        kinds = {model.comparable(effect): effect for effect in (*expected, *found)}
        count = Counter(map(model.comparable, found))
        count.subtract(Counter(map(model.comparable, demanded)))
        effects = [kinds[what] for what, number in count.items() if number]
        return Objection("has other effects", clauses_of_effects(effects) or ORDER)


def _plain(effect: Effect) -> Effect:
    if isinstance(effect, model.PushedEnd):
        return do.AnnounceEnd(effect.connection, effect.allocation_id)
    return effect
