"""`StepwiseBackend`: run the steps of the backend contract, and undo them, in the contract's order.

What `LinuxBackend` and `SimulatedBackend` have in common. Each of them says how a step is done.
"""

from __future__ import annotations

import logging
import threading
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Final, Generic, TypeVar

from statemachine.errors import AllocationNotFound, CreationFailed
from statemachine.messages import (
    NamespaceRequest,
    NamespaceResponse,
    mount_path_below,
    objection,
)
from statemachine.states import AllocationState
from transport.contract import UNDONE_BY, Adoption, Step, plan

_log: Final = logging.getLogger(__name__)

_UNDONE_ALONE: Final = frozenset({Step.SCOPE, Step.IMAGE, Step.ANCHOR})
"""The steps that a try to release may leave undone, each for a reason of its own."""

_ADOPTABLE: Final = (AllocationState.CREATED, AllocationState.HANDED_OFF)


@dataclass(slots=True)
class StepwiseAllocation:
    """One incarnation of an allocation, and how far its creation or release has come."""

    request: NamespaceRequest
    done: list[Step] = field(default_factory=list)
    """Of SCOPE, IMAGE and ANCHOR those that are done and not undone."""
    is_journaled: bool = False
    """Whether the journal has an entry for it."""
    is_end_journaled: bool = False
    """Whether the journal says that it has ended."""
    is_watched: bool = False
    """Whether its cgroup and its init are watched."""
    is_released: bool = False
    """Whether its release has begun."""
    why: str | None = None
    """What the last try to release could not finish."""

    @property
    def name(self) -> str:
        """Its id."""
        return self.request.allocation_id


A = TypeVar("A", bound=StepwiseAllocation)


class StepwiseBackend(ABC, Generic[A]):
    """
    The part of a backend that runs its steps.

    Args:
        uenv_base: where images appear inside an allocation.
        failures: what a step can fail with; anything else is a mistake in the program.
        has_scopes: whether allocations have cgroups.
        has_journal: whether they are journaled, and outlive the program.
    """

    def __init__(
        self,
        uenv_base: str,
        failures: tuple[type[Exception], ...],
        *,
        has_scopes: bool,
        has_journal: bool,
    ) -> None:
        self._uenv_base: Final = uenv_base
        self._has_scopes: Final = has_scopes
        self._has_journal: Final = has_journal
        self._failures: Final = failures
        self._guard: Final = threading.Lock()
        self._over: Final[set[str]] = set()
        """Allocations whose end was recorded and that are not released."""
        self._allocations: Final[dict[str, A]] = {}

    @abstractmethod
    def _new(self, request: NamespaceRequest) -> A:
        """Make the record of a new incarnation."""

    @abstractmethod
    def _perform(self, step: Step, allocation: A) -> str | None:
        """
        Do one step.

        Returns:
            What keeps it from being finished; None if it is finished.
        """

    @abstractmethod
    def _stop(self, allocation: A) -> None:
        """Stop observing an allocation, and close the image that is not attached."""

    @abstractmethod
    def _adopt_image(self, image: str, allocation: A) -> None:
        """Find an allocation's image again, so that the next allocation with it shares it."""

    def _note_why(self, allocation: A) -> None:
        """Note durably what keeps a release from being finished, if there is a place for it."""

    def create_namespaces(self, request: NamespaceRequest) -> NamespaceResponse:
        """
        Make an allocation, by the steps of `plan`.

        Raises:
            CreationFailed: the request breaks a rule, its allocation is alive, or a step failed;
                the reason names the step, call, errno and path. The steps before it are undone;
                what cannot be undone at once is in `why_alive`, and `release_namespaces` goes on
                with it.
        """
        # A provider's kernel has checked the request before. In self-service there is none, and the
        # id becomes the name of a cgroup here.
        # Keeps LIFE-8.
        reason = objection(request)
        if reason is not None:
            raise CreationFailed(reason)
        allocation = self._new(request)
        with self._guard:
            if allocation.name in self._allocations:
                raise CreationFailed(f"allocation {allocation.name} is alive already")
            self._allocations[allocation.name] = allocation
        for step in plan(request, has_scopes=self._has_scopes, has_journal=self._has_journal):
            try:
                self._perform(step, allocation)
            except self._failures as error:
                self._release(allocation)
                raise CreationFailed(f"{step.value}: {error}") from error
            if step in _UNDONE_ALONE:
                allocation.done.append(step)
            allocation.is_journaled |= step is Step.INTEND
        return self._response_to(request)

    def release_namespaces(self, allocation_id: str) -> None:
        """
        Try once to release an allocation; never waits.

        Raises:
            AllocationNotFound: there is none, or nothing is left of it.
        """
        # Keeps END-8, END-10.
        allocation = self._allocations.get(allocation_id)
        if allocation is None:
            with self._guard:  # its creation failed, and its end was recorded after that
                self._over.discard(allocation_id)
            raise AllocationNotFound(allocation_id)
        self._release(allocation)

    def why_alive(self, allocation_id: str) -> str | None:
        """Say what the last try to release could not finish; None when nothing is left."""
        # Keeps END-9.
        allocation = self._allocations.get(allocation_id)
        if allocation is None:
            return None
        return allocation.why or "its release has not been tried"

    def record_handed_off(self, allocation_id: str) -> None:
        """
        Note durably that an allocation was handed over; nothing if there is none.

        If that cannot be written, a later provider adopts the allocation as one that was not handed
        over yet, and hands it over all the same.
        """
        with self._guard:  # so that an end is not overwritten by it
            allocation = self._allocations.get(allocation_id)
            if allocation is not None and allocation.is_journaled and not self._is_over(allocation):
                self._try_to_note(Step.RECORD_HANDOFF, allocation)

    def record_ended(self, allocation_id: str) -> None:
        """Note durably that it is over; a creation under way will not be published."""
        # Keeps END-14, CRASH-5.
        with self._guard:
            self._over.add(allocation_id)
            allocation = self._allocations.get(allocation_id)
            if allocation is not None:
                self._record_end(allocation)

    @staticmethod
    def _is_over(allocation: A) -> bool:
        return allocation.is_end_journaled or allocation.is_released

    def _release(self, allocation: A) -> None:
        """Undo everything that was done; what cannot be undone yet stays, with its reason."""
        # Keeps END-8.
        if not allocation.is_released:
            with self._guard:
                self._record_end(allocation)
                allocation.is_released = True
            self._stop(allocation)
        allocation.why = self._undo(allocation)
        try:
            if allocation.done:
                self._note_why(allocation)
                return
            if allocation.is_journaled:
                self._perform(Step.FORGET, allocation)
        except self._failures as error:
            allocation.why = allocation.why or f"{Step.FORGET.value}: {error}"
            return
        with self._guard:
            self._over.discard(allocation.name)
            self._allocations.pop(allocation.name, None)

    def _undo(self, allocation: A) -> str | None:
        """Try to undo every step that was done, the last one first; return what is in the way."""
        left: list[Step] = []
        reasons: list[str] = []
        for step in reversed(allocation.done):
            undoing = UNDONE_BY[step]
            try:
                reason = self._perform(undoing, allocation)
            except self._failures as error:
                reason = str(error)
            if reason is not None:
                left.append(step)
                reasons.append(f"{undoing.value}: {reason}")
        allocation.done[:] = reversed(left)
        return "; ".join(reasons) or None

    def _record_end(self, allocation: A) -> None:
        # If it cannot be written, the allocation is released all the same. A provider that starts
        # before that is done finds it half released, and goes on.
        if allocation.is_journaled and not allocation.is_end_journaled:
            allocation.is_end_journaled = self._try_to_note(Step.RECORD_END, allocation)

    def _try_to_note(self, step: Step, allocation: A) -> bool:
        try:
            self._perform(step, allocation)
        except self._failures as error:
            _log.warning("%s of %s: %s", step.value, allocation.name, error)
            return False
        return True

    def _adopt(
        self, allocation: A, state: AllocationState, *, has_scope: bool, has_init: bool
    ) -> Adoption:
        """Go on with an allocation that an earlier program has left, by what is there of it."""
        request = allocation.request
        self._allocations[allocation.name] = allocation
        allocation.is_journaled = True
        allocation.is_end_journaled = state is AllocationState.ENDED
        is_there = {Step.SCOPE: has_scope, Step.IMAGE: True, Step.ANCHOR: has_init}
        allocation.done += [step for step in plan(request) if is_there.get(step, False)]
        is_whole = has_init and (has_scope or not self._has_scopes)
        if not is_whole or state not in _ADOPTABLE:
            return Adoption(AllocationState.ENDED, request, None)
        if request.uenv_image is not None:
            self._adopt_image(request.uenv_image, allocation)
        return Adoption(state, request, self._response_to(request))

    def _find(self, allocation_id: str) -> A:
        allocation = self._allocations.get(allocation_id)
        if allocation is None:
            raise AllocationNotFound(allocation_id)
        return allocation

    def _response_to(self, request: NamespaceRequest) -> NamespaceResponse:
        path = None
        if request.uenv_image is not None:
            path = mount_path_below(self._uenv_base, request.uenv_image)
        return NamespaceResponse(request.allocation_id, request.namespaces, path)
