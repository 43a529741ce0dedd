"""Providers that are processes of their own, so that SIGKILL ends them wherever they are.

Over this node the backend is in the process, and dies with it. A simulated node outlives the
provider as a kernel does: it is in the test's process, and the provider's backend calls it
(`NodeHost`). What is called when the provider dies comes to an end before its next step, as a
system call would.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import pickle
import signal
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any, Final, NoReturn

from linux.simulated import SimulatedCrash
from linux.testing.worlds import LinuxWorld, SimulatedWorld, World
from statemachine import events as on
from statemachine.provider import Limits
from tests.suites.stateful.adapters import AS_ROOT, FOREVER, LIMITS, OnSocketOfOurs
from transport.channel import receive_once, send_once
from transport.contract import Backend, Step
from transport.descriptors import Descriptor, DescriptorBundle
from transport.endpoint import listen
from transport.serve import Provider
from transport.testing.adapter import Ability, History, StalledWork
from transport.testing.gated_backend import GatedBackend
from transport.testing.peer import DEADLINE_S, wait_until

_REPLY_BYTES_MAX: Final = 1 << 17

SO_ACCEPTCON: Final = "00010000"
"""In /proc/net/unix: it listens."""

_BEYOND: Final = frozenset({Ability.OPERATOR, Ability.TIME, Ability.LIMITS})
"""
What only who is in the provider's process can do to it; limits are met exactly only if it is known
what the provider has noticed by now.
"""


class NodeHost:
    """
    Lends a backend to another process, call by call; a thread for each of its threads.

    Args:
        backend: lent.
        path: where it is called.
    """

    def __init__(self, backend: GatedBackend, path: Path) -> None:
        self._backend = backend
        self._is_dead = False
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(path))
        self._listener.listen()
        self._threads: list[threading.Thread] = []
        self._start(self._accept)

    def before(self, go_on: Callable[[Step, str], None], step: Step, name: str) -> None:
        """Let a step be done, unless the program is dead whose step it is."""
        if self._is_dead:
            raise SimulatedCrash
        go_on(step, name)

    def end(self) -> None:
        """Do no further step for a program that is dead."""
        self._is_dead = True
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)

    def join(self) -> None:
        """Wait until every call of it is over."""
        for thread in self._threads:
            thread.join(DEADLINE_S)
            assert not thread.is_alive(), "a call of a dead program goes on"
        self._listener.close()

    def _start(self, target: Callable[..., None], *arguments: Any) -> None:
        self._threads.append(threading.Thread(target=target, args=arguments))
        self._threads[-1].start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                caller, _ = self._listener.accept()
                self._start(self._serve, caller)

    def _serve(self, caller: socket.socket) -> None:
        with caller, suppress(SimulatedCrash, ConnectionError):
            while said := caller.recv(_REPLY_BYTES_MAX):
                name, arguments = pickle.loads(said)
                try:
                    self._answer(caller, getattr(self._backend, name)(*arguments), name)
                except Exception as error:
                    caller.send(pickle.dumps((False, error)))

    def _answer(self, caller: socket.socket, result: Any, name: str) -> None:
        if isinstance(result, DescriptorBundle):
            with result:
                send_once(caller, pickle.dumps((True, result.types)), result.filenos())
        elif name == "fileno":
            send_once(caller, pickle.dumps((True, None)), [result])
        else:
            caller.send(pickle.dumps((True, result)))


class HostedBackend:
    """A backend in another process; fulfils `transport.contract.Backend`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._mine = threading.local()
        _, (self._signal,) = self._call("fileno")

    def fileno(self) -> int:
        return self._signal.fileno()

    def bundle_of(self, allocation_id: str) -> DescriptorBundle:
        types, descriptors = self._call("bundle_of", allocation_id)
        return DescriptorBundle(types, descriptors)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *arguments: self._call(name, *arguments)[0]

    def _call(self, name: str, *arguments: Any) -> tuple[Any, list[Descriptor]]:
        if not hasattr(self._mine, "line"):
            self._mine.line = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self._mine.line.connect(str(self._path))
        self._mine.line.send(pickle.dumps((name, arguments)))
        reception = receive_once(self._mine.line, _REPLY_BYTES_MAX, 8)
        is_result, result = pickle.loads(reception.data)
        if not is_result:
            raise result
        return result, reception.descriptors


class ForkedProvider:
    """
    A provider in a process of its own, forked from this one.

    Args:
        serve: called there with the end of a pipe; says on it what the provider sees.
    """

    def __init__(self, serve: Callable[[int], object]) -> None:
        self.turns: History = []
        self._is_ready = threading.Event()
        read_end, write_end = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            _run(serve, write_end)
        os.close(write_end)
        self._reader = threading.Thread(target=self._read, args=(read_end,))
        self._reader.start()

    def wait_ready(self) -> None:
        assert self._is_ready.wait(DEADLINE_S), "the provider does not become ready"

    def end(self, number: int) -> int:
        """End it with a signal, hear what it has said by then, and return its status."""
        os.kill(self._pid, number)
        _, status = os.waitpid(self._pid, 0)
        self._reader.join(DEADLINE_S)
        return status

    def _read(self, read_end: int) -> None:
        with open(read_end, "rb") as said, suppress(EOFError, pickle.UnpicklingError):
            while True:
                turn = pickle.load(said)
                if turn is None:
                    self._is_ready.set()
                else:
                    self.turns.append(turn)


def _run(serve: Callable[[int], object], write_end: int) -> NoReturn:
    """Serve in this process, a fork, and end it; never returns."""
    status = 1
    try:
        gc.freeze()  # what it has from its parent is closed below, and not to be closed again
        # These would be written to by their numbers, which other files have later.
        logging.disable()
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
        for number in map(int, os.listdir("/proc/self/fd")):
            if number > 2 and number != write_end:
                with suppress(OSError):
                    os.close(number)
        serve(write_end)
        status = 0
    finally:
        os._exit(status)


class OnProcessOfOurs(OnSocketOfOurs):
    """The provider as it is, in a process of its own, over a simulated node."""

    abilities = frozenset(Ability) - _BEYOND - (AS_ROOT if os.geteuid() else frozenset())
    limits = Limits(allowed_uids=LIMITS.allowed_uids)
    host: NodeHost | None = None

    def __init__(self, world: World) -> None:
        self.statuses: list[int] = []
        """How each provider so far has ended, as waitpid(2) tells."""
        super().__init__(world)

    def launch(self) -> None:
        super().launch()
        if self.host is not None:
            self.host.join()
        world = self.world
        assert isinstance(world, SimulatedWorld)
        self._called = self.path.with_name(f"node-{len(self.past)}")
        self._called.unlink(missing_ok=True)
        self.host = NodeHost(self.gate, self._called)
        world.node.hook = partial(self.host.before, world.before)

    def backend(self) -> Backend:
        """Have a backend, in the provider's process."""
        hosted: Any = HostedBackend(self._called)
        return hosted

    def serve(self) -> None:
        self.process = ForkedProvider(self._serve)
        wait_until(partial(_listens, self.path), "the socket")
        if not self.gate.is_held(StalledWork.RECOVER):
            self.wait_ready()

    def _serve(self, write_end: int) -> None:
        said = open(write_end, "wb", buffering=0)  # noqa: SIM115 - as long as the process

        def say(turn: Any) -> None:
            said.write(pickle.dumps(turn))

        async def run() -> None:
            # The one before may have been killed and its socket be there still.
            provider = Provider(
                listen(self.path, mode=0o666),
                self.backend(),
                limits=self.limits,
                spans=FOREVER,
                observer=lambda event, effects: say((event, effects)),
            )
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, provider.stop)
            await provider.run(lambda: say(None))

        asyncio.run(run())

    def turns(self) -> History:
        return self.process.turns

    def wait_ready(self) -> None:
        self.process.wait_ready()

    def stop(self) -> None:
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        self._end(signal.SIGKILL)
        self.path.unlink()

    def _end(self, number: int) -> None:
        self.statuses.append(self.process.end(number))
        self.past += self.process.turns
        if self.host is not None:
            self.host.end()

    def wait_released(self, name: str) -> None:
        def is_released() -> bool:
            seen = [event for event, _ in self.history() if isinstance(event, _TURNING_POINTS)]
            last = [event for event in seen if event.allocation_id == name][-1:]
            return bool(last) and isinstance(last[0], on.NamespacesReleased)

        wait_until(is_released, f"the release of {name}")

    def close(self) -> None:
        with ExitStack() as stack:
            stack.callback(self._folder.cleanup)
            stack.callback(self.world.close)
            if self.host is not None:
                stack.callback(self.host.join)
            stack.callback(self._end, signal.SIGTERM)


def _listens(path: Path) -> bool:
    """Say whether a socket takes connections, which it does some time after it is bound."""
    lines = Path("/proc/net/unix").read_text().splitlines()
    return any(line.endswith(f" {path}") and line.split()[3] == SO_ACCEPTCON for line in lines)


_TURNING_POINTS: Final = (
    on.NamespacesCreated,
    on.CreatedAdopted,
    on.HandedOffAdopted,
    on.RemainsFound,
    on.NamespacesReleased,
)
"""What begins the life of an allocation in a provider, and what is the end of it."""


class OnLinuxProcess(OnProcessOfOurs):
    """The provider as it is, in a process of its own, over this node."""

    abilities = frozenset({Ability.PROCESSES, Ability.RESTART, Ability.KILL, Ability.USERS})

    def __init__(self, world: LinuxWorld) -> None:
        # What of the world asks a backend asks one that is closed: what is on the node.
        world.launch()
        world.backend.close()
        super().__init__(world)

    def launch(self) -> None:
        self.gate = GatedBackend(self.world.backend)

    def backend(self) -> Backend:
        self.world.launch()
        return self.world.backend

    def _end(self, number: int) -> None:
        super()._end(number)
        assert isinstance(self.world, LinuxWorld)
        wait_until(self.world._has_no_forge, "the end of the forge")
