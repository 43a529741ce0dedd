"""A reference model beside a kernel, event by event: the same effects, or a difference.

Where the model says that an event is impossible, the kernel must raise a `ProtocolError`, of whose
fault it is if the model says so, and stay as it was.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from types import BuiltinFunctionType, FunctionType
from typing import Any, Final, Generic, Protocol, TypeVar

from ...effects import Effect
from ...errors import LocalProtocolError, ProtocolError, RemoteProtocolError
from ...events import Event


class Receiver(Protocol):
    """A kernel: ours, or yours."""

    def receive(self, event: Any, /) -> Sequence[Effect]:
        """Take an event; return what shall be done, or raise `ProtocolError` and change nothing."""


K = TypeVar("K", bound=Receiver)
S = TypeVar("S")


class Difference(AssertionError):
    """The kernel and the model do not agree."""


def differing_effects(effects: Sequence[Effect], said: Any) -> list[str]:
    """Compare effects with those that a model says, one by one."""
    ours, its = list(effects), list(said)
    return [] if ours == its else [f"the kernel asks for {ours}, the model for {its}"]


@dataclass(frozen=True)
class Reference(Generic[S]):
    """A model that says what a kernel must do: a function from a state and an event."""

    step: Callable[[Any, Any], tuple[S, Any]]
    """Returns the state afterwards, and what the effects must be; raises if an event cannot be."""
    impossible: type[Exception]
    """What it raises. With an attribute `whose`, "ours" or "peer's", the fault is compared."""
    initial: S | None = None
    """The model's state in the beginning."""
    differences: Callable[[Sequence[Effect], Any], list[str]] = differing_effects
    """Compares the effects with what the model says; lists differences."""
    other_states: Callable[[Any, Any], list[str]] = lambda kernel, state: []
    """Compares the kernel's state with the model's; lists differences."""
    is_lax: Callable[[Any, Any], bool] = lambda state, event: False
    """Whether a kernel may take an event that the model says cannot be."""

    def taken(self, kernel: K, state: S, event: Event) -> tuple[K, S, tuple[Effect, ...] | None]:
        """
        Put an event to a kernel and to the model.

        Returns:
            Both afterwards, and the effects; None: it cannot be, and both refused it. The kernel is
            the one that was given, and has changed.

        Raises:
            Difference: they do not agree.
        """
        try:
            after, said = self.step(state, event)
        except self.impossible as impossible:
            return self._refused(kernel, state, event, impossible), state, None
        try:
            effects = kernel.receive(event)
        except ProtocolError as error:
            raise Difference(f"the kernel does not take {event}: {error}") from None
        found = self.differences(effects, said) + self.other_states(kernel, after)
        if found:
            raise Difference(f"{event}: {found}")
        return kernel, after, tuple(effects)

    def _refused(self, kernel: K, state: S, event: Event, impossible: Exception) -> K:
        """Put an event to a kernel that cannot be."""
        spare = copy.deepcopy(kernel) if self.is_lax(state, event) else None
        before = snapshot_of(kernel)
        whose = getattr(impossible, "whose", None)
        try:
            kernel.receive(event)
        except ProtocolError as error:
            is_alike = whose in (None, _WHOSE[type(error)])
            if not is_alike or snapshot_of(kernel) != before:
                raise Difference(f"{error} changed something, or is {whose}") from None
            return kernel
        if spare is None:
            raise Difference(f"the kernel takes {event}, which cannot be")
        return spare


_WHOSE: Final = {LocalProtocolError: "ours", RemoteProtocolError: "peer's"}


# --- What a kernel is known by -----------------------------------------------------------------


def snapshot_of(kernel: Any) -> object:
    """Take a snapshot of a kernel that can give one; None of another."""
    return kernel.snapshot() if hasattr(kernel, "snapshot") else None


def identity_of(kernel: Any) -> object:
    """Say what tells a kernel from another: its snapshot, or else all that `copy` would copy."""
    return snapshot_of(kernel) or _frozen(kernel)


_ATOMS: Final = (type, str, int, float, bytes, Enum, FunctionType, BuiltinFunctionType)
"""What `copy` takes as it is."""


def _frozen(value: Any) -> object:
    """Make a value that is equal when all that `copy` would copy is equal."""
    if value is None or isinstance(value, _ATOMS):
        return value
    if isinstance(value, dict):
        return tuple((_frozen(key), _frozen(each)) for key, each in value.items())
    if isinstance(value, set | frozenset):
        return frozenset(map(_frozen, value))
    if isinstance(value, list | tuple | deque):
        return tuple(map(_frozen, value))
    return tuple(
        _frozen(part if isinstance(part, dict | tuple | None) else list(part))
        for part in value.__reduce_ex__(2)[1:]
    )
