"""A backend without privileges: a node that exists only in this program.

It keeps the contract of `LinuxBackend` (`transport.contract.Backend`; one suite holds both to it),
runs anywhere, and can be told to misbehave. Its descriptors are memfds, real enough to be passed
over a socket, counted and closed; what they stand for is in their name, so that another program can
tell as well (`SimulatedInspector`).

It is never kinder than the Linux kernel: inode numbers are reused though namespaces are new, a
descriptor of a PID namespace outlives its init and is useless then, a zombie does not populate a
cgroup, freezing is not ending, what is killed is not gone at once, and what cannot be killed stays.

`SimulatedNode` is the machine, `SimulatedBackend` a provider's program on it. The program can be
dropped without a word and another one started on the same node: that is a crash.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from statemachine.errors import AllocationNotFound, CreationFailed, FdPassing
from statemachine.messages import (
    NamespaceRequest,
    NamespaceResponse,
    NamespaceType,
    mount_path_below,
    objection,
)
from transport.contract import Adoption, Observation, Recovery, Sighting, Standing
from transport.descriptors import (
    Descriptor,
    DescriptorBundle,
    NamespaceIdentity,
    close_all,
)

SIMULATED_UENV_BASE: Final = "/run/pact/uenv"
"""Where images are mounted on a simulated node, unless said otherwise."""

FIRST_INODE: Final = 0xF0000001
"""The lowest inode number of a namespace, as on Linux."""

_MEMFD_PREFIX: Final = "nshandoff-"


class SimulatedFailure(Exception):
    """Raised by a hook: this step fails, as a system call would."""


class SimulatedCrash(BaseException):
    """Raised by a hook: the provider's program dies here. Not to be caught by it."""


class Step(Enum):
    """What a simulated backend does, one after the other; a hook hears of each beforehand."""

    INTEND = "intend"
    ANCHOR = "anchor"
    SCOPE = "scope"
    IMAGE = "image"
    PUBLISH = "publish"
    RECORD_HANDOFF = "record hand-off"
    RECORD_END = "record end"
    KILL = "kill"
    REMOVE_SCOPE = "remove scope"
    FORGET = "forget"


Hook = Callable[[Step, str], None]
"""Told of a step and the allocation before the step is done; may raise, or wait."""


@dataclass(slots=True)
class SimulatedNamespace:
    """A namespace of the simulated node."""

    kind: NamespaceType
    unique_id: int
    """Never used again, like NS_GET_ID."""
    inode: int
    """Used again as soon as the namespace is gone."""
    descriptor: Descriptor


@dataclass(slots=True)
class SimulatedScope:
    """A cgroup of the simulated node."""

    processes: int = 0
    zombies: int = 0
    was_used: bool = False
    is_frozen: bool = False
    unkillable: int = 0
    """How many of the processes ignore being killed, for now."""

    @property
    def is_populated(self) -> bool:
        """What `cgroup.events` says: zombies do not count."""
        return self.processes > 0


@dataclass(slots=True)
class _Life:
    """Everything of one allocation that is on the node, whoever knows of it."""

    namespaces: list[SimulatedNamespace] = field(default_factory=list)
    is_init_alive: bool = False
    scope: SimulatedScope | None = None
    image: str | None = None


@dataclass(slots=True)
class _Entry:
    """A line of the node's journal."""

    request: NamespaceRequest
    standing: Standing = Standing.REMAINS
    response: NamespaceResponse | None = None
    is_over: bool = False


@dataclass(slots=True)
class _Image:
    users: set[str] = field(default_factory=set)
    idle_since: float | None = None


class SimulatedNode:
    """
    A machine: what is on it stays when a provider's program dies.

    Args:
        images: the image files below its image root.
        uenv_base: where images appear inside an allocation.
        hook: told of every step of every backend on this node, beforehand.
    """

    def __init__(
        self,
        images: frozenset[str] = frozenset(),
        *,
        uenv_base: str = SIMULATED_UENV_BASE,
        hook: Hook | None = None,
    ) -> None:
        self.images = images
        self.uenv_base = uenv_base
        self.hook = hook
        self.lives: dict[str, _Life] = {}
        self.journal: dict[str, _Entry] = {}
        self.remembered: list[str] = []
        self.mounted: dict[str, _Image] = {}
        self.lock = threading.RLock()
        self._watchers: list[SimulatedBackend] = []
        self._last_id = 0
        self._free_inodes: list[int] = []
        self._next_inode = FIRST_INODE

    # What happens on the machine, told by a test or a demonstration.

    def start_process(self, allocation_id: str) -> None:
        """Start a process in the allocation's cgroup."""
        with self._changing(allocation_id) as scope:
            scope.processes += 1
            scope.was_used = True

    def end_process(self, allocation_id: str, *, is_reaped: bool = True) -> None:
        """Let a process of the allocation's cgroup exit; its parent may or may not reap it."""
        with self._changing(allocation_id) as scope:
            scope.processes -= 1
            scope.zombies += not is_reaped

    def freeze(self, allocation_id: str, *, is_frozen: bool = True) -> None:
        """Freeze or thaw the cgroup: `cgroup.events` changes, and nothing has ended."""
        with self._changing(allocation_id) as scope:
            scope.is_frozen = is_frozen

    def hang(self, allocation_id: str, processes: int = 1) -> None:
        """Let some processes ignore being killed, as in uninterruptible sleep; 0 lets them die."""
        with self.lock:
            scope = self._scope(allocation_id)
            scope.unkillable = processes

    def kill_init(self, allocation_id: str) -> None:
        """Kill the process that holds the namespaces; with it all in the PID namespace."""
        with self.lock:
            life = self.lives[allocation_id]
            life.is_init_alive = False
            has_pid = any(n.kind is NamespaceType.PID for n in life.namespaces)
            if has_pid and life.scope is not None:
                life.scope.processes = min(life.scope.processes, life.scope.unkillable)
            self._tell(Observation(allocation_id, Sighting.INIT_DIED))
            self._tell_population(allocation_id)

    def remove_scope(self, allocation_id: str) -> None:
        """Let somebody else remove the empty cgroup."""
        with self.lock:
            self.lives[allocation_id].scope = None
            self._tell(Observation(allocation_id, Sighting.EMPTIED))

    @property
    def is_clean(self) -> bool:
        """Whether nothing of any allocation is left on the machine."""
        with self.lock:
            return not self.lives and not any(image.users for image in self.mounted.values())

    def close(self) -> None:
        """Switch the machine off."""
        with self.lock:
            for name in tuple(self.lives):
                self.drop_namespaces(name)
            self.lives.clear()

    # What its backends use.

    def step(self, step: Step, allocation_id: str) -> None:
        """Tell the hook."""
        if self.hook is not None:
            self.hook(step, allocation_id)

    def make_namespace(self, kind: NamespaceType) -> SimulatedNamespace:
        """Make one, with a new id and the lowest inode number that is free."""
        with self.lock:
            self._last_id += 1
            if self._free_inodes:
                inode = min(self._free_inodes)
                self._free_inodes.remove(inode)
            else:
                inode, self._next_inode = self._next_inode, self._next_inode + 1
            name = f"{_MEMFD_PREFIX}{kind.value}-{self._last_id}"
            descriptor = Descriptor(os.memfd_create(name, os.MFD_CLOEXEC))
            return SimulatedNamespace(kind, self._last_id, inode, descriptor)

    def drop_namespaces(self, allocation_id: str) -> None:
        """Let an allocation's namespaces go; whoever has descriptors of them keeps those."""
        with self.lock:
            life = self.lives[allocation_id]
            self._free_inodes += [namespace.inode for namespace in life.namespaces]
            close_all(namespace.descriptor for namespace in life.namespaces)
            life.namespaces.clear()

    def attach(self, backend: SimulatedBackend) -> None:
        """Let a backend hear what happens."""
        with self.lock:
            self._watchers.append(backend)

    def detach(self, backend: SimulatedBackend) -> None:
        """Let a backend hear no more."""
        with self.lock:
            self._watchers = [watcher for watcher in self._watchers if watcher is not backend]

    def _scope(self, allocation_id: str) -> SimulatedScope:
        scope = self.lives[allocation_id].scope
        if scope is None:
            raise KeyError(f"the cgroup of {allocation_id} is gone")
        return scope

    @contextmanager
    def _changing(self, allocation_id: str) -> Iterator[SimulatedScope]:
        with self.lock:
            yield self._scope(allocation_id)
            self._tell_population(allocation_id)

    def _tell_population(self, allocation_id: str) -> None:
        scope = self.lives[allocation_id].scope
        if scope is not None and scope.is_populated:
            self._tell(Observation(allocation_id, Sighting.POPULATED))
        elif scope is None or scope.was_used:
            self._tell(Observation(allocation_id, Sighting.EMPTIED))
        else:
            self._tell(Observation(allocation_id, Sighting.CHANGED))

    def _tell(self, observation: Observation) -> None:
        for watcher in self._watchers:
            watcher.hear(observation)


class SimulatedBackend:
    """
    A provider's program on a simulated node; fulfils `transport.contract.Backend`.

    Args:
        node: the machine; several backends may share it, one after the other.
        hold_time_s: how long an image stays mounted after its last user.
        clock: seconds, for the hold time.
    """

    def __init__(
        self,
        node: SimulatedNode,
        *,
        hold_time_s: float = 60.0,
        clock: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self._node = node
        self._hold_time_s = hold_time_s
        self._clock = clock
        self._watched: set[str] = set()
        self._over: set[str] = set()
        """Allocations that have ended and are not released."""
        self._heard: list[Observation] = []
        self._signal = Descriptor(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        node.attach(self)

    # The seed's two.

    def create_namespaces(self, request: NamespaceRequest) -> NamespaceResponse:
        """
        Make an allocation on the node.

        Raises:
            CreationFailed: the request breaks a rule, its allocation is alive, or a step failed;
                the steps before it are undone.
        """
        reason = objection(request)
        if reason is not None:
            raise CreationFailed(reason)
        name = request.allocation_id
        node = self._node
        node.step(Step.INTEND, name)
        with node.lock:
            if name in node.journal:
                raise CreationFailed(f"allocation {name} is alive already")
            node.journal[name] = _Entry(request, is_over=name in self._over)
            life = node.lives.setdefault(name, _Life())
        try:
            self._make(request, life)
            node.step(Step.PUBLISH, name)
        except (SimulatedFailure, OSError) as error:
            self._undo(name)
            raise CreationFailed(str(error)) from error
        mount_path = None
        if request.uenv_image is not None:
            mount_path = mount_path_below(node.uenv_base, request.uenv_image)
        response = NamespaceResponse(name, request.namespaces, mount_path)
        with node.lock:
            entry = node.journal[name]
            if entry.is_over:
                self._undo(name)
                raise CreationFailed("publish: the allocation has ended meanwhile")
            entry.standing, entry.response = Standing.CREATED, response
        return response

    def release_namespaces(self, allocation_id: str) -> None:
        """
        Try to release an allocation: kill, and remove what is dead.

        Raises:
            AllocationNotFound: there is none of that name.
        """
        node = self._node
        with node.lock:
            entry = node.journal.get(allocation_id)
            if entry is None:
                self._over.discard(allocation_id)  # it failed by itself, and ended after that
        if entry is None:
            raise AllocationNotFound(allocation_id)
        self.record_ended(allocation_id)
        with node.lock:
            self._watched.discard(allocation_id)
        node.step(Step.KILL, allocation_id)
        with node.lock:
            life = node.lives.setdefault(allocation_id, _Life())
            life.is_init_alive = False
            if life.scope is not None and life.scope.processes > 0:
                # Killed now, gone when next looked at: like the Linux kernel, never at once.
                life.scope.processes = life.scope.unkillable
                return
        node.step(Step.REMOVE_SCOPE, allocation_id)
        node.step(Step.FORGET, allocation_id)
        self._undo(allocation_id)

    # The rest of the contract.

    def bundle_of(self, allocation_id: str) -> DescriptorBundle:
        """Open the allocation's namespaces, in request order; the caller owns the bundle."""
        with self._node.lock:
            life = self._node.lives.get(allocation_id)
            if life is None or self._node.journal[allocation_id].standing is Standing.REMAINS:
                raise AllocationNotFound(allocation_id)
            if not life.is_init_alive:
                raise FdPassing(f"the init of {allocation_id} is dead")
            return _duplicates(life.namespaces)

    def why_alive(self, allocation_id: str) -> str | None:
        """Say what is left of an allocation whose release was tried."""
        with self._node.lock:
            life = self._node.lives.get(allocation_id)
            if life is None:
                return None
            if life.scope is not None and life.scope.unkillable and life.scope.processes:
                return f"{life.scope.processes} processes do not die"
            return "its processes are being killed"

    def recover(self) -> Recovery:
        """Find what an earlier program left on the node."""
        with self._node.lock:
            adoptions = tuple(self._adopt(entry) for entry in self._node.journal.values())
            return Recovery(adoptions, tuple(self._node.remembered))

    def record_handed_off(self, allocation_id: str) -> None:
        """Note that an allocation was handed over."""
        self._node.step(Step.RECORD_HANDOFF, allocation_id)
        with self._node.lock:
            entry = self._node.journal.get(allocation_id)
            if entry is not None and entry.standing is Standing.CREATED:
                entry.standing = Standing.HANDED_OFF

    def record_ended(self, allocation_id: str) -> None:
        """Note that an allocation is over; a creation under way will not be published."""
        self._over.add(allocation_id)
        with self._node.lock:
            entry = self._node.journal.get(allocation_id)
        if entry is not None and not entry.is_over:
            self._node.step(Step.RECORD_END, allocation_id)
            with self._node.lock:
                entry.is_over = True
                entry.standing = Standing.REMAINS

    def watch(self, allocation_id: str) -> None:
        """Begin to observe an allocation."""
        with self._node.lock:
            life = self._node.lives.get(allocation_id)
            if life is None:
                raise AllocationNotFound(allocation_id)
            self._watched.add(allocation_id)
            if not life.is_init_alive:
                self.hear(Observation(allocation_id, Sighting.INIT_DIED))
            if life.scope is None or (life.scope.was_used and not life.scope.is_populated):
                self.hear(Observation(allocation_id, Sighting.EMPTIED))
            elif life.scope.is_populated:
                self.hear(Observation(allocation_id, Sighting.POPULATED))

    def fileno(self) -> int:
        """Lend the descriptor that is readable when there is something to observe."""
        return self._signal.fileno()

    def observe(self) -> list[Observation]:
        """Say what has been seen since the last call."""
        with self._node.lock:
            heard, self._heard = self._heard, []
            if heard:
                os.eventfd_read(self._signal.fileno())
            return heard

    def is_over(self, allocation_id: str) -> bool:
        """Read whether the cgroup was used and is empty; a cgroup that is gone is empty."""
        with self._node.lock:
            life = self._node.lives.get(allocation_id)
            if life is None:
                return False
            if life.scope is None:
                return True
            return life.scope.was_used and not life.scope.is_populated

    def tidy(self) -> float | None:
        """Drop images whose last user left long enough ago."""
        now = self._clock()
        with self._node.lock:
            idle = {
                name: image.idle_since
                for name, image in self._node.mounted.items()
                if image.idle_since is not None
            }
            left = {name: since + self._hold_time_s - now for name, since in idle.items()}
            for name in [name for name, rest_s in left.items() if rest_s <= 0]:
                del self._node.mounted[name]
                del left[name]
        return min(left.values(), default=None)

    def close(self) -> None:
        """Stop hearing of the node; what is alive on it stays alive."""
        self._node.detach(self)
        self._signal.close()

    def hear(self, observation: Observation) -> None:
        """Take note of what the node tells; called with the node's lock held."""
        if observation.allocation_id in self._watched:
            self._heard.append(observation)
            os.eventfd_write(self._signal.fileno(), 1)

    # Steps.

    def _make(self, request: NamespaceRequest, life: _Life) -> None:
        name = request.allocation_id
        self._node.step(Step.ANCHOR, name)
        with self._node.lock:
            life.is_init_alive = True
            for kind in request.namespaces:
                life.namespaces.append(self._node.make_namespace(kind))
        self._node.step(Step.SCOPE, name)
        with self._node.lock:
            life.scope = SimulatedScope()
        if request.uenv_image is not None:
            self._node.step(Step.IMAGE, name)
            self._mount(request.uenv_image, name, life)

    def _mount(self, image: str, user: str, life: _Life) -> None:
        if image not in self._node.images:
            raise SimulatedFailure(f"open image: ENOENT: {image}")
        with self._node.lock:
            mounted = self._node.mounted.setdefault(image, _Image())
            mounted.users.add(user)
            mounted.idle_since = None
            life.image = image

    def _undo(self, name: str) -> None:
        """Take everything of an allocation off the node, and its line out of the journal."""
        node = self._node
        with node.lock:
            life = node.lives[name]
            node.drop_namespaces(name)
            if life.image is not None:
                mounted = node.mounted[life.image]
                mounted.users.discard(name)
                mounted.idle_since = None if mounted.users else self._clock()
            del node.lives[name]
            del node.journal[name]
            node.remembered.append(name)
            self._over.discard(name)

    def _adopt(self, entry: _Entry) -> Adoption:
        life = self._node.lives.get(entry.request.allocation_id)
        is_dead = life is None or not life.is_init_alive or life.scope is None
        if is_dead or entry.standing is Standing.REMAINS:
            return Adoption(Standing.REMAINS, entry.request, None)
        return Adoption(entry.standing, entry.request, entry.response)


class SimulatedInspector:
    """Tells what a simulated namespace's descriptor is, by its memfd's name; in any program."""

    def inspect(self, fd: int) -> NamespaceIdentity:
        """
        Say which simulated namespace a descriptor refers to.

        Raises:
            FdPassing: it is none.
        """
        target = os.readlink(f"/proc/self/fd/{fd}")
        name = target.removeprefix("/memfd:").removesuffix(" (deleted)")
        try:
            _, kind, unique_id = name.split("-")
            return NamespaceIdentity(NamespaceType(kind), (int(unique_id),))
        except ValueError:
            raise FdPassing(f"{target} is not a namespace") from None

    def own(self, kind: NamespaceType) -> NamespaceIdentity | None:
        """A program is in no simulated namespace."""
        return None


def _duplicates(namespaces: list[SimulatedNamespace]) -> DescriptorBundle:
    made: list[Descriptor] = []
    try:
        for namespace in namespaces:
            made.append(namespace.descriptor.duplicate())
    except OSError as error:
        close_all(made)
        raise FdPassing(f"no descriptor is left: {error.strerror}") from error
    return DescriptorBundle([namespace.kind for namespace in namespaces], made)
