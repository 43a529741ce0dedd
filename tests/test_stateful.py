"""Whatever consumers, processes and crashes do in whatever order, every promise is kept.

One machine, `tests/handoffs.py`, on two worlds: a provider on a real socket over the simulated
node, and the same over this node. Here it can do everything: end processes, kill inits, start the
provider anew.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from itertools import count
from pathlib import Path

import pytest
from handoffs import STEPS, Ability, Adapter, Handoffs, History
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test
from served import Served
from worlds import IMAGE, LinuxWorld, SimulatedWorld, World, eventually

from statemachine.errors import CreationFailed
from statemachine.lifecycle import AllocationState
from statemachine.messages import NamespaceRequest


class OnWorld(Adapter):
    """A provider in a thread, over the backend of a world that is the machine's own to shake."""

    abilities = frozenset(Ability)

    def __init__(self, world: World) -> None:
        self.world = world
        self.folder = tempfile.TemporaryDirectory(prefix="nsh-")
        super().__init__(Path(self.folder.name) / "handoff.sock", world.inspector, IMAGE)
        self.past: History = []
        world.launch()
        self.served = self.serve()

    def serve(self) -> Served:
        served = Served(self.path, self.world.backend)
        served.wait_ready()
        return served

    def restart(self) -> None:
        self.past += self.served.turns
        self.served.stop()
        self.world.backend.close()
        self.world.launch()
        self.served = self.serve()

    def join(self, name: str) -> None:
        self.world.join(name)

    def leave(self, name: str) -> None:
        self.world.leave(name)

    def pass_through(self, name: str) -> None:
        self.world.pass_through(name)

    def freeze(self, name: str, *, is_frozen: bool) -> None:
        self.world.freeze(name, is_frozen=is_frozen)

    def bury(self, name: str) -> None:
        self.world.bury(name)

    def kill_init(self, name: str) -> None:
        self.world.kill_init(name)

    def wait_released(self, name: str) -> None:
        eventually(lambda: self.served.state_of(name) is AllocationState.RELEASED)

    def history(self) -> History:
        return [*self.past, *self.served.turns]

    def leftovers(self) -> list[str]:
        return self.world.leftovers()

    def close(self) -> None:
        with ExitStack() as stack:
            stack.callback(self.folder.cleanup)
            stack.callback(self.world.close)
            stack.callback(self.served.stop)


def machine(prefix: str, make: Callable[[], World]) -> type[Handoffs]:
    """A class of its own for one test: Hypothesis makes many of it."""

    class Machine(Handoffs):
        def open_adapter(self) -> Adapter:
            return OnWorld(make())

        def is_refused(self, request: NamespaceRequest) -> None:
            with pytest.raises(CreationFailed, match="another request"):
                self.consumer.obtain(request)

    Machine.prefix = prefix
    return Machine


def test_promises_on_a_simulated_node() -> None:
    run_state_machine_as_test(
        machine("sim", SimulatedWorld),
        settings=settings(max_examples=60, stateful_step_count=STEPS),
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

    run_state_machine_as_test(
        machine(allocation_id, make),
        settings=settings(max_examples=25, stateful_step_count=STEPS),
    )
