"""Our own adapters: the model, the kernels, and the provider on a socket over either backend.

All of them can do whatever the machine knows to do. What happens on the node is the business of a
`World`; where the provider runs is what tells the adapters apart.
"""

from __future__ import annotations

import os
import tempfile
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from linux.testing.worlds import IMAGE, LinuxWorld, SimulatedWorld, World
from statemachine import events as on
from statemachine.effects import Timer
from statemachine.events import Event
from statemachine.provider import Limits
from statemachine.states import AllocationState
from tests.support.serving import Serving, connect_as
from transport.serve import Spans
from transport.testing.adapter import Ability, Adapter, History, OnSocket, StalledWork, Voice
from transport.testing.gated_backend import GatedBackend
from transport.testing.in_process import (
    ConsumerBrain,
    InProcessProvider,
    InsideConsumer,
    InsideVoice,
    Pipe,
    ProviderBrain,
)
from transport.testing.machine import TIGHT, Handoffs
from transport.testing.peer import wait_until

FOREVER: Final = Spans(readiness_s=1e6, claim_s=1e6, release_s=1e6)
"""Nothing runs out unless it is told to."""


OTHER: Final = 54_321
"""A second user, who needs no account."""

LIMITS: Final = replace(TIGHT, allowed_uids=frozenset({os.geteuid(), OTHER}))

AS_ROOT: Final = frozenset({Ability.USERS})
"""What only root can do: be another user."""


class OnWorld(Adapter):
    """A provider over the backend of a world that is the machine's own to shake."""

    limits = LIMITS

    def __init__(self, world: World, path: Path) -> None:
        super().__init__(path, world.inspector, IMAGE)
        self.world = world
        self.past: History = []
        self._held: set[tuple[StalledWork, str]] = set()
        self.launch()
        self.serve()

    def start(self) -> None:
        # What is known of the node until here, whatever happens to it meanwhile, the old one knows.
        self.world.backend.close()
        self.launch()
        self.serve()

    def launch(self) -> None:
        """Have a program, which does not serve yet."""
        self.world.launch()
        self.gate = GatedBackend(self.world.backend)
        for work, name in self._held:
            self.gate.hold(work, name)

    # What happens on the node.

    def join(self, name: str) -> None:
        self.world.join(name)

    def leave(self, name: str) -> None:
        self.world.leave(name)

    def pass_through(self, name: str) -> None:
        self.world.pass_through(name)

    def freeze(self, name: str, *, is_frozen: bool) -> None:
        self.world.freeze(name, is_frozen=is_frozen)

    def reap_killed(self, name: str) -> None:
        self.world.reap_killed(name)

    def kill_init(self, name: str) -> None:
        self.world.kill_init(name)

    def block_release(self, name: str) -> None:
        self.world.block_release(name)

    def unblock_release(self, name: str) -> None:
        self.world.unblock_release(name)

    def kept(self) -> Counter[Hashable]:
        if not isinstance(self.world, SimulatedWorld):
            return Counter()  # only pidfds of the anchors
        return self.world.node.identities

    def leftovers(self) -> list[str]:
        return self.world.leftovers()

    # The hand on the backend.

    def hold(self, work: StalledWork, name: str = "") -> None:
        self._held.add((work, name))
        self.gate.hold(work, name)

    def let_go(self, work: StalledWork, name: str = "") -> None:
        self._held.discard((work, name))
        self.gate.let_go(work, name)
        if work is StalledWork.RECOVER:
            self.wait_ready()

    def scarcity(self) -> AbstractContextManager[None]:
        return self.gate.scarcity()

    # The provider.

    @abstractmethod
    def serve(self) -> None:
        """Have the program serve."""

    @abstractmethod
    def wait_ready(self) -> None:
        """Wait until requests are served."""

    @abstractmethod
    def turns(self) -> History:
        """What the provider of now took in and decided."""

    def history(self) -> History:
        return [*self.past, *self.turns()]

    @contextmanager
    def seeing(self, kind: type[Event], name: str) -> Iterator[None]:
        def times() -> int:
            seen = [event for event, _ in self.turns() if isinstance(event, kind)]
            return sum(getattr(event, "allocation_id", None) == name for event in seen)

        before = times()
        yield
        wait_until(lambda: times() > before, f"{kind.__name__} of {name}")


class OnSocketOfOurs(OnWorld):
    """The provider as it is, in a thread, on a socket."""

    abilities = frozenset(Ability) - {Ability.KILL} - (AS_ROOT if os.geteuid() else frozenset())

    def __init__(self, world: World) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="nsh-")
        super().__init__(world, Path(self._folder.name) / "handoff.sock")

    def voice_of_another(self) -> Voice:
        return OnSocket(self.path, lambda path: connect_as(path, OTHER))

    def turns(self) -> History:
        return self.served.turns

    def serve(self) -> None:
        is_held = self.gate.is_held(StalledWork.RECOVER)
        serving = Serving(
            self.path, self.gate, limits=self.limits, spans=FOREVER, waits_ready=not is_held
        )
        self.served = serving.__enter__()

    def wait_ready(self) -> None:
        self.served.wait_ready()

    def stop(self) -> None:
        self.past += self.served.turns
        self.served.end()

    def release(self, name: str) -> None:
        self.served.ask(lambda: self.served.provider._feed(on.ReleaseRequested(name)))

    def wait_held(self, work: StalledWork, name: str = "") -> None:
        self.gate.wait_held(work, name)

    def is_running(self, timer: Timer, name: str) -> bool:
        timers = self.served.provider._timers
        return self.served.ask(lambda: (timer, name) in timers._running)

    def expire(self, timer: Timer, name: str) -> None:
        wait_until(lambda: self.is_running(timer, name), f"{timer} of {name}")
        self.served.ask(lambda: self.served.provider._timers.expire(timer, name))

    def wait_released(self, name: str) -> None:
        wait_until(lambda: self.served.state_of(name) is AllocationState.RELEASED)

    def close(self) -> None:
        with ExitStack() as stack:
            stack.callback(self._folder.cleanup)
            stack.callback(self.world.close)
            stack.callback(self.served.end)


class InProcess(OnWorld):
    """
    No socket and no thread: a brain, and the effects it wants, performed at once.

    Args:
        world: of memory, because here nothing is waited for.
        provider: decides for the provider.
        consumer: decides for each consumer.
        limits: of the provider.
    """

    abilities = frozenset(Ability)

    def __init__(
        self,
        world: SimulatedWorld,
        provider: Callable[[Limits], ProviderBrain],
        consumer: ConsumerBrain,
        limits: Limits = LIMITS,
    ) -> None:
        self._provider = provider
        self._consumer = consumer
        self.limits = limits
        super().__init__(world, Path("nowhere"))

    def turns(self) -> History:
        return self.inside.turns

    def serve(self) -> None:
        self.inside = InProcessProvider(self._provider, self.gate, self.limits)
        self.inside.work()

    def stop(self) -> None:
        self.past += self.inside.turns
        self.inside.stop()

    kill = stop

    def voice(self) -> Voice:
        return InsideVoice(self._connect(), self._work)

    def voice_of_another(self) -> Voice:
        return InsideVoice(self.inside.connect(OTHER), self._work)

    def consumer(self) -> InsideConsumer:
        return InsideConsumer(self._consumer, self.inspector, self._connect, self._work)

    def _connect(self) -> Pipe:
        return self.inside.connect()

    def _work(self) -> None:
        self.inside.work()

    @contextmanager
    def seeing(self, kind: type[Event], name: str) -> Iterator[None]:
        with super().seeing(kind, name):
            yield
            self._work()

    def wait_ready(self) -> None:
        self._work()

    def wait_held(self, work: StalledWork, name: str = "") -> None:
        self._work()
        found = [whose for what, whose in self.inside.held_up if what is work]
        assert name in found or (found and not name), f"{work} does not begin"

    def release(self, name: str) -> None:
        self.inside.release(name)

    def is_running(self, timer: Timer, name: str) -> bool:
        return (timer, name) in self.inside.timers

    def expire(self, timer: Timer, name: str) -> None:
        self.inside.expire(timer, name)

    def wait_released(self, name: str) -> None:
        self._work()
        assert self.inside.brain.state_of(name) is AllocationState.RELEASED

    def close(self) -> None:
        self.inside.stop()
        self.world.close()


@dataclass(frozen=True, slots=True)
class LinuxNode:
    """What the adapter over this node needs."""

    directory: Path
    """Its own, and empty."""
    cgroup2: Path
    image_root: Path

    def world(self) -> LinuxWorld:
        """Have a world in a directory of its own."""
        folder = Path(tempfile.mkdtemp(dir=self.directory))
        return LinuxWorld(folder, self.cgroup2, self.image_root)


def machine(prefix: str, make: Callable[[], Adapter]) -> type[Handoffs]:
    """Make a class of its own for one test: Hypothesis makes many of it."""
    return type("Machine", (Handoffs,), {"prefix": prefix, "open_adapter": lambda self: make()})
