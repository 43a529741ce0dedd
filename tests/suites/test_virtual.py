"""Drivers in a virtual world: in every order with one choice that is not the usual, and at random.

With more of both it is a part of the campaign (`tests/campaign/virtual_campaign.py`). What is found
is shrunk, and says how it is run again.
"""

from __future__ import annotations

import asyncio
import random

import pytest

from tests.suites.virtual.__main__ import main
from tests.suites.virtual.lives import LIVES, VirtualLife
from transport.testing.virtual.choices import (
    BrokenRun,
    Scheduler,
    explore,
    read,
    sample,
    written,
)
from transport.testing.virtual.drivers import LoopProgram, run_drivers
from transport.testing.virtual.world import Actor, ActorSteps, Stuck, VirtualWorld

DEPTH = 1_000
"""More choices than any of these lives has in any order."""

SEEDS = range(12)

EVERY = [pytest.param(life, id=name) for name, life in LIVES.items()]


@pytest.mark.parametrize("life", EVERY)
def test_in_every_order_with_one_preemption_a_life_keeps_the_rules(life: VirtualLife) -> None:
    explored = explore(life.run, 1, DEPTH, life.orders, life.replay)
    assert explored.is_complete or life.orders
    assert explored.runs > 20


@pytest.mark.parametrize("life", EVERY)
def test_in_an_order_at_random_a_life_keeps_the_rules(life: VirtualLife) -> None:
    assert sample(life.run, SEEDS, replay=life.replay).choices > 100


@pytest.mark.parametrize(
    ("name", "script"),
    [
        # The rest of its frame had come, and was not read, because its answers waited.
        ("half a frame, and blocked", ""),
        # The rest of its frame had come while the loop stood still, and was not read yet.
        ("late together", "29:1"),
        # It had read everything while the loop stood still, and the room was not noticed yet.
        ("it reads no more", "15:1"),
    ],
)
def test_a_peer_that_kept_its_time_is_not_refused(name: str, script: str) -> None:
    LIVES[name].run(Scheduler(read(script.split())))


def test_a_run_is_the_same_whenever_it_is_run() -> None:
    for name in ("a life, cut", "killed", "a crowd"):
        scheduler = Scheduler((), random.Random(5), 0.2)
        story = LIVES[name].run(scheduler).world.story
        again = Scheduler(scheduler.script)
        assert LIVES[name].run(again).world.story == story
        assert again.widths == scheduler.widths


def test_a_run_is_told_step_by_step(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["a life", "3:1"]) == 0
    said = capsys.readouterr().out
    assert "event NamespacesReleased(allocation_id='a')" in said
    assert "to A's connection 1: AllocationEnded(allocation_id='a')" in said
    assert main(["no life"]) == 2


# --- The scheduler itself ------------------------------------------------------------------------


def _race(scheduler: Scheduler) -> None:
    """Two add one each, with a read and a write that are two steps."""
    world, count = VirtualWorld(scheduler), [0]

    def add() -> None:
        world.switch("reads")
        before = count[0]
        world.switch("writes")
        count[0] = before + 1

    threads = [world.start(add, name) for name in "ab"]
    try:
        world.run(lambda: all(thread.is_done for thread in threads))
    finally:
        world.end()
    assert count[0] == 2, "an update is lost"


def test_basic_an_update_that_is_lost_is_found_shrunk_and_found_again() -> None:
    _race(Scheduler())
    with pytest.raises(BrokenRun, match="an update is lost") as found:
        explore(_race, 1, 10)
    assert len(found.value.script) == 1
    with pytest.raises(AssertionError, match="an update is lost"):
        _race(Scheduler(read(written(found.value.script).split())))
    with pytest.raises(BrokenRun) as found:
        sample(_race, range(100), (0.5,))
    assert len(found.value.script) == 1


def test_every_order_within_the_bounds_is_run_once() -> None:
    orders = []

    def run(scheduler: Scheduler) -> None:
        orders.append(tuple(scheduler.choose(3) for _ in range(4)))

    assert explore(run, 0, 9).runs == 1
    assert explore(run, 1, 9).runs == 1 + 4 * 2
    orders.clear()
    assert explore(run, 4, 9).runs == 3**4 == len(set(orders))
    assert explore(run, 4, 2).runs == 3**2
    assert explore(run, 4, 9, runs_max=5) == (5, 20, False)


def test_what_is_waited_for_and_never_comes_is_said() -> None:
    def steps() -> ActorSteps:
        yield lambda: False

    world = VirtualWorld(Scheduler())
    actor = world.add(Actor("a", steps()))
    with pytest.raises(Stuck, match="nothing is left"):
        world.run(lambda: actor.is_done)


# --- A driver of another kind --------------------------------------------------------------------


class Queued:
    """Hears of a deadline through its queue, in which an answer may stand before it."""

    loop: asyncio.AbstractEventLoop | None = None
    is_late = False

    async def main(self, world: VirtualWorld) -> None:
        self.queue: asyncio.Queue[str] = asyncio.Queue()
        self.loop = asyncio.get_running_loop()
        timer = self.loop.call_later(30, self.queue.put_nowait, "too late")
        self.is_late = await self.queue.get() == "too late"
        timer.cancel()
        await asyncio.sleep(0)
        assert self.queue.empty() or self.is_late, "too late, and answered"

    def answer(self) -> ActorSteps:
        yield lambda: self.loop is not None
        assert self.loop is not None
        self.loop.call_soon_threadsafe(self.queue.put_nowait, "answer")


def _run_queued(scheduler: Scheduler) -> VirtualWorld:
    driver = Queued()
    return run_drivers(scheduler, {"queued": driver.main}, [Actor("peer", driver.answer())])


def test_a_driver_of_another_kind_is_run_in_every_order() -> None:
    with pytest.raises(BrokenRun, match="too late, and answered") as caught:
        explore(_run_queued, 2, DEPTH)
    assert len(caught.value.script) == 1
    (told,) = caught.value.finding.__notes__
    assert "time passes: 30 s" in told
    with pytest.raises(AssertionError, match="too late, and answered"):
        _run_queued(Scheduler(caught.value.script))
    with pytest.raises(BrokenRun):
        sample(_run_queued, range(100))


def test_time_passes_for_a_driver_when_nothing_else_can_happen() -> None:
    async def sleep(world: VirtualWorld) -> None:
        before = world.now
        await asyncio.gather(asyncio.sleep(1e6), asyncio.sleep(2e6))
        assert world.now == before + 2e6

    world = run_drivers(Scheduler(), {"one": sleep, "other": sleep})
    assert [line for line in world.story if "time passes" in line] == ["time passes: 1e+06 s"] * 2


def test_a_driver_that_leaves_tasks_or_waits_for_ever_is_found() -> None:
    async def leave(world: VirtualWorld) -> None:
        world.left = asyncio.create_task(asyncio.sleep(1))  # type: ignore[attr-defined]

    async def wait(world: VirtualWorld) -> None:
        await asyncio.Event().wait()

    with pytest.raises(AssertionError, match="tasks are left"):
        run_drivers(Scheduler(), {"one": leave})
    with pytest.raises(Stuck, match="nothing is left"):
        run_drivers(Scheduler(), {"one": wait})


def test_a_driver_may_be_cancelled() -> None:
    world = VirtualWorld(Scheduler())
    program = LoopProgram(world, "one")
    ended: list[str] = []

    async def wait() -> None:
        await asyncio.Event().wait()

    def cancel() -> ActorSteps:
        yield lambda: program.task is not None
        program.cancel()

    program.run(wait, then=lambda: ended.append("one"))
    world.add(Actor("operator", cancel()))
    world.run(lambda: program.has_ended)
    world.end()
    assert ended == ["one"]
    assert program.loop.is_closed()
