"""A backend without privileges: a node that exists only in this program.

It keeps the contract of `LinuxBackend` (`transport.contract.Backend`; one suite holds both to it),
runs anywhere, and can be told to misbehave. Its descriptors are memfds, real enough to be passed
over a socket, counted and closed; what they stand for is in their name, so that another program can
tell as well (`SimulatedInspector`).

It is never kinder than the Linux kernel: inode numbers are reused though namespaces are new, a
descriptor of a PID namespace outlives its init and is useless then, an init does not end before
everything in its namespace is reaped, a zombie does not populate a cgroup, freezing is not ending,
what is killed is not gone at once, and what cannot be killed stays. What the kernel's part in this
is, the modules beside this one say; random programs run on them, and on this, and on Linux.

One thing it cannot see: a descriptor that somebody else keeps. On Linux one of a mount namespace
keeps the image mounted in it beyond the hold time; here the image goes.

`SimulatedNode` is the machine, `SimulatedBackend` a provider's program on it. The program can be
dropped without a word and another one started on the same node: that is a crash.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
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

from .cgroups import SimulatedCgroup, SimulatedMember
from .namespaces import (
    SimulatedNamespace,
    SimulatedNamespaces,
    SimulatedTask,
    Stage,
)

_PID: Final = NamespaceType.PID

SIMULATED_UENV_BASE: Final = "/run/pact/uenv"
"""Where images are mounted on a simulated node, unless said otherwise."""

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
class _Held:
    """A namespace of the simulated node, and what stands for it in descriptors."""

    namespace: SimulatedNamespace
    descriptor: Descriptor


@dataclass(slots=True)
class _Workload:
    """A process that somebody started in an allocation's cgroup."""

    member: SimulatedMember
    is_inside: bool
    """Whether it is in the PID namespace, too."""


@dataclass(slots=True)
class _Life:
    """Everything of one allocation that is on the node, whoever knows of it."""

    namespaces: list[_Held] = field(default_factory=list)
    init: SimulatedTask | None = None
    scope: SimulatedCgroup | None = None
    image: str | None = None
    workload: list[_Workload] = field(default_factory=list)
    unreaped: list[SimulatedTask] = field(default_factory=list)
    """Dead in the PID namespace, with a parent outside that has not waited for them."""

    @property
    def is_init_alive(self) -> bool:
        """Whether its namespaces can be opened, and entered with success."""
        return self.init is not None and self.init.stage is Stage.RUNNING

    @property
    def is_init_gone(self) -> bool:
        """Whether its pidfd is readable: it is dead, and waits for nobody any more."""
        return self.init is None or self.init.stage not in (Stage.RUNNING, Stage.DYING)

    @property
    def has_pid_namespace(self) -> bool:
        """Whether its init takes others along."""
        return any(held.namespace.kind is _PID for held in self.namespaces)


@dataclass(slots=True)
class _Entry:
    """A line of the node's journal."""

    request: NamespaceRequest
    standing: Standing = Standing.REMAINS
    response: NamespaceResponse | None = None
    is_over: bool = False


@dataclass(slots=True)
class _Image:
    """What a backend holds mounted, and for whom."""

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
        self.lock = threading.RLock()
        self._watchers: list[SimulatedBackend] = []
        self._namespaces = SimulatedNamespaces()
        self._forge = self._namespaces.boot()
        """Never leaves home for long: what starts inits, and whoever else."""
        self._slice = SimulatedCgroup()

    # What happens on the machine, told by a test or a demonstration.

    def start_process(self, allocation_id: str, *, is_inside: bool = True) -> None:
        """
        Start a process in the allocation's cgroup.

        Args:
            allocation_id: Whose.
            is_inside: Whether it is in the allocation's PID namespace, and dies with its init.
        """
        with self._changing(allocation_id) as scope:
            workload = _Workload(SimulatedMember(), is_inside)
            self.lives[allocation_id].workload.append(workload)
            scope.enter(workload.member)

    def end_process(self, allocation_id: str, *, is_reaped: bool = True) -> None:
        """Let the last process of the cgroup exit; its parent may or may not reap it."""
        with self._changing(allocation_id):
            member = self.lives[allocation_id].workload.pop().member
            member.exit()
            if is_reaped:
                member.reap()

    def freeze(self, allocation_id: str, *, is_frozen: bool = True) -> None:
        """Freeze or thaw the cgroup: `cgroup.events` changes, and nothing has ended."""
        with self._changing(allocation_id) as scope:
            scope.freeze(is_frozen)

    def hang(self, allocation_id: str, processes: int = 1) -> None:
        """Let some processes ignore being killed, as in uninterruptible sleep; 0 lets them die."""
        with self.lock:
            for number, workload in enumerate(self.lives[allocation_id].workload):
                workload.member.is_killable = number >= processes

    def leave_unreaped(self, allocation_id: str) -> None:
        """Let a process die in the PID namespace, with a parent outside that does not wait."""
        with self.lock:
            life = self.lives[allocation_id]
            (home,) = (held.namespace for held in life.namespaces if held.namespace.kind is _PID)
            task = self._start_in([home])
            task.kill()
            life.unreaped.append(task)

    def reap(self, allocation_id: str) -> None:
        """Let that parent wait for what it left."""
        with self.lock:
            life = self.lives[allocation_id]
            was_gone = life.is_init_gone
            while life.unreaped:
                life.unreaped.pop().reap()
            if life.is_init_gone and not was_gone:
                self._tell(Observation(allocation_id, Sighting.INIT_DIED))

    def kill_init(self, allocation_id: str) -> None:
        """Kill the process that holds the namespaces; with it all in the PID namespace."""
        with self.lock:
            life = self.lives[allocation_id]
            self.end_init(life)
            if life.is_init_gone:
                self._tell(Observation(allocation_id, Sighting.INIT_DIED))
            if life.scope is not None:
                life.scope.settle()
            self._tell_population(allocation_id)

    def remove_scope(self, allocation_id: str) -> None:
        """Let somebody else remove the empty cgroup; EBUSY if it is not."""
        with self.lock:
            self.drop_scope(allocation_id)
            self._tell(Observation(allocation_id, Sighting.EMPTIED))

    @property
    def mounted(self) -> list[str]:
        """The images that are mounted: held by a program, or in a living namespace."""
        with self.lock:
            held = {image for watcher in self._watchers for image in watcher.images}
            inside = {life.image for life in self.lives.values() if life.is_init_alive}
            return sorted(held.union(image for image in inside if image is not None))

    @property
    def is_clean(self) -> bool:
        """Whether nothing of any allocation is left on the machine."""
        with self.lock:
            return not self.lives

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

    def start_init(self, life: _Life, kinds: Sequence[NamespaceType]) -> None:
        """Make the namespaces, and the init that holds them."""
        with self.lock:
            life.init = self._start_in(map(self._namespaces.make, kinds))
            for kind in kinds:
                namespace = life.init.namespace(kind)
                name = f"{_MEMFD_PREFIX}{kind.value}-{namespace.unique_id}"
                descriptor = Descriptor(os.memfd_create(name, os.MFD_CLOEXEC))
                life.namespaces.append(_Held(namespace, descriptor))

    def end_init(self, life: _Life) -> None:
        """Kill the init, and tell all in its PID namespace to die."""
        if life.init is None:
            return
        life.init.kill()
        if life.has_pid_namespace:
            for workload in life.workload:
                if workload.is_inside:
                    workload.member.kill()

    def make_scope(self, allocation_id: str) -> None:
        """Make the cgroup."""
        with self.lock:
            self.lives[allocation_id].scope = self._slice.make(allocation_id)

    def drop_scope(self, allocation_id: str) -> None:
        """Remove the cgroup; EBUSY while it is populated."""
        with self.lock:
            if self.lives[allocation_id].scope is not None:
                self._slice.remove(allocation_id)
                self.lives[allocation_id].scope = None

    def drop_namespaces(self, allocation_id: str) -> None:
        """Let an allocation's namespaces go; whoever has descriptors of them keeps those."""
        with self.lock:
            life = self.lives[allocation_id]
            for held in life.namespaces:
                self._namespaces.drop(held.namespace)
            close_all(held.descriptor for held in life.namespaces)
            life.namespaces.clear()

    def _start_in(self, namespaces: Iterable[SimulatedNamespace]) -> SimulatedTask:
        """Let the forge enter some namespaces, start a task, and come home."""
        home = [self._forge.namespace(kind) for kind in NamespaceType]
        for namespace in namespaces:
            self._forge.setns(namespace, namespace.kind)
        try:
            return self._forge.fork()
        finally:
            for namespace in home:
                self._forge.setns(namespace, namespace.kind)

    def attach(self, backend: SimulatedBackend) -> None:
        """Let a backend hear what happens."""
        with self.lock:
            self._watchers.append(backend)

    def detach(self, backend: SimulatedBackend) -> None:
        """Let a backend hear no more."""
        with self.lock:
            self._watchers = [watcher for watcher in self._watchers if watcher is not backend]

    def _scope(self, allocation_id: str) -> SimulatedCgroup:
        scope = self.lives[allocation_id].scope
        if scope is None:
            raise KeyError(f"the cgroup of {allocation_id} is gone")
        return scope

    @contextmanager
    def _changing(self, allocation_id: str) -> Iterator[SimulatedCgroup]:
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
        self.images: dict[str, _Image] = {}
        """What it holds mounted; gone with this program, except where it is in use."""
        self._watched: set[str] = set()
        self._closed: set[str] = set()
        """Allocations whose release was tried, or whose init was found dead at the start."""
        self._over: set[str] = set()
        """Allocations that have ended and are not released."""
        self._scopeless: set[str] = set()
        """Allocations whose cgroup was gone at the start: nothing can be said of it any more."""
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
            self._closed.add(allocation_id)
            # What it was seen to do is not told any more: its name may be another's by then.
            self._heard = [each for each in self._heard if each.allocation_id != allocation_id]
        node.step(Step.KILL, allocation_id)
        with node.lock:
            life = node.lives.setdefault(allocation_id, _Life())
            node.end_init(life)
            if life.scope is not None:
                # What was killed is gone when it is next looked at: like on Linux, never at once.
                life.scope.settle()
                life.scope.kill()
            is_empty = life.scope is None or not life.scope.is_populated
        if is_empty and life.scope is not None:
            node.step(Step.REMOVE_SCOPE, allocation_id)
            node.drop_scope(allocation_id)
        if not is_empty or not life.is_init_gone:
            return
        node.step(Step.FORGET, allocation_id)
        self._undo(allocation_id)

    # The rest of the contract.

    def bundle_of(self, allocation_id: str) -> DescriptorBundle:
        """
        Open the allocation's namespaces, in request order; the caller owns the bundle.

        Raises:
            AllocationNotFound, FdPassing: as the contract says; nothing is open.
        """
        with self._node.lock:
            life = self._node.lives.get(allocation_id)
            if life is None or life.init is None or allocation_id in self._closed:
                raise AllocationNotFound(allocation_id)
            if life.namespaces and not life.is_init_alive:
                raise FdPassing(f"the init of {allocation_id} is dead")
            return _duplicates(life.namespaces)

    def why_alive(self, allocation_id: str) -> str | None:
        """Say what is left of an allocation whose release was tried."""
        with self._node.lock:
            life = self._node.lives.get(allocation_id)
            if life is None:
                return None
            if life.unreaped:
                return f"its init waits for {len(life.unreaped)} that are dead and not reaped"
            staying = [each for each in life.workload if not each.member.is_killable]
            if staying and life.scope is not None and life.scope.is_populated:
                return f"{len(staying)} processes do not die"
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
        """
        Begin to observe an allocation.

        Raises:
            AllocationNotFound, ValueError: as the contract says; nothing changed.
        """
        with self._node.lock:
            life = self._node.lives.get(allocation_id)
            if life is None:
                raise AllocationNotFound(allocation_id)
            if allocation_id in self._watched - self._closed:
                raise ValueError(f"{allocation_id} is already watched")
            self._watched.add(allocation_id)
            if life.is_init_gone and allocation_id not in self._closed:
                self.hear(Observation(allocation_id, Sighting.INIT_DIED))
            if allocation_id in self._scopeless:
                return
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
            with suppress(BlockingIOError):
                os.eventfd_read(self._signal.fileno())
            return heard

    def is_over(self, allocation_id: str) -> bool:
        """Read whether the cgroup was used and is empty; a cgroup that is gone is empty."""
        with self._node.lock:
            life = self._node.lives.get(allocation_id)
            if life is None or allocation_id in self._scopeless:
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
                for name, image in self.images.items()
                if image.idle_since is not None
            }
            left = {name: since + self._hold_time_s - now for name, since in idle.items()}
            for name in [name for name, rest_s in left.items() if rest_s <= 0]:
                del self.images[name]
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
        self._node.start_init(life, request.namespaces)
        self._node.step(Step.SCOPE, name)
        self._node.make_scope(name)
        if request.uenv_image is not None:
            self._node.step(Step.IMAGE, name)
            self._mount(request.uenv_image, name, life)

    def _mount(self, image: str, user: str, life: _Life) -> None:
        if image not in self._node.images:
            raise SimulatedFailure(f"open image: ENOENT: {image}")
        with self._node.lock:
            self._use(image, user)
            life.image = image

    def _use(self, image: str, user: str) -> None:
        mounted = self.images.setdefault(image, _Image())
        mounted.users.add(user)
        mounted.idle_since = None

    def _undo(self, name: str) -> None:
        """Take everything of an allocation off the node, and its line out of the journal."""
        node = self._node
        with node.lock:
            life = node.lives[name]
            node.end_init(life)
            node.drop_scope(name)
            node.drop_namespaces(name)
            for image in self.images.values():
                if name in image.users:
                    image.users.discard(name)
                    image.idle_since = None if image.users else self._clock()
            del node.lives[name]
            del node.journal[name]
            node.remembered = [*(each for each in node.remembered if each != name), name]
            self._over.discard(name)
            self._closed.discard(name)
            self._scopeless.discard(name)

    def _adopt(self, entry: _Entry) -> Adoption:
        name = entry.request.allocation_id
        life = self._node.lives.get(name)
        if life is None or life.scope is None:
            self._scopeless.add(name)
        is_dead = life is None or life.is_init_gone or life.scope is None
        if life is None or life.is_init_gone:
            self._closed.add(name)
        if is_dead or entry.standing is Standing.REMAINS:
            return Adoption(Standing.REMAINS, entry.request, None)
        if entry.request.uenv_image is not None and life is not None and life.is_init_alive:
            self._use(entry.request.uenv_image, name)
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


def _duplicates(namespaces: list[_Held]) -> DescriptorBundle:
    made: list[Descriptor] = []
    try:
        for held in namespaces:
            made.append(held.descriptor.duplicate())
    except OSError as error:
        close_all(made)
        raise FdPassing(f"no descriptor is left: {error.strerror}") from error
    return DescriptorBundle([held.namespace.kind for held in namespaces], made)
