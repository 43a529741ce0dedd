"""Where a scenario is played: a node, and a provider that comes and goes on it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

from linux.backend import LinuxBackend, NodeSettings
from linux.cgroups import Scope
from linux.features import Features
from linux.forge.spawn import spawn_within
from linux.namespaces import KernelInspector
from linux.simulated import SimulatedBackend, SimulatedInspector, SimulatedNode
from linux.survey import survey_node
from linux.testing.worlds import IMAGE, SimulatedWorld
from statemachine import effects as do
from statemachine.consumer import ConsumerKernel
from statemachine.effects import Timer
from statemachine.errors import AllocationNotFound, SocketUnavailable
from statemachine.messages import NamespaceResponse, NamespaceType
from statemachine.provider import Limits, ProviderKernel
from tests.suites.stateful.adapters import InProcess
from tests.support.programs import Daemon, environment
from transport.contract import SelfService
from transport.descriptors import DescriptorBundle, Inspector
from transport.request.blocking import perform
from transport.request.exchange import Exchange
from transport.testing.adapter import StalledWork
from transport.testing.in_process import put_through
from transport.testing.peer import wait_until
from transport.trace import Recovered, Start, TraceEntry, Turn, decode_line

if TYPE_CHECKING:
    from tests.specs.scenarios import Dialogue

HOLD_TIME_S: Final = 60.0
PATIENCE_S: Final = 10.0
"""How long a real stage may take for what it is expected to do."""


class Sight(NamedTuple):
    """What is on the node of one allocation."""

    kinds: tuple[NamespaceType, ...]
    has_cgroup: bool
    processes: int


class _Callers:
    """Names of allocations, and of those who called each life of the provider, in order."""

    path = Path("nowhere")
    is_sudden = True
    """Whether everything that follows from a step is done when it returns."""

    def __init__(self) -> None:
        self.callers: list[list[str]] = []

    def real(self, name: str) -> str:
        return name

    def named(self, name: str) -> str:
        return name

    def caller(self, life: int, number: int) -> str:
        return self.callers[life][number - 1]

    def next_connection(self, name: str) -> tuple[int, int]:
        if not self.callers:
            return -1, -1
        self.callers[-1].append(name)
        return len(self.callers) - 1, len(self.callers[-1])

    def forget_connection(self) -> None:
        if self.callers:
            self.callers[-1].pop()


class OnKernels(_Callers):
    """Kernels in this thread, on a simulated node."""

    inspector: Inspector = SimulatedInspector()

    def __init__(self) -> None:
        super().__init__()
        self._world = SimulatedWorld()
        self._adapter = InProcess(
            self._world, ProviderKernel, ConsumerKernel, Limits(frozenset({os.geteuid()}))
        )
        self._own: dict[str, SimulatedNode] = {}
        self._seen = 0
        self._fresh: list[TraceEntry] = []
        self._is_there = True
        # The adapter has served once already; the node has not noticed.
        self.kill()
        self._fresh.clear()

    def start(self, *, is_held: bool) -> None:
        if is_held:
            self._adapter.hold(StalledWork.RECOVER)
        limits = Limits(frozenset({os.geteuid()}))
        self._fresh += [Start(limits), Recovered(tuple(self._world.node.remembered))]
        self.callers.append([])
        self._seen, self._is_there = 0, True
        self._adapter.start()

    def kill(self) -> None:
        self._fresh += self._turns()
        self._adapter.stop()
        self._world.backend.close()
        self._is_there = False
        for work in (StalledWork.CREATE, StalledWork.RELEASE):
            self._adapter.let_go(work)

    def hold(self, work: StalledWork) -> None:
        self._adapter.hold(work)

    def let_go(self, work: StalledWork) -> None:
        self._adapter.let_go(work)

    def expire(self, timer: Timer, name: str) -> None:
        self._adapter.expire(timer, name)

    def pass_hold_time(self) -> None:
        self._world.now_s += HOLD_TIME_S
        self._world.backend.tidy()

    def release(self, name: str) -> None:
        self._adapter.release(name)

    def connect(self, exchange: Exchange) -> None:
        if self._is_there:
            put_through(exchange, self._adapter._connect())
        else:
            exchange.not_connected(SocketUnavailable("no provider is there"))

    def enter(self, name: str, call: Dialogue) -> None:
        is_inside = NamespaceType.PID in call.exchange.kernel.request.namespaces
        self._node_of(call).start_process(name, is_inside=is_inside)

    def leave(self, name: str) -> None:
        nodes = [self._world.node, *self._own.values()]
        next(node for node in nodes if name in node.allocations).end_process(name)

    def kill_init(self, name: str) -> None:
        self._world.kill_init(name)

    def block_release(self, name: str, call: Dialogue) -> None:
        self._node_of(call).leave_unreaped(name)

    def unblock_release(self, name: str) -> None:
        self._world.node.reap(name)

    def _node_of(self, call: Dialogue) -> SimulatedNode:
        own = self._own[call.consumer.name]
        return own if call.name in own.allocations else self._world.node

    def self_service(self, name: str) -> SelfService:
        node = self._own[name] = SimulatedNode(frozenset({IMAGE}))
        return SimulatedBackend(node, has_journal=False)

    def own_is_gone(self, name: str) -> None:
        """Take note that a consumer's own service is closed."""
        self._own.pop(name).close()

    def work(self) -> None:
        """Let the provider do what there is to do."""
        if self._is_there:
            self._adapter._work()

    def _turns(self) -> list[Turn]:
        turns = [Turn(*turn) for turn in self._adapter.turns()[self._seen :]]
        self._seen += len(turns)
        return turns

    def entries(self) -> list[TraceEntry]:
        """What the provider has traced since it was last asked."""
        fresh, self._fresh = self._fresh, []
        return [*fresh, *(self._turns() if self._is_there else [])]

    def sights(self) -> dict[str, Sight]:
        """What is on the node of each allocation of the provider's."""
        return {name: self._sight(life) for name, life in self._world.node.allocations.items()}

    def own_sight(self, name: str, call: Dialogue) -> Sight | None:
        """What is on the node that a consumer made by itself."""
        life = self._own[call.consumer.name].allocations.get(name)
        return None if life is None else self._sight(life)

    def _sight(self, life: Any) -> Sight:
        kinds = () if life.is_init_gone else tuple(held.namespace.kind for held in life.namespaces)
        living = sum(each.member.is_alive for each in life.processes)
        return Sight(kinds, life.scope is not None, living)

    def images(self) -> dict[str, int]:
        """The images that are mounted, and by how many allocations each is used."""
        lives = self._world.node.allocations.values()
        return {
            image: sum(life.image == image and not life.is_init_gone for life in lives)
            for image in self._world.node.mounted
        }

    def close(self) -> None:
        self._adapter.close()


class _DaemonProgram(Daemon):
    """`scenarios_daemon`, between two lives or in one."""

    def __init__(self, directory: Path, image_root: Path) -> None:
        self.trace = directory / "trace"
        spans = [f"--{span}={10**6}" for span in ("claim-timeout", "release-deadline")]
        hold = f"--hold-time={HOLD_TIME_S:g}"
        super().__init__(directory, image_root, *spans, hold, f"--trace={self.trace}")

    def launch(self, *held: str) -> None:
        """Start it; `start` also waits until it is ready."""
        program = [sys.executable, "-m", f"{__package__}.scenarios_daemon"]
        with self.log.open("ab") as log:
            self.program = subprocess.Popen(
                [*program, *self.words],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment(),
                bufsize=0,
            )
        self._write(held)

    def start(self, **more: str) -> None:
        self.launch()
        wait_until(self._is_ready, "the provider's readiness")

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        program = self.program
        code = super().stop(number)
        for pipe in (program.stdin, program.stdout):  # type: ignore[union-attr]
            pipe.close()  # type: ignore[union-attr]
        return code

    def tell(self, *words: object) -> None:
        """Have it do something."""
        self._write(words)
        assert self.program is not None
        assert self.program.stdout is not None
        assert self.program.stdout.readline() == b"\n", self.log.read_text()

    def _write(self, words: Iterable[object]) -> None:
        assert self.program is not None
        assert self.program.stdin is not None
        self.program.stdin.write(json.dumps([*words]).encode() + b"\n")


class OnDaemon(_Callers):
    """
    The daemon as a program of its own, on this node.

    Args:
        directory: Its own, and empty.
        cgroup2: Where cgroup v2 is mounted.
        image_root: Has `hello.sqfs`.
        prefix: Begins the name of every allocation.
    """

    is_sudden = False

    def __init__(self, directory: Path, cgroup2: Path, image_root: Path, prefix: str) -> None:
        super().__init__()
        self._features = Features.probe()
        self.inspector: Inspector = KernelInspector(self._features)
        self._daemon = _DaemonProgram(directory, image_root)
        self.path = self._daemon.socket
        self._settings = NodeSettings(cgroup2, image_root, self._daemon.uenv_base)
        self._image_root = image_root
        self._cgroup2 = cgroup2
        self._prefix = f"{prefix}-"
        self._read = 0
        self._inside: dict[str, list[subprocess.Popen[bytes]]] = {}
        self._entangled: dict[str, subprocess.Popen[bytes]] = {}
        self._own: dict[str, LinuxBackend] = {}

    def real(self, name: str) -> str:
        return f"{self._prefix}{name}"

    def named(self, name: str) -> str:
        return name.removeprefix(self._prefix)

    def start(self, *, is_held: bool) -> None:
        self.callers.append([])
        if is_held:
            self._daemon.launch(StalledWork.RECOVER.name)
            wait_until(self._is_listening, "the provider's socket")
        else:
            self._daemon.start()

    def _is_listening(self) -> bool:
        listening = f"{self.path}\n"
        sockets = Path("/proc/net/unix").read_text()
        return any(f"{line}\n".endswith(listening) for line in sockets.splitlines())

    def kill(self) -> None:
        self._daemon.stop(signal.SIGKILL)

    def hold(self, work: StalledWork) -> None:
        self._daemon.tell("hold", work.name)

    def let_go(self, work: StalledWork) -> None:
        self._daemon.tell("let_go", work.name)

    def expire(self, timer: Timer, name: str) -> None:
        self._daemon.tell("expire", timer.name, name)

    def pass_hold_time(self) -> None:
        self._daemon.tell("put_forward", HOLD_TIME_S)

    def release(self, name: str) -> None:
        self._daemon.tell("release", name)

    def connect(self, exchange: Exchange) -> None:
        perform(exchange, do.Connect())

    def enter(self, name: str, call: Dialogue) -> None:
        exchange = call.exchange
        assert exchange.bundle is not None
        scope = self._cgroup2 / "workload.slice" / f"{name}.scope"
        if exchange.fallback is not None:
            scope = self._own[call.consumer.name].scope_of(name) or scope
        with Scope(scope, "").open_procs() as procs:
            process = spawn_within(["sleep", "infinity"], exchange.bundle, scope=procs)
        self._inside.setdefault(name, []).append(process)
        self._check(process.pid, exchange.bundle, exchange.response)

    def _check(
        self, pid: int, bundle: DescriptorBundle, response: NamespaceResponse | None
    ) -> None:
        """Ask the Linux kernel where the process is."""
        for kind, descriptor in bundle:
            entered = Path(f"/proc/{pid}/ns/{_LINKS[kind]}").stat()
            assert os.path.samestat(entered, os.fstat(descriptor.fileno())), kind
        if response is not None and response.uenv_mount_path is not None:
            seen = Path(f"/proc/{pid}/root{response.uenv_mount_path}/hello.txt")
            assert seen.read_text() == "hello from the image\n"

    def leave(self, name: str) -> None:
        process = self._inside[name].pop()
        process.kill()
        process.wait()

    def kill_init(self, name: str) -> None:
        seen = survey_node(self._daemon.state_dir, self._features).allocations
        (init,) = (each.init_pid for each in seen if each.entry.allocation_id == name)
        assert init is not None
        os.kill(init, signal.SIGKILL)

    def block_release(self, name: str, call: Dialogue) -> None:
        assert call.exchange.bundle is not None
        process = spawn_within(["sleep", "infinity"], call.exchange.bundle)
        self._entangled[name] = process
        process.kill()
        # Dead, and not reaped by its parent, which is outside: its init waits for that.
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)

    def unblock_release(self, name: str) -> None:
        self._entangled.pop(name).wait()

    def self_service(self, name: str) -> SelfService:
        own = self._own[name] = LinuxBackend.for_self_service(
            self._settings, clock=time.monotonic, features=self._features
        )
        return own

    def own_is_gone(self, name: str) -> None:
        del self._own[name]

    def work(self) -> None:
        """It works by itself; only its workload's parent is here."""
        for processes in self._inside.values():
            for process in processes:
                process.poll()

    def entries(self) -> list[TraceEntry]:
        found: list[TraceEntry] = []
        if self._daemon.trace.exists():
            data = self._daemon.trace.read_bytes()[self._read :]
            whole = data[: data.rfind(b"\n") + 1]
            self._read += len(whole)
            found = [decode_line(1, line)[1] for line in whole.splitlines()]
        return found

    def sights(self) -> dict[str, Sight]:
        found = {}
        for seen in survey_node(self._daemon.state_dir, self._features).allocations:
            kinds = seen.entry.request.namespaces if seen.init_pid is not None else ()
            living = sum(process.state != "Z" for process in seen.processes)
            sight = Sight(kinds, seen.scope is not None, living)
            if sight != Sight((), False, 0):
                found[seen.entry.allocation_id] = sight
        return found

    def own_sight(self, name: str, call: Dialogue) -> Sight | None:
        own = self._own[call.consumer.name]
        try:
            scope = own.scope_of(name)
        except AllocationNotFound:
            return None
        assert scope is not None
        if not scope.exists():
            return None
        pids = (scope / "cgroup.procs").read_text().split()
        return Sight(call.exchange.kernel.request.namespaces, True, len(pids))

    def images(self) -> dict[str, int]:
        seen = survey_node(self._daemon.state_dir, self._features)
        living = [each for each in seen.allocations if each.init_pid is not None]
        return {
            image.image: sum(each.entry.request.uenv_image == image.image for each in living)
            for image in seen.images
            if Path(image.file).is_relative_to(self._image_root)
        }

    def close(self) -> None:
        with ExitStack() as stack:
            stack.callback(self._stop)
            inside = (process for processes in self._inside.values() for process in processes)
            for process in (*self._entangled.values(), *inside):
                process.kill()
                process.wait()

    def _stop(self) -> None:
        if not self.callers:
            return
        if self._daemon.program is not None:
            for work in StalledWork:
                self._daemon.tell("let_go", work.name)
        self._daemon.clear()
        self._daemon.stop()


Environment: TypeAlias = OnKernels | OnDaemon
"""Where a scenario is played: a node, and a provider that comes and goes on it."""

_LINKS: Final = {NamespaceType.PID: "pid", NamespaceType.NET: "net", NamespaceType.MOUNT: "mnt"}
