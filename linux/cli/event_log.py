"""`EventLog`: log every event of a provider, with the transition of its allocation."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any, Final, TypeAlias

from statemachine import effects as do
from statemachine import events as on
from statemachine.effects import Effect
from statemachine.events import ProviderInput, allocation_of
from statemachine.lifecycle import ALLOCATION
from statemachine.provider import ProviderKernel
from statemachine.record import fields_of
from statemachine.states import AllocationState

_UNKNOWN: Final = AllocationState.UNKNOWN

_EventRecord: TypeAlias = tuple[str, Mapping[str, Any]]
"""The name of an event, and its fields."""


class EventLog:
    """
    Logs every event of a provider, with the transition of its allocation: an `Observer`.

    The name of an event in the log is that of its class in snake case. An event that moves further
    allocations (readiness, after which waiting requests are handled) is logged again for each.

    Args:
        tell: Logs an event: is given what makes its name and fields, at any later time and in any
            thread.
    """

    kernel: ProviderKernel

    def __init__(self, tell: Callable[[Callable[[], _EventRecord]], None]) -> None:
        self._tell: Final = tell
        self._states: dict[str, AllocationState] = {}
        self._delays: dict[str, str] = {}
        """The reason that was last logged for a release that is not finished."""

    def __call__(self, event: ProviderInput, effects: tuple[Effect, ...]) -> None:
        """Log one event."""
        name = allocation_of(event)
        if self._is_repetition(event):
            return
        self._write(event, effects, name)
        for other in {allocation_of(effect) for effect in effects} - {name, ""}:
            if self.kernel.state_of(other) is not self._states.get(other, _UNKNOWN):
                self._write(event, effects, other)

    def _is_repetition(self, event: ProviderInput) -> bool:
        """Say whether it is another try to release, with the same reason as before."""
        if isinstance(event, on.NamespacesReleased):
            self._delays.pop(event.allocation_id, None)
        if isinstance(event, on.ReleaseDelayed):
            before = self._delays.get(event.allocation_id)
            self._delays[event.allocation_id] = event.reason
            return before == event.reason
        return isinstance(event, on.RetryDue)

    def _write(self, event: ProviderInput, effects: tuple[Effect, ...], name: str) -> None:
        states = self._move(name) if name else None
        self._tell(partial(_record_of, event, effects, name, states))

    def _move(self, name: str) -> tuple[AllocationState, AllocationState]:
        """Return in which state an allocation was, and in which it is."""
        before = self._states.pop(name, _UNKNOWN)
        after = self.kernel.state_of(name)
        if after not in (_UNKNOWN, AllocationState.RELEASED):
            self._states[name] = after
        return before, after


def _record_of(
    event: ProviderInput,
    effects: tuple[Effect, ...],
    name: str,
    states: tuple[AllocationState, AllocationState] | None,
) -> _EventRecord:
    fields: dict[str, Any] = {"allocation_id": name} if name else {}
    if states is not None:
        before, after = states
        if before is not after or ALLOCATION.row(type(event), before) is not None:
            fields |= {"from": before.value, "to": after.value}
    fields |= _details_of(event)
    fields["effects"] = [_word_for(effect) for effect in effects]
    return _snake(type(event).__name__), fields


@cache
def _snake(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


def _details_of(event: ProviderInput) -> dict[str, Any]:
    """Return further fields of an event."""
    fields = fields_of(event)
    details = {name: fields[name] for name in ("connection", "uid", "reason") if fields.get(name)}
    if isinstance(event, on.ConnectionOpened):
        details["uid"] = event.uid
    if "error" in fields:
        details["error"] = str(fields["error"])
    request = fields.get("request")
    if request is not None:
        details["namespaces"] = [kind.value for kind in request.namespaces]
        details["uenv_image"] = request.uenv_image
    return details


def _word_for(effect: Effect) -> str:
    """Return the name of an effect, with its timer or error."""
    word = _snake(type(effect).__name__)
    if isinstance(effect, do.StartTimer | do.StopTimer):
        return f"{word}:{effect.timer.value}"
    if isinstance(effect, do.Refuse):
        return f"{word}:{type(effect.error).__name__}"
    return word
