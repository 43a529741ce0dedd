"""Whatever consumers, processes and crashes do in whatever order, every promise is kept.

One machine, two worlds: a provider on a real socket over the simulated node, and the same over this
node. The model beside it knows no states: only which allocation is alive, under which request, in
which incarnation, who holds it, and which namespaces it was handed over with.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Final

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from served import Served
from worlds import IMAGE, MOUNT, NET, PID, LinuxWorld, SimulatedWorld, World, eventually

from specs import invariants as always
from statemachine import effects as do
from statemachine import events as on
from statemachine.effects import Effect
from statemachine.errors import AllocationNotFound, CreationFailed
from statemachine.events import Event
from statemachine.lifecycle import AllocationState
from statemachine.messages import NamespaceRequest
from transport.request import Consumer, Handoff

WAIT_S: Final = 10.0
STEPS: Final = 25

_pick: Final = st.integers(min_value=0, max_value=5)


def requests_of(prefix: str) -> tuple[NamespaceRequest, ...]:
    """Three allocations; the first also under another order, which is another request."""
    return (
        NamespaceRequest(f"{prefix}-a", (NET, PID, MOUNT), IMAGE),
        NamespaceRequest(f"{prefix}-a", (PID, NET, MOUNT), IMAGE),
        NamespaceRequest(f"{prefix}-b", (MOUNT, PID)),
        NamespaceRequest(f"{prefix}-c", (PID,)),
    )


@dataclass(slots=True)
class Life:
    """What the model knows of one incarnation."""

    number: int
    request: NamespaceRequest
    identities: tuple[object, ...]
    processes: int = 0
    holders: list[Handoff] = field(default_factory=list)


class Handoffs(RuleBasedStateMachine):
    """What anybody may do with a provider; `world` is set by whoever runs it."""

    prefix = ""

    def open_world(self) -> World:
        raise AssertionError("a world is needed")

    def __init__(self) -> None:
        super().__init__()
        self.world = self.open_world()
        self.folder = tempfile.TemporaryDirectory(prefix="nsh-")
        self.path = Path(self.folder.name) / "handoff.sock"
        self.served = self.serve()
        self.requests = requests_of(self.prefix)
        self.numbers = count(1)
        self.lives: dict[str, Life] = {}
        self.hand_overs: list[tuple[int, tuple[object, ...]]] = []
        self.over: set[str] = set()
        self.history: History = []

    # Consumers.

    @rule(pick=_pick)
    def somebody_asks(self, pick: int) -> None:
        request = self.requests[pick % len(self.requests)]
        name = request.allocation_id
        life = self.lives.get(name)
        if life is not None and life.request != request:
            self.is_refused(request)
            return
        handoff = self.consumer.obtain(request)
        if life is None:
            life = Life(next(self.numbers), request, handoff.identities)
            self.lives[name] = life
            self.over.discard(name)
        life.holders.append(handoff)
        self.hand_overs.append((life.number, handoff.identities))
        always.require(
            always.response_answers_its_request(request, handoff.response),
            always.descriptors_are_what_the_response_says(
                handoff.response.fd_types, [identity.kind for identity in handoff.identities]
            ),
        )
        assert not handoff.is_degraded

    def is_refused(self, request: NamespaceRequest) -> None:
        with pytest.raises(CreationFailed, match="another request"):
            self.consumer.obtain(request)

    @precondition(lambda self: self.lives)
    @rule(pick=_pick)
    def a_consumer_goes(self, pick: int) -> None:
        life = self.one(pick)
        if life.holders:
            life.holders.pop().close()

    @precondition(lambda self: self.lives)
    @rule(pick=_pick)
    def a_holder_ends_it(self, pick: int) -> None:
        life = self.one(pick)
        if life.holders:
            assert life.holders[0].end(WAIT_S)
            self.has_ended(life)

    @precondition(lambda self: self.lives)
    @rule(pick=_pick)
    def somebody_else_ends_it(self, pick: int) -> None:
        life = self.one(pick)
        self.consumer.end(life.request.allocation_id, WAIT_S)
        self.has_ended(life)

    @precondition(lambda self: self.over)
    @rule(pick=_pick)
    def somebody_ends_what_is_over(self, pick: int) -> None:
        names = sorted(self.over)
        self.consumer.end(names[pick % len(names)], WAIT_S)

    @rule()
    def somebody_ends_what_never_was(self) -> None:
        with pytest.raises(AllocationNotFound):
            self.consumer.end(f"{self.prefix}-never", WAIT_S)

    @rule(name=st.sampled_from(["", "..", "a/b", "cgroup.procs", "x" * 129]))
    def somebody_asks_nonsense(self, name: str) -> None:
        with pytest.raises(CreationFailed):
            self.consumer.obtain(NamespaceRequest(name, (PID,)))

    # Processes.

    @precondition(lambda self: self.lives)
    @rule(pick=_pick)
    def a_process_joins(self, pick: int) -> None:
        life = self.one(pick)
        self.world.join(life.request.allocation_id)
        life.processes += 1

    @precondition(lambda self: any(life.processes for life in self.lives.values()))
    @rule(pick=_pick)
    def a_process_leaves(self, pick: int) -> None:
        used = [life for life in self.lives.values() if life.processes]
        life = used[pick % len(used)]
        self.world.leave(life.request.allocation_id)
        life.processes -= 1
        if not life.processes:
            self.has_ended(life)

    @precondition(lambda self: any(not life.processes for life in self.lives.values()))
    @rule(pick=_pick)
    def a_process_passes_through(self, pick: int) -> None:
        unused = [life for life in self.lives.values() if not life.processes]
        life = unused[pick % len(unused)]
        self.world.pass_through(life.request.allocation_id)
        self.has_ended(life)

    @precondition(lambda self: self.lives)
    @rule(pick=_pick)
    def an_init_dies(self, pick: int) -> None:
        life = self.one(pick)
        self.world.kill_init(life.request.allocation_id)
        self.has_ended(life)

    @precondition(lambda self: self.lives)
    @rule(pick=_pick)
    def it_is_frozen_and_thawed(self, pick: int) -> None:
        name = self.one(pick).request.allocation_id
        self.world.freeze(name)
        self.world.freeze(name, is_frozen=False)

    # The provider.

    @rule()
    def the_provider_starts_anew(self) -> None:
        self.history += self.served.turns
        self.served.stop()
        self.world.backend.close()
        self.world.launch()
        self.served = self.serve()
        for life in self.lives.values():
            # What was handed over still is; only nobody is called any more.
            for handoff in life.holders:
                handoff.close()
            life.holders.clear()

    # What is true.

    @invariant()
    def every_promise_is_kept(self) -> None:
        ends, releases = ends_and_releases([*self.history, *self.served.turns])
        live = {name: life.identities for name, life in self.lives.items()}
        always.require(
            always.allocations_are_isolated(live),
            always.an_incarnation_is_one_set_of_namespaces(self.hand_overs),
            always.ended_at_most_once(ends),
            always.released_at_most_once(releases),
        )
        for name, life in self.lives.items():
            assert not any(handoff.wait_ended(0.0) for handoff in life.holders), name

    def teardown(self) -> None:
        with ExitStack() as stack:
            stack.callback(self.folder.cleanup)
            stack.callback(self.world.close)
            stack.callback(self.served.stop)
            for name, life in tuple(self.lives.items()):
                self.consumer.end(name, WAIT_S)
                self.has_ended(life)
            assert self.world.leftovers() == []

    # In one word.

    def serve(self) -> Served:
        served = Served(self.path, self.world.backend)
        served.wait_ready()
        return served

    @property
    def consumer(self) -> Consumer:
        return Consumer(self.path, self.world.inspector)

    def one(self, pick: int) -> Life:
        names = sorted(self.lives)
        return self.lives[names[pick % len(names)]]

    def has_ended(self, life: Life) -> None:
        """Everyone who holds it hears of it; then it is released, and its name is remembered."""
        name = life.request.allocation_id
        for handoff in life.holders:
            assert handoff.wait_ended(WAIT_S), f"{name}: a holder was not told of the end"
            handoff.close()
        eventually(lambda: self.served.state_of(name) is AllocationState.RELEASED)
        del self.lives[name]
        self.over.add(name)
        self.world.bury(name)


Incarnation = tuple[str, int]
"""An allocation's name, and how often it had been created by then."""

History = list[tuple[Event, tuple[Effect, ...]]]


def ends_and_releases(history: History) -> tuple[list[Incarnation], list[Incarnation]]:
    """Find every decision that an incarnation is over, and every report that nothing is left."""
    created: Counter[str] = Counter()
    ends: list[Incarnation] = []
    releases: list[Incarnation] = []
    for event, effects in history:
        if isinstance(event, on.NamespacesReleased):
            releases.append((event.allocation_id, created[event.allocation_id]))
        for effect in effects:
            if isinstance(effect, do.CreateNamespaces):
                created[effect.request.allocation_id] += 1
            elif isinstance(effect, do.StartTimer) and effect.timer is do.Timer.RELEASE:
                ends.append((effect.allocation_id, created[effect.allocation_id]))
    return ends, releases


@contextmanager
def machine(prefix: str, make: type[World] | object) -> Iterator[type[Handoffs]]:
    """A class of its own for one test: Hypothesis makes many of it."""

    class Machine(Handoffs):
        def open_world(self) -> World:
            world = make()  # type: ignore[operator]
            world.launch()
            return world

    Machine.prefix = prefix
    yield Machine


def test_promises_on_a_simulated_node() -> None:
    with machine("sim", SimulatedWorld) as machine_class:
        run_state_machine_as_test(
            machine_class, settings=settings(max_examples=60, stateful_step_count=STEPS)
        )


@pytest.mark.needs_root
def test_promises_on_this_node(
    allocation_id: str, tmp_path: Path, cgroup2: Path, image_root: Path
) -> None:
    folders = count(1)

    def make() -> LinuxWorld:
        folder = tmp_path / str(next(folders))
        folder.mkdir()
        return LinuxWorld(folder, cgroup2, image_root)

    with machine(allocation_id, make) as machine_class:
        run_state_machine_as_test(
            machine_class, settings=settings(max_examples=25, stateful_step_count=STEPS)
        )
