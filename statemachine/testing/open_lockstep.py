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
from typing import NamedTuple, get_args

from specs import model

from .. import events as on
from ..events import ProviderInput
from ..provider import Limits, ProviderKernel
from .lockstep import Difference, model_limits, taken
from .open_environment import (
    OpenEnvironment,
    OpenState,
    after_crash,
    after_event,
    events_of,
    first_state,
    may_be,
)


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
        Difference: they do not agree; the text has a script that leads there.
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
        self.before: dict[_KernelAndModel, tuple[_KernelAndModel, ProviderInput | None] | None] = {}
        self.steps: set[tuple[int, int]] = set()
        self.refused: set[tuple[int, int]] = set()
        self.numbers: dict[object, int] = {}

    def run(self, pairs_max: int | None) -> None:
        start = _KernelAndModel(first_state(self.environment), _first_model(self.environment))
        self.before[start] = None
        level = [start]
        while level and self.compared.is_complete:
            following: list[_KernelAndModel] = []
            for pair in level:
                self._expand(pair, following)
                if pairs_max is not None and len(self.before) >= pairs_max:
                    self.compared.is_complete = False
                    break
            level = following
        compared = self.compared
        compared.snapshots, compared.pairs = len(self.numbers), len(self.before)
        compared.steps, compared.refused = len(self.steps), len(self.refused)

    def _expand(self, pair: _KernelAndModel, following: list[_KernelAndModel]) -> None:
        number = self.numbers.setdefault(pair.open.kernel, len(self.numbers))
        kernel = self.kernel.restore(pair.open.kernel, self.environment.limits)
        for index, event in enumerate(self.events):
            if not may_be(self.environment, pair.open, event):
                continue
            kernel, after = self._step(kernel, pair, event)
            if after is None:
                self.refused.add((number, index))
                continue
            self.steps.add((number, index))
            self._arrive(pair, event, after, following)
            kernel = self.kernel.restore(pair.open.kernel, self.environment.limits)
        if self.environment.crash:
            died = after_crash(self.environment, pair.open)
            again = model.Provider(pair.model.limits, remembered=pair.model.remembered)
            self._arrive(pair, None, _KernelAndModel(died, again), following)

    def _arrive(
        self,
        pair: _KernelAndModel,
        event: ProviderInput | None,
        after: _KernelAndModel,
        following: list[_KernelAndModel],
    ) -> None:
        if after not in self.before:
            self.before[after] = pair, event
            following.append(after)

    def _step(
        self, kernel: ProviderKernel, pair: _KernelAndModel, event: ProviderInput
    ) -> tuple[ProviderKernel, _KernelAndModel | None]:
        try:
            kernel, after, effects = taken(kernel, pair.model, event)
        except Difference as difference:
            raise self._with_script(difference, pair, event) from None
        if effects is None:
            return kernel, None
        return kernel, _KernelAndModel(after_event(kernel, pair.open, event, effects), after)

    def _with_script(
        self, difference: Difference, pair: _KernelAndModel, event: ProviderInput
    ) -> Difference:
        script: list[ProviderInput | None] = [event]
        step = self.before[pair]
        while step is not None:
            pair, earlier = step
            script.append(earlier)
            step = self.before[pair]
        lines = [repr(each) if each else "the provider dies" for each in reversed(script)]
        return Difference("\n".join([f"{difference}, after", *lines]))


def _first_model(environment: OpenEnvironment) -> model.Provider:
    started = model.Provider(limits=model_limits(environment.limits or Limits()))
    if environment.readiness:
        return started
    return model.provider_step(started, on.ProviderReady())[0]
