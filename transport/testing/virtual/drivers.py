"""Programs with an event loop in a virtual world: any driver, in every order of its steps.

    def run(scheduler):
        run_drivers(scheduler, {"mine": main}, [Actor("peer", steps())])

    explore(run, deviations=1, depth=100)    # then `sample(run, range(100))`

`main` is given the world and makes a coroutine. What it and the actors do is interleaved as the
scheduler says; time passes when nothing else can be done, or when the scheduler says so. An actor
that is to be heard by a loop calls its `call_soon_threadsafe`, or writes to a descriptor.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Mapping
from contextlib import suppress
from typing import Any

from .choices import Scheduler
from .loop import VirtualLoop
from .world import Actor, VirtualWorld


class LoopProgram:
    """
    A program with an event loop: a coroutine that is run to its end, or killed.

    Args:
        world: where it runs.
        name: its own, in the story of a run.
        whole: what it is a part of, and is killed with; None: it is alone.
    """

    def __init__(self, world: VirtualWorld, name: str, whole: object = None) -> None:
        self.name = name
        self.loop = VirtualLoop(world, name, whole or self)
        self.has_ended = False
        self.task: asyncio.Task[object] | None = None
        """What is run; kept, because what is killed is closed by hand."""
        self._world = world
        self._whole = whole or self

    def run(
        self, main: Callable[[], Coroutine[Any, Any, object]], then: Callable[[], object] = bool
    ) -> None:
        """
        Run it, as a thread of the world.

        Args:
            main: makes the coroutine; called in that thread.
            then: called when it has come to its end.
        """

        def work() -> None:
            self.task = self.loop.create_task(main())
            with suppress(asyncio.CancelledError):
                self.loop.run_until_complete(self.task)
            left = asyncio.all_tasks(self.loop)
            self.has_ended = True
            then()
            self.loop.close()
            if left:
                raise AssertionError(f"tasks are left: {left}")

        self._world.start(work, self.name, self._whole)

    def cancel(self) -> None:
        """Cancel what it does."""
        if self.task is not None and not self.has_ended:
            self.loop.call_soon_threadsafe(self.task.cancel)

    def abandon(self) -> None:
        """Close the loop of one that was killed, or when a run is over."""
        self.loop.abandon()
        self.has_ended = True


def run_drivers(
    scheduler: Scheduler,
    mains: Mapping[str, Callable[[VirtualWorld], Coroutine[Any, Any, object]]],
    actors: Iterable[Actor] = (),
) -> VirtualWorld:
    """
    Run drivers and what is around them once, until all drivers have come to their ends.

    Args:
        scheduler: says what is next.
        mains: by name, the coroutine that each driver runs on a loop of its own.
        actors: what acts between the steps of the drivers.

    Returns:
        The world, with the story of the run.

    Raises:
        BaseException: what a driver or an actor raised, with the story as a note.
    """
    world = VirtualWorld(scheduler)
    programs = [LoopProgram(world, name) for name in mains]
    for program in programs:
        program.run(lambda name=program.name: mains[name](world))  # type: ignore[misc]
    for actor in actors:
        world.add(actor)
    try:
        world.run(lambda: all(program.has_ended for program in programs))
    except BaseException as error:
        error.add_note("\n".join(world.story))
        raise
    finally:
        world.end()
        for program in programs:
            program.abandon()
    return world
