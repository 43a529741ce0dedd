"""A program that dies before its k-th system call, and what the ones after it make of that.

On the simulated node a provider's program is dropped where it stands (`Dropped`); on this machine
it is a process of its own, and killed (`Killed`). Whichever call is the last: what was handed off
is handed off again, the same; what was ended and confirmed is not; what was half made is gone. A
consumer can be killed so as well, alone or together with its forge, and everything at random.

To be dead before a call is to be dead after the one before it: nothing happens in between.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import socket
import sys
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from linux.anchor import find_anchors
from linux.backend import SELF_SERVICE_SLICE, LinuxBackend
from linux.cgroups import OWNER_ATTRIBUTE, read_attribute
from linux.instance import OWN_TOKEN_PREFIX
from linux.testing.worlds import HOLD_TIME_S, IMAGE
from statemachine.errors import AllocationNotFound, NamespaceError
from statemachine.messages import NamespaceRequest
from tests.suites.faults.faults import CallSite, Death, FaultInjector
from tests.suites.faults.lives import (
    FaultSetup,
    LinuxStage,
    NotTolerated,
    SimulatedStage,
    anchors_alive,
    described,
)
from transport import calls
from transport.endpoint import listen
from transport.request import AsyncHandoff, Consumer
from transport.serve import Provider
from transport.testing.peer import wait_until

PATIENCE_S: Final = 20.0
"""How long anything may take; it takes milliseconds."""

POLL_S: Final = 0.01

PHASES: Final = ("obtaining", "ending", "recovering")
"""What the program is doing when it dies."""

CONSUMERS: Final = ("served", "self-served", "self-served, with its forge")
"""How a consumer lives that dies, on this machine."""


_SPARED: Final = b"spared"
"""What a program says that is not doomed any more."""


class Doomed(FaultInjector):
    """Lets the provider's calls pass until it is doomed; then the k-th is its last."""

    def __init__(
        self, on_death: Callable[[CallSite], None] | None = None, who: str | None = None
    ) -> None:
        super().__init__(who=who)
        self.calls_left: int | None = None
        self.died_at: CallSite | None = None
        self._on_death = on_death

    def doom(self, k: int) -> None:
        self.calls_left = k or None

    def kind_for(self, call: CallSite) -> str | None:
        if call.who in self.dead:
            return "death"
        if call.who != (self.who or "provider") or self.calls_left is None:
            return None
        self.calls_left -= 1
        if self.calls_left > 0:
            return None
        self.died_at = call
        if self._on_death is not None:
            self._on_death(call)
        return "death"


class DoomableProgram(ABC):
    """A provider's program that can be doomed, and consumers that outlive it."""

    stage: FaultSetup

    @abstractmethod
    async def start(self, doomed_at: int | None = None) -> bool:
        """Start the program on the machine as it is; say whether it came to serve."""

    @abstractmethod
    def doom(self, k: int) -> None:
        """Let the k-th call from now on be the program's last; 0: none."""

    async def spare(self) -> CallSite | None:
        """Let the program live; which call was its last, if that was made just before."""
        self.doom(0)
        return await self.died_at()

    @abstractmethod
    async def died_at(self) -> CallSite | None:
        """Which call was its last, if it is dead."""

    @abstractmethod
    async def stop(self) -> None:
        """Let it go in good order."""

    def run(self, phase: str, k: int) -> CallSite | None:
        """
        Let it die before its k-th call in a phase, and look at what the next one makes of it.

        On this machine a consumer can be the one that dies: `CONSUMERS`.

        Returns:
            The call; None if the phase was over before.

        Raises:
            NotTolerated: something that was promised is not so.
        """
        return self.stage.loop.run_until_complete(asyncio.wait_for(self._crash(phase, k), 1e6))

    async def _crash(self, phase: str, k: int) -> CallSite | None:
        name = self.stage.new_name()
        wanted = NamespaceRequest(name, self.stage.kinds)
        if phase == "obtaining":
            self.doom(k)
        first = await self._obtain(wanted)
        is_handed = first is not None and not first.is_degraded
        before = first.identities if first is not None else ()
        if phase == "ending" and first is not None:
            self.doom(k)
        is_over = phase == "ending" or not is_handed
        ending = None
        if is_over and first is not None:
            ending = asyncio.ensure_future(first.end())
        if phase == "recovering":
            await self.stop()
            is_serving = await self.start(k)
            last = await self._await_death(None) if is_serving else await self.died_at()
        else:
            last = await self._await_death(ending)
        if last is None:
            last = await self.spare()
        if last is not None and not await self.start():
            raise NotTolerated("no other program can be started")
        if ending is not None:
            await asyncio.wait_for(ending, PATIENCE_S * 100)
        second = await self._obtain(wanted)
        if second is None or second.is_degraded:
            raise NotTolerated(
                f"afterwards the allocation is not handed over: {second and second.fallback}"
            )
        is_same = second.identities == before
        if is_handed and not is_over and not is_same:
            raise NotTolerated("it was handed over, and is another now")
        if is_handed and is_over and is_same:
            raise NotTolerated("it was ended and confirmed, and is the same again")
        await second.end()
        await second.close()
        if first is not None:
            await first.close()
        return last

    async def _await_death(self, ending: asyncio.Future[None] | None) -> CallSite | None:
        """Wait until the program is dead, or has nothing more to do."""
        for _ in range(20):
            if ending is not None and not ending.done():
                await asyncio.wait({ending}, timeout=0.005)
            else:
                await asyncio.sleep(0.002)
            died_at = await self.died_at()
            if died_at is not None:
                return died_at
        return None

    async def _obtain(self, wanted: NamespaceRequest) -> AsyncHandoff | None:
        try:
            return await self.stage.consumer().obtain(wanted)
        except NamespaceError:
            return None


class Dropped(DoomableProgram):
    """A program in this one, on the simulated node; when it is dead it does nothing any more."""

    def __init__(self, stage: SimulatedStage) -> None:
        self.stage = stage
        self._dropping: asyncio.Task[None] | None = None
        self._doomed = self.stage.injector = Doomed(self._die)

    def _die(self, _: CallSite) -> None:
        self._dropping = self.stage.loop.create_task(self._drop())

    def __call__(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        return self._doomed(function, args, kwargs)

    async def start(self, doomed_at: int | None = None) -> bool:
        if self._dropping is not None:
            await self._dropping
            self._dropping = None
        self._doomed = self.stage.injector = Doomed(self._die)
        if doomed_at is not None:
            self._doomed.doom(doomed_at)
        self.stage.world.launch()
        self.stage.prepare_backend()
        with suppress(Death):
            await self.stage._serve()
        return self._doomed.died_at is None

    async def _drop(self) -> None:
        provider, self.stage.provider = self.stage.provider, None
        if provider is not None:
            await self.stage.drop(provider)
        self.stage.world.backend.close()

    def doom(self, k: int) -> None:
        self._doomed.doom(k)

    async def died_at(self) -> CallSite | None:
        return self._doomed.died_at

    async def stop(self) -> None:
        await self.stage.stop()


class Killed(DoomableProgram):
    """A program in a process of its own, on this machine; this one is only its consumers."""

    def __init__(self, stage: LinuxStage) -> None:
        self.stage = stage
        self._pid = 0
        self._control: socket.socket | None = None
        self._last: CallSite | None = None

    def _begin(self, doomed_at: int | None) -> socket.socket:
        """Start a process; return what it is told by, and says what it has to say."""
        self._reap()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._pid = os.fork()
        if self._pid == 0:
            ours.close()
            self._be_program(theirs, doomed_at)
        theirs.close()
        self._control, self._last = ours, None
        ours.setblocking(False)
        return ours

    async def start(self, doomed_at: int | None = None) -> bool:
        ours = self._begin(doomed_at)
        try:
            said = await asyncio.wait_for(self.stage.loop.sock_recv(ours, 4096), PATIENCE_S)
        except ConnectionResetError:
            said = b""
        if said == b"ready":
            return True
        self._note(said)
        return False

    def _note(self, said: bytes) -> None:
        """The program is dead, or about to be; it said before which call was its last."""
        if said in (b"", b"ready"):
            raise NotTolerated("the program ended by itself")
        who, where, name, nth = json.loads(said)
        self._last = CallSite(who, where, name, nth)
        self._reap()

    def _reap(self) -> None:
        if self._pid:
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
            self._pid = 0
        if self._control is not None:
            self._control.close()
            self._control = None

    def doom(self, k: int) -> None:
        self._tell(str(k).encode())

    async def spare(self) -> CallSite | None:
        assert self._control is not None
        self.doom(0)
        hearing = self.stage.loop.sock_recv(self._control, 4096)
        said = await asyncio.wait_for(hearing, PATIENCE_S)
        if said != _SPARED:
            self._note(said)
        return self._last

    def _tell(self, word: bytes) -> None:
        assert self._control is not None
        # It may be dead, which is heard by receiving.
        with suppress(BrokenPipeError):
            self._control.send(word)

    async def died_at(self) -> CallSite | None:
        if self._control is not None:
            with suppress(BlockingIOError):
                self._note(self._control.recv(4096))
        return self._last

    async def stop(self) -> None:
        """Let it go; as it makes no calls on this machine any more, killing it is as good."""
        self._reap()

    # Consumers that die.

    async def _crash(self, phase: str, k: int) -> CallSite | None:
        return await (self._consumer_dies if phase in CONSUMERS else super()._crash)(phase, k)

    async def _consumer_dies(self, how: str, k: int) -> CallSite | None:
        name = self.stage.new_name()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, theirs:
            pid = os.fork()
            if pid == 0:
                self._be_consumer(theirs, how, name, k)
            while os.waitpid(pid, os.WNOHANG) == (0, 0):
                await asyncio.sleep(0.002)
            ours.setblocking(False)
            last = None
            with suppress(BlockingIOError):
                last = CallSite(*json.loads(ours.recv(4096)))
        if last is None:
            return None
        if how == "served":
            with suppress(AllocationNotFound):
                await self.stage.consumer().end(name)
        await self._expect_free(name, is_served=how == "served")
        return last

    async def _expect_free(self, name: str, *, is_served: bool) -> None:
        """Expect an allocation of this name to be made at once, and nothing to be left of it."""
        stage = self.stage
        path = stage.path if is_served else stage.nowhere
        try:
            handoff = await stage.consumer(path).obtain(NamespaceRequest(name, stage.kinds, IMAGE))
        except NamespaceError as error:
            raise NotTolerated(f"afterwards its name cannot be used: {error}") from error
        if handoff.is_degraded is is_served:
            raise NotTolerated(f"afterwards it is not served: {handoff.fallback}")
        await handoff.end()
        await handoff.close()
        stage.tidy_own()
        scope = stage.world.scope(name)
        own = scope.parents[1] / SELF_SERVICE_SLICE / scope.relative_to(scope.parents[1])
        for _ in range(int(PATIENCE_S / POLL_S)):
            left = [str(path) for path in (scope, own) if path.exists()]
            left += [f"process {pid}" for pid in anchors_alive(OWN_TOKEN_PREFIX)]
            if not left:
                return
            await asyncio.sleep(POLL_S)
        raise NotTolerated(f"left of {name}: {left}")

    def _be_consumer(self, control: socket.socket, how: str, name: str, k: int) -> None:
        try:
            asyncio.set_event_loop(None)
            asyncio.events._set_running_loop(None)
            settings = replace(self.stage.world.settings, hold_time_s=0.0)
            own = LinuxBackend.for_self_service(settings, clock=time.monotonic)

            def die(call: CallSite) -> None:
                control.send(json.dumps([call.who, call.where, call.name, call.nth]).encode())
                if how == CONSUMERS[2] and own._forge.pid is not None:
                    os.kill(own._forge.pid, signal.SIGKILL)
                os.kill(os.getpid(), signal.SIGKILL)

            doomed = Doomed(die, "consumer")
            doomed.doom(k)
            path = self.stage.path if how == "served" else self.stage.nowhere
            with calls.hook_syscalls(doomed):
                consumer = Consumer(path, self.stage.world.inspector, service=own)
                wanted = NamespaceRequest(name, self.stage.kinds, IMAGE)
                with consumer.obtain(wanted) as handoff:
                    handoff.end()
                own.close()
        except BaseException as error:
            sys.stderr.write(f"the consumer failed: {error!r}\n")
        finally:
            os._exit(1)

    # Everything at random.

    def run_kills(self, seed: str, count: int) -> Counter[str]:
        """
        Kill programs at random while consumers are at work, and look at what each makes of it.

        Args:
            seed: Decides on everything but the timing.
            count: How many kills.

        Returns:
            How often what was killed.

        Raises:
            NotTolerated: something that was promised is not so.
        """
        return self.stage.loop.run_until_complete(Kills(self, random.Random(seed)).run(count))

    @property
    def forge(self) -> int | None:
        """The forge of the program, if it has one."""
        for thread in Path(f"/proc/{self._pid}/task").iterdir():
            with suppress(OSError):
                for child in (thread / "children").read_text().split():
                    return int(child)
        return None

    def kill(self) -> None:
        """Kill the program where it is."""
        self._reap()

    # What the process does.

    def _be_program(self, control: socket.socket, doomed_at: int | None) -> None:
        status = 1
        try:
            asyncio.set_event_loop(None)
            asyncio.events._set_running_loop(None)
            asyncio.run(self._serve(control, doomed_at))
            status = 0
        except BaseException as error:
            sys.stderr.write(f"the program failed: {error!r}\n")
        finally:
            os._exit(status)

    async def _serve(self, control: socket.socket, doomed_at: int | None) -> None:
        def die(call: CallSite) -> None:
            control.send(json.dumps([call.who, call.where, call.name, call.nth]).encode())
            os.kill(os.getpid(), signal.SIGKILL)

        doomed = Doomed(die, "provider")
        loop = asyncio.get_running_loop()

        def be_told() -> None:
            doomed.doom(int(control.recv(64) or b"0"))
            if doomed.calls_left is None:
                control.send(_SPARED)

        loop.add_reader(control, be_told)
        if doomed_at is not None:
            doomed.doom(doomed_at)
        with calls.hook_syscalls(doomed):
            world = self.stage.world
            world.launch()
            provider = Provider(listen(self.stage.path), world.backend)
            await provider.run(lambda: control.send(b"ready"))


class Kills:
    """
    Consumers at work, while the program, and what it and they have made, is killed at random.

    Two allocations are there all the time, each with a process, and have to stay what they are.
    """

    WORKERS = 3
    STAYING = 2
    PAUSE_MAX_S = 0.06
    CONSUMER_CALLS_MAX = 120
    """More than the calls of a consumer."""

    def __init__(self, program: Killed, chosen: random.Random) -> None:
        self._program = program
        self._stage = program.stage
        self._chosen = chosen
        self._is_over = False
        self._staying: dict[str, AsyncHandoff] = {}
        self._killed: set[str] = set()
        """Allocations whose anchors were killed."""

    async def run(self, count: int) -> Counter[str]:
        for _ in range(self.STAYING):
            handoff = await self._obtain(self._stage.new_name())
            name = handoff.request.allocation_id
            self._staying[name] = handoff
            self._stage.world.join(name)
        workers = [asyncio.ensure_future(self._work()) for _ in range(self.WORKERS)]
        kills = (self._kill_provider, self._kill_forge, self._kill_anchor, self._kill_consumer)
        done: Counter[str] = Counter()
        try:
            while done.total() < count:
                await asyncio.sleep(self._chosen.uniform(0, self.PAUSE_MAX_S))
                victim = await self._chosen.choice(kills)()
                done.update(victim)
                for worker in workers:
                    if worker.done():
                        worker.result()
        finally:
            self._is_over = True
            await asyncio.gather(*workers)
        for name in self._staying:
            await self._end_staying(name)
        self._program.kill()  # with it go the images that it holds
        await self._expect_nothing()
        if not await self._program.start():
            raise NotTolerated("no other program can be started")
        return done

    async def _kill_provider(self) -> list[str]:
        self._program.kill()
        if not await self._program.start():
            raise NotTolerated("no other program can be started")
        return ["provider"]

    async def _kill_forge(self) -> list[str]:
        forge = self._program.forge
        if forge is None:
            return []
        os.kill(forge, signal.SIGKILL)
        return ["forge"]

    async def _kill_anchor(self) -> list[str]:
        world = self._stage.world
        scopes = [world.scope(name) for name in world.scopes() if name not in self._staying]
        names = {read_attribute(path, OWNER_ATTRIBUTE): path.stem for path in scopes}
        anchors = find_anchors(world.anchors_cgroup)
        with ExitStack() as stack:
            found = [stack.enter_context(anchors[token]) for token in sorted(anchors)]
            found = [anchor for anchor in found if anchor.token in names]
            if not found:
                return []
            anchor = self._chosen.choice(found)
            self._killed.add(names[anchor.token])
            anchor.kill()
        return ["anchor"]

    async def _kill_consumer(self) -> list[str]:
        how = self._chosen.choice(CONSUMERS)
        k = self._chosen.randrange(1, self.CONSUMER_CALLS_MAX)
        last = await self._program._consumer_dies(how, k)
        return [] if last is None else [f"consumer, {how}"]

    async def _work(self) -> None:
        while not self._is_over:
            image = self._chosen.choice((None, IMAGE))
            request = NamespaceRequest(self._stage.new_name(), self._stage.kinds, image)
            with suppress(NamespaceError):  # a killed forge or anchor can be a refusal
                handoff = await self._stage.consumer().obtain(request)
                try:
                    if not handoff.is_degraded:
                        await asyncio.sleep(self._chosen.uniform(0, self.PAUSE_MAX_S))
                        await self._ask_again(handoff)
                finally:
                    await self._end(handoff)
            await asyncio.sleep(0)

    async def _ask_again(self, before: AsyncHandoff) -> None:
        """What was handed over and has not ended is handed over again, the same."""
        again = await self._stage.consumer().obtain(before.request)
        name = before.request.allocation_id
        try:
            is_same = again.is_degraded or again.identities == before.identities
            if not (is_same or before.is_ended or name in self._killed):
                raise NotTolerated(f"{name}: it had not ended, and is another now")
        finally:
            await self._end(again)

    async def _end(self, handoff: AsyncHandoff) -> None:
        if not (await handoff.end(PATIENCE_S) and await handoff.settle(PATIENCE_S)):
            raise NotTolerated(f"{handoff.request.allocation_id}: its end is not confirmed")
        await handoff.close()

    async def _obtain(self, name: str) -> AsyncHandoff:
        handoff = await self._stage.consumer().obtain(NamespaceRequest(name, self._stage.kinds))
        if handoff.is_degraded:
            raise NotTolerated(f"{name} is not served: {handoff.fallback}")
        return handoff

    async def _end_staying(self, name: str) -> None:
        before, again = self._staying[name], await self._obtain(name)
        if before.is_ended or again.identities != before.identities:
            raise NotTolerated(f"{name}: it had not ended, and is another now")
        (process,) = self._stage.world._members[name]
        if process.poll() is not None:
            raise NotTolerated(f"{name}: its process was killed")
        for handoff in (again, before):
            await self._end(handoff)
        self._stage.world.reap_killed(name)

    async def _expect_nothing(self) -> None:
        world = self._stage.world
        self._stage.hurry.passed_s += HOLD_TIME_S
        for _ in range(int(PATIENCE_S / POLL_S)):
            self._stage.tidy_own()
            left = [*map(described, anchors_alive()), *world.scopes(), *world.mounted()]
            if not left:
                return
            await asyncio.sleep(POLL_S)
        raise NotTolerated(f"left: {left}")


def crash_points(program: DoomableProgram, phase: str) -> Iterator[tuple[int, CallSite]]:
    """Let the program die at every call of a phase, one after the other."""
    k = 1
    while (last := program.run(phase, k)) is not None:
        yield k, last
        k += 1


@contextmanager
def dropped(directory: Path) -> Iterator[Dropped]:
    stage = SimulatedStage(directory)
    try:
        stage.start()
        with stage._complaining():
            program = Dropped(stage)
            with calls.hook_syscalls(program):
                yield program
            program._doomed.is_asleep = True
        if stage.world.leftovers():
            raise NotTolerated(f"left: {stage.world.leftovers()}")
        if stage.complaints:
            raise NotTolerated("; ".join(stage.complaints))
    finally:
        stage.close()


@contextmanager
def killed(
    directory: Path,
    cgroup2: Path,
    image_root: Path,
    make: Callable[[LinuxStage], Killed] = Killed,
    *,
    has_pool: bool = False,
) -> Iterator[Killed]:
    stage = LinuxStage(directory, cgroup2, image_root, has_pool=has_pool)
    stage.loop.hurry.is_patient = True
    program = make(stage)
    stage.world.backend = stage.service()  # closed with the world; there is no other in here
    try:
        assert stage.loop.run_until_complete(program.start())
        yield program
    finally:
        program._reap()
        # The forges of the dead notice it in their own time, and are in the anchors' cgroup.
        anchors = stage.world.anchors_cgroup
        wait_until(lambda: not anchors.is_dir() or stage.world._has_no_forge())
        stage.close()
