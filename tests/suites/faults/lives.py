"""Whole lives of allocations, in which any system call can be made to fail.

A `FaultSetup` is a provider on one of the `worlds`, a consumer, and a neighbour: an allocation that
is alive all the time and must not be affected. Everything happens in one thread and one event loop,
so that a life makes the same calls in the same order in every run; and time is the loop's own,
which passes as soon as there is nothing left to do, so that no deadline is waited for.

A life under a plan ends in one of the ways that the protocol allows. Any other end, and anything
that is left, raises `NotTolerated`.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import logging
import os
import resource
import selectors
import signal
import socket
import time
import types
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AsyncExitStack, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from linux.anchor import Anchor, find_anchors, token_of
from linux.backend import SELF_SERVICE_SLICE, LinuxBackend
from linux.cgroups import DEFAULT_PLACE, WORKLOAD_SLICE
from linux.cli.ready_socket import ReadySocket
from linux.forge.client import FORGE_COMMAND, Forge
from linux.instance import InstanceBusy
from linux.journal import JournalError
from linux.scope_file import write_scope_file
from linux.simulated import SimulatedBackend, SimulatedNode
from linux.syscalls import SyscallError
from linux.testing.worlds import (
    HOLD_TIME_S,
    IMAGE,
    LIGHT,
    SCOPE_PREFIX,
    LinuxWorld,
    SimulatedWorld,
    World,
)
from statemachine.errors import NamespaceError
from statemachine.messages import AllocationEnded, NamespaceRequest
from statemachine.states import AllocationState
from tests.suites.faults.faults import (
    ANCHOR_KILLED,
    CallSite,
    Death,
    Fault,
    FaultInjector,
    FaultPlan,
)
from tests.suites.faults.interference import (
    ACTS,
    ENDING,
    READY_SOCKET,
    Stranger,
    StrangersAct,
)
from transport import calls
from transport.channel import Channel, Delivery
from transport.contract import SelfService
from transport.descriptors import NamespaceIdentity
from transport.endpoint import begin_connect, listen
from transport.request import AsyncConsumer, AsyncHandoff, exchange
from transport.serve import Provider
from transport.serve.work import Workers

SETTLING_S: Final = 0.004
"""How long a real node is watched before nothing more is expected of it by itself."""

LIFE_S: Final = 10_000.0
"""How long a life may take on its own clock."""

ENDURED_S: Final = 60.0
"""After which time strangers go, if a life waits for that."""

UNHEARD_S: Final = 100.0
"""After which time it is clear that the end of an allocation will not be heard."""

DYING_MS: Final = 20_000
"""How long an anchor that was killed may take to die; it takes milliseconds."""

POLL_S: Final = 0.005

LEAVING_MAX: Final = 1_000
"""How often it is looked whether what was killed has left; on a machine at rest once is enough."""

RESTS_MAX: Final = 3_000
"""How often it is looked whether everything is over; a few times are enough."""

RELEASES_MAX: Final = 100
"""How often self-service tries to release what a stranger was in; each takes milliseconds."""

START_FAILURES: Final = (JournalError, InstanceBusy, SyscallError)
"""What a program says that may not start, beside what its system calls and its socket do."""

TRIED_AGAIN: Final = ("accepting", "listening")
"""How the driver begins to say that what the kernel refused it is tried again."""

TURNS_MAX: Final = 20_000
"""How often the loop may turn in one life: more, and it spins."""


class NotTolerated(Exception):
    """A promise was not kept."""


class Inline(ThreadPoolExecutor):
    """Does at once, in the caller's thread, what it is given."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except BaseException as error:
            future.set_exception(error)
        return future


class InlineWorkers(Workers):
    """Do every job in the event loop's thread, soon."""

    def __init__(self) -> None:
        super().__init__(0, "none")

    def put(self, job: Any) -> None:
        self._loop.call_soon(self._do, job)

    def _do(self, job: Any) -> None:
        result, error = None, None
        try:
            result = job.do()
        except Death:
            return
        except Exception as raised:
            error = raised
        job.done(job, result, error)


class HurriedSelector(selectors.EpollSelector):
    """Waits only as long as something real may still happen; the rest of the time just passes."""

    def __init__(self, patience_s: float) -> None:
        super().__init__()
        self._patience_s = patience_s
        self.is_patient = False
        """Whether it waits as others do, because another process has work to do."""
        self.passed_s = 0.0
        self.turns = 0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self.turns += 1
        if self.is_patient:
            return super().select(timeout)
        ready = super().select(0)
        if ready or (timeout is not None and timeout <= 0):
            return ready
        if self._patience_s:
            waited = self._patience_s if timeout is None else min(timeout, self._patience_s)
            ready = super().select(waited)
        if not ready and timeout is not None:
            self.passed_s += timeout
        return ready


class HurriedLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock jumps to the next deadline instead of waiting."""

    def __init__(self, patience_s: float) -> None:
        self.hurry = HurriedSelector(patience_s)
        super().__init__(self.hurry)
        self.set_default_executor(Inline())

    def time(self) -> float:
        return super().time() + self.hurry.passed_s


class FaultSetup(ABC):
    """
    A provider at work, its machine, and a neighbour.

    Args:
        directory: the stage's own.
        world: the machine; closed with the stage.
        patience_s: how long something real is waited for.
    """

    backend_name: str
    kinds = LIGHT
    neighbour = ""

    def __init__(self, directory: Path, world: World, patience_s: float) -> None:
        self.world = world
        self.path = directory / "handoff.sock"
        self.nowhere = directory / "nowhere.sock"
        self.injector = FaultInjector(is_asleep=True)
        self.complaints: list[str] = []
        self.loop = HurriedLoop(patience_s)
        self.loop.set_exception_handler(self._hear_complaint)
        self._numbers = itertools.count(1)
        self.provider: Provider | None = None
        self.running: asyncio.Task[None] | None = None
        self.usual: Counter[str] | None = None
        """What is open and alive between two lives."""
        self.state_dir = directory / "state"
        self.strangers: list[Stranger] = []
        """Who has interfered with the present life."""
        self.raw_peers: list[Channel] = []
        """Peers of the present life that are led by hand, and may just go."""
        self._known: frozenset[int] = frozenset()
        """The connections that were there before the present life."""
        self._is_starved = False
        self._limits: tuple[int, int] | None = None
        """The limits of descriptors, while they are lowered."""

    # The provider's program.

    def start(self) -> None:
        """Start the program on the machine as it is, and let it recover."""
        self.world.launch()
        self.prepare_backend()
        self.loop.run_until_complete(self._serve())

    async def _serve(self) -> None:
        try:
            await self._begin_to_serve()
        except BaseException:
            self.provider = self.running = None
            self.world.backend.close()
            raise

    async def _begin_to_serve(self) -> None:
        ready = asyncio.Event()
        self.provider = Provider(listen(self.path), self.world.backend)
        work: Any = self.provider._work
        work._creators, work._releasers, work._image_workers = work._all_workers = (
            InlineWorkers(),
            InlineWorkers(),
            InlineWorkers(),
        )
        running = self.running = asyncio.ensure_future(self.provider.run(ready.set))
        waiting = asyncio.ensure_future(ready.wait())
        await asyncio.wait({running, waiting}, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if running.done() and not running.cancelled():
            running.result()

    async def stop(self) -> None:
        """Stop the program; what is alive stays alive."""
        if self.provider is not None:
            self.provider.stop()
            with suppress(Death, Exception):
                await self.running
            self.provider = self.running = None
        self.world.backend.close()

    async def drop(self, provider: Provider) -> None:
        """Drop the program where it stands, as the kernel does when it is killed."""
        provider._is_closed = True
        connections = provider._connections
        listener = connections._listener
        self.loop.remove_reader(listener._sock.fileno())
        with suppress(ValueError):
            self.loop.remove_reader(self.world.backend.fileno())
        for connection in connections._open.values():
            connection.abandon()
        connections._open.clear()
        connections._turns.clear()
        connections._started.close()
        provider._timers.close()
        provider._watcher.close()
        listener._reserve.close()
        listener._sock.close()
        provider._work.close()
        if self.running is not None and not self.running.done():
            self.running.cancel()
            await asyncio.gather(self.running, return_exceptions=True)
        self.running = None

    @abstractmethod
    def prepare_backend(self) -> None:
        """Make the backend that was just launched fit for the stage."""

    @abstractmethod
    def service(self) -> SelfService:
        """Who makes a consumer's own namespaces."""

    @abstractmethod
    def plan_forge(self, plan: FaultPlan) -> None:
        """Say what happens to the calls of forges."""

    @abstractmethod
    def passed_in_forge(self) -> tuple[list[CallSite], list[Fault]]:
        """Which calls forges made, and what was done to them."""

    @abstractmethod
    def kill_anchors(self) -> None:
        """Kill the anchors of everything but the neighbour, and wait for their ends."""

    @abstractmethod
    def tidy_own(self) -> None:
        """Drop the images that self-service holds, as the end of its program would."""

    @abstractmethod
    def release_own(self) -> None:
        """Release once more what self-service could not, as the end of its program would."""

    @abstractmethod
    def own_leftovers(self) -> list[str]:
        """What self-service has left."""

    @contextmanager
    def unseen(self) -> Iterator[None]:
        """Let the body's calls pass: they are not the program's."""
        self.injector.is_asleep = True
        is_starved = self._limits is not None
        self._lift()
        try:
            yield
        finally:
            self.injector.is_asleep = False
            if is_starved and self._is_starved:
                self.starve()

    def remember_anchors(self, name: str) -> None:  # noqa: B027 - there are none on a simulated node
        """Know the anchors of a life while no program does."""

    def forget_anchors(self) -> None:  # noqa: B027 - there are none on a simulated node
        """Know them no more."""

    async def restart(self, name: str) -> None:
        """
        Stop the program, and start another on the machine as it is, on which the life is.

        If that may not start, as strangers do what they do, another one may when they have gone.
        """
        with self.unseen():
            self.remember_anchors(name)
        await self.stop()
        try:
            await self._start_again()
        except (OSError, NamespaceError, *START_FAILURES):
            with self.unseen():
                self.send_strangers_away()
                await self._start_again()

    async def _start_again(self) -> None:
        self.world.launch()
        self.prepare_backend()
        await self._serve()

    # What strangers do.

    def interfere(self, act: StrangersAct, name: str) -> None:
        """Do to the life of an allocation what a stranger does."""
        with self.unseen():
            stranger = act(self, name)
        if stranger is not None:
            self.strangers.append(stranger)

    def send_strangers_away(self) -> None:
        """Expect that what is the strangers' is as it was, and let them remove it."""
        with ExitStack() as stack:
            for stranger in self.strangers:
                stack.callback(stranger.tidy)
            present, self.strangers = self.strangers, []
            for stranger in present:
                stranger.check()

    def starve(self) -> None:
        """Let no further descriptor be opened, until `feed`."""
        self._is_starved = True
        self._limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        probe = os.dup(0)  # the lowest number that is free
        os.close(probe)
        resource.setrlimit(resource.RLIMIT_NOFILE, (probe, self._limits[1]))

    def feed(self) -> None:
        """Let descriptors be opened again."""
        self._is_starved = False
        self._lift()

    def _lift(self) -> None:
        limits, self._limits = self._limits, None
        if limits is not None:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)

    def calm(self) -> None:
        """Let no further signals arrive."""
        signal.setitimer(signal.ITIMER_REAL, 0)

    def drop_raw_peer(self, bytes_read: int) -> bool:
        """Let the last peer that is led by hand go, after it has read some bytes."""
        for channel in self.raw_peers:
            if not channel.closed:
                if bytes_read:
                    with suppress(OSError):
                        channel.sock.recv(bytes_read)
                channel.close()
                return True
        return False

    def served_sockets(self) -> list[socket.socket]:
        """The provider's ends of the life's connections."""
        if self.provider is None:
            return []
        found = self.provider._connections._open
        return [found[number].channel.sock for number in found if number not in self._known]

    def scope_paths(self, name: str) -> list[Path]:
        """Where the scopes of a life can be."""
        return []

    def anchors_of(self, name: str) -> list[tuple[int, str]]:
        """The anchors of a life, with their tokens."""
        return []

    # Consumers.

    @abstractmethod
    def nest(self, name: str) -> None:
        """Make a cgroup below an allocation's scope, where scopes are directories."""

    def consumer(self, path: Path | None = None) -> AsyncConsumer:
        return AsyncConsumer(path or self.path, self.world.inspector, service=self.service())

    def new_name(self) -> str:
        return f"{SCOPE_PREFIX}f{next(self._numbers)}"

    # Lives.

    def tell(self, life: Workload, plan: FaultPlan = (), *, asks_afterwards: bool = True) -> Told:
        """
        Tell a life under a plan, and look at what it leaves.

        Args:
            life: of a new allocation.
            plan: what happens to its calls.
            asks_afterwards: whether a plain request is made, too, and must be served.

        Raises:
            NotTolerated: something that was promised is not so.
        """
        name = self.new_name()
        self.complaints.clear()
        injector = self.injector = FaultInjector(
            plan,
            interferences={
                ANCHOR_KILLED: self.kill_anchors,
                **{kind: partial(self.interfere, act, name) for kind, act in ACTS.items()},
            },
            after_interference=self.calm,
        )
        if self.provider is not None:
            self._known = frozenset(self.provider._connections._open)
        self.plan_forge(plan)
        spent = self.hurry.passed_s
        self.hurry.turns = 0
        with self._complaining():
            try:
                with calls.hook_syscalls(injector):
                    outcome = self._run(self._outcome(life, name))
            finally:
                injector.is_asleep = True
                self.calm()
                self.feed()
                self.raw_peers.clear()
                self.forget_anchors()
                forge_passed, forge_fired = self.passed_in_forge()
                self.plan_forge(())
            told = Told(outcome, [*injector.passed, *forge_passed], [*injector.fired, *forge_fired])
            try:
                self._look(name, told, asks_afterwards)
            except (AssertionError, NotTolerated) as error:
                raise NotTolerated(f"{outcome}; {error}") from error
        if self.hurry.passed_s - spent > LIFE_S or self.hurry.turns > TURNS_MAX:
            raise NotTolerated(f"{outcome}; it does not come to rest: {self.hurry.turns} turns")
        if self.complaints:
            raise NotTolerated(f"{outcome}; {'; '.join(self.complaints)}")
        return told

    @property
    def hurry(self) -> HurriedSelector:
        return self.loop.hurry

    def _run(self, work: Awaitable[Any]) -> Any:
        return self.loop.run_until_complete(asyncio.wait_for(work, LIFE_S))

    async def _outcome(self, life: Workload, name: str) -> str:
        try:
            telling = asyncio.ensure_future(life(self, name))
            await asyncio.wait({telling}, timeout=ENDURED_S)
            if not telling.done() and (self.strangers or self._is_starved):
                # A consumer may wait for its provider as long as a stranger has that one's place.
                with self.unseen():
                    self.feed()
                    self.send_strangers_away()
            return await telling
        except NamespaceError as error:
            return f"refused: {type(error).__name__}"
        except TimeoutError:
            raise NotTolerated("nothing ever came of it") from None
        except Death:
            return "died"

    def _look(self, name: str, told: Told, asks_afterwards: bool) -> None:
        """Look whether all is as it was before, and the provider at work."""
        if self.strangers:
            try:
                # What they have must be safe from the end of the life as well.
                self._run(self._try_to_end(name))
            finally:
                self.send_strangers_away()
            self.release_own()
        self._run(self._settle(name))
        if asks_afterwards and told.outcome != "died":
            outcome = self._run(self._outcome(end_by_consumer, self.new_name()))
            assert outcome == "served", f"afterwards a plain request is {outcome}"
        self._run(self._rest())
        self._run(self._unmounted())
        self.check_neighbour()
        if self.usual is not None and self.count() - self.usual:
            gc.collect()
            for _ in range(LEAVING_MAX):
                time.sleep(POLL_S)
                if not self.count() - self.usual:
                    return
            raise NotTolerated(f"left behind: {dict(self.count() - self.usual)}")

    async def _try_to_end(self, name: str) -> None:
        """Let the provider do what it would to end the life, while there are strangers."""
        with suppress(NamespaceError, OSError, TimeoutError):
            await asyncio.wait_for(self.consumer().end(name), UNHEARD_S)
        await asyncio.sleep(UNHEARD_S)

    async def _settle(self, name: str) -> None:
        """End what the life may have left alive, as an operator would."""
        sock = None
        while sock is None:
            with suppress(BlockingIOError):
                sock = begin_connect(self.path)
        with Channel(sock, accepts_descriptors=True) as channel:
            channel.send(AllocationEnded(name))
            received: list[Any] = []
            while not received:
                await asyncio.sleep(0.001)
                received = channel.receive()
        await self._rest()

    async def _rest(self) -> None:
        """Wait until nothing is alive but the neighbour, and none is connected but it."""
        assert self.provider is not None
        kernel = self.provider.kernel
        for _ in range(RESTS_MAX):
            await asyncio.sleep(0.001)
            names = list(self.provider._work._queues)
            alive = [n for n in self.world_names() if n != self.neighbour]
            if not names and not alive and len(self.provider._connections) <= 1:
                return
            assert not any(
                kernel.state_of(name) in (AllocationState.CREATED, AllocationState.HANDED_OFF)
                for name in alive
            ), f"{alive} is alive"
        raise NotTolerated(f"{alive} is never released")

    async def _unmounted(self) -> None:
        """Wait until the images are dropped, whose hold time passes now."""
        for _ in range(200):
            if not self.world.mounted():
                return
            self.tidy_own()
            await asyncio.sleep(HOLD_TIME_S / 4)
        raise NotTolerated(f"{self.world.mounted()} stays mounted")

    @abstractmethod
    def world_names(self) -> list[str]:
        """Which allocations the backend has something of."""

    # The neighbour.

    def settle_in(self) -> None:
        """Let the neighbour move in, and the first lives pass, after which all is as usual."""
        self.neighbour = self.new_name()
        request_ = NamespaceRequest(self.neighbour, self.kinds)
        self._handoff = self._run(self.consumer().obtain(request_))
        self._identities: list[NamespaceIdentity] = self.world.identities(self.neighbour)
        self.world.join(self.neighbour)
        self._run(asyncio.sleep(0.01))
        self.tell(end_by_consumer)
        self.tell(whole_life)
        self.tell(self_served)
        gc.collect()
        self.usual = self.count()

    def check_neighbour(self) -> None:
        assert self.world.identities(self.neighbour) == self._identities, "the neighbour changed"
        assert not self._handoff.is_ended, "the neighbour was ended"
        assert self.provider is not None
        state = self.provider.kernel.state_of(self.neighbour)
        assert state in (AllocationState.CREATED, AllocationState.HANDED_OFF), state

    def end_neighbour(self) -> None:
        """End the neighbour as usual, which must still be possible."""
        self._run(self._handoff.end())
        self._run(self._handoff.close())
        self._run(self._rest())
        self.world.reap_killed(self.neighbour)

    def count(self) -> Counter[str]:
        """What is open in this process, and what is alive on the machine."""
        numbers = os.listdir("/proc/self/fd")
        found: Counter[str] = Counter()
        for number in numbers:
            with suppress(FileNotFoundError):
                found[_sort_of(os.readlink(f"/proc/self/fd/{number}"))] += 1
        found["on the machine"] = len(self.world.leftovers())
        found["images"] = len(self.world.mounted())
        found["of its own"] = len(self.own_leftovers())
        found["anchors"] = len(self.anchors())
        return found

    def anchors(self) -> list[int]:
        """Every anchor that this program, or one started by it, has ever made and that is alive."""
        return []

    # Complaints.

    def _hear_complaint(self, _: Any, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if not isinstance(error, Death | asyncio.CancelledError):
            self.complaints.append(f"in the event loop: {error!r} {context.get('message')}")

    @contextmanager
    def _complaining(self) -> Iterator[None]:
        """Hear what is logged as a mistake of the program's own."""
        handler = _Complaints(self.complaints)
        loggers = [logging.getLogger(name) for name in ("transport", "linux")]
        for logger in loggers:
            logger.addHandler(handler)
        real_time = exchange.time
        exchange.time = types.SimpleNamespace(  # type: ignore[assignment]
            monotonic=self.loop.time, sleep=self._pass
        )
        try:
            yield
        finally:
            exchange.time = real_time
            for logger in loggers:
                logger.removeHandler(handler)

    def _pass(self, seconds: float) -> None:
        self.hurry.passed_s += seconds

    def close(self) -> None:
        with ExitStack() as stack:
            stack.callback(self.loop.close)
            stack.callback(self.world.close)
            if self.provider is not None:
                stack.callback(lambda: self.loop.run_until_complete(self.stop()))


@dataclass(frozen=True)
class Told:
    """How a life went."""

    outcome: str
    passed: list[CallSite]
    fired: list[Fault]


class _Complaints(logging.Handler):
    """Notes errors that the program did not expect: it logs those with their traceback."""

    def __init__(self, complaints: list[str]) -> None:
        super().__init__(logging.ERROR)
        self._complaints = complaints

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        is_foreseen = record.msg.startswith(TRIED_AGAIN)
        if error is not None and not _is_typed(error) and not is_foreseen:
            self._complaints.append(
                f"unexpected by {record.name}: {record.getMessage()}: {error!r}"
            )


def _is_typed(error: BaseException) -> bool:
    """Whether an error says whose it is and what it was about."""
    if type(error).__module__.partition(".")[0] in ("linux", "transport", "statemachine"):
        return True
    return isinstance(error, Death)


def _sort_of(target: str) -> str:
    return target.partition(":[")[0] if ":[" in target else target.partition(" ")[0]


class SimulatedStage(FaultSetup):
    backend_name = "simulated"

    def __init__(self, directory: Path) -> None:
        world = SimulatedWorld()
        world.node.hook = lambda step, _: self.injector.step("provider", f"simulated.{step.value}")
        super().__init__(directory, world, 0.0)
        self.node = world.node
        self.own_node = SimulatedNode(frozenset({IMAGE}), hook=self._own_step)
        self._own = SimulatedBackend(self.own_node, has_journal=False)

    def _own_step(self, step: Any, name: str) -> None:
        self.injector.step("consumer", f"simulated.{step.value}")

    def nest(self, name: str) -> None:
        pass

    def prepare_backend(self) -> None:
        self.world.backend._clock = self.loop.time

    def service(self) -> SelfService:
        return self._own

    def plan_forge(self, plan: FaultPlan) -> None:
        """There is none."""

    def passed_in_forge(self) -> tuple[list[CallSite], list[Fault]]:
        return [], []

    def kill_anchors(self) -> None:
        for node in (self.node, self.own_node):
            for name in set(node.allocations) - {self.neighbour}:
                node.kill_init(name)

    def tidy_own(self) -> None:
        self._own.tidy()

    def release_own(self) -> None:
        """There is nothing in which a stranger can be."""

    def own_leftovers(self) -> list[str]:
        self.own_node.sweep()
        return sorted({*self.own_node.allocations, *self._own._allocations})

    def world_names(self) -> list[str]:
        return self.world.leftovers()

    def close(self) -> None:
        super().close()
        self._own.close()
        self.own_node.close()


class LinuxStage(FaultSetup):
    backend_name = "linux"

    def __init__(
        self, directory: Path, cgroup2: Path, image_root: Path, *, has_pool: bool = False
    ) -> None:
        self.directory = directory
        self._cgroup2 = cgroup2
        self._plan_path = directory / "forge-plan.json"
        self._log_path = directory / "forge-log"
        self._log_path.touch()
        self._lives = itertools.count(1)
        self._life = 0
        self._remembered: list[Anchor] = []
        """Anchors of the present life, from the end of a program until the end of the life."""
        self.plan_forge(())
        world = LinuxWorld(directory, cgroup2, image_root, has_pool=has_pool)
        super().__init__(directory, world, SETTLING_S)
        settings = self.world.settings
        self._own = LinuxBackend.for_self_service(settings, clock=self.loop.time)
        self._give_forge(self._own)

    def prepare_backend(self) -> None:
        self.world.backend._images._clock = self.loop.time
        self._give_forge(self.world.backend)

    def _give_forge(self, backend: Any) -> None:
        command = [
            *FORGE_COMMAND[:-1],
            f"{__package__}.forge",
            str(self._plan_path),
            str(self._log_path),
        ]
        forge = backend._forge
        backend._forge = Forge(
            cgroup=forge._cgroup, tied=forge._tied, features=forge._features, command=command
        )

    def count(self) -> Counter[str]:
        pool = getattr(self.world.backend, "_pool", None)
        if pool is not None:
            # How many there are depends on what was asked for last.
            pool.drop("they are counted", patience_ms=DYING_MS)
        return super().count()

    def nest(self, name: str) -> None:
        (self._cgroup2 / WORKLOAD_SLICE / f"{name}.scope" / "below").mkdir()

    def scope_paths(self, name: str) -> list[Path]:
        scope = Path(WORKLOAD_SLICE, f"{name}.scope")
        return [self._cgroup2 / scope, self._cgroup2 / SELF_SERVICE_SLICE / scope]

    def anchors_of(self, name: str) -> list[tuple[int, str]]:
        known = [
            (allocation.anchor.pid, allocation.anchor.token)
            for backend in (self.world.program_now, self._own)
            for each, allocation in backend._allocations.items()
            if each == name and allocation.anchor is not None
        ]
        return known or [(anchor.pid, anchor.token) for anchor in self._remembered]

    def remember_anchors(self, name: str) -> None:
        tokens = [token for _, token in self.anchors_of(name)]
        found = find_anchors(self.world.anchors_cgroup)
        self._remembered = [found.pop(token) for token in tokens if token in found]
        for anchor in found.values():
            anchor.close()

    def forget_anchors(self) -> None:
        while self._remembered:
            self._remembered.pop().close()

    def service(self) -> SelfService:
        return self._own

    def plan_forge(self, plan: FaultPlan) -> None:
        self._life = next(self._lives)
        faults = [fault.as_json() for fault in plan if fault.call.who == "forge"]
        new = self._plan_path.with_suffix(".new")
        new.write_text(json.dumps({"life": self._life, "plan": faults}))
        new.rename(self._plan_path)
        os.truncate(self._log_path, 0)

    def passed_in_forge(self) -> tuple[list[CallSite], list[Fault]]:
        lines = [json.loads(line) for line in self._log_path.read_text().splitlines()]
        told = [Fault.of_json(said) for life, said in lines if life == self._life]
        return [fault.call for fault in told], [fault for fault in told if fault.kind]

    def world_names(self) -> list[str]:
        return list(self.world.backend._allocations)

    def kill_anchors(self) -> None:
        with self.unseen():
            for backend in (self.world.program_now, self._own):
                for name, allocation in list(backend._allocations.items()):
                    if name != self.neighbour and allocation.anchor is not None:
                        with suppress(ValueError):  # it is being closed, and was dead before
                            allocation.anchor.kill()
                            assert not allocation.anchor.is_alive(DYING_MS)
            for anchor in self._remembered:
                anchor.kill()
                assert not anchor.is_alive(DYING_MS)

    def tidy_own(self) -> None:
        self._own.tidy()

    def own_leftovers(self) -> list[str]:
        return list(self._own._allocations)

    def release_own(self) -> None:
        for name in list(self._own._allocations):
            for _ in range(RELEASES_MAX):
                with suppress(NamespaceError):
                    self._own.release_namespaces(name)
                if name not in self._own._allocations:
                    break
                time.sleep(POLL_S)

    def anchors(self) -> list[int]:
        return anchors_alive()

    def close(self) -> None:
        self._own.close()
        super().close()


def anchors_alive(prefix: str = "") -> list[int]:
    """Every anchor that this program, or one started by it, has made, by how its token begins."""
    mark = os.readlink("/proc/self/ns/uts")
    found = []
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        with suppress(OSError):
            token = token_of(pid) if os.readlink(f"/proc/{pid}/ns/uts") == mark else None
            if token is not None and token.startswith(prefix):
                found.append(pid)
    return found


def described(anchor: int) -> str:
    """Say of an anchor what helps to find out why it is there: its cgroup, parent and token."""
    with suppress(OSError):
        where = Path(f"/proc/{anchor}/cgroup").read_text().splitlines()[-1]
        parent = Path(f"/proc/{anchor}/stat").read_text().rpartition(")")[2].split()[1]
        return f"anchor {anchor} in {where}, of {parent}, with the token {token_of(anchor)}"
    return f"anchor {anchor}, which is going"


# --- The lives --------------------------------------------------------------------------------

Workload = Callable[[FaultSetup, str], Awaitable[str]]


def _how(handoff: AsyncHandoff) -> str:
    return f"self-served: {type(handoff.fallback).__name__}" if handoff.is_degraded else "served"


async def _heard_end(handoff: AsyncHandoff) -> str:
    """Wait for the end; who has lost the connection does not hear of it."""
    with suppress(TimeoutError):
        await asyncio.wait_for(handoff.wait_ended(), UNHEARD_S)
        return "served"
    await handoff.end()
    return "served, and the end unheard"


async def whole_life(stage: FaultSetup, name: str) -> str:
    """Obtained, used by a process that comes and goes, over by itself."""
    async with await stage.consumer().obtain(NamespaceRequest(name, stage.kinds)) as handoff:
        if not handoff.is_degraded:
            with stage.unseen(), suppress(OSError, KeyError):  # it may be over already
                try:
                    stage.world.join(name)
                finally:
                    stage.world.leave(name)
            return await _heard_end(handoff)
        await handoff.end()
        return _how(handoff)


async def end_by_consumer(stage: FaultSetup, name: str) -> str:
    """Obtained, and ended by who has it; a cgroup is left below its scope."""
    async with await stage.consumer().obtain(NamespaceRequest(name, stage.kinds)) as handoff:
        if not handoff.is_degraded:
            with stage.unseen(), suppress(OSError):  # it may be over already
                stage.nest(name)
        await handoff.end()
        return _how(handoff)


async def asked_twice(stage: FaultSetup, name: str) -> str:
    """Obtained on two connections, the same both times; one ends it, the other hears of it."""
    request_ = NamespaceRequest(name, stage.kinds)
    async with AsyncExitStack() as stack:
        one = await stack.enter_async_context(await stage.consumer().obtain(request_))
        stack.push_async_callback(one.end)
        other = await stack.enter_async_context(await stage.consumer().obtain(request_))
        if one.is_degraded or other.is_degraded:
            await other.end()
            return _how(one if one.is_degraded else other)
        if one.identities != other.identities:
            # Then it was over in between, and this is another of the same name.
            assert await _heard_end(one) == "served", "not the same namespaces"
        await one.end()
        return await _heard_end(other)


async def refused(stage: FaultSetup, name: str) -> str:
    """An image that does not exist."""
    request_ = NamespaceRequest(name, stage.kinds, "absent.sqfs")
    async with await stage.consumer().obtain(request_) as handoff:
        return _how(handoff)


async def with_image(stage: FaultSetup, name: str) -> str:
    """Obtained with an image, and ended; the image is dropped when its time has come."""
    request_ = NamespaceRequest(name, stage.kinds, IMAGE)
    async with await stage.consumer().obtain(request_) as handoff:
        await handoff.end()
        return _how(handoff)


async def overtaken(stage: FaultSetup, name: str) -> str:
    """Ended in the same breath as it is asked for."""
    with ExitStack() as stack:
        with stage.unseen():
            channel = stack.enter_context(
                Channel(begin_connect(stage.path), accepts_descriptors=True)
            )
            stage.raw_peers.append(channel)
            channel.send(NamespaceRequest(name, stage.kinds))
            channel.send(AllocationEnded(name))
        heard: list[str] = []
        for _ in range(1000):
            await asyncio.sleep(0.01)
            if channel.closed:
                return "left"
            with stage.unseen():
                received = channel.receive()
            for each in received:
                if isinstance(each, Delivery):
                    each.bundle.close()
                heard.append(type(each.message if isinstance(each, Delivery) else each).__name__)
            if len(heard) == 2 or "Lost" in heard:
                return ", ".join(heard)
    raise NotTolerated(f"heard only {heard}")


async def self_served(stage: FaultSetup, name: str) -> str:
    """No provider: namespaces of its own, and gone with it."""
    request_ = NamespaceRequest(name, stage.kinds)
    async with await stage.consumer(stage.nowhere).obtain(request_) as handoff:
        await handoff.end()
        return _how(handoff)


LIVES: Final[dict[str, Workload]] = {
    life.__name__.replace("_", " "): life
    for life in (
        whole_life,
        end_by_consumer,
        asked_twice,
        refused,
        with_image,
        overtaken,
        self_served,
    )
}


async def recovered(stage: FaultSetup, name: str) -> str:
    """Obtained; the program stops, with all that a daemon has, and another one recovers it."""
    request_ = NamespaceRequest(name, stage.kinds)
    async with await stage.consumer().obtain(request_) as one, AsyncExitStack() as stack:
        stack.push_async_callback(one.end)
        with stage.unseen():
            said = write_scope_file(stage.path, None, DEFAULT_PLACE)
            ready = ReadySocket(stage.path.with_name(READY_SOCKET), 0o600, None, "ready\n")
            await ready.open()
        said.remove()
        ready.close()
        await stage.restart(name)
        async with await stage.consumer().obtain(request_) as other:
            is_same = one.is_degraded or other.is_degraded or one.identities == other.identities
            may_have_ended = any(fault.kind in ENDING for fault in stage.injector.fired)
            if not (is_same or may_have_ended):
                raise NotTolerated("it had not ended, and is another now")
            await other.end()
        return _how(other)


RECOVERED: Final = {"recovered": recovered}
"""What is not told with faults: a program that may not start is none of them."""

ALL_LIVES: Final[dict[str, Workload]] = {**LIVES, **RECOVERED}


@contextmanager
def simulated_stage(directory: Path) -> Iterator[FaultSetup]:
    with _on(SimulatedStage(directory)) as stage:
        yield stage


@contextmanager
def linux_stage(
    directory: Path, cgroup2: Path, image_root: Path, *, has_pool: bool = False
) -> Iterator[FaultSetup]:
    with _on(LinuxStage(directory, cgroup2, image_root, has_pool=has_pool)) as stage:
        yield stage


@contextmanager
def _on(stage: FaultSetup) -> Iterator[FaultSetup]:
    try:
        stage.start()
        stage.settle_in()
        yield stage
        stage.end_neighbour()
    finally:
        stage.close()
