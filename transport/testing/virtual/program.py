"""A provider's program and its peers in a virtual world: started, stopped, and killed."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Coroutine, Generator, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from statemachine.messages import AllocationEnded, Message, NamespaceRequest
from statemachine.provider import Limits

from ...calls import hook_syscalls
from ...channel import Channel, Delivery, send_once
from ...endpoint import listen
from ...request import blocking
from ...serve import Provider, Spans, work
from ..peer import frame_of
from .backend import VirtualBackend
from .choices import Scheduler
from .drivers import LoopProgram
from .network import VirtualConnection, VirtualNetwork
from .polling import VirtualSelect
from .rules import ProviderRules, expect
from .threads import VirtualThreading, replaced
from .world import Actor, ActorSteps, VirtualWorld

Hearing = Generator[Callable[[], bool] | None, None, Message | None]
"""Steps that end with a message, or None at the end of the connection."""


class ProviderProgram(LoopProgram):
    """
    A provider's program.

    Args:
        stage: where it runs.
        limits: who may use it.
        spans: how long its timers run.
    """

    def __init__(self, stage: VirtualStage, limits: Limits, spans: Spans) -> None:
        super().__init__(stage.world, "provider")
        self._stage = stage
        listener = listen(stage.path)
        self.rules = ProviderRules(
            stage.world, self.loop, stage.network, stage.backend, limits, spans
        )
        stage.network.rules = stage.backend.rules = self.rules
        stage.threading.program = self
        self.provider = Provider(
            listener, stage.backend, limits=limits, spans=spans, observer=self.rules.observe
        )
        self.rules.provider = self.provider
        self.is_ready = False
        self.run(self._main, then=self.rules.end)

    def stop(self) -> None:
        """Ask it to stop."""
        self.loop.call_soon_threadsafe(self.provider.stop)

    def kill(self, then: Callable[[], None]) -> None:
        """Kill it where it stands; then go on with something."""
        self.rules.end()
        self._stage.world.end_program(self)
        self._stage.world.urgent.append(self._bury)
        self._stage.world.urgent.append(then)

    def _main(self) -> Coroutine[Any, Any, None]:
        remembering = self.rules.remember
        return self.provider.run(self._note_ready, on_recovered=lambda _: remembering())

    def _note_ready(self) -> None:
        self.is_ready = self._stage.world.is_choosing = True

    def _bury(self) -> None:
        """Close what the kernel closes when a program is killed."""
        provider: Any = self.provider
        provider._is_closed = True
        connections = provider._connections
        for connection in connections._open.values():
            connection.abandon()
        with suppress(ValueError, OSError):
            connections._started.close()
        connections._listener._reserve.close()
        connections._listener._sock.close()
        self._stage.network.reset()
        self.abandon()

    def drop(self) -> None:
        """Leave nothing of it, when a run is over."""
        if not self.has_ended:
            self.rules.end()
            self._bury()


class VirtualStage:
    """
    A world with a provider, its backend and its peers.

    Args:
        scheduler: says what is next.
        directory: where the socket is.
        tries: how often a release has to be tried.
        limits: who may use the provider.
        spans: how long the provider's timers run.
        network: how the sockets behave, as `VirtualNetwork` has it.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        directory: Path,
        tries: int = 1,
        limits: Limits | None = None,
        spans: Spans | None = None,
        **network: Any,
    ) -> None:
        self.world = VirtualWorld(scheduler)
        self.path = directory / "handoff.sock"
        self.backend = VirtualBackend(self.world, tries)
        self.network = VirtualNetwork(self.world, **network)
        self.threading = VirtualThreading(self.world)
        self.peers: list[VirtualPeer] = []
        self.consumers: list[Any] = []
        """Programs of consumers; a `ConsumerProgram` each."""
        self._limits = limits or Limits(frozenset({os.geteuid()}))
        self._spans = spans or Spans()
        self.programs: list[ProviderProgram] = []

    @property
    def program(self) -> ProviderProgram:
        """The one that was started last."""
        return self.programs[-1]

    def start(self) -> None:
        """Start a provider's program, on what there is of an earlier one."""
        self.programs.append(ProviderProgram(self, self._limits, self._spans))

    def peer(self, name: str, life: Callable[[VirtualPeer], ActorSteps], uid: int = -1) -> None:
        """Let a peer live."""
        peer = VirtualPeer(self, name, os.geteuid() if uid < 0 else uid)
        self.peers.append(peer)
        self.world.add(Actor(name, life(peer)))

    def may(self, name: str, do: Callable[[], object]) -> None:
        """Let something happen once, at any time, or never."""
        self.world.add(Actor(name, _once(do), is_optional=True))

    def kill_and_start(self) -> None:
        """Kill the program, and start another."""
        self.program.kill(self.start)

    def run(self, *, is_start_chosen: bool = False) -> None:
        """
        Run until the peers have done what they do, and nothing is left to do; then stop.

        Args:
            is_start_chosen: whether the scheduler is asked also before the first program is ready.

        Raises:
            BaseException: what was found.
        """
        self.world.is_choosing = is_start_chosen
        self.start()
        musts = [actor for actor in self.world.actors if not actor.is_optional]
        self.world.run(
            lambda: (
                all(actor.is_done for actor in musts)
                and all(each.has_ended for each in self.consumers)
                and self._is_at_rest()
            )
        )
        for actor in self.world.actors:
            actor.is_done = True
        self.world.is_choosing = False
        if not self.program.has_ended:
            self.program.stop()
            self.world.run(lambda: self.program.has_ended)
            is_excused = bool(self.backend.hanging)
            hung = self.program.provider.has_hung and not is_excused
            expect(not hung, "work is under way when it has stopped")

    def _is_at_rest(self) -> bool:
        """Whether a thread or a peer has nothing to do before time passes."""
        return not self.world.is_anything_able()

    def close(self) -> None:
        """Leave nothing open."""
        self.world.end()
        for program in self.programs:
            program.drop()
        for peer in self.peers:
            peer.close()
        for consumer in self.consumers:
            consumer.drop()
        self.backend.close()
        self.path.unlink(missing_ok=True)


@contextmanager
def staged(stage: VirtualStage) -> Iterator[VirtualStage]:
    """Have the calls of drivers be those of a stage meanwhile."""
    with ExitStack() as stack:
        stack.callback(stage.close)
        stack.enter_context(replaced(work, "threading", stage.threading))
        # Two are as good as four at getting in each other's way, and make half the orders.
        stack.enter_context(replaced(work, "IMAGE_WORKERS_MAX", 2))
        stack.enter_context(replaced(blocking, "select", VirtualSelect(stage.world)))
        stack.enter_context(hook_syscalls(stage.network.hook))
        yield stage


def _once(do: Callable[[], object]) -> ActorSteps:
    do()
    return
    yield


class VirtualPeer:
    """A peer, made by hand: what it says and hears, in steps."""

    def __init__(self, stage: VirtualStage, name: str, uid: int) -> None:
        self.name = name
        self.stage = stage
        self.heard: list[Message] = []
        self.has_heard_all = False
        """Whether the provider has hung up."""
        self._channel: Channel | None = None
        self._uid = uid

    @property
    def link(self) -> VirtualConnection:
        return next(link for link in reversed(self.stage.network.links) if link.who == self.name)

    def connect(self) -> bool:
        """Connect, if a provider listens; what was connected before is closed."""
        self.close()
        self.has_heard_all = False
        sock = socket.socket(socket.AF_UNIX)
        network = self.stage.network
        network.who, network.uids[self.name] = self.name, self._uid
        try:
            network.hook(sock.connect, (str(self.stage.path),), {})
        except OSError:
            sock.close()
            return False
        finally:
            network.who = ""
        self._channel = Channel(sock, accepts_descriptors=True)
        return True

    def say(self, what: Message | bytes) -> None:
        """Say something, as far as the provider still takes it; nothing if it is closed."""
        if self._channel is None:
            return
        data = what if isinstance(what, bytes) else frame_of(what)
        with suppress(BrokenPipeError, ConnectionResetError):
            send_once(self._channel.sock, data)

    def ask(self, name: str, kinds: Any = (), image: str | None = None) -> None:
        self.say(NamespaceRequest(name, tuple(kinds), image))

    def end(self, name: str) -> None:
        self.say(AllocationEnded(name))

    def hear(self) -> Hearing:
        """Wait for the next message."""
        assert self._channel is not None
        if self.has_heard_all:
            return None
        while (received := self._channel.receive_next()) is None:
            yield self._has_news
        if not isinstance(received, Delivery):
            self.has_heard_all = True
            return None
        received.bundle.close()
        self.heard.append(received.message)
        return received.message

    def hear_all(self) -> ActorSteps:
        """Hear everything, until the provider hangs up."""
        while (yield from self.hear()) is not None:
            pass

    def pause(self, seconds: float) -> ActorSteps:
        """Do nothing for a time."""
        world = self.stage.world
        until = world.now + seconds
        world.alarms.append(until)
        yield lambda: world.now >= until

    def close(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def _has_news(self) -> bool:
        assert self._channel is not None
        try:
            self._channel.sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            pass
        return True
