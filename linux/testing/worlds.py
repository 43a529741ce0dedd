"""A machine with a backend on it, simulated or real, for tests of any backend.

A `World` does what happens *to* the backend's program (a crash, a restart, a step that fails) and
what other programs do on the machine (processes that start, die, freeze, are not reaped). What the
backend then does is for the tests to judge.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import sqlite3
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Final, NoReturn

from statemachine.errors import AllocationNotFound
from statemachine.messages import NamespaceRequest, NamespaceResponse, NamespaceType
from statemachine.states import AllocationState
from transport.contract import CREATION, Backend, Recovery, Sighting, Step
from transport.descriptors import DescriptorBundle, Inspector, NamespaceIdentity
from transport.testing.peer import DEADLINE_S, wait_until

from ..anchor import Anchor, find_anchors
from ..backend import LinuxBackend, NodeSettings
from ..cgroups import STATE_ATTRIBUTE, WORKLOAD_SLICE, Scope, anchor_path, read_attribute
from ..features import OLDEST, Features
from ..forge.spawn import spawn_within
from ..instance import instance_of
from ..journal import Entry, read_journal
from ..mounts import loop_devices
from ..namespaces import KernelInspector
from ..pool import POOL_TOKEN_PREFIX, NamespaceTypes
from ..recovery import CREATED_MARK
from ..simulated import (
    SimulatedBackend,
    SimulatedCrash,
    SimulatedFailure,
    SimulatedInspector,
    SimulatedNode,
)
from ..simulated.cgroups import SimulatedMember
from ..syscalls import SyscallError

PID: Final = NamespaceType.PID
NET: Final = NamespaceType.NET
MOUNT: Final = NamespaceType.MOUNT
LIGHT: Final = (PID, MOUNT)
"""What most tests request: a network namespace costs ten times as much."""

POOL: Final[Mapping[NamespaceTypes, int]] = {
    frozenset(kinds): 1 for kinds in ((PID, NET, MOUNT), LIGHT, (PID, NET), (PID,), (NET,))
}
"""What a world makes ahead that has a pool."""

SCOPE_PREFIX: Final = f"nsh-test-{os.getpid()}-"
"""Prefix of the ids of all allocations that this process requests."""

HOLD_TIME_S: Final = 60.0

PF_EXITING: Final = 0x4
"""Of a process that ends, in linux/sched.h."""


OCCUPATIONS: Final = ("another owner", "a process", "a cgroup below")
"""Why a cgroup that is there already is not adopted."""

IMAGE: Final = "hello.sqfs"
OTHER_IMAGE: Final = "deep/other.sqfs"


class World(ABC):
    """A machine with a backend on it. `close` leaves nothing of either."""

    backend: Backend
    inspector: Inspector
    now_s = 0.0
    """The backend's clock, for the hold time."""
    fails_at: Step | None = None
    """The step that fails each time."""
    dies_at: Step | None = None
    """The step before which the program dies."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        """The steps that the backend has done."""

    def before(self, step: Step, name: str) -> None:
        """Note a step before it is done; or let it fail, or let the program die."""
        if step is self.dies_at:
            self.die()
        if step is self.fails_at:
            self.fail()
        self.steps.append(step)

    @abstractmethod
    def fail(self) -> NoReturn:
        """Raise what a step raises that fails."""

    @abstractmethod
    def die(self) -> None:
        """End the program here."""

    @abstractmethod
    def launch(self) -> None:
        """Start the program on the machine as it is; the caller lets it recover."""

    def start(self) -> Recovery:
        """Start the program, and let it recover."""
        self.launch()
        return self.backend.recover()

    def restart(self) -> Recovery:
        """Drop the program, which releases nothing, and start another."""
        self.backend.close()
        return self.start()

    @abstractmethod
    def crash(self, request: NamespaceRequest, step: Step) -> None:
        """Create and release, and let the program die before a step; no other is started."""

    def remains(self, name: str) -> frozenset[Step]:
        """What is on the machine of its only allocation, by the steps that made it."""
        return frozenset(step for step in CREATION if self._is_there(step, name))

    @abstractmethod
    def _is_there(self, step: Step, name: str) -> bool:
        """Whether what a step made is there."""

    # What processes do.

    @abstractmethod
    def join(self, name: str) -> None:
        """Let a process enter the allocation's cgroup and stay."""

    @abstractmethod
    def leave(self, name: str, *, is_reaped: bool = True) -> None:
        """Let the process that joined last exit."""

    @abstractmethod
    def pass_through(self, name: str) -> None:
        """Let a process enter the cgroup and exit at once."""

    @abstractmethod
    def reap_killed(self, name: str) -> None:
        """Reap the processes of an allocation that were killed with it."""

    @abstractmethod
    def freeze(self, name: str, *, is_frozen: bool = True) -> None: ...

    @abstractmethod
    def block_release(self, name: str) -> None:
        """Put a process into the allocation that cannot be killed, so that its release waits."""

    @abstractmethod
    def unblock_release(self, name: str) -> None: ...

    @abstractmethod
    def kill_init(self, name: str) -> None: ...

    # What others do on the machine.

    @abstractmethod
    def remove_scope(self, name: str) -> None: ...

    @abstractmethod
    def prepare_scope(self, name: str) -> None:
        """Make the cgroup before the backend does, as a consumer that sets limits."""

    @abstractmethod
    def occupy_scope(self, name: str, how: str) -> None:
        """Make the cgroup unfit for the backend, in one of the ways of `OCCUPATIONS`."""

    @abstractmethod
    def vacate_scope(self, name: str) -> None:
        """Remove a cgroup that was prepared or occupied, and what is in it."""

    @abstractmethod
    def has_scope(self, name: str) -> bool: ...

    # What is on the machine.

    @abstractmethod
    def mounted(self) -> list[str]:
        """The images that are mounted, as often as they are."""

    @abstractmethod
    def leftovers(self) -> list[str]:
        """What there is of any allocation, except images in their hold time."""

    @abstractmethod
    def close(self) -> None: ...

    # What tests say in one word.

    def identities(self, name: str) -> list[NamespaceIdentity]:
        """The namespaces that the backend opens for an allocation, in its order."""
        with self.backend.bundle_of(name) as bundle:
            return self.inspect(bundle)

    def inspect(self, bundle: DescriptorBundle) -> list[NamespaceIdentity]:
        return [self.inspector.inspect(descriptor.fileno()) for _, descriptor in bundle]

    def release(self, name: str) -> None:
        """Release until nothing is left, as a provider does."""
        wait_until(lambda: self.is_released(name))

    def is_released(self, name: str) -> bool:
        try:
            self.backend.release_namespaces(name)
        except AllocationNotFound:
            return True
        return self.backend.why_alive(name) is None

    def sees(self, name: str, sighting: Sighting) -> None:
        """Wait as an event loop does until the backend reports a sighting."""
        seen: list[Sighting] = []
        poll = select.poll()
        poll.register(self.backend.fileno(), select.POLLIN)
        deadline = time.monotonic() + DEADLINE_S
        while sighting not in seen:
            assert time.monotonic() < deadline, f"{sighting} of {name} was not seen, only {seen}"
            poll.poll(100)
            seen += self.sightings(name)

    def sightings(self, name: str) -> list[Sighting]:
        """What the backend reports without waiting."""
        return [seen.sighting for seen in self.backend.observe() if seen.allocation_id == name]


class SimulatedWorld(World):
    """A machine in memory."""

    inspector = SimulatedInspector()

    def __init__(self) -> None:
        super().__init__()
        self.node = SimulatedNode(frozenset({IMAGE, OTHER_IMAGE}), hook=self.before)

    def fail(self) -> NoReturn:
        raise SimulatedFailure("test(2): EIO")

    def die(self) -> NoReturn:
        raise SimulatedCrash

    def launch(self) -> None:
        self.backend = SimulatedBackend(
            self.node, hold_time_s=HOLD_TIME_S, clock=lambda: self.now_s
        )

    def crash(self, request: NamespaceRequest, step: Step) -> None:
        self.dies_at = step
        with suppress(SimulatedCrash):
            self.backend.create_namespaces(request)
            self.backend.release_namespaces(request.allocation_id)
        self.dies_at = None
        self.backend.close()

    def _is_there(self, step: Step, name: str) -> bool:
        there, entry = self.node.allocations.get(name), self.node.journal.get(name)
        match step:
            case Step.INTEND:
                return entry is not None
            case Step.SCOPE:
                return there is not None and there.scope is not None
            case Step.IMAGE:
                return bool(self.mounted())
            case Step.ANCHOR:
                return there is not None and not there.is_init_gone
            case _:
                return entry is not None and entry.state is AllocationState.CREATED

    def join(self, name: str) -> None:
        self.node.start_process(name, is_inside=False)

    def leave(self, name: str, *, is_reaped: bool = True) -> None:
        self.node.end_process(name, is_reaped=is_reaped)

    def reap_killed(self, name: str) -> None:
        """Simulated parents reap."""

    def pass_through(self, name: str) -> None:
        self.node.start_process(name, is_inside=False)
        self.node.end_process(name)

    def freeze(self, name: str, *, is_frozen: bool = True) -> None:
        self.node.freeze(name, is_frozen=is_frozen)

    def block_release(self, name: str) -> None:
        self.node.leave_unreaped(name)

    def unblock_release(self, name: str) -> None:
        self.node.reap(name)

    def kill_init(self, name: str) -> None:
        self.node.kill_init(name)

    def remove_scope(self, name: str) -> None:
        self.node.remove_scope(name)

    def prepare_scope(self, name: str) -> None:
        self.node.prepare_scope(name)

    def occupy_scope(self, name: str, how: str) -> None:
        scope = self.node.prepare_scope(name)
        match how:
            case "another owner":
                scope.has_owner = True
            case "a process":
                scope.enter(SimulatedMember())
            case _:
                scope.make("below")

    def vacate_scope(self, name: str) -> None:
        self.node.discard_scope(name)

    def has_scope(self, name: str) -> bool:
        return self.node.has_scope(name)

    def mounted(self) -> list[str]:
        return self.node.mounted

    def leftovers(self) -> list[str]:
        return sorted({*self.node.allocations, *self.node.journal})

    def close(self) -> None:
        self.backend.close()
        self.node.close()


class HookedBackend(LinuxBackend):
    """Calls a function before each step; its pool, if it has one, is full for each creation."""

    before: Callable[[Step, str], None]

    def _start_pool(self) -> None:
        """Anchors are made ahead in the caller's thread, where every call can be made to fail."""

    def create_namespaces(self, request: NamespaceRequest) -> NamespaceResponse:
        while self._pool is not None and self._pool.fill(at_once=True):
            pass
        return super().create_namespaces(request)

    def _perform(self, step: Step, allocation: Any) -> str | None:
        self.before(step, allocation.name)
        return super()._perform(step, allocation)


class LinuxWorld(World):
    """
    This machine.

    Args:
        directory: the world's own: state, images' mount point, and whatever a crash needs.
        cgroup2: where cgroup v2 is mounted.
        image_root: has `IMAGE` and `OTHER_IMAGE`.
        features: what the backend may use.
        has_pool: whether anchors are made ahead.
    """

    def __init__(
        self,
        directory: Path,
        cgroup2: Path,
        image_root: Path,
        features: Features | None = None,
        *,
        has_pool: bool = False,
    ) -> None:
        super().__init__()
        self._pool: Mapping[NamespaceTypes, int] = POOL if has_pool else {}
        self.features = features or Features.probe()
        self.inspector = KernelInspector(self.features)
        self.state_dir = directory / "state"
        self.settings = NodeSettings(cgroup2, image_root, directory / "uenv", HOLD_TIME_S)
        self._cgroup2 = cgroup2
        self._image_root = image_root
        self._members: dict[str, list[subprocess.Popen[bytes]]] = {}
        self._entangled: dict[str, subprocess.Popen[bytes]] = {}

    def launch(self) -> None:
        self.backend = self.program()

    def program(self) -> LinuxBackend:
        backend = HookedBackend.for_provider(
            self.settings,
            self.state_dir,
            clock=lambda: self.now_s,
            features=self.features,
            pool=self._pool,
        )
        assert isinstance(backend, HookedBackend)
        backend.before = self.before
        return backend

    def fail(self) -> NoReturn:
        raise SyscallError("test(2)", errno.EIO)

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    @property
    def program_now(self) -> LinuxBackend:
        """The backend, for what only this one has."""
        assert isinstance(self.backend, LinuxBackend)
        return self.backend

    def crash(self, request: NamespaceRequest, step: Step) -> None:
        self.backend.close()
        program = os.fork()
        if program == 0:
            try:
                self.dies_at = step
                self.launch()
                self.backend.create_namespaces(request)
                self.release(request.allocation_id)
            finally:
                os._exit(1)
        assert os.waitpid(program, 0) == (program, signal.SIGKILL)
        # Its forge goes, too, and only then can the anchors' cgroup go with this world.
        wait_until(self._has_no_forge)

    def _is_there(self, step: Step, name: str) -> bool:
        match step:
            case Step.INTEND:
                return self.entry(name) is not None
            case Step.SCOPE:
                return self.scope(name).is_dir()
            case Step.IMAGE:
                return bool(self.mounted())
            case Step.ANCHOR:
                return bool(self.anchors())
            case _:
                # The end is recorded on the scope, so that what is published is void without it.
                entry, scope = self.entry(name), self.scope(name)
                is_marked = read_attribute(scope, STATE_ATTRIBUTE) == CREATED_MARK
                return is_marked and entry is not None and entry.state is AllocationState.CREATED

    def entry(self, name: str) -> Entry | None:
        """What the journal says of an allocation, whether the program runs or not."""
        return next((each for each in self._entries() if each.allocation_id == name), None)

    def _entries(self) -> Sequence[Entry]:
        journal = self.program_now._journal
        try:
            if journal is not None:
                return journal.entries()
        except sqlite3.ProgrammingError:  # it is closed
            pass
        return read_journal(self.state_dir).entries

    def _has_no_forge(self) -> bool:
        procs = self.anchors_cgroup / "cgroup.procs"
        return len(procs.read_text().split()) == len(self._tokens())

    def scope(self, name: str) -> Path:
        return self._cgroup2 / WORKLOAD_SLICE / f"{name}.scope"

    def join(self, name: str) -> None:
        self.adopt_process(name, self.scope(name))

    def adopt_process(self, name: str, cgroup: Path) -> subprocess.Popen[bytes]:
        """Move a new process into a cgroup; it is killed with this world at the latest."""
        process = subprocess.Popen(["sleep", "infinity"])
        self._members.setdefault(name, []).append(process)
        (cgroup / "cgroup.procs").write_text(str(process.pid))
        return process

    def leave(self, name: str, *, is_reaped: bool = True) -> None:
        process = self._members[name][-1]
        process.kill()
        if is_reaped:
            self._members[name].pop().wait()
        else:
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)

    def reap_killed(self, name: str) -> None:
        for process in self._members.pop(name, []):
            assert process.wait(DEADLINE_S) == -signal.SIGKILL

    def pass_through(self, name: str) -> None:
        procs = self.scope(name) / "cgroup.procs"
        subprocess.run(["sh", "-c", 'echo 0 > "$0"', procs], check=True)

    def freeze(self, name: str, *, is_frozen: bool = True) -> None:
        scope = self.scope(name)
        (scope / "cgroup.freeze").write_text(str(int(is_frozen)))
        state = f"frozen {int(is_frozen)}"
        wait_until(lambda: state in (scope / "cgroup.events").read_text())

    def block_release(self, name: str) -> None:
        with self.backend.bundle_of(name) as bundle:
            process = spawn_within(["sleep", "infinity"], bundle)
        self._entangled[name] = process
        # Dead, and not reaped by its parent, which is outside: its init waits for that.
        process.send_signal(signal.SIGKILL)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)

    def unblock_release(self, name: str) -> None:
        self._entangled.pop(name).wait()
        # An init that was killed, also by a release, waited for that, and ends in a moment.
        allocation = self.program_now._allocations.get(name)
        anchor = allocation.anchor if allocation is not None else None
        if anchor is not None:
            wait_until(lambda: not _is_exiting(anchor))

    def kill_init(self, name: str) -> None:
        os.kill(self.init_of(name), signal.SIGKILL)

    def init_of(self, name: str) -> int:
        anchor = self.program_now._find(name).anchor
        assert anchor is not None
        return anchor.pid

    def remove_scope(self, name: str) -> None:
        wait_until(partial(_is_removed, self.scope(name)))

    def prepare_scope(self, name: str) -> None:
        self.scope(name).parent.mkdir(exist_ok=True)
        self.scope(name).mkdir()

    def occupy_scope(self, name: str, how: str) -> None:
        if how == "another owner":
            Scope.create(self._cgroup2, name, how)
            return
        self.prepare_scope(name)
        if how == "a process":
            self.adopt_process(name, self.scope(name))
        else:
            (self.scope(name) / "below").mkdir()

    def vacate_scope(self, name: str) -> None:
        if self._members.get(name):
            self.leave(name)
        for cgroup in (self.scope(name) / "below", self.scope(name)):
            wait_until(partial(_is_removed, cgroup))

    def has_scope(self, name: str) -> bool:
        return self.scope(name).is_dir()

    def mounted(self) -> list[str]:
        return sorted(
            str(image.relative_to(self._image_root))
            for image in loop_images()
            if image.is_relative_to(self._image_root)
        )

    def leftovers(self) -> list[str]:
        return [*self.anchors(), *self.scopes()]

    def scopes(self) -> list[str]:
        """The ids of this process' allocations that have a scope."""
        ours = self._cgroup2.glob(f"{WORKLOAD_SLICE}/{SCOPE_PREFIX}*.scope")
        return sorted(scope.stem for scope in ours)

    def anchors(self) -> list[str]:
        """The tokens of all living anchors of this world but those that wait in a pool."""
        taken = {entry.incarnation for entry in self._entries()} if self._pool else set()
        tokens = self._tokens()
        return [t for t in tokens if t in taken or not t.startswith(POOL_TOKEN_PREFIX)]

    def _tokens(self) -> list[str]:
        anchors = find_anchors(self.anchors_cgroup)
        for anchor in anchors.values():
            anchor.close()
        return sorted(anchors)

    @property
    def anchors_cgroup(self) -> Path:
        return anchor_path(self._cgroup2, instance_of(self.state_dir))

    def close(self) -> None:
        for process in (
            *self._entangled.values(),
            *(p for ps in self._members.values() for p in ps),
        ):
            process.kill()
            process.wait()
        self.backend.close()
        for adoption in self.start().adoptions:
            self.release(adoption.request.allocation_id)
        self.backend.close()


def loop_images() -> Iterator[Path]:
    """The file behind every loop device of this machine."""
    for _, path in loop_devices():
        yield Path(path.removesuffix(" (deleted)"))


def _is_exiting(anchor: Anchor) -> bool:
    """Say whether an init has been killed and has not ended; proc_pid_stat(5), `flags`."""
    try:
        stat = Path(f"/proc/{anchor.pid}/stat").read_text()
        return anchor.is_alive() and bool(int(stat.rpartition(")")[2].split()[6]) & PF_EXITING)
    except (FileNotFoundError, ProcessLookupError):
        return False
    except ValueError:
        return False  # its provider has closed it since, because it has ended


def _is_removed(cgroup: Path) -> bool:
    """Try to remove a cgroup; False while a process that is not listed any more still exits."""
    try:
        cgroup.rmdir()
    except FileNotFoundError:
        return True
    except OSError:
        if (cgroup / "cgroup.procs").read_text():
            raise
        return False
    return True


@contextmanager
def simulated() -> Iterator[SimulatedWorld]:
    world = SimulatedWorld()
    world.start()
    try:
        yield world
    finally:
        world.close()


@contextmanager
def real(
    directory: Path,
    cgroup2: Path,
    image_root: Path,
    features: Features | None = None,
    *,
    has_pool: bool = False,
) -> Iterator[LinuxWorld]:
    world = LinuxWorld(directory, cgroup2, image_root, features, has_pool=has_pool)
    world.start()
    try:
        yield world
    finally:
        world.close()


KINDS_OF_WORLD: Final = ("simulated", "linux", "oldest linux", "linux with a pool")


@contextmanager
def world_of(kind: str, directory: Path, cgroup2: Path, image_root: Path) -> Iterator[World]:
    if kind == "simulated":
        with simulated() as world:
            yield world
    else:
        features = OLDEST if kind == "oldest linux" else None
        has_pool = kind == "linux with a pool"
        with real(directory, cgroup2, image_root, features, has_pool=has_pool) as linux_world:
            yield linux_world
