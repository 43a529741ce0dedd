"""`SimulatedBackend`: the backend contract without privileges, on a node that exists in memory.

It does the same steps as `LinuxBackend`, runs anywhere, and can be made to fail. The program can be
dropped and another one started on the same `SimulatedNode`: that is a crash. Random programs
compare it with `LinuxBackend`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

from statemachine.errors import AllocationNotFound, FdPassing
from statemachine.messages import NamespaceRequest
from statemachine.provider import REMEMBERED_MAX
from statemachine.states import AllocationState
from transport.contract import Adoption, Observation, Recovery, Sighting, Step
from transport.descriptors import Descriptor, DescriptorBundle

from ..steps import StepwiseAllocation, StepwiseBackend
from .mounts import SimulatedImage, SimulatedMount
from .node import JournalLine, SimulatedFailure, SimulatedNode


@dataclass(slots=True)
class _OnSimulation(StepwiseAllocation):
    """What a program knows of one allocation."""

    image: SimulatedMount | None = None
    """The detached mount, between the step that makes it and the step that attaches it."""
    has_scope: bool = False
    has_init: bool = False


@dataclass(slots=True)
class _StoredImage:
    """An image that a program holds mounted, and for whom."""

    image: SimulatedImage
    users: set[str] = field(default_factory=set)
    idle_since: float | None = None


class SimulatedBackend(StepwiseBackend[_OnSimulation]):
    """
    A provider's program on a simulated node; fulfils `transport.contract.Backend`.

    Args:
        node: the machine; several backends may share it, one after the other.
        hold_time_s: how long an image stays mounted after its last user.
        clock: seconds, for the hold time.
        has_journal: False for a consumer's own, which makes no journal entries.
    """

    def __init__(
        self,
        node: SimulatedNode,
        *,
        hold_time_s: float = 60.0,
        clock: Callable[[], float] = lambda: 0.0,
        has_journal: bool = True,
    ) -> None:
        super().__init__(node.uenv_base, _FAILURES, has_scopes=True, has_journal=has_journal)
        self._node = node
        self._hold_time_s = hold_time_s
        self._clock = clock
        self._images: dict[str, _StoredImage] = {}
        self._observed: list[Observation] = []
        self._signal = Descriptor(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        node.attach(self)

    # The steps of a creation.

    def _new(self, request: NamespaceRequest) -> _OnSimulation:
        return _OnSimulation(request)

    def _perform(self, step: Step, allocation: _OnSimulation) -> str | None:
        self._node.before(step, allocation.name)
        with self._node.lock:
            return _WORK[step](self, allocation)

    def _intend(self, allocation: _OnSimulation) -> None:
        self._node.journal[allocation.name] = JournalLine(allocation.request)

    def _make_scope(self, allocation: _OnSimulation) -> None:
        self._node.make_scope(allocation.name)
        allocation.has_scope = True

    def _mount_image(self, allocation: _OnSimulation) -> None:
        name = allocation.request.uenv_image
        assert name is not None
        if name not in self._node.images:
            raise SimulatedFailure(f"resolve image: openat2(2): ENOENT: {name}")
        stored = self._images.setdefault(name, _StoredImage(SimulatedImage(name)))
        allocation.image = self._node.mount(stored.image)
        stored.users.add(allocation.name)
        stored.idle_since = None

    def _make_anchor(self, allocation: _OnSimulation) -> None:
        request = allocation.request
        place = self._response_to(request).uenv_mount_path
        self._node.start_init(allocation.name, request.namespaces, allocation.image, place)
        allocation.image = None
        allocation.has_init = True

    def _publish(self, allocation: _OnSimulation) -> None:
        if allocation.name in self._over:
            raise SimulatedFailure("the allocation has ended meanwhile")
        self._node.journal[allocation.name].state = AllocationState.CREATED

    # The steps of a release.

    def _stop(self, allocation: _OnSimulation) -> None:
        with self._node.lock:
            # What was seen of it is not reported any more: its name may be another's by then.
            self._observed = [
                each for each in self._observed if each.allocation_id != allocation.name
            ]
            if allocation.image is not None:
                allocation.image.end()
                allocation.image = None

    def _end_init(self, allocation: _OnSimulation) -> str | None:
        if not self._node.end_init(allocation.name):
            return "its init waits for processes that do not die or are not reaped"
        allocation.has_init = False
        return None

    def _release_image(self, allocation: _OnSimulation) -> str | None:
        if allocation.has_init:
            return "the image is mounted in the namespace of a living init"
        stored = self._images.get(allocation.request.uenv_image or "")
        if stored is not None and allocation.name in stored.users:
            stored.users.discard(allocation.name)
            stored.idle_since = None if stored.users else self._clock()
        return None

    def _remove_scope(self, allocation: _OnSimulation) -> str | None:
        there = self._node.find(allocation.name)
        if there.scope is not None:
            # What is killed now has died by the next try, as on Linux, not at once.
            there.settle()
            there.scope.kill()
            if there.scope.is_populated:
                alive = sum(each.member.is_alive for each in there.processes)
                return f"{alive} processes do not die"
            self._node.drop_scope(allocation.name)
        return None

    def _forget(self, allocation: _OnSimulation) -> None:
        node, name = self._node, allocation.name
        if node.journal.pop(name, None) is not None:
            others = [each for each in node.remembered if each != name]
            node.remembered = [*others, name][-REMEMBERED_MAX:]

    def _note(self, allocation: _OnSimulation, state: AllocationState) -> None:
        self._node.journal[allocation.name].state = state

    # The rest of the contract.

    def bundle_of(self, allocation_id: str) -> DescriptorBundle:
        """
        Open the allocation's namespaces, in request order; the caller owns the bundle.

        Raises:
            AllocationNotFound: there is no such allocation.
            FdPassing: its init is dead, or no descriptor is left.
        """
        with self._node.lock, ExitStack() as undo:
            allocation = self._find(allocation_id)
            if not allocation.has_init or allocation.is_released:
                raise AllocationNotFound(allocation_id)
            there = self._node.find(allocation_id)
            if allocation.request.namespaces and not there.is_init_alive:
                raise FdPassing(f"the init of {allocation_id} is dead")
            try:
                opened = [undo.enter_context(each.open()) for each in there.namespaces]
            except OSError as error:
                raise FdPassing(f"no descriptor is left: {error.strerror}") from error
            undo.pop_all()
            return DescriptorBundle(allocation.request.namespaces, opened)

    def recover(self) -> Recovery:
        """Find what an earlier program left on the node."""
        with self._node.lock:
            adoptions = tuple(map(self._recover, self._node.journal.values()))
            return Recovery(adoptions, tuple(self._node.remembered))

    def watch(self, allocation_id: str) -> None:
        """
        Begin to observe an allocation; nothing once its release has begun.

        Raises:
            AllocationNotFound: there is no such allocation.
            ValueError: it is watched already. Nothing has changed in both cases.
        """
        with self._node.lock:
            allocation = self._find(allocation_id)
            if allocation.is_released:
                return
            if allocation.is_watched:
                raise ValueError(f"{allocation_id} is watched already")
            allocation.is_watched = True
            there = self._node.find(allocation_id)
            if allocation.has_init and there.is_init_gone:
                self.notify(Observation(allocation_id, Sighting.INIT_DIED))
            if allocation.has_scope and there.scope is not None and there.scope.is_populated:
                self.notify(Observation(allocation_id, Sighting.POPULATED))
            elif self.is_over(allocation_id):
                self.notify(Observation(allocation_id, Sighting.EMPTIED))

    def fileno(self) -> int:
        """Lend the descriptor that is readable when there is something to observe."""
        return self._signal.fileno()

    def observe(self) -> list[Observation]:
        """Say what has been seen since the last call."""
        with self._node.lock:
            observed, self._observed = self._observed, []
            with suppress(BlockingIOError):
                os.eventfd_read(self._signal.fileno())
            return observed

    def is_over(self, allocation_id: str) -> bool:
        """Read whether the cgroup was used and is empty; one that was removed counts as empty."""
        with self._node.lock:
            allocation = self._allocations.get(allocation_id)
            if allocation is None or not allocation.has_scope:
                return False
            scope = self._node.find(allocation_id).scope
            return scope is None or (scope.was_used and not scope.is_populated)

    def tidy(self) -> float | None:
        """Unmount the images whose hold time is over; return the seconds until the next one."""
        now = self._clock()
        with self._node.lock:
            left_s = {
                name: stored.idle_since + self._hold_time_s - now
                for name, stored in self._images.items()
                if stored.idle_since is not None
            }
            for name in [name for name, rest_s in left_s.items() if rest_s <= 0]:
                self._images.pop(name).image.drop()
                del left_s[name]
            self._node.sweep()
        return min(left_s.values(), default=None)

    def close(self) -> None:
        """Close what this program has open; what is alive on the node stays alive."""
        with self._node.lock:
            self._node.detach(self)
            for allocation in self._allocations.values():
                if allocation.image is not None:
                    allocation.image.end()
            for stored in self._images.values():
                stored.image.drop()
            self._images.clear()
            self._signal.close()

    def notify(self, observation: Observation) -> None:
        """Take note of what happened on the node; called with the node's lock held."""
        allocation = self._allocations.get(observation.allocation_id)
        if allocation is not None and allocation.is_watched and not allocation.is_released:
            self._observed.append(observation)
            os.eventfd_write(self._signal.fileno(), 1)

    def _recover(self, entry: JournalLine) -> Adoption:
        allocation = _OnSimulation(entry.request)
        there = self._node.find(allocation.name)
        allocation.has_scope = there.scope is not None
        allocation.has_init = not there.is_init_gone
        return self._adopt(
            allocation,
            entry.state,
            has_scope=allocation.has_scope,
            has_init=allocation.has_init,
        )

    def _adopt_image(self, image: str, allocation: _OnSimulation) -> None:
        superblock = self._node.find_superblock(image)
        if superblock is not None:
            stored = self._images.setdefault(image, _StoredImage(SimulatedImage(image)))
            stored.image.adopt(superblock)
            stored.users.add(allocation.name)


_FAILURES: Final = (SimulatedFailure, OSError)
"""What a step can fail with."""

_WORK: Final[Mapping[Step, Callable[[SimulatedBackend, _OnSimulation], str | None]]] = (
    MappingProxyType(
        {
            Step.INTEND: SimulatedBackend._intend,
            Step.SCOPE: SimulatedBackend._make_scope,
            Step.IMAGE: SimulatedBackend._mount_image,
            Step.ANCHOR: SimulatedBackend._make_anchor,
            Step.PUBLISH: SimulatedBackend._publish,
            Step.RECORD_HANDOFF: lambda self, it: self._note(it, AllocationState.HANDED_OFF),
            Step.RECORD_END: lambda self, it: self._note(it, AllocationState.ENDED),
            Step.END_INIT: SimulatedBackend._end_init,
            Step.RELEASE_IMAGE: SimulatedBackend._release_image,
            Step.REMOVE_SCOPE: SimulatedBackend._remove_scope,
            Step.FORGET: SimulatedBackend._forget,
        }
    )
)
"""How each step is done."""
