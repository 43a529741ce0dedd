"""`SimulatedBackend`: the backend contract without privileges, on a node that exists in memory.

It does the same steps as `LinuxBackend`, runs anywhere, and can be made to fail. Descriptors are
memfds, so that they can be passed over a socket, counted and closed like any other; the name of a
memfd says which namespace it stands for, to other programs as well (`SimulatedInspector`).

`SimulatedNode` is the machine, `SimulatedBackend` a provider's program on it. The program can be
dropped and another one started on the same node: that is a crash.

The node behaves as the Linux kernel does, never more kindly, by the models beside this module: inode numbers are reused, a PID namespace outlives its
init and is useless then, an init does not end before everything in its namespace is reaped, a
zombie does not populate a cgroup, freezing is not ending, what is killed is not gone at once, what
cannot be killed stays, and a descriptor of a mount namespace keeps the image in it mounted. Random
programs compare the models, and this backend, with Linux.
"""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

from statemachine.errors import AllocationNotFound, FdPassing
from statemachine.lifecycle import AllocationState
from statemachine.messages import NamespaceRequest, NamespaceType
from statemachine.provider import REMEMBERED_MAX
from transport.contract import Adoption, Observation, Recovery, Sighting, Step
from transport.descriptors import Descriptor, DescriptorBundle, NamespaceIdentity

from ..steps import StepwiseAllocation, StepwiseBackend
from .cgroups import SimulatedCgroup, SimulatedMember
from .mounts import (
    Propagation,
    SimulatedImage,
    SimulatedMount,
    SimulatedSuperblock,
    SimulatedTree,
)
from .namespaces import (
    SimulatedNamespace,
    SimulatedNamespaces,
    SimulatedTask,
    TaskState,
)

SIMULATED_UENV_BASE: Final = "/run/pact/uenv"
"""Where images are mounted on a simulated node, unless said otherwise."""

_MEMFD_PREFIX: Final = "nshandoff-"


class SimulatedFailure(Exception):
    """Raised by a hook: the step fails, as a system call would."""


class SimulatedCrash(BaseException):
    """Raised by a hook: the provider's program dies here. Nothing in it may catch this."""


Hook = Callable[[Step, str], None]
"""Called with a step and the allocation before the step is done; may raise, or wait."""


@dataclass(slots=True)
class NodeNamespace:
    """A namespace of a simulated node, with the memfd that stands for it."""

    namespace: SimulatedNamespace
    descriptor: Descriptor
    mounts: SimulatedTree | None = None
    """Of a mount namespace with an image in it that has not gone."""

    def open(self) -> Descriptor:
        """Open it once more; the caller owns the descriptor."""
        if self.mounts is None:
            return self.descriptor.duplicate()
        # An open file of its own with a lock on it. The lock lasts as long as any copy of this
        # descriptor, in any process: so the node can tell whether one is still open.
        path = f"/proc/self/fd/{self.descriptor.fileno()}"
        opened = Descriptor(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        fcntl.flock(opened.fileno(), fcntl.LOCK_SH)
        return opened

    def is_open_elsewhere(self) -> bool:
        """Say whether anything else has a descriptor of it open, or a message in flight has one."""
        try:
            fcntl.flock(self.descriptor.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        fcntl.flock(self.descriptor.fileno(), fcntl.LOCK_UN)
        return False


@dataclass(slots=True)
class NodeProcess:
    """A process in an allocation's cgroup; its parent reaps it when it dies by itself."""

    member: SimulatedMember
    task: SimulatedTask | None
    """Its place in the allocation's namespaces; None if it is in none of them."""

    def settle(self) -> None:
        """Let it die if it was told to and can."""
        self.member.settle()
        if not self.member.is_alive and self.task is not None:
            self.task.kill()
            if self.task.state is TaskState.DEAD:
                self.task.reap()


@dataclass(slots=True)
class NodeAllocation:
    """Everything of one allocation that is on a simulated node."""

    namespaces: list[NodeNamespace] = field(default_factory=list)
    init: SimulatedTask | None = None
    scope: SimulatedCgroup | None = None
    image: str | None = None
    """What is mounted inside."""
    processes: list[NodeProcess] = field(default_factory=list)
    unreaped: list[SimulatedTask] = field(default_factory=list)
    """Dead in the PID namespace, with a parent outside that has not waited for them."""

    @property
    def is_init_alive(self) -> bool:
        """Whether its namespaces can be opened, and entered with success."""
        return self.init is not None and self.init.state is TaskState.RUNNING

    @property
    def is_init_gone(self) -> bool:
        """Whether its pidfd is readable: it has died and waits for nothing any more."""
        return self.init is None or self.init.state not in (TaskState.RUNNING, TaskState.DYING)

    @property
    def has_running_task(self) -> bool:
        """Whether a process is in its namespaces."""
        tasks = (self.init, *(process.task for process in self.processes))
        return any(task is not None and task.state is TaskState.RUNNING for task in tasks)

    def settle(self) -> None:
        """Let the processes die that were told to and can."""
        for process in self.processes:
            process.settle()


@dataclass(slots=True)
class _Entry:
    """A line of the node's journal."""

    request: NamespaceRequest
    state: AllocationState = AllocationState.REQUESTED


class SimulatedNode:
    """
    A machine: what is on it stays when a provider's program dies.

    Args:
        images: the image files below its image root.
        uenv_base: where images appear inside an allocation.
        hook: called before every step of every backend on this node.
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
        self.allocations: dict[str, NodeAllocation] = {}
        self.journal: dict[str, _Entry] = {}
        self.remembered: list[str] = []
        self.lock = threading.RLock()
        self._backends: list[SimulatedBackend] = []
        self._namespaces = SimulatedNamespaces()
        self._forge = self._namespaces.boot()
        """Starts all processes, and returns to the node's namespaces each time."""
        self._slice = SimulatedCgroup()
        self._mounts = SimulatedTree.boot()
        self._superblocks: list[SimulatedSuperblock] = []
        self._released: list[NodeNamespace] = []
        """Mount namespaces of released allocations that are open elsewhere."""

    # What happens on the machine: called by a test or a demonstration.

    def start_process(self, allocation_id: str, *, is_inside: bool = True) -> None:
        """
        Start a process in the allocation's cgroup.

        Args:
            allocation_id: Whose.
            is_inside: Whether it is in the allocation's namespaces, too.
        """
        with self._changing(allocation_id) as scope:
            allocation = self.allocations[allocation_id]
            homes = [each.namespace for each in allocation.namespaces]
            task = self._start_in(homes) if is_inside else None
            allocation.processes.append(NodeProcess(SimulatedMember(), task))
            scope.enter(allocation.processes[-1].member)

    def end_process(self, allocation_id: str, *, is_reaped: bool = True) -> None:
        """Let the last process of the cgroup exit; its parent may or may not reap it."""
        with self._changing(allocation_id):
            process = self.allocations[allocation_id].processes.pop()
            process.member.exit()
            if process.task is not None and not is_reaped:
                process.task.kill()
                self.allocations[allocation_id].unreaped.append(process.task)
            elif is_reaped:
                process.settle()
                process.member.reap()

    def freeze(self, allocation_id: str, *, is_frozen: bool = True) -> None:
        """Freeze or thaw the cgroup: `cgroup.events` changes, and nothing has ended."""
        with self._changing(allocation_id) as scope:
            scope.freeze(is_frozen)

    def hang(self, allocation_id: str, processes: int = 1) -> None:
        """Let some processes ignore being killed, as in uninterruptible sleep; 0 lets them die."""
        with self.lock:
            for number, process in enumerate(self.allocations[allocation_id].processes):
                process.member.is_killable = number >= processes

    def leave_unreaped(self, allocation_id: str) -> None:
        """Let a process die in the PID namespace, with a parent outside that does not wait."""
        with self.lock:
            allocation = self.allocations[allocation_id]
            task = self._start_in(each.namespace for each in allocation.namespaces)
            task.kill()
            allocation.unreaped.append(task)

    def reap(self, allocation_id: str) -> None:
        """Let that parent wait for its children."""
        with self.lock:
            allocation = self.allocations[allocation_id]
            was_gone = allocation.is_init_gone
            while allocation.unreaped:
                allocation.unreaped.pop().reap()
            if allocation.is_init_gone and not was_gone:
                self._tell(Observation(allocation_id, Sighting.INIT_DIED))
            self._drop_if_empty(allocation_id)

    def kill_init(self, allocation_id: str) -> None:
        """Kill the process that holds the namespaces, and with it the PID namespace."""
        with self.lock:
            if self.end_init(allocation_id):
                self._tell(Observation(allocation_id, Sighting.INIT_DIED))
            self._tell_population(allocation_id)

    def remove_scope(self, allocation_id: str) -> None:
        """Let another program remove the empty cgroup; EBUSY if it is not empty."""
        with self.lock:
            self.drop_scope(allocation_id)
            self._tell(Observation(allocation_id, Sighting.EMPTIED))

    @property
    def mounted(self) -> list[str]:
        """The images that are mounted, each once for every loop device that it is on."""
        with self.lock:
            self.sweep()
            return sorted(superblock.image for superblock in self._superblocks)

    @property
    def is_clean(self) -> bool:
        """Whether nothing of any allocation is left on the machine."""
        with self.lock:
            return not self.allocations

    @property
    def namespaces(self) -> list[NodeNamespace]:
        """All namespaces that it has a memfd of."""
        with self.lock:
            allocations = self.allocations.values()
            return [*(n for each in allocations for n in each.namespaces), *self._released]

    def close(self) -> None:
        """Switch the machine off."""
        with self.lock:
            for each in self.namespaces:
                each.descriptor.close()
            self._released.clear()
            self.allocations.clear()

    # What its backends use.

    def find(self, allocation_id: str) -> NodeAllocation:
        """Return what there is of an allocation; an empty record if there is nothing."""
        return self.allocations.get(allocation_id) or NodeAllocation()

    def before(self, step: Step, allocation_id: str) -> None:
        """Call the hook."""
        if self.hook is not None:
            self.hook(step, allocation_id)

    def start_init(
        self,
        allocation_id: str,
        kinds: Sequence[NamespaceType],
        image: SimulatedMount | None,
        place: str | None,
    ) -> None:
        """
        Make the namespaces and the init that holds them, with the image attached inside.

        Raises:
            OSError: no descriptor is left; nothing was made.
        """
        with self.lock, ExitStack() as undo:
            made: list[NodeNamespace] = []
            for kind in kinds:
                namespace = self._namespaces.make(kind)
                undo.callback(self._namespaces.drop, namespace)
                name = f"{_MEMFD_PREFIX}{kind.value}-{namespace.unique_id}"
                memfd = undo.enter_context(Descriptor(os.memfd_create(name, os.MFD_CLOEXEC)))
                made.append(NodeNamespace(namespace, memfd))
                if kind is NamespaceType.MOUNT and image is not None and place is not None:
                    made[-1].mounts = self._mounts.copy(Propagation.SLAVE)
                    made[-1].mounts.mount(place, image)
            undo.pop_all()
            allocation = self.allocations.setdefault(allocation_id, NodeAllocation())
            allocation.init = self._start_in(each.namespace for each in made)
            allocation.image = None if image is None else image.superblock.image
            allocation.namespaces += made

    def end_init(self, allocation_id: str) -> bool:
        """
        Kill the init, and with it all in its PID namespace.

        Returns:
            Whether it has ended. It waits for what is not reaped, or does not die.
        """
        allocation = self.find(allocation_id)
        if allocation.init is not None:
            allocation.init.kill()
        for process in allocation.processes:
            if process.task is not None and process.task.state is not TaskState.RUNNING:
                process.member.kill()
        allocation.settle()
        self._drop_if_empty(allocation_id)
        return allocation.is_init_gone

    def make_scope(self, allocation_id: str) -> None:
        """Make the cgroup."""
        with self.lock:
            scope = self._slice.make(allocation_id)
            self.allocations.setdefault(allocation_id, NodeAllocation()).scope = scope

    def drop_scope(self, allocation_id: str) -> None:
        """Remove the cgroup; EBUSY while it is populated."""
        with self.lock:
            self._slice.remove(allocation_id)
            self.allocations[allocation_id].scope = None
            self._drop_if_empty(allocation_id)

    def mount(self, image: SimulatedImage) -> SimulatedMount:
        """Mount an image, attached nowhere."""
        with self.lock:
            mount = image.acquire()
            if mount.superblock not in self._superblocks:
                self._superblocks.append(mount.superblock)
            return mount

    def find_superblock(self, image: str) -> SimulatedSuperblock | None:
        """Find the filesystem of an image that is mounted anywhere."""
        with self.lock:
            self.sweep()
            return next((each for each in self._superblocks if each.image == image), None)

    def _drop_if_empty(self, allocation_id: str) -> None:
        """Forget an allocation that has neither an init nor a cgroup."""
        allocation = self.allocations.get(allocation_id)
        if allocation is None or allocation.scope is not None or not allocation.is_init_gone:
            return
        if allocation.init is not None:
            allocation.init.reap()
        self._released += allocation.namespaces
        del self.allocations[allocation_id]
        self.sweep()

    def sweep(self) -> None:
        """Unmount what was mounted in the mount namespaces that nothing refers to any more."""
        idle = [each for each in self.allocations.values() if not each.has_running_task]
        for each in (*(n for allocation in idle for n in allocation.namespaces), *self._released):
            if each.mounts is not None and not each.is_open_elsewhere():
                each.mounts.end()
                each.mounts = None
        for each in [each for each in self._released if each.mounts is None]:
            self._released.remove(each)
            self._namespaces.drop(each.namespace)
            each.descriptor.close()
        self._superblocks = [each for each in self._superblocks if each.is_alive]

    def _start_in(self, namespaces: Iterable[SimulatedNamespace]) -> SimulatedTask:
        """Have the forge enter some namespaces, start a task, and return."""
        home = [self._forge.namespace(kind) for kind in NamespaceType]
        for namespace in namespaces:
            self._forge.setns(namespace, namespace.kind)
        try:
            return self._forge.fork()
        finally:
            for namespace in home:
                self._forge.setns(namespace, namespace.kind)

    def attach(self, backend: SimulatedBackend) -> None:
        """Tell a backend what happens from now on."""
        with self.lock:
            self._backends.append(backend)

    def detach(self, backend: SimulatedBackend) -> None:
        """Tell a backend no more."""
        with self.lock:
            self._backends = [each for each in self._backends if each is not backend]

    @contextmanager
    def _changing(self, allocation_id: str) -> Iterator[SimulatedCgroup]:
        with self.lock:
            scope = self.allocations[allocation_id].scope
            if scope is None:
                raise KeyError(f"the cgroup of {allocation_id} is gone")
            yield scope
            self._tell_population(allocation_id)

    def _tell_population(self, allocation_id: str) -> None:
        scope = self.find(allocation_id).scope
        if scope is not None and scope.is_populated:
            self._tell(Observation(allocation_id, Sighting.POPULATED))
        elif scope is None or scope.was_used:
            self._tell(Observation(allocation_id, Sighting.EMPTIED))
        else:
            self._tell(Observation(allocation_id, Sighting.CHANGED))

    def _tell(self, observation: Observation) -> None:
        for backend in self._backends:
            backend.hear(observation)


@dataclass(slots=True)
class _Allocation(StepwiseAllocation):
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


class SimulatedBackend(StepwiseBackend[_Allocation]):
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
        self._heard: list[Observation] = []
        self._signal = Descriptor(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        node.attach(self)

    # The steps of a creation.

    def _new(self, request: NamespaceRequest) -> _Allocation:
        return _Allocation(request)

    def _perform(self, step: Step, allocation: _Allocation) -> str | None:
        self._node.before(step, allocation.name)
        with self._node.lock:
            return _WORK[step](self, allocation)

    def _intend(self, allocation: _Allocation) -> None:
        self._node.journal[allocation.name] = _Entry(allocation.request)

    def _make_scope(self, allocation: _Allocation) -> None:
        self._node.make_scope(allocation.name)
        allocation.has_scope = True

    def _mount_image(self, allocation: _Allocation) -> None:
        name = allocation.request.uenv_image
        assert name is not None
        if name not in self._node.images:
            raise SimulatedFailure(f"resolve image: openat2(2): ENOENT: {name}")
        stored = self._images.setdefault(name, _StoredImage(SimulatedImage(name)))
        allocation.image = self._node.mount(stored.image)
        stored.users.add(allocation.name)
        stored.idle_since = None

    def _make_anchor(self, allocation: _Allocation) -> None:
        request = allocation.request
        place = self._response_to(request).uenv_mount_path
        self._node.start_init(allocation.name, request.namespaces, allocation.image, place)
        allocation.image = None
        allocation.has_init = True

    def _publish(self, allocation: _Allocation) -> None:
        if allocation.name in self._over:
            raise SimulatedFailure("the allocation has ended meanwhile")
        self._node.journal[allocation.name].state = AllocationState.CREATED

    # The steps of a release.

    def _stop(self, allocation: _Allocation) -> None:
        with self._node.lock:
            # What was seen of it is not reported any more: its name may be another's by then.
            self._heard = [each for each in self._heard if each.allocation_id != allocation.name]
            if allocation.image is not None:
                allocation.image.end()
                allocation.image = None

    def _end_init(self, allocation: _Allocation) -> str | None:
        if not self._node.end_init(allocation.name):
            return "its init waits for processes that do not die or are not reaped"
        allocation.has_init = False
        return None

    def _release_image(self, allocation: _Allocation) -> str | None:
        if allocation.has_init:
            return "the image is mounted in the namespace of a living init"
        stored = self._images.get(allocation.request.uenv_image or "")
        if stored is not None and allocation.name in stored.users:
            stored.users.discard(allocation.name)
            stored.idle_since = None if stored.users else self._clock()
        return None

    def _remove_scope(self, allocation: _Allocation) -> str | None:
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

    def _forget(self, allocation: _Allocation) -> None:
        node, name = self._node, allocation.name
        if node.journal.pop(name, None) is not None:
            others = [each for each in node.remembered if each != name]
            node.remembered = [*others, name][-REMEMBERED_MAX:]

    def _note(self, allocation: _Allocation, state: AllocationState) -> None:
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
                self.hear(Observation(allocation_id, Sighting.INIT_DIED))
            if allocation.has_scope and there.scope is not None and there.scope.is_populated:
                self.hear(Observation(allocation_id, Sighting.POPULATED))
            elif self.is_over(allocation_id):
                self.hear(Observation(allocation_id, Sighting.EMPTIED))

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

    def hear(self, observation: Observation) -> None:
        """Take note of what happened on the node; called with the node's lock held."""
        allocation = self._allocations.get(observation.allocation_id)
        if allocation is not None and allocation.is_watched and not allocation.is_released:
            self._heard.append(observation)
            os.eventfd_write(self._signal.fileno(), 1)

    def _recover(self, entry: _Entry) -> Adoption:
        allocation = _Allocation(entry.request)
        there = self._node.find(allocation.name)
        allocation.has_scope = there.scope is not None
        allocation.has_init = not there.is_init_gone
        return self._adopt(
            allocation,
            entry.state,
            has_scope=allocation.has_scope,
            has_init=allocation.has_init,
        )

    def _adopt_image(self, image: str, allocation: _Allocation) -> None:
        superblock = self._node.find_superblock(image)
        if superblock is not None:
            stored = self._images.setdefault(image, _StoredImage(SimulatedImage(image)))
            stored.image.adopt(superblock)
            stored.users.add(allocation.name)


_FAILURES: Final = (SimulatedFailure, OSError)
"""What a step can fail with."""

_WORK: Final[Mapping[Step, Callable[[SimulatedBackend, _Allocation], str | None]]] = (
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
