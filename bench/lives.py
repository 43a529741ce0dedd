"""Random lives of allocations, which a soak leads on this node or on a simulated one."""

from __future__ import annotations

import random
import subprocess
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from linux.cgroups import WORKLOAD_SLICE, Scope
from linux.features import Features
from linux.forge.spawn import spawn_within
from linux.namespaces import KernelInspector
from linux.simulated import SimulatedBackend, SimulatedCrash, SimulatedInspector, SimulatedNode
from linux.testing.worlds import IMAGE, OTHER_IMAGE, SCOPE_PREFIX
from statemachine import (
    AllocationEnded,
    AllocationNotFound,
    CreationFailed,
    FdPassing,
    NamespaceRequest,
    NamespaceType,
    ProviderKernel,
    SocketUnavailable,
)
from statemachine.consumer import ConsumerKernel
from statemachine.testing.strategies import ORDERS
from transport.contract import Backend
from transport.request import Consumer
from transport.request.exchange import ANSWER_TIMEOUT_S
from transport.testing.gated_backend import GatedBackend
from transport.testing.in_process import InProcessProvider, InsideConsumer, InsideVoice, Pipe

HELD_MAX: Final = 6
"""How many lives a consumer leads at a time."""
CLAIM_S: Final = 30.0
LOOSE_S: Final = CLAIM_S / 3
"""How long an allocation that has neither connection nor process is sure to live."""
STEPS_TO_CRASH: Final = 400
"""Of a simulated provider's program, on average."""
REAP_S: Final = 60.0


# --- Lives ---------------------------------------------------------------------------------------


@dataclass
class HeldAllocation:
    """An allocation that a consumer holds."""

    request: NamespaceRequest
    handoff: Any = None
    """None while no connection is."""
    process: Any = None
    is_inherited: bool = False
    """Whether another consumer had it, and may have left a process in it."""
    loose_since: float | None = None

    @property
    def name(self) -> str:
        return self.request.allocation_id


class Crew:
    """
    A consumer with several allocations at a time, one random step after the other.

    Args:
        member: its number, in names and reports.
        seed: of its choices.
        place: where it has its provider, real or simulated.
        report: told of every step; what `Ledger.take` takes.
    """

    def __init__(self, member: int, seed: int, place: Any, report: Callable[..., None]) -> None:
        self._member, self._place, self._report = member, place, report
        self._rng = random.Random(f"{seed} {member}")
        self._count = 0
        self._held: list[HeldAllocation] = []
        self._former: deque[str] = deque(maxlen=20)

    def take_over(self, name: str, request: Any, state: str) -> None:
        """Go on with what a consumer had that was killed."""
        kinds = tuple(map(NamespaceType, request[1]))
        held = HeldAllocation(NamespaceRequest(name, kinds, request[2]), is_inherited=True)
        if state == "held":
            self._held.append(held)
            self._again(held)
        else:
            self._end(held, "taken over")

    def step(self) -> None:
        works: list[tuple[Callable[..., None], list[Any], int]] = [
            (self._again, self._held, 4),
            (self._enter, [h for h in self._held if h.handoff and is_free(h)], 3),
            (self._leave, [h for h in self._held if h.process], 2),
            (self._end, self._held, 2),
            (self._drop, [h for h in self._held if h.handoff], 1),
            (self._begin, [None] if len(self._held) < HELD_MAX else [], 4),
        ]
        possible = [each for each in works if each[1]]
        work, choices, _ = self._rng.choices(possible, [weight for *_, weight in possible])[0]
        work(self._rng.choice(choices))

    def finish(self) -> None:
        """End all that is alive."""
        while self._held:
            self._end(self._held[-1])

    # The steps.

    def _begin(self, _: None) -> None:
        if self._former and self._rng.random() < 0.1:
            name = self._former.popleft()
        else:
            self._count += 1
            name = f"{SCOPE_PREFIX}{self._member}-{self._count}"
        kinds = self._rng.choice(ORDERS)
        may_have_image = NamespaceType.MOUNT in kinds and self._rng.random() < 0.5
        image = self._rng.choice((IMAGE, OTHER_IMAGE)) if may_have_image else None
        held = HeldAllocation(NamespaceRequest(name, kinds, image))
        self._report("asked", name, self._member, (name, [kind.value for kind in kinds], image))
        started = self._place.clock()
        try:
            held.handoff, tries = self._obtain(held, joins=False)
        except CreationFailed as error:
            self._report("refused", name, str(error))
            return
        took_ms = (self._place.clock() - started) * 1e3 if tries == 1 else None
        self._report("got", name, identities_of(held.handoff), took_ms)
        self._held.append(held)

    def _again(self, held: HeldAllocation) -> None:
        """Ask for it again; without a connection for it, that is the connection from now on."""
        if held.loose_since is not None and self._place.clock() - held.loose_since > LOOSE_S:
            self._end(held)
            return
        try:
            handoff, _ = self._obtain(held, joins=True)
        except CreationFailed as error:
            self._report("broken", held.name, f"is alive, and refused: {error}")
            self._end(held)
            return
        self._report("again", held.name, identities_of(handoff))
        if held.handoff is None:
            held.handoff, held.loose_since = handoff, None
        else:
            handoff.close()

    def _enter(self, held: HeldAllocation) -> None:
        self._report("entering", held.name)
        held.process = self._place.enter(held.name, held.handoff.bundle, self._rng)
        self._report("entered", held.name)

    def _drop(self, held: HeldAllocation) -> None:
        held.handoff.close()
        held.handoff = None
        if held.process is None:
            held.loose_since = self._place.clock()

    def _leave(self, held: HeldAllocation) -> None:
        """Let its last process exit, and wait until it is over."""
        self._report("ending", held.name, "emptied")
        self._place.leave(held.name, held.process)
        deadline = self._place.clock() + ANSWER_TIMEOUT_S
        while self._place.has_scope(held.name) and not self._hears_end(held):
            if self._place.clock() > deadline:
                self._report("broken", held.name, "its last process is gone, and it does not end")
                self._confirm_end(held)
                break
        self._finish(held)

    def _end(self, held: HeldAllocation, how: str = "message") -> None:
        self._report("ending", held.name, how)
        started = self._place.clock()
        is_over = False
        if held.handoff is not None:
            is_over = self._call(held, lambda: held.handoff.end(ANSWER_TIMEOUT_S))[0]
        if not is_over:
            self._confirm_end(held)
        took_ms = (self._place.clock() - started) * 1e3 if is_over else None
        if held.process is not None:
            self._place.reap(held.name, held.process)
        self._finish(held, took_ms)

    def _finish(self, held: HeldAllocation, took_ms: float | None = None) -> None:
        self._report("over", held.name, took_ms)
        if held.handoff is not None:
            held.handoff.close()
        with suppress(ValueError):
            self._held.remove(held)
        self._former.append(held.name)

    def _hears_end(self, held: HeldAllocation) -> bool:
        self._place.rest()
        return held.handoff is not None and held.handoff.wait_ended(0.0)

    def _confirm_end(self, held: HeldAllocation) -> None:
        """Say the end on a connection of its own; what was over long ago may be forgotten."""
        with suppress(AllocationNotFound):
            self._call(held, lambda: self._place.consumer().end(held.name, ANSWER_TIMEOUT_S))

    def _obtain(self, held: HeldAllocation, joins: bool) -> tuple[Any, int]:
        return self._call(held, lambda: self._place.consumer(joins).obtain(held.request))

    def _call(self, held: HeldAllocation, call: Callable[[], Any]) -> tuple[Any, int]:
        """Call until the provider has answered, which may be killed; say how often it took."""
        started, tries = self._place.clock(), 0
        while True:
            tries += 1
            try:
                result = call()
            except (SocketUnavailable, FdPassing, SimulatedCrash) as error:
                self._place.go_on_after(error)
                if self._place.clock() - started < ANSWER_TIMEOUT_S:
                    continue
                self._report("broken", held.name, f"unanswered: {error}")
                raise
            if self._place.clock() - started >= ANSWER_TIMEOUT_S:
                self._report("broken", held.name, "unanswered for longer than a consumer waits")
            return result, tries


def is_free(held: HeldAllocation) -> bool:
    """Say whether no process can be in its scope."""
    return held.process is None and not held.is_inherited


def identities_of(handoff: Any) -> list[str]:
    return [f"{identity.kind.value}:{identity.key}" for identity in handoff.identities]


# --- On a simulated node --------------------------------------------------------------------------


class SimulatedPlace:
    """
    A provider and its node in this thread; its program dies at random steps.

    Args:
        rng: decides at which.
        wrap: what the provider has for a backend.
    """

    clock = staticmethod(time.perf_counter)

    def __init__(self, rng: random.Random, wrap: Callable[[Backend], Any] = GatedBackend) -> None:
        self._rng, self._wrap = rng, wrap
        self.node = SimulatedNode(frozenset({IMAGE, OTHER_IMAGE}), hook=self._before)
        self.crashes = 0
        self.start()

    def start(self) -> None:
        self.backend = SimulatedBackend(self.node, hold_time_s=0.01, clock=time.monotonic)
        self.provider = InProcessProvider(ProviderKernel, GatedBackend(self._wrap(self.backend)))
        self._is_dead, self._steps_left = False, self._rng.randrange(1, 2 * STEPS_TO_CRASH)
        self.work()

    def _before(self, *_: object) -> None:
        self._steps_left -= 1
        if self._steps_left == 0:
            self._is_dead = True
            raise SimulatedCrash

    def crash_no_more(self) -> None:
        """Have the program live from now on."""
        self._steps_left = 0

    def connect(self) -> Pipe:
        return self.provider.connect()

    def work(self) -> None:
        if not self._is_dead:
            self.provider.turns.clear()
            self.provider.work()

    def go_on_after(self, error: BaseException) -> None:
        if not self._is_dead:
            raise error
        while self._is_dead:
            self.crashes += 1
            self.stop()
            with suppress(SimulatedCrash):  # so early, that there is another to be started
                self.start()

    def stop(self) -> None:
        self.provider.stop()
        self.backend.close()

    def consumer(self, joins: bool = False) -> InsideConsumer:
        return InsideConsumer(ConsumerKernel, SimulatedInspector(), self.connect, self.work)

    def enter(self, name: str, *_: object) -> bool:
        self.node.start_process(name)
        self.rest()
        return True

    def leave(self, name: str, _: object) -> None:
        self.node.end_process(name)

    def reap(self, name: str, _: object) -> None:
        """Simulated parents reap."""

    def has_scope(self, name: str) -> bool:
        return self.node.has_scope(name)

    def rest(self) -> None:
        try:
            self.work()
        except SimulatedCrash as error:
            self.go_on_after(error)

    def be_hostile(self, rng: random.Random) -> None:
        """Say what no consumer says, on a line of its own, and hang up at any moment."""
        voice = InsideVoice(self.connect(), self.work)
        name = f"hostile-{rng.randrange(4)}"
        kind = rng.choice(tuple(NamespaceType))
        messages = [
            AllocationEnded(f"never-{name}"),
            NamespaceRequest(name, (kind, kind)),
            NamespaceRequest(name, (NamespaceType.PID,)),
            NamespaceRequest(name, (kind,)),
            NamespaceRequest(name, (), IMAGE),
            AllocationEnded(name),
        ]
        try:
            voice.say(*rng.choices(messages, k=rng.randrange(1, 40)))
            voice.hang_up()
        except SimulatedCrash as error:
            self.go_on_after(error)


# --- On this node ---------------------------------------------------------------------------------


class RealPlace:
    """A provider's socket, and what its consumers do on this node."""

    clock = staticmethod(time.perf_counter)

    def __init__(self, socket: Path, cgroup2: Path) -> None:
        self._socket = socket
        self._slice = cgroup2 / WORKLOAD_SLICE
        self._inspector = KernelInspector(Features.probe())

    def consumer(self, joins: bool = False) -> Consumer:
        return Consumer(self._socket, self._inspector, joins=joins)

    def enter(self, name: str, bundle: Any, rng: random.Random) -> subprocess.Popen[bytes]:
        """Start a process in the scope, sometimes in the namespaces too, which takes long."""
        scope = self._slice / f"{name}.scope"
        if rng.random() < 0.1:
            with Scope(scope, "").open_procs() as procs:
                command = ["sleep", "infinity"]
                return spawn_within(command, bundle, scope=procs, stderr=subprocess.DEVNULL)
        # It enters by itself, or not at all, also if this consumer is killed just now.
        enters = 'echo 0 > "$0" && echo && exec sleep infinity'
        command = ["sh", "-c", enters, scope / "cgroup.procs"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert process.stdout is not None
        with process.stdout as answer:
            assert answer.read(1), f"{scope} cannot be entered"
        return process

    def leave(self, name: str, process: subprocess.Popen[bytes]) -> None:
        process.kill()
        process.wait()

    def reap(self, name: str, process: subprocess.Popen[bytes]) -> None:
        """Wait for a process that the release has killed."""
        process.wait(REAP_S)

    def has_scope(self, name: str) -> bool:
        return (self._slice / f"{name}.scope").exists()

    def rest(self) -> None:
        time.sleep(0.002)

    def go_on_after(self, error: BaseException) -> None:
        """Give a provider that was killed the time to come back."""
        time.sleep(0.05)
