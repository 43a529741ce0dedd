"""A backend whose work is done in steps of a virtual world; its namespaces are files in memory.

What it has made stays when the provider's program is killed, as on a node. Which namespace a
descriptor is, is found out from the file's inode, by `VirtualInspector`.
"""

from __future__ import annotations

import os
from typing import Protocol

from statemachine.errors import AllocationNotFound, CreationFailed, FdPassing
from statemachine.messages import NamespaceRequest, NamespaceResponse, NamespaceType
from statemachine.states import AllocationState

from ...contract import Adoption, Observation, Recovery, Sighting
from ...descriptors import Descriptor, DescriptorBundle, NamespaceIdentity
from .world import VirtualWorld


class WorkRules(Protocol):
    """Told of the work of a backend; raises where that was not asked for."""

    def begin_work(self, name: str, kind: str) -> None: ...
    def end_work(self, name: str, kind: str) -> None: ...
    def note_ended(self, name: str) -> None: ...
    def note_sighting(self, name: str, sighting: Sighting) -> None: ...


class MadeSet:
    """What is there of an allocation."""

    def __init__(self, request: NamespaceRequest, tries: int) -> None:
        self.request = request
        self.response: NamespaceResponse | None = None
        self.files: list[Descriptor] = []
        self.tries = tries
        """How often a release has to be tried."""
        self.was_handed_off = False
        self.has_ended = False
        self.is_watched = False
        self.is_populated = False
        self.was_used = False


class VirtualBackend:
    """
    Makes namespaces of memory; fulfils `transport.contract.Backend`.

    Args:
        world: where its steps are taken.
        tries: how often a release has to be tried.
    """

    def __init__(self, world: VirtualWorld, tries: int = 1) -> None:
        self.made: dict[str, MadeSet] = {}
        self.remembered: list[str] = []
        self.hanging: set[str] = set()
        """Images that hang."""
        self.is_short = False
        """Whether no descriptor is left."""
        self.rules: WorkRules | None = None
        self.inspector = VirtualInspector()
        self._world = world
        self._tries = tries
        self._seen: list[Observation] = []
        self._event = Descriptor(os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC))

    # What happens on the node.

    def see(self, name: str, sighting: Sighting) -> None:
        """Let something be seen of an allocation, if it is watched."""
        entry = self.made.get(name)
        if entry is None:
            return
        entry.is_populated = sighting is Sighting.POPULATED
        entry.was_used |= entry.is_populated
        if entry.is_watched and not entry.has_ended:
            self._seen.append(Observation(name, sighting))
            os.eventfd_write(self._event.fileno(), 1)

    def identities_of(self, name: str) -> list[int]:
        return [os.fstat(file.fileno()).st_ino for file in self.made[name].files]

    # As the contract has it.

    def recover(self) -> Recovery:
        self._world.switch("recovers")
        adoptions = []
        for entry in self.made.values():
            state = AllocationState.ENDED
            entry.is_watched = False
            if entry.response is not None and not entry.has_ended:
                handed = entry.was_handed_off
                state = AllocationState.HANDED_OFF if handed else AllocationState.CREATED
            response = None if state is AllocationState.ENDED else entry.response
            adoptions.append(Adoption(state, entry.request, response))
        return Recovery(tuple(adoptions), tuple(self.remembered))

    def create_namespaces(self, request: NamespaceRequest) -> NamespaceResponse:
        name = request.allocation_id
        self._world.switch(f"begins to create {name}")
        self._told().begin_work(name, "create")
        if name in self.made:
            self._told().end_work(name, "create")
            raise CreationFailed(f"{name} is there already")
        entry = self.made[name] = MadeSet(request, self._tries)
        self._world.switch(f"makes {name}", lambda: request.uenv_image not in self.hanging)
        for kind in request.namespaces:
            entry.files.append(Descriptor(os.memfd_create(kind.value, os.MFD_CLOEXEC)))
            self.inspector.kinds[os.fstat(entry.files[-1].fileno()).st_ino] = kind
        self._world.switch(f"publishes {name}")
        self._told().end_work(name, "create")
        if entry.has_ended:
            self._drop(name)
            raise CreationFailed(f"{name} has ended meanwhile")
        path = None if request.uenv_image is None else "/run/image"
        entry.response = NamespaceResponse(name, request.namespaces, path)
        return entry.response

    def release_namespaces(self, allocation_id: str) -> None:
        self._world.switch(f"begins to release {allocation_id}")
        self._told().begin_work(allocation_id, "release")
        entry = self.made.get(allocation_id)
        self._world.switch(f"releases {allocation_id}")
        self._told().end_work(allocation_id, "release")
        if entry is None:
            raise AllocationNotFound(allocation_id)
        entry.has_ended = True
        entry.tries -= 1
        if entry.tries <= 0:
            self._drop(allocation_id)

    def why_alive(self, allocation_id: str) -> str | None:
        return "busy" if allocation_id in self.made else None

    def record_handed_off(self, allocation_id: str) -> None:
        if allocation_id in self.made:
            self.made[allocation_id].was_handed_off = True

    def record_ended(self, allocation_id: str) -> None:
        self._told().note_ended(allocation_id)
        if allocation_id in self.made:
            self.made[allocation_id].has_ended = True

    def watch(self, allocation_id: str) -> None:
        entry = self.made.get(allocation_id)
        if entry is None:
            raise AllocationNotFound(allocation_id)
        if entry.is_watched:
            raise ValueError(f"{allocation_id} is watched already")
        entry.is_watched = True
        if entry.is_populated:
            self.see(allocation_id, Sighting.POPULATED)
        elif entry.was_used:
            self.see(allocation_id, Sighting.EMPTIED)

    def bundle_of(self, allocation_id: str) -> DescriptorBundle:
        entry = self.made.get(allocation_id)
        if entry is None:
            raise AllocationNotFound(allocation_id)
        if self.is_short:
            raise FdPassing("no descriptor is left")
        return DescriptorBundle(entry.request.namespaces, [f.duplicate() for f in entry.files])

    def fileno(self) -> int:
        return self._event.fileno()

    def observe(self) -> list[Observation]:
        if self._seen:
            os.eventfd_read(self._event.fileno())
        seen, self._seen = self._seen, []
        found = [x for x in seen if x.allocation_id in self.made]
        for one in found:
            self._told().note_sighting(*one)
        return found

    def is_over(self, allocation_id: str) -> bool:
        entry = self.made.get(allocation_id)
        return entry is not None and entry.was_used and not entry.is_populated

    def tidy(self) -> float | None:
        return None

    def close(self) -> None:
        for entry in self.made.values():
            for file in entry.files:
                file.close()
        self.made.clear()
        self._event.close()

    def _told(self) -> WorkRules:
        assert self.rules is not None
        return self.rules

    def _drop(self, name: str) -> None:
        for file in self.made.pop(name).files:
            file.close()
        if name in self.remembered:
            self.remembered.remove(name)
        self.remembered.append(name)


class VirtualInspector:
    """Says which of a `VirtualBackend`'s namespaces a descriptor is."""

    def __init__(self) -> None:
        self.kinds: dict[int, NamespaceType] = {}

    def inspect(self, fd: int) -> NamespaceIdentity:
        inode = os.fstat(fd).st_ino
        if inode not in self.kinds:
            raise FdPassing("it is no namespace")
        return NamespaceIdentity(self.kinds[inode], (inode,))

    def own(self, kind: NamespaceType) -> NamespaceIdentity | None:
        return None
