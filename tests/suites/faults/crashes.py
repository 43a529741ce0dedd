"""A provider's program that dies before its k-th system call, and another one started after it.

On the simulated node the program is dropped where it stands (`Dropped`); on this machine it is a
process of its own, and killed (`Killed`). Whichever call is the last: what was handed off is handed
off again, the same; what was ended and confirmed is not; what was half made is gone.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from statemachine.errors import NamespaceError
from statemachine.messages import NamespaceRequest
from tests.suites.faults.faults import Call, Death, FaultInjector
from tests.suites.faults.lives import Broken, LinuxStage, SimulatedStage, Stage
from transport import calls
from transport.endpoint import listen
from transport.request import AsyncHandoff
from transport.serve import Provider
from transport.testing.peer import wait_until

PATIENCE_S: Final = 20.0
"""How long anything may take; it takes milliseconds."""

PHASES: Final = ("obtaining", "ending", "recovering")
"""What the program is doing when it dies."""


class Doomed(FaultInjector):
    """Lets the provider's calls pass until it is doomed; then the k-th is its last."""

    def __init__(self, on_death: Callable[[Call], None] | None = None) -> None:
        super().__init__()
        self.calls_left: int | None = None
        self.died_at: Call | None = None
        self._on_death = on_death

    def doom(self, k: int) -> None:
        self.calls_left = k or None

    def kind_for(self, call: Call) -> str | None:
        if call.who in self.dead:
            return "death"
        if call.who != "provider" or self.calls_left is None:
            return None
        self.calls_left -= 1
        if self.calls_left > 0:
            return None
        self.died_at = call
        if self._on_death is not None:
            self._on_death(call)
        return "death"


class Program(ABC):
    """A provider's program that can be doomed, and consumers that outlive it."""

    stage: Stage

    @abstractmethod
    async def start(self, doomed_at: int | None = None) -> bool:
        """Start the program on the machine as it is; say whether it came to serve."""

    @abstractmethod
    def doom(self, k: int) -> None:
        """Let the k-th call from now on be the program's last; 0: none."""

    @abstractmethod
    async def died_at(self) -> Call | None:
        """Which call was its last, if it is dead."""

    @abstractmethod
    async def stop(self) -> None:
        """Let it go in good order."""

    def run(self, phase: str, k: int) -> Call | None:
        """
        Let it die before its k-th call in a phase, and look at what the next one makes of it.

        Returns:
            The call; None if the phase was over before.

        Raises:
            Broken: something that was promised is not so.
        """
        return self.stage.loop.run_until_complete(asyncio.wait_for(self._crash(phase, k), 1e6))

    async def _crash(self, phase: str, k: int) -> Call | None:
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
            self.doom(0)
        elif not await self.start():
            raise Broken("no other program can be started")
        if ending is not None:
            await asyncio.wait_for(ending, PATIENCE_S * 100)
        second = await self._obtain(wanted)
        if second is None or second.is_degraded:
            raise Broken(
                f"afterwards the allocation is not handed over: {second and second.fallback}"
            )
        is_same = second.identities == before
        if is_handed and not is_over and not is_same:
            raise Broken("it was handed over, and is another now")
        if is_handed and is_over and is_same:
            raise Broken("it was ended and confirmed, and is the same again")
        await second.end()
        await second.close()
        if first is not None:
            await first.close()
        return last

    async def _await_death(self, ending: asyncio.Future[None] | None) -> Call | None:
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


class Dropped(Program):
    """A program in this one, on the simulated node; when it is dead it does nothing any more."""

    def __init__(self, stage: SimulatedStage) -> None:
        self.stage = stage
        self._dropping: asyncio.Task[None] | None = None
        self._doomed = self.stage.injector = Doomed(self._die)

    def _die(self, _: Call) -> None:
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

    async def died_at(self) -> Call | None:
        return self._doomed.died_at

    async def stop(self) -> None:
        await self.stage.stop()


class Killed(Program):
    """A program in a process of its own, on this machine; this one is only its consumers."""

    def __init__(self, stage: LinuxStage) -> None:
        self.stage = stage
        self._pid = 0
        self._control: socket.socket | None = None
        self._last: Call | None = None

    async def start(self, doomed_at: int | None = None) -> bool:
        self._reap()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._pid = os.fork()
        if self._pid == 0:
            ours.close()
            self._be_program(theirs, doomed_at)
        theirs.close()
        self._control, self._last = ours, None
        ours.setblocking(False)
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
            raise Broken("the program ended by itself")
        who, where, name, nth = json.loads(said)
        self._last = Call(who, where, name, nth)
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
        assert self._control is not None
        self._control.send(str(k).encode())

    async def died_at(self) -> Call | None:
        if self._control is not None:
            with suppress(BlockingIOError):
                self._note(self._control.recv(4096))
        return self._last

    async def stop(self) -> None:
        """Let it go; as it makes no calls on this machine any more, killing it is as good."""
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
        def die(call: Call) -> None:
            control.send(json.dumps([call.who, call.where, call.name, call.nth]).encode())
            os.kill(os.getpid(), signal.SIGKILL)

        doomed = Doomed(die)
        doomed.who = "provider"
        loop = asyncio.get_running_loop()
        loop.add_reader(control, lambda: doomed.doom(int(control.recv(64) or b"0")))
        if doomed_at is not None:
            doomed.doom(doomed_at)
        with calls.hook_syscalls(doomed):
            world = self.stage.world
            world.launch()
            provider = Provider(listen(self.stage.path), world.backend)
            await provider.run(lambda: control.send(b"ready"))


def crash_points(program: Program, phase: str) -> Iterator[tuple[int, Call]]:
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
            raise Broken(f"left: {stage.world.leftovers()}")
        if stage.complaints:
            raise Broken("; ".join(stage.complaints))
    finally:
        stage.close()


@contextmanager
def killed(directory: Path, cgroup2: Path, image_root: Path) -> Iterator[Killed]:
    stage = LinuxStage(directory, cgroup2, image_root)
    stage.loop.hurry.is_patient = True
    program = Killed(stage)
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
