"""Kernel and reference model in an open environment: every event, in every state, in lock-step.

    compared = compare(OpenEnvironment(allocations=1, connections=2, messages=2))
    compared.snapshots, compared.steps, compared.left_out

Every event that the environment may feed is put to both: they refuse it alike, or do the same. That
includes the words of reasons and the order of effects across connections. The search is breadth
first and follows every pair of a kernel's snapshot and a model's state, so that the script of a
difference is as short as any.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple, get_args

from specs import model

from .. import events as on
from ..events import ProviderInput
from ..provider import Limits, ProviderKernel
from .kit import Difference, Reached
from .lockstep import model_limits, taken
from .open_environment import (
    OpenEnvironment,
    OpenState,
    after_crash,
    after_event,
    events_of,
    first_state,
    may_be,
)

DEATH: Final = "the provider dies"
"""Stands in a script for the death of a provider, which is no event."""


class _KernelAndModel(NamedTuple):
    """A kernel, and the model beside it."""

    open: OpenState
    model: model.Provider


@dataclass
class Compared:
    """What was compared."""

    snapshots: int = 0
    """Distinct snapshots of the kernel."""
    steps: int = 0
    """Distinct steps of the kernel: a snapshot, and an event that it took."""
    refused: int = 0
    """Events that both refused, each with a snapshot."""
    pairs: int = 0
    """Distinct pairs of a snapshot, with what is not reported yet, and a state of the model."""
    left_out: tuple[str, ...] = ()
    """Events that this environment does not feed, by name."""
    is_complete: bool = True
    """False: `pairs_max` was reached first."""


def compare(
    environment: OpenEnvironment,
    kernel: type[ProviderKernel] = ProviderKernel,
    pairs_max: int | None = None,
) -> Compared:
    """
    Compare a kernel with the model in every state that an environment leads to.

    Args:
        environment: what there is, and what may happen.
        kernel: the kernel, or a variant of it.
        pairs_max: stop when there are so many; None: go on to the end.

    Raises:
        ViolatingPath: they do not agree; with a shortest script, in which a provider may die.
    """
    search = _ModelSearch(environment, kernel)
    search.run(pairs_max)
    return search.compared


class _ModelSearch:
    def __init__(self, environment: OpenEnvironment, kernel: type[ProviderKernel]) -> None:
        self.environment = environment
        self.kernel = kernel
        self.events = tuple(events_of(environment))
        fed = {type(event) for event in self.events}
        left_out = sorted(kind.__name__ for kind in get_args(ProviderInput) if kind not in fed)
        self.compared = Compared(left_out=tuple(left_out))
        self.pairs: Reached[_KernelAndModel, ProviderInput | str] = Reached()
        self.steps: set[tuple[int, int]] = set()
        self.refused: set[tuple[int, int]] = set()
        self.numbers: dict[object, int] = {}

    def run(self, pairs_max: int | None) -> None:
        first = _first_model(self.environment)
        self.pairs.arrive(_KernelAndModel(first_state(self.environment), first))
        for number in self.pairs.in_order():
            self._expand(number)
            if pairs_max is not None and len(self.pairs) >= pairs_max:
                self.compared.is_complete = False
                break
        compared = self.compared
        compared.snapshots, compared.pairs = len(self.numbers), len(self.pairs)
        compared.steps, compared.refused = len(self.steps), len(self.refused)

    def _expand(self, at: int) -> None:
        pair = self.pairs.nodes[at]
        number = self.numbers.setdefault(pair.open.kernel, len(self.numbers))
        kernel = self.kernel.restore(pair.open.kernel, self.environment.limits)
        for index, event in enumerate(self.events):
            if not may_be(self.environment, pair.open, event):
                continue
            try:
                kernel, after, effects = taken(kernel, pair.model, event)
            except Difference as difference:
                raise self.pairs.violation(at, difference, event) from difference
            if effects is None:
                self.refused.add((number, index))
                continue
            self.steps.add((number, index))
            left = after_event(kernel, pair.open, event, effects)
            self.pairs.arrive(_KernelAndModel(left, after), at, event)
            kernel = self.kernel.restore(pair.open.kernel, self.environment.limits)
        if self.environment.crash:
            died = after_crash(self.environment, pair.open)
            again = model.Provider(pair.model.limits, remembered=pair.model.remembered)
            self.pairs.arrive(_KernelAndModel(died, again), at, DEATH)


def _first_model(environment: OpenEnvironment) -> model.Provider:
    started = model.Provider(limits=model_limits(environment.limits or Limits()))
    if environment.readiness:
        return started
    return model.provider_step(started, on.ProviderReady())[0]
