"""A backend, and what others do on its machine: one class for both worlds.

One class is enough, because `worlds` has the two machines already. An operation on an allocation or
a process that does not exist does nothing and returns None; what exists follows from the answers
before, so that both machines agree on it until they differ.
"""

from __future__ import annotations

import contextlib
import itertools
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from linux.cgroups import find_cgroup2
from linux.testing.worlds import (
    IMAGE,
    OTHER_IMAGE,
    SCOPE_PREFIX,
    World,
    real,
    simulated,
)
from statemachine.errors import AllocationNotFound, CreationFailed, FdPassing
from statemachine.messages import NamespaceRequest, NamespaceType
from tests.suites.fidelity.machines import Operation
from tests.suites.fidelity.mounts import make_image
from transport.contract import Recovery, Sighting
from transport.descriptors import DescriptorBundle, NamespaceIdentity
from transport.testing.peer import wait_until

ALLOCATIONS: Final = 2
"""How many allocations there may be at a time."""

TRIES_MAX: Final = 8
"""After how many tries a release counts as one that cannot end yet."""

_names: Final = itertools.count(1)


@dataclass(slots=True)
class _Seen:
    """What is known of one allocation from the answers so far."""

    name: str
    processes: int = 0
    has_scope: bool = True
    is_frozen: bool = False
    is_entangled: bool = False
    is_init_alive: bool = True
    is_ended: bool = False
    """Its release was tried."""
    has_end: bool = False
    """Its end was recorded."""
    has_seen_init_die: bool = False
    last: str = "unused"
    identities: list[NamespaceIdentity] = field(default_factory=list)


class BackendMachine:
    """
    A backend and the machine it is on.

    Args:
        world: lent, and left empty after every `reset`.
    """

    def __init__(self, world: World) -> None:
        self._world: Final = world
        self._lives: Final[dict[int, _Seen]] = {}
        self._names: Final[dict[str, int]] = {}
        self._kept: Final[dict[int, DescriptorBundle]] = {}
        self._begin()

    def _begin(self) -> None:
        serial = next(_names)
        self._names.clear()
        for number in range(ALLOCATIONS):
            self._names[f"{SCOPE_PREFIX}{serial}-{number}"] = number

    def reset(self) -> None:
        self.clear()
        self._world.now_s += 1000.0
        self._world.backend.tidy()
        wait_until(lambda: self._world.mounted() == [])
        self._begin()

    def clear(self) -> None:
        """Release everything."""
        for number in tuple(self._kept):
            self.let_go(number)
        for number in tuple(self._lives):
            self.unblock_release(number)
            self.release(number)

    def told(self, call: Operation, answer: object) -> None:
        """There are no secrets."""

    # What a provider asks of its backend.

    def create(self, number: int, kinds: tuple[NamespaceType, ...], image: str | None) -> str:
        name = self._name(number)
        answer = _said(self._world.backend.create_namespaces, NamespaceRequest(name, kinds, image))
        if answer is None:
            self._lives[number] = _Seen(name)
            self._lives[number].identities = self._world.identities(name)
        return str(answer)

    def bundle(self, number: int) -> object:
        """Say whether the namespaces are the ones they were."""
        name = self._name(number)

        def is_as_before() -> bool:
            return self._world.identities(name) == self._lives[number].identities

        return _said(is_as_before)

    def keep(self, number: int) -> object:
        """Keep descriptors as a consumer does, whatever becomes of the allocation."""
        self.let_go(number)

        def open_bundle() -> bool:
            self._kept[number] = self._world.backend.bundle_of(self._name(number))
            return True

        return _said(open_bundle)

    def let_go(self, number: int) -> None:
        bundle = self._kept.pop(number, None)
        if bundle is not None:
            bundle.close()

    def watch(self, number: int) -> object:
        return _said(self._world.backend.watch, self._name(number))

    def seen(self, number: int) -> object:
        """Say what was seen at last of the cgroup, and whether the init was seen to die."""
        self._observe()
        life = self._lives.get(number)
        return life and (life.last, life.has_seen_init_die)

    def _observe(self) -> None:
        for observation in self._world.backend.observe():
            life = self._lives.get(self._names.get(observation.allocation_id, -1))
            if life is None:
                continue
            if observation.sighting is Sighting.INIT_DIED:
                life.has_seen_init_die = True
            elif observation.sighting is not Sighting.CHANGED:
                life.last = observation.sighting.value

    def is_over(self, number: int) -> bool:
        return self._world.backend.is_over(self._name(number))

    def hand_off(self, number: int) -> None:
        life = self._lives.get(number)
        if life is not None and not life.has_end:  # an end is recorded after every handoff
            self._world.backend.record_handed_off(life.name)

    def end(self, number: int) -> None:
        life = self._lives.get(number)
        if life is not None:
            life.has_end = True
            self._world.backend.record_ended(life.name)

    def release(self, number: int) -> str:
        """Try until it is gone, or seems never to be."""
        name = self._name(number)
        try:
            self._world.backend.release_namespaces(name)
        except AllocationNotFound:
            return "not found"
        life = self._lives[number]
        life.is_ended = life.has_end = True
        if life.is_entangled:
            for _ in range(TRIES_MAX):
                self._world.backend.release_namespaces(name)
            return "stays" if self._world.backend.why_alive(name) else "gone"
        self._world.release(name)
        self._world.reap_killed(name)
        del self._lives[number]
        return "gone"

    def restart(self) -> object:
        return self._account(self._world.restart())

    def tidy(self, seconds: float) -> float | None:
        """Let time pass, and have the backend tidy up."""
        self._world.now_s += seconds
        return self._world.backend.tidy()

    def _account(self, recovery: Recovery) -> object:
        for life in self._lives.values():
            life.last, life.has_seen_init_die = "unused", False
        found = sorted(
            (self._names[each.request.allocation_id], each.state.value)
            for each in recovery.adoptions
        )
        remembered = [self._names[name] for name in recovery.remembered if name in self._names]
        return found, remembered

    # What others do on the machine.

    def join(self, number: int) -> bool | None:
        life = self._with_scope(number)
        if life is None:
            return None
        self._world.join(life.name)
        life.processes += 1
        return True

    def leave(self, number: int, is_reaped: bool) -> bool | None:
        life = self._with_scope(number)
        if life is None or not life.processes:
            return None
        self._world.leave(life.name, is_reaped=is_reaped)
        # One that is not reaped stays the last to have joined: no other can leave after it.
        life.processes = life.processes - 1 if is_reaped else 0
        return True

    def pass_through(self, number: int) -> bool | None:
        life = self._with_scope(number)
        if life is None or life.is_frozen:
            return None  # a process that enters a frozen cgroup does not exit
        self._world.pass_through(life.name)
        return True

    def freeze(self, number: int, is_frozen: bool) -> bool | None:
        life = self._with_scope(number)
        if life is None:
            return None
        self._world.freeze(life.name, is_frozen=is_frozen)
        life.is_frozen = is_frozen
        return True

    def remove_scope(self, number: int) -> object:
        life = self._with_scope(number)
        if life is None:
            return None
        self._world.remove_scope(life.name)
        life.has_scope = False
        return True

    def kill_init(self, number: int) -> bool | None:
        life = self._lives.get(number)
        if life is None or not life.is_init_alive or life.is_ended:
            return None
        self._world.kill_init(life.name)
        life.is_init_alive = False
        if life.identities:
            wait_until(lambda: self.bundle(number) is not True)
        return True

    def block_release(self, number: int) -> bool | None:
        life = self._with_scope(number)
        if life is None or life.is_entangled or not life.is_init_alive:
            return None
        if all(identity.kind is not NamespaceType.PID for identity in life.identities):
            return None
        self._world.block_release(life.name)
        life.is_entangled = True
        return True

    def unblock_release(self, number: int) -> bool | None:
        life = self._lives.get(number)
        if life is None or not life.is_entangled:
            return None
        self._world.unblock_release(life.name)
        life.is_entangled = False
        return True

    def mounted(self) -> list[str]:
        return self._world.mounted()

    def _name(self, number: int) -> str:
        return next(name for name, each in self._names.items() if each == number)

    def _with_scope(self, number: int) -> _Seen | None:
        """Return what still has a cgroup that is not being taken away."""
        life = self._lives.get(number)
        return life if life is not None and life.has_scope and not life.is_ended else None


_ERRORS: Final = (AllocationNotFound, CreationFailed, FdPassing, ValueError)


def _said(call: Callable[..., Any], *arguments: object) -> object:
    """What a call returns of plain values, or the class of what it raises."""
    try:
        answer = call(*arguments)
    except _ERRORS as error:
        return type(error).__name__
    return answer if isinstance(answer, bool) else None


class SimulatedProgram(BackendMachine):
    def __init__(self) -> None:
        self._context: Final = simulated()
        super().__init__(self._context.__enter__())


@contextlib.contextmanager
def linux_program() -> Iterator[BackendMachine]:
    with tempfile.TemporaryDirectory() as directory:
        images = Path(directory).resolve() / "images"
        for image in (IMAGE, OTHER_IMAGE):
            (images / image).parent.mkdir(parents=True, exist_ok=True)
            make_image(images / image)
        with real(Path(directory).resolve(), find_cgroup2(), images) as world:
            program = BackendMachine(world)
            try:
                yield program
            finally:
                program.clear()
