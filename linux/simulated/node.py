"""`SimulatedNode`: a machine in memory on which a simulated backend works.

It behaves as the Linux kernel does, never more leniently, by the models beside this module: inode
numbers are reused, a PID namespace outlives its init and is useless then, an init does not end
before everything in its namespace is reaped, a zombie does not populate a cgroup, freezing is not
ending, what is killed is not gone at once, what cannot be killed stays, and a descriptor of a mount
namespace keeps the image in it mounted.

Descriptors are memfds, so that they can be passed over a socket, counted and closed like any other.
The name of a memfd says which namespace it stands for, to other programs as well
(`SimulatedInspector`).
"""

from __future__ import annotations

import fcntl
import os
import threading
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Final, Protocol

from statemachine.errors import FdPassing
from statemachine.messages import NamespaceRequest, NamespaceType
from statemachine.states import AllocationState
from transport.contract import Observation, Sighting, Step
from transport.descriptors import Descriptor, NamespaceIdentity

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
"""Default directory of images inside an allocation of a simulated node."""

_MEMFD_PREFIX: Final = "nshandoff-"


class SimulatedFailure(Exception):
    """Raised by a hook: the step fails, as a system call would."""


class SimulatedCrash(BaseException):
    """Raised by a hook: the provider's program dies here. Nothing in it may catch this."""


Hook = Callable[[Step, str], None]
"""Called with a step and the allocation before the step is done; may raise, or wait."""


class NodeObserver(Protocol):
    """A program that gets reports of what happens on a node."""

    def notify(self, observation: Observation) -> None:
        """Take note of what happened; called with the node's lock held."""
        ...


@dataclass(slots=True)
class NodeNamespace:
    """A namespace of a simulated node, with the memfd that stands for it."""

    namespace: SimulatedNamespace
    """What the namespace model knows of it."""
    descriptor: Descriptor
    """The memfd, which this owns."""
    mounts: SimulatedTree | None = None
    """Of a mount namespace with an image in it that has not gone."""

    def open(self) -> Descriptor:
        """Open it once more; the caller owns the descriptor."""
        if self.mounts is None:
            return self.descriptor.duplicate()
        # An open file of its own with a lock on it. The lock lasts as long as any copy of this
        # descriptor, in any process: so the node can find out whether one is still open.
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
    """Its place in the cgroup."""
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
    """In the order of the request."""
    init: SimulatedTask | None = None
    """What keeps the namespaces; None before it is made and after it is gone."""
    scope: SimulatedCgroup | None = None
    """Its cgroup, if it has one."""
    image: str | None = None
    """What is mounted inside."""
    processes: list[NodeProcess] = field(default_factory=list)
    """Those of its workload."""
    unreaped: list[SimulatedTask] = field(default_factory=list)
    """Dead in the PID namespace, and not reaped by their parent outside."""

    @property
    def is_init_alive(self) -> bool:
        """Whether its namespaces can be opened, and entered with success."""
        return self.init is not None and self.init.state is TaskState.RUNNING

    @property
    def is_init_gone(self) -> bool:
        """Whether its pidfd is readable: it has ended, or there is none."""
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
class JournalLine:
    """What the node's journal says of one allocation."""

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
        self.journal: dict[str, JournalLine] = {}
        self.remembered: list[str] = []
        self.lock = threading.RLock()
        self._listeners: list[NodeObserver] = []
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
        """Put processes into uninterruptible sleep, in which they do not die; 0 ends that."""
        with self.lock:
            for number, process in enumerate(self.allocations[allocation_id].processes):
                process.member.is_killable = number >= processes

    def leave_unreaped(self, allocation_id: str) -> None:
        """Let a process in the PID namespace die whose parent, outside, does not reap it."""
        with self.lock:
            allocation = self.allocations[allocation_id]
            task = self._start_in(each.namespace for each in allocation.namespaces)
            task.kill()
            allocation.unreaped.append(task)

    def reap(self, allocation_id: str) -> None:
        """Let that parent reap its children."""
        with self.lock:
            allocation = self.allocations[allocation_id]
            was_gone = allocation.is_init_gone
            while allocation.unreaped:
                allocation.unreaped.pop().reap()
            if allocation.is_init_gone and not was_gone:
                self._report(Observation(allocation_id, Sighting.INIT_DIED))
            self._drop_if_empty(allocation_id)

    def kill_init(self, allocation_id: str) -> None:
        """Kill the init, and with it everything in its PID namespace."""
        with self.lock:
            if self.end_init(allocation_id):
                self._report(Observation(allocation_id, Sighting.INIT_DIED))
            self._report_population(allocation_id)

    def prepare_scope(self, allocation_id: str) -> SimulatedCgroup:
        """Let another program make the cgroup before the provider does; EEXIST."""
        with self.lock:
            return self._slice.make(allocation_id)

    def remove_scope(self, allocation_id: str) -> None:
        """Let another program remove the cgroup, which may be used by no allocation; EBUSY."""
        with self.lock:
            self._slice.remove(allocation_id)
            if self.find(allocation_id).scope is not None:
                self.allocations[allocation_id].scope = None
                self._drop_if_empty(allocation_id)
                self._report(Observation(allocation_id, Sighting.EMPTIED))

    def discard_scope(self, allocation_id: str) -> None:
        """Let another program end what is in a cgroup that no allocation uses, and remove it."""
        with self.lock:
            scope = self._slice.find(allocation_id)
            scope.kill()
            scope.settle()
            scope.children.clear()
            self._slice.remove(allocation_id)

    def has_scope(self, allocation_id: str) -> bool:
        """Say whether the cgroup is there, made by a consumer or by the provider."""
        with self.lock:
            return allocation_id in self._slice.children

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
    def identities(self) -> Counter[Hashable]:
        """The namespaces that it has a memfd of, as `SimulatedInspector` identifies them."""
        with self.lock:
            self.sweep()
            return Counter(
                NamespaceIdentity(each.namespace.kind, (each.namespace.unique_id,))
                for each in self._namespaces_with_memfd()
            )

    def close(self) -> None:
        """Switch the machine off."""
        with self.lock:
            for each in self._namespaces_with_memfd():
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
        """Make the cgroup, or adopt the one that is there; EEXIST if that is used or owned."""
        with self.lock:
            scope = self._slice.children.get(allocation_id)
            if scope is None or scope.is_in_use or scope.has_owner:
                scope = self._slice.make(allocation_id)
                scope.is_made_here = True
            scope.has_owner, scope.was_used = True, False
            self.allocations.setdefault(allocation_id, NodeAllocation()).scope = scope

    def drop_scope(self, allocation_id: str) -> None:
        """Remove the cgroup, or give it back if it was adopted; EBUSY while it is in use."""
        with self.lock:
            scope = self._slice.find(allocation_id)
            if scope.is_made_here or scope.is_in_use:
                self._slice.remove(allocation_id)
            scope.has_owner = False
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

    def _namespaces_with_memfd(self) -> list[NodeNamespace]:
        allocations = self.allocations.values()
        return [*(n for each in allocations for n in each.namespaces), *self._released]

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

    def attach(self, listener: NodeObserver) -> None:
        """Report what happens to a program from now on."""
        with self.lock:
            self._listeners.append(listener)

    def detach(self, listener: NodeObserver) -> None:
        """Stop reporting to a program."""
        with self.lock:
            self._listeners = [each for each in self._listeners if each is not listener]

    @contextmanager
    def _changing(self, allocation_id: str) -> Iterator[SimulatedCgroup]:
        with self.lock:
            scope = self.allocations[allocation_id].scope
            if scope is None:
                raise KeyError(f"the cgroup of {allocation_id} is gone")
            yield scope
            self._report_population(allocation_id)

    def _report_population(self, allocation_id: str) -> None:
        scope = self.find(allocation_id).scope
        if scope is not None and scope.is_populated:
            self._report(Observation(allocation_id, Sighting.POPULATED))
        elif scope is None or scope.was_used:
            self._report(Observation(allocation_id, Sighting.EMPTIED))
        else:
            self._report(Observation(allocation_id, Sighting.CHANGED))

    def _report(self, observation: Observation) -> None:
        for listener in self._listeners:
            listener.notify(observation)


class SimulatedInspector:
    """Identifies a descriptor of a simulated namespace by the name of its memfd, in any program."""

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
